"""The object a user holds: a network with its schedule and its data's modality.

Configurations, checkpoints, denoisers, precision, loading, the hub, wrapped networks, and the importers of other
libraries' checkpoints. It imports `sampling`, `nn`, `data` and what is below; nothing of training or evaluation.
"""

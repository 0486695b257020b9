"""Models: a trained network with its noise schedule and its data's modality.

Configurations, checkpoints, denoisers, precision, loading, the Hugging Face Hub, wrapped networks, and importers of
other libraries' checkpoints. Imports `sampling`, `nn`, `data` and lower layers, never training or evaluation.
"""

"""Our work inside other programs: schedulers and folders for diffusers, ONNX and `torch.export` programs.

Importers of other libraries' checkpoints are in `ddim.model.importers`. It imports `model` and what is below.
"""

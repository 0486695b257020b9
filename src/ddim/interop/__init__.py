"""Use of models and plans in other programs: diffusers schedulers and folders, ONNX and `torch.export` programs.

Importers of other libraries' checkpoints are in `ddim.model.importers`. It imports `model` and the layers below.
"""

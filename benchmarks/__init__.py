"""What is claimed of speed, measured beside a peer in the same run; see docs/benchmarks.md."""

from ddim.evaluation.fidelity import patch_torchvision

patch_torchvision()  # else a torchvision that does not fit torch breaks diffusers

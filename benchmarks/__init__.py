"""Benchmarks of speed and memory against diffusers, timed in the same run; see docs/benchmarks.md."""

from ddim.evaluation.fidelity import patch_torchvision

patch_torchvision()  # otherwise a torchvision that does not fit torch breaks diffusers

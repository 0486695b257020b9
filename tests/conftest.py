from __future__ import annotations

import hypothesis
import torch

from ddim.evaluation.fidelity import mend_torchvision

# The same examples on every run and machine: a test that fails, fails for everyone.
hypothesis.settings.register_profile("ddim", derandomize=True, deadline=None, max_examples=60)
hypothesis.settings.load_profile("ddim")
torch.set_num_threads(1)
# Before diffusers or torch-fidelity is imported: torchvision is there for the latter, and may not fit this torch.
mend_torchvision()

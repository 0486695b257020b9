from __future__ import annotations

import hypothesis
import torch

# The same examples on every run and machine: a test that fails, fails for everyone.
hypothesis.settings.register_profile("ddim", derandomize=True, deadline=None, max_examples=60)
hypothesis.settings.load_profile("ddim")
torch.set_num_threads(1)

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest
import torch

from ddim.evaluation.fidelity import patch_torchvision

# The same examples on every run and machine: a test that fails, fails for everyone.
hypothesis.settings.register_profile("ddim", derandomize=True, deadline=None, max_examples=60)
hypothesis.settings.load_profile("ddim")
torch.set_num_threads(1)

SHARED = Path(__file__).parents[1].parent / "shared" / "data"


@pytest.fixture
def shared() -> Path:
    """The folder of real datasets next to the checkout; tests that use it are skipped without it."""
    if not SHARED.is_dir():
        pytest.skip("the shared data sets are not beside this checkout")
    return SHARED


# Before diffusers or torch-fidelity is imported: torchvision is there for the latter, and may not fit this torch.
patch_torchvision()

"""Commands print one note for a model of another library, and `ddim info` its conversions."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from ddim.model.load import load
from models import ddim


def test_one_note_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "layers_per_block": 1}
    network = UNet2DModel(sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, **blocks)
    folder = tmp_path / "a model"
    DDIMPipeline(network, DDIMScheduler()).save_pretrained(folder)
    capsys.readouterr()
    assert ddim("sample", folder, "-n", 1, "--steps", 1, "--like", "diffusers", "--force", "--out", tmp_path / "o") == 0
    [note] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: read as")]
    assert note.count("diffusers") == 1
    assert f"'{folder}'" in note
    assert ddim("info", folder) == 0
    output = capsys.readouterr().out
    conversions = load(folder, "cpu").notes
    assert len(conversions) >= 4
    assert all("".join(text.split()) in "".join(output.split()) for text in conversions)

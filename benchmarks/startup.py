"""Time of whole commands: `ddim --help`, and 16 images in 10 steps, against the same job written with diffusers.

`python -m benchmarks.startup`
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import peers
from benchmarks.measuring import by_turns, write

# The first lines let diffusers be imported if torchvision does not match torch; they take no time.
PEER = """
import sys, torch
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from diffusers import DDIMPipeline
pipeline = DDIMPipeline.from_pretrained(sys.argv[1])
for index, image in enumerate(pipeline(16, num_inference_steps=10, output_type="pt").images):
    from PIL import Image
    Image.fromarray((image[0].numpy() * 255).round().astype("uint8")).save(f"{sys.argv[2]}/{index}.png")
"""


def main(runs: int = 5) -> None:
    """Measure and write results/startup.json."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        peers.diffusers(*peers.mnist()).save_pretrained(folder / "peer")
        (folder / "peer.py").write_text(PEER)
        (folder / "out").mkdir()
        count = iter(range(1000))

        def call(*words: object, **env: str) -> None:
            process = subprocess.run([sys.executable, *map(str, words)], env={**os.environ, **env}, capture_output=True)
            assert process.returncode == 0, process.stderr.decode()

        def sample(**env: str) -> None:
            words = ("sample", "mnist", "-n", 16, "--steps", 10, "--out", folder / f"ours{next(count)}")
            call("-m", "ddim", *words, **env)

        times = by_turns(
            {
                "ddim --help": lambda: call("-m", "ddim", "--help"),
                "ddim sample mnist -n 16 --steps 10": sample,
                "the same, its kernels not built yet": lambda: sample(XDG_CACHE_HOME=str(folder / f"c{next(count)}")),
                "the same job with diffusers": lambda: call(folder / "peer.py", folder / "peer", folder / "out"),
            },
            runs,
        )
    peer = times["the same job with diffusers"]
    rows = [{"command": name, "seconds": seconds, "ratio": peer / seconds} for name, seconds in times.items()]
    write("startup", rows, "seconds from start to end of a process; the ratio is to the job with diffusers")


if __name__ == "__main__":
    main()

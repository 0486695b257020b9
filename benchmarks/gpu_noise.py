"""`python -m benchmarks.gpu_noise`: milliseconds to draw the noise of 512 images of 3x32x32, on GPU and host."""

from __future__ import annotations

import statistics
import time

import torch

from benchmarks.measuring import turns
from ddim.process import rng
from ddim.process.rng import Noise

IMAGES, SHAPE, RUNS = 512, (3, 32, 32), 20


def main() -> None:
    """Alternate between GPU and host, and print the median of each."""
    if not torch.cuda.is_available():
        raise SystemExit("error: benchmarks.gpu_noise: needs a CUDA GPU; run it on a machine that has one")
    started = time.perf_counter()
    if not rng._draws_on(torch.device("cuda")):
        raise SystemExit("error: benchmarks.gpu_noise: the GPU kernel of the noise is not available; install triton")
    print(f"{torch.cuda.get_device_name()}: first draw, compiled and compared, {time.perf_counter() - started:.2f} s")
    gpu, host = (Noise(0, tuple(range(IMAGES)), SHAPE, device) for device in ("cuda", "cpu"))

    def on_gpu() -> None:
        gpu.row(0)
        torch.cuda.synchronize()

    def on_host() -> None:
        host.row(0).to("cuda")
        torch.cuda.synchronize()

    for name, seconds in turns({"gpu": on_gpu, "host": on_host}, RUNS).items():
        print(f"{name:5} {1e3 * statistics.median(seconds):8.3f} ms for {IMAGES} x {SHAPE}")


if __name__ == "__main__":
    main()

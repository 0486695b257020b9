"""Animations: GIF and WebP by Pillow, MP4 by ffmpeg if it is installed."""

from __future__ import annotations

import io
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ddim._io.atomic import write_atomic
from ddim._io.sheets import check_suffix
from ddim.errors import DdimError

SUFFIXES = (".gif", ".webp", ".mp4")
MILLISECONDS = 125
"""The duration of a frame."""
LAST = 12
"""The duration of the last frame, in frames."""


def check_animation(path: Path) -> None:
    """Check that an animation with this suffix can be written on this machine.

    Raises:
        DdimError: If the suffix is not one of `SUFFIXES`, or is .mp4 and there is no ffmpeg.
    """
    check_suffix(path, SUFFIXES)
    if path.suffix.lower() == ".mp4" and _ffmpeg() is None:
        hint = f"install ffmpeg, or use {path.stem}.gif or {path.stem}.webp"
        raise DdimError(path, "needs ffmpeg, which is not installed", hint)


def save_animation(path: Path, frames: Sequence[np.ndarray]) -> None:
    """Write an animation that repeats, atomically; the last frame is shown longer.

    Args:
        path: The file, with one of `SUFFIXES`. A GIF has at most 256 colours in each frame; MP4 is lossy.
        frames: uint8, (H, W, 3) each, all of one size.

    Raises:
        DdimError: See `check_animation`; or if ffmpeg fails.
    """
    check_animation(path)
    if path.suffix.lower() == ".mp4":
        write_atomic(path, _mp4(path, [*frames, *[frames[-1]] * (LAST - 1)]))
        return
    first, *others = [Image.fromarray(frame) for frame in frames]
    durations = [MILLISECONDS] * len(others) + [MILLISECONDS * LAST]
    kind = {"format": "GIF"} if path.suffix.lower() == ".gif" else {"format": "WEBP", "lossless": True}
    out = io.BytesIO()
    first.save(out, save_all=True, append_images=others, duration=durations, loop=0, **kind)
    write_atomic(path, out.getvalue())


def _ffmpeg() -> str | None:
    """The path of ffmpeg: of the package imageio-ffmpeg, or on PATH; None if there is none."""
    try:
        import imageio_ffmpeg

        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        return shutil.which("ffmpeg")


def _mp4(path: Path, frames: Sequence[np.ndarray]) -> bytes:
    height, width, _ = frames[0].shape
    even = np.stack([np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge") for frame in frames])
    size = f"{even.shape[2]}x{even.shape[1]}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "out.mp4"  # the format needs a file in which ffmpeg can seek
        words = [str(_ffmpeg()), "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size]
        words += ["-r", str(1000 // MILLISECONDS), "-i", "-", "-c:v", "libx264", "-crf", "12", "-pix_fmt", "yuv420p"]
        done = subprocess.run([*words, str(file)], input=even.tobytes(), capture_output=True, check=False)
        if done.returncode or not file.exists():
            reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
            raise DdimError(path, f"ffmpeg failed: {reason[0]}", f"use {path.stem}.gif or {path.stem}.webp")
        return file.read_bytes()

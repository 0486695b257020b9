"""Pictures from a sampler in an ONNX file, with onnxruntime, numpy and Pillow alone: neither torch nor ddim is needed.

    ddim export mnist --what sampler --steps 10 --out sampler.onnx      # once, where the library is
    python examples/onnx_sampling.py sampler.onnx -n 16 --out pictures  # anywhere

The file holds a whole run: x_T in, x_0 out, with the plan's weights, the times' conditions and one network inside. Its
metadata say what it is. Picture i of a seed is the one that `ddim sample` makes: its x_T comes from a stream of its
own, numpy's Philox keyed with (seed, i), at counter 0, as standard normal numbers in float32.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image


def start(seed, index, shape):
    """x_T of one sample."""
    key, counter = np.array([seed, index], np.uint64), np.zeros(4, np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter)).standard_normal(shape, dtype=np.float32)


def sample(session, facts, seed, indices, label=None):
    """x_0 of the samples listed: float32, (N, C, H, W), nominally in [-1, 1]."""
    given = {"x_T": np.stack([start(seed, index, json.loads(facts["shape"])) for index in indices])}
    if int(facts["classes"]):  # row `classes` stands for no label
        given["labels"] = np.full(len(indices), int(facts["classes"]) if label is None else label)
    return session.run(["x_0"], given)[0]


def to_bytes(x0):
    """The nearest of 256 levels: uint8, (N, H, W, C)."""
    return np.rint((x0 + 1) * 127.5).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def main():
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("file", help="what `ddim export --what sampler` wrote, *.onnx")
    words.add_argument("--out", type=Path, default=Path("pictures"), help="the folder for the PNG files")
    words.add_argument("-n", type=int, default=16, help="how many")
    words.add_argument("--seed", type=int, default=0)
    words.add_argument("--label", type=int, help="a label, for a model that has some; left out, none")
    words.add_argument("--batch", type=int, default=8, help="pictures at once")
    asked = words.parse_args()
    session = onnxruntime.InferenceSession(asked.file, providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    if facts.get("what") != "sampler":
        words.error(f"{asked.file} is no sampler of `ddim export --what sampler`")
    if asked.label is not None and not 0 <= asked.label < int(facts["classes"]):
        words.error(f"--label {asked.label}: the model has {facts['classes']} labels, counted from 0")
    if asked.label is None and facts["needs_label"] == "true":
        words.error("the model was never trained without a label: give --label")
    asked.out.mkdir(parents=True, exist_ok=True)
    for first in range(0, asked.n, asked.batch):
        indices = range(first, min(first + asked.batch, asked.n))
        pictures = to_bytes(sample(session, facts, asked.seed, indices, asked.label))
        for index, picture in zip(indices, pictures, strict=True):
            Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture).save(asked.out / f"{index:06d}.png")
    print(f"{facts['model']}, {facts['plan_name']}: {asked.n} pictures in {asked.out}")


if __name__ == "__main__":
    main()

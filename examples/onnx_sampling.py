"""Sample images from an ONNX sampler file with onnxruntime, numpy and Pillow only, without torch and ddim.

    ddim export mnist --what sampler --steps 10 --out sampler.onnx      # once, with the library
    python examples/onnx_sampling.py sampler.onnx -n 16 --out images    # anywhere

The file holds a whole run from x_T to x_0, with the plan's weights, the time embeddings and one network; its metadata
describe it. Image i of a seed is the same as with `ddim sample`: its x_T is drawn from numpy's Philox generator with
key (seed, i) and counter 0, as standard normal numbers in float32.
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
    inputs = {"x_T": np.stack([start(seed, index, json.loads(facts["shape"])) for index in indices])}
    if int(facts["classes"]):  # row `classes` stands for no label
        inputs["labels"] = np.full(len(indices), int(facts["classes"]) if label is None else label)
    return session.run(["x_0"], inputs)[0]


def to_bytes(x0):
    """The nearest of 256 levels: uint8, (N, H, W, C)."""
    return np.rint((x0 + 1) * 127.5).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="file written by `ddim export --what sampler`, *.onnx")
    parser.add_argument("--out", type=Path, default=Path("images"), help="folder for the PNG files")
    parser.add_argument("-n", type=int, default=16, help="number of images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label", type=int, help="class label of a conditional model; default: none")
    parser.add_argument("--batch", type=int, default=8, help="images per batch")
    arguments = parser.parse_args()
    session = onnxruntime.InferenceSession(arguments.file, providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    if facts.get("what") != "sampler":
        parser.error(f"{arguments.file} is not a sampler of `ddim export --what sampler`")
    if arguments.label is not None and not 0 <= arguments.label < int(facts["classes"]):
        parser.error(f"--label {arguments.label}: the model has {facts['classes']} labels, counted from 0")
    if arguments.label is None and facts["needs_label"] == "true":
        parser.error("the model was not trained without labels: use --label")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for first in range(0, arguments.n, arguments.batch):
        indices = range(first, min(first + arguments.batch, arguments.n))
        images = to_bytes(sample(session, facts, arguments.seed, indices, arguments.label))
        for index, image in zip(indices, images, strict=True):
            Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(arguments.out / f"{index:06d}.png")
    print(f"{facts['model']}, {facts['plan_name']}: {arguments.n} images in {arguments.out}")


if __name__ == "__main__":
    main()

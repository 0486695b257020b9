"""Bad input gives one line with a hint and exit code 2, and no partial output."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from ddim import samplers
from ddim._io.atomic import lock
from ddim.process import schedule
from ddim.sampling.latents import Latents, write_latents
from models import contents, ddim, save_tiny, stripes, tiny_model, write_pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, images, latents and damaged files."""
    root = tmp_path_factory.mktemp("bad-input")
    save_tiny(root / "model")
    save_tiny(root / "labelled", classes=3)
    save_tiny(root / "other", seed=1)
    for name in ("corrupted", "shrunk", "unfit"):
        shutil.copytree(root / "model", root / name)
    weights = bytearray((root / "corrupted/model.safetensors").read_bytes())
    weights[-1] ^= 1
    (root / "corrupted/model.safetensors").write_bytes(weights)
    (root / "shrunk/model.safetensors").unlink()
    config = json.loads((root / "unfit/config.json").read_text())
    config["network"]["channels"] = 24
    (root / "unfit/config.json").write_text(json.dumps(config | {"checksum": ""}))
    for name in ("empty", "stuff", "bad", "grey"):
        (root / name).mkdir()
    (root / "stuff/notes.txt").write_text("mine")
    (root / "file").write_text("a file")
    write_pictures(root / "images", 3)
    write_pictures(root / "bad", 2)
    whole = (root / "images/0.png").read_bytes()
    (root / "bad/z.png").write_bytes(whole[: len(whole) // 2])
    (root / "text.png").write_text("not an image")
    Image.new("L", (9, 8), 255).save(root / "wide.png")
    Image.new("L", (8, 8), 0).save(root / "black.png")
    (root / "cut.png").write_bytes(whole[: len(whole) // 2])
    model = tiny_model()
    latents, plan = torch.zeros(2, 1, 8, 8), model.plan(4, encode=True)
    write_latents(root / "strange.safetensors", Latents(latents, model.plan(4), model_sha256="0" * 64))
    (root / "plan.json").write_text('{"format": "ddim-plan"}')
    (root / "up.json").write_text(plan.to_json())
    levels = schedule.cosine().levels([500, 0])
    (root / "cosine.json").write_text(samplers.ddim(levels).to_json())
    (root / "binary.json").write_bytes(bytes(range(128, 256)))
    save_tiny(root / "text-model", kind="text")
    save_tiny(root / "masked", kind="masked text")
    save_tiny(root / "levels", kind="levels")
    save_tiny(root / "labelled-text", kind="text", classes=3)
    (root / "text-plan.json").write_text(tiny_model(kind="text").plan(4).to_json())
    (root / "masked.json").write_text(tiny_model(kind="masked text").plan(4).to_json())
    (root / "images.json").write_text(tiny_model().plan(4).to_json())
    (root / "good.txt").write_text("a bad bed on a dead end " * 30)
    (root / "short.txt").write_text("a bad bed")
    (root / "strange.txt").write_text("a bad bed\na zebra " * 20)
    (root / "latin.txt").write_bytes("a bad b\u00e9d ".encode("latin-1") * 30)
    (root / "books").mkdir()
    for name in ("one", "two"):
        (root / f"books/{name}.txt").write_text("a bad bed")
    assert ddim("sample", root / "model", "-n", 2, "--steps", 2, "--out", root / "samples") == 0
    assert ddim("sample", root / "text-model", "-n", 2, "--steps", 2, "--out", root / "texts") == 0
    return root


SAMPLE = "sample {0}/model -n 2 --steps 2 --out {0}/out"
TRAIN = "train {0}/images --preset digits --steps 2 --batch 2 --out {0}/out"
CALIBRATE = "calibrate {{0}}/model {{0}}/{}"
EDIT = "edit {0}/model {0}/images/0.png --steps 2 --out {0}/out"
SAMPLE_TEXT = "sample {0}/text-model -n 2 --steps 2 --out {0}/out"
TRAIN_TEXT = "train {0}/good.txt --preset tinyshakespeare --length 12 --steps 2 --batch 2 --out {0}/out"
INTERPOLATE = "interpolate {0}/model --steps 2"

# A command, and the subject of its error (after a colon: data that the problem must name).
BAD: dict[str, tuple[str, str]] = {
    "no model": ("sample {0}/nowhere --out {0}/out", "nowhere"),
    "no such bundled model": ("sample mnisst --out {0}/out", "mnisst"),
    "model without config": ("sample {0}/stuff --out {0}/out", "stuff"),
    "model is a file": ("sample {0}/file --out {0}/out", "file"),
    "corrupted weights": ("sample {0}/corrupted --out {0}/out", "model.safetensors"),
    "weights missing": ("info {0}/shrunk", "model.safetensors"),
    "weights of another network": ("info {0}/unfit", "unfit"),
    "steps 0": (SAMPLE + " --steps 0", "steps 0"),
    "steps 1001": (SAMPLE + " --steps 1001", "steps 1001"),
    "steps x": (SAMPLE + " --steps x", "ddim sample: --steps"),
    "eta -1": (SAMPLE + " --eta -1", "eta -1"),
    "eta nan": (SAMPLE + " --eta nan", "eta nan"),
    "eta inf": (SAMPLE + " --eta inf", "eta inf"),
    "eta 50": (SAMPLE + " --eta 50", "t = 1000"),
    "eta with sigma": (SAMPLE + " --eta 1 --sigma hat", "--sigma"),
    "sigma bogus": (SAMPLE + " --sigma bogus", "--sigma bogus"),
    "sigma optimal without a table": (SAMPLE + " --sigma optimal", "sigma optimal"),
    "sigma optimal with a bad eta": (SAMPLE + " --sigma optimal --eta -1", "eta -1"),
    "sigma optimal to encode": ("plan {0}/model --encode --sigma optimal", "encoding"),
    "sigma too short": (SAMPLE + " --sigma 0.1", "sigma"),
    "sigma nan": (SAMPLE + " --sigma nan,0", "the step from t = 1000 to 258: sigma"),
    "n 0": (SAMPLE + " -n 0", "n 0"),
    "n -1": (SAMPLE + " -n -1", "n -1"),
    "start -1": (SAMPLE + " --start -1", "start -1"),
    "seed -1": (SAMPLE + " --seed -1", "seed -1"),
    "seed too large": (SAMPLE + f" --seed {2**64}", f"seed {2**64}"),
    "batch 0": (SAMPLE + " --batch 0", "batch 0"),
    "micro-batch 0": (SAMPLE + " --micro-batch 0", "micro-batch 0"),
    "grid unknown": (SAMPLE + " --grid circular", "circular"),
    "grid with a duplicate": (SAMPLE + " --grid 1,500,500,1000", "500"),
    "grid decreasing": (SAMPLE + " --grid 1,500,400,1000", "400"),
    "grid out of range": (SAMPLE + " --grid 1,500,1001", "1001"),
    "grid of words": (SAMPLE + " --grid 1,x", "--grid 1,x"),
    "samples below a file": ("sample {0}/model -n 2 --out {0}/file/out", "file/out"),
    "samples in place of a file": ("sample {0}/model -n 2 --out {0}/file", "file"),
    "samples among other files": ("sample {0}/model -n 2 --out {0}/stuff", "stuff"),
    "samples of another seed": ("sample {0}/model -n 2 --steps 2 --seed 1 --out {0}/samples", "samples"),
    "samples of another plan": ("sample {0}/model -n 2 --steps 3 --out {0}/samples", "samples"),
    "samples of another model": ("sample {0}/other -n 2 --steps 2 --out {0}/samples", "samples"),
    "sheet in no folder": (SAMPLE + " --sheet {0}/nowhere/sheet.png", "nowhere"),
    "label for a model without labels": (SAMPLE + " --label 1", "label"),
    "label out of range": ("sample {0}/labelled --label 3 --out {0}/out", "label"),
    "guidance without label": ("sample {0}/labelled --guidance 2 --out {0}/out", "guidance"),
    "guidance nan": ("sample {0}/labelled --label 1 --guidance nan --out {0}/out", "guidance"),
    "CFG++ without label": ("sample {0}/labelled --cfg-plus-plus 0.6 --out {0}/out", "guidance"),
    "CFG++ of 2": ("sample {0}/labelled --label 1 --cfg-plus-plus 2 --out {0}/out", "CFG++ of 2"),
    "CFG++ with guidance": (
        "sample {0}/labelled --label 1 --cfg-plus-plus 0.6 --guidance 2 --out {0}/out",
        "--cfg-plus-plus",
    ),
    "CFG++ where x0 is clipped": (
        "sample {0}/labelled --steps 4 --label 1 --cfg-plus-plus 0.6 --sigma hat --out {0}/out",
        "plan ddpm(equal-angle, S=4, sigma-hat): x0",
    ),
    "edit: no constraint": (EDIT, "edit"),
    "edit: no image": ("edit {0}/model {0}/nowhere.png --start-at 500 --steps 2 --out {0}/out", "nowhere.png"),
    "edit: start at 0": (EDIT + " --start-at 0", "--start-at 0"),
    "edit: start after T": (EDIT + " --start-at 1001", "--start-at 1001"),
    "edit: more steps than times": (EDIT + " --start-at 1", "--steps 2: --start-at"),
    "edit: start with a list": (
        "edit {0}/model {0}/images/0.png --out {0}/out --grid 1,400 --start-at 500",
        "--grid 1,400: --start-at",
    ),
    "edit: colour of grey": (EDIT + " --colour", "--colour"),
    "edit: two of three": (EDIT + " --colour --upscale 2", "--upscale"),
    "edit: upscale 3": (EDIT + " --upscale 3", "--upscale 3"),
    "edit: upscale 1": (EDIT + " --upscale 1", "--upscale 1"),
    "edit: no mask": (EDIT + " --mask {0}/nowhere.png", "nowhere.png"),
    "edit: mask of another size": (EDIT + " --mask {0}/wide.png", "wide.png"),
    "edit: black mask": (EDIT + " --mask {0}/black.png", "black.png"),
    "edit: guidance without label": (EDIT + " --start-at 500 --guidance 2", "guidance"),
    "edit: among samples": (
        "edit {0}/model {0}/images/0.png --steps 2 -n 2 --start-at 500 --out {0}/samples",
        "samples",
    ),
    "edit: n 0": (EDIT + " --start-at 500 -n 0", "n 0"),
    "device bogus": (SAMPLE + " --device bogus", "--device bogus"),
    "plan file missing": ("sample {0}/model -n 2 --out {0}/out --plan {0}/nowhere.json", "nowhere.json"),
    "plan file malformed": ("sample {0}/model -n 2 --out {0}/out --plan {0}/plan.json", "plan.json"),
    "plan file binary": ("sample {0}/model -n 2 --out {0}/out --plan {0}/binary.json", "binary.json"),
    "plan and steps": (SAMPLE + " --plan {0}/plan.json", "--steps"),
    "plan and grid": ("sample {0}/model -n 2 --out {0}/out --grid linear --plan {0}/plan.json", "--grid"),
    "plan that encodes": ("sample {0}/model -n 2 --out {0}/out --plan {0}/up.json", "plan: from t = 0"),
    "plan of another schedule": ("sample {0}/model -n 2 --out {0}/out --plan {0}/cosine.json", "plan: log-SNR"),
    "steps of a list": (SAMPLE + " --grid 1,500,1000", "steps 2"),
    "train: set and an option": ("train digits --out {0}/out --steps 5 --set train.steps=6", "train.steps=6"),
    "plan that encodes with noise": ("plan {0}/model --encode --eta 1", "encoding"),
    "train: set no pair": ("train digits --out {0}/out --set channels", "--set channels"),
    "train: set an unknown part": ("train digits --out {0}/out --set sampler.eta=1", "--set sampler.eta=1"),
    "train: set an unknown name": ("train digits --out {0}/out --set network.width2=3", "--set network.width2=3"),
    "train: set a bad value": ("train digits --out {0}/out --set network.channels=wide", "model: channels"),
    "train: set attention nowhere": ("train digits --out {0}/out --set network.attention=[5]", "model: 5"),
    "unknown option": ("sample {0}/model --out {0}/out --tempo 3", "ddim sample: --tempo"),
    "unknown command": ("sampel {0}/model", "ddim: sampel"),
    "no out": ("sample {0}/model", "ddim sample: --out"),
    "encode: no image": ("encode {0}/model {0}/nowhere.png --out {0}/out.safetensors", "nowhere.png"),
    "encode: text": ("encode {0}/model {0}/text.png --out {0}/out.safetensors", "text.png"),
    "encode: truncated image": ("encode {0}/model {0}/cut.png --out {0}/out.safetensors", "cut.png"),
    "encode: empty folder": ("encode {0}/model {0}/empty --out {0}/out.safetensors", "empty"),
    "encode: limit 0": ("encode {0}/model digits --limit 0 --out {0}/out.safetensors", "--limit 0"),
    "encode: no output folder": ("encode {0}/model digits --out {0}/nowhere/out.safetensors", "nowhere"),
    "encode: unknown method": (
        "encode {0}/model {0}/images --method x --out {0}/out.safetensors",
        "ddim encode: --method",
    ),
    "encode: too few steps": (
        "encode {0}/model {0}/images --steps 1 --method lossless --out {0}/out.safetensors",
        "plan",
    ),
    "encode: steps 0": ("encode {0}/model {0}/images --steps 0 --out {0}/out.safetensors", "steps 0"),
    "decode: no latents": ("decode {0}/model {0}/nowhere --out {0}/out", "nowhere"),
    "decode: text": ("decode {0}/model {0}/file --out {0}/out", "file"),
    "decode: file without latents": ("decode {0}/model {0}/model/model.safetensors --out {0}/out", "model.safetensors"),
    "decode: latents of another model": (
        "decode {0}/model {0}/strange.safetensors --out {0}/out",
        "strange.safetensors",
    ),
    "interpolate: one seed": (INTERPOLATE + " --seeds 3 --out {0}/out.png", "--seeds"),
    "interpolate: two of four": (INTERPOLATE + " --seeds 3,4 --corners --out {0}/out.png", "--seeds"),
    "interpolate: no seed": (INTERPOLATE + " --seeds 3,x --out {0}/out.png", "--seeds x"),
    "interpolate: negative seed": (INTERPOLATE + " --seeds 3,-4 --out {0}/out.png", "--seeds -4"),
    "interpolate: one frame": (INTERPOLATE + " --seeds 3,4 --frames 1 --out {0}/out.png", "--frames 1"),
    "interpolate: both": (INTERPOLATE + " --seeds 3,4 --images a.png,b.png --out {0}/out.png", "--images"),
    "interpolate: neither": (INTERPOLATE + " --out {0}/out.png", "--seeds"),
    "interpolate: no folder": (INTERPOLATE + " --seeds 3,4 --out {0}/nowhere/out.png", "nowhere"),
    "interpolate: a folder": (INTERPOLATE + " --seeds 3,4 --out {0}/empty", "empty"),
    "interpolate: weights of words": (INTERPOLATE + " --seeds 3,4 --weights a,b --out {0}/out.png", "--weights a,b"),
    "interpolate: a weight too few": (INTERPOLATE + " --seeds 3,4,5 --weights 1,2 --out {0}/out.png", "--weights 1,2"),
    "interpolate: weights 0": (INTERPOLATE + " --seeds 3,4 --weights 1,1;0,0 --out {0}/out.png", "--weights 0,0"),
    "interpolate: weights and frames": (
        INTERPOLATE + " --seeds 3,4 --weights 1,1 --frames 3 --out {0}/o",
        "--weights: --frames",
    ),
    "interpolate: weights and grid": (
        INTERPOLATE + " --seeds 3,4 --weights 1,1 --corners --out {0}/out.png",
        "--weights: --corners",
    ),
    "interpolate: three": (INTERPOLATE + " --seeds 3,4,5 --out {0}/out.png", "--seeds"),
    "interpolate: no image": (INTERPOLATE + " --images {0}/a.png,{0}/b.png --out {0}/out.png", "a.png"),
    "reconstruct: steps 10,x": ("reconstruct {0}/model {0}/images --steps 10,x --out {0}/out", "--steps 10,x"),
    "reconstruct: unknown method": ("reconstruct {0}/model {0}/images --method ddim,x --out {0}/out", "--method x"),
    "reconstruct: steps 0": ("reconstruct {0}/model {0}/images --steps 0 --out {0}/out", "steps 0"),
    "reconstruct: among others": ("reconstruct {0}/model {0}/images --steps 2 --out {0}/stuff", "stuff"),
    "reconstruct: below a file": ("reconstruct {0}/model {0}/images --steps 2 --out {0}/file/out", "file/out"),
    "calibrate: no model": ("calibrate {0}/nowhere {0}/images --out {0}/out", "nowhere"),
    "calibrate: no data": (CALIBRATE.format("nowhere") + " --out {0}/out", "nowhere"),
    "calibrate: empty folder": (CALIBRATE.format("empty") + " --out {0}/out", "empty"),
    "calibrate: one bad image": (CALIBRATE.format("bad") + " --out {0}/out", "bad: z.png"),
    "calibrate: no out": (CALIBRATE.format("images"), "ddim calibrate: --out"),
    "calibrate: no such split": (CALIBRATE.format("images") + " --split test --out {0}/out", "images: test"),
    "calibrate: limit 0": (CALIBRATE.format("images") + " --limit 0 --out {0}/out", "--limit 0"),
    "calibrate: times 3": (CALIBRATE.format("images") + " --times 3 --out {0}/out", "times 3"),
    "calibrate: seed -1": (CALIBRATE.format("images") + " --seed -1 --out {0}/out", "seed -1"),
    "calibrate: among other files": (CALIBRATE.format("images") + " --out {0}/stuff", "stuff"),
    "calibrate: over another model": (CALIBRATE.format("images") + " --out {0}/other", "other"),
    "calibrate: below a file": (CALIBRATE.format("images") + " --out {0}/file/out", "file"),
    "calibrate: in place of a file": (CALIBRATE.format("images") + " --out {0}/file", "file"),
    "calibrate: device bogus": (CALIBRATE.format("images") + " --device bogus --out {0}/out", "--device bogus"),
    "train: no data": ("train {0}/nowhere --preset digits --out {0}/out", "nowhere"),
    "train: unknown preset": ("train {0}/images --preset mnisst --out {0}/out", "mnisst"),
    "train: no preset of that name": ("train {0}/images --out {0}/out", "images"),
    "train: negative lr": (TRAIN + " --lr -1", "--lr -1"),
    "train: lr nan": (TRAIN + " --lr nan", "--lr nan"),
    "train: batch 0": (TRAIN + " --batch 0", "--batch 0"),
    "train: steps 0": (TRAIN + " --steps 0", "--steps 0"),
    "train: batch not divisible": (TRAIN + " --batch 3 --accumulate 2", "training: accumulate"),
    "train: ema 1": (TRAIN + " --ema 1", "training: ema"),
    "train: seed -1": (TRAIN + " --seed -1", "--seed -1"),
    "train: seed too large": (TRAIN + f" --seed {2**64}", f"--seed {2**64}"),
    "train: size 7": (TRAIN + " --size 7", "model: 7x7"),
    "train: size 0": (TRAIN + " --size 0", "--size 0"),
    "train: size -8": (TRAIN + " --size -8", "--size -8"),
    "train: limit 0": (TRAIN + " --limit 0", "limit"),
    "train: no labels": (TRAIN + " --labels", "images"),
    "train: unknown weight": (TRAIN + " --loss-weight snr", "ddim train: --loss-weight"),
    "train: infinite weight": (TRAIN + " --loss-weight vlb --set schedule.zero_terminal_snr=true", "weight vlb"),
    "train: unknown option": (TRAIN + " --tempo 3", "ddim train: --tempo"),
    "train: device bogus": (TRAIN + " --device bogus", "--device bogus"),
    "train: empty folder": ("train {0}/empty --preset digits --out {0}/out", "empty"),
    "train: data is a file": ("train {0}/file --preset digits --out {0}/out", "file"),
    "train: one bad image": ("train {0}/bad --preset digits --out {0}/out", "bad: z.png"),
    "train: no such split": (TRAIN + " --split test", "images: test"),
    "train: among other files": ("train {0}/images --preset digits --out {0}/stuff", "stuff"),
    "train: in a samples folder": ("train {0}/images --preset digits --out {0}/samples", "samples"),
    "train: below a file": ("train {0}/images --preset digits --out {0}/file/out", "file/out"),
    "text: encode": ("encode {0}/text-model {0}/images --out {0}/out.safetensors", "text-model"),
    "text: decode": ("decode {0}/text-model {0}/strange.safetensors --out {0}/out", "text-model"),
    "text: reconstruct": ("reconstruct {0}/text-model {0}/images --out {0}/out", "text-model"),
    "text: interpolate": ("interpolate {0}/text-model --seeds 3,4 --out {0}/out.png", "text-model"),
    "text: edit": ("edit {0}/text-model {0}/images/0.png --start-at 500 --out {0}/out", "text-model"),
    "text: tune": ("tune {0}/text-model --calls 5 --out {0}/out.json", "text-model"),
    "text: calibrate": ("calibrate {0}/text-model {0}/good.txt --out {0}/out", "text-model"),
    "levels: encode": ("encode {0}/levels {0}/images --out {0}/out.safetensors", "levels"),
    "levels: edit": ("edit {0}/levels {0}/images/0.png --start-at 500 --out {0}/out", "levels"),
    "text: sheet": (SAMPLE_TEXT + " --sheet {0}/sheet.png", "--sheet"),
    "text: sigma": (SAMPLE_TEXT + " --sigma hat", "--sigma"),
    "text: clip": (SAMPLE_TEXT + " --clip", "--clip"),
    "text: guidance without labels": (SAMPLE_TEXT + " --guidance 2", "guidance"),
    "text: guidance without a label": (
        "sample {0}/labelled-text --guidance 2 --out {0}/out",
        "guidance: needs a label",
    ),
    "text: CFG++": ("sample {0}/labelled-text --label 1 --cfg-plus-plus 0.6 --out {0}/out", "--cfg-plus-plus"),
    "text: label out of range": ("sample {0}/labelled-text --label 3 --out {0}/out", "label"),
    "text: label for a model without labels": (SAMPLE_TEXT + " --label 1", "label"),
    "text: temperature 0": (SAMPLE_TEXT + " --temperature 0", "temperature 0"),
    "text: temperature nan": (SAMPLE_TEXT + " --temperature nan", "temperature nan"),
    "text: top-p 2": (SAMPLE_TEXT + " --top-p 2", "top-p 2"),
    "text: top-p 0": (SAMPLE_TEXT + " --top-p 0", "top-p 0"),
    "text: eta 2": (SAMPLE_TEXT + " --eta 2", "eta 2"),
    "text: eta nan": (SAMPLE_TEXT + " --eta nan", "eta nan"),
    "text: sampler of images": (SAMPLE_TEXT + " --sampler unipc3", "unipc3"),
    "text: markov with eta": (SAMPLE_TEXT + " --sampler markov --eta 0.5", "sampler markov"),
    "text: steps 0": (SAMPLE_TEXT + " --steps 0", "steps 0"),
    "text: grid unknown": (SAMPLE_TEXT + " --grid circular", "circular"),
    "text: grid of words": (SAMPLE_TEXT + " --grid 1,x", "--grid 1,x"),
    "text: n 0": (SAMPLE_TEXT + " -n 0", "n 0"),
    "text: seed -1": (SAMPLE_TEXT + " --seed -1", "seed -1"),
    "text: micro-batch 0": (SAMPLE_TEXT + " --micro-batch 0", "micro-batch 0"),
    "text: samples of another seed": ("sample {0}/text-model -n 2 --steps 2 --seed 1 --out {0}/texts", "texts"),
    "text: samples of another model": ("sample {0}/masked -n 2 --steps 2 --out {0}/texts", "texts"),
    "text: among images": ("sample {0}/text-model -n 2 --steps 2 --out {0}/samples", "samples"),
    "text: plan that encodes": ("plan {0}/text-model --encode", "--encode"),
    "text: plan of images": ("sample {0}/text-model --plan {0}/images.json --out {0}/out", "images.json"),
    "text: plan of other categories": (
        "sample {0}/text-model --plan {0}/masked.json --out {0}/out",
        "plan: 8 categories",
    ),
    "text: plan and temperature": (
        "sample {0}/text-model --temperature 1 --plan {0}/text-plan.json --out {0}/out",
        "--temperature",
    ),
    "text: plan malformed": ("sample {0}/text-model --plan {0}/plan.json --out {0}/out", "plan.json"),
    "images: plan of text": ("sample {0}/model --plan {0}/text-plan.json --out {0}/out", "text-plan.json"),
    "images: temperature": (SAMPLE + " --temperature 0.5", "--temperature"),
    "images: top-p": (SAMPLE + " --top-p 0.5", "--top-p"),
    "images: markov": (SAMPLE + " --sampler markov", "markov"),
    "likelihood: ode of text": ("likelihood {0}/text-model {0}/good.txt --method ode --out {0}/out", "--method ode"),
    "likelihood: sigma of text": ("likelihood {0}/text-model {0}/good.txt --sigma hat --out {0}/out", "--sigma"),
    "likelihood: no text": ("likelihood {0}/text-model {0}/nowhere.txt --out {0}/out", "nowhere.txt"),
    "likelihood: images for text": ("likelihood {0}/text-model {0}/images --out {0}/out", "images"),
    "likelihood: short text": ("likelihood {0}/text-model {0}/short.txt --out {0}/out", "short.txt"),
    "likelihood: not UTF-8": ("likelihood {0}/text-model {0}/latin.txt --out {0}/out", "latin.txt: UTF-8"),
    "likelihood: another alphabet": ("likelihood {0}/text-model {0}/strange.txt --out {0}/out", "strange.txt: 1"),
    "likelihood: sampler of images": (
        "likelihood {0}/model {0}/images --sampler markov --out {0}/out",
        "--sampler",
    ),
    "train: no text": ("train {0}/nowhere.txt --preset tinyshakespeare --out {0}/out", "nowhere.txt"),
    "train: not UTF-8": (TRAIN_TEXT.replace("good", "latin"), "latin.txt: UTF-8"),
    "train: short text": (TRAIN_TEXT.replace("good", "short"), "short.txt"),
    "train: two texts": (TRAIN_TEXT.replace("good.txt", "books"), "books: 2"),
    "train: a folder without text": (TRAIN_TEXT.replace("good.txt", "images"), "images"),
    "train: length 0": (TRAIN_TEXT.replace("--length 12", "--length 0"), "--length 0"),
    "train: text with size": (TRAIN_TEXT + " --size 8", "--size"),
    "train: text with channels": (TRAIN_TEXT + " --channels 1", "--channels"),
    "train: text with labels": (TRAIN_TEXT + " --labels", "--labels"),
    "train: text with flip": (TRAIN_TEXT + " --flip", "--flip"),
    "train: text that predicts v": (TRAIN_TEXT + " --predicts v", "model: x0"),
    "train: text with a weight of images": (TRAIN_TEXT + " --loss-weight v", "weight v"),
    "train: text of no such split": (TRAIN_TEXT + " --split half", "good.txt: half"),
    "train: text with limit 0": (TRAIN_TEXT + " --limit 0", "limit"),
    "train: no tokenizer": (TRAIN_TEXT + " --tokenizer {0}/nowhere.json", "nowhere.json"),
    "train: not a tokenizer": (TRAIN_TEXT + " --tokenizer {0}/plan.json", "tokenizer"),
    "train: pi of the wrong length": (TRAIN_TEXT + " --set categorical.pi=[0.5,0.5]", "categorical: 2"),
    "train: pi unknown": (TRAIN_TEXT + " --set categorical.pi=grey", "categorical"),
    "train: carry over without a mask": (TRAIN_TEXT + " --set categorical.carry_over=true", "categorical"),
    "train: images with length": (TRAIN + " --length 12", "--length"),
    "train: images with categorical settings": (TRAIN + " --set categorical.pi=mask", "categorical"),
    "train: text with a preset of images": ("train {0}/good.txt --preset digits --out {0}/out", "good.txt"),
}
if not torch.cuda.is_available():
    BAD["device cuda"] = (SAMPLE + " --device cuda", "--device cuda")
    BAD["train: device cuda"] = (TRAIN + " --device cuda", "--device cuda")


@pytest.mark.parametrize("case", BAD)
def test_bad_input_prints_one_line_and_writes_nothing(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, expected = BAD[case]
    before, paths = contents(folder), sorted(folder.rglob("*"))
    code = ddim(*command.format(folder).split())
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: "), lines
    subject, _, problem = lines[0].removeprefix("error: ").partition(": ")
    expected_subject, _, data = expected.partition(": ")
    assert expected_subject in subject, lines
    assert data in problem.rpartition("; ")[0], lines
    assert len(problem.rpartition("; ")[2]) > 3, lines
    assert "Traceback" not in captured.err + captured.out
    assert captured.out == ""
    assert code == 2
    new = [path for path in sorted(folder.rglob("*")) if path not in paths and path.name != ".lock"]
    assert new == []
    assert contents(folder) == before


@pytest.mark.parametrize(
    "command", ["sample {0}/model -n 3 --steps 2 --out {0}/locked", "train digits --out {0}/locked"]
)
def test_a_folder_in_use_is_an_error(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "locked").mkdir(exist_ok=True)
    with lock(folder / "locked"):
        assert ddim(*command.format(folder).split()) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "locked: " in error
    assert contents(folder / "locked") == {}
    shutil.rmtree(folder / "locked")


def test_images_of_another_size_or_channels_are_converted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(stripes(1, 12, 3)[0]).save(tmp_path / "colour.png")
    arguments = ("encode", folder / "model", tmp_path / "colour.png", "--steps", 2, "--out", tmp_path / "z.safetensors")
    assert ddim(*arguments) == 0
    assert capsys.readouterr().out.startswith("1 latent, ")

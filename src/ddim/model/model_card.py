"""The model card, `README.md`, generated from a model's configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from ddim.data.text import TextPolicy
from ddim.model.config import ModelConfig
from ddim.model.modality import modality_of

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
"""The pattern of a repository's name, "org/name"."""

_PREDICTS = {"eps": "the noise eps", "x0": "the clean data x_0", "v": "v = signal eps - noise x_0"}


def card(config: ModelConfig, weights: Mapping[str, Tensor], name: str, license: str | None = None) -> str:
    """The text of a model card; facts that the configuration does not record are omitted.

    Args:
        config: The configuration, including the checksum of the weights.
        weights: The weights.
        name: The model's name: "org/name", or its folder.
        license: The weights' licence; omitted if None.
    """
    from huggingface_hub import ModelCard, ModelCardData

    text = isinstance(config.data, TextPolicy)
    tags = ["ddim", "diffusion", config.network.kind] + (["class-conditional"] if config.network.classes else [])
    data = ModelCardData(
        library_name="ddim",
        license=license,
        tags=tags,
        pipeline_tag="text-generation" if text else "unconditional-image-generation",
    )
    parts = [_head(config, name), _overview(config, weights), *_training(config), _use(config, name), _limits(config)]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def _head(config: ModelConfig, name: str) -> str:
    name_of_data, details = next(iter(config.data.facts().items()))
    data = f"{name_of_data} ({details})"
    predicted = "the probabilities of the clean tokens" if config.categorical else _PREDICTS[config.predicts]
    return (
        f"# {name.rpartition('/')[2]}\n\nA denoising diffusion model of {data}. Its network predicts {predicted}. "
        "It is for the library `ddim`: Denoising Diffusion Implicit Models (Song, Meng & Ermon, ICLR 2021)."
    )


def _overview(config: ModelConfig, weights: Mapping[str, Tensor]) -> str:
    schedule = config.schedule.build()
    first, last = schedule.level(1), schedule.level(schedule.T)
    stored = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()}))
    size = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    lines = {"network": str(config.network)}
    lines["parameters"] = f"{sum(t.numel() for t in weights.values()):,}, stored as {stored}, {size / 1e6:.1f} MB"
    lines |= config.data.facts()
    if (noise := config.categorical) is not None:
        lines["noise"] = noise.pi if isinstance(noise.pi, str) else "with custom probabilities pi"
    lines["labels"] = f"{config.network.classes} classes" if config.network.classes else "none"
    lines["predicts"] = config.predicts
    lines["schedule"] = f"{schedule.name}, T = {schedule.T}, log-SNR {first.log_snr:.2f} at t = 1 to "
    lines["schedule"] += f"{last.log_snr:.2f} at T"
    if config.error is not None:
        origin = config.provenance.error_from
        lines["error per time"] = f"{config.error[0]:.4g} at t = 1 to {config.error[-1]:.4g} at T"
        lines["error per time"] += f", from {origin}" if origin else ""
    if config.origin is not None:
        lines["converted from"] = f"a model of {config.origin.format}"
    lines["SHA-256 of the weights"] = config.sha256
    return "## Model\n\n" + _table(lines)


def _training(config: ModelConfig) -> Iterator[str]:
    """The section on training, if anything about it is recorded."""
    provenance, noun = config.provenance, modality_of(config).noun
    lines = {}
    if provenance.data:
        split = f", split {provenance.split}" if provenance.split else ""
        count = f", {provenance.images:,} {noun}" if provenance.images else ""
        lines["data"] = provenance.data + split + count
    if provenance.data_fingerprint:
        lines["hash of the data"] = provenance.data_fingerprint
    if provenance.steps:
        lines["steps"] = f"{provenance.steps:,}"
    if provenance.images_seen:
        lines[f"{noun} seen"] = f"{provenance.images_seen:,}"
    if provenance.seconds:
        lines["time"] = f"{provenance.seconds / 60:.1f} minutes"
    if provenance.version:
        lines["library"] = f"ddim {provenance.version}"
    parts = [_table(lines)] if lines else []
    if provenance.command:
        parts.append("The command:\n\n" + _block("sh", provenance.command))
    if provenance.training is not None:
        parts.append("The settings:\n\n" + _block("json", provenance.training.model_dump_json(indent=2)))
    if parts:
        yield "## Training\n\n" + "\n\n".join(parts)


def _use(config: ModelConfig, name: str) -> str:
    needs_label = config.needs_label
    shape = ", ".join(str(side) for side in (16, *config.network.shape))
    returned = f"int64, ({shape})" if config.categorical else f"float32, ({shape}), nominally in [-1, 1]"
    lines = ["import ddim", "", f"model = ddim.load({name!r})"]
    lines.append(f"samples = model.sample(16, steps=20, seed=0{', labels=0' if needs_label else ''})  # {returned}")
    lines += ["texts = model.text(samples)"] if isinstance(config.data, TextPolicy) else []
    command = f"ddim sample {name} --steps 20 -n 16 {'--label 0 ' if needs_label else ''}--out samples"
    location = "" if REPOSITORY.fullmatch(name) else f" `{name}` is the folder of this file."
    return (
        f"## Usage\n\nInstall `ddim` and `huggingface_hub`.{location}\n\n"
        + _block("python", "\n".join(lines))
        + "\n\nTo write the samples to a folder:\n\n"
        + _block("sh", command)
    )


def _limits(config: ModelConfig) -> str:
    shape, provenance = config.network.shape, config.provenance
    lines = [f"It generates {modality_of(config).noun} of shape {shape} only."]
    if config.needs_label:
        lines.append("It was always trained with labels: each sample needs one, and guidance cannot be used.")
    if provenance.data:
        lines.append(f"Its samples resemble its training data, {provenance.data}, including their biases and gaps.")
    else:
        lines.append("Its training data are not recorded.")
    lines.append("The quality of its samples is not stated: the configuration contains no metrics.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _table(lines: Mapping[str, str]) -> str:
    rows = [f"| {key} | {' '.join(value.split()).replace('|', chr(92) + '|')} |" for key, value in lines.items()]
    return "\n".join(["| | |", "|-|-|", *rows])


def _block(language: str, text: str) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"

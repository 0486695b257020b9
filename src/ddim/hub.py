"""Models on the Hugging Face Hub: our folder with a model card, pushed by ModelHubMixin, and folders fetched."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ddim import checkpoint, interop, seeds
from ddim.config import ModelConfig
from ddim.data.text import TextPolicy
from ddim.errors import DdimError, shorten
from ddim.kinds import kind_of
from ddim.nn.network import Network

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
"""What a repository's name looks like."""
_PREDICTS = {"eps": "the noise eps", "x0": "the clean data x_0", "v": "v = signal eps - noise x_0"}


def place(name: str | Path, **settings: Any) -> str | Path:
    """What is here under a name, or where a repository of that name was downloaded to, see `fetch`.

    Raises:
        DdimError: If a repository cannot be had.
    """
    if not isinstance(name, str | Path):
        raise DdimError(f"model {shorten(repr(name))}", "is no name or path", "give a str or a Path")
    if any(len(part.encode(errors="replace")) > 255 or "\0" in part for part in Path(name).parts):
        raise DdimError(shorten(str(name)), "cannot be the name of a model: a part of it is too long", "check the name")
    here = not isinstance(name, str) or Path(name).exists() or not REPOSITORY.fullmatch(name)
    return name if here else fetch(str(name), **settings)


def fetch(
    name: str,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """A repository's model, downloaded into the hub's cache: its JSON and safetensors files; *.bin if it has no others.

    Args:
        name: "org/name".
        revision: A branch, tag or commit.
        cache_dir: Where downloads are kept; the hub's own place if None.
        token: For repositories that are not public.
        local_files_only: Whether only what was downloaded before is taken.
        force_download: Whether it is downloaded again.

    Returns:
        Its folder.

    Raises:
        DdimError: If it cannot be had: there is none, nobody may have it, or there is no connection.
    """
    _need()
    from huggingface_hub import snapshot_download

    how: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token}
    how |= {"local_files_only": local_files_only, "force_download": force_download}
    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"], **how))
        if not any(folder.rglob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.bin"], **how))
    except Exception as error:  # the kinds of a lost connection are those of whatever HTTP library the hub uses
        raise DdimError(name, *_why(error, revision)) from None
    return folder


def contents(
    place: str | Path, hints: interop.Hints | None = None, kind: str | None = None
) -> tuple[ModelConfig, dict[str, Tensor], tuple[str, ...]]:
    """A model folder's configuration and weights, or another code's as ours, and how that was read.

    Args:
        place: A folder, a file of weights, or a bundled model's name.
        hints: What a file of weights does not say of itself.
        kind: Whose code a file of weights is of, see `ddim.interop.read`.

    Raises:
        DdimError: If something is missing, is not what it says, does not match its checksum, or a weight is not finite.
    """
    if interop.is_foreign(place):
        made = interop.read(place, hints, kind)
        checkpoint.check_finite(made.weights, place)
        return made.config, made.weights, made.notes
    return *checkpoint.read(place), ()


def read(
    place: str | Path, name: str | Path, hints: interop.Hints | None = None
) -> tuple[ModelConfig, Network, tuple[str, ...]]:
    """As `contents`, with the network.

    Args:
        place: As there.
        name: What to call it in an error.
        hints: As there.

    Raises:
        DdimError: As there.
    """
    config, weights, notes = contents(place, hints)
    # Not on the device "meta": there a first embedding imports torch's compiler, which takes seconds.
    with seeds.forked("cpu", 0):
        network = config.network.build()
    checkpoint.fill(network, weights, name)
    return config, network, notes


def write(
    folder: Path, config: ModelConfig, weights: Mapping[str, Tensor], license: str | None = None, repo_id: str = ""
) -> Path:
    """Write a model folder with a model card; an older model there is replaced whole.

    Args:
        folder: Where.
        config: The configuration.
        weights: The weights.
        license: The weights' licence as the hub names it; left out if None.
        repo_id: What the card calls the model; the folder's name if empty.

    Raises:
        DdimError: If huggingface_hub is not installed, or the folder cannot be written.
    """
    _need()
    about = partial(card, weights=weights, name=repo_id or folder.resolve().name, license=license)
    checkpoint.write(folder, config, weights, about)
    return folder


def push(
    repo_id: str, config: ModelConfig, weights: Mapping[str, Tensor], license: str | None = None, **settings: Any
) -> str:
    """Publish a model folder: the repository is made if it is not there, and gets the three files in one commit.

    Args:
        repo_id: "org/name", or "name" for one of one's own.
        config: The configuration.
        weights: The weights.
        license: As for `write`.
        settings: Those of huggingface_hub's `ModelHubMixin.push_to_hub`.

    Returns:
        Where the commit is, a URL.

    Raises:
        DdimError: If huggingface_hub is not installed, or it did not work.
    """
    _need()
    from huggingface_hub import ModelHubMixin

    class Folder(ModelHubMixin):
        def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
            path = Path(save_directory)
            write(path, config, weights, license, repo_id if "/" in repo_id else "/".join(path.parts[-2:]))

    try:
        return str(Folder().push_to_hub(repo_id, **settings))
    except (DdimError, TypeError):  # the latter for a setting that there is not
        raise
    except Exception as error:  # see `fetch`
        raise DdimError(repo_id, *_why(error, settings.get("branch"))) from None


def card(config: ModelConfig, weights: Mapping[str, Tensor], name: str, license: str | None = None) -> str:
    """A model card of what the configuration says; what it does not say is left out.

    Args:
        config: The configuration, its checksum filled in.
        weights: The weights.
        name: What to call the model: "org/name", or its folder.
        license: The weights' licence; left out if None.
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
    parts = [_head(config, name), _what(config, weights), *_training(config), _use(config, name), _limits(config)]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def _head(config: ModelConfig, name: str) -> str:
    things = next(iter(config.data.facts().items()))
    over = f"{things[0]} ({things[1]})"
    says = "the probabilities of the clean tokens" if config.categorical else _PREDICTS[config.predicts]
    return (
        f"# {name.rpartition('/')[2]}\n\nA denoising diffusion model of {over}. Its network predicts {says}. It is "
        "made for the library `ddim`: Denoising Diffusion Implicit Models (Song, Meng & Ermon, ICLR 2021)."
    )


def _what(config: ModelConfig, weights: Mapping[str, Tensor]) -> str:
    schedule = config.schedule.build()
    first, last = schedule.level(1), schedule.level(schedule.T)
    stored = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()}))
    size = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    lines = {"network": str(config.network)}
    lines["parameters"] = f"{sum(t.numel() for t in weights.values()):,}, stored as {stored}, {size / 1e6:.1f} MB"
    lines |= config.data.facts()
    if (noise := config.categorical) is not None:
        lines["noise"] = noise.pi if isinstance(noise.pi, str) else "of a given pi"
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
    return "## What it is\n\n" + _table(lines)


def _training(config: ModelConfig) -> Iterator[str]:
    """What is known of it, if anything is."""
    known, things = config.provenance, kind_of(config).things
    lines = {}
    if known.data:
        split = f", split {known.split}" if known.split else ""
        count = f", {known.pictures:,} {things}" if known.pictures else ""
        lines["data"] = known.data + split + count
    if known.data_fingerprint:
        lines["hash of the data"] = known.data_fingerprint
    if known.steps:
        lines["steps"] = f"{known.steps:,}"
    if known.images_seen:
        lines[f"{things} seen"] = f"{known.images_seen:,}"
    if known.seconds:
        lines["time"] = f"{known.seconds / 60:.1f} minutes"
    if known.version:
        lines["library"] = f"ddim {known.version}"
    parts = [_table(lines)] if lines else []
    if known.command:
        parts.append("The command:\n\n" + _block("sh", known.command))
    if known.training is not None:
        parts.append("The recipe:\n\n" + _block("json", known.training.model_dump_json(indent=2)))
    if parts:
        yield "## How it was trained\n\n" + "\n\n".join(parts)


def _use(config: ModelConfig, name: str) -> str:
    needs = config.needs_label
    shape = ", ".join(str(side) for side in (16, *config.network.shape))
    gives = f"int64, ({shape})" if config.categorical else f"float32, ({shape}), nominally in [-1, 1]"
    lines = ["import ddim", "", f"model = ddim.load({name!r})"]
    lines.append(f"samples = model.sample(16, steps=20, seed=0{', labels=0' if needs else ''})  # {gives}")
    lines += ["texts = model.text(samples)"] if isinstance(config.data, TextPolicy) else []
    command = f"ddim sample {name} --steps 20 -n 16 {'--label 0 ' if needs else ''}--out samples"
    where = "" if REPOSITORY.fullmatch(name) else f" `{name}` is the folder of this file."
    return (
        f"## How to use it\n\nWith `ddim` installed, `huggingface_hub` too.{where}\n\n"
        + _block("python", "\n".join(lines))
        + "\n\nOr, into a folder of files:\n\n"
        + _block("sh", command)
    )


def _limits(config: ModelConfig) -> str:
    shape, known = config.network.shape, config.provenance
    lines = [f"It makes {kind_of(config).things} of shape {shape} and of no other."]
    if config.needs_label:
        lines.append("It was never trained without a label: each sample needs one, and guidance cannot be used.")
    if known.data:
        lines.append(f"What it makes is like what it was trained on, {known.data}, with what that holds and lacks.")
    else:
        lines.append("What it was trained on is not known.")
    lines.append("How good its samples are is not said here: a model's configuration holds no such figure.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _table(lines: Mapping[str, str]) -> str:
    rows = [f"| {key} | {' '.join(value.split()).replace('|', chr(92) + '|')} |" for key, value in lines.items()]
    return "\n".join(["| | |", "|-|-|", *rows])


def _block(language: str, text: str) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _need() -> None:
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise DdimError("the Hugging Face Hub", f"needs {error.name}", "pip install 'ddim[hub]'") from None


def _why(error: Exception, revision: str | None) -> tuple[str, str]:
    """What went wrong between us and the hub, and how to mend it."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "is a gated repository", "ask for access on its page, and log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "no such repository, or it is private", "check the name, or log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no revision {revision}", "name a branch, tag or commit that it has"
    if isinstance(error, errors.HFValidationError):
        return "is no name of a repository", 'write "org/name"'
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return "is not here, and the hub cannot be reached", "check the name and the connection, or give a folder"
    reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return f"the hub refused or could not be reached ({reason})", "check the connection and your rights"

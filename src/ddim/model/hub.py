"""Save, publish, download and read models of the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ddim._io.arguments import suggest_names
from ddim.errors import DdimError, shorten
from ddim.model import checkpoint, importers
from ddim.model.config import ModelConfig
from ddim.model.model_card import REPOSITORY, card
from ddim.names import DType
from ddim.nn.base import Network
from ddim.process import rng

M = TypeVar("M", bound="HubMixin")


def place(name: str | Path, **settings: Any) -> str | Path:
    """Resolve a name to a local path or bundled model, or download the repository of that name, see `fetch`.

    Raises:
        DdimError: If a repository cannot be downloaded.
    """
    if not isinstance(name, str | Path):
        raise DdimError(f"model {shorten(repr(name))}", "is not a name or path", "use a str or a Path")
    if any(len(part.encode(errors="replace")) > 255 or "\0" in part for part in Path(name).parts):
        raise DdimError(shorten(str(name)), "cannot be the name of a model: a part of it is too long", "check the name")
    local = not isinstance(name, str) or checkpoint.is_path(name) or not REPOSITORY.fullmatch(name)
    return name if local or Path(name).exists() else fetch(str(name), **settings)


def fetch(
    name: str,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """Download a repository into the Hub's cache: JSON and safetensors files, or *.bin if there are no safetensors.

    Args:
        name: "org/name".
        revision: A branch, tag or commit.
        cache_dir: The folder for downloads; the Hub's default if None.
        token: Access token for private repositories.
        local_files_only: Whether to use only files downloaded before.
        force_download: Whether to download files again.

    Returns:
        The local folder.

    Raises:
        DdimError: If the repository does not exist, access is denied, or the Hub cannot be reached.
    """
    _require_hub()
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token}
    options |= {"local_files_only": local_files_only, "force_download": force_download}
    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"], **options))
        if not any(folder.rglob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.bin"], **options))
    except Exception as error:  # the classes of connection errors depend on the HTTP library in use
        raise DdimError(name, *_explain(error, revision)) from None
    return folder


def contents(
    place: str | Path, hints: importers.CheckpointHints | None = None, library: str | None = None
) -> tuple[ModelConfig, dict[str, Tensor], tuple[str, ...]]:
    """Read a model's configuration and weights, and the notes on its conversion if it is another library's.

    Args:
        place: A folder, a file of weights, or a bundled model's name.
        hints: Metadata that a file of weights lacks.
        library: The library that a file of weights is from, see `ddim.model.importers.read`.

    Raises:
        DdimError: If something is missing or invalid, does not match its checksum, or a weight is not finite.
    """
    if importers.is_importable(place):
        imported = importers.read(place, hints, library)
        checkpoint.check_finite(imported.weights, place)
        return imported.config, imported.weights, imported.notes
    return *checkpoint.read(place), ()


def read(
    place: str | Path, name: str | Path, hints: importers.CheckpointHints | None = None
) -> tuple[ModelConfig, Network, tuple[str, ...]]:
    """Read a model as `contents` does, and build the network with its weights.

    Args:
        place: A folder, a file of weights, or a bundled model's name.
        name: The model's name in error messages.
        hints: Metadata that a file of weights lacks.

    Raises:
        DdimError: As for `contents`, or if the weights do not fit the network.
    """
    config, weights, notes = contents(place, hints)
    # Not on the device "meta": creating an embedding there imports torch's compiler, which takes seconds.
    with rng.temporary_seed("cpu", 0):
        network = config.network.build()
    checkpoint.fill(network, weights, name)
    return config, network, notes


def write(
    folder: Path, config: ModelConfig, weights: Mapping[str, Tensor], license: str | None = None, repo_id: str = ""
) -> Path:
    """Write a model folder with a model card; an older model in it is replaced entirely.

    Args:
        folder: The folder to write.
        config: The configuration.
        weights: The weights.
        license: The weights' licence by its name on the Hub; omitted if None.
        repo_id: The model's name in the card; the folder's name if empty.

    Raises:
        DdimError: If huggingface_hub is not installed, or the folder cannot be written.
    """
    _require_hub()
    card_of = partial(card, weights=weights, name=repo_id or folder.resolve().name, license=license)
    checkpoint.write(folder, config, weights, card_of)
    return folder


def push(
    repo_id: str,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    license: str | None,
    settings: Mapping[str, Any],
) -> str:
    """Publish a model folder: create the repository if needed, and upload the three files in one commit.

    Args:
        repo_id: "org/name", or "name" for a repository of the user.
        config: The configuration.
        weights: The weights.
        license: The weights' licence by its name on the Hub; omitted if None.
        settings: Keyword arguments of huggingface_hub's `ModelHubMixin.push_to_hub`.

    Returns:
        The URL of the commit.

    Raises:
        DdimError: If huggingface_hub is not installed, or publishing failed.
    """
    _require_hub()
    from huggingface_hub import ModelHubMixin

    class Folder(ModelHubMixin):
        def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
            path = Path(save_directory)
            write(path, config, weights, license, repo_id if "/" in repo_id else "/".join(path.parts[-2:]))

    try:
        return str(Folder().push_to_hub(repo_id, **settings))
    except DdimError:
        raise
    except Exception as error:  # see `fetch`
        raise DdimError(repo_id, *_explain(error, settings.get("branch"))) from None


def _require_hub() -> None:
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise DdimError("the Hugging Face Hub", f"needs {error.name}", "pip install 'ddim[hub]'") from None


def _explain(error: Exception, revision: str | None) -> tuple[str, str]:
    """The problem and the hint for an error of the Hub."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "is a gated repository", "request access on its page, and log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "no such folder, and no such repository, or it is private",
            "check the name, or log in with `hf auth login`",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no revision {revision}", "use an existing branch, tag or commit"
    if isinstance(error, errors.HFValidationError):
        return "is not a name of a repository", 'use "org/name"'
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return (
            "no such folder, and as a repository it is not cached and the Hub cannot be reached",
            "check the path, or the name and the connection",
        )
    reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return f"the Hub denied access or could not be reached ({reason})", "check the connection and your permissions"


class HubMixin:
    """Methods to save, publish and load model folders with a model card, see `ddim.model.hub`."""

    config: ModelConfig
    network: Network
    notes: tuple[str, ...]

    @suggest_names
    def save_pretrained(
        self, folder: str | Path, *, license: str | None = None, dtype: torch.dtype | None = None, repo_id: str = ""
    ) -> Path:
        """Write the model folder with a model card, `README.md`, generated from the configuration.

        Args:
            folder: The folder to write; an older model in it is replaced, including its card.
            license: The weights' licence by its name on the Hub, such as "apache-2.0"; omitted if None.
            dtype: The dtype to store the weights in; unchanged if None.
            repo_id: The model's name in the card, "org/name"; the folder's name if empty.

        Returns:
            The folder.

        Raises:
            DdimError: If huggingface_hub is not installed, or the folder cannot be written.
        """

        return write(Path(folder), self.config, self._weights(dtype), license, repo_id)

    @suggest_names
    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str | None = None,
        dtype: torch.dtype | None = None,
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        commit_message: str = "Push model using ddim",
    ) -> str:
        """Publish the files that `save_pretrained` writes; the repository is created if needed.

        Args:
            repo_id: "org/name", or "name" for a repository of the user.
            license: The weights' licence by its name on the Hub, such as "apache-2.0"; omitted if None.
            dtype: The dtype to store the weights in; unchanged if None.
            private: Whether a new repository is private; by default as the account's settings say.
            token: Access token.
            branch: The branch to publish to; by default "main".
            create_pr: Whether to open a pull request instead of committing.
            commit_message: The message of the commit.

        Returns:
            The URL of the commit.

        Raises:
            DdimError: If huggingface_hub is not installed, or publishing failed.
        """

        settings = {"private": private, "token": token, "branch": branch, "create_pr": create_pr}
        settings |= {"commit_message": commit_message}
        return push(repo_id, self.config, self._weights(dtype), license, settings)

    @classmethod
    @suggest_names
    def from_pretrained(
        cls: type[M],
        name: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        device: torch.device | str | None = None,
        dtype: DType = "auto",
        compile: bool = False,
        micro_batch: int | None = None,
        cuda_graphs: bool | None = None,
    ) -> M:
        """Load a model from a folder or a repository of the Hub; its checksum is verified.

        Args:
            name: A folder, a bundled model's name, or "org/name".
            revision: A branch, tag or commit of the repository.
            cache_dir: The folder for downloads of a repository.
            token: Access token for private repositories.
            local_files_only: Whether to use only files of the repository downloaded before.
            force_download: Whether to download the repository's files again.
            device: The device to compute on; by default a GPU if there is one, else the CPU.
            dtype: The network's compute precision, see `ddim.names.DType`.
            compile: Whether to compile the network with torch.compile.
            micro_batch: The number of samples per network evaluation, see `ddim.Model`.
            cuda_graphs: Whether sampling replays CUDA graphs, see `ddim.Model`.

        Raises:
            DdimError: If it cannot be downloaded, or is damaged.
        """

        options = {"revision": revision, "cache_dir": cache_dir, "token": token}
        folder = place(name, **options, local_files_only=local_files_only, force_download=force_download)
        config, network, notes = read(folder, name)
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        constructor: Any = cls
        settings = {"dtype": dtype, "compile": compile, "micro_batch": micro_batch, "cuda_graphs": cuda_graphs}
        model: M = constructor(network, config, device=device, **settings)
        model.notes = notes
        return model

    def _weights(self, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
        return {key: value.to(dtype) if dtype else value for key, value in self.network.state_dict().items()}

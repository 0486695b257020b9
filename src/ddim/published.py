"""What every model offers for publishing on the Hugging Face Hub; nothing of it is imported before it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch

from ddim.config import ModelConfig
from ddim.errors import DdimError
from ddim.nn.network import Network

M = TypeVar("M", bound="Published")


class Published:
    """Model folders with a model card, written, pushed and loaded, see `ddim.hub`."""

    config: ModelConfig
    network: Network
    notes: tuple[str, ...]

    def save_pretrained(
        self, folder: str | Path, license: str | None = None, dtype: torch.dtype | None = None, repo_id: str = ""
    ) -> Path:
        """Write the model folder with a model card, `README.md`, made from the configuration.

        Args:
            folder: Where; an older model there is replaced, its card too.
            license: The weights' licence as the hub names it, such as "apache-2.0"; left out of the card if None.
            dtype: The dtype to store weights in; their own if None.
            repo_id: What the card calls the model, "org/name"; the folder's name if empty.

        Returns:
            The folder.

        Raises:
            DdimError: If huggingface_hub is not installed, or the folder cannot be written.
        """
        from ddim import hub

        return hub.write(Path(folder), self.config, self._weights(dtype), license, repo_id)

    def push_to_hub(
        self, repo_id: str, license: str | None = None, dtype: torch.dtype | None = None, **settings: Any
    ) -> str:
        """Publish what `save_pretrained` writes; the repository is made if it is not there.

        Args:
            repo_id: "org/name", or "name" for one of one's own.
            license: As for `save_pretrained`.
            dtype: As for `save_pretrained`.
            settings: private, token, branch, create_pr, commit_message: see huggingface_hub's ModelHubMixin.

        Returns:
            Where the commit is, a URL.

        Raises:
            DdimError: If huggingface_hub is not installed, or it did not work.
        """
        from ddim import hub

        return hub.push(repo_id, self.config, self._weights(dtype), license, **settings)

    @classmethod
    def from_pretrained(
        cls: type[M],
        name: str | Path,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        device: torch.device | str | None = None,
        **settings: Any,
    ) -> M:
        """A model from a folder, or from a repository of the hub; its checksum is verified.

        Args:
            name: A folder, a bundled model's name, or "org/name".
            revision: A branch, tag or commit of the repository, as for the next four.
            cache_dir: Where downloads are kept.
            token: For repositories that are not public.
            local_files_only: Whether only what was downloaded before is taken.
            force_download: Whether it is downloaded again.
            device: Where it computes; a GPU if there is one, else the CPU.
            settings: dtype, compile, micro_batch: see `ddim.Model`.

        Raises:
            DdimError: If it cannot be had, is damaged, or is a model of another class.
        """
        from ddim import hub

        fetched = {"revision": revision, "cache_dir": cache_dir, "token": token}
        place = hub.place(name, **fetched, local_files_only=local_files_only, force_download=force_download)
        config, network, notes = hub.read(place, name)
        # By their names: to import the classes here would be a circle.
        right, wrong = ("TokenModel", "Model") if config.categorical else ("Model", "TokenModel")
        if wrong in {base.__name__ for base in cls.__mro__}:
            kind = "categories" if config.categorical else "real-valued pictures"
            raise DdimError(name, f"is a model of {kind}", f"load it with {right}.from_pretrained")
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        made: Any = cls
        model: M = made(network, config, device, **settings)
        model.notes = notes
        return model

    def _weights(self, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
        return {key: value.to(dtype) if dtype else value for key, value in self.network.state_dict().items()}

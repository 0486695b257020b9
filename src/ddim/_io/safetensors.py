"""Safetensors files with JSON metadata, for training states and latents. Reading one never executes anything."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ddim._io.atomic import write_atomic
from ddim._io.checksum import KEY, seal_tensors, tensors_metadata, unseal_tensors
from ddim._io.reading import check_file, of_kind, parse_json
from ddim.errors import DdimError


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the JSON metadata of a safetensors file, and verify their checksum.

    Raises:
        DdimError: If it is not a safetensors file, or is damaged.
    """
    check_file(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            meta = of_kind(parse_json(metadata.get("ddim", "{}"), path), dict, path)
            if "ddim" not in metadata and any(KEY in each for each in metadata.values()):
                raise ValueError("its metadata is damaged")
            meta = unseal_tensors(path, meta)
            return {key: file.get_tensor(key) for key in file.keys()}, meta  # noqa: SIM118
    except FileNotFoundError:
        raise DdimError(path, "no such file", "check the path") from None
    except DdimError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DdimError(path, f"is not a safetensors file ({reason})", "write it again") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors and JSON metadata to a safetensors file with a checksum of both, atomically.

    Raises:
        DdimError: If it cannot be written.
    """
    flat = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    write_atomic(path, seal_tensors(save(flat, {"ddim": tensors_metadata(meta)})))

"""Check that a device can be used before anything is loaded."""

from __future__ import annotations

import torch

from ddim.errors import DdimError, shorten


def usable(device: torch.device | str, name: str | None = None) -> torch.device:
    """The device, checked by a small computation on it.

    Args:
        device: "cpu", "cuda", "cuda:1", ...
        name: The subject of an error message; "device ..." by default.

    Raises:
        DdimError: If there is no such device, or it cannot store values ("meta").
    """
    try:
        checked = torch.device(device)
        if checked.type == "meta":
            raise RuntimeError("it stores no values")
        (torch.zeros(1, device=checked) + 1).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError) as error:
        reason = shorten(str(error).partition("\n")[0], 100)
        raise DdimError(name or f"device {device}", f"cannot be used ({reason})", "remove it, or use cpu") from None
    return checked

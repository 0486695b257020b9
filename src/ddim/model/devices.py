"""Whether a device can be used, said before anything is loaded."""

from __future__ import annotations

import torch

from ddim.errors import DdimError, shorten


def usable(device: torch.device | str, name: str | None = None) -> torch.device:
    """The device, after one small computation on it.

    Args:
        device: "cpu", "cuda", "cuda:1", ...
        name: What to call it in an error.

    Raises:
        DdimError: If there is no such device here, or it cannot hold numbers, as "meta" cannot.
    """
    try:
        made = torch.device(device)
        if made.type == "meta":
            raise RuntimeError("it holds no numbers")
        (torch.zeros(1, device=made) + 1).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError) as error:
        reason = shorten(str(error).partition("\n")[0], 100)
        raise DdimError(name or f"device {device}", f"cannot be used ({reason})", "leave it out, or use cpu") from None
    return made

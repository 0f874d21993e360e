"""Computing in fp32 inside a region that runs under autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from vae3d.errors import UserError


def as_device(name: str) -> torch.device:
    """The device of that name. Raises UserError if there is none on this machine."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name} is not usable here: {str(error).splitlines()[0]}") from error
    return device


def without_tf32() -> None:
    """Measure in real fp32: convolutions on NVIDIA GPUs keep only 10 bits of the mantissa by default."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Inside this context operations keep their inputs' dtype. The meta device knows no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)

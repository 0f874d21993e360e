"""Dtypes, autocast and TF32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from vae3d.errors import UserError

MAX_BENCHMARKED = 8  # shapes of a training batch: the search for each takes seconds

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def as_device(name: str) -> torch.device:
    """torch.device(name). Raises UserError if this machine has no such device."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name} is not usable here: {str(error).splitlines()[0]}") from error
    return device


def disable_tf32() -> None:
    """Compute in full fp32: by default convolutions on NVIDIA GPUs use TF32, with 10 bits of mantissa."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def set_cudnn_benchmark(shapes: int) -> bool:
    """Let cuDNN time its kernels for each new shape, if a training has few. Returns whether it will.

    shapes: of its batches; those of validation come on top. With many frame counts most steps would search.
    """
    torch.backends.cudnn.benchmark = shapes <= MAX_BENCHMARKED
    return torch.backends.cudnn.benchmark


def cast_keep_stats(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast a network, but keep latents_mean and latents_std in fp32: bf16 would change them by up to 0.4 %."""
    names = ("latents_mean", "latents_std")
    stats = {name: buffer for name, buffer in network.named_buffers() if name.rpartition(".")[2] in names}
    network.to(dtype)
    for name, buffer in stats.items():
        owner, _, attribute = name.rpartition(".")
        setattr(network.get_submodule(owner), attribute, buffer)
    return network


@contextmanager
def no_tf32() -> Iterator[None]:
    """Context manager: disable_tf32 inside, restore the flags after."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    disable_tf32()
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def autocast_off(device: torch.device) -> AbstractContextManager[object]:
    """Turn autocast off. The meta device has no autocast."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Autocast to fp16 or bf16; for fp32, and on the meta device, turn it off."""
    if precision == "fp32" or device.type == "meta":
        return autocast_off(device)
    return torch.autocast(device.type, DTYPES[precision])


def slow_conv3d() -> str | None:
    """A warning if half-precision 3D convolutions are slow here, or None.

    torch 2.9 with cuDNN before 9.15 runs them without cuDNN, with 3 to 17 times the memory (pytorch#166643).
    """
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    if cudnn is None or not torch.__version__.startswith("2.9.") or cudnn >= 91500:
        return None
    return f"torch {torch.__version__} with cuDNN {cudnn} is slow at 3D convolutions in bf16 and fp16; update either"

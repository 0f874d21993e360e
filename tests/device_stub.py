"""A device that is not there: counts how often a step would wait for a GPU, on the CPU.

`torch.device("cpu", 0)` stands for the device and `torch.device("cpu")` for the host. Which tensors are on the device is
followed from one operator to the next, by their storages, and through backward passes.
"""

from __future__ import annotations

import contextlib
import traceback
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vae3d

PACKAGE = f"{Path(vae3d.__file__).parent}/"
DEVICE, HOST = torch.device("cpu", 0), torch.device("cpu")

# Operators whose result the host needs: the numbers, or the size of the output.
READS = {
    "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::masked_select",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount", "aten::repeat_interleave",
}  # fmt: skip
TO_HOST = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu)
COPIES = (torch.tensor, torch.as_tensor)


class Generator(torch.Generator):
    """Knows whether it is of the device."""

    def __new__(cls, device: torch.device | str = "cpu") -> Generator:
        made = super().__new__(cls, "cpu")
        made.home = DEVICE if torch.device(device) == DEVICE else HOST
        return made

    def __init__(self, device: torch.device | str = "cpu") -> None: ...

    @property
    def device(self) -> torch.device:
        return self.home


class DeviceStub:
    """waits: where the host waited for the device, one line of code each."""

    def __init__(self) -> None:
        self.waits: list[str] = []
        self._storages: set[int] = set()

    def place(self, tensors: Iterable[Tensor]) -> None:
        """Put tensors on the device."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._storages:
                self._storages.add(storage._cdata)
                weakref.finalize(storage, self._storages.discard, storage._cdata)

    def holds(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata in self._storages

    def copied(self, source: Tensor, copy: Tensor) -> None:
        """`copy` was made of `source` on the other side."""

    def wait(self, why: str) -> None:
        frames = [f for f in traceback.extract_stack() if f.filename.startswith(PACKAGE)]
        frames = frames or traceback.extract_stack()[:-3]
        self.waits.append(f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line} ({why})")

    @contextlib.contextmanager
    def active(self) -> Iterator[DeviceStub]:
        self.waits.clear()
        group = clip_grad._group_tensors_by_device_and_dtype

        def grouped(tensors: list[list[Tensor]]) -> dict[Any, Any]:  # written in C++, which knows the real device only
            return {(DEVICE, dtype): found for (_, dtype), found in group(tensors).items()}

        with (
            mock.patch.object(torch, "Generator", Generator),
            mock.patch.object(clip_grad, "_group_tensors_by_device_and_dtype", grouped),
            _Functions(self),
            _Operators(self),
        ):
            yield self


class _Functions(TorchFunctionMode):
    """What operators do not show: moves between devices, and `torch.tensor`."""

    def __init__(self, stub: DeviceStub) -> None:
        super().__init__()
        self.stub = stub

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, stub = dict(kwargs or {}), self.stub
        if func == torch.Tensor.device.__get__:
            return DEVICE if stub.holds(args[0]) else func(*args)
        if func is torch.Tensor.to:
            return self._to(func, args, kwargs)
        if func in TO_HOST and stub.holds(args[0]):
            stub.wait(func.__name__)
            with torch._C.DisableTorchFunction():
                return args[0].clone() if func is torch.Tensor.cpu else func(*args, **kwargs)
        out = func(*args, **kwargs)
        device = kwargs.get("device")
        if device is not None and isinstance(out, Tensor) and torch.device(device) == DEVICE:
            if func in COPIES and not stub.holds(args[0]):
                stub.wait(func.__name__)
            stub.place([out])
        elif device is not None and isinstance(out, Tensor):  # made like a tensor of the device, on the host
            stub._storages.discard(out.untyped_storage()._cdata)
        return out

    def _to(self, func, args, kwargs):
        source, *rest = args
        target = kwargs.get("device", next((x for x in rest if isinstance(x, str | torch.device | Tensor)), None))
        if isinstance(target, Tensor):
            target = DEVICE if self.stub.holds(target) else HOST
        there = self.stub.holds(source)
        if target is None or there == (torch.device(target) == DEVICE):
            return func(*args, **kwargs)
        blocking = not kwargs.get("non_blocking", rest[1] if len(rest) == 2 and isinstance(rest[1], bool) else False)
        if blocking:
            self.stub.wait("blocking copy")
        with torch._C.DisableTorchFunction():
            copy = func(source, *args[1:], **{**kwargs, "copy": True})
        if not there:
            self.stub.place([copy])
        else:
            self.stub._storages.discard(copy.untyped_storage()._cdata)
        self.stub.copied(source, copy)
        return copy


class _Operators(TorchDispatchMode):
    def __init__(self, stub: DeviceStub) -> None:
        super().__init__()
        self.stub = stub

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, stub = kwargs or {}, self.stub
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = [stub.holds(x) for x in tensors]
        out = func(*args, **kwargs)
        if not any(on_device):
            return out
        name = func._schema.name
        if name == "aten::copy_":
            if on_device[0] != on_device[1] and not (kwargs.get("non_blocking") or args[2:] == (True,)):
                stub.wait("blocking copy")
            return out
        masks = name.startswith("aten::index") and any(x.dtype in (torch.bool, torch.uint8) for x in tensors[1:])
        if name in READS or (masks and name not in ("aten::index_fill_", "aten::index_add_")):
            stub.wait(name)
        elif any(x.ndim and not there for x, there in zip(tensors, on_device, strict=True)):
            stub.wait(f"{name} of tensors on different devices")
        stub.place(x for x in tree_leaves(out) if isinstance(x, Tensor))
        return out


def on_device(trainer: Any, stub: DeviceStub | None = None) -> DeviceStub:
    """Put a trainer and its state on a stub, by default a new one."""
    stub = stub or DeviceStub()
    trainer.device = DEVICE
    adversary, emas = trainer.adversary, getattr(trainer.ema, "rates", {None: trainer.ema}).values()
    modules = [trainer.strategy.model, getattr(trainer, "objective", None), getattr(adversary, "discriminator", None)]
    modules += [t.term.network for t in getattr(getattr(trainer, "objective", None), "terms", {}).values()
                if hasattr(t.term, "network")]  # fmt: skip
    for module in filter(None, modules):
        stub.place([*module.parameters(), *module.buffers()])
    for ema in emas:
        stub.place(ema.shadow.values())
    stub.place(trainer.proximal.anchor.values())
    stub.place([trainer.status_table.packed])
    if (averages := getattr(adversary, "averages", None)) is not None:
        stub.place([averages])
    if (adaptive := getattr(adversary, "adaptive_weight", None)) is not None:
        stub.place([adaptive.buffer])
    if hasattr(adversary, "device"):
        adversary.device = DEVICE
    if (codec := getattr(trainer.data, "codec", None)) is not None:
        stub.place([*codec.model.parameters(), *codec.model.buffers()])
    return stub


def check_two_waits(trainer: Any, steps: int) -> None:
    """Fails if the host waits for the device anywhere in a step but in the two calls of transfer.read."""
    batches = list(trainer.load_batches(lambda: False))
    stub, accumulate = on_device(trainer), trainer.config.trainer.accumulate
    for step in range(steps):
        with stub.active():
            assert trainer.train_step(batches[step * accumulate : (step + 1) * accumulate]).applied
        assert len(stub.waits) == 2, "\n".join(stub.waits)
        assert all("transfer.py" in line and "tolist" in line for line in stub.waits), "\n".join(stub.waits)

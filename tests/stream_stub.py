"""Streams that are not there: finds, on the CPU, copies and kernels that a GPU would run too early.

The host queues operators on streams; here each runs at once, and vector clocks keep what a GPU would guarantee about
their order. `races` lists the pairs of operators that use the same memory, at least one of them writing, in no order;
also operators on memory that was freed, and might be in use again, on the stream that it was allocated on.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.device_stub import DEVICE, DeviceStub, on_device
from vae3d import pixels, transfer
from vae3d.training.trainer import StepBatches
from vae3d.transfer import InputCopies

HOST = "host"
Clock = Counter  # stream -> number of its operators that are known to be complete


@dataclass(frozen=True)
class Queued:
    """An operator on a stream, in the order in which the host queued them. clock: what is complete when it begins."""

    stream: str
    name: str
    clock: Clock

    def after(self, other: Queued) -> bool:
        """Whether it begins only once `other` is complete."""
        return self.clock[other.stream] >= other.clock[other.stream]


@dataclass
class _Memory:
    """allocated: on which stream. used: stream -> its last operator on it; recorded: by Tensor.record_stream."""

    allocated: str
    reads: Clock
    writes: Clock
    recorded: set[str]


class StreamStub(DeviceStub):
    """A DeviceStub with streams. queued: all operators. host_waits: of events and streams, not of values."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = Stream(self, "main")
        self.clocks: dict[str, Clock] = defaultdict(Counter)
        self.queued: list[Queued] = []
        self.races: list[str] = []
        self.host_waits: list[str] = []
        self._memory: dict[int, _Memory] = {}
        self._streams = 0

    def run(self, name: str, stream: str, reads: list[Tensor], writes: list[Tensor]) -> None:
        """An operator that the host queues on `stream`, or runs itself."""
        clock = self.clocks[stream]
        clock.update({k: max(n - clock[k], 0) for k, n in self.clocks[HOST].items()})  # queued after what it waited for
        clock[stream] += 1
        for tensors, written in ((reads, False), (writes, True)):
            for tensor in tensors:
                memory = self._memory_of(tensor, stream)
                others = memory.writes + memory.reads if written else memory.writes
                for other, time in others.items():
                    if other not in (stream, HOST) and clock[other] < time:
                        self.races.append(f"{name} on {stream} {'writes' if written else 'reads'} what {other} uses")
                last = memory.writes if written else memory.reads
                last[stream] = max(last[stream], clock[stream])
        self.queued.append(Queued(stream, name, Counter(clock)))

    def copied(self, source: Tensor, copy: Tensor) -> None:
        self.run("copy", self.stream.name, [source], [copy])

    def record_stream(self, tensor: Tensor, stream: Stream) -> None:
        self._memory_of(tensor, stream.name).recorded.add(stream.name)

    def _memory_of(self, tensor: Tensor, stream: str) -> _Memory:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._memory:
            self._memory[storage._cdata] = _Memory(stream, Counter(), Counter(), set())
            weakref.finalize(storage, self._free, storage._cdata)
        memory = self._memory[storage._cdata]
        if memory.allocated == HOST and self.holds(tensor):
            memory.allocated = stream
        return memory

    def _free(self, key: int) -> None:
        """Its next use is after what the stream that it was allocated on, or the host, knows to be complete."""
        memory = self._memory.pop(key)
        if memory.allocated == HOST:  # the allocator of pinned memory waits for copies
            return
        known = self.clocks[memory.allocated] | self.clocks[HOST]
        for stream, time in (memory.reads | memory.writes).items():
            if stream not in (memory.allocated, HOST) and known[stream] < time and stream not in memory.recorded:
                self.races.append(f"memory of {memory.allocated} is freed while {stream} uses it")

    def new_stream(self, device: Any = None) -> Stream:
        self._streams += 1
        return Stream(self, f"side {self._streams}")

    @contextlib.contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextlib.contextmanager
    def active(self) -> Iterator[StreamStub]:
        patches = {
            "Stream": self.new_stream,
            "Event": lambda: Event(self),
            "stream": self.use,
            "current_stream": lambda device=None: self.stream,
        }
        with contextlib.ExitStack() as stack:
            for module in (transfer, pixels):
                stack.enter_context(mock.patch.object(module, "has_streams", return_value=True))
            record_stream = mock.patch.object(
                torch.Tensor, "record_stream", lambda x, stream: self.record_stream(x, stream), create=True
            )
            stack.enter_context(record_stream)
            for name, patch in patches.items():
                stack.enter_context(mock.patch.object(torch.cuda, name, patch))
            stack.enter_context(super().active())
            stack.enter_context(_Reads(self))
            stack.enter_context(_Accesses(self))
            yield self


class Stream:
    def __init__(self, stub: StreamStub, name: str) -> None:
        self.stub, self.name = stub, name

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def wait_event(self, event: Event) -> None:
        self.stub.clocks[self.name] |= event.clock

    def record_event(self) -> Event:
        event = Event(self.stub)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.record_event().synchronize()


class Event:
    def __init__(self, stub: StreamStub) -> None:
        self.stub, self.clock = stub, Counter()

    def record(self, stream: Stream | None = None) -> None:
        self.clock = Counter(self.stub.clocks[(stream or self.stub.stream).name])

    def synchronize(self) -> None:
        self.stub.host_waits.append("event")
        self.stub.clocks[HOST] |= self.clock


class _Reads(TorchFunctionMode):
    """Values that the host reads."""

    def __init__(self, stub: StreamStub) -> None:
        super().__init__()
        self.stub = stub

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.item):
            if self.stub.holds(args[0]):  # which waits for the stream
                self.stub.clocks[HOST] |= self.stub.clocks[self.stub.stream.name]
            else:
                self.stub.run(func.__name__, HOST, [args[0]], [])
        return func(*args, **(kwargs or {}))


class _Accesses(TorchDispatchMode):
    """Which memory an operator reads and writes."""

    def __init__(self, stub: StreamStub) -> None:
        super().__init__()
        self.stub = stub

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        arguments = func._schema.arguments
        given = [*zip(arguments, args, strict=False)]
        given += [(a, kwargs[a.name]) for a in arguments if a.name in kwargs]
        reads: list[Tensor] = []
        writes: list[Tensor] = []
        for argument, value in given:
            written = argument.alias_info is not None and argument.alias_info.is_write
            (writes if written else reads).extend(x for x in tree_leaves(value) if isinstance(x, Tensor))
        known = {x.untyped_storage()._cdata for x in (*reads, *writes)}
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.untyped_storage()._cdata not in known]
        if not made and not writes and any(isinstance(x, Tensor) for x in tree_leaves(out)):
            return out  # a view
        on_device = any(map(self.stub.holds, (*reads, *writes, *made)))
        self.stub.run(func._schema.name, self.stub.stream.name if on_device else HOST, reads, [*writes, *made])
        return out


def check_input_copies(trainer: Any, steps: int, tensors: int) -> None:
    """Fails unless every micro-batch but the first is copied on a stream of its own, those of a step while the one
    before is computed, and the first of the next step before the host waits for this one, without races or more waits.

    tensors: of a micro-batch.
    """
    stub, accumulate = StreamStub(), trainer.config.trainer.accumulate
    on_device(trainer, stub)
    queued_before: dict[str, list[int]] = {"backward": [], "wait": []}  # number of operators
    backward, wait = trainer.strategy.backward, stub.wait

    def noted(name: str, call: Callable[..., None]) -> Callable[..., None]:
        return lambda *args: (queued_before[name].append(len(stub.queued)), call(*args))[1]

    trainer.strategy.backward, stub.wait = noted("backward", backward), noted("wait", wait)
    with stub.active():
        trainer.inputs = InputCopies(DEVICE, trainer.copy_to_device)
        batches = StepBatches(trainer.load_batches(lambda: False), accumulate)
        for step in range(steps):
            micro_batches, error = batches.take()
            fetch = batches.fetch if step + 1 < steps else None
            assert trainer.train_step(micro_batches, 0, error, fetch).applied
    assert not stub.races, "\n".join(stub.races)
    assert not stub.host_waits
    assert len(stub.waits) == 2 * steps, "\n".join(stub.waits)
    copies = [n for n, operator in enumerate(stub.queued) if (operator.name, operator.stream) == ("copy", "side 1")]
    assert len(copies) == tensors * (accumulate * steps - 1)
    for k in range(1, accumulate * steps):
        mine = copies[tensors * (k - 1) : tensors * k]
        step, position = divmod(k, accumulate)
        if position:
            assert max(mine) < queued_before["backward"][k - 1]
        else:
            assert queued_before["backward"][k - 1] < min(mine)
            assert max(mine) < queued_before["wait"][2 * (step - 1)]

"""Copies beside the computation: their order on streams, and when memory is used again. On the CPU, by a stub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.device_stub import DEVICE, HOST
from tests.stream_stub import Event, Queued, Stream, StreamStub
from vae3d import transfer
from vae3d.transfer import HostBuffers, InputCopies, host_copy, on_host

BATCHES = [[torch.full((2,), float(n)), "name"] for n in range(4)]


def copy(batch: list) -> list:
    return [batch[0].to(DEVICE, non_blocking=True), batch[1]]


def train(stub: StreamStub, batches: list[list]) -> list[float]:
    """Two steps of two micro-batches; the copy for the second step is queued in the first."""
    inputs, losses = InputCopies(DEVICE, copy), []
    for step in (batches[:2], batches[2:]):
        for values, _ in inputs.each(step):
            losses.append((2 * values).sum())
            del values
        inputs.queue(batches[2])
    return torch.stack(losses).tolist()


def decode(stub: StreamStub, count: int = 5) -> Iterator[dict]:
    for n in range(count):
        yield {"frames": (2 * torch.full((3,), float(n), device=DEVICE)), "name": n, "more": [torch.ones(n)]}


def stream(stub: StreamStub) -> list[list[float]]:
    return [item["frames"].tolist() for item in on_host(decode(stub), DEVICE)]


def nothing(*_: object) -> None:
    """Keeps no reference to its arguments, as a Mock does."""


def named(stub: StreamStub, name: str) -> list[Queued]:
    return [operator for operator in stub.queued if operator.name == name]


def test_the_next_micro_batch_is_copied_while_one_is_computed():
    with StreamStub().active() as stub:
        assert train(stub, BATCHES) == [0.0, 4.0, 8.0, 12.0]
    assert not stub.races
    assert len(stub.waits) == 1  # of this test
    assert not stub.host_waits
    copies = named(stub, "copy")
    computed = named(stub, "aten::sum")
    assert [c.stream for c in copies[:4]] == ["main", "side 1", "side 1", "side 1"]
    for k, (own, last) in enumerate(zip(copies, computed, strict=False)):
        assert last.after(own)
        if k + 1 < len(computed):
            following = copies[k + 1]
            assert not following.after(last)  # it need not wait for what is computed
    order = [stub.queued.index(x) for x in (copies[1], named(stub, "aten::mul")[0], copies[2], computed[1])]
    assert order[0] < order[1]  # queued before the first micro-batch is computed
    assert order[2] > order[3]  # by the end of the step


def test_a_result_is_copied_and_used_while_the_next_is_computed():
    with StreamStub().active() as stub:
        buffers = set()
        for n, item in enumerate(on_host(decode(stub), DEVICE)):
            assert item["frames"].tolist() == [2.0 * n] * 3
            assert item["name"] == n
            assert torch.equal(item["more"][0], torch.ones(n))
            buffers.add(item["frames"].data_ptr())
            assert len(named(stub, "aten::mul")) == min(n + 2, 5)  # the next is queued already
    assert not stub.races
    assert not stub.waits
    assert stub.host_waits == ["event"] * 5
    assert len(buffers) == 2
    copies = [c for c in named(stub, "aten::copy_") if c.stream != "main"]
    computed = named(stub, "aten::mul")
    for own, made, following in zip(copies[::2], computed, computed[1:], strict=False):
        assert own.after(made)
        assert not following.after(own)


def test_work_that_fails_ends_the_stream_of_results():
    def failing() -> Iterator[Tensor]:
        yield torch.ones(1, device=DEVICE)
        raise ZeroDivisionError

    with StreamStub().active(), pytest.raises(ZeroDivisionError):
        list(on_host(failing(), DEVICE))


@pytest.mark.parametrize(
    ("run", "owner", "method", "race"),
    [
        (train, Stream, "wait_event", "aten::mul on main reads what side 1 uses"),
        (train, transfer, "_used_on", "memory of side 1 is freed while main uses it"),
        (stream, Stream, "wait_stream", "aten::copy_ on side 1 reads what main uses"),
        (stream, transfer, "_used_on", "memory of main is freed while side 1 uses it"),
        (stream, Event, "synchronize", "tolist on host reads what side 1 uses"),
    ],
)
def test_the_stub_finds_a_missing_order(run, owner, method, race):
    def batches() -> list[list]:
        return [[values.clone(), name] for values, name in BATCHES]

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(owner, method, nothing))
        stub = stack.enter_context(StreamStub().active())
        run(stub, *([batches()] if run is train else []))
    assert race in stub.races


def test_one_buffer_would_not_do(monkeypatch):
    class Same(HostBuffers):
        shared = HostBuffers()

        def copy(self, value):
            return self.shared.copy(value)

    monkeypatch.setattr(transfer, "HostBuffers", Same)
    with StreamStub().active() as stub:
        assert stream(stub)[0] != [0.0] * 3


def test_a_batch_that_does_not_fit_ahead_is_copied_when_it_is_used(monkeypatch):
    def full(batch: list) -> list:
        if stub.stream.name != "main":
            raise torch.OutOfMemoryError
        return copy(batch)

    with StreamStub().active() as stub:
        inputs = InputCopies(DEVICE, full)
        inputs.queue(BATCHES[0])
        assert inputs.take(BATCHES[0])[0].tolist() == [0.0, 0.0]


def test_what_was_queued_for_a_step_that_did_not_come_is_dropped():
    with StreamStub().active() as stub:
        inputs = InputCopies(DEVICE, copy)
        inputs.queue(BATCHES[0])
        (first,) = inputs.each(BATCHES[1:2])
        assert first[0].tolist() == [1.0, 1.0]
        assert len(named(stub, "copy")) == 2
        inputs.take(BATCHES[0])
        assert len(named(stub, "copy")) == 3


def test_a_cpu_copies_when_a_batch_is_used_and_gives_results_as_they_are():
    asked = []

    def watched(batch: list) -> list:
        asked.append(batch[1])
        return batch

    inputs = InputCopies(HOST, watched)
    assert not inputs.ahead
    inputs.queue(["x", 1])
    for n, batch in enumerate(inputs.each([["a", 0], ["b", 1]])):
        assert asked == [0, 1][: n + 1]
        assert batch[1] == n

    made = []

    def results() -> Iterator[Tensor]:
        for _ in range(2):
            made.append(torch.ones(1))
            yield made[-1]

    for n, result in enumerate(on_host(results(), HOST)):
        assert result is made[n]
        assert len(made) == n + 1


def test_host_memory_is_used_again_where_shape_type_and_strides_are_equal():
    shared, last = torch.randn(2, 3), torch.randn(1, 2, 3, 3).to(memory_format=torch.channels_last)
    state = {"a": shared, "b": [shared, (last, "x", 3)], "c": torch.zeros(())}
    buffers = HostBuffers()
    buffers.reserve(state)
    first = host_copy(state, buffers)
    assert first["a"] is first["b"][0]
    assert first["b"][1][1:] == ("x", 3)
    assert first["b"][1][0].is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(x, y) for x, y in zip((first["a"], first["b"][1][0]), (shared, last), strict=True))
    kept = [x.data_ptr() for x in (first["a"], first["b"][1][0], first["c"])]
    shared += 1
    again = host_copy(state | {"c": torch.zeros(2)}, buffers)
    assert [x.data_ptr() for x in (again["a"], again["b"][1][0])] == kept[:2]
    assert again["c"].shape == (2,)
    assert torch.equal(first["a"], shared)
    alone = host_copy(state)
    assert alone["a"].data_ptr() not in kept

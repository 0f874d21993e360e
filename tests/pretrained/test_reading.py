"""Reading weight files of every format, and refusing others."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vae3d.pretrained.weights import WeightsMissing, assign, read


def state() -> dict[str, Tensor]:
    return {"weight": torch.arange(6.0).view(2, 3), "bias": torch.tensor([1.0, 2.0])}


def save(path: Path, layout: str) -> Path:
    if layout == "safetensors":
        save_file(state(), path.with_suffix(".safetensors"))
        return path.with_suffix(".safetensors")
    content = {"epoch": 3, "state_dict": state()} if layout == "nested" else OrderedDict(state())
    torch.save(content, path, _use_new_zipfile_serialization=layout != "legacy")
    return path


@pytest.mark.parametrize("layout", ["zip", "legacy", "nested", "safetensors"])
def test_tensors_of_every_layout_are_read(tmp_path, layout):
    found = read(save(tmp_path / "net.pth.tar", layout))
    assert found.keys() == state().keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in state().items())


@pytest.mark.parametrize("layout", ["zip", "legacy", "safetensors"])
def test_a_file_cut_anywhere_is_refused(tmp_path, layout):
    path = save(tmp_path / "net.pth", layout)
    whole = path.read_bytes()
    for size in range(0, len(whole), max(1, len(whole) // 100)):
        path.write_bytes(whole[:size])
        with pytest.raises(WeightsMissing, match=r"net\.\w+: "):
            read(path)


@pytest.mark.parametrize("layout", ["zip", "legacy", "safetensors"])
def test_a_file_with_altered_bytes_is_read_or_refused(tmp_path, layout):
    """No other exception may escape the unpickler."""
    path = save(tmp_path / "net.pth", layout)
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), max(1, len(whole) // 500)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x15]) + whole[place + 1 :])
        try:
            read(path)
        except WeightsMissing:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("content", [{"weight": nn.Linear(2, 2)}, {"weight": 1.0}, {"state_dict": 3}, []])
def test_what_holds_no_tensors_is_refused(tmp_path, content):
    """Unpickling a whole model would run code."""
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(WeightsMissing, match=r"net\.pth: holds no tensors$"):
        read(tmp_path / "net.pth")


def test_a_network_without_memory_gets_its_tensors_in_fp32_and_is_frozen():
    with torch.device("meta"):
        network = nn.Linear(3, 2)
    assign(network, {key: tensor.half() for key, tensor in state().items()} | {"classifier": torch.ones(4)}, Path("f"))
    assert all(torch.equal(tensor, state()[key]) for key, tensor in network.state_dict().items())
    assert {tensor.dtype for tensor in network.parameters()} == {torch.float32}
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


def test_counts_of_batches_may_be_absent():
    network = nn.BatchNorm1d(2)
    assign(network, {k: t + 1 for k, t in network.state_dict().items() if k != "num_batches_tracked"}, Path("f"))
    assert network.running_mean.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": None}, "f.pth does not hold the weights of Linear: bias is missing$"),
        ({"bias": torch.ones(3)}, r"Linear: bias has shape \[3\], not \[2\]$"),
        ({"weight": torch.ones(3), "bias": None}, r"Linear: bias is missing; weight has shape \[3\], not \[2, 3\]$"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message):
    found = {key: tensor for key, tensor in (state() | change).items() if tensor is not None}
    with pytest.raises(WeightsMissing, match=message):
        assign(nn.Linear(3, 2), found, Path("f.pth"))


def test_only_the_first_errors_are_named_and_the_network_as_it_is_called():
    with pytest.raises(WeightsMissing, match=r"weights of the trunk: 0.weight is missing; (?:.*?; ){2}and 3 more$"):
        assign(nn.Sequential(*(nn.Linear(1, 1) for _ in range(3))), {}, Path("f"), "the trunk")

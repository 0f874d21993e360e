from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from vae3d.pretrained.pwcnet import DENSE, PWCNet, correlation, warp_back
from vae3d.pretrained.raft import Raft
from vae3d.pretrained.weights import WeightsMissing

# Published key in sniklaus/pytorch-pwc's file -> [key in NVlabs/PWC-Net's file, shape].
KEYS = json.loads((Path(__file__).parents[1] / "keys" / "pwcnet.json").read_text())


def draw(rng: np.random.Generator, key: str, shape: list[int]) -> Tensor:
    """Random weights that keep the variance from layer to layer, so that the flow is of some pixels."""
    fan = shape[0] * 4 if ".moduleUp" in key else int(np.prod(shape[1:]))
    scale = 0.02 if key.endswith("bias") else (2 / fan) ** 0.5
    return torch.from_numpy(rng.standard_normal(shape) * scale).float()


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    rng = np.random.default_rng(0)
    return {key: draw(rng, key, shape) for key, (_, shape) in KEYS.items()}


@pytest.fixture(scope="module")
def file(state, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pwc") / "network-default.pytorch"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def network(file) -> PWCNet:
    return PWCNet().load(file)


def moving(frames: int, height: int, width: int) -> Tensor:
    """Smooth noise that moves by (3, 2) pixels per frame, [T, 3, H, W] in [0, 1]."""
    noise = torch.from_numpy(np.random.default_rng(1).random((1, 3, 24, 24))).float()
    still = F.interpolate(noise, (192, 192), mode="bilinear", align_corners=False)
    return torch.cat([still[..., 2 * i : 2 * i + height, 3 * i : 3 * i + width] for i in range(frames)])


def shifted_products(first: Tensor, second: Tensor) -> Tensor:
    """The cost volume as the paper states it."""
    h, w = first.shape[-2:]
    padded = F.pad(second, (4, 4, 4, 4))
    shifts = [(dy, dx) for dy in range(9) for dx in range(9)]
    return torch.stack([(first * padded[..., dy : dy + h, dx : dx + w]).mean(1) for dy, dx in shifts], 1)


@pytest.mark.parametrize(
    "shape", [(1, 196, 4, 4), (2, 32, 16, 24), (3, 5, 9, 17), (1, 3, 1, 1), (2, 1, 7, 1), (1, 2, 23, 8)]
)
def test_correlation_is_the_mean_product_of_every_shift(shape):
    first, second = torch.randn(2, *shape)
    torch.testing.assert_close(correlation(first, second), shifted_products(first, second), rtol=0, atol=1e-6)


def test_correlation_of_memory_in_another_order_is_the_same():
    first, second = torch.randn(2, 2, 10, 12, 6).permute(0, 1, 4, 3, 2).unbind()
    torch.testing.assert_close(correlation(first, second), shifted_products(first, second), rtol=0, atol=1e-6)


def test_network_holds_the_published_tensors(network, state):
    ours = network.state_dict()
    assert (len(ours), sum(t.numel() for t in ours.values())) == (126, 9_374_274)
    assert sorted(t.double().sum().item() for t in ours.values()) == sorted(
        t.double().sum().item() for t in state.values()
    )
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


def test_flow_is_that_of_the_network_in_flolpips(network):
    """Recorded from danier97/flolpips with the same weights and frames; its correlation computed as above."""
    recorded = [
        [[[-6.1810, -11.4375], [-5.0458, -16.4004]], [[-0.4520, 1.7984], [3.3363, 7.0782]]],
        [[[-7.3267, -10.9979], [-6.0151, -15.6504]], [[0.1708, 2.0045], [4.5929, 6.6041]]],
    ]
    flow = network(moving(3, 50, 100))
    torch.testing.assert_close(flow[:, :, 5::39, 7::60], torch.tensor(recorded), rtol=0, atol=2e-3)


def test_the_coarsest_decoder_starts_from_rectified_costs(network):
    first, second = torch.randn(2, 1, 196, 2, 3)
    _, features = network.decoders[-1](first, second, None, None)
    costs = F.leaky_relu(shifted_products(first, second), 0.1)
    torch.testing.assert_close(features[:, sum(DENSE) :], costs, rtol=0, atol=1e-6)


def test_a_finer_decoder_warps_the_second_frame_by_the_flow_above(network):
    decoder = network.decoders[-2]
    first, second = torch.randn(2, 1, 128, 4, 6)
    flow, above = torch.randn(1, 2, 2, 3), torch.randn(1, 529, 2, 3)
    _, features = decoder(first, second, flow, above)
    flow = decoder.upflow(flow)
    costs = shifted_products(first, warp_back(second, flow * 20 / 32, "flolpips"))
    expected = torch.cat([F.leaky_relu(costs, 0.1), first, flow, decoder.upfeat(above)], 1)
    torch.testing.assert_close(features[:, sum(DENSE) :], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["net", "nvlabs", "nested", "safetensors"])
def test_every_published_layout_gives_the_same_network(network, state, tmp_path, layout):
    path = tmp_path / "weights.safetensors"
    nvlabs = {KEYS[key][0]: tensor for key, tensor in state.items()}
    unused = {"deconv2.weight": torch.zeros(2, 2, 4, 4), "deconv2.bias": torch.zeros(2)}
    if layout == "safetensors":
        save_file(nvlabs, path)
    else:
        path = path.with_suffix(".pth.tar")
        content = {"net": {key.replace("module", "net"): t for key, t in state.items()}, "nvlabs": nvlabs | unused}
        torch.save(content.get(layout, {"state_dict": nvlabs}), path)
    ours = PWCNet().load(path).state_dict()
    assert all(torch.equal(tensor, ours[key]) for key, tensor in network.state_dict().items())


def test_a_file_of_another_network_is_refused(trunks):
    with pytest.raises(WeightsMissing, match=r"alexnet-owt-7be5be79\.pth does not hold the weights of PWC-Net: module"):
        PWCNet().load(trunks / "alexnet-owt-7be5be79.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dc_conv7.bias": None}, "PWC-Net: dc_conv7.bias is missing$"),
        ({"dc_conv7.bias": torch.zeros(3)}, r"PWC-Net: dc_conv7.bias has shape \[3\], not \[2\]$"),
        ({"dc_conv8.bias": torch.zeros(3)}, "PWC-Net: dc_conv8.bias does not belong to it$"),
        (
            {f"conv{i}a.0.bias": None for i in range(1, 6)},
            "conv1a.0.bias is missing; .*conv3a.0.bias is missing; and 2 more$",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_its_first_errors(state, tmp_path, change, message):
    content = {KEYS[key][0]: tensor for key, tensor in state.items()} | change
    torch.save({key: tensor for key, tensor in content.items() if tensor is not None}, tmp_path / "other.pth")
    with pytest.raises(WeightsMissing, match=message):
        PWCNet().load(tmp_path / "other.pth")


@pytest.mark.parametrize("name", ["page.pth", "page.safetensors"])
def test_a_file_that_holds_no_weights_is_refused(tmp_path, name):
    (tmp_path / name).write_text("<html>404</html>")
    with pytest.raises(WeightsMissing, match=f"{name}: is a web page"):
        PWCNet().load(tmp_path / name)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("size", [1_000, 1_000_000])
def test_a_cut_file_is_refused(state, tmp_path, size, zipped):
    path = tmp_path / "cut.pth.tar"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(WeightsMissing, match=r"cut\.pth\.tar: is (a )?damaged"):
        PWCNet().load(path)


def test_a_file_without_names_is_refused(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(WeightsMissing, match=r"list\.pth does not hold the weights of PWC-Net"):
        PWCNet().load(tmp_path / "list.pth")


@pytest.mark.parametrize("size", [(32, 64), (64, 32), (32, 32)])
def test_frames_are_resized_to_multiples_of_64_and_the_flow_back(network, size):
    """Halving the flow at 64x64 is exact: no knot of its interpolation lies within a pair of pixels."""
    frames = moving(2, *size)
    flow = network(F.interpolate(frames, (64, 64), mode="bilinear", align_corners=False))
    scale = torch.tensor([size[1] / 64, size[0] / 64])[:, None, None]
    by_hand = F.interpolate(flow, size, mode="bilinear", align_corners=False) * scale
    torch.testing.assert_close(network(frames), by_hand, rtol=1e-5, atol=1e-5)


def test_the_smallest_frame_works(network):
    assert network(torch.rand(2, 3, 1, 1)).shape == (1, 2, 1, 1)


def test_forward_is_the_flow_of_neighbours(network):
    frames = moving(4, 64, 64)
    pairs = network.flow(frames[:-1], frames[1:])
    assert pairs.shape == (3, 2, 64, 64)
    torch.testing.assert_close(network(frames), pairs, rtol=1e-5, atol=1e-5)


def test_flow_stays_in_fp32_under_autocast(network):
    frames = moving(2, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = network(frames)
    assert torch.equal(mixed, network(frames))


def constant_flow(x: float, y: float, like: Tensor) -> Tensor:
    return torch.tensor([x, y])[None, :, None, None].expand(len(like), 2, *like.shape[-2:])


def test_exact_warp_of_an_integer_flow_shifts_and_blanks_what_comes_from_outside():
    x = torch.rand(2, 5, 12, 20) + 1
    expected = torch.zeros_like(x)
    expected[..., :-2, :-3] = x[..., 2:, 3:]
    torch.testing.assert_close(warp_back(x, constant_flow(3, 2, x), "exact"), expected, rtol=0, atol=1e-5)


def test_flolpips_warp_goes_too_far_by_the_ratio_of_width_and_width_less_one():
    ramp = torch.arange(20.0).expand(1, 1, 12, 20)
    flow = constant_flow(3, 0, ramp)
    moved = warp_back(ramp, flow, "flolpips") - ramp
    torch.testing.assert_close(moved[..., :16], torch.full((1, 1, 12, 16), 3 * 20 / 19), rtol=0, atol=1e-5)
    torch.testing.assert_close(moved[..., :16], warp_back(ramp, flow * 20 / 19, "exact")[..., :16] - ramp[..., :16])


def test_warps_give_different_flows(file, network):
    frames = moving(2, 64, 64)
    difference = network(frames) - PWCNet("exact").load(file)(frames)
    assert difference.abs().mean() > 1e-3


def test_an_unknown_warp_is_refused():
    with pytest.raises(ValueError, match="warp is 'bilinear'; use one of flolpips, exact"):
        PWCNet("bilinear")


def raft_file(net: str, folder: Path) -> Path:
    from torchvision.models import optical_flow

    torch.manual_seed(0)
    torch.save(getattr(optical_flow, net)(weights=None).state_dict(), folder / f"{net}.pth")
    return folder / f"{net}.pth"


@pytest.fixture(scope="module")
def raft(tmp_path_factory) -> Raft:
    return Raft("raft_small").load(raft_file("raft_small", tmp_path_factory.mktemp("raft")))


def test_raft_equals_torchvision_on_a_size_that_fits(raft):
    frames = moving(3, 128, 136)
    theirs = raft.network(frames[:-1] * 2 - 1, frames[1:] * 2 - 1)[-1]
    assert torch.equal(raft(frames), theirs)


@pytest.mark.parametrize(
    ("size", "padded", "corner"), [((45, 60), (128, 128), (41, 34)), ((129, 131), (136, 136), (3, 2))]
)
def test_raft_repeats_the_border_of_small_and_odd_frames(raft, size, padded, corner):
    (h, w), (top, left) = size, corner
    frames = moving(2, *size)
    rows = (torch.arange(padded[0]) - top).clamp(0, h - 1)
    columns = (torch.arange(padded[1]) - left).clamp(0, w - 1)
    whole = raft(frames[..., rows, :][..., columns])
    assert torch.equal(raft(frames), whole[..., top : top + h, left : left + w])


def test_raft_stays_in_fp32_under_autocast(raft):
    frames = moving(2, 128, 128)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = raft(frames)
    assert torch.equal(mixed, raft(frames))


@pytest.mark.parametrize(("net", "count"), [("raft_large", 5_257_536), ("raft_small", 990_162)])
def test_raft_is_loaded_whole_and_frozen(tmp_path, net, count):
    network = Raft(net).load(raft_file(net, tmp_path))
    assert sum(p.numel() for p in network.parameters()) == count
    assert not any(t.is_meta for t in (*network.parameters(), *network.buffers()))
    assert not any(p.requires_grad for p in network.parameters())
    assert not any(m.training for m in network.modules())


def test_weights_of_another_raft_are_refused(tmp_path):
    with pytest.raises(WeightsMissing, match=r"raft_small\.pth"):
        Raft("raft_large").load(raft_file("raft_small", tmp_path))


def test_an_unknown_raft_is_refused():
    with pytest.raises(ValueError, match="net is 'large'; use one of raft_large, raft_small"):
        Raft("large")

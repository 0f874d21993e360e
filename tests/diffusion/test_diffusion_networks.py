from __future__ import annotations

import json

import pytest
import torch

from tests.diffusion import toy
from vae3d.diffusion import unet
from vae3d.diffusion.build import build_network, network_config
from vae3d.diffusion.transformer import Attention, apply_rope, pos_embed, rope_angles

NAMES = list(toy.TINY)


def inputs(shape, batch=2):
    z = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
    return z, torch.linspace(1, 900, batch)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize("learned", [False, True])
def test_output_is_zero_at_the_start(name, channels, learned):
    shape = (channels, *toy.shape_of(name)[1:])
    network = build_network(toy.TINY[name] | {"learned_sigma": learned, "num_classes": 3}, shape)
    z, time = inputs(shape)
    output = network(z, time, torch.tensor([0, 2]))
    assert output.shape == (2, channels * (2 if learned else 1), *shape[1:])
    assert torch.equal(output, torch.zeros_like(output))


def test_every_residual_of_the_unet_is_zero_at_the_start():
    """Without that only the output would be: diffusers leaves the blocks at random."""
    network = build_network(toy.TINY["unet"] | {"resblock_updown": True}, toy.IMAGE)
    zeros = {name for name, p in network.named_parameters() if not p.any()}
    last = [name for name, _ in network.named_parameters() if ".conv2." in name or ".to_out.0." in name]
    blocks, attentions = (2 + 1) + 2 + (4 + 1), 2 + 1 + 4  # of the way down, the middle, the way up
    assert len(last) == 2 * (blocks + attentions)
    assert zeros >= {*last, "unet.conv_out.weight", "unet.conv_out.bias"}


@pytest.mark.parametrize("name", ["transformer", "factorised", "wan"])
def test_every_block_of_a_transformer_passes_its_input_on_at_the_start(name):
    network = build_network(toy.TINY[name], toy.CLIP)
    seen = []
    blocks = network.wan.blocks if name == "wan" else network.blocks
    for block in blocks:
        block.register_forward_hook(lambda _, given, output: seen.append(torch.equal(given[0], output)))
    network(*inputs(toy.CLIP))
    assert seen == [True] * len(blocks)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("t", "h", "w"), [(1, 4, 4), (2, 5, 7), (4, 3, 9)])
def test_any_size_goes_in(name, t, h, w):
    network = toy.shaken(build_network(toy.TINY[name], toy.shape_of(name)))
    t = 1 if name == "unet" else t
    z, time = inputs((4, t, h, w))
    assert network(z, time).shape == z.shape


@pytest.mark.parametrize("name", NAMES)
def test_no_label_is_the_null_class(name):
    shape = toy.shape_of(name)
    network = toy.shaken(build_network(toy.TINY[name] | {"num_classes": 3}, shape)).eval()
    z, time = inputs(shape)
    without = network(z, time)
    assert torch.equal(without, network(z, time, torch.tensor([3, 3])))
    assert (without - network(z, time, torch.tensor([3, 1]))).abs().amax((1, 2, 3, 4)).gt(1e-5).tolist() == [
        False,
        True,
    ]
    with pytest.raises(ValueError, match="one for each of the 2"):
        network(z, time, torch.tensor([1]))
    plain = build_network(toy.TINY[name], shape)
    with pytest.raises(ValueError, match="without classes"):
        plain(z, time, torch.tensor([0, 0]))


@pytest.mark.parametrize("name", NAMES)
def test_time_matters_and_samples_do_not_see_each_other(name):
    shape = toy.shape_of(name)
    network = toy.shaken(build_network(toy.TINY[name], shape)).eval()
    z, time = inputs(shape)
    both = network(z, time)
    torch.testing.assert_close(both[1:], network(z[1:], time[1:]), rtol=1e-4, atol=1e-5)
    assert (both[:1] - network(z[:1], time[:1] + 300)).abs().max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_changes_no_gradient(name):
    shape, gradients = toy.shape_of(name), []
    for recompute in (False, True):
        torch.manual_seed(0)
        network = toy.shaken(build_network(toy.TINY[name] | {"gradient_checkpointing": recompute}, shape))
        network(*inputs(shape)).square().mean().backward()
        gradients.append([p.grad for p in network.parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_network_that_is_zero_at_the_start_learns(name):
    torch.manual_seed(0)
    shape = toy.shape_of(name)
    network = build_network(toy.TINY[name], shape)
    (z, time), target = inputs(shape), inputs(shape, 2)[0].flip(0)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(40):
        loss = (network(z, time) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.7 * target.square().mean()


@pytest.mark.parametrize(
    ("size", "multipliers", "attended"),
    [((4, 4), [1], [True]), ((8, 8), [1, 2], [True] * 2), ((16, 24), [1, 2, 2], [True] * 3),
     ((32, 32), [1, 2, 2, 2], [False, True, True, True]), ((64, 64), [1, 2, 3, 4], [False, False, True, True])],
)  # fmt: skip
def test_unet_is_chosen_from_the_size_of_the_latents(size, multipliers, attended):
    config = network_config({"_target_": "vae3d.diffusion.unet.LatentUNet"}, (4, 1, *size))
    assert (config["multipliers"], config["attention"]) == (multipliers, attended)


def test_what_is_given_is_not_chosen():
    config = network_config(
        {"_target_": "vae3d.diffusion.unet.LatentUNet", "multipliers": [1, 1], "attention": [False, False]},
        (4, 1, 64, 64),
    )
    assert (config["multipliers"], config["attention"]) == ([1, 1], [False, False])
    network = build_network(toy.TINY["unet"] | {"multipliers": [1, 2], "attention": [False, True]}, toy.IMAGE)
    kinds = [type(block).__name__ for block in network.unet.down_blocks]
    assert kinds == ["DownBlock2D", "AttnDownBlock2D"]


@pytest.mark.parametrize(("side", "patch"), [(8, 1), (15, 1), (16, 2), (32, 2)])
def test_patch_is_chosen_from_the_size_of_the_latents(side, patch):
    assert (
        network_config({"_target_": "vae3d.diffusion.transformer.VideoTransformer"}, (4, 3, side, 40))["patch"] == patch
    )
    assert (
        network_config({"_target_": "vae3d.diffusion.transformer.VideoTransformer", "patch": 4}, (4, 3, side, 40))[
            "patch"
        ]
        == 4
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [({"_target_": "vae3d.diffusion.unet.LatentUNet", "width": 48}, "head_channels is 64, which does not divide the 48"),
     ({"_target_": "vae3d.diffusion.unet.LatentUNet", "multipliers": [1, 2], "attention": [True]}, "attention has 1 entries for 2"),
     ({"_target_": "vae3d.diffusion.unet.LatentUNet", "attention": []}, "attention has 0 entries for 2"),
     ({"_target_": "vae3d.diffusion.transformer.VideoTransformer", "attention": "sparse"}, "use one of full, factorised"),
     ({"_target_": "vae3d.diffusion.transformer.VideoTransformer", "attention": "factorised", "depth": 3}, "depth is 3"),
     ({"_target_": "vae3d.diffusion.transformer.VideoTransformer", "width": 40, "heads": 8}, "at least 6"),
     ({"_target_": "vae3d.diffusion.wan.WanTransformer", "width": 40, "heads": 3}, "width is 40 for 3 heads")],
)  # fmt: skip
def test_settings_that_do_not_fit_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        build_network(config, (4, 1, 8, 8))


def test_unet_refuses_videos():
    network = build_network(toy.TINY["unet"], toy.IMAGE)
    with pytest.raises(ValueError, match="3 frames; the UNet takes one, denoiser=video_transformer"):
        network(*inputs(toy.CLIP))


def test_widths_of_the_unet_follow_guided_diffusion():
    """script_util.create_model, from 64 pixels on."""
    assert {size: unet.MULTIPLIERS[size] for size in (64, 128, 256, 512)} == {
        64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4), 512: (0.5, 1, 1, 2, 2, 4, 4)}  # fmt: skip
    config = network_config(toy.TINY["unet"], (4, 1, 512, 512))
    assert json.loads(json.dumps(config)) == config


def test_rotary_positions_are_relative():
    """q.k of two tokens depends on how far they are from each other on each axis alone."""
    angles = rope_angles(4, 5, 6, 24).view(4, 5, 6, 12)
    assert angles[1, 0, 0].gt(0).sum() == angles[0, 1, 0].gt(0).sum() == angles[0, 0, 1].gt(0).sum() == 4
    assert angles[2, 3, 4, [0, 4, 8]].tolist() == [2, 3, 4]  # the fastest of each axis: one radian per step
    q, k = torch.randn(2, 24, generator=torch.Generator().manual_seed(0))

    def score(a, b):
        turned = [apply_rope(x.view(1, 1, 1, 1, 24), angles[p].view(1, 1, 12)) for x, p in ((q, a), (k, b))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score((0, 1, 2), (1, 3, 0)), score((2, 2, 5), (3, 4, 3)))
    assert (score((0, 1, 2), (1, 3, 0)) - score((0, 1, 2), (1, 3, 1))).abs() > 1e-3
    torch.testing.assert_close(score((1, 1, 1), (1, 1, 1)), q @ k)


@pytest.mark.parametrize(("among", "reached"), [("full", 12), ("space", 4), ("time", 3)])
def test_tokens_attend_where_they_should(among, reached):
    torch.manual_seed(0)
    attention = Attention(24, 2, among)
    x = torch.randn(1, 3, 4, 24)
    angles = rope_angles(3, 2, 2, 12)
    other = x.clone()
    other[0, 1, 2] += 1
    changed = (attention(x, angles) - attention(other, angles)).abs().amax(-1)[0].gt(1e-6)
    assert changed.sum() == reached
    rows = {"full": changed, "space": changed[1], "time": changed[:, 2]}[among]
    assert rows.all()


def test_attention_equals_its_formula():
    torch.manual_seed(0)
    attention, x, angles = Attention(12, 1, "full"), torch.randn(1, 2, 3, 12), rope_angles(2, 1, 3, 12)
    q, k, v = attention.qkv(x).chunk(3, -1)
    q, k = (
        apply_rope((y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt())[..., None, :], angles)[..., 0, :]
        for y in (q, k)
    )
    q, k, v = (y.reshape(6, 12) for y in (q, k, v))
    expected = attention.out(torch.softmax(q @ k.T / 12**0.5, -1) @ v).view(1, 2, 3, 12)
    torch.testing.assert_close(attention(x, angles), expected)


def test_large_keys_are_harmless():
    """Normalised queries and keys: without, the logits of bf16 training run away."""
    torch.manual_seed(0)
    attention, x, angles = Attention(12, 1, "full"), torch.randn(1, 2, 3, 12), rope_angles(2, 1, 3, 12)
    before = attention(x, angles)
    with torch.no_grad():
        attention.qkv.weight[:24] *= 100
        attention.qkv.bias[:24] *= 100
    torch.testing.assert_close(attention(x, angles), before, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # Wan's
def test_networks_run_in_bf16():
    for name in NAMES:
        shape = toy.shape_of(name)
        network = toy.shaken(build_network(toy.TINY[name] | {"num_classes": 2}, shape)).eval()
        z, time = inputs(shape)
        exact = network(z, time, torch.tensor([0, 1]))
        with torch.autocast("cpu", torch.bfloat16):
            rough = network(z, time, torch.tensor([0, 1])).float()
        assert (rough - exact).abs().mean() < 0.1 * exact.abs().mean(), name


def test_what_blocks_pass_on_is_in_fp32_under_autocast():
    """In bf16 each block would round away what it adds, twice as much at 12 blocks as the network does otherwise."""
    network, kept = build_network(toy.TINY["transformer"], toy.CLIP), []
    for block in network.blocks:
        block.register_forward_hook(lambda _, __, out: kept.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        network(*inputs(toy.CLIP))
    assert kept == [torch.float32] * 2


def test_parameters_are_all_used():
    for name in NAMES:
        shape = toy.shape_of(name)
        network = toy.shaken(build_network(toy.TINY[name] | {"num_classes": 2, "learned_sigma": True}, shape))
        network(*inputs(shape), torch.tensor([0, 1])).square().sum().backward()
        assert [n for n, p in network.named_parameters() if p.grad is None] == [], name


# ---- several sizes, one after another


SIZES = [(3, 6, 8), (1, 8, 6), (5, 3, 9)]


@pytest.mark.parametrize("name", NAMES)
def test_the_sizes_before_do_not_change_the_output(name):
    network = toy.shaken(build_network(toy.TINY[name], toy.shape_of(name))).eval()
    sizes = [(1, *size[1:]) for size in SIZES] if name == "unet" else SIZES
    for size in (*sizes, *reversed(sizes)):
        given = inputs((4, *size))
        alone = toy.shaken(build_network(toy.TINY[name], toy.shape_of(name))).eval()
        alone.load_state_dict(network.state_dict())
        assert torch.equal(network(*given), alone(*given))


@pytest.mark.parametrize("name", NAMES)
def test_a_size_that_patches_do_not_fill_is_padded_with_its_edge(name):
    settings = {"multipliers": [1, 2], "attention": [False, True]} if name == "unet" else {"patch": 2}
    network = toy.shaken(build_network(toy.TINY[name] | settings, toy.shape_of(name))).eval()
    for h, w in [(5, 8), (6, 7), (3, 3)]:
        z, time = inputs((4, 1, h, w))
        padded = torch.cat([z, *[z[..., -1:, :]] * (h % 2)], -2)
        padded = torch.cat([padded, *[padded[..., -1:]] * (w % 2)], -1)
        torch.testing.assert_close(network(z, time), network(padded, time)[..., :h, :w], rtol=0, atol=1e-6)


def test_positions_of_a_token_do_not_depend_on_the_size():
    """Rows, columns and frames count from the first corner, and are told apart."""
    wan = build_network(toy.TINY["wan"], toy.CLIP).wan
    found = {}
    for t, h, w in [(3, 6, 8), (2, 8, 5)]:
        angles = rope_angles(t, h, w, 12).unflatten(1, (h, w))
        cos, sin = (part.view(t, h, w, -1) for part in wan.rope(torch.zeros(1, 4, t, h, w)))
        found[t, h, w] = [part[:2, :6, :5] for part in (angles, cos, sin, pos_embed(t, h, w, 24).unflatten(1, (h, w)))]
    for ours, theirs in zip(*found.values(), strict=True):
        assert torch.equal(ours, theirs)
        tokens = ours.reshape(2 * 6 * 5, -1)
        assert len(tokens.unique(dim=0)) == len(tokens)

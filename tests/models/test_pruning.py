"""Structured pruning: which channels belong together, what is removed without any change, and what a pruned model keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from tests.models import wan
from tests.models.diffusers_tiny import CONFIGS
from vae3d.models.diffusers_vae import DiffusersVAE
from vae3d.models.interface import VideoAutoencoder
from vae3d.models.taehv import TAEHV
from vae3d.models.taesd import TAESD
from vae3d.pruning.choose import IMPORTANCE, merge_groups, numbers_to_keep
from vae3d.pruning.layers import PruningError, sizes_of
from vae3d.pruning.match import match_layers
from vae3d.pruning.prune import prune
from vae3d.pruning.trace import Channels, channel_classes
from vae3d.types import Delta


def integers(model: nn.Module, seed: int = 0) -> nn.Module:
    """Decoder weights of few ones: sums are exact in fp64, in any order, and no channel is dead."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.decoder.parameters():
            p.copy_(torch.rand(p.shape, generator=generator) < 4 / p[0].numel())
    return model.double().eval()


def taesd(**shape) -> TAESD:
    return integers(TAESD(variant="taesd", **{"decoder_blocks": (1, 1, 1, 1), **shape}))


def taehv(variant: str = "taew2_1", **shape) -> TAEHV:
    return integers(TAEHV(variant=variant, channels=4, **{"decoder_blocks": (1, 1, 1), **shape}))


def latents(channels: int, frames: int = 2, side: int = 3) -> Tensor:
    """The clamp in front of the decoders makes exactly -3, 0 and 3 of them."""
    generator = torch.Generator().manual_seed(side)
    return 1000.0 * torch.randint(-1, 2, (1, channels, frames, side, side), generator=generator).double()


def clips(frames: int = 1, side: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(2, 3, frames, side, side, generator=generator).double() * 2 - 1


def classes_of(model: VideoAutoencoder, part: str = "decoder.") -> list[list[Channels]]:
    pairs, _ = match_layers(model, model, lambda runs: [names for names, _ in runs])
    return channel_classes(model, {name: model.get_submodule(name) for name in pairs if name.startswith(part)})


def remove(model: VideoAutoencoder, keep: dict[int, int]) -> None:
    """Make all but `keep[size]` channels of each class of `size` channels zero and twins of others, in turn."""
    groups = classes_of(model)
    remove_all_but(model, groups, [keep.get(len(group), len(group)) for group in groups])


def remove_what_is_pruned(source: VideoAutoencoder, student: VideoAutoencoder, part: str = "decoder.") -> None:
    """Of each class make as many channels as the student has fewer zero, and twins of others, in turn."""
    pairs, _ = match_layers(source, student, lambda runs: [names[:count] for names, count in runs])
    pairs = {mine: theirs for mine, theirs in pairs.items() if theirs.startswith(part)}
    layers = {theirs: source.get_submodule(theirs) for theirs in pairs.values()}
    smaller = {theirs: student.get_submodule(mine) for mine, theirs in pairs.items()}
    groups = [merge_groups(group, layers, smaller) for group in channel_classes(source, layers)]
    wanted, sizes = (
        {(name, side): size for name, layer in found.items()
         for side, size in zip(("in", "out"), sizes_of(name, layer), strict=True)}
        for found in (smaller, layers)
    )  # fmt: skip
    remove_all_but(source, groups, numbers_to_keep(groups, wanted, sizes))


def remove_all_but(model: VideoAutoencoder, groups: list[list[Channels]], keep: list[int]) -> None:
    """At random places."""
    generator = torch.Generator().manual_seed(3)
    for group, count in zip(groups, keep, strict=True):
        order = torch.randperm(len(group), generator=generator).tolist()
        for number, index in enumerate(order[count:]):
            twin = group[order[number % count]]
            for (name, side), places in group[index].nodes.items():
                if side == "out":
                    for tensor in model.get_submodule(name)._parameters.values():
                        if tensor is not None:
                            tensor.data[places] = tensor.data[twin.nodes[name, side]] if number % 2 == 0 else 0


# name: the wide model, the shape of the small one, {channels of a class: channels kept}, latent channels, frames
NETWORKS = {
    "taesd": (lambda **shape: taesd(**{"decoder_channels": (9, 8, 7, 6), **shape}),
              {"decoder_channels": (5, 8, 4, 2)}, {9: 5, 7: 4, 6: 2}, 4, 2),
    "taesd inside blocks": (lambda **shape: taesd(**{"decoder_channels": (4, 4, 4, 4), "decoder_hidden": (9, 8, 7, 6), **shape}),
                            {"decoder_hidden": (5, 8, 4, 2)}, {9: 5, 7: 4, 6: 2}, 4, 2),
    "taehv": (lambda **shape: taehv(**{"decoder_channels": (9, 8, 7, 6), **shape}),
              {"decoder_channels": (5, 8, 4, 2)}, {9: 5, 7: 4, 6: 2}, 16, 5),
    "super": (lambda **shape: taehv("taew2_2_super", **{"decoder_channels": (9, 8, 7, 6), "decoder_hidden": (12, 12, 12), **shape}),
              {"decoder_channels": (5, 8, 4, 2), "decoder_hidden": (10, 10, 10)}, {9: 5, 7: 4, 6: 2, 12: 10}, 48, 5),
}  # fmt: skip


@pytest.mark.parametrize(
    ("importance", "refit"), [("activation", True), ("redundancy", False), ("weight", True)], ids=str
)
@pytest.mark.parametrize("network", NETWORKS)
def test_zeroed_and_doubled_channels_are_removed_without_any_change(network, importance, refit):
    build, small, keep, channels, frames = NETWORKS[network]
    source, student = build(), build(**small)
    remove(source, keep)
    calibration = Delta(latents(channels, source.latent_frames(frames), side=6))
    source.encode = student.encode = lambda video: calibration
    prune(source, student, clips(frames, source.spec.space_stride * 6)[:1], importance=importance, refit=refit)
    z = latents(channels, source.latent_frames(frames))
    with torch.no_grad():
        expected = source.decode(z, frames)
        assert expected.std() > 0
        assert torch.equal(student.decode(z, frames), expected)


# changes of the tiny model, widths of the small decoder
WAN = {
    "wan": ({"channels": 4, "multipliers": (1, 2, 2), "downsample": (False, True)}, (6, 4, 2)),
    "wan22": ({"channels": 2, "decoder_channels": 4, "multipliers": (1, 2, 2), "downsample": (False, True)}, (6, 6, 3)),
}


@pytest.mark.parametrize("style", WAN)
def test_zeroed_and_doubled_channels_of_a_wan_decoder_are_removed_but_for_rounding(style):
    changes, widths = WAN[style]
    source = wan.model(style, torch.float64, **changes)
    student = wan.model(style, torch.float64, seed=1, decoder_widths=widths, **changes)
    remove_what_is_pruned(source, student)
    prune(source, student, wan.clip(source, 5).double())
    z = torch.randn(1, source.spec.channels, 3, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        expected = source.decode(z)
        assert expected.std() > 0.01
        torch.testing.assert_close(student.decode(z), expected, rtol=0, atol=1e-11)


def test_a_block_that_changes_nothing_is_the_one_that_is_dropped():
    source = taesd(decoder_channels=(4, 4, 4, 4), decoder_blocks=(1, 3, 1, 1))
    with torch.no_grad():
        for p in source.decoder[7].conv[4].parameters():  # the second of three blocks
            p.zero_()
    student = taesd(decoder_channels=(4, 4, 4, 4), decoder_blocks=(1, 2, 1, 1))
    lines = prune(source, student, clips())
    assert "dropped decoder.7" in lines
    z = latents(4)
    with torch.no_grad():
        assert torch.equal(student.decode(z, 2), source.decode(z, 2))


def test_a_pruned_decoder_starts_nearer_to_the_larger_one_than_a_random_one_and_a_refit_brings_it_nearer():
    torch.manual_seed(0)
    shape = {"decoder_channels": (16, 16, 8, 8), "decoder_blocks": (1, 1, 1, 1)}
    source = TAESD(variant="taef2", **shape).eval()
    small = {**shape, "decoder_channels": (12, 12, 6, 6)}
    video = clips(side=64).float()
    errors = {}
    for name, options in {"random": None, "kept": {"refit": False}, "refit": {"refit": True}}.items():
        torch.manual_seed(1)
        student = TAESD(variant="taef2", **small).eval()
        if options is not None:
            prune(source, student, video, importance="activation", **options)
            assert student.decoder[3].pool[1].num_channels == 48  # as many channels of each of its four groups
        with torch.no_grad():
            z = source.encode(video).mean
            errors[name] = (student.decode(z) - source.decode(z)).square().mean().item()
    assert errors["refit"] < errors["kept"]
    assert errors["refit"] < 0.5 * errors["random"]


@pytest.mark.parametrize("importance", IMPORTANCE)
def test_every_importance_leaves_the_models_as_they_were(importance):
    source, student = taesd(decoder_channels=(6, 4, 4, 4)), taesd(decoder_channels=(4, 4, 4, 3))
    student.train()
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    prune(source, student, clips(), importance=importance)
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())
    assert student.training
    assert all(p.requires_grad for model in (source, student) for p in model.parameters())
    assert (source.frame_batch, student.frame_batch) == (4, 4)


def test_an_encoder_is_pruned_as_well():
    source, student = taehv(decoder_channels=(4, 4, 4, 4)), TAEHV(
        variant="taew2_1", channels=3, decoder_channels=(4, 4, 4, 4), decoder_blocks=(1, 1, 1)
    ).double()  # fmt: skip
    lines = prune(source, student, clips(5))
    assert any(line.startswith("encoder") and "3 of 4" in line for line in lines)
    with torch.no_grad():
        assert student(clips(5)).video.isfinite().all()


def test_the_channels_of_an_sd_vae_belong_together_across_its_residual_streams():
    model = tiny.model("spatial").double()
    for group in classes_of(model):
        kinds = {(name, side) for name, side in group[0].nodes}
        assert len({len(channels.nodes) for channels in group}) == 1
        assert kinds == set(group[-1].nodes)


@pytest.mark.parametrize(
    ("source", "student", "reason"),
    [
        (lambda: taesd(), lambda: TAESD(variant="taesd3").double(), "share their latents"),
        (lambda: taesd(), lambda: taesd(decoder_blocks=(1, 2, 1, 1)), "in a row"),
        (lambda: taesd(), lambda: taesd(decoder_channels=(64, 64, 64, 65)), "more channels"),
        (lambda: wan.model(), lambda: wan.model(decoder_blocks=(3, 4, 3, 3)), "in a row"),
        (lambda: wan.model(), lambda: wan.model(multipliers=(1, 2, 2, 2)), "in the larger model"),
        (lambda: taesd(), lambda: taehv(), "share their latents"),
    ],
)
def test_what_is_no_smaller_version_is_refused(source, student, reason):
    with pytest.raises(PruningError, match=reason):
        prune(source(), student(), clips(5))


KL = {
    "down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [4, 8], "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4,
}  # fmt: skip
TINY = {
    "encoder_block_out_channels": [4] * 3, "decoder_block_out_channels": [6, 6, 6], "num_encoder_blocks": [1] * 3,
    "num_decoder_blocks": [1, 2, 1],
}  # fmt: skip
# class of diffusers: its configuration, and what a smaller one changes
ADAPTED = {
    "AutoencoderKL": (KL, {"block_out_channels": [2, 4], "norm_num_groups": 2}),
    "AutoencoderTiny": (TINY, {"decoder_block_out_channels": [4, 4, 4]}),
}


@pytest.mark.parametrize("kind", ADAPTED)
def test_zeroed_and_doubled_channels_or_groups_of_diffusers_classes_are_removed_but_for_rounding(kind):
    config, smaller = ADAPTED[kind]
    torch.manual_seed(0)
    source, student = (DiffusersVAE(kind, {**config, **change}).double().eval() for change in ({}, smaller))
    remove_what_is_pruned(source, student, "vae.")
    video = clips(2)
    prune(source, student, video)
    with torch.no_grad():
        expected = source(video, sample=False)
        found = student(video, sample=False)
    assert expected.video.std() > 1e-3
    torch.testing.assert_close(found.z, expected.z, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.video, expected.video, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "config", "smaller", "reason"),
    [
        ("AutoencoderKL", KL, {"block_out_channels": [2, 4], "norm_num_groups": 1}, "give 4 groups, or groups of"),
        ("AutoencoderKLLTXVideo", None, {"decoder_block_out_channels": [4] * 4}, "depend on each other"),
    ],
)
def test_diffusers_classes_that_cannot_be_narrower_say_where(kind, config, smaller, reason):
    config = config or CONFIGS[kind]
    source, student = (DiffusersVAE(kind, {**config, **change}) for change in ({}, smaller))
    with pytest.raises(PruningError, match=rf"vae\..*{reason}"):
        prune(source, student, clips(9).float())


def test_blocks_of_a_wan_decoder_are_dropped():
    source = wan.model(multipliers=(1, 2), downsample=(True,), channels=2)
    student = wan.model(multipliers=(1, 2), downsample=(True,), channels=2, decoder_blocks=(2, 1))
    with torch.no_grad():
        for block in (1, 5, 6):  # of two levels of three blocks, with an upsampling between them
            for p in source.decoder.upsamples[block].residual["6"].parameters():
                p.zero_()
    lines = prune(source, student, wan.clip(source, 3))
    assert "dropped decoder.upsamples.1, decoder.upsamples.5, decoder.upsamples.6" in lines
    with torch.no_grad():
        z = source.encode(wan.clip(source, 5)).mean
        assert torch.equal(student.decode(z), source.decode(z))

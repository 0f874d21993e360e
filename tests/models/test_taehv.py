"""TAEHV: published keys, chunks and streams, frame rules, and a naive frame-by-frame reference."""

from __future__ import annotations

import json
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vae3d.models.interface import VideoAutoencoder
from vae3d.models.layers.taehv_frames import RULES, count_frames, longest_clip, split_runs
from vae3d.models.opensora import OpenSoraVAE
from vae3d.models.taehv import TAEHV, VARIANTS

KEYS = json.loads((Path(__file__).parent / "taehv_keys.json").read_text())
TOY = {"channels": 4, "decoder_channels": (8, 6, 4, 4)}
RULE_OF = {"trimmed": "taew2_1", "cogvideox": "taecvx", "h3": "taeh3", "opensora": "taeos1_2"}


def toy(variant: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object) -> TAEHV:
    """Small, with weights that keep activations near 1, so that every layer matters."""
    model = TAEHV(variant=variant, **{**TOY, **changes})
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.copy_(0.2 * torch.randn(p.shape, generator=rng))
            else:
                p.copy_(torch.randn(p.shape, generator=rng) * (1.6 / p[0].numel()) ** 0.5)
    return model.to(dtype).eval()


def clip(model: TAEHV, frames: int, *, batch: int = 1, beyond: int = 0, sides: tuple[int, int] = (1, 2)) -> Tensor:
    """[batch, 3, frames, H, W] in [-1, 1]; sides in latents, plus `beyond` pixels."""
    size = [side * model.spec.space_stride + beyond for side in sides]
    rng = torch.Generator().manual_seed(frames)
    return torch.rand(batch, 3, frames, *size, generator=rng, dtype=model.encoder[0].weight.dtype) * 2 - 1


def streamed(model: TAEHV, video: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Video and latents, chunk by chunk."""
    stream = model.stream(*video.shape[-2:])
    done, frames, latents, lengths = 0, [], [], stream.chunks(video.shape[2])
    for length in lengths:
        out = stream(video[:, :, done : done + length + stream.lookahead])
        assert out.video.shape[2] == length
        frames.append(out.video)
        latents.append(out.z)
        done += length
    return torch.cat(frames, 2), torch.cat(latents, 2), lengths


def all_shapes() -> dict[str, tuple[dict[str, str], dict[str, int]]]:
    found, base = {}, KEYS[0]["shapes"]
    for group in KEYS:
        shapes = {key: shape for key, shape in base.items() if key not in group.get("removed", [])}
        for variant in group["variants"]:
            found[variant] = (shapes | group.get("changed", {}), group["parameters"])
    return found


@pytest.mark.parametrize("variant", all_shapes())
def test_keys_shapes_and_counts_are_the_published(variant):
    shapes, parameters = all_shapes()[variant]
    with torch.device("meta"):
        model = TAEHV(variant=variant)
    assert {key: "x".join(map(str, tensor.shape)) for key, tensor in model.state_dict().items()} == shapes
    for part, modules in model.trainable_parts().items():
        assert sum(p.numel() for module in modules for p in module.parameters()) == parameters[part]


def test_only_our_own_variant_is_not_published():
    assert set(VARIANTS) - set(all_shapes()) == {"taeos1_2"}
    assert isinstance(toy("taeos1_2"), VideoAutoencoder)


# A reference that shares nothing with the product but the weights: one frame at a time, NCHW in [0, 1].


def naive(layers: torch.nn.Sequential, frames: list[Tensor]) -> list[Tensor]:
    """Every layer over a list of frames [1, C, H, W]; the kind of a block follows from its weights' names."""
    for layer in layers:
        weights = dict(layer.named_parameters())
        name = type(layer).__name__
        if name == "MemBlock":
            before = [torch.zeros_like(frames[0]), *frames[:-1]]
            frames = [naive_block(weights, x, past) for x, past in zip(frames, before, strict=True)]
        elif name == "TPool":
            step = layer.stride
            groups = [torch.cat(frames[i : i + step], 1) for i in range(0, len(frames), step)]
            frames = [F.conv2d(group, weights["conv.weight"]) for group in groups]
        elif name == "TGrow":
            frames = [part for x in frames for part in F.conv2d(x, weights["conv.weight"]).chunk(layer.stride, 1)]
        elif name == "UpConv":
            wide = [x.repeat_interleave(2, 2).repeat_interleave(2, 3) for x in frames]
            frames = [F.conv2d(x, weights["weight"], padding=1) for x in wide]
        elif name == "Clamp":
            frames = [3 * torch.tanh(x / 3) for x in frames]
        else:
            frames = [layer(x.clone()) for x in frames]
    return frames


def naive_block(weights: dict[str, Tensor], x: Tensor, past: Tensor) -> Tensor:
    h = torch.cat([x, past], 1)
    if "conv.6.weight" in weights:  # of the wide decoder
        for place in (0, 2, 4, 6):
            weight = weights[f"conv.{place}.weight"]
            groups = h.shape[1] // weight.shape[1]
            h = F.conv2d(h, weight, weights[f"conv.{place}.bias"], padding=weight.shape[-1] // 2, groups=groups)
            h = h.relu() if place < 6 else h
        return (h + x).relu()
    if "conv.4.weight" in weights:  # of the base decoder, not of the super decoder
        for place in (0, 2, 4):
            h = F.conv2d(h, weights[f"conv.{place}.weight"], weights[f"conv.{place}.bias"], padding=1)
            h = h.relu() if place < 4 else h
        return (h + x).relu()
    h = F.conv2d(h, weights["conv.0.weight"], padding=3, groups=h.shape[1])
    return F.conv2d(F.conv2d(h, weights["conv.1.weight"], weights["conv.1.bias"]).relu(), weights["conv.3.weight"]) + x


def naive_encode(model: TAEHV, video: Tensor) -> Tensor:
    """As published: trimmed and cogvideox pad at the end; chunks of 17 have three black frames in front."""
    frames, stride = [x / 2 + 0.5 for x in video.unbind(2)], model.spec.time_stride
    if VARIANTS[model.variant].rule in ("trimmed", "cogvideox"):
        groups = [frames + frames[-1:] * (-len(frames) % stride)]
        drop = 0
    else:
        drop = 3 if model.variant == "taeh3" else 0
        if drop:
            frames += frames[-1:] * (-len(frames) % 17)
        groups = [frames[i : i + 17] for i in range(0, len(frames), 17)]
        groups = [[torch.zeros_like(frames[0])] * (-len(group) % 4) + group for group in groups]
    coded = [z for group in groups for z in naive(model.encoder, [F.pixel_unshuffle(x, model.patch) for x in group])]
    return torch.stack(coded[: len(coded) - drop], 2)


def naive_decode(model: TAEHV, z: Tensor, frames: int) -> Tensor:
    raw = [2 * F.pixel_shuffle(x, model.patch) - 1 for x in naive(model.decoder, list(z.unbind(2)))]
    rule, stride = VARIANTS[model.variant].rule, model.spec.time_stride
    if rule == "trimmed" or (rule == "cogvideox" and z.shape[2] % 2):
        raw = raw[stride - 1 :]
    elif rule in ("h3", "opensora"):
        kept = []
        for start in range(0, len(raw), 20):
            group = raw[start : start + 20]
            lead = 3 if rule == "h3" else -(frames - len(kept)) % 4 if frames - len(kept) < 17 else 3
            kept += group[lead:]
        raw = kept
    return torch.stack(raw, 2)


LENGTHS = [1, 2, 4, 5, 8, 9, 12, 13, 18, 22]
LAYERS = ["taeltx_2", "taehv1_5_super", "taeltx2_3_wide"]  # other layers, of the first rule


@pytest.mark.smoke
@pytest.mark.parametrize(("variant", "frames"), [*product(RULE_OF.values(), LENGTHS), *product(LAYERS, [1, 8, 18])])
def test_agrees_with_a_reference_written_frame_by_frame(variant, frames):
    model = toy(variant, torch.float64)
    video = clip(model, frames)
    wanted = next(n for n in range(frames, frames + 40) if model.frames_valid(n))
    longer = torch.cat([video, *[video[:, :, -1:]] * (wanted - frames)], 2)
    with torch.no_grad():
        z = model.encode(video).mean
        torch.testing.assert_close(z, naive_encode(model, longer), rtol=0, atol=1e-12)
        torch.testing.assert_close(model.decode(z, wanted), naive_decode(model, z, wanted), rtol=0, atol=1e-11)
        assert torch.equal(model(video).video, model.decode(z, wanted)[:, :, :frames])


@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_sequential_and_streamed_are_equal(variant):
    """Bit for bit, also for sides that are no multiples of the stride."""
    model = toy(variant)
    with torch.inference_mode():
        # Around the ends of groups of frames, of which two rules have one of 17, and the others of 4 or 8.
        counts = (
            [1, 4, 5, 6, 16, 17, 18, 21] if variant in (RULE_OF["h3"], RULE_OF["opensora"]) else [*range(1, 7), 9, 13]
        )
        for frames in counts if variant in RULE_OF.values() else [1, 12]:
            video = clip(model, frames, beyond=-3)
            model.chunk_latents = None
            whole = model(video)
            assert whole.video.shape == video.shape
            assert tuple(whole.z.shape[1:]) == model.latent_shape(*video.shape[2:])
            for chunk in (1, 3):
                model.chunk_latents = chunk
                out = model(video)
                assert torch.equal(out.video, whole.video)
                assert torch.equal(out.z, whole.z)
                rec, z, lengths = streamed(model, video)
                assert torch.equal(rec, whole.video)
                assert torch.equal(z, whole.z)
                assert max(lengths) <= (chunk + 1) * model.spec.time_stride


@pytest.mark.parametrize("rule", RULES)
def test_frames_in_parallel_are_those_one_after_another(rule):
    """With gradients a chunk is coded at once. fp64, since kernels may round differently for other frame counts."""
    model = toy(RULE_OF[rule], torch.float64)
    video = clip(model, 21, batch=2)
    with torch.no_grad():
        expected = model(video)
    for chunk in (None, 2):
        model.chunk_latents = chunk
        for recompute in (False, True):
            model.gradient_checkpointing = recompute
            out = model(video)
            torch.testing.assert_close(out.video, expected.video, rtol=0, atol=1e-12)
            torch.testing.assert_close(out.z, expected.z, rtol=0, atol=1e-12)


def test_recomputing_gives_the_same_gradients():
    found = []
    for changes in ({}, {"gradient_checkpointing": True}, {"gradient_checkpointing": True, "chunk_latents": 1}):
        model = toy("taew2_1", torch.float64, **changes)
        model(clip(model, 9)).video.square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert found[0].norm() > 0
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_clips_of_a_batch_do_not_mix():
    model = toy("taew2_1", torch.float64)
    video = clip(model, 9, batch=3)
    alone = torch.cat([model(one[None]).video for one in video])
    torch.testing.assert_close(model(video).video, alone, rtol=0, atol=1e-12)


# Frame rules


@pytest.mark.parametrize(
    ("variant", "frames", "latents", "valid"),
    [
        *[("taew2_1", t, 1 + -(-(t - 1) // 4), t % 4 == 1) for t in range(1, 22)],
        *[("taeltx_2", t, 1 + -(-(t - 1) // 8), t % 8 == 1) for t in (1, 2, 8, 9, 10, 17)],
        ("taecvx", 1, 1, True), ("taecvx", 2, 2, False), ("taecvx", 8, 2, True), ("taecvx", 9, 3, True),
        ("taecvx", 12, 4, False), ("taecvx", 13, 4, False), ("taecvx", 16, 4, True), ("taecvx", 17, 5, True),
        ("taeh3", 1, 2, False), ("taeh3", 5, 2, True), ("taeh3", 6, 7, False), ("taeh3", 17, 7, False),
        ("taeh3", 22, 7, True), ("taeh3", 39, 12, True),
    ],
)  # fmt: skip
def test_frames_and_latents(variant, frames, latents, valid):
    model = toy(variant)
    assert model.latent_shape(frames, 32, 32)[1] == latents
    assert model.frames_valid(frames) == valid
    if valid:
        with torch.no_grad():
            z = torch.zeros(1, model.spec.channels, latents, 1, 1)
            assert model.decode(z).shape[2] == model.decode(z, frames).shape[2] == frames


def test_latents_of_open_sora_are_as_many_as_its_vae_makes():
    with torch.device("meta"):
        from vae3d import loading

        teacher: OpenSoraVAE = loading.instantiate(loading.model_config("opensora_v1_2"))
    model = toy("taeos1_2")
    for frames in range(1, 60):
        assert model.latent_shape(frames, 40, 50) == teacher.latent_shape(frames, 40, 50)
        assert model.frames_valid(frames)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("stride", [4, 8])
def test_plans_add_up(rule, stride):
    if stride == 8 and rule in ("h3", "opensora"):
        return  # their chunks are of stride 4
    for frames in range(1, 70):
        plan = RULES[rule](frames, stride)
        assert plan.frames >= frames
        assert sum(map(sum, plan.encoder)) == sum(map(sum, plan.decoder)) == stride * plan.latents
        assert all(lead < stride for lead, _ in (*plan.encoder, *plan.decoder))
        assert count_frames(plan.decoder, stride, 0, plan.latents) == plan.frames
        assert RULES[rule](plan.frames, stride) == plan
        assert RULES[rule](longest_clip(RULES[rule], plan.latents, stride), stride).latents == plan.latents
        cuts = [0, 1, plan.latents // 2, plan.latents]
        parts = [part for low, high in pairwise(sorted(cuts)) for part in split_runs(plan.encoder, stride, low, high)]
        assert sum(lead + count for _, lead, count in parts) == stride * plan.latents
        assert sum(fresh for fresh, _, _ in parts) == len(plan.encoder)


@pytest.mark.parametrize(("variant", "latents", "frames"), [("taew2_1", 3, 12), ("taecvx", 3, 12), ("taeh3", 2, 6)])
def test_latents_of_another_length_are_refused(variant, latents, frames):
    model = toy(variant)
    with pytest.raises(ValueError, match=f"num_frames is {frames}, which does not fit {latents} latent"):
        model.decode(torch.zeros(1, model.spec.channels, latents, 1, 1), frames)


def test_latents_that_no_clip_has_are_refused():
    with pytest.raises(ValueError, match="no number of frames fits 3 latent frames of taeh3"):
        toy("taeh3").decode(torch.zeros(1, 24, 3, 1, 1))


def reach(change: Tensor) -> list[int]:
    return torch.nonzero(change.abs().amax((0, 1, 3, 4))).flatten().tolist()


@pytest.mark.parametrize(("variant", "ahead"), [("taew2_1", 3), ("taeltx_2", 7), ("taeh3", 0), ("taeos1_2", 0)])
def test_how_far_latents_see(variant, ahead):
    """A latent depends on no frame after the last that it shows, unless spec.causal is False, and on 34 before."""
    model = toy(variant, torch.float64, channels=8)
    stride = model.spec.time_stride
    assert model.spec.causal == (ahead == 0)
    frames = 39 if variant == "taeh3" else 41
    video = clip(model, frames, sides=(1, 1))
    plan = model.plan(frames)
    with torch.no_grad():
        z, rec = model.encode(video).mean, model(video).video
        for touched in (0, 7, 18, 30):
            other = video.clone()
            other[:, :, touched] += 0.5
            first = next(
                i for i in range(plan.latents) if count_frames(plan.decoder, stride, 0, i + 1) + ahead > touched
            )
            seen = reach(model.encode(other).mean - z)
            assert seen[0] == first
            if variant == "taew2_1":
                assert seen[-1] <= first + 8
            assert reach(model(other).video - rec)[0] == count_frames(plan.decoder, stride, 0, first)


def test_chunks_begin_with_fresh_memory_where_the_rule_says_so():
    for variant, expected in (("taeh3", True), ("taeos1_2", True), ("taew2_1", False)):
        model = toy(variant)
        video = clip(model, 39)
        other = video.clone()
        other[:, :, 16] += 0.5
        with torch.no_grad():
            after = model.encode(video).mean[:, :, 5:] - model.encode(other).mean[:, :, 5:]
        assert bool((after == 0).all()) == expected


# Values


def test_pixels_are_not_clamped_and_gradient_reaches_those_out_of_range():
    """The published decode_video clamps, so outputs beyond the range have no gradient."""
    model = toy("taew2_1")
    with torch.no_grad():
        model.decoder[-1].bias.fill_(-20.0)
    out = model(clip(model, 5)).video
    assert out.max() < -1
    (out + 1).square().mean().backward()
    assert all(p.grad.norm() > 0 for p in model.decoder.parameters())


def test_range_is_minus_one_to_one():
    """With a last layer of zeros but its initial bias, the output is mid-grey, 0 here."""
    model = TAEHV(variant="taew2_1", **TOY)
    assert model.decoder[-1].bias.tolist() == [0.5] * 3
    with torch.no_grad():
        model.decoder[-1].weight.zero_()
        assert model(clip(model, 1)).video.abs().max() == 0


def test_latent_conventions():
    raw = toy("taecvx", latents_mean=[1.0] * 16, latents_std=[2.0] * 16)
    assert (raw.latent, toy("taew2_1").latent) == ("raw", "normalized")
    z = torch.randn(1, 16, 1, 2, 2)
    torch.testing.assert_close(raw.normalize(z), (z - 1) / 2)
    torch.testing.assert_close(raw.denormalize(raw.normalize(z)), z)
    assert raw.spec.latents_mean == (1.0,) * 16
    assert torch.equal(toy("taew2_1").normalize(z), z)
    assert toy("taew2_1", latent="raw", latents_std=[2.0] * 16, latents_mean=[0.0] * 16).spec.latents_std == (2.0,) * 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "taew3"}, "use one of taehv, taecvx"),
        (
            {"variant": "taew2_1", "latents_mean": [0.0] * 16, "latents_std": [1.0] * 16},
            "latents_mean and latents_std are for raw latents",
        ),
        ({"variant": "taecvx", "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, "4 and 4 entries; give 16"),
        ({"variant": "taehv", "latent": "scaled"}, "latent is 'scaled'; give one of raw, normalized"),
        ({"variant": "taehv", "chunk_latents": 0}, "chunk_latents is 0; give an integer"),
        ({"variant": "taehv", "decoder_channels": [8, 8]}, "give 4"),
        ({"variant": "taehv", "decoder_time_upscale": [True, True, True]}, "decoder_time_upscale: stage 0 of taehv"),
        ({"variant": "taehv", "decoder_time_upscale": [True]}, "give 3, or 2"),
        ({"variant": "taehv", "decoder_space_upscale": [True]}, "give 3"),
        ({"variant": "taew2_2_super", "decoder_space_upscale": [True, True, False]}, "decoder_space_upscale"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TAEHV(**TOY | changes)


# Decoders without some of their upscaling


@pytest.mark.parametrize(
    ("flags", "rate"), [([True, True], 1), ([False, True], 2), ([True, False], 2), ([False, False], 4)]
)
def test_a_decoder_that_does_not_double_the_rate_shows_fewer_frames(flags, rate):
    model = toy("taew2_1", decoder_time_upscale=flags)
    with torch.no_grad():
        shown_frames = model.decode(torch.zeros(1, 16, 5, 1, 1)).shape[2]
        assert shown_frames == {1: 17, 2: 9, 4: 5}[rate]
        assert model(clip(model, 7)).video.shape[2] == -(-7 // rate)
    for variant in ("taecvx", "taeh3", "taeos1_2"):
        other = toy(variant, decoder_time_upscale=flags)
        with torch.no_grad():
            assert other(clip(other, 17)).video.shape[2] == -(-17 // rate)


def test_a_decoder_that_does_not_double_the_sides_shows_smaller_frames():
    model = toy("taew2_1", decoder_space_upscale=[True, False, False])
    with torch.no_grad():
        assert model(clip(model, 5, beyond=-3)).video.shape == (1, 3, 5, 2, 4)


def test_such_decoders_are_not_trained_and_do_not_stream():
    for changes in ({"decoder_time_upscale": [False, True]}, {"decoder_space_upscale": [True, True, False]}):
        model = toy("taew2_1", **changes)
        with pytest.raises(ValueError, match="does not reconstruct"):
            model.stream(64, 64)
        with pytest.raises(ValueError, match="cannot be trained"):
            model.train()(clip(model, 5))


# Streams


def test_a_stream_asks_for_what_it_needs():
    model = toy("taew2_1", chunk_latents=2)
    stream = model.stream(8, 8)
    assert (stream.lookahead, toy("taeh3").stream(16, 16).lookahead) == (3, 0)
    assert stream.chunks(12) == [5, 7]
    with pytest.raises(ValueError, match=r"chunks\(\)"):
        stream(clip(model, 9))
    with pytest.raises(ValueError, match=r"chunks\(\)"):
        model.stream(8, 8)(clip(model, 1))


def test_a_stream_can_begin_again():
    model = toy("taecvx", chunk_latents=1)
    video = clip(model, 9)
    stream = model.stream(8, 16)
    with torch.inference_mode():
        for _ in range(2):
            stream.chunks(9)
            first = stream(video[:, :, :4])
        assert torch.equal(first.z, streamed(model, video)[1][:, :, :1])


def test_the_memory_does_not_grow():
    model = toy("taew2_1")
    seen, memory = set(), None
    with torch.inference_mode():
        for number in range(20):
            _, memory = model.decode_chunk(torch.randn(1, 16, 1 + number % 3, 2, 2), memory)
            seen.add(sum(x.untyped_storage().nbytes() for x in memory if x is not None))
    assert seen == {4 * 4 * 3 * (8 + 4 * 6 + 16 * 4)}  # three blocks in each stage, one frame each


def test_chunks_are_as_long_as_memory_allows():
    model = toy("taew2_1")
    needs = {k: model.chunk_memory(k, 64, 64) / 2**30 for k in (1, 2, 4)}
    for latents, gib in needs.items():
        assert model.stream(64, 64, gib).chunk_latents == latents
    assert model.stream(64, 64, 1e-9).chunk_latents == 1
    assert toy("taew2_1", chunk_latents=3).stream(64, 64, 1e-9).chunk_latents == 3

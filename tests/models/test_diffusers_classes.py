"""Every autoencoder of the installed diffusers, through DiffusersVAE: equal to its class, trained, saved, streamed."""

from __future__ import annotations

import inspect
from importlib.util import find_spec

import diffusers.models.autoencoders as library
import pytest
import torch
from torch import Tensor

import vae3d
from tests.models import diffusers_tiny as tiny
from vae3d.errors import UserError
from vae3d.models.compiled import compile_steps
from vae3d.models.diffusers_classes import CLASSES, NOT_SERVED, to_pixels
from vae3d.models.diffusers_vae import DiffusersVAE, entry_of
from vae3d.models.layers.circular import make_circular

KINDS = [  # a class whose package is missing, or older than it, is skipped
    pytest.param(
        kind,
        marks=[
            pytest.mark.skipif(bool(entry.needs and not find_spec(entry.needs)), reason=f"needs {entry.needs}"),
            pytest.mark.skipif(not hasattr(library, kind), reason=f"this diffusers has no {kind}"),
        ],
    )
    for kind, entry in CLASSES.items()
]


def test_every_class_of_diffusers_is_served_or_named_with_the_reason():
    """A class of a newer diffusers fails here: add it to CLASSES, or to NOT_SERVED with the reason."""
    theirs = {name for name, cls in vars(library).items() if inspect.isclass(cls) and issubclass(cls, torch.nn.Module)}
    assert theirs <= CLASSES.keys() | NOT_SERVED.keys()
    assert not CLASSES.keys() & NOT_SERVED.keys()
    assert tiny.CONFIGS.keys() == CLASSES.keys()
    for kind, reason in NOT_SERVED.items():
        with pytest.raises(UserError, match=f"{kind} is {reason}"):
            entry_of(kind)


def latents_and_video(ours: DiffusersVAE, video: Tensor) -> tuple[Tensor, Tensor]:
    """What diffusers' own encode and decode return for a clip, as [B, C, T, H, W] with pixels of the class."""
    vae, kind = ours.vae, ours.kind
    x = to_pixels(video, ours.table.pixels)
    if ours.input_channels == 4:
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    if kind == "AutoencoderKLAllegro":  # one tile of the class's tiling, which is all that it codes
        vae.use_tiling, vae.kernel, vae.stride = True, tuple(x.shape[2:]), tuple(n // 2 for n in x.shape[2:])
    if kind == "AutoencoderVidTok":
        return vae(x, sample_posterior=False, encoder_mode=True), vae(x, sample_posterior=False).sample
    if ours.table.frames.text == "any" and kind != "AutoencoderKLHunyuanImageRefiner":
        x = x.transpose(1, 2).flatten(0, 1)
        x = x[:, :, None] if kind == "AutoencoderKLQwenImage21" else x
    found = vae.encode(x)
    if hasattr(found, "latent_dist"):
        z = found.latent_dist.mode()
    else:
        z = found.latent if hasattr(found, "latent") else found.latents
    more = {"num_frames": len(x)} if kind == "AutoencoderKLTemporalDecoder" else {}
    if kind == "AutoencoderKLLTXVideo":
        more["temb"] = z.new_zeros(1)
        torch.manual_seed(0)  # of the noise that its decoder adds
    decoded = vae.decode(z, **more).sample
    if kind == "AutoencoderKLAllegro":
        vae.use_tiling, decoded = False, decoded.transpose(1, 2)
    if x.ndim == 4 or kind == "AutoencoderKLQwenImage21":
        z, decoded = (t.squeeze(2) if t.ndim == 5 else t for t in (z, decoded))
        z, decoded = (t.unflatten(0, (len(video), -1)).transpose(1, 2) for t in (z, decoded))
    return z, decoded[:, :3]


CLAMPED = ("AutoencoderKLWan", "AutoencoderKLQwenImage", "AutoencoderKLQwenImage21")  # by their decode


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_computes_the_same_as_in_diffusers_also_in_a_stream(kind):
    ours, video = tiny.model(kind).double(), tiny.clip(kind).double()  # in which 1e-6 is far above rounding
    frames = video.shape[2]
    assert ours.frames_valid(frames)
    with torch.no_grad():
        z, decoded = latents_and_video(ours, video)
        assert_near(ours.encode(video).mode(), z)
        assert z.shape[1:] == ours.latent_shape(*video.shape[2:])
        rec = ours.decode(z, frames)
        assert rec.shape == video.shape
        pixels = to_pixels(rec, ours.table.pixels)
        assert_near(pixels.clamp(-1, 1) if kind in CLAMPED else pixels, decoded)
        torch.testing.assert_close(ours.denormalize(ours.normalize(z)), z, rtol=1e-5, atol=1e-5)
        batch = ours(torch.cat([video, video.flip(-1)]), sample=False)
        assert_near(batch.z[:1], z)
        assert_near(batch.video[:1], rec)

        short = video[:, :, : frames - 1]  # the last chunk is extended
        height, width = short.shape[-2:]
        whole = ours(short if ours.table.fixed_size else short[..., : height - 1, : width - 1], sample=False)
        assert whole.video.shape[2] == frames - 1
        stream, start, parts = ours.stream(height, width), 0, []
        sizes = stream.chunks(frames - 1)
        for size in sizes:
            crop = short[:, :, start : start + size]
            parts.append(stream(crop if ours.table.fixed_size else crop[..., : height - 1, : width - 1]))
            start += size
        assert start == frames - 1
        assert len(sizes) > 1 or not ours.table.exact_stream or frames < 4
        assert torch.equal(torch.cat([part.video for part in parts], 2), whole.video)
        assert torch.equal(torch.cat([part.z for part in parts], 2), whole.z)


def gradients(model: DiffusersVAE, video: Tensor) -> tuple[dict[str, Tensor], int]:
    """Gradients by parameter, with the loss; and how many bytes backward needed beside the parameters."""
    known, sizes = {p.data_ptr() for p in model.parameters()}, {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(video, sample=False)
        loss = (out.video - video).square().mean() + 1e-3 * out.posterior.kl_map().mean()
    needed = sum(sizes.values())
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"loss": loss}, needed


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_trains_with_and_without_checkpointing_and_goes_back_to_diffusers(kind, tmp_path):
    ours, recomputing = tiny.model(kind), tiny.model(kind, gradient_checkpointing=True)
    folder = tmp_path / "vae"
    vae3d.save(ours, folder, layout="diffusers")  # bit-equal, as nothing is trained yet
    theirs = getattr(library, kind).from_pretrained(folder).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    again = vae3d.load(tmp_path / "theirs", DiffusersVAE(kind, tiny.CONFIGS[kind]))
    expected = ours.vae.state_dict()
    for found in (theirs, again.vae):
        torch.testing.assert_close(dict(found.state_dict()), dict(expected), rtol=0, atol=0)
    assert torch.equal(again.latents_mean, ours.latents_mean)
    assert again.spec == ours.spec

    parts = ours.trainable_parts()
    members = [id(p) for modules in parts.values() for module in modules for p in module.parameters()]
    assert sorted(members) == sorted(id(p) for p in ours.parameters())
    video = tiny.clip(kind, tiny.TRAINED.get(kind))
    (plain, bytes_plain), (recomputed, bytes_recomputed) = gradients(ours, video), gradients(recomputing, video)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert torch.equal(recomputed[name], gradient), name
    assert bytes_recomputed < 0.8 * bytes_plain
    (weight,) = ours.last_layers()
    before = weight.detach().clone()
    assert weight.grad.abs().max() > 0
    torch.optim.AdamW(ours.parameters(), lr=1e-3).step()
    assert not torch.equal(weight, before)


SEAMLESS = [kind for kind in KINDS if not CLASSES[kind.values[0]].open_seam]


def without_noise(model: DiffusersVAE) -> DiffusersVAE:
    """Without that of LTX-Video 0.9.1's decoder, which is drawn for places and does not roll."""
    for module in model.modules():
        if getattr(module, "per_channel_scale1", None) is not None:
            module.per_channel_scale1 = module.per_channel_scale2 = None
    return model


def panorama(model: DiffusersVAE) -> Tensor:
    """A clip of a width of four latents, of few frames."""
    frames, height, _ = tiny.SIZES.get(model.kind, (9, 16, 16))
    frames = tiny.TRAINED.get(model.kind, frames)
    size = (1, 3, frames, height, 4 * model.spec.space_stride)
    return torch.rand(size, generator=torch.Generator().manual_seed(0)).double() * 2 - 1


@pytest.mark.parametrize("kind", SEAMLESS)
def test_turning_a_panorama_turns_its_latents_and_its_reconstruction(kind):
    ours = without_noise(tiny.model(kind, pad_w="circular")).double()
    video, stride = panorama(ours), ours.spec.space_stride
    with torch.no_grad():
        first, second = ours(video, sample=False), ours(video.roll(stride, -1), sample=False)
        assert_near(second.z, first.z.roll(1, -1))
        assert_near(second.video, first.video.roll(stride, -1))
        own = without_noise(tiny.model(kind)).double()
        assert own.state_dict().keys() == ours.state_dict().keys()
        open_seam = own.encode(video.roll(stride, -1)).mode() - own.encode(video).mode().roll(1, -1)
    assert open_seam.abs().max() > 0.01
    with pytest.raises(ValueError, match=f"the width is {4 * stride - 1}; .* multiple of {stride}"):
        ours.stream(video.shape[3], 4 * stride - 1)


# Two that diffusers' own code checkpoints and two with our blocks, one of each with caches.
@pytest.mark.parametrize(
    "kind", ["AutoencoderKL", "AutoencoderKLCogVideoX", "AutoencoderTiny", "AutoencoderKLQwenImage"]
)
def test_the_circle_is_closed_in_recomputed_blocks_and_streams_too(kind):
    ours, recomputing = (
        tiny.model(kind, pad_w="circular", gradient_checkpointing=checkpointing).double()
        for checkpointing in (False, True)
    )
    video = panorama(ours)
    (expected, _), (found, _) = gradients(ours, video), gradients(recomputing, video)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
    with torch.no_grad():
        whole, stream, start = ours(video, sample=False), ours.stream(*video.shape[3:]), 0
        for size in stream.chunks(video.shape[2]):
            part = stream(video[:, :, start : start + size])
            assert torch.equal(part.video, whole.video[:, :, start : start + size])
            start += size


def test_compiling_does_not_open_the_seam():
    conv = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3, padding=1))
    frame = torch.rand(1, 1, 3, 4)
    zeros = conv(frame)
    make_circular(conv)
    expected = conv(frame)
    assert not torch.equal(expected, zeros)
    assert torch.equal(torch.compile(conv, backend="eager")(frame), expected)
    with pytest.raises(UserError, match=r"compile=true: .*pad_w=circular"):
        compile_steps(tiny.model("AutoencoderKL", pad_w="circular"))


def test_a_seam_that_stays_open_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="the seam of AutoencoderKLMiniMaxH3 stays open: its decoder's attention"):
        tiny.model("AutoencoderKLMiniMaxH3", pad_w="circular")
    ours = tiny.model("AutoencoderKLMiniMaxH3").double()
    make_circular(ours.vae)
    video, stride = tiny.clip("AutoencoderKLMiniMaxH3").double().repeat(1, 1, 1, 1, 4), ours.spec.space_stride
    with torch.no_grad():
        z = ours.encode(video).mode()
        turned = ours.decode(z.roll(1, -1)) - ours.decode(z).roll(stride, -1)
    assert turned.abs().max() > 1e-4

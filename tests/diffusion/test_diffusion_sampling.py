from __future__ import annotations

import math

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tests.diffusion import toy
from vae3d.diffusion.base import Sampling
from vae3d.diffusion.build import build_network
from vae3d.diffusion.flow import RectifiedFlow
from vae3d.diffusion.gaussian import GaussianDiffusion
from vae3d.diffusion.processes import drop_labels
from vae3d.diffusion.sampling import check_latent_rms, guided, per_rank_batches, sample_latents, write_frames, write_npz
from vae3d.inference.pictures import grid
from vae3d.latents.scale import LatentStats
from vae3d.running_stats import RunningStats

WAYS = {
    "ddpm": (GaussianDiffusion(), Sampling(steps=40)),
    "fixed_large": (GaussianDiffusion(variance="fixed_large"), Sampling(steps=40)),
    "learned": (GaussianDiffusion(variance="learned_range", schedule="cosine"), Sampling(steps=40)),
    "v": (GaussianDiffusion(prediction="v", schedule="cosine"), Sampling(steps=40)),
    "ddim": (GaussianDiffusion(), Sampling(steps=50, method="ddim")),
    "ddim_v": (GaussianDiffusion(prediction="v", variance="learned_range"), Sampling(50, "ddim", eta=0.5)),
    "flow": (RectifiedFlow(), Sampling(steps=40)),
    "shifted": (RectifiedFlow(), Sampling(steps=40, shift=3.0)),
}


@pytest.mark.parametrize("way", WAYS)
def test_samples_of_one_point_are_that_point(way):
    process, sampling = WAYS[way]
    point = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(5))
    z = sample_latents(toy.Oracle(process, point), process, point.shape, sampling, seed=0, indices=range(3))
    assert z.shape == (3, 2, 3, 4, 5)
    torch.testing.assert_close(z, point.expand_as(z), rtol=1e-3, atol=1e-3)


def deviation(process, times):
    """Of samples of N(0, 1): each step is x' = sqrt(alpha) x + sigma noise. With sigma^2 = beta that is 1, and with the
    posterior's variance less, the fewer steps the less (arXiv 2006.11239, section 3.2)."""
    variance, kept = 1.0, process.alphas_cumprod[times].tolist()
    for now, before in zip(kept, [*kept[1:], 1.0], strict=True):
        beta = 1 - now / before
        variance = (1 - beta) * variance + (1 - before) / (1 - now) * beta
    return variance**0.5


@pytest.mark.parametrize("way", WAYS)
def test_samples_of_a_gaussian_have_its_mean_and_deviation(way):
    process, sampling = WAYS[way]
    z = sample_latents(toy.Oracle(process, 0.5, 1.0), process, (4, 1, 64, 64), sampling, seed=0, indices=[0])
    small = way in ("ddpm", "learned", "v")
    expected = deviation(process, process.sampler(sampling).timesteps) if small else 1.0
    assert z.mean() == pytest.approx(0.5, abs=0.03)
    assert z.std() == pytest.approx(expected, abs=0.02 if small or way == "fixed_large" else 0.05)


@pytest.mark.parametrize("way", WAYS)
def test_samples_do_not_depend_on_the_batch(way):
    process, sampling = WAYS[way]
    config = toy.TINY["transformer"] | {"num_classes": 3, "learned_sigma": process.learned_sigma}
    network = toy.shaken(build_network(config, toy.CLIP))
    labels, indices = [2, 0, 1, 2, 1], [0, 1, 2, 3, 70]

    def draw(chosen, seed=0, batch=16, kind=list):
        part = {"indices": kind([indices[i] for i in chosen]), "labels": [labels[i] for i in chosen]}
        return sample_latents(network, process, toy.CLIP, few, seed=seed, batch_size=batch, **part)

    few = Sampling(10, sampling.method, eta=sampling.eta, shift=sampling.shift, guidance=1.5)
    whole = draw(range(5))
    assert torch.equal(whole, draw(range(5), kind=np.array))
    for other in (draw(range(5), batch=2), draw([4, 2], batch=1)):
        same = whole if len(other) == 5 else whole[[4, 2]]
        torch.testing.assert_close(other, same, rtol=1e-3, atol=1e-3 * float(whole.abs().max()))
    assert (whole[0] - whole[1]).abs().mean() > 0.1
    assert (draw(range(5), seed=1) - whole).abs().mean() > 0.1


@pytest.mark.parametrize("way", WAYS)
def test_clip_bounds_what_is_predicted(way):
    process, sampling = WAYS[way]
    far = toy.Oracle(process, 5.0)
    clipped = Sampling(sampling.steps, sampling.method, eta=sampling.eta, shift=sampling.shift, clip=2.5)
    z = sample_latents(far, process, (2, 1, 4, 4), clipped, seed=0, indices=[0, 1])
    torch.testing.assert_close(z, torch.full_like(z, 2.5), rtol=1e-3, atol=1e-3)
    free = sample_latents(far, process, (2, 1, 4, 4), sampling, seed=0, indices=[0, 1])
    torch.testing.assert_close(free, torch.full_like(free, 5.0), rtol=1e-3, atol=1e-3)


def test_nothing_is_clipped_by_default():
    """diffusers and guided-diffusion clip to [-1, 1], where a third of unit latents does not lie."""
    process = GaussianDiffusion(variance="fixed_large")
    z = sample_latents(toy.Oracle(process, 0.0, 1.0), process, (4, 1, 32, 32), Sampling(), seed=0, indices=[0])
    assert (z.abs() > 1).double().mean() == pytest.approx(0.317, abs=0.03)


def test_size_of_latents_by_hand():
    stats = RunningStats(2)
    for z in (torch.tensor([-1.0, 7.0, 7.0]), torch.tensor([-1.0])):  # mean 3, deviation 4
        stats.update_channels(torch.stack([z, 2 * z]).view(1, 2, 1, 1, -1))
    scale = LatentStats.of(stats, 2)
    assert (scale.clips, scale.mean.tolist(), scale.std.tolist()) == (2, pytest.approx([3, 6]), pytest.approx([4, 8]))
    assert math.hypot(*scale.over_channels()) == pytest.approx(62.5**0.5)  # 25 and 100


@pytest.mark.parametrize(
    ("ratio", "sampling", "hint"),
    [(0.4, Sampling(clip=1.0), "train for longer, or take more steps, or raise or leave out clip"),
     (3.0, Sampling(clip=5.0, guidance=4.0), "train for longer, or lower guidance"),
     (0.6, Sampling(), None), (1.9, Sampling(), None)],
)  # fmt: skip
@pytest.mark.parametrize("of_data", [1.0, 4.0])  # the latter by trainer.any_scale
def test_samples_far_from_the_size_of_data_are_warned_about(ratio, sampling, hint, of_data):
    warning = check_latent_rms(ratio * of_data, of_data, RectifiedFlow(), sampling)
    assert warning is None if hint is None else warning.endswith(f"; {hint}")


@pytest.mark.parametrize(("count", "batch", "world"), [(10, 3, 2), (1, 4, 3), (12, 2, 3)])
def test_ranks_share_samples_in_equally_many_rounds(count, batch, world):
    of_ranks = [list(per_rank_batches(count, batch, rank, world)) for rank in range(world)]
    assert {len(shares) for shares in of_ranks} == {-(-count // (batch * world))}
    assert sorted(i for shares in of_ranks for share in shares for i in share) == list(range(count))
    assert max(len(share) for shares in of_ranks for share in shares) <= batch


def test_labels_reach_their_samples():
    process = RectifiedFlow()
    z = sample_latents(
        toy.Oracle(process),
        process,
        (1, 1, 2, 2),
        Sampling(4),
        seed=0,
        indices=range(5),
        labels=[3, 1, 4, 1, 5],
        batch_size=2,
    )
    torch.testing.assert_close(z.mean((1, 2, 3, 4)), torch.tensor([3.0, 1, 4, 1, 5]))


def test_network_is_evaluated_without_dropout_and_left_as_it_was():
    network = toy.shaken(build_network(toy.TINY["unet"] | {"dropout": 0.5}, toy.IMAGE))
    for training in (True, False):
        network.train(training)
        z = [sample_latents(network, RectifiedFlow(), toy.IMAGE, Sampling(2), seed=0, indices=[0]) for _ in range(2)]
        assert torch.equal(*z)
        assert not z[0].requires_grad
        assert network.training is training


def conditional(learned=False):
    config = toy.TINY["transformer"] | {"num_classes": 3, "learned_sigma": learned}
    return toy.shaken(build_network(config, toy.CLIP)).eval()


@pytest.mark.parametrize("learned", [False, True])
def test_guidance_equals_its_formula(learned):
    network, labels, time = conditional(learned), torch.tensor([2, 0]), torch.tensor([10.0, 900.0])
    z = torch.randn(2, *toy.CLIP, generator=torch.Generator().manual_seed(0))
    with_label, without = network(z, time, labels), network(z, time)
    assert torch.equal(guided(network, labels, 1.0)(z, time, 0.5), with_label)
    for scale in (0.0, 0.5, 3.0):
        got = guided(network, labels, scale)(z, time, 0.5)
        expected = without + scale * (with_label - without)
        expected[:, 4:] = with_label[:, 4:]  # learned variances are those of the label
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):  # the difference is extrapolated before anything is rounded again
        assert guided(network, labels, 3.0)(z, time, 0.5).dtype == torch.float32


def test_guidance_outside_of_its_interval_is_none():
    process = RectifiedFlow()
    oracle = toy.Oracle(process)
    sampling = Sampling(10, guidance=2.0, interval=(0.25, 0.65))
    sample_latents(oracle, process, (1, 1, 2, 2), sampling, seed=0, indices=[0, 1], labels=[1, 2])
    assert [count for count, _, _ in oracle.calls] == [2] * 4 + [4] * 4 + [2] * 2  # at 0.6, 0.5, 0.4, 0.3
    assert oracle.calls[5][2] == [1, 2, 10, 10]


@pytest.mark.parametrize(
    ("classes", "labels", "scale", "message"),
    [(3, None, 2.0, "needs a network with classes, and labels"), (0, None, 2.0, "use 1"), (3, [0, 4], 2.0, "has 0..2"),
     (3, [-1, 2], 1.0, "labels are -1..2"), (3, [0], 1.0, "1 label for 2 samples"), (0, [0, 0], 1.0, "without classes")],
)  # fmt: skip
def test_impossible_guidance_is_named(classes, labels, scale, message):
    network = build_network(toy.TINY["transformer"] | {"num_classes": classes}, toy.CLIP)
    with pytest.raises(ValueError, match=message):
        sample_latents(
            network, RectifiedFlow(), toy.CLIP, Sampling(2, guidance=scale), seed=0, indices=[0, 1], labels=labels
        )


def test_labels_are_dropped_at_their_rate():
    labels = torch.arange(3).repeat(1000)
    dropped = drop_labels(labels, 0.1, 3, toy.generators(3000))
    assert (dropped == 3).double().mean() == pytest.approx(0.1, abs=0.02)
    assert torch.equal(dropped[dropped != 3], labels[dropped != 3])
    assert torch.equal(dropped[7:8], drop_labels(labels[7:8], 0.1, 3, toy.generators(1, 7)))
    assert torch.equal(drop_labels(labels, 0.0, 3, toy.generators(3000)), labels)
    assert (drop_labels(labels, 1.0, 3, toy.generators(3000)) == 3).all()


def test_grid_of_images(tmp_path):
    frames = np.random.default_rng(0).integers(1, 256, (5, 1, 7, 9, 3), dtype=np.uint8)
    path = write_frames(tmp_path / "samples.v1", grid(frames))
    assert path == tmp_path / "samples.v1.png"
    picture = np.asarray(Image.open(path))
    assert picture.shape == (16, 32, 3)  # 7 + 2 + 7; 9 + 2 + 9 + 2 + 9, made even
    np.testing.assert_array_equal(picture[9:16, 11:20], frames[4, 0])
    assert not picture[:, 9:11].any()
    assert not picture[9:, 20:].any()
    assert grid(frames, 1).shape == (1, 44, 10, 3)
    assert grid(frames[:1], 4).shape == (1, 8, 10, 3)


def test_grid_of_videos(tmp_path):
    frames = np.tile(np.array([0, 64, 191, 255], np.uint8).reshape(4, 1, 1, 1, 1), (1, 5, 16, 16, 3))
    path = write_frames(tmp_path / "samples", grid(frames), fps=4)
    assert path.name == "samples.mp4"
    with av.open(str(path)) as container:
        read = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 4
    assert len(read) == 5
    assert abs(int(read[4][8, 26, 0]) - 64) < 6


def test_npz_is_that_of_guided_diffusion(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (3, 1, 4, 6, 3), dtype=np.uint8)
    path = write_npz(tmp_path / "out", frames, [2, 0, 1])
    assert path == tmp_path / "out" / "samples_3x4x6x3.npz"
    with np.load(path) as read:
        assert read.files == ["arr_0", "arr_1"]
        assert read["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(read["arr_0"], frames[:, 0])
        assert read["arr_1"].dtype == np.int64
        assert read["arr_1"].tolist() == [2, 0, 1]
    with np.load(write_npz(tmp_path / "plain", frames)) as read:
        assert read.files == ["arr_0"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == [path.name]
    with pytest.raises(ValueError, match="2 labels for 3 images"):
        write_npz(tmp_path, frames, [1, 2])
    with pytest.raises(ValueError, match="samples have 2 frames"):
        write_npz(tmp_path, np.zeros((1, 2, 4, 4, 3), np.uint8))

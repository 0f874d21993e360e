"""The losses of panoramas: pixel weights, edges, weighted LPIPS, cube faces, and their schedules."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests import tiny
from tests.losses.test_objective import as_clip, reconstruction
from vae3d.commands import train
from vae3d.commands.cli import check_training
from vae3d.config.check import read
from vae3d.config.issues import ConfigError
from vae3d.config.schema import TrainConfig
from vae3d.losses.cube import CubeL1, CubeLPIPS
from vae3d.losses.latent import KL
from vae3d.losses.objective import Objective, Term, WeightedTerm
from vae3d.losses.perceptual import LPIPS
from vae3d.losses.pixel import L1, Sobel
from vae3d.losses.pixel_weights import ErpCosine
from vae3d.panorama import cube_faces, roll
from vae3d.types import Posterior, Reconstruction


def clip_and_error(error: torch.Tensor, valid: torch.Tensor | None = None):
    """A clip, and a reconstruction that is off by `error`, [B, 3, T, H, W]."""
    video = torch.zeros_like(error)
    clip = replace(as_clip(video), valid=valid)
    return clip, Reconstruction((video + error).requires_grad_(), None, torch.zeros(1))


def loss_of(term, clip, out, pixel_weight=None, reduction="mean") -> torch.Tensor:
    return Objective({"t": WeightedTerm(term, 1.0)}, reduction, pixel_weight)(clip, out, 0)[0]


def loaded(term):
    term.load("cpu")
    return term


# ---- pixel weights


def test_weights_of_128_rows_have_mean_1_and_hand_values():
    plain = ErpCosine()(128, "cpu")
    assert plain.mean().item() == pytest.approx(1, abs=1e-6)
    assert plain[0].item() == pytest.approx(0.01227154 / 0.63664, rel=1e-4)
    assert plain[64].item() == pytest.approx(0.9999247 / 0.63664, rel=1e-4)
    half = ErpCosine(blend=0.5)(128, "cpu")
    torch.testing.assert_close(half, 0.5 + 0.5 * plain)
    assert ErpCosine(blend=0)(128, "cpu").tolist() == [1.0] * 128


def test_a_floor_lifts_the_poles_before_the_mean_is_taken():
    floored = ErpCosine(floor=0.5)(180, "cpu")
    assert floored[0] == floored[29]  # 60 degrees is where the cosine is 0.5
    assert floored[30] > floored[29]
    assert (floored[89] / floored[0]).item() == pytest.approx(2, rel=1e-3)
    assert floored.mean().item() == pytest.approx(1, abs=1e-6)
    assert ErpCosine(floor=1)(16, "cpu").tolist() == [1.0] * 16


@pytest.mark.parametrize("wrong", [{"floor": -0.1}, {"floor": 1.1}, {"blend": 2}])
def test_impossible_weights_are_refused(wrong):
    with pytest.raises(ValueError, match="give a finite number from 0 to 1"):
        ErpCosine(**wrong)


def test_beyond_60_degrees_lie_a_third_of_the_pixels_and_13_percent_of_the_weight():
    weight = ErpCosine()(180, "cpu")
    assert (weight[:30].sum() + weight[-30:].sum()).item() / 180 == pytest.approx(0.134, abs=1e-3)


def test_terms_on_pixels_are_weighted_and_others_are_not():
    error = torch.zeros(1, 3, 1, 4, 8)
    error[..., 0, :] = 1.0
    clip, out = clip_and_error(error)
    out.posterior = Posterior(torch.ones(1, 4, 1, 2, 2), torch.zeros(1, 4, 1, 2, 2))
    terms = {"l1": WeightedTerm(L1(), 1.0), "kl": WeightedTerm(KL(), 1.0)}
    _, metrics = Objective(terms, "mean", ErpCosine())(clip, out, 0)
    rows = ErpCosine()(4, "cpu")
    assert metrics["loss/l1"].item() == pytest.approx(rows[0].item() / 4)
    assert metrics["loss/kl"].item() == pytest.approx(0.5)


@pytest.mark.parametrize("weight", [None, ErpCosine()])
def test_pixels_that_are_not_valid_leave_the_mean_of_the_others(weight):
    error = torch.rand(2, 3, 2, 4, 8)
    valid = torch.ones(2, 1, 2, 4, 8, dtype=torch.bool)
    valid[0, :, :, 1:3, 2:5] = False
    valid[1, :, 0] = False
    clip, out = clip_and_error(error, valid)
    rows = torch.ones(4) if weight is None else weight(4, "cpu")
    w = valid * rows[:, None]
    expected = [(w[b] * error[b]).sum() / (3 * w[b].sum()) for b in range(2)]  # a clip counts as much as another
    torch.testing.assert_close(loss_of(L1(), clip, out, weight), sum(expected) / 2)


def test_kl_is_summed_under_its_own_reduction_and_logged_per_element():
    posterior = Posterior(torch.full((2, 16, 2, 16, 32), 2.0), torch.zeros(2, 16, 2, 16, 32))
    out = Reconstruction(None, posterior, posterior.mean)
    objective = Objective({"kl": WeightedTerm(KL(), 1e-6, reduction="sum")}, "mean")
    loss, metrics = objective(as_clip(torch.zeros(2, 3, 5, 128, 256)), out, 0)
    assert metrics["loss/kl"].item() == pytest.approx(16_384 * 2)  # mu^2 / 2 each
    assert metrics["loss_mean/kl"].item() == pytest.approx(2)
    assert loss.item() == pytest.approx(0.032768)
    with pytest.raises(ValueError, match="reduction is 'max'; use one of sum, mean"):
        Objective({"kl": WeightedTerm(KL(), 1e-6, reduction="max")}, "mean")


# ---- Sobel


def test_sobel_of_a_step_by_hand():
    """A step of 1 between columns 3 and 4: each window that meets it has |gx| = 4, with kernels / 8 one half."""
    error = torch.zeros(1, 3, 1, 6, 8)
    error[..., 4:] = 1.0
    clip, out = clip_and_error(error)
    edges = Sobel()(clip, out).map[0, 0, 0]
    assert edges.tolist() == [[0, 0, 0, 0.25, 0.25, 0, 0, 0]] * 6  # (|gx| + |gy|) / 2
    assert Sobel(normalize=False)(clip, out).map[0, 0, 0, 0].tolist() == [0, 0, 0, 2, 2, 0, 0, 0]
    assert Sobel(wrap=True)(clip, out).map[0, 0, 0, 0].tolist() == [0.25, 0, 0, 0.25, 0.25, 0, 0, 0.25]
    assert loss_of(Sobel(wrap=True), clip, out).item() == pytest.approx(0.125)
    down = Sobel(wrap=True)(*clip_and_error(error.transpose(3, 4)[..., :8, :])).map[0, 0, 0, :, 0]
    assert down.tolist() == [0, 0, 0, 0.25, 0.25, 0, 0, 0]  # rows repeat at the poles


def test_sobel_of_a_single_pixel_is_the_kernels():
    error = torch.zeros(1, 1, 1, 5, 5)
    error[..., 2, 2] = 1.0
    edges = Sobel(normalize=False)(*clip_and_error(error)).map[0, 0, 0]
    assert edges[1:4, 1:4].tolist() == [[1, 1, 1], [1, 0, 1], [1, 1, 1]]
    assert edges.sum() == 8


def test_sobel_of_white_noise_beside_its_l1():
    clip, out = clip_and_error(torch.randn(1, 3, 4, 64, 128, generator=torch.Generator().manual_seed(0)))
    l1 = loss_of(L1(), clip, out).item()
    assert loss_of(Sobel(wrap=True), clip, out).item() / l1 == pytest.approx(12**0.5 / 8, rel=0.02)
    assert loss_of(Sobel(wrap=True, normalize=False), clip, out).item() / l1 == pytest.approx(3.46, rel=0.02)


def test_edges_do_not_see_the_seam():
    video = torch.rand(1, 3, 2, 6, 12)
    clip, out = clip_and_error(video)
    there = Sobel(wrap=True)(clip, out).map
    turned = Sobel(wrap=True)(*clip_and_error(roll(video))).map
    torch.testing.assert_close(turned, roll(there))


def test_magnitudes_forgive_the_sign_of_an_edge_and_have_a_gradient_where_there_is_none():
    video = torch.zeros(1, 3, 1, 6, 8)
    video[..., 4:] = 1.0
    clip, out = as_clip(video), Reconstruction((1 - video).requires_grad_(), None, torch.zeros(1))
    assert loss_of(Sobel(magnitude=True), clip, out) == 0
    assert loss_of(Sobel(), clip, out) > 0.1
    flat = Reconstruction(torch.zeros_like(video).requires_grad_(), None, torch.zeros(1))
    loss = loss_of(Sobel(magnitude=True), clip, flat)
    assert loss.item() == pytest.approx(2 / 8 * ((0.25 + 1e-6) ** 0.5 - 1e-3), rel=1e-5)
    loss.backward()
    assert flat.video.grad.isfinite().all()


def test_edges_around_pixels_that_are_not_valid_do_not_count():
    """An error of 1 everywhere has no edges, also where a hole is cut into it."""
    valid = torch.ones(1, 1, 1, 8, 16, dtype=torch.bool)
    valid[..., 3:5, [0, 1, 15]] = False
    for term in (Sobel(wrap=True), Sobel(wrap=True, magnitude=True)):
        assert loss_of(term, *clip_and_error(torch.ones(1, 3, 1, 8, 16), valid)) == 0
    # Of a slope of 1 per row the windows off the hole have |gy| = 1, those of the first and last row half of it.
    slope = torch.arange(8.0)[:, None].expand(1, 3, 1, 8, 16)
    got = loss_of(Sobel(wrap=True), *clip_and_error(slope, valid))
    kept = 8 * 16 - 4 * 5
    assert got.item() == pytest.approx(0.5 * (kept - 32 + 16) / kept)


# ---- LPIPS


def images(seed: int = 0, height: int = 64, width: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(2, 1, 3, 9, 18, generator=generator) * 2 - 1
    x, y = (F.interpolate(image, (height, width), mode="bilinear") for image in small)
    return x, y


@pytest.mark.parametrize(("first", "last", "tolerance"), [(0, 64, 1e-4), (0, 16, 1e-3), (24, 40, 1e-3)])
def test_weights_count_inside_each_layer_as_on_the_map_of_full_size(trunks, first, last, tolerance):
    """LPIPS's `spatial` map upsamples every layer, which costs more and gives nearly the same."""
    network = loaded(LPIPS()).network
    x, y = images()
    y = torch.cat([x[..., :first, :], y[..., first:last, :], x[..., last:, :]], -2)
    maps = network.layer_maps(network.unit_features(x), network.unit_features(y))
    full = sum(F.interpolate(m, x.shape[-2:], mode="bilinear") for m in maps)
    rows = ErpCosine()(64, "cpu")[:, None]
    got, expected = network(x, y, rows[None, None]).item(), (full * rows).mean().item()
    assert got == pytest.approx(expected, rel=tolerance)
    if last - first < 64:
        assert abs(expected / full.mean().item() - 1) > 0.3
    else:
        torch.testing.assert_close(network(x, y, torch.ones(1, 1, 64, 128)), network(x, y), rtol=1e-6, atol=0)


def test_weighted_lpips_is_the_networks_also_checkpointed(trunks):
    x, y = images()
    weight = ErpCosine()
    values = []
    for checkpointing in (False, True):
        term = loaded(LPIPS(frame_batch=1, gradient_checkpointing=checkpointing))
        out = Reconstruction(torch.stack([y, x], 2).requires_grad_(), None, torch.zeros(1))
        loss = loss_of(term, as_clip(torch.stack([x, x], 2)), out, weight)
        loss.backward()
        values.append((loss.detach(), out.video.grad))
    expected = term.network(x, y, weight(64, "cpu")[None, None, :, None]) / 2  # the second frame is perfect
    torch.testing.assert_close(values[0][0], expected.squeeze())
    for plain, recomputed in zip(*values, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-6, atol=1e-9)


def test_wrapped_lpips_sees_no_seam(trunks):
    x, y = images()
    clip, out = as_clip(x[:, :, None]), Reconstruction(y[:, :, None], None, torch.zeros(1))
    turned = as_clip(roll(clip.video)), Reconstruction(roll(out.video), None, torch.zeros(1))
    plain, wrapped = loaded(LPIPS()), loaded(LPIPS(wrap=32))

    def change(term):
        here, there = loss_of(term, clip, out, ErpCosine()), loss_of(term, *turned, ErpCosine())
        return abs(here / there - 1).item()

    assert change(wrapped) < 0.2 * change(plain)
    maps = wrapped.network.layer_maps(
        *(wrapped.network.unit_features(torch.cat([v[..., -32:], v, v[..., :32]], -1)) for v in (x, y))
    )
    inside = sum(m[..., m.shape[-1] // 6 : -(m.shape[-1] // 6)].mean() for m in maps)  # 32 of 192 columns
    torch.testing.assert_close(loss_of(wrapped, clip, out), inside, rtol=1e-5, atol=0)


def test_sizes_that_do_not_divide_keep_the_mean_of_the_weights(trunks):
    network = loaded(LPIPS()).network
    x, y = images(height=45, width=70)
    torch.testing.assert_close(network(x, y, torch.full((1, 1, 45, 1), 2.0)), 2 * network(x, y), rtol=1e-5, atol=0)


# ---- cube faces


def test_cube_l1_is_l1_of_the_faces():
    video = torch.rand(2, 3, 2, 16, 32)
    out = reconstruction(video)
    expected = [(cube_faces(out.video[:, :, t]) - cube_faces(video[:, :, t])).abs().mean() for t in range(2)]
    torch.testing.assert_close(loss_of(CubeL1(), as_clip(video), out, ErpCosine()), sum(expected) / 2)
    constant = clip_and_error(torch.full((1, 3, 1, 8, 16), 0.25))
    assert loss_of(CubeL1(5), *constant).item() == pytest.approx(0.25)


def test_every_face_counts_a_sixth():
    latitude = (0.5 - (torch.arange(64)[:, None] + 0.5) / 64) * torch.pi
    longitude = ((torch.arange(128) + 0.5) / 64 - 1) * torch.pi
    ahead = longitude.abs() < torch.pi / 4
    front = ahead & (latitude.tan().abs() < longitude.cos())
    side = torch.maximum(longitude.cos().abs(), longitude.sin().abs())
    up = latitude.tan() > side
    for face in (front, up):
        clip, out = clip_and_error(face.float().expand(1, 3, 1, 64, 128).clone())
        assert loss_of(CubeL1(), clip, out, ErpCosine()).item() == pytest.approx(1 / 6, rel=0.02)


def test_cube_lpips_is_lpips_of_the_faces(trunks):
    term = loaded(CubeLPIPS(frame_batch=5))
    x, y = images(height=32)
    clip, out = as_clip(torch.stack([x, x], 2)), Reconstruction(torch.stack([x, y], 2), None, torch.zeros(1))
    expected = term.network(cube_faces(x)[0], cube_faces(y)[0]).mean()
    got = term(clip, out).map
    assert got.shape == (1, 1, 2, 1, 1)
    assert got[0, 0, 0] == 0
    torch.testing.assert_close(got[0, 0, 1].squeeze(), expected)


def test_faces_too_small_for_the_trunk_are_refused():
    clip, out = clip_and_error(torch.zeros(1, 3, 1, 16, 32))
    with pytest.raises(ValueError, match="cube faces of at least 16 pixels; these have 8: train on panoramas of at"):
        CubeLPIPS()(clip, out)


# ---- validity, schedules, sets


TERMS = {
    "l1": L1, "sobel": lambda: Sobel(wrap=True), "magnitude": lambda: Sobel(magnitude=True), "cube_l1": CubeL1,
    "lpips": lambda: loaded(LPIPS(wrap=16)), "cube_lpips": lambda: loaded(CubeLPIPS()),
}  # fmt: skip


@pytest.mark.parametrize("name", TERMS)
def test_pixels_that_are_not_valid_have_no_gradient_in_any_term(trunks, name):
    x, y = images(height=32, width=64)
    valid = torch.ones(2, 1, 1, 32, 64, dtype=torch.bool)
    valid[0, ..., :12, 20:50] = False
    valid[1] = False  # a clip without any
    clip = replace(as_clip(torch.stack([x, x], 0)[:, 0][:, :, None]), valid=valid)
    out = Reconstruction(torch.stack([y, y], 0)[:, 0][:, :, None].requires_grad_(), None, torch.zeros(1))
    for weight in (None, ErpCosine()):
        loss = loss_of(TERMS[name](), clip, out, weight)
        (gradient,) = torch.autograd.grad(loss, out.video)
        assert loss > 0
        assert gradient.isfinite().all()
        assert gradient[~valid.expand_as(gradient)].abs().max() == 0
        assert gradient[0].abs().max() > 0
    alone = replace(clip, video=clip.video[:1], valid=valid[:1]), replace(out, video=out.video[:1])
    torch.testing.assert_close(loss_of(TERMS[name](), *alone, ErpCosine()) / 2, loss, rtol=1e-5, atol=0)


def typed_loss(*overrides):
    return read(tiny.compose(*overrides), TrainConfig)[0].loss


def erp(*overrides: str) -> Objective:
    """The requirement's set with stand-ins for what costs time."""
    return train.build_objective(typed_loss("loss=erp", *overrides))


class Counting(Term):
    def __init__(self):
        self.calls = 0

    def __call__(self, clip, out):
        self.calls += 1
        return L1()(clip, out)


@pytest.mark.parametrize(
    ("step", "lpips", "kl"),
    [(0, 0, 0), (200, 0, 0), (350, 0.05, 0), (500, 0.1, 0), (750, 0.1, 5e-7), (1000, 0.1, 1e-6), (5000, 0.1, 1e-6)],
)
def test_the_requirements_weights_at_its_steps(step, lpips, kl):
    objective = erp()
    expected = {"l1": 1.0, "edge": 0.5, "lpips": lpips, "kl": kl}
    assert {name: term.weight_at(step) for name, term in objective.terms.items()} == pytest.approx(expected, abs=1e-12)
    stand_in = Counting()
    objective.terms["lpips"] = replace(objective.terms["lpips"], term=stand_in)
    video = torch.rand(1, 3, 1, 16, 32)
    out = reconstruction(video)
    loss, metrics = objective(as_clip(video), out, step)
    assert stand_in.calls == (lpips > 0)
    assert ("loss/lpips" in metrics) == (lpips > 0)
    l1 = ((out.video - video).abs() * ErpCosine()(16, "cpu")[:, None]).mean()
    assert metrics["loss/l1"].item() == pytest.approx(l1.item(), rel=1e-5)
    total = l1 + 0.5 * metrics["loss/edge"] + lpips * l1 + kl * out.posterior.kl().mean()
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)


def test_a_term_at_weight_0_is_skipped_only_where_another_reaches_what_it_reaches():
    """Otherwise a part that only the late term trains would have no gradient, which the trainer refuses."""
    video = torch.rand(1, 3, 1, 16, 16)
    late = Counting()
    ramped = WeightedTerm(late, 1.0, (10, 20))
    for others, calls in (({"kl": WeightedTerm(KL(), 1.0)}, 1), ({"l1": WeightedTerm(L1(), 1.0)}, 0)):
        late.calls, out = 0, reconstruction(video)
        objective = Objective({"late": ramped, **others}, "mean")
        assert objective.needs_pixels
        objective(as_clip(video), out, 0)[0].backward()
        assert late.calls == calls
        assert out.video.grad is not None
        objective(as_clip(video), out, 15)
        assert late.calls == calls + 1
    logged = Objective({"late": replace(ramped, log=True), "l1": WeightedTerm(L1(), 1.0)}, "mean")
    assert "loss/late" in logged(as_clip(video), reconstruction(video), 0)[1]


def test_the_sets_hold_the_terms_they_name():
    sets = {name: typed_loss(f"loss={name}") for name in ("erp_decoder", "erp_best", "erp_depth", "erp_lite")}
    active = {name: {t: term.weight for t, term in s.terms.items() if term.weight} for name, s in sets.items()}
    assert active == {
        "erp_decoder": {"l1": 1.0, "edge": 0.5, "lpips": 0.1},
        "erp_best": {"l1": 1.0, "edge": 0.5, "lpips": 1.0, "cube_lpips": 0.5},
        "erp_depth": {"l1": 1.0, "edge": 0.5, "kl": 1e-6},
        "erp_lite": {"l1": 1.0, "edge": 0.5, "kl": 1e-6, "cube_l1": 0.5},
    }
    assert tuple(sets[name].pixel_weight["blend"] for name in ("erp_best", "erp_depth")) == (0.5, 1.0)
    assert {s.reduction for s in sets.values()} == {"mean"}
    assert sets["erp_depth"].terms["kl"].reduction == "sum"
    objective = train.build_objective(sets["erp_best"])
    assert objective.terms["lpips"].term.wrap == 32
    assert objective.terms["edge"].term.wrap
    assert objective.terms["edge"].term.normalize
    assert train.build_objective(typed_loss("loss=recon_kl")).pixel_weight is None


def test_settings_of_the_loss_are_checked(videos):
    overrides = ["stage=finetune", "stage.init_from=random", "loss=erp_lite", *tiny.MODEL["spatial"], *tiny.TRAINING]
    overrides += ["model=spatial", f"data.source.path={videos}", "data.height=16", "data.width=32"]
    check_training(tiny.compose(*overrides))
    for wrong, message in [
        ("loss.terms.kl.reduction=max", "loss.terms.kl.reduction=max: must be sum or mean, or null"),
        (
            "loss.pixel_weight.flor=0.1",
            "loss.pixel_weight.flor: is not an argument of .*did you mean loss.pixel_weight.floor",
        ),
        ("loss.pixel_weight.floor=2", "loss.pixel_weight.floor is 2; give a finite number from 0 to 1"),
        ("loss.pixel_weight.blend=null", "loss.pixel_weight.blend is None; give a finite number from 0 to 1"),
        ("loss.terms.cube_l1.term.size=x", "loss.terms.cube_l1.term.size is 'x'; give an integer from 1"),
        (
            "loss.terms.edge.term.normalize=no_thanks",
            "loss.terms.edge.term.normalize is 'no_thanks'; give true or false",
        ),
    ]:
        with pytest.raises(ConfigError, match=message):
            check_training(tiny.compose(*overrides, wrong))

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from tests.diffusion import toy
from vae3d.diffusion.base import Sampling
from vae3d.diffusion.build import build_network
from vae3d.diffusion.flow import RectifiedFlow
from vae3d.diffusion.gaussian import GaussianDiffusion
from vae3d.diffusion.processes import quartile_sums, training_losses

SCHEDULES, VARIANCES = ("linear", "cosine"), ("fixed_small", "fixed_large", "learned_range")


def betas_of(schedule: str, steps: int = 1000) -> np.ndarray:
    """guided-diffusion, gaussian_diffusion.get_named_beta_schedule."""
    if schedule == "linear":
        return np.linspace(0.1 / steps, 20 / steps, steps)
    left = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    return np.array([min(1 - left[i + 1] / left[i], 0.999) for i in range(steps)])


def unit(*shape: int, seed: int = 0, against: torch.Tensor | None = None) -> torch.Tensor:
    """Noise whose mean square is 1 in every sample, and orthogonal to `against`."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()
    if against is not None:
        share = (x * against).flatten(1).mean(1) / against.square().flatten(1).mean(1)
        x = x - share.view(-1, 1, 1, 1, 1) * against
    return x / x.square().flatten(1).mean(1).sqrt().view(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1000, 4000])
def test_schedules_are_guided_diffusions(schedule, steps):
    process = GaussianDiffusion(steps=steps, schedule=schedule)
    np.testing.assert_allclose(process.betas, betas_of(schedule, steps), rtol=1e-12)
    np.testing.assert_allclose(process.alphas_cumprod, np.cumprod(1 - betas_of(schedule, steps)), rtol=1e-12)


@pytest.mark.parametrize(("schedule", "share"), [("linear", 0.259), ("cosine", 0.496)])
def test_share_of_steps_with_more_signal_than_noise(schedule, share):
    """On latents of standard deviation 1; on those of a VAE that is not normalised it is another schedule."""
    kept = GaussianDiffusion(schedule=schedule).alphas_cumprod
    assert (kept / (1 - kept) > 1).double().mean() == pytest.approx(share, abs=5e-4)


@pytest.mark.parametrize(
    ("schedule", "prediction", "factor"),
    [("linear", "epsilon", 157), ("cosine", "epsilon", 20000), ("linear", "v", 1), ("cosine", "v", 1)],
)
def test_an_error_of_the_noise_is_enlarged_and_one_of_v_is_not(schedule, prediction, factor):
    """Why latents that are not clipped, as pixels are, explode with a network that predicts the noise roughly."""
    process = GaussianDiffusion(schedule=schedule, prediction=prediction)
    step = process.sampler(Sampling(steps=2)).step  # from time 999 to 0, where the latents are but for a hundredth
    x, wrong = unit(1, 1, 1, 4, 4).float(), 1e-3
    output = toy.Oracle(process)(x, torch.tensor([999]))
    right, off = (step(guess, 0, x, toy.generators(1)) for guess in (output, output + wrong))
    assert (off - right).abs().mean() / wrong == pytest.approx(factor, rel=0.03)


@pytest.mark.parametrize("steps", [1000, 250, 100, 50, 10, 7])
def test_ddpm_times_are_those_of_respacing(steps):
    expected = [round(i * 999 / (steps - 1)) for i in range(steps)]
    sampler = GaussianDiffusion().sampler(Sampling(steps=steps))
    assert sampler.timesteps == expected[::-1]
    assert sampler.t_normalised == [t / 1000 for t in expected[::-1]]


@pytest.mark.parametrize("steps", [1000, 250, 100, 50, 25, 10])
def test_ddim_times_are_those_of_ddim_respacing(steps):
    assert (
        GaussianDiffusion().sampler(Sampling(steps=steps, method="ddim")).timesteps
        == list(range(0, 1000, 1000 // steps))[::-1]
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("steps", [1000, 250, 100, 50, 10])
@pytest.mark.parametrize("clip", [None, 1.5])
def test_ddpm_steps_equal_their_formula(schedule, variance, steps, clip):
    process = GaussianDiffusion(schedule=schedule, variance=variance)
    sampler = process.sampler(Sampling(steps=steps, clip=clip))
    kept = np.cumprod(1 - betas_of(schedule))[sampler.timesteps[::-1]]
    before = np.concatenate([[1.0], kept[:-1]])
    beta = 1 - kept / before
    posterior = beta * (1 - before) / (1 - kept)
    x, eps = unit(2, 2, 1, 3, 3), unit(2, 2, 1, 3, 3, seed=1)
    v = torch.linspace(-1, 1, 36).double().view(2, 2, 1, 3, 3)
    output = (torch.cat([eps, v], 1) if variance == "learned_range" else eps).float()
    for index in {0, 1, steps // 2, steps - 2, steps - 1}:
        i = steps - 1 - index
        z0 = (x - math.sqrt(1 - kept[i]) * eps) / math.sqrt(kept[i])
        z0 = z0 if clip is None else z0.clamp(-clip, clip)
        mean = math.sqrt(before[i]) * beta[i] / (1 - kept[i]) * z0
        mean = mean + math.sqrt(1 - beta[i]) * (1 - before[i]) / (1 - kept[i]) * x
        if i:
            low, high = math.log(posterior[i]), math.log(beta[i])
            log = {"fixed_small": low, "fixed_large": high, "learned_range": (v + 1) / 2 * high + (1 - v) / 2 * low}
            noise = torch.cat([torch.randn(1, 2, 1, 3, 3, generator=g) for g in toy.generators(2, index)])
            mean = mean + torch.as_tensor(log[variance] / 2).exp() * noise
        got = sampler.step(output, index, x.float(), toy.generators(2, index))
        torch.testing.assert_close(got.double(), mean, rtol=1e-4, atol=1e-4 * float(mean.abs().max()))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("clip", [None, 1.5])
@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_ddim_steps_equal_their_formula(schedule, eta, clip, variance):
    """Equation 12 of arXiv 2010.02502; with a clip the noise is that which leads to the clipped latents."""
    sampler = GaussianDiffusion(schedule=schedule, variance=variance).sampler(Sampling(50, "ddim", eta=eta, clip=clip))
    kept = np.cumprod(1 - betas_of(schedule))
    x, eps = unit(2, 2, 1, 3, 3), unit(2, 2, 1, 3, 3, seed=1)
    output = (torch.cat([eps, eps], 1) if variance == "learned_range" else eps).float()
    for index, t in ((0, 980), (25, 480), (49, 0)):
        now, then = kept[t], kept[t - 20] if t else 1.0
        z0, noise = (x - math.sqrt(1 - now) * eps) / math.sqrt(now), eps
        if clip is not None:
            z0 = z0.clamp(-clip, clip)
            noise = (x - math.sqrt(now) * z0) / math.sqrt(1 - now)
        sigma = eta * math.sqrt((1 - then) / (1 - now) * (1 - now / then))
        expected = math.sqrt(then) * z0 + math.sqrt(1 - then - sigma**2) * noise
        expected += sigma * torch.cat([torch.randn(1, 2, 1, 3, 3, generator=g) for g in toy.generators(2)])
        got = sampler.step(output, index, x.float(), toy.generators(2))
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_steps_equal_their_formula(shift):
    sampler = RectifiedFlow().sampler(Sampling(steps=4, shift=shift))
    t = [shift * s / (1 + (shift - 1) * s) for s in (1, 0.75, 0.5, 0.25, 0)]
    np.testing.assert_allclose(sampler.t_normalised, t[:-1], rtol=1e-6)
    np.testing.assert_allclose(sampler.timesteps, [1000 * s for s in t[:-1]], rtol=1e-6)
    x, velocity = unit(1, 2, 1, 3, 3), unit(1, 2, 1, 3, 3, seed=1)
    for i in range(4):
        got = sampler.step(velocity.float(), i, x.float(), toy.generators(1))
        torch.testing.assert_close(got.double(), x + (t[i + 1] - t[i]) * velocity, rtol=1e-5, atol=1e-5)


def test_training_at_shifted_times_is_a_mean_of_the_logits():
    shifted = RectifiedFlow(logit_mean=math.log(3)).sample_timesteps(toy.generators(50))
    plain = RectifiedFlow().sample_timesteps(toy.generators(50))
    torch.testing.assert_close(shifted, 3 * plain / (1 + 2 * plain))


@pytest.mark.parametrize(
    ("process", "expected"),
    [(GaussianDiffusion(), 1.0), (GaussianDiffusion(prediction="v", schedule="cosine"), 1.0), (RectifiedFlow(), 2.0)],
)
@pytest.mark.parametrize("kind", ["unet", "transformer"])
def test_initial_loss(process, expected, kind):
    """E|noise|^2 = 1 and E|noise - z|^2 = 2 on unit latents, exactly so where no chance correlates them."""
    shape = toy.shape_of(kind)
    network = build_network(toy.TINY[kind], shape)
    z = unit(6, *shape)
    noise = unit(6, *shape, seed=1, against=z)
    z, noise = z.float(), noise.float()
    times = process.sample_timesteps(toy.generators(6))
    output = network(process.add_noise(z, noise, times), process.model_timesteps(times))
    losses = process.losses(output, z, noise, times)
    torch.testing.assert_close(losses["loss"], torch.full((6,), expected), rtol=1e-5, atol=1e-5)
    assert losses.keys() == {"loss", "mse"}


@pytest.mark.parametrize(
    "process", [GaussianDiffusion(), GaussianDiffusion(schedule="cosine", prediction="v"), RectifiedFlow()]
)
def test_the_true_prediction_has_no_loss(process):
    z, noise = unit(4, 2, 1, 3, 3).float(), unit(4, 2, 1, 3, 3, seed=1).float()
    times = process.sample_timesteps(toy.generators(4))
    if isinstance(process, RectifiedFlow):
        true = noise - z
    elif process.prediction == "epsilon":
        true = noise
    else:
        kept = process.alphas_cumprod[times].view(-1, 1, 1, 1, 1)
        true = (kept.sqrt() * noise - (1 - kept).sqrt() * z).float()
    assert process.losses(true, z, noise, times)["loss"].abs().max() < 1e-10


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("t", [0, 1, 2, 250, 999])
def test_bound_of_learned_variances_by_hand(schedule, prediction, t):
    """Both Gaussians by their textbook means and variances; at time 0 the density of z."""
    process = GaussianDiffusion(schedule=schedule, prediction=prediction, variance="learned_range")
    z, noise, output = unit(1, 2, 1, 3, 3), unit(1, 2, 1, 3, 3, seed=1), unit(1, 4, 1, 3, 3, seed=2)
    beta = betas_of(schedule)
    kept = np.cumprod(1 - beta)
    before = kept[t - 1] if t else 1.0
    signal, spread = math.sqrt(kept[t]), math.sqrt(1 - kept[t])
    x = signal * z + spread * noise
    guess, fraction = output.chunk(2, 1)
    z0 = (x - spread * guess) / signal if prediction == "epsilon" else signal * x - spread * guess
    first, second = math.sqrt(before) * beta[t] / (1 - kept[t]), math.sqrt(1 - beta[t]) * (1 - before) / (1 - kept[t])
    u = max(t, 1)
    low, high = beta[u] * (1 - kept[u - 1]) / (1 - kept[u]), beta[t]
    std = torch.exp((fraction + 1) / 4 * math.log(high) + (1 - fraction) / 4 * math.log(low))
    model = Normal(first * z0 + second * x, std)
    term = kl_divergence(Normal(first * z + second * x, math.sqrt(low)), model) if t else -model.log_prob(z)
    got = process.losses(output, z, noise, torch.tensor([t]))
    target = noise if prediction == "epsilon" else signal * noise - spread * z
    assert got["vlb"].item() == pytest.approx(term.mean().item() / math.log(2), rel=1e-6, abs=1e-9)
    assert got["loss"].item() == pytest.approx((guess - target).square().mean().item() + got["vlb"].item(), rel=1e-6)


def test_bound_is_zero_for_the_posterior_itself():
    process = GaussianDiffusion(variance="learned_range")
    z, noise = unit(3, 2, 1, 3, 3), unit(3, 2, 1, 3, 3, seed=1)
    vlb = process.losses(torch.cat([noise, -torch.ones_like(noise)], 1), z, noise, torch.tensor([1, 400, 999]))["vlb"]
    assert vlb.abs().max() < 1e-9


def test_bound_trains_the_variance_alone():
    process = GaussianDiffusion(variance="learned_range")
    z, noise, output = unit(2, 2, 1, 3, 3), unit(2, 2, 1, 3, 3, seed=1), unit(2, 4, 1, 3, 3, seed=2)
    times = torch.tensor([0, 700])
    gradients = {}
    for name in ("loss", "mse", "vlb"):
        given = output.clone().requires_grad_()
        process.losses(given, z, noise, times)[name].sum().backward()
        gradients[name] = given.grad
    assert not gradients["vlb"][:, :2].any()
    assert gradients["vlb"][:, 2:].abs().min() > 0
    torch.testing.assert_close(gradients["loss"][:, :2], gradients["mse"][:, :2])


def test_bound_is_weighed_by_the_number_of_steps():
    z, noise, output = unit(2, 2, 1, 3, 3), unit(2, 2, 1, 3, 3, seed=1), unit(2, 4, 1, 3, 3, seed=2)
    times = torch.tensor([5, 3000])
    for rescale, scale in ((True, 4.0), (False, 1.0)):
        process = GaussianDiffusion(steps=4000, variance="learned_range", rescale_learned_sigmas=rescale)
        got = process.losses(output, z, noise, times)
        torch.testing.assert_close(got["loss"], got["mse"] + scale * got["vlb"])


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_min_snr_weights(prediction):
    """min(SNR, 5) / SNR of the noise, and / (SNR + 1) of v: arXiv 2303.09556, section 3.4 and its appendix."""
    z, noise, output = unit(3, 2, 1, 3, 3), unit(3, 2, 1, 3, 3, seed=1), unit(3, 2, 1, 3, 3, seed=2)
    times = torch.tensor([0, 200, 900])
    plain = GaussianDiffusion(prediction=prediction).losses(output, z, noise, times)
    got = GaussianDiffusion(prediction=prediction, min_snr=5.0).losses(output, z, noise, times)
    kept = np.cumprod(1 - betas_of("linear"))[times]
    snr = kept / (1 - kept)
    weight = np.minimum(snr, 5) / (snr + (prediction == "v"))
    np.testing.assert_allclose(got["loss"], weight * plain["mse"].numpy(), rtol=1e-9)
    assert torch.equal(got["mse"], plain["mse"])


def test_times_are_spread_as_they_should():
    times = GaussianDiffusion(steps=40).sample_timesteps(toy.generators(4000))
    assert times.dtype == torch.int64
    assert torch.bincount(times, minlength=40).min() > 60
    assert torch.bincount(times).shape == (40,)
    logits = torch.logit(RectifiedFlow(logit_mean=0.5, logit_std=2.0).sample_timesteps(toy.generators(4000)).double())
    assert logits.mean() == pytest.approx(0.5, abs=0.1)
    assert logits.std() == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("process", [GaussianDiffusion(variance="learned_range"), RectifiedFlow()])
def test_training_losses_do_not_depend_on_the_batch(process):
    network = toy.shaken(build_network(toy.TINY["transformer"] | {"learned_sigma": process.learned_sigma}, toy.CLIP))
    z = unit(3, *toy.CLIP).float()
    whole = training_losses(network, process, z, toy.generators(3))
    alone = training_losses(network, process, z[2:], toy.generators(1, 2))
    assert whole.keys() == {"loss", "mse", "t_normalised"} | ({"vlb"} if process.learned_sigma else set())
    for name, values in whole.items():
        torch.testing.assert_close(values[2:], alone[name], rtol=1e-4, atol=1e-5)
    assert ((whole["t_normalised"] >= 0) & (whole["t_normalised"] < 1)).all()


def test_losses_by_quartile():
    levels = torch.tensor([0.0, 0.2, 0.25, 0.99, 0.5, 1.0])
    values = torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0, 11.0])
    assert quartile_sums(values, levels).tolist() == [[4, 2], [5, 1], [9, 1], [18, 2]]
    parts = quartile_sums(values[:2], levels[:2]) + quartile_sums(values[2:], levels[2:])
    assert torch.equal(parts, quartile_sums(values, levels))


def test_a_third_of_unit_latents_lies_where_guided_diffusion_sees_an_edge():
    """Why the bound at time 0 is that of a continuous Gaussian."""
    beyond = 2 * (1 - Normal(0.0, 1.0).cdf(torch.tensor(0.999)))
    assert beyond == pytest.approx(0.318, abs=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [(lambda: GaussianDiffusion(schedule="sqrt"), "schedule is 'sqrt'; give one of linear, cosine"),
     (lambda: GaussianDiffusion(prediction="x0"), "prediction is 'x0'; give one of epsilon, v"),
     (lambda: GaussianDiffusion(variance="learned"), "variance is 'learned'; give one of fixed_small, fixed_large, learned_range"),
     (lambda: GaussianDiffusion(steps=20), "steps is 20; .* at least 21"),
     (lambda: GaussianDiffusion(min_snr=0), "min_snr is 0"),
     (lambda: RectifiedFlow(logit_std=0), "logit_std is 0"),
     (lambda: Sampling(steps=0), "steps is 0"),
     (lambda: Sampling(clip=-1), "clip is -1"),
     (lambda: Sampling(interval=(0.5, 0.2)), "interval is"),
     (lambda: Sampling(eta=2), "eta is 2"),
     (lambda: Sampling(shift=0), "shift is 0"),
     (lambda: GaussianDiffusion().sampler(Sampling(method="euler")), "method is 'euler'; use ddpm or ddim"),
     (lambda: RectifiedFlow().sampler(Sampling(method="ddim")), "use euler"),
     (lambda: GaussianDiffusion().sampler(Sampling(steps=1)), r"steps is 1; ddpm cannot divide 1000 .* 2, 3, 4"),
     (lambda: GaussianDiffusion().sampler(Sampling(steps=1001)), "998, 999, 1000"),
     (lambda: GaussianDiffusion().sampler(Sampling(steps=30, method="ddim")), "steps is 30; ddim .* 20, 25, 40"),
     (lambda: GaussianDiffusion().sampler(Sampling(eta=0.5)), "ddpm has no eta"),
     (lambda: GaussianDiffusion().sampler(Sampling(shift=3)), "Gaussian diffusion has no shift"),
     (lambda: RectifiedFlow().sampler(Sampling(eta=0.5)), "rectified flow has no eta")],
)  # fmt: skip
def test_impossible_processes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("process", [GaussianDiffusion(), GaussianDiffusion(variance="learned_range"), RectifiedFlow()])
def test_another_number_of_channels_is_refused(process):
    z = unit(1, 2, 1, 3, 3)
    output = torch.cat([z] * (1 if process.learned_sigma else 2), 1)
    told = f"learned_sigma={str(process.learned_sigma).lower()}"
    with pytest.raises(ValueError, match=told):
        process.losses(output, z, z, process.sample_timesteps(toy.generators(1)))
    with pytest.raises(ValueError, match=told):
        process.sampler(Sampling(steps=10)).step(output, 0, z, toy.generators(1))

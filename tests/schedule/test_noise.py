"""Noise levels against the definition u = sigma / (alpha + sigma), and against each other."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch

from diffusion_tokred.errors import UnsupportedError
from diffusion_tokred.schedule import log_snr, noise_levels, noise_ratio


def ready(scheduler, steps=50, **kw):
    scheduler.set_timesteps(steps, **kw)
    return scheduler


def u_of_abar(abar):
    return math.sqrt(1 - abar) / (math.sqrt(abar) + math.sqrt(1 - abar))


def test_ddim_by_hand():
    scheduler = ready(diffusers.DDIMScheduler(), 10)
    levels = noise_levels(scheduler)
    assert all(type(u) is float for u in levels) and len(levels) == 10
    assert levels == pytest.approx(
        [u_of_abar(float(scheduler.alphas_cumprod[t])) for t in scheduler.timesteps], abs=1e-7
    )
    assert levels == noise_levels(scheduler, scheduler.timesteps.tolist())


@pytest.mark.parametrize(
    "make",
    [
        diffusers.DDIMScheduler,
        diffusers.DDPMScheduler,
        diffusers.EulerDiscreteScheduler,
        diffusers.EulerAncestralDiscreteScheduler,
        diffusers.LMSDiscreteScheduler,
        diffusers.DPMSolverMultistepScheduler,
        diffusers.DPMSolverSinglestepScheduler,
        diffusers.UniPCMultistepScheduler,
        diffusers.DEISMultistepScheduler,
        diffusers.PNDMScheduler,
        diffusers.TCDScheduler,
        diffusers.LCMScheduler,
        diffusers.HeunDiscreteScheduler,
        diffusers.KDPM2DiscreteScheduler,
    ],
)
def test_equal_noise_at_equal_timesteps(make):
    """The same training noise, 50 steps: at a timestep t all schedulers have DDIM's level for t, whatever their
    tables.
    """
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    abar = diffusers.DDIMScheduler(**betas).alphas_cumprod.double().numpy()
    scheduler = ready(make(**betas), 50)
    levels, times = noise_levels(scheduler), scheduler.timesteps.double().numpy()
    if scheduler.order == 2:
        levels, times = levels[::2], times[::2]
    alpha, sigma = np.interp(times, np.arange(1000), abar**0.5), np.interp(times, np.arange(1000), (1 - abar) ** 0.5)
    np.testing.assert_allclose(levels, sigma / (alpha + sigma), atol=2e-3)
    assert all(a > b for a, b in itertools.pairwise(levels) if a != b) and levels[0] > levels[-1]


def test_levels_do_not_depend_on_the_number_of_steps():
    """One curve u(t): 10 steps are a subset of 50 (trailing spacing)."""
    few, many = (ready(diffusers.DDIMScheduler(timestep_spacing="trailing"), n) for n in (10, 50))
    curve = dict(zip(many.timesteps.tolist(), noise_levels(many), strict=True))
    assert noise_levels(few) == [curve[t] for t in few.timesteps.tolist()]


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"])
def test_pairs_of_second_order_schedulers(name):
    """Both evaluations have the level of the first, which is the Euler scheduler's for the same step."""
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler = ready(getattr(diffusers, name)(**betas), 8)
    levels = noise_levels(scheduler)
    assert len(levels) == len(scheduler.timesteps) == 15
    assert levels[0:14:2] == levels[1:14:2]
    euler = noise_levels(ready(diffusers.EulerDiscreteScheduler(**betas), 8))
    assert levels[::2] == pytest.approx(euler, abs=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_is_its_sigma(shift):
    euler = ready(diffusers.FlowMatchEulerDiscreteScheduler(shift=shift), 6)
    assert (
        noise_levels(euler) == euler.sigmas[:-1].tolist() == pytest.approx((euler.timesteps / 1000).tolist(), abs=1e-6)
    )
    assert noise_levels(euler)[0] == 1.0
    heun = ready(diffusers.FlowMatchHeunDiscreteScheduler(shift=shift), 6)
    u = noise_levels(heun)
    assert u[0:10:2] == u[1:10:2] == pytest.approx((heun.timesteps / 1000)[0:10:2].tolist(), abs=1e-6)
    lcm = ready(diffusers.FlowMatchLCMScheduler(shift=shift), 6)
    assert noise_levels(lcm) == lcm.sigmas[:-1].tolist()
    for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"):
        solver = getattr(diffusers, name)(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift)
        ready(solver, 6)
        assert noise_levels(solver) == pytest.approx((solver.timesteps / 1000).tolist(), abs=2e-3)


def test_inverted_sigmas():
    """Mochi's table is the share of signal."""
    plain, mochi = (ready(diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=i), 5) for i in (False, True))
    assert mochi.sigmas[0] == 0
    assert noise_levels(mochi) == pytest.approx(noise_levels(plain), abs=1e-6)


def test_karras_sigmas_and_edm():
    karras = ready(diffusers.EulerDiscreteScheduler(use_karras_sigmas=True), 7)
    edm = ready(diffusers.EDMEulerScheduler(sigma_max=80.0), 7)
    for scheduler in (karras, edm):
        sigma = scheduler.sigmas[:-1].double()
        assert noise_levels(scheduler) == pytest.approx((sigma / (1 + sigma)).tolist(), abs=1e-7)
    assert noise_levels(edm)[0] == pytest.approx(80 / 81, abs=1e-4)


def test_trigflow():
    scheduler = ready(diffusers.SCMScheduler(), 4, intermediate_timesteps=None)
    t = scheduler.timesteps.double()
    expected = t.sin() / (t.sin() + t.cos())
    assert noise_levels(scheduler) == pytest.approx(expected.clamp(0, 1).tolist(), abs=1e-9)
    assert noise_levels(scheduler)[-1] == 0


def test_zero_terminal_snr_stays_finite():
    scheduler = ready(diffusers.DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"), 4)
    u = noise_levels(scheduler)[0]
    assert u == pytest.approx(1, abs=1e-3) and math.isfinite(log_snr(u)) and math.isfinite(noise_ratio(u))


def test_flow_schedulers_of_other_names_and_plain_objects():
    """Nothing is required but the tables: here a flow table without any flag, then with what EDM's have."""
    table = SimpleNamespace(timesteps=torch.tensor([1000.0, 500.0]), sigmas=torch.tensor([1.0, 0.5, 0.0]))
    assert noise_levels(table) == [1.0, 0.5]
    table.init_noise_sigma = 1.0
    assert noise_levels(table) == [0.5, pytest.approx(1 / 3)]
    assert noise_levels(SimpleNamespace(timesteps=[1], alphas_cumprod=[1.0, 0.5])) == [0.5]


def test_between_training_timesteps():
    table = SimpleNamespace(timesteps=[0.5, 1.0], alphas_cumprod=[1.0, 0.5])
    assert noise_levels(table) == [0.25, 0.5]


@pytest.mark.parametrize(
    ("scheduler", "says"),
    [
        (ready(diffusers.IPNDMScheduler(), 4), "IPNDMScheduler cannot be read: it needs `sigmas`"),
        (SimpleNamespace(timesteps=torch.arange(5), sigmas=torch.ones(2000)), "found 2000"),
        (SimpleNamespace(timesteps=None), "set_timesteps"),
        (SimpleNamespace(), "set_timesteps"),
    ],
)
def test_refusals_say_what_is_missing(scheduler, says):
    with pytest.raises(UnsupportedError, match=says):
        noise_levels(scheduler)


def test_log_snr_and_ratio():
    assert log_snr(0.5) == 0 and noise_ratio(0.5) == 1
    assert log_snr(0.25) == pytest.approx(2 * math.log(3))
    for u in (0.0, 1e-9, 0.3, 0.999, 1.0):
        assert math.isfinite(log_snr(u)) and log_snr(u) == pytest.approx(-2 * math.log(noise_ratio(u)))
    assert log_snr(0.0) == pytest.approx(-log_snr(1.0)) == pytest.approx(27.631, abs=1e-3)
    assert math.isnan(log_snr(math.nan)) and math.isnan(noise_ratio(math.nan))

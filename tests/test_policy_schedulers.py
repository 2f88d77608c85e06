"""One policy, many schedulers: the ratio at a noise level is the same, whatever the steps, the shift or the strength.

Noise levels are worked out here by hand, from betas and shifts; nothing of ours is asked for them.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
)

import diffusion_tokred as tokred
from diffusion_tokred.testing import tiny

CHANGES = (0.85, 0.5, 0.2)
POLICY = tokred.Policy.stepwise([0.0, 0.6, 0.4, 0.2], at=CHANGES)
BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
VP = {
    "DDIM-50": (DDIMScheduler(clip_sample=False, steps_offset=1, **BETAS), 50),
    "DPM++-20": (DPMSolverMultistepScheduler(**BETAS), 20),
    "Heun-10": (HeunDiscreteScheduler(**BETAS), 10),
    "LCM-4": (LCMScheduler(**BETAS), 4),
}
FLOW = {
    **{f"Euler-28, shift {shift}": (FlowMatchEulerDiscreteScheduler(shift=shift), 28) for shift in (1.0, 3.0, 7.0)},
    "Euler-8, shift 3.0": (FlowMatchEulerDiscreteScheduler(shift=3.0), 8),
    "flow Heun-10": (FlowMatchHeunDiscreteScheduler(shift=3.0), 10),
}
Plan = list[tuple[float, float]]  # noise level and ratio of each step


def level_of(scheduler: Any, t: float) -> float:
    """sigma / (alpha + sigma) at a timestep."""
    if "FlowMatch" in type(scheduler).__name__:
        return t / 1000
    betas = np.linspace(BETAS["beta_start"] ** 0.5, BETAS["beta_end"] ** 0.5, 1000) ** 2
    abar = np.cumprod(1 - betas)[round(t)]
    return float(np.sqrt(1 - abar) / (np.sqrt(abar) + np.sqrt(1 - abar)))


def ratio_at(u: float) -> float:
    return 0.0 if u > 0.85 else 0.6 if u > 0.5 else 0.4 if u > 0.2 else 0.2


def plan(name: str) -> Plan:
    scheduler, steps = (VP | FLOW)[name]
    pipe = tiny.sd(scheduler=scheduler) if name in VP else tiny.sd3(scheduler=scheduler)
    found = tokred.explain(pipe, method="tome", policy=POLICY, num_inference_steps=steps).steps
    scheduler.set_timesteps(steps)
    levels = [level_of(scheduler, float(t)) for t in scheduler.timesteps]
    if "Heun" in name:  # both evaluations of a step go by its own level
        levels = [levels[i - i % 2] for i in range(len(levels))]
    assert [step.u for step in found] == pytest.approx(levels, abs=2e-3)
    assert [step.ratio for step in found] == [ratio_at(step.u) for step in found]
    assert len({step.ratio for step in found}) > 1
    return [(step.u, step.ratio) for step in found]


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    return {name: plan(name) for name in VP | FLOW}


def test_the_same_ratio_at_the_same_noise(plans: dict[str, Plan]) -> None:
    compared = 0
    for first, second in itertools.combinations(plans.values(), 2):
        for u, ratio in first:
            near, other = min(second, key=lambda step: abs(step[0] - u))
            if not any(min(u, near) <= change <= max(u, near) for change in CHANGES):
                assert ratio == other
                compared += 1
    assert compared > 500


def test_steps_would_not_have_told(plans: dict[str, Plan]) -> None:
    """With shift 3 a run is longer in the noise: the same step of 28 has another ratio than with shift 1."""
    straight, shifted = plans["Euler-28, shift 1.0"], plans["Euler-28, shift 3.0"]
    assert [ratio for _, ratio in straight] != [ratio for _, ratio in shifted]
    assert sum(ratio == 0 for _, ratio in shifted) >= 2 * sum(ratio == 0 for _, ratio in straight)
    assert all(plans[name][0][1] == 0 for name in plans), "pure noise: everything is computed, LCM's first step too"


@pytest.mark.parametrize("name", ["DDIM-50", "Euler-28, shift 3.0"])
def test_img2img(name: str, plans: dict[str, Plan]) -> None:
    """At strength 0.4 a run is the end of the whole one: each of its steps has that one's noise and ratio."""
    scheduler, steps = (VP | FLOW)[name]
    pipe = tiny.img2img(tiny.sd(scheduler=scheduler) if name in VP else tiny.sd3(scheduler=scheduler))
    with tokred.patched(pipe, method="tome", policy=POLICY):
        tiny.run(pipe, steps=steps, strength=0.4)
    found = [(step.u, step.ratio) for step in tokred.report(pipe).steps]
    assert abs(len(found) - 0.4 * steps) < 1
    whole = plans[name][-len(found) :]
    assert [u for u, _ in found] == pytest.approx([u for u, _ in whole])
    assert [ratio for _, ratio in found] == [ratio for _, ratio in whole]
    assert len({ratio for _, ratio in found}) > 1 and found[0][1] > 0

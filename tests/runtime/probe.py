"""What the tracker's tests share: schedulers, a probe, and what is known of a run without the tracker."""

from __future__ import annotations

import math
import threading

import diffusers
import numpy as np
import pytest
import torch

from diffusion_tokred.runtime.tracker import StepInfo, Tracker

VP = {
    "ddim": lambda: diffusers.DDIMScheduler(),
    "ddim-zsnr": lambda: diffusers.DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"),
    "ddpm": lambda: diffusers.DDPMScheduler(),
    "pndm": lambda: diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
    "pndm-prk": lambda: diffusers.PNDMScheduler(),
    "euler": lambda: diffusers.EulerDiscreteScheduler(),
    "euler-karras": lambda: diffusers.EulerDiscreteScheduler(use_karras_sigmas=True),
    "euler-a": lambda: diffusers.EulerAncestralDiscreteScheduler(),
    "lms": lambda: diffusers.LMSDiscreteScheduler(),
    "heun": lambda: diffusers.HeunDiscreteScheduler(),
    "kdpm2": lambda: diffusers.KDPM2DiscreteScheduler(),
    "kdpm2-a": lambda: diffusers.KDPM2AncestralDiscreteScheduler(),
    "dpm-multi": lambda: diffusers.DPMSolverMultistepScheduler(),
    "dpm-multi-karras": lambda: diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True),
    "dpm-single": lambda: diffusers.DPMSolverSinglestepScheduler(),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(),
    "deis": lambda: diffusers.DEISMultistepScheduler(),
    "lcm": lambda: diffusers.LCMScheduler(),
    "tcd": lambda: diffusers.TCDScheduler(),
}
FLOW = {
    "flow-euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow-heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(),
    "flow-lcm": lambda: diffusers.FlowMatchLCMScheduler(),
    "flow-dpm": lambda: diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    ),
    "flow-unipc": lambda: diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
}
SCHEDULERS = VP | FLOW
NO_IMG2IMG = {"flow-dpm", "flow-unipc"}  # upstream: they have no `scale_noise`
SECOND_ORDER = {"heun", "kdpm2", "kdpm2-a", "flow-heun"}


class Probe:
    """A minimal root hook: the tracker's answers, and beside them the timestep each call received."""

    def __init__(self, model: torch.nn.Module, stub: bool = True) -> None:
        self.tracker, self.model, self.infos, self.received = Tracker(model), model, [], []
        model.register_forward_pre_hook(self._hook, with_kwargs=True)
        if stub:
            model.forward = lambda *args, **kwargs: ((args[0] if args else kwargs["hidden_states"]) * 0.1,)

    def _hook(self, model, args, kwargs):
        self.infos.append(self.tracker.step(args, kwargs))
        time = kwargs["timestep"] if "timestep" in kwargs else args[1]
        self.received.append(float(torch.as_tensor(time).flatten()[0]))

    def take(self) -> list[StepInfo]:
        infos, self.infos, self.received = self.infos, [], []
        return infos


def expected_u(name: str, scheduler, received: list[float]) -> list[float]:
    """From the definition, at the timestep received."""
    if name in FLOW:
        u = [t / 1000 for t in received]
    else:
        abar = scheduler.alphas_cumprod.double().numpy()
        alpha, sigma = (
            np.interp(received, np.arange(1000), abar) ** 0.5,
            np.interp(received, np.arange(1000), 1 - abar) ** 0.5,
        )
        u = list(sigma / (alpha + sigma))
    return [u[i - i % 2] for i in range(len(u))] if name in SECOND_ORDER else u


def check_run(
    infos: list[StepInfo], name: str, scheduler, received, *, begin=0, keys=("0",), batch, halves, run
) -> None:
    """The whole sequence of a run: `keys` are the passes of every step."""
    steps, first = len(scheduler.timesteps) - begin, received[:: len(keys)]
    assert len(infos) == steps * len(keys)
    # Timesteps of some schedulers are rounded to whole numbers, their sigmas are not.
    np.testing.assert_allclose([i.u for i in infos[:: len(keys)]], expected_u(name, scheduler, first), atol=4e-3)
    for k, info in enumerate(infos):
        index = k // len(keys)
        assert (info.run, info.index, info.total, info.pass_key) == (run, index, steps, keys[k % len(keys)])
        assert (info.batch, info.halves) == (batch, halves)
        assert info.new_run == (k == 0) and info.new_step == (k % len(keys) == 0)
        assert info.phase == ((begin + index) % 2 if name in SECOND_ORDER else 0)
        assert info.progress == pytest.approx(index / steps)
        assert info.timestep == pytest.approx(received[k])
        assert info.u == infos[index * len(keys)].u and 0 < info.u <= 1
        assert info.log_snr == pytest.approx(-2 * math.log(info.sigma))


def in_thread(function):
    """Run it in another thread; return what it raised."""
    raised = []

    def work():
        try:
            function()
        except BaseException as error:
            raised.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    worker.join(30)
    assert not worker.is_alive()
    return raised[0] if raised else None


def fresh(pipes, name):
    """The pipelines with a new scheduler, and a probe that begins anew."""
    txt, img, probe = pipes
    txt.scheduler = img.scheduler = SCHEDULERS[name]()
    probe.tracker.finish()
    probe.tracker._runs = 0
    probe.take()
    return txt, img, probe


def pipes_for(name, request):
    return fresh(request.getfixturevalue("sd3" if name in FLOW else "sd"), name)

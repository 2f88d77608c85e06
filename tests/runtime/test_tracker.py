"""The tracker against what is known independently: positions from how diffusers slices its timesteps, noise from the
definition at the timestep that the denoiser really received. Denoisers are stubs here (their forward returns 0.1 x),
except in `test_every_builder`.
"""

from __future__ import annotations

import math
import threading

import diffusers
import pytest
import torch

from diffusion_tokred.errors import StateError
from diffusion_tokred.testing import tiny
from tests.runtime.probe import (
    FLOW,
    NO_IMG2IMG,
    SCHEDULERS,
    SECOND_ORDER,
    VP,
    Probe,
    check_run,
    fresh,
    in_thread,
    pipes_for,
)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_txt2img(name, request):
    """Runs in a row with batched guidance, without, and with another number of steps and samples."""
    txt, _, probe = pipes_for(name, request)
    for run, (steps, batch, halves) in enumerate([(5, 1, 2), (5, 1, 2), (5, 1, 1), (4, 2, 2)]):
        tiny.run(txt, steps=steps, guidance=4.0 if halves == 2 else 1.0, batch=batch)
        received = probe.received
        check_run(probe.take(), name, txt.scheduler, received, batch=batch * halves, halves=halves, run=run)


@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("name", [n for n in SCHEDULERS if n not in NO_IMG2IMG])
def test_img2img(name, strength, request):
    """Index and total are the run's own; noise is absolute."""
    _, img, probe = pipes_for(name, request)
    skipped = int(7 - 7 * strength) if name in FLOW else 7 - int(7 * strength)  # SD3's and SD's rounding
    begin = skipped * (2 if name in SECOND_ORDER else 1)
    for run, halves in enumerate((2, 1)):
        tiny.run(img, steps=7, guidance=4.0 if halves == 2 else 1.0, strength=strength)
        received = probe.received
        check_run(probe.take(), name, img.scheduler, received, begin=begin, batch=halves, halves=halves, run=run)


@pytest.mark.parametrize(("passes", "give"), [(2, "view"), (3, "view"), (2, "copy"), (3, "number")])
@pytest.mark.parametrize("name", VP)
def test_hand_written_loop_with_separate_passes(name, passes, give, sd):
    """One row each, so nothing but the order tells the passes apart; a copied or plain timestep hides the position."""
    txt, _, probe = fresh(sd, name)
    scheduler, unet = txt.scheduler, txt.unet
    for run in range(2):
        scheduler.set_timesteps(4)
        latents = torch.randn(1, 4, 8, 8)
        for t in scheduler.timesteps:
            scheduler.scale_model_input(latents, t)
            given = {"view": t, "copy": t.clone(), "number": t.item()}[give]
            for _ in range(passes):
                unet(latents, given, None)
            latents = scheduler.step(latents * 0.1, t, latents).prev_sample
        keys = tuple("012"[:passes])
        received = probe.received
        check_run(probe.take(), name, scheduler, received, keys=keys, batch=1, halves=1, run=run)


def test_begin_in_the_middle_without_being_told(sd):
    """A hand-written img2img loop that never calls `set_begin_index`."""
    for name in ("ddim", "euler", "pndm", "dpm-multi"):
        txt, _, probe = fresh(sd, name)
        scheduler = txt.scheduler
        scheduler.set_timesteps(6)
        latents = torch.randn(1, 4, 8, 8)
        for t in scheduler.timesteps[2:]:
            scheduler.scale_model_input(latents, t)
            txt.unet(latents, t, None)
            latents = scheduler.step(latents * 0.1, t, latents).prev_sample
        received = probe.received
        check_run(probe.take(), name, scheduler, received, begin=2, batch=1, halves=1, run=0)


def test_batched_guidance_of_two_and_three(sd):
    txt, _, probe = fresh(sd, "ddim")
    scheduler = txt.scheduler
    scheduler.set_timesteps(3)
    latents = torch.randn(2, 4, 8, 8)
    for t in scheduler.timesteps:
        txt.unet(torch.cat([latents] * 2), t, None)
        txt.unet(torch.cat([latents] * 3), t, None)
        txt.unet(latents[:1], t, None)
    assert [(i.batch, i.halves, i.pass_key) for i in probe.take()] == [(4, 2, "0"), (6, 3, "1"), (1, 1, "2")] * 3


def test_cache_contexts_name_the_passes(sd):
    txt, _, probe = fresh(sd, "euler")
    scheduler, tracker = txt.scheduler, probe.tracker
    scheduler.set_timesteps(3)
    for order in (("cond", "uncond"), ("uncond", "cond"), ("cond", "cond", None)):
        t = scheduler.timesteps[scheduler.step_index or 0]
        latents = scheduler.scale_model_input(torch.randn(1, 4, 8, 8), t)
        for tracker.context in order:
            txt.unet(latents, t, None)
        tracker.context = None
        scheduler.step(latents, t, latents)
    keys = [i.pass_key for i in probe.infos]
    assert keys == ["cond", "uncond", "uncond", "cond", "cond", "cond#1", "2"]
    assert [i.index for i in probe.infos] == [0, 0, 1, 1, 2, 2, 2]
    assert [i.new_step for i in probe.take()] == [True, False, True, False, True, False, False]
    tracker.context = "cond"
    seen = []
    worker = threading.Thread(target=lambda: seen.append(tracker.context))
    worker.start(), worker.join()
    assert seen == [None], "a context belongs to a thread"
    tracker.context = None


def test_flux_passes_and_shift():
    """Flux divides the timestep by 1000, so nothing but `step_index` tells the position; dynamic shifting moves the
    noise.
    """
    pipe = tiny.flux()
    probe = Probe(pipe.transformer)
    for run in range(2):
        tiny.run(pipe, steps=4)
        assert [i.u for i in probe.infos] == pytest.approx(probe.received, abs=1e-6)
        assert [(i.run, i.index, i.total, i.pass_key, i.halves) for i in probe.take()] == [
            (run, k, 4, key, 1) for k in range(4) for key in "01"
        ]
    img = tiny.img2img(pipe)
    tiny.run(img, steps=5, strength=0.6, guidance=1.0)
    assert [i.u for i in probe.infos] == pytest.approx(probe.received, abs=1e-6)
    assert [(i.index, i.total) for i in probe.take()] == [(0, 3), (1, 3), (2, 3)]


def test_sd3_skip_layer_guidance_adds_an_unpaired_pass(sd3):
    txt, _, probe = fresh(sd3, "flow-euler")
    tiny.run(
        txt, steps=6, skip_guidance_layers=[1], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=0.5, batch=2
    )
    infos = probe.take()
    assert [(i.pass_key, i.batch, i.halves) for i in infos if i.index == 1] == [("0", 4, 2), ("1", 2, 1)]
    assert [(i.pass_key, i.batch, i.halves) for i in infos if i.index == 5] == [("0", 4, 2)]


def test_guidance_that_stops_mid_run(sd):
    txt, _, probe = fresh(sd, "ddim")

    def cut(pipe, step, t, kwargs):  # as diffusers' SDCFGCutoffCallback
        if step == 1:
            pipe._guidance_scale = 0.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"][-1:]
        return kwargs

    tiny.run(txt, steps=4, callback_on_step_end=cut, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    got = [(i.run, i.index, i.total, i.batch, i.halves, i.pass_key) for i in probe.take()]
    assert got == [(0, 0, 4, 2, 2, "0"), (0, 1, 4, 2, 2, "0"), (0, 2, 4, 1, 1, "0"), (0, 3, 4, 1, 1, "0")]


@pytest.mark.parametrize("name", ["ddim", "pndm", "heun", "dpm-multi"])
def test_exception_interrupt_and_other_size(name, sd):
    txt, _, probe = fresh(sd, name)

    class Stop(Exception):
        pass

    def at(step, act):
        def callback(pipe, i, t, kwargs):
            if i == step:
                act(pipe)
            return kwargs

        return callback

    def fail(pipe):
        raise Stop

    with pytest.raises(Stop):
        tiny.run(txt, steps=6, callback_on_step_end=at(2, fail))
    assert len(probe.take()) == 3
    tiny.run(txt, steps=6, callback_on_step_end=at(3, lambda pipe: setattr(pipe, "_interrupt", True)))
    infos = probe.take()
    assert len(infos) == 4 and infos[0].new_run and {i.run for i in infos} == {1}
    tiny.run(txt, steps=3, height=48, width=16)
    received = probe.received
    check_run(probe.take(), name, txt.scheduler, received, batch=2, halves=2, run=2)


def test_sdxl_stops_before_the_end_of_its_timesteps():
    pipe = tiny.sdxl()
    probe = Probe(pipe.unet)
    tiny.run(pipe, steps=10, denoising_end=0.6)
    infos = probe.take()
    assert [(i.index, i.total) for i in infos] == [(k, len(infos)) for k in range(len(infos))] and len(infos) < 10


def test_two_pipelines_share_a_denoiser(sd):
    """Interleaved run by run, with different schedulers, and with the same one (`from_pipe`)."""
    txt, _, probe = fresh(sd, "pndm")
    other = diffusers.StableDiffusionPipeline(**(txt.components | {"scheduler": SCHEDULERS["heun"]()}))
    third = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(txt)
    for pipe in (other, third):
        pipe.set_progress_bar_config(disable=True)
    probe.tracker.watch(txt), probe.tracker.watch(other)
    for run in range(6):
        pipe, name, kw, begin = [(txt, "pndm", {}, 0), (other, "heun", {}, 0), (third, "pndm", {"strength": 0.5}, 2)][
            run % 3
        ]
        tiny.run(pipe, steps=4, **kw)
        received = probe.received
        check_run(probe.take(), name, pipe.scheduler, received, begin=begin, batch=2, halves=2, run=run)


def test_a_run_inside_a_callback_of_another(sd):
    txt, _, probe = fresh(sd, "ddim")
    other = diffusers.StableDiffusionPipeline(**(txt.components | {"scheduler": SCHEDULERS["euler"]()}))
    other.set_progress_bar_config(disable=True)

    def preview(pipe, i, t, kwargs):
        if i == 1:
            tiny.run(other, steps=2)
        return kwargs

    tiny.run(txt, steps=4, callback_on_step_end=preview)
    got = [(i.run, i.index, i.new_run) for i in probe.take()]
    assert got == [(0, 0, True), (0, 1, False), (1, 0, True), (1, 1, False), (2, 0, True), (2, 1, False)]


def test_a_loop_run_again_without_setting_timesteps(sd):
    txt, _, probe = fresh(sd, "ddim")
    scheduler = txt.scheduler
    scheduler.set_timesteps(3)
    for _ in range(2):
        for t in scheduler.timesteps:
            txt.unet(torch.randn(1, 4, 8, 8), t, None)
    assert [(i.run, i.index) for i in probe.take()] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_finish(sd):
    txt, _, probe = fresh(sd, "ddim")
    scheduler, tracker = txt.scheduler, probe.tracker
    assert not tracker.finish()
    scheduler.set_timesteps(2)
    for _ in range(2):
        txt.unet(torch.randn(1, 4, 8, 8), scheduler.timesteps[0], None)
        assert tracker.finish() and not tracker.finish()
    assert [(i.run, i.new_run, i.pass_key) for i in probe.take()] == [(0, True, "0"), (1, True, "0")]
    assert tracker._run is None


def test_modular_pipeline(sd):
    """Its blocks get `components`, the guider makes separate passes, and the frame that calls the denoiser ends with
    every step: a second thread must be refused between the steps too. Nothing tells the end of a run either.
    """
    denoise = pytest.importorskip("diffusers.modular_pipelines.stable_diffusion_xl.denoise")
    txt, _, probe = fresh(sd, "ddim")
    pipe = denoise.StableDiffusionXLDenoiseStep().init_pipeline()
    pipe.set_progress_bar_config(disable=True)
    scheduler = SCHEDULERS["euler"]()
    pipe.update_components(unet=txt.unet, scheduler=scheduler)
    errors, step = [], scheduler.step

    def intruding_step(*args, **kwargs):
        errors.append(in_thread(lambda: txt.unet(torch.zeros(1, 4, 8, 8), 3, None)))
        return step(*args, **kwargs)

    text = {name: torch.randn(2, 7, 32) for name in ("prompt_embeds", "negative_prompt_embeds")}
    for run in range(2):
        scheduler.set_timesteps(4)
        scheduler.step = intruding_step if run == 0 else step
        pipe(timesteps=scheduler.timesteps, num_inference_steps=4, latents=torch.randn(2, 4, 16, 16), **text)
        received = probe.received
        check_run(probe.take(), "euler", scheduler, received, keys=("0", "1"), batch=2, halves=1, run=run)
    assert [type(error) for error in errors] == [StateError] * 4


def test_several_schedulers_under_other_names(sd):
    """UnCLIP's pipelines have no `scheduler`; the timestep tells which of theirs is at work."""
    txt, _, probe = fresh(sd, "ddim")

    class Two:
        def __init__(self):
            self.prior_scheduler, self.decoder_scheduler = SCHEDULERS["ddpm"](), SCHEDULERS["euler"]()

        def __call__(self):
            for scheduler in (self.prior_scheduler, self.decoder_scheduler):
                scheduler.set_timesteps(3)
            for t in self.decoder_scheduler.timesteps:
                txt.unet(torch.zeros(1, 4, 8, 8), t, None)

    pipe = Two()
    pipe()
    received = probe.received
    check_run(probe.take(), "euler", pipe.decoder_scheduler, received, batch=1, halves=1, run=0)


def test_bare_calls(sd):
    txt, _, probe = fresh(sd, "ddim")
    unet, tracker = txt.unet, probe.tracker
    del txt
    x = torch.zeros(2, 4, 8, 8)
    for t in (5, torch.tensor(7)):
        unet(x, t, None)
    tracker.finish()
    for tracker.context in ("cond", "uncond", "cond", "uncond"):
        unet(x, 5, None)
    tracker.context = None
    infos = probe.take()
    assert [(i.run, i.index, i.pass_key) for i in infos] == [
        (0, 0, "0"), (0, 1, "0"), (1, 0, "cond"), (1, 0, "uncond"), (1, 1, "cond"), (1, 1, "uncond")
    ]  # fmt: skip
    for info in infos:
        assert info.total is None and info.batch == 2 and info.halves == 1
        assert all(math.isnan(x) for x in (info.u, info.sigma, info.log_snr, info.timestep, info.progress))
    tracker.finish()
    unet(x, 5, None)
    assert [(i.run, i.index, i.new_run) for i in probe.take()] == [(2, 0, True)]


@pytest.mark.parametrize("name", ["ddim", "euler", "lcm"])
def test_a_bare_call_after_a_run_is_no_step_of_it(name, sd):
    txt, _, probe = fresh(sd, name)
    probe.tracker.watch(txt)
    tiny.run(txt, steps=4)
    probe.take()
    txt.unet(torch.zeros(1, 4, 8, 8), 13, None)
    (info,) = probe.take()
    assert info.new_run and info.total is None and math.isnan(info.u)
    tiny.run(txt, steps=4)
    assert [(i.index, i.total) for i in probe.take()] == [(k, 4) for k in range(4)]


def test_schedulers_that_are_not_in_use_are_ignored(sd):
    txt, _, probe = fresh(sd, "ddim")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()  # has timesteps from birth
    unset = diffusers.DDIMScheduler()
    txt.unet(torch.zeros(1, 4, 8, 8), 13, None)
    (info,) = probe.take()
    assert info.total is None and scheduler is not unset


def test_watched_pipelines_serve_calls_from_elsewhere(sd):
    """A worker thread makes the calls: no frame has a scheduler there. Resolved at the time, as schedulers are
    swapped.
    """
    txt, _, probe = fresh(sd, "ddim")
    probe.tracker.watch(txt)
    txt.scheduler = SCHEDULERS["euler"]()
    txt.scheduler.set_timesteps(3)
    unet, loop = txt.unet, list(txt.scheduler.timesteps)

    def work():
        for t in loop:
            unet(torch.zeros(1, 4, 8, 8), t, None)

    worker = threading.Thread(target=work)
    worker.start(), worker.join()
    received = probe.received
    check_run(probe.take(), "euler", txt.scheduler, received, batch=1, halves=1, run=0)

"""The tracker among threads, copies and compiled models, and what it keeps alive."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import threading
import weakref

import diffusers
import pytest
import torch

from diffusion_tokred.errors import StateError
from diffusion_tokred.runtime.callers import find_caller
from diffusion_tokred.runtime.tracker import StepInfo, Tracker
from diffusion_tokred.testing import tiny
from tests.runtime.probe import (
    SCHEDULERS,
    Probe,
    check_run,
    fresh,
    in_thread,
)

# --- Threads, copies, memory ----------------------------------------------------------------------------------------


def test_a_second_thread_is_refused_and_the_first_unharmed(sd):
    txt, _, probe = fresh(sd, "pndm")
    other = diffusers.StableDiffusionPipeline(**(txt.components | {"scheduler": SCHEDULERS["heun"]()}))
    other.set_progress_bar_config(disable=True)
    errors = []

    def intrude(pipe, i, t, kwargs):
        if i in (1, 3):
            errors.append(in_thread(lambda: tiny.run(other, steps=3)))
            errors.append(in_thread(lambda: txt.unet(torch.zeros(1, 4, 8, 8), 3, None)))
            assert in_thread(lambda: errors.append(probe.tracker.finish())) is None
        return kwargs

    tiny.run(txt, steps=5, callback_on_step_end=intrude)
    assert [type(e) for e in errors] == [StateError, StateError, bool] * 2 and errors[2] is errors[5] is False
    received = probe.received
    check_run(probe.take(), "pndm", txt.scheduler, received, batch=2, halves=2, run=0)
    assert in_thread(lambda: tiny.run(other, steps=3)) is None, "the first run is over, even without finish()"
    received = probe.received
    check_run(probe.take(), "heun", other.scheduler, received, batch=2, halves=2, run=1)


def test_the_same_pipeline_from_two_threads(sd):
    """The second thread sets the shared scheduler anew before it is refused: our part of the first run is unharmed."""
    txt, _, probe = fresh(sd, "ddim")
    errors = []

    def intrude(pipe, i, t, kwargs):
        if i == 1:
            errors.append(in_thread(lambda: tiny.run(txt, steps=5)))
        return kwargs

    tiny.run(txt, steps=5, callback_on_step_end=intrude)
    assert isinstance(errors[0], StateError)
    assert [(i.run, i.index, i.total) for i in probe.take()] == [(0, k, 5) for k in range(5)]


@pytest.mark.parametrize("kind", ["pipeline", "loop"])
def test_an_abandoned_run_blocks_nobody(kind, sd):
    txt, _, probe = fresh(sd, "ddim")
    scheduler = SCHEDULERS["euler"]()

    def fail(*args):
        raise RuntimeError("out of memory")

    def loop():
        scheduler.set_timesteps(4)
        for t in scheduler.timesteps:
            txt.unet(torch.zeros(1, 4, 8, 8), t, None)
            fail()

    with pytest.raises(RuntimeError, match="out of memory"):
        tiny.run(txt, steps=4, callback_on_step_end=fail) if kind == "pipeline" else loop()
    assert in_thread(lambda: tiny.run(txt, steps=3)) is None
    assert [(i.run, i.index) for i in probe.take()] == [(0, 0), (1, 0), (1, 1), (1, 2)]


def test_only_overlapping_bare_calls_matter(sd):
    txt, _, probe = fresh(sd, "ddim")
    unet, forward, errors = txt.unet, txt.unet.forward, []
    del txt
    x = torch.zeros(1, 4, 8, 8)
    unet(x, 5, None)
    assert in_thread(lambda: unet(x, 5, None)) is None

    def slow(*args, **kwargs):
        errors.append(in_thread(lambda: unet(x, 5, None)))
        return (x,)

    unet.forward = slow
    try:
        unet(x, 5, None)
    finally:
        unet.forward = forward
    assert len(errors) == 1 and isinstance(errors[0], StateError)
    assert [(i.run, i.index) for i in probe.take()] == [(0, 0), (1, 0), (2, 0)]


def test_many_threads_at_once():
    """Whatever the timing: a call either gets its own right answer or a StateError, and never another's state."""
    pipe = tiny.sd()
    probe = Probe(pipe.unet)
    runs, refused = [], []

    def work(name):
        own = diffusers.StableDiffusionPipeline(**(pipe.components | {"scheduler": SCHEDULERS[name]()}))
        own.set_progress_bar_config(disable=True)
        for _ in range(4):
            try:
                tiny.run(own, steps=4)
                runs.append(name)
            except StateError:
                refused.append(name)

    workers = [threading.Thread(target=work, args=(name,)) for name in ("ddim", "euler", "heun", "pndm")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len(runs) + len(refused) == 16
    by_run: dict[int, list[StepInfo]] = {}
    for info in probe.take():
        by_run.setdefault(info.run, []).append(info)
    assert len(by_run) == len(runs) >= 1
    for infos in by_run.values():
        assert [i.index for i in infos] == list(range(infos[0].total))


def test_deepcopy_is_independent(sd):
    txt, _, probe = fresh(sd, "ddim")
    tracker = probe.tracker
    tracker.watch(txt)
    txt.scheduler.set_timesteps(3)
    x = torch.zeros(1, 4, 8, 8)
    txt.unet(x, txt.scheduler.timesteps[0], None)
    for twin in (copy.deepcopy(tracker), copy.copy(tracker), pickle.loads(pickle.dumps(tracker))):
        assert twin._run is None and not twin._pipes
        info = twin.step((x, 5, None), {})  # found through `txt` in this very frame, yet at no step of its own
        assert info.run == 0 and info.new_run and info.batch == 1
        assert twin.step((), {"sample": x, "timestep": 5}).batch == 1
    txt.unet(x, txt.scheduler.timesteps[1], None)
    assert [(i.run, i.index) for i in probe.take()] == [(0, 0), (0, 1)]


def test_nothing_is_kept_alive(sd):
    """Reading a function's variables must not keep alive what the function deletes; nor disturb its `locals()`."""
    txt, _, _ = fresh(sd, "ddim")

    def bare():
        big = torch.zeros(1000)
        ref = weakref.ref(big)
        txt.unet(torch.zeros(1, 4, 8, 8), 3, None)
        del big
        return ref() is None

    def with_locals():
        mine = 1
        names = locals()
        txt.unet(torch.zeros(1, 4, 8, 8), 3, None)
        return names["mine"] == mine

    assert bare() and with_locals()
    pipe = tiny.sd()
    inner = Probe(pipe.unet)
    inner.tracker.watch(pipe)
    tiny.run(pipe, steps=2)
    refs = [weakref.ref(pipe), weakref.ref(pipe.scheduler.timesteps)]
    inner.tracker.finish()
    del pipe
    gc.collect()
    assert [ref() for ref in refs] == [None, None]
    inner.tracker.watch(txt)
    assert len(inner.tracker._pipes) == 1, "pipelines that are gone are forgotten"


def test_time_is_never_read_where_a_view_or_an_index_tells(sd):
    """On a device that would wait for it: reading any value of the timestep is an error here."""
    _, _, probe = fresh(sd, "pndm")
    tracker = probe.tracker
    for name in ("pndm", "ddim", "heun", "flow-euler"):
        scheduler = SCHEDULERS[name]()
        scheduler.set_timesteps(4)
        x = torch.zeros(2, 4, 8, 8)
        tracker.step((x, scheduler.timesteps[0], None), {})
        calls = []
        original = torch.Tensor.item

        def item(self, calls=calls, original=original):
            calls.append(self)
            return original(self)

        torch.Tensor.item = item
        try:
            infos = [tracker.step((x, t.expand(2), None), {}) for t in scheduler.timesteps[1:]]
        finally:
            torch.Tensor.item = original
        assert not calls and [i.index for i in infos] == list(range(1, len(scheduler.timesteps)))
        probe.tracker.finish()


def test_noise_that_cannot_be_read_does_not_hide_the_steps(sd):
    txt, _, probe = fresh(sd, "ddim")
    scheduler = diffusers.IPNDMScheduler()
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        txt.unet(torch.zeros(1, 4, 8, 8), t, None)
    infos = probe.take()
    assert [(i.index, i.total) for i in infos] == [(k, 4) for k in range(4)] and all(math.isnan(i.u) for i in infos)


@pytest.mark.parametrize("method", ["compile", "torch.compile"])
@pytest.mark.parametrize("hook_first", [True, False])
def test_under_compile(method, hook_first, dynamo):
    """The hook runs outside of the graph: one graph, no break, in either order."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)

        def forward(self, sample, timestep, encoder_hidden_states=None):
            if torch.compiler.is_compiling():
                sample = sample * 0
            return self.linear(sample)

    model, infos = Model(), []
    tracker = Tracker(model)
    hook = torch.compiler.disable(lambda _, args, kwargs: infos.append(tracker.step(args, kwargs)))
    if hook_first:
        model.register_forward_pre_hook(hook, with_kwargs=True)
    call = model if method == "compile" else torch.compile(model, backend="eager", fullgraph=True)
    if method == "compile":
        model.compile(backend="eager", fullgraph=True)
    if not hook_first:
        model.register_forward_pre_hook(hook, with_kwargs=True)
    scheduler = diffusers.DDIMScheduler()
    with torch.no_grad():
        for _ in range(2):
            scheduler.set_timesteps(3)
            latents = torch.randn(2, 4, 8, 8)
            for t in scheduler.timesteps:
                assert torch.equal(call(latents, t)[0, 0, 0], model.linear.bias), "it is compiled"
    assert [(i.run, i.index, i.total, i.halves) for i in infos] == [(run, k, 3, 1) for run in (0, 1) for k in range(3)]
    assert dynamo["stats"]["unique_graphs"] == 1 and not dynamo["graph_break"]
    assert Tracker(call)._time == "timestep", "the compiled wrapper is looked through"


def test_find_caller_outside_of_everything():
    assert find_caller(None).scheduler is None


@pytest.mark.parametrize("name", tiny.BUILDERS)
def test_every_builder(name):
    """Real forwards, twice, with the model's own way of handing over the sample and the timestep."""
    pipe = tiny.BUILDERS[name]()
    probe = Probe(tiny.denoiser(pipe), stub=False)
    for run in range(2):
        tiny.run(pipe, steps=3)
        infos = probe.take()
        passes = 2 if name == "flux" else 1
        assert [(i.run, i.index, i.total, i.halves) for i in infos] == [
            (run, k // passes, 3, 2 // passes) for k in range(3 * passes)
        ]
        assert all(a.u > b.u for a, b in zip(infos[::passes], infos[passes::passes], strict=False))

"""Where a denoiser call stands: which run, which step, which pass, how much noise.

Diffusers hands a denoiser a noisy latent and a scaled timestep, nothing else. The tracker finds the rest in the
denoising loop that makes the call. It is asked once a denoiser call, eagerly, from a hook on the denoiser, and never
waits for the device: timesteps and noise tables are copied to the host once a run.

- *Which scheduler?* Pipelines share denoisers, so it is looked up in the callers' frames: `self.scheduler` of a
  pipeline, `components.scheduler` of a modular one, any local variable of a hand-written loop.
- *Which step?* Loops iterate over `scheduler.timesteps`, so the timestep that they pass on is a view into it, and its
  offset is the position: exact for duplicate timesteps (PNDM, Heun) too. Otherwise `step_index`, PNDM's `counter`,
  and last the value.
- *New run?* Another scheduler, other timesteps, a step back, or `finish()`. A run that an exception ended needs no
  cleaning up.
"""

from __future__ import annotations

import inspect
import math
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import StateError, UnsupportedError
from ..schedule.noise import log_snr, noise_levels, noise_ratio
from .callers import Caller, choose, find_caller, is_running, rows_of, schedulers_of, view_index


@dataclass(frozen=True)
class StepInfo:
    """One denoiser call. A *step* is an entry of `scheduler.timesteps`: one Heun step of the user's is two.

    For a call outside of any denoising loop the noise is unknown (`u`, `sigma`, `log_snr`, `timestep` and `progress`
    are nan), `total` is None, `halves` is 1, and `index` counts the calls since the last `finish()` or the last loop.
    """

    run: int  # runs of this denoiser, from 0
    index: int  # step of the run, from 0 where the run begins, also in img2img
    total: int | None  # steps of the run
    progress: float  # index / total
    sigma: float  # noise / signal, clamped to [1e-6, 1e6]: k-diffusion's sigma, also for flow matching
    log_snr: float  # -2 ln(sigma)
    u: float  # sigma / (alpha + sigma), 1 = noise; both evaluations of a second-order step have the first one's
    pass_key: str  # name of the cache context ("cond"), else "0", "1", ... in the order of the step's calls
    batch: int  # rows of the sample
    halves: int  # equal parts of the batch: 2 for batched CFG, 3 for three-way guidance; 1 if none or unknown
    new_run: bool  # the run's first call
    new_step: bool  # the step's first call
    phase: int  # 1 in the second evaluation of a second-order step, else 0
    timestep: float  # the scheduler's, unscaled


class Tracker:
    """Tells where each call of one denoiser stands.

    A copy (`copy.deepcopy` of the denoiser) begins empty: no run, no watched pipelines. There is no state outside of
    the object.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        model_class: Any = type(getattr(model, "_orig_mod", model))  # _orig_mod: torch.compile's wrapper
        names = [*inspect.signature(model_class.forward).parameters][1:]  # without self
        time = next((name for name in ("timestep", "timesteps", "t") if name in names), "timestep")
        self._reset(names[0] if names else "sample", time, names.index(time) if time in names else 1)

    def _reset(self, sample: str, time: str, time_place: int) -> None:
        self._sample, self._time, self._time_place = sample, time, time_place
        self._run: _Run | None = None
        self._runs = 0
        self._pipes: list[weakref.ref[Any]] = []
        self._lock = threading.Lock()
        self._named = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        return _copy, (self._sample, self._time, self._time_place)

    @property
    def context(self) -> str | None:
        """Name of the active `cache_context` of this thread. Set it on entering one, set back the old value on
        leaving.
        """
        return getattr(self._named, "context", None)

    @context.setter
    def context(self, name: str | None) -> None:
        self._named.context = name

    def watch(self, pipe: Any) -> None:
        """Remember a pipeline, weakly. Its scheduler, as it then is, is asked when no caller has one."""
        self.unwatch(pipe)
        self._pipes.append(weakref.ref(pipe))

    def unwatch(self, pipe: Any = None) -> None:
        """Forget a pipeline; and those that are gone."""
        self._pipes = [ref for ref in self._pipes if ref() is not None and ref() is not pipe]

    def finish(self) -> bool:
        """End the run: the next call begins another. False, and no effect, if there is none or another thread is in
        it.
        """
        with self._lock:
            if self._run is None or self._run.is_busy_elsewhere():
                return False
            self._run = None
            return True

    def step(self, args: Sequence[Any], kwargs: Mapping[str, Any], context: str | None = None) -> StepInfo:
        """Account for one denoiser call, given the arguments of its `forward`. `context` names the pass: default
        `self.context`.

        Call it from a hook wrapped in `torch.compiler.disable`. Dynamo leaves hooks out of the model's graph, but
        compiles a plain one as a frame of its own, which this cannot be. The wrapper costs no graph break.

        Raises:
            StateError: another thread is in a run of this denoiser. That run goes on unharmed.
        """
        with self._lock:
            if self._run is not None and self._run.is_busy_elsewhere():
                raise StateError(
                    "this denoiser is in the middle of a run in another thread, and serves one run at a time:"
                    " wait for its end, or give each thread its own copy.deepcopy of the denoiser"
                )
            sample = _argument(args, kwargs, self._sample, 0)
            time = _argument(args, kwargs, self._time, self._time_place)
            context = self.context if context is None else context
            caller = find_caller(time)
            run, position = self._locate(caller, time, context)
            if new_run := run is not self._run:
                self._run, self._runs = run, self._runs + 1
            return run.enter(self._runs - 1, position, context, rows_of(sample), caller, new_run)

    def _locate(self, caller: Caller, time: Any, context: str | None) -> tuple[_Run, int]:
        """The run that the call belongs to, this one or a new one, and its position in it. Changes nothing of this
        run.
        """
        run, scheduler = self._run, caller.scheduler
        if scheduler is None:
            pipes = [pipe for ref in self._pipes if (pipe := ref()) is not None]
            scheduler = choose([held for pipe in pipes for held in schedulers_of(pipe, time)], time)
        if scheduler is not None:
            if run is None or not run.continues(scheduler, time):
                run = _Run(scheduler)
            position = run.find(time, by_value=caller.scheduler is not None)
            if position is not None:
                return (run if position >= run.position else _Run(scheduler)), position
        run = self._run  # outside of a loop, perhaps after its end: counted apart
        if run is None or run.scheduler is not None or run.thread != threading.get_ident():
            run = _Run(None)
        same_step = context is not None and run.passes and context not in run.passes
        return run, run.position if same_step else run.position + 1


class _Run:
    """One run of a denoising loop, or a number of calls outside of one (`scheduler` is None)."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler  # kept while the run is on, so that no other takes its place in memory
        self.timesteps: torch.Tensor | None = None
        self.values: list[float] = []
        self.levels: list[float] = []
        if scheduler is not None:
            self.timesteps = scheduler.timesteps
            self.values = [float(t) for t in scheduler.timesteps.tolist()]
            try:
                self.levels = noise_levels(scheduler, self.values)
            except UnsupportedError:  # steps can be told apart all the same; a policy that needs u will say so
                self.levels = [math.nan] * len(self.values)
        self.begin = 0
        self.total: int | None = None
        self.position = -1
        self.offset = 0  # of PNDM's counter
        self.passes: dict[str, int] = {}  # calls in this step, by name
        self.thread = threading.get_ident()
        self.caller = Caller()  # of the latest call, without what is alive

    def continues(self, scheduler: Any, time: Any) -> bool:
        """Whether a call is of this run. With a view of our timesteps it is, even if the scheduler was set anew."""
        if scheduler is not self.scheduler:
            return False
        return scheduler.timesteps is self.timesteps or view_index(time, self.timesteps) is not None

    def find(self, time: Any, by_value: bool) -> int | None:
        """Position in the scheduler's timesteps; None if the call is none of its steps."""
        position = view_index(time, self.timesteps)
        if position is None and hasattr(self.scheduler, "step_index"):
            position = self.scheduler.step_index
            if position is None:  # most schedulers find it in their first `step`
                position = getattr(self.scheduler, "begin_index", None) or 0
        elif position is None and by_value:
            counter = getattr(self.scheduler, "counter", None)
            if not isinstance(counter, int):
                position = self._match(time)
            elif self.position < 0:
                position = self._match(time)
                self.offset = (position or 0) - counter
            else:
                position = self.offset + counter  # PNDM: its duplicate timestep is no second pass
        return int(position) if position is not None and 0 <= position < len(self.values) else None

    def _match(self, time: Any) -> int | None:
        """By value, from the last position on. The last resort: waits for the device if `time` is a tensor there."""
        slack = 0.004 if getattr(time, "dtype", None) in (torch.float16, torch.bfloat16) else 1e-6
        if isinstance(time, torch.Tensor):
            time = time.flatten()[0].item() if time.numel() else None
        if not isinstance(time, (int, float)):
            return None
        last = max(self.position, 0)
        best = min([*range(last, len(self.values)), *range(last)], key=lambda i: abs(self.values[i] - time))
        return best if abs(self.values[best] - time) <= slack * max(abs(time), 1.0) else None

    def enter(
        self, run: int, position: int, context: str | None, batch: int, caller: Caller, new_run: bool
    ) -> StepInfo:
        """Account for a call."""
        if new_run and self.scheduler is not None:
            self._begin(position, caller.steps)
        if position != self.position:
            self.passes.clear()
        new_step = not self.passes
        name = str(sum(self.passes.values())) if context is None else context
        count = self.passes.get(name, 0)
        self.passes[name] = count + 1
        self.position, self.thread, self.caller = position, threading.get_ident(), caller._replace(scheduler=None)

        index = position - self.begin
        u = self.levels[position] if self.levels else math.nan
        return StepInfo(
            run=run,
            index=index,
            total=self.total,
            progress=index / self.total if self.total else math.nan,
            sigma=noise_ratio(u),
            log_snr=log_snr(u),
            u=u,
            pass_key=f"{name}#{count}" if count else name,
            batch=batch,
            halves=1 if not caller.rows or batch % caller.rows else max(batch // caller.rows, 1),
            new_run=new_run,
            new_step=new_step,
            phase=position % 2 if getattr(self.scheduler, "order", 1) == 2 else 0,
            timestep=self.values[position] if self.values else math.nan,
        )

    def _begin(self, position: int, steps: Any) -> None:
        """Settle, at the first call, where the run begins and how long it is."""
        begin = getattr(self.scheduler, "begin_index", None)
        self.begin = begin if isinstance(begin, int) and 0 <= begin <= position else position
        total = len(self.values) - self.begin
        if self.levels[-1] == 0 and getattr(self.scheduler, "num_inference_steps", None) == len(self.values) - 1:
            total -= 1  # SCM lists the end as a timestep
        if isinstance(steps, int) and position - self.begin < steps <= total:
            total = steps  # the pipeline stops earlier: SDXL's `denoising_end`
        self.total = max(total, 1)

    def is_busy_elsewhere(self) -> bool:
        """Whether another thread is still in this run: in its pipeline call, in its loop before the end, or in the
        denoiser.
        """
        if self.thread == threading.get_ident():
            return False
        loop = self.caller.loop
        if (
            loop is not None
            and not loop.method
            and self.total is not None
            and self.position - self.begin >= self.total - 1
        ):
            loop = None  # a hand-written loop at its end: its function may go on to other things
        return is_running(self.thread, loop, self.caller.call, self.scheduler)


def _copy(sample: str, time: str, time_place: int) -> Tracker:
    """A tracker for another denoiser of the same class."""
    tracker = Tracker.__new__(Tracker)
    tracker._reset(sample, time, time_place)
    return tracker


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], name: str, place: int) -> Any:
    return kwargs[name] if name in kwargs else args[place] if place < len(args) else None

"""Who calls the denoiser: the scheduler and a few facts of its denoising loop, read from the frames of the callers.

Frames are read and left alone: only addresses are remembered, and nothing that a function deletes later is kept alive
by having been looked at.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch

_OWNERS = ("self", "components", "pipeline")  # variables that hold the pipeline in its own methods


class Mark(NamedTuple):
    """A frame, recognised by address and code without being kept alive."""

    address: int
    code: CodeType
    owner: int = 0  # id of its `self`
    method: bool = (
        False  # a pipeline's own: the run is over when it returns; a hand-written loop may be over long before
    )

    def matches(self, frame: FrameType) -> bool:
        """Whether it is the same frame, or, rarely, another of the same function at the same address."""
        return id(frame) == self.address and frame.f_code is self.code


class Caller(NamedTuple):
    """What the frames above a denoiser call say."""

    scheduler: Any = None
    rows: int = 0  # of the loop's `latents`; 0 if unknown
    steps: Any = None  # the pipeline's `_num_timesteps`
    loop: Mark | None = None  # None also for a loop in a script's top level, which never ends
    call: Mark | None = None  # the denoiser's own `__call__`


def find_caller(time: Any) -> Caller:
    """Walk up from the hook to the first frame with a scheduler in use. `time` is the timestep that the denoiser was
    given.
    """
    module_call: FrameType | None = None  # the outermost of torch's frames around this denoiser call
    call: Mark | None = None
    for frame in stack(sys._getframe(2)):
        name = _module(frame)
        if name.startswith("torch."):
            if call is None and name == "torch.nn.modules.module":
                module_call = frame
            continue
        if module_call is None and name.startswith("diffusion_tokred."):
            continue  # our hook
        if module_call is not None and call is None:
            call = Mark(id(module_call), module_call.f_code, id(scope_of(module_call).get("self")))
        scope = scope_of(frame)
        found, method = _schedulers_in(scope, time)
        scheduler = choose(found, time)
        if scheduler is None:
            continue
        latents = scope.get("latents")
        if latents is None:
            latents = getattr(scope.get("block_state"), "latents", None)  # modular pipelines
        loop, steps = None, None
        if method:
            loop, steps = _outermost(frame, scheduler), getattr(scope.get("self"), "_num_timesteps", None)
        elif frame.f_code.co_name != "<module>":
            loop = Mark(id(frame), frame.f_code)
        return Caller(scheduler, rows_of(latents), steps, loop, call)
    return Caller(call=call)


def is_running(thread: int, loop: Mark | None, call: Mark | None, scheduler: Any) -> bool:
    """Whether a thread is still inside this loop, or inside this denoiser call."""
    for frame in stack(sys._current_frames().get(thread)):
        # The second half of each check tells our frame from a later one at its address.
        in_loop = loop is not None and loop.matches(frame)
        if in_loop and any(held is scheduler for held in _schedulers_in(frame.f_locals, None)[0]):
            return True
        if call is not None and call.matches(frame) and id(frame.f_locals.get("self")) == call.owner:
            return True
    return False


def _outermost(frame: FrameType, scheduler: Any) -> Mark:
    """The pipeline's own call. Modular pipelines nest methods around one scheduler, and the inner ones end with every
    step.
    """
    best = frame
    for outer in stack(frame.f_back):
        if not _module(outer).startswith("torch.") and any(name in outer.f_code.co_varnames for name in _OWNERS):
            found, method = _schedulers_in(scope_of(outer), None, owners_only=True)
            if method and any(held is scheduler for held in found):
                best = outer
    return Mark(id(best), best.f_code, method=True)


def _schedulers_in(scope: Mapping[str, Any], time: Any, owners_only: bool = False) -> tuple[list[Any], bool]:
    """Schedulers in use among a frame's variables, and whether they are those of the frame's pipeline."""
    for name in _OWNERS:
        if name in scope and (found := schedulers_of(scope[name], time)):
            return found, True
    found = []
    for value in () if owners_only else list(scope.values()):
        # A scheduler, or what stores one (`pipe` in a hand-written loop). Only what is stored: properties may do
        # anything.
        stored = getattr(value, "__dict__", None)
        for thing in (value, stored.get("scheduler") if isinstance(stored, Mapping) else None):
            if thing is not None and in_use(thing, time):
                found.append(thing)
    return found, False


def schedulers_of(owner: Any, time: Any) -> list[Any]:
    """A pipeline's scheduler, if in use; for pipelines that have several under other names (UnCLIP), all in use."""
    try:
        scheduler = getattr(owner, "scheduler", None)
    except Exception:  # somebody's property
        return []
    if scheduler is not None:
        return [scheduler] if in_use(scheduler, time) else []
    stored = getattr(owner, "__dict__", None)
    return [value for value in list(stored.values()) if in_use(value, time)] if isinstance(stored, dict) else []


def in_use(thing: Any, time: Any) -> bool:
    """Whether it is a scheduler whose timesteps have been set."""
    if isinstance(thing, type) or not callable(getattr(type(thing), "step", None)):
        return False
    timesteps = getattr(thing, "timesteps", None)
    if not isinstance(timesteps, torch.Tensor) or timesteps.ndim != 1 or not len(timesteps):
        return False
    return getattr(thing, "num_inference_steps", None) is not None or view_index(time, timesteps) is not None


def choose(schedulers: Sequence[Any], time: Any) -> Any:
    """The only one; of several, the one that the denoiser's timestep comes from; else None."""
    different = list({id(scheduler): scheduler for scheduler in schedulers}.values())
    if len(different) <= 1:
        return different[0] if different else None
    return next((scheduler for scheduler in different if view_index(time, scheduler.timesteps) is not None), None)


def view_index(time: Any, timesteps: torch.Tensor | None) -> int | None:
    """Which entry of `timesteps` the tensor `time` is a view of, however expanded; None if of none. Reads no values,
    so it never waits.
    """
    if not isinstance(time, torch.Tensor) or timesteps is None or time.dtype != timesteps.dtype or not time.numel():
        return None
    if time.device != timesteps.device or time.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    if any(size > 1 and stride for size, stride in zip(time.shape, time.stride(), strict=True)):
        return None  # several entries at once
    offset = int(time.storage_offset()) - int(timesteps.storage_offset())
    index, rest = divmod(offset, int(timesteps.stride(0)) or 1)
    return index if not rest and 0 <= index < len(timesteps) else None


def rows_of(sample: Any) -> int:
    """Rows of a batch: a tensor's first axis, or a list's length (Z-Image); 0 if it is neither."""
    if isinstance(sample, torch.Tensor):
        return sample.shape[0] if sample.ndim else 0
    return len(sample) if isinstance(sample, (list, tuple)) else 0


def scope_of(frame: FrameType) -> Mapping[str, Any]:
    """The variables of a frame of this thread.

    Before Python 3.13 `f_locals` is a snapshot that stays with the frame, and would keep alive what its function
    deletes later. So a function's is copied and emptied again, unless somebody else holds it (`locals()`, a
    debugger).
    """
    scope = frame.f_locals
    snapshot = isinstance(scope, dict) and bool(frame.f_code.co_flags & inspect.CO_OPTIMIZED)
    if not snapshot or sys.gettrace() is not None or sys.getrefcount(scope) > 3:  # the frame's, ours, the argument's
        return scope
    copy = dict(scope)
    scope.clear()
    return copy


def stack(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame and its callers, innermost first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _module(frame: FrameType) -> str:
    return frame.f_globals.get("__name__") or ""

"""What the kinds of a row's steps cost, and what a run of them comes to.

The unpatched model and the row are two denoisers with the same weights, so nothing is put on or taken off between
calls, and both may be compiled. A round is unpatched, row, row, unpatched (ABBA); all ratios are taken within a round.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import StateError, UnsupportedError
from ..measure.kernels import KernelCounter
from ..measure.machine import PeakMemory
from ..measure.shares import MIN_IDEAL, Parts, Watch, ideal, profile, realised
from ..measure.timing import median_interval, synchronize
from ..patching import report
from .field import KEPT, Row
from .shapes import twin

LONG = 5.0  # seconds, from which on an unpatched step is timed once where shorter ones are timed twice
FULL = 0.98  # share of the dense FLOPs from which on another library's step counts as full


@dataclass(frozen=True)
class Bench:
    """What rows are measured on.

    Attributes:
        pipe: unpatched; left so. `call`: its arguments, all but the number of steps.
        part: name of the denoiser in it.
        steps: of the whole run that is composed.
        kinds: of the model's sites.
        dense: the unpatched model, profiled and counted.
        backend: of `torch.compile`; None: eager.
    """

    pipe: Any
    call: Mapping[str, Any]
    part: str
    steps: int
    kinds: Collection[str]
    dense: Parts
    device: torch.device
    backend: str | None = None

    def run(self, pipe: Any, steps: int) -> None:
        """A whole call of a pipeline, of so many steps."""
        pipe(num_inference_steps=steps, generator=torch.Generator().manual_seed(0), **self.call)

    def model(self, pipe: Any) -> nn.Module:
        """A pipeline's denoiser."""
        return getattr(pipe, self.part)


class Stopwatch:
    """Seconds of each call of a model, from before all hooks to after all of them, waiting for the device."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

        @torch.compiler.disable
        def begin(module: nn.Module, args: Any) -> None:
            synchronize(device)
            self._start = time.perf_counter()

        @torch.compiler.disable
        def end(module: nn.Module, args: Any, output: Any) -> None:
            synchronize(device)
            self.seconds.append(time.perf_counter() - self._start)

        self._hooks = (model.register_forward_pre_hook(begin, prepend=True), model.register_forward_hook(end))

    def take(self, steps: int) -> list[float]:
        """The seconds of the last run, by step; a step may have several calls."""
        found, self.seconds = self.seconds, []
        if not found or len(found) % steps:
            raise StateError(f"a run of {steps} steps called the denoiser {len(found)} times: steps cannot be told")
        return [float(sum(calls)) for calls in np.split(np.array(found), steps)]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def dense_parts(pipe: Any, part: str, run: Callable[[], Any], device: torch.device) -> Parts:
    """The unpatched model: times by module (medians of three calls), kernels and FLOPs. `run` makes one step."""
    model = getattr(pipe, part)
    timed = profile(model, run, rounds=3, warmup=1, device=device)
    counter = KernelCounter()
    with Watch(model, device, counter) as watch, counter:
        run()
    counted = merged(watch.calls)
    return Parts(timed.seconds, counted.work, counted.kernels, counted.flops)


def merged(calls: Sequence[Parts]) -> Parts:
    """The calls of one step as one."""
    work: Counter[str] = Counter()
    for call in calls:
        work.update(call.work)
    return Parts({}, dict(work), sum(c.kernels for c in calls), sum(c.flops for c in calls))


@dataclass(frozen=True)
class Probed:
    """A probe's steps, counted: what each is, and its work; FLOPs, as a share of the dense ones."""

    kinds: list[str]
    parts: list[Parts]
    flops: list[float]
    kept: list[float | None]  # share of the tokens computed


def count(bench: Bench, row: Row, steps: int, names: list[str] | None) -> Probed:
    """Run it once, eagerly and untimed, and count.

    Raises:
        UnsupportedError: another library's row that leaves out nothing.
    """
    pipe = twin(bench.pipe, bench.part)
    counter = KernelCounter()
    with Watch(bench.model(pipe), bench.device, counter) as watch, row.applied(pipe):
        with counter:
            bench.run(pipe, steps)
        found = report(pipe) if row.config is not None else None
    per, over = divmod(len(watch.calls), steps)
    if not per or over:
        raise StateError(f"a run of {steps} steps called the denoiser {len(watch.calls)} times: steps cannot be told")
    parts = [merged(watch.calls[i * per : (i + 1) * per]) for i in range(steps)]
    if found is not None:
        records = [found.steps[i * per : (i + 1) * per] for i in range(steps)]
        flops = [sum(r.flops for r in some) / sum(r.flops_dense for r in some) for some in records]
        kept: list[float | None] = [some[0].tokens_computed / some[0].tokens_total for some in records]
        modes = [some[0].mode for some in records]
        if names is not None and [name.partition(",")[0] for name in names] != modes:
            raise StateError(f"{row.name}: its steps were planned as {', '.join(names)}, and were {', '.join(modes)}")
    else:
        flops = [p.flops / bench.dense.flops for p in parts]
        kept = [row.kept()] * steps
    if names is None:
        names = ["full" if share >= FULL else KEPT for share in flops]
        if KEPT not in names:
            raise UnsupportedError(
                f"{row.name} leaves out nothing here: each step has at least {min(flops):.1%} of the FLOPs"
            )
    return Probed(names, parts, flops, kept)


def measure(
    bench: Bench,
    row: Row,
    rounds: int = 10,
    whole: int = 0,
    tell: Callable[[str, float], None] | None = None,
) -> dict[str, Any]:
    """Count and time a row.

    Args:
        rounds: of the kinds of steps. `whole`: rounds in which whole runs are timed as well, and compared with what is
            composed.
        tell: called with what is done, and the share that is.

    Returns:
        A row for the result file.
    """
    tell = tell or (lambda what, share: None)
    tell("counting", 0.0)
    probe, length, names = row.probe(bench.kinds, bench.steps)
    probed = count(bench, probe, length, names)
    schedule = Counter(row.schedule(bench.kinds, bench.steps))
    times, plain, facts = _time(bench, probe, length, probed.kinds, rounds, tell)
    kinds = {
        kind: _kind(bench, probed, kind, schedule.get(kind, 0), times[kind], plain)
        for kind in dict.fromkeys(probed.kinds)
    }
    made = compose(kinds, schedule, bench.steps, times, plain)
    between = max((k for k in schedule if k != "full"), key=schedule.__getitem__, default=None)
    found: dict[str, Any] = row.to_dict() | {
        "kept": None if between is None else kinds[between]["kept"],
        "steps": bench.steps,
        "schedule": dict(schedule),
        "schedule_given": row.forced,
        "kinds": kinds,
        **made,
        "cached_step": None if between is None else kinds[between]["cost"],
        "noise": vars(median_interval(np.divide(*plain))),
        "unpatched_seconds": [list(one) for one in plain],
        **facts,
    }  # fmt: skip
    if whole and (row.config or row.peer):
        found["whole"] = whole_runs(bench, row, whole, {k: np.array(v) for k, v in times.items()}, plain, tell)
    why = {}
    if between is None:
        why = dict.fromkeys(("kept", "cached_step"), "every step is full")
    elif found["kept"] is None:
        why["kept"] = "another library's tokens are not counted"
    if found["phi"] is None:
        why["phi"] = f"S* is below {MIN_IDEAL}"
    if found["peak_bytes"] is None:
        why["peak_bytes"] = "the system does not tell"
    if bench.backend is None:
        why["graphs"] = why["graph_breaks"] = "not compiled"
    return found | {"why_null": why}


def compose(
    kinds: Mapping[str, Mapping[str, Any]],
    schedule: Mapping[str, int],
    steps: int,
    times: Mapping[str, Sequence[float]],
    plain: tuple[Sequence[float], Sequence[float]],
) -> dict[str, Any]:
    """A run's figures from those of its steps: measured ratio (median and interval), FLOP ratio, S* and phi."""
    missing = [kind for kind in schedule if kind not in times]
    if missing:
        raise StateError(f"the probe has no step of kind {missing[0]}")
    took = sum(n * np.asarray(times[kind]) for kind, n in schedule.items())
    ratio = median_interval(steps * np.mean(plain, axis=0) / took)
    best = steps / sum(n / kinds[kind]["ideal"] for kind, n in schedule.items())
    flops = steps / sum(n * kinds[kind]["flop_share"] for kind, n in schedule.items())
    kernels = sum(n * kinds[kind]["kernels"] for kind, n in schedule.items()) / steps
    return {
        "flop_ratio": flops, "ratio": vars(ratio), "ideal": best, "phi": realised(ratio.median, best),
        "kernels_per_step": kernels,
    }  # fmt: skip


def _kind(
    bench: Bench, probed: Probed, kind: str, n: int, seconds: Sequence[float], plain: tuple[Sequence[float], ...]
) -> dict[str, Any]:
    """A kind of step: what it costs and what it could."""
    place = max(i for i, name in enumerate(probed.kinds) if name == kind)
    cost = median_interval(np.asarray(seconds) / np.mean(plain, axis=0))
    best = ideal(bench.dense, probed.parts[place])
    return {
        "n": n, "seconds": list(seconds), "cost": vars(cost), "flop_share": probed.flops[place],
        "kept": probed.kept[place], "kernels": probed.parts[place].kernels, "ideal": best,
        "phi": realised(1 / cost.median, best),
    }  # fmt: skip


def _time(
    bench: Bench, row: Row, length: int, kinds: list[str], rounds: int, tell: Callable[[str, float], None]
) -> tuple[dict[str, list[float]], tuple[list[float], list[float]], dict[str, Any]]:
    """Rounds of unpatched, row, row, unpatched: seconds by kind of step, of the unpatched step at both ends, and facts
    (graphs, memory)."""
    pipe, plain_pipe = twin(bench.pipe, bench.part), twin(bench.pipe, bench.part)
    facts: dict[str, Any] = {"graphs": None, "graph_breaks": None}
    dense_steps = min(length, 2)
    with row.applied(pipe):
        watches = []
        if bench.backend is not None:
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            for one in (pipe, plain_pipe):
                bench.model(one).compile(backend=bench.backend, dynamic=False)
        tell("warming up", 0.05)
        for one, steps in ((pipe, length), (plain_pipe, dense_steps)):
            bench.run(one, steps)  # compiles
            watches.append(Stopwatch(bench.model(one), bench.device))
            with PeakMemory(bench.device) as memory:
                bench.run(one, steps)
            took = watches[-1].take(steps)
            if one is pipe:
                facts["peak_bytes"] = memory.bytes
                if bench.backend is not None:
                    counters = torch._dynamo.utils.counters
                    facts["graphs"] = counters["stats"]["unique_graphs"]
                    facts["graph_breaks"] = sum(counters["graph_break"].values())
        if min(took) > LONG:  # the last of these was the unpatched model
            dense_steps = 1
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        plain: tuple[list[float], list[float]] = ([], [])

        def dense(place: int) -> None:
            bench.run(plain_pipe, dense_steps)
            plain[place].append(float(np.median(watches[1].take(dense_steps))))

        for turn in range(rounds):
            tell("timing", 0.1 + 0.9 * turn / rounds)
            gc.disable()
            try:
                dense(0)
                both = []
                for _ in range(2):
                    bench.run(pipe, length)
                    both.append(watches[0].take(length))
                dense(1)
            finally:
                gc.enable()
            for kind in times:
                times[kind].append(
                    float(np.mean([s for one in both for k, s in zip(kinds, one, strict=True) if k == kind]))
                )
        for watch in watches:
            watch.remove()
    return times, plain, facts


def whole_runs(
    bench: Bench, row: Row, rounds: int, times: Mapping[str, np.ndarray], plain: tuple[Sequence[float], ...],
    tell: Callable[[str, float], None],
) -> dict[str, Any]:  # fmt: skip
    """Time whole runs of the pipeline, unpatched and with the row (ABBA), and compare them with what is composed.

    What lies outside of the denoiser (text encoders, decoder, scheduler) is taken from the unpatched runs. The kinds of
    the steps are those that occurred: a whole run is counted first.
    """
    row = row.whole(bench.steps)
    planned = None if row.peer is not None and len(times) > 1 else row.schedule(bench.kinds, bench.steps)
    tell("counting a whole run", 0.0)
    schedule = Counter(count(bench, row, bench.steps, planned).kinds)
    pipe, plain_pipe = twin(bench.pipe, bench.part), twin(bench.pipe, bench.part)
    watch = Stopwatch(bench.model(plain_pipe), bench.device)
    found: dict[str, list[float]] = {"unpatched": [], "row": [], "rest": []}

    def timed(one: Any) -> float:
        synchronize(bench.device)
        start = time.perf_counter()
        bench.run(one, bench.steps)
        synchronize(bench.device)
        return time.perf_counter() - start

    with row.applied(pipe):
        if bench.backend is not None:
            for one in (pipe, plain_pipe):
                bench.model(one).compile(backend=bench.backend, dynamic=False)
        for turn in range(-1, rounds):  # the first warms up
            tell("whole runs", max(turn, 0) / rounds)
            first = timed(plain_pipe)
            rest = first - sum(watch.take(bench.steps))
            both = [timed(pipe), timed(pipe)]
            last = timed(plain_pipe)
            rest = (rest + last - sum(watch.take(bench.steps))) / 2
            if turn >= 0:
                found["unpatched"].append((first + last) / 2)
                found["row"].append(float(np.mean(both)))
                found["rest"].append(rest)
    watch.remove()
    measured = median_interval(np.divide(found["unpatched"], found["row"]))
    step = float(np.median(np.mean(plain, axis=0)))
    rest = float(np.median(found["rest"]))
    took = sum(n * float(np.median(times[kind])) for kind, n in schedule.items())
    composed = (rest + bench.steps * step) / (rest + took)
    return {
        "schedule": dict(schedule), "measured": vars(measured), "composed": composed,
        "difference": composed / measured.median - 1, "seconds": found,
    }  # fmt: skip

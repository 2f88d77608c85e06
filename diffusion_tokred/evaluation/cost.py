"""What the settings of an evaluation cost: whole pipeline calls timed in alternating rounds, apart from the drawing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..errors import ConfigError, UnsupportedError
from ..measure.timing import Interval, Timing, paired
from ..measure.timing import Variant as Timed
from ..methods import make_config
from ..patching import denoisers, patched, report
from .models import quiet
from .results import device_name, environment, plain, result, version
from .variants import UNPATCHED, Variant, check

KIND = "timing"
SAME_COST = ("numerics", "seed")  # anchors that nobody would use for their speed: not timed

Progress = Callable[[str, float], None]


def measure_cost(
    pipe: Any,
    variants: Sequence[Variant],
    prompt: str | Sequence[str],
    *,
    call: Mapping[str, Any] | None = None,
    rounds: int = 10,
    warmup: int = 2,
    pipeline: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time every variant against the unpatched pipeline, and count its FLOPs.

    A round calls each variant once and the unpatched pipeline twice, at both ends; every other round runs backwards
    (see `measure.timing`). Patches are put on and taken off outside of the timed calls, and nothing is recorded in
    them. FLOPs and tokens come from one more, untimed call of each.

    Args:
        pipe: without a patch; left without one.
        variants: `check`ed; anchors that serve for quality only (`SAME_COST`) are left out.
        prompt: one, or the prompts of a batch.
        call: keyword arguments of the pipeline; a variant's own win.
        rounds: at least 1; 10 give an interval worth the name.
        warmup: untimed calls of each variant before.
        pipeline: for the result, as `evaluation.generation` describes it.
        progress: called with what is being done and the share that is done.

    Returns:
        A `tokred.result/1` of kind "timing"; `rows` are one object a variant: `name`, `seconds` (median and quartiles),
        `speedup` (median over the rounds with its 95 % bootstrap interval), `flops`, `flops_unpatched` (of the
        denoiser, for the whole call), `tokens_saved`, and `seconds_raw`.

    Raises:
        ConfigError, UnsupportedError: as `patch`, or the pipeline refuses the call.
    """
    timed = {v.name: v for v in check(variants) if v.anchor not in SAME_COST}
    common: dict[str, Any] = dict(prompt=prompt) | dict(call or {})
    device = pipe._execution_device
    env = environment(device)

    def run(variant: Variant) -> Callable[[], Any]:
        return lambda: pipe(**common | dict(variant.call), generator=torch.Generator().manual_seed(0))

    tell = progress or (lambda what, share: None)
    calls = (warmup + rounds + 1) * len(timed) + rounds
    with quiet(pipe):
        counted = {}
        for place, (name, variant) in enumerate(timed.items()):
            tell(f"counting {name}", place / calls)
            counted[name] = _count(pipe, variant, run(variant))
        states = {name: Timed(run(v), lambda v=v: v.applied(pipe)) for name, v in timed.items()}  # type: ignore[misc]
        done = len(timed)
        timing = paired(
            states, rounds, warmup, device, progress=lambda n, _: tell("timing", min(1.0, (done + n) / calls))
        )
    rows = [_row(name, timing, counted[name], counted[UNPATCHED]) for name in timed]
    parts: dict[str, Any] = dict(env=env, pipeline=dict(pipeline or {}), reduction=None, prompts=None, rows=rows)
    data = result(KIND, **parts, intervals={"unpatched_again": _interval(timing.noise)})
    return data | {"asked": asked(pipe, variants, prompt, call, rounds)}


def asked(
    pipe: Any,
    variants: Sequence[Variant],
    prompt: str | Sequence[str],
    call: Mapping[str, Any] | None,
    rounds: int,
) -> dict[str, Any]:
    """What a timing was asked for, and on what, as plain data: equal for equal ones."""
    return plain(
        {
            "variants": [variant.to_dict() for variant in variants],
            "prompt": prompt,
            "call": dict(call or {}),
            "rounds": rounds,
            "device": device_name(pipe._execution_device),
            "threads": torch.get_num_threads(),
            "dtype": str(denoisers(pipe)[0].dtype),
            "scheduler": type(pipe.scheduler).__name__,
            "versions": {name: version(name) for name in ("diffusion-tokred", "torch", "diffusers")},
        }
    )


def same_time(timing: Mapping[str, Any], variants: Sequence[Variant], steps: int) -> list[Variant]:
    """Runs of the unpatched pipeline with so many fewer steps that they take as long as the methods do.

    One for each different number of steps; none for methods that are not faster, or if `variants` has it already.
    """
    found: dict[str, Variant] = {}
    for variant in variants:
        cost = cost_of(timing, variant.name)
        if variant.config is None or cost is None:
            continue
        count = max(1, round(steps / cost["speedup"]["median"]))
        fewer = Variant(f"steps-{count}", call={"num_inference_steps": count}, anchor="steps")
        if count < steps and fewer not in variants:
            found[fewer.name] = fewer
    return list(found.values())


def cost_of(timing: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """A result file's `cost` entry for a variant; None where it was not timed."""
    for row in timing["rows"]:
        if row["name"] == name:
            return {key: value for key, value in row.items() if key not in ("name", "seconds_raw")}
    return None


def _row(name: str, timing: Timing, counted: dict[str, Any], unpatched: dict[str, Any]) -> dict[str, Any]:
    seconds = timing.seconds[name]
    low, high = timing.quartiles(name)
    return {
        "name": name,
        "seconds": {"median": timing.median(name), "low": low, "high": high, "n": len(seconds)},
        "speedup": _interval(timing.speedup(name)),
        **counted,
        "flops_unpatched": unpatched["flops"],
        "seconds_raw": list(seconds),
    }


def _interval(found: Interval) -> dict[str, Any]:
    return {"median": found.median, "low": found.low, "high": found.high, "n": found.n}


def _count(pipe: Any, variant: Variant, run: Callable[[], Any]) -> dict[str, Any]:
    """FLOPs and tokens of a call. Without a method of its own it is counted under a neutral one, which is dense."""
    if variant.peer is not None:
        return {"flops": None, "tokens_saved": None, "why_null": {"flops": "another library's: not counted"}}
    config = variant.config or make_config("tome", ratio=0.0)
    try:
        with patched(pipe, config, policy=variant.policy):
            run()
    except (ConfigError, UnsupportedError):
        if variant.config is not None:
            raise
        return {"flops": None, "tokens_saved": 0.0, "why_null": {"flops": "an architecture that cannot be counted"}}
    found = report(pipe)
    if found is None:
        return {"flops": None, "tokens_saved": None, "why_null": {"flops": "the denoiser was never called"}}
    return {"flops": found.flops, "tokens_saved": found.tokens_saved}

"""The same prompts and seeds without and with a reduction: pictures, times, figures."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from ..errors import ConfigError, StateError, UnsupportedError
from ..methods import MethodConfig
from ..patching import denoisers, patched, report
from ..ruling import config_in, offered, resolve
from ..runtime.stats import Report
from ..schedule.policy import as_policy
from .metrics import Spread, psnr, speedup, ssim
from .models import quiet
from .results import environment, prompts_of, result

PROMPT = "a big red star above a small blue ring on a striped pink background"
WARM_UP = 2  # steps of the untimed calls before the first timed ones

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Row:
    """One seed. Seconds are those of whole pipeline calls; the i-th of both were measured side by side."""

    prompt: str
    seed: int
    unpatched: Image.Image
    patched: Image.Image
    seconds_unpatched: tuple[float, ...]
    seconds_patched: tuple[float, ...]
    psnr: float
    ssim: float
    report: Report
    repeatable: bool

    @property
    def speedup(self) -> Spread:
        return speedup(self.seconds_unpatched, self.seconds_patched)

    def to_dict(self) -> dict[str, Any]:
        why = {"psnr": "the pictures are equal: infinite"} if self.psnr == float("inf") else {}
        if self.ssim != self.ssim:
            why["ssim"] = "the pictures are smaller than SSIM's window of 11 pixels"
        return {
            "prompt": self.prompt,
            "seed": self.seed,
            "seconds_unpatched": list(self.seconds_unpatched),
            "seconds_patched": list(self.seconds_patched),
            "flops_unpatched": self.report.flops_dense,
            "flops_patched": self.report.flops,
            "tokens_saved": self.report.tokens_saved,
            "psnr": self.psnr,
            "ssim": self.ssim,
            "repeatable": self.repeatable,
            "why_null": why,
        }


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; `evaluation.images` draws it."""

    env: dict[str, Any]
    pipeline: dict[str, Any]
    reduction: dict[str, Any]
    rows: tuple[Row, ...] = field(repr=False)

    @property
    def seconds_unpatched(self) -> Spread:
        return Spread.of(t for row in self.rows for t in row.seconds_unpatched)

    @property
    def seconds_patched(self) -> Spread:
        return Spread.of(t for row in self.rows for t in row.seconds_patched)

    @property
    def speedup(self) -> Spread:
        """Spread of the paired ratios of times, over all seeds. Above 1: the patched pipeline is faster."""
        rows = self.rows
        return speedup(
            [t for row in rows for t in row.seconds_unpatched], [t for row in rows for t in row.seconds_patched]
        )

    @property
    def intervals(self) -> dict[str, Spread]:
        """Every figure with its spread: times and speed-up over the repetitions, quality over the seeds."""
        return {
            "seconds_unpatched": self.seconds_unpatched,
            "seconds_patched": self.seconds_patched,
            "speedup": self.speedup,
            "tokens_saved": Spread.of(row.report.tokens_saved for row in self.rows),
            "psnr": Spread.of(row.psnr for row in self.rows),
            "ssim": Spread.of(row.ssim for row in self.rows),
        }

    def to_dict(self) -> dict[str, Any]:
        """As plain data in the schema `tokred.result/1`, see `results`."""
        intervals = {}
        for name, spread in self.intervals.items():
            why = {"low": "one measurement", "high": "one measurement"} if spread.n == 1 else {}
            if spread.median == float("inf"):
                why["median"] = "equal pictures: infinite"
            intervals[name] = vars(spread) | {"why_null": why}
        return result(
            "compare",
            env=self.env,
            pipeline=self.pipeline,
            reduction=self.reduction,
            prompts=prompts_of([row.prompt for row in self.rows]),
            rows=[row.to_dict() for row in self.rows],
            intervals=intervals,
        )


def compare(
    pipe: Any,
    config: MethodConfig | None = None,
    *,
    method: str | None = None,
    policy: Any = None,
    prompt: str = PROMPT,
    seeds: Sequence[int] = (0,),
    steps: int | None = None,
    size: tuple[int, int] | None = None,
    guidance: float | None = None,
    repeat: int = 3,
    model: str | None = None,
    call: dict[str, Any] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Comparison:
    """Run a pipeline with and without a method, from the same noise, and measure both.

    A seed is `repeat` pairs of timed calls in the order unpatched, patched, patched, unpatched, ...; the first seed's
    come after a short untimed call of each. Nothing is recorded inside the timed calls; the token map is made by one
    more, untimed call. Pictures are compared as 8-bit RGB, as saved.

    Args:
        pipe: a text-to-image pipeline without a patch; left without one.
        config, method, policy, options: as in `patch`; the method's random draws take the seed 0.
        prompt: one prompt for all.
        seeds: one `Row` each; the initial noise of seed s is that of a CPU generator seeded with s.
        steps, guidance: `num_inference_steps` and `guidance_scale`; the pipeline's own defaults if None.
        size: (width, height) in pixels; the pipeline's own default if None.
        repeat: timed pairs a seed.
        model: name for the result.
        call: more keyword arguments for the pipeline, which win.
        progress: called with what is being done and the share of all that is done, in [0, 1], after each step.

    Raises:
        ConfigError, UnsupportedError: as `patch`; or the pipeline refuses these arguments.
        StateError: the pipeline is patched already.
    """
    if repeat < 1:
        raise ConfigError(f"repeat must be at least 1, got {repeat}")
    if not seeds:
        raise ConfigError("no seeds: at least one is needed")
    method = method or (None if config or config_in(policy) else "tome")
    policy = offered(config, method, options, policy, denoisers(pipe)[0])
    config = resolve(config, method, options, policy)
    if any("_tokred" in denoiser.__dict__ for denoiser in denoisers(pipe)):
        raise StateError("the pipeline is patched already: unpatch it, compare needs it without")
    caller = _Caller(pipe, prompt, steps, size, guidance, call or {}, len(seeds) * (2 * repeat + 1), progress)
    chosen: dict[str, Any] = dict(config=config, policy=policy)
    with patched(pipe, **chosen):  # refuse what cannot work before anything is spent
        pass
    env = environment(caller.device)
    with quiet(pipe):
        caller.warm_up(chosen)
        rows = tuple(_row(caller, chosen, seed, repeat) for seed in seeds)
    width, height = rows[0].unpatched.size
    rule = as_policy(policy)
    return Comparison(
        env=env,
        pipeline={
            "model": model or getattr(pipe.config, "_name_or_path", None) or None,
            "class": type(pipe).__name__,
            "denoiser": type(denoisers(pipe)[0]).__name__,
            "scheduler": type(pipe.scheduler).__name__,
            "steps": caller.steps,
            "guidance": caller.arguments.get("guidance_scale"),
            "width": width,
            "height": height,
            "dtype": str(denoisers(pipe)[0].dtype).removeprefix("torch."),
        },
        reduction={
            "method": config.name,
            "config": config.to_dict(),
            "policy": None if rule is None else "function" if rule.function else rule.to_dict(),
            "seed": 0,
        },
        rows=rows,
    )


def _row(caller: _Caller, chosen: dict[str, Any], seed: int, repeat: int) -> Row:
    """All calls of one seed."""
    pictures: dict[bool, list[Image.Image]] = {False: [], True: []}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for pair in range(repeat):
        for with_patch in (False, True) if pair % 2 == 0 else (True, False):
            with patched(caller.pipe, **chosen) if with_patch else contextlib.nullcontext():
                picture, took = caller(seed, "patched" if with_patch else "unpatched")
            pictures[with_patch].append(picture)
            seconds[with_patch].append(took)
    with patched(caller.pipe, **chosen, record="tokens"):
        pictures[True].append(caller(seed, "token map")[0])
    found = report(caller.pipe)
    if found is None:
        raise StateError(f"{type(caller.pipe).__name__} never called its denoiser")
    a, b = pictures[False][0], pictures[True][0]
    return Row(
        prompt=caller.prompt,
        seed=seed,
        unpatched=a,
        patched=b,
        seconds_unpatched=tuple(seconds[False]),
        seconds_patched=tuple(seconds[True]),
        psnr=psnr(a, b),
        ssim=ssim(a, b),
        report=found,
        repeatable=all(p.tobytes() == group[0].tobytes() for group in pictures.values() for p in group),
    )


class _Caller:
    """Calls a pipeline for one picture, timed, and tells how far the whole is."""

    def __init__(
        self,
        pipe: Any,
        prompt: str,
        steps: int | None,
        size: tuple[int, int] | None,
        guidance: float | None,
        call: dict[str, Any],
        calls: int,
        progress: Progress | None,
    ) -> None:
        known = inspect.signature(type(pipe).__call__).parameters
        wanted = {"prompt": prompt, "num_inference_steps": steps, "guidance_scale": guidance}
        wanted |= {"width": size[0], "height": size[1]} if size else {}
        for name in wanted:
            if wanted[name] is not None and name not in known:
                raise UnsupportedError(f"{type(pipe).__name__} takes no {name}")
        own = {name: known[name].default for name in ("num_inference_steps", "guidance_scale") if name in known}
        self.arguments = own | {name: value for name, value in wanted.items() if value is not None} | call
        self.pipe, self.calls, self.progress = pipe, calls, progress
        self.prompt = self.arguments["prompt"] or ""  # empty where `call` brings embeddings
        self.steps = int(self.arguments["num_inference_steps"])
        self.device = pipe._execution_device  # the denoiser itself may be offloaded
        self.steppable = progress is not None and "callback_on_step_end" in known
        self.done = 0

    def __call__(self, seed: int, what: str, **more: Any) -> tuple[Image.Image, float]:
        """The picture of a seed, and the seconds of the call."""
        arguments = self.arguments | {"generator": torch.Generator().manual_seed(seed)} | more
        if self.steppable:
            arguments["callback_on_step_end"] = lambda pipe, step, t, kwargs: self._tell(seed, what, step + 1, kwargs)
        self._synchronize()
        started = time.perf_counter()
        try:
            picture = self.pipe(**arguments).images[0]
        except (ConfigError, UnsupportedError, StateError):
            raise
        except (ValueError, TypeError) as error:
            text = " ".join(str(error).split())
            raise ConfigError(f"{type(self.pipe).__name__} refuses this call: {text}") from error
        self._synchronize()
        took = time.perf_counter() - started
        self.done += 1
        self._tell(seed, what, 0, {})
        return picture.convert("RGB"), took

    def warm_up(self, chosen: dict[str, Any]) -> None:
        """A short call of each variant, not counted."""
        steps = min(self.steps, WARM_UP)
        for variant in (contextlib.nullcontext(), patched(self.pipe, **chosen)):
            with variant:
                self(0, "warm-up", num_inference_steps=steps)
        self.done = 0

    def _tell(self, seed: int, what: str, step: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        if self.progress is not None:
            share = 0.0 if what == "warm-up" else min(1.0, (self.done + step / self.steps) / self.calls)
            self.progress(f"seed {seed}, {what}", share)
        return kwargs

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

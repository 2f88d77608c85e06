"""What runs: both sides from the same noise. First one untimed call of each, with previews and what became of each
token recorded; then timed pairs with nothing in them but the pipeline.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from PIL import Image

import diffusion_tokred as tokred
from diffusion_tokred import ConfigError, StateError, UnsupportedError
from diffusion_tokred.evaluation.metrics import Spread, psnr, speedup, ssim
from diffusion_tokred.evaluation.results import environment, prompts_of, result

from .limits import Setup, Side
from .models import Model
from .previews import preview

PREVIEW_EVERY = 0.2  # seconds
LETTERS = ("A", "B")


class Stopped(Exception):
    """Somebody pressed stop."""


@dataclass(frozen=True)
class Tick:
    """How far a job is: `share` of the work done in [0, 1], `left` seconds to go, None while that is not known."""

    what: str
    share: float
    left: float | None
    side: int = 0
    picture: Image.Image | None = None


@dataclass(frozen=True)
class Drawn:
    """A side's picture and what it cost. `noise`: of the first input of the denoiser, which is the initial noise;
    `policy`: what the side did, with what it is for.

    `seconds`: of whole calls; empty if nothing was timed. `kept`: drawn by an earlier run, and not timed with the other
    side. `repeatable`: every call of it drew the same picture.
    """

    side: Side
    picture: Image.Image
    noise: str
    report: tokred.Report | None
    policy: tokred.Policy | None
    flops: int | None
    cache_bytes: int
    seconds: tuple[float, ...] = ()
    kept: bool = False
    repeatable: bool = True


@dataclass(frozen=True)
class Result:
    """A comparison. Times of the two sides belong together unless one is kept."""

    setup: Setup
    a: Drawn
    b: Drawn
    env: dict[str, Any]
    pipeline: dict[str, Any]
    call: dict[str, Any] = field(default_factory=dict, hash=False)
    finished: bool = True

    @property
    def sides(self) -> tuple[Drawn, Drawn]:
        return self.a, self.b

    @cached_property
    def psnr(self) -> float:
        return psnr(self.a.picture, self.b.picture)

    @cached_property
    def ssim(self) -> float:
        return ssim(self.a.picture, self.b.picture)

    @property
    def speedup(self) -> Spread | None:
        """How many times faster B is than A; None if they were not timed side by side."""
        if self.a.kept or self.b.kept or not self.a.seconds or len(self.a.seconds) != len(self.b.seconds):
            return None
        return speedup(self.a.seconds, self.b.seconds)

    @property
    def same_noise(self) -> bool:
        return self.a.noise == self.b.noise

    def to_dict(self) -> dict[str, Any]:
        """As plain data in the schema `tokred.result/1`."""
        rows = [
            {
                "side": letter,
                "prompt": self.setup.prompt,
                "seed": self.setup.seed,
                "noise": drawn.noise,
                "seconds": [] if drawn.kept else list(drawn.seconds),
                "kept": drawn.kept,
                "flops": drawn.flops,
                "tokens_saved": 0.0 if drawn.report is None else drawn.report.tokens_saved,
                "cache_bytes": drawn.cache_bytes,
                "repeatable": drawn.repeatable,
                "why_null": {"flops": "an architecture that cannot be counted"} if drawn.flops is None else {},
            }
            for letter, drawn in zip(LETTERS, self.sides, strict=True)
        ]
        found, intervals = self.speedup, {}
        if found is not None:
            why = {"low": "one measurement", "high": "one measurement"} if found.n == 1 else {}
            intervals["speedup"] = vars(found) | {"why_null": why}
        for name, value in (("psnr", self.psnr), ("ssim", self.ssim)):
            why = {"low": "one pair", "high": "one pair"}
            if value == float("inf"):
                why["median"] = "equal pictures: infinite"
            intervals[name] = {"median": value, "low": None, "high": None, "n": 1, "why_null": why}
        return result(
            "compare",
            env=self.env,
            pipeline=self.pipeline,
            reduction={letter: drawn.side.to_dict() for letter, drawn in zip(LETTERS, self.sides, strict=True)},
            prompts=prompts_of([self.setup.prompt] * len(rows)),
            rows=rows,
            intervals=intervals,
        )


class Runner:
    """Calls a model for a job of `work` pipeline calls; tells how far it is, and stops within a step."""

    def __init__(
        self, model: Model, setup: Setup, work: int, tell: Callable[[Tick], None], stop: threading.Event
    ) -> None:
        pipe = model.pipe
        known = inspect.signature(type(pipe).__call__).parameters
        wanted: dict[str, Any] = {
            "prompt": setup.prompt, "num_inference_steps": setup.steps, "guidance_scale": setup.guidance,
            "width": setup.width, "height": setup.height,
        }  # fmt: skip
        if missing := [name for name in wanted if name not in known]:
            raise UnsupportedError(f"{type(pipe).__name__} takes no {', '.join(missing)}")
        self.model, self.setup, self.arguments = model, setup, wanted | model.call
        self.tell, self.stop, self.work = tell, stop, work
        self.known, self.device = known, pipe._execution_device
        self.calls = 0  # of the pipeline, done
        self.of_a_run = setup.steps  # denoiser calls; corrected by the first run
        self.began = time.monotonic()
        self._shown = 0.0

    def check(self, side: Side) -> None:
        """Refuse what cannot work before anything is spent."""
        if side.config is not None:
            with tokred.patched(self.model.pipe, **side.arguments()):
                pass

    def draw(self, side: Side, place: int) -> Drawn:
        """The untimed call: previews, and the tokens recorded."""
        first: list[torch.Tensor] = []
        call = dict(self.arguments)
        what = f"{LETTERS[place]}: {side.name}" if place < 2 else side.name
        if "callback_on_step_end" in self.known:
            call["callback_on_step_end"] = lambda pipe, step, t, kwargs: self._preview(what, place, step, kwargs)
        elif "callback" in self.known:  # PixArt's
            call["callback"] = lambda step, t, latents: self._preview(what, place, step, {"latents": latents})
        told = any(name.startswith("callback") for name in call)
        with self._watched(what, place, first, steps=not told), self._patched(side, "tokens"):
            picture = self._call(call)
        self.calls += 1
        found = None if side.config is None else tokred.report(self.model.pipe)
        if side.config is not None and found is None:
            raise StateError(f"{type(self.model.pipe).__name__} never called its denoiser")
        flops, cache = self._counted(side, found)
        noise = hashlib.sha256(first[0].float().cpu().contiguous().numpy().tobytes()).hexdigest()[:16] if first else ""
        return Drawn(side, picture, noise, found, self._policy(side), flops, cache)

    def time(self, side: Side, place: int) -> tuple[Image.Image, float]:
        """A timed call: nothing is recorded or shown in it; the hook that can stop it is the same for both sides."""
        with (
            self._watched(f"timing {LETTERS[place]}" if place < 2 else f"timing {side.name}", place),
            self._patched(side),
        ):
            self._synchronize()
            started = time.perf_counter()
            picture = self._call(self.arguments)
            self._synchronize()
            took = time.perf_counter() - started
        self.calls += 1
        return picture, took

    @contextlib.contextmanager
    def _patched(self, side: Side, record: str | None = None) -> Iterator[None]:
        if side.config is None:
            yield
            return
        with tokred.patched(self.model.pipe, **side.arguments(), record=record):
            yield

    def _call(self, arguments: dict[str, Any]) -> Image.Image:
        generator = torch.Generator().manual_seed(self.setup.seed)
        try:
            picture = self.model.pipe(**arguments, generator=generator).images[0]
        except (Stopped, ConfigError, UnsupportedError, StateError):
            if hasattr(self.model.pipe, "maybe_free_model_hooks"):
                self.model.pipe.maybe_free_model_hooks()
            raise
        except (ValueError, TypeError) as error:
            text = " ".join(str(error).split())[:300]
            raise ConfigError(f"{type(self.model.pipe).__name__} refuses this call: {text}") from error
        return picture.convert("RGB")

    @contextlib.contextmanager
    def _watched(
        self, what: str, place: int, first: list[torch.Tensor] | None = None, steps: bool = True
    ) -> Iterator[None]:
        """See each call of the denoiser before it is made. `first`: gets the first one's input, one row of it."""
        seen = 0

        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal seen
            if self.stop.is_set():
                raise Stopped
            if first is not None and not first:
                tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.ndim >= 3]
                first.extend(x[:1].detach().clone() for x in tensors[:1])
            if steps:
                self._tell(what, place, min(seen / self.of_a_run, 1.0))
            seen += 1

        handle = self.model.denoiser.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
            self.of_a_run = max(seen, 1)
        finally:
            handle.remove()

    def _preview(self, what: str, place: int, step: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        now, total = time.monotonic(), self.setup.steps
        picture = None
        if now - self._shown > PREVIEW_EVERY and (latents := kwargs.get("latents")) is not None:
            picture = preview(self.model, latents, self.setup.width, self.setup.height)
            self._shown = time.monotonic()
        self._tell(f"{what}, step {min(step + 1, total)} of {total}", place, min((step + 1) / total, 1.0), picture)
        return kwargs

    def _tell(self, what: str, place: int, part: float, picture: Image.Image | None = None) -> None:
        share = min((self.calls + part) / self.work, 1.0)
        passed = time.monotonic() - self.began
        left = passed * (1 - share) / share if share > 0.02 else None
        self.tell(Tick(what, share, left, place, picture))

    def _policy(self, side: Side) -> tokred.Policy | None:
        """What a side does, with its method, for this model."""
        if side.config is None:
            return None
        rule = side.policy or tokred.Policy.constant(side.config.share, side.config.asks)
        return rule.for_pipe(self.model.pipe, side.config)

    def _counted(self, side: Side, report: tokred.Report | None) -> tuple[int | None, int]:
        """FLOPs of the denoiser over the run, and the most bytes kept from step to step. Dry, but for the report."""
        common: dict[str, Any] = dict(
            width=self.setup.width, height=self.setup.height, num_inference_steps=self.setup.steps,
            guidance=self.setup.guidance > 1, text_tokens=self.model.text_tokens,
        )  # fmt: skip
        if report is None or side.config is None:
            try:
                found = tokred.explain(self.model.pipe, method="random-keep", **common)
            except (ConfigError, UnsupportedError):
                return None, 0
            return found.flops["total"][0], 0
        found = tokred.explain(self.model.pipe, **side.arguments(), **common)
        return report.flops, found.cache_bytes

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def compare(
    model: Model,
    setup: Setup,
    sides: tuple[Side, Side],
    tell: Callable[[Tick], None],
    stop: threading.Event,
    kept: Drawn | None = None,
    show: Callable[[Result], None] | None = None,
) -> Result:
    """Both sides' pictures, then their times, in the order A B, B A, A B, ...

    Args:
        kept: A of an earlier run with the same settings, to be used again; only B runs then.
        show: called with the pictures, before anything is timed.

    Raises:
        Stopped: `stop` was set; within one step.
        ConfigError, UnsupportedError, StateError: as `tokred.patch`, or the pipeline refuses the call.
    """
    fresh = [place for place in (0, 1) if place == 1 or kept is None]
    runner = Runner(model, setup, len(fresh) * (1 + setup.repeat), tell, stop)
    for place in fresh:
        runner.check(sides[place])
    env = environment(runner.device)
    drawn = {place: runner.draw(sides[place], place) for place in fresh}
    if kept is not None:
        drawn[0] = replace(kept, kept=True)
    drawn = {place: _with_dense(drawn[place], drawn[1 - place]) for place in (0, 1)}
    found = Result(
        setup, drawn[0], drawn[1], env, _pipeline(model, setup), dict(model.call), finished=setup.repeat == 0
    )
    if show is not None:
        show(found)
    seconds: dict[int, list[float]] = {place: [] for place in fresh}
    same = dict.fromkeys(fresh, True)
    for pair in range(setup.repeat):
        for place in fresh if pair % 2 == 0 else reversed(fresh):
            picture, took = runner.time(sides[place], place)
            seconds[place].append(took)
            same[place] &= picture.tobytes() == drawn[place].picture.tobytes()
    for place in fresh:
        drawn[place] = replace(drawn[place], seconds=tuple(seconds[place]), repeatable=same[place])
    return replace(found, a=drawn[0], b=drawn[1], finished=True)


def _with_dense(drawn: Drawn, other: Drawn) -> Drawn:
    """FLOPs of an unpatched side as the other side's run counted them: with the prompt's own length."""
    if drawn.side.config is None and other.report is not None:
        return replace(drawn, flops=other.report.flops_dense)
    return drawn


def _pipeline(model: Model, setup: Setup) -> dict[str, Any]:
    pipe = model.pipe
    return {
        "model": model.name,
        "class": type(pipe).__name__,
        "denoiser": type(model.denoiser).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "steps": setup.steps,
        "guidance": setup.guidance,
        "width": setup.width,
        "height": setup.height,
        "dtype": str(model.denoiser.dtype).removeprefix("torch."),
    }

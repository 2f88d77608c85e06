"""What is measured on the user's own pipeline: steps, pictures, whole calls. All else goes by what this returns."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..auto import made_for
from ..errors import ConfigError, StateError, UnsupportedError
from ..evaluation.equal_speed import Stopwatch
from ..evaluation.judges import Judges
from ..evaluation.models import called, quiet
from ..evaluation.paired import Paired
from ..evaluation.prompts import PromptSet
from ..evaluation.settings import plain_argument, settings_of
from ..evaluation.variants import Variant
from ..measure.timing import Timing, synchronize
from ..methods import make_method
from ..patching import denoisers, patched, plan, report
from ..runtime.stats import Report
from ..schedule.policy import Policy
from .costs import probed
from .forms import Form, able, known
from .steps import Does, Steps

TRAIN, HELD = "train", "held out"


class Bench:
    """A pipeline with its prompts.

    Args:
        pipe: without a patch; left without one.
        prompts: by name: `TRAIN` for the search, `HELD` to decide.
        call: keyword arguments of the pipeline.
        seed: the picture of the i-th prompt is drawn from the noise of a CPU generator seeded with `seed + i`.
        judges: for LPIPS.

    Raises:
        UnsupportedError: two denoisers.
        StateError: the pipeline is patched.
    """

    def __init__(
        self, pipe: Any, prompts: Mapping[str, Sequence[str]], call: Mapping[str, Any], seed: int, judges: Judges
    ) -> None:
        denoiser, *more = denoisers(pipe)
        if more:
            raise UnsupportedError(f"tune works on pipelines with one denoiser, {type(pipe).__name__} has two")
        if "_tokred" in vars(denoiser):
            raise StateError("the pipeline is patched already: unpatch it, tune needs it without")
        self.pipe, self.prompts, self.call, self.seed = pipe, prompts, dict(call), seed
        self.denoiser, self.judges = denoiser, judges
        self.metrics = Paired(judges.lpips)
        self._dense: dict[tuple[str, int], Image.Image] = {}
        self.layout = plan(denoiser, make_method(_neutral(denoiser)), Policy.constant(0), 0, None).layout
        indices = [site.block.index for site in self.layout.sites if site.kind == "feed_forward"]
        self.blocks = max(indices, default=-1) + 1
        self.kinds = frozenset(site.kind for site in (*self.layout.pairs, *self.layout.sites))

    def settings(self) -> dict[str, Any]:
        """All that pictures and times depend on beside the method."""
        texts = PromptSet("tune", (*self.prompts[TRAIN], *self.prompts[HELD]))
        return settings_of(self.pipe, texts, self.call, self.seed, 1, torch.get_num_threads()) | {
            "train": len(self.prompts[TRAIN])
        }

    def made_for(self) -> dict[str, Any]:
        """For a policy: what it was made for."""
        return made_for(self.denoiser, getattr(self.pipe, "scheduler", None))

    def describe(self) -> dict[str, Any]:
        """For a result file."""
        found = {"class": type(self.pipe).__name__, "denoiser": type(self.denoiser).__name__}
        found |= {"scheduler": type(getattr(self.pipe, "scheduler", None)).__name__}
        call = {name: plain_argument(name, value) for name, value in self.call.items()}
        size = self.unpatched(TRAIN, 0).size
        return found | {
            "steps": self.call.get("num_inference_steps"), "guidance": self.call.get("guidance_scale"),
            "width": size[0], "height": size[1], "dtype": str(self.denoiser.dtype).removeprefix("torch."), "call": call,
        }  # fmt: skip

    def noise(self) -> list[float]:
        """The noise level of each step. Runs the pipeline, which warms it up too."""
        _, found = self._recorded(_neutral(self.denoiser), Policy.constant(0), None)
        levels = {step.index: step.u for step in found.steps}
        return [levels[index] for index in sorted(levels)]

    def forms(self, steps: int) -> tuple[list[Form], dict[str, str]]:
        """Those that work here, and why the others do not."""
        levels = sorted({site.level.index for site in self.layout.sites if site.kind == "attention"})
        return able(self.denoiser, known(self.kinds, levels), steps)

    def time_unpatched(self) -> dict[str, float]:
        """Seconds of a call, and of its steps."""
        inside: list[float] = []

        def begin(*_: Any) -> None:
            synchronize(self.pipe._execution_device)
            inside.append(-time.perf_counter())

        def end(*_: Any) -> None:
            synchronize(self.pipe._execution_device)
            inside[-1] += time.perf_counter()

        hooks = (self.denoiser.register_forward_pre_hook(begin), self.denoiser.register_forward_hook(end))
        try:
            return {"seconds": self._timed(Variant("unpatched"))[1], "steps": sum(inside)}
        finally:
            for hook in hooks:
                hook.remove()

    def time_steps(self, form: Form | None, steps: Steps) -> dict[str, Any]:
        """Seconds of a call and of its steps: of the form's kinds of steps; None: all in full. See `costs`."""
        if form is None:
            config, policy = _neutral(self.denoiser), Policy.constant(0)
        else:
            config = form.config({}, len(steps.us))
            rules = [form.rule(config, ratio) for ratio in form.probed]
            first = getattr(config, "warmup", 1) if form.caches else 0
            policy = Policy(points=steps.points(probed(len(steps.units), rules, first)))
        seconds, found = self._recorded(config, policy, "time")
        return {"seconds": seconds, "steps": [[*rule, s] for rule, s in _did(found, policy)]}

    def draw(self, variant: Variant, part: str, place: int) -> dict[str, Any]:
        """Figures of a picture to the unpatched one, by metric (None: equal pictures have no PSNR), and `modes`: what
        each step did."""
        reference = self.unpatched(part, place)
        picture, _ = self._timed(variant, part, place)
        a, b = (torch.from_numpy(np.array(p)).permute(2, 0, 1)[None] for p in (reference, picture))
        device = self.pipe._execution_device
        figures = {name: float(value) for name, value in self.metrics(a.to(device), b.to(device)).items()}
        found = report(self.pipe) if variant.config is not None else None
        did = _did(found, variant.policy) if found is not None and variant.policy is not None else []
        return {name: value if math.isfinite(value) else None for name, value in figures.items()} | {
            "modes": [list(rule) for rule, _ in did],
            "size": list(picture.size),
        }

    def unpatched(self, part: str, place: int) -> Image.Image:
        """The picture of a prompt, as it is."""
        if (part, place) not in self._dense:
            self._dense[part, place] = self._timed(Variant("unpatched"), part, place)[0]
        return self._dense[part, place]

    def race(self, variants: Sequence[Variant], rounds: int) -> Timing:
        """Whole calls in alternating rounds, the unpatched pipeline first."""
        return Stopwatch(self.pipe, self.prompts[TRAIN], self.call)(variants, rounds)

    # -----------------------------------------------------------------------------------------------------------------

    def _recorded(self, config: Any, policy: Policy, record: str | None) -> tuple[float, Any]:
        with patched(self.pipe, config, policy=policy, record=record):
            seconds = self._called({}, TRAIN, 0)[1]
            found = report(self.pipe)
        if found is None:
            raise StateError(f"{type(self.pipe).__name__} never called its denoiser")
        return seconds, found

    def _timed(self, variant: Variant, part: str = TRAIN, place: int = 0) -> tuple[Image.Image, float]:
        with variant.applied(self.pipe):
            return self._called(variant.call, part, place)

    def _called(self, more: Mapping[str, Any], part: str, place: int) -> tuple[Image.Image, float]:
        number = place + (part == HELD) * len(self.prompts[TRAIN])
        generator = torch.Generator().manual_seed(self.seed + number)
        arguments = self.call | dict(more) | {"prompt": self.prompts[part][place], "generator": generator}
        device = self.pipe._execution_device
        with quiet(self.pipe):
            synchronize(device)
            start = time.perf_counter()
            with called(self.pipe):
                picture = self.pipe(**arguments).images[0]
            synchronize(device)
            took = time.perf_counter() - start
        if not isinstance(picture, Image.Image):
            raise ConfigError("tune compares pictures: leave output_type out of the call")
        return picture.convert("RGB"), took


def _did(found: Report, policy: Policy) -> list[tuple[Does, float]]:
    """What each step of a run did, and its seconds, those of all its passes. Ratios are those asked for: what a method
    makes of them (counts are snapped) costs what it costs."""
    lines: dict[int, tuple[Does, float]] = {}
    for step in found.steps:
        mode, ratio = policy.at(step.u)
        rule = (step.mode, ratio if step.mode == mode else step.ratio)
        _, before = lines.get(step.index, (rule, 0.0))
        lines[step.index] = rule, before + (step.seconds or 0.0)
    return [lines[index] for index in sorted(lines)]


def _neutral(denoiser: Any) -> Any:
    """A config that works on the denoiser; with a ratio of 0 it computes everything."""
    reasons = []
    for form in known({"stack"}, (0,)):
        config = form.config({}, 1)
        try:
            plan(denoiser, make_method(config), Policy.constant(0), 0, None)
            return config
        except (ConfigError, UnsupportedError) as error:
            reasons.append(str(error))
    raise UnsupportedError(f"no method works on this {type(denoiser).__name__}: {reasons[0]}")

"""A pipeline that is a formula: known costs, known harm, no pictures. Its best schedule can be found by trying all."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from diffusion_tokred.evaluation.variants import Variant
from diffusion_tokred.measure.timing import Timing
from diffusion_tokred.tuning.forms import Form
from diffusion_tokred.tuning.steps import Steps, planned

STEPS = 10
US = tuple(1 - i / STEPS for i in range(STEPS))
REST, DENSE = 0.1, 0.09  # seconds: of all that is no step, and of a step; a whole call takes 1
BETWEEN = {"taylorseer": 0.02, "fora": 0.015}
# What leaving out a step alone costs: most near the end, as on toy-dit.
HARM = tuple(0.01 + 0.02 * i**2 * (1.0 if i != 6 else 3.0) for i in range(STEPS))
DAMPING = 0.7  # the best one
FORMS = (
    Form("taylorseer", "taylorseer", levers={"damping": (0.5, 0.6, 0.7, 0.85, 1.0)}),
    Form("fora what=stack", "fora", {"what": "stack"}),
)


def psnr(full: Sequence[int], method: str, damping: float, place: int = 0) -> float:
    """By the full steps: the further a step is from the last full one, the worse."""
    worse, last = 1.0 if method == "taylorseer" else 3.0, 0
    error = 1e-3
    for step in range(STEPS):
        last = step if step in full else last
        error += HARM[step] * (step - last) ** 2 * worse
    if method == "taylorseer":
        error *= 1 + 4 * (damping - DAMPING) ** 2
    return 40 - 10 * math.log10(error) + place / 10


def speed(full: int, method: str) -> float:
    """By the number of full steps."""
    return 1 / (REST + full * DENSE + (STEPS - full) * BETWEEN[method])


def optimum(least: float) -> float:
    """The highest PSNR of all schedules that are so fast."""
    found = -math.inf
    for method, dampings in (("taylorseer", (0.5, 0.6, 0.7, 0.85, 1.0)), ("fora", (1.0,))):
        for count in range(1, STEPS + 1):
            if speed(count, method) >= least:
                for rest in itertools.combinations(range(1, STEPS), count - 1):
                    found = max(found, *(psnr((0, *rest), method, damping) for damping in dampings))
    return found


def fastest(least: float) -> float:
    """The speed of the fastest schedule of at least that PSNR."""
    return max(
        speed(count, method)
        for method, damping in (("taylorseer", DAMPING), ("fora", 1.0))
        for count in range(1, STEPS + 1)
        for rest in itertools.combinations(range(1, STEPS), count - 1)
        if psnr((0, *rest), method, damping) >= least
    )


class ToyBench:
    """As `tuning.bench.Bench`. `slow`: how many times as slow timed calls are than the costs of steps say.
    A list of them: of each timing in turn. `stop`: after so many pictures Ctrl-C is pressed."""

    kinds = frozenset({"attention", "feed_forward", "stack"})
    blocks = 0

    def __init__(
        self, slow: float | Sequence[float] = 1.0, stop: int | None = None, forms: Sequence[Form] = FORMS
    ) -> None:
        self.slow = itertools.repeat(slow) if isinstance(slow, float) else iter(slow)
        self.stop, self.known, self.drawn = stop, tuple(forms), 0

    def noise(self) -> list[float]:
        return list(US)

    def forms(self, steps: int) -> tuple[list[Form], dict[str, str]]:
        return list(self.known), {"deepcache": "no UNet"}

    def time_unpatched(self) -> dict[str, float]:
        return {"seconds": REST + STEPS * DENSE, "steps": STEPS * DENSE}

    def time_steps(self, form: Form | None, steps: Steps) -> dict[str, Any]:
        if form is None:
            return {"seconds": REST + STEPS * DENSE, "steps": [["full", 0.0, DENSE]] * STEPS}
        mode = "forecast" if form.method == "taylorseer" else "reuse"
        lines = [["full", 0.0, DENSE], [mode, 1.0, BETWEEN[form.method]]] * (STEPS // 2)
        return {"seconds": REST + sum(line[2] for line in lines), "steps": lines}

    def unpatched(self, part: str, place: int) -> str:
        return f"picture {place}"

    def draw(self, variant: Variant, part: str, place: int) -> dict[str, Any]:
        if self.stop is not None and self.drawn >= self.stop:
            raise KeyboardInterrupt
        self.drawn += 1
        if variant.config is None:
            return {"psnr": 30.0 + variant.call["num_inference_steps"], "modes": [], "size": [8, 8]}
        modes, full = self._plan(variant)
        value = psnr(full, variant.config.name, getattr(variant.config, "damping", 1.0), place)
        return {"psnr": value if len(full) < STEPS else None, "modes": modes, "size": [8, 8]}

    def race(self, variants: Sequence[Variant], rounds: int) -> Timing:
        seconds, slow = {}, next(self.slow)
        for variant in variants:
            took = REST + STEPS * DENSE
            if variant.call:
                took = REST + variant.call["num_inference_steps"] * DENSE
            elif variant.config is not None:
                took = slow / speed(len(self._plan(variant)[1]), variant.config.name)
            seconds[variant.name] = (took,) * rounds
        return Timing(seconds, (REST + STEPS * DENSE,) * rounds)

    def _plan(self, variant: Variant) -> tuple[list[list[Any]], list[int]]:
        assert variant.config is not None and variant.policy is not None
        rules = planned(variant.config, variant.policy, Steps(US), self.kinds)
        return [list(rule) for rule in rules], [i for i, (mode, _) in enumerate(rules) if mode == "full"]

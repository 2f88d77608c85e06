"""Settings of equal measured speed: for each method the one with which a picture takes as long as it is asked to.

Methods can be compared where they cost the same. A method's settings are put in a row from slow to fast (`Contender`),
and the row is bisected by measuring: alternating rounds against the unpatched pipeline, medians of the ratios.
Measurements are kept in a file, so that a search that was killed goes on.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, UnsupportedError
from ..measure.timing import Interval, Timing, paired
from ..measure.timing import Variant as Timed
from .cost import asked
from .models import quiet
from .results import environment, plain, result, to_json, version, write_text
from .variants import UNPATCHED, Variant, parse_variant

TOLERANCE = 0.04  # share by which speeds may differ and still count as equal

Timer = Callable[[Sequence[Variant], int], Timing]  # variants, the unpatched one first, and rounds
Speed = Callable[[str, int], Interval]  # of a variant as it is typed, from so many rounds


@dataclass(frozen=True)
class Contender:
    """A method with its settings.

    Attributes:
        name: in the comparison.
        rows: variants as they are typed, each row from slow to fast; later rows are tried where the first ones do not
            get to the speed.
        peer: another library's.
        like: peers whose algorithm it has: it does not count as ahead of them.
    """

    name: str
    rows: tuple[tuple[str, ...], ...]
    peer: bool = False
    like: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """How a contender gets to a speed.

    Attributes:
        state: "equal", "near" (its settings jump over the speed: the nearest one), "unreachable" or "does not run".
        text: the setting as it is typed; of an unreachable speed the fastest one; None of what does not run.
        speed: measured.
        why: what is to be said of it.
    """

    state: str
    text: str | None = None
    speed: Interval | None = None
    why: str = ""

    @property
    def usable(self) -> bool:
        """Whether it takes part in the comparison."""
        return self.state in ("equal", "near")

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        speed = None if self.speed is None else vars(self.speed)
        return {"state": self.state, "text": self.text, "speed": speed, "why": self.why}


def search(
    contender: Contender, speed: Speed, target: float, rounds: tuple[int, int], tolerance: float = TOLERANCE
) -> Found:
    """The setting of a contender with which it is `target` times as fast as the unpatched pipeline.

    Args:
        speed: what measures.
        rounds: to look for it, and to be sure of it.
        tolerance: by which share it may be off.
    """
    tried: list[Found] = []
    refused: list[str] = []
    for row in contender.rows:
        try:
            found = _bisect(row, speed, target, rounds, tolerance)
        except (ConfigError, UnsupportedError) as error:
            refused.append(str(error))
            continue
        if found.state == "equal":
            return found
        tried.append(found)
    if not tried:
        return Found("does not run", why=refused[0])
    near = [found for found in tried if found.state == "near"]
    return min(near or tried, key=lambda found: _off(found, target))


def _bisect(row: Sequence[str], speed: Speed, target: float, rounds: tuple[int, int], tolerance: float) -> Found:
    quick, sure = rounds

    def equal(found: Interval, part: float = 1.0) -> bool:
        return abs(found.median / target - 1) <= tolerance * part

    def close(found: Interval) -> bool:  # near enough to look no further: another timing may say otherwise
        return equal(found, 0.5)

    def look(text: str) -> Interval:
        found = speed(text, quick)
        return speed(text, sure) if equal(found) else found

    top = look(row[-1])
    if not equal(top) and top.median < target:
        top = speed(row[-1], sure)
        if not equal(top) and top.median < target:
            return Found("unreachable", row[-1], top, f"at most {top.median:.2f}x, with {row[-1]}")
    seen = {row[-1]: top}
    low, high = 0, len(row) - 2
    while low <= high and not any(map(close, seen.values())):
        text = row[middle := (low + high) // 2]
        seen[text] = look(text)
        if seen[text].median < target:
            low = middle + 1
        else:
            high = middle - 1
    certain = set[str]()
    while (text := min(seen, key=lambda text: abs(math.log(seen[text].median / target)))) not in certain:
        seen[text] = speed(text, sure)  # which may show that another one is nearer
        certain.add(text)
    found = seen[text]
    if equal(found):
        return Found("equal", text, found)
    return Found("near", text, found, f"its settings jump over {target:g}x: the nearest one")


def _off(found: Found, target: float) -> float:
    assert found.speed is not None
    return abs(math.log(found.speed.median / target))


@dataclass
class Stopwatch:
    """Times variants of a pipeline in alternating rounds, each round on another prompt: what some of them leave out
    depends on the picture.

    Attributes:
        prompts: taken by turns.
        call: keyword arguments of the pipeline.
        warmup: untimed calls of each variant before.
    """

    pipe: Any
    prompts: Sequence[str]
    call: dict[str, Any]
    warmup: int = 1
    progress: Callable[[int, int], None] | None = None

    def __call__(self, variants: Sequence[Variant], rounds: int) -> Timing:
        states = {
            variant.name: Timed(self._run(variant, 1 if place else 2), partial(variant.applied, self.pipe))
            for place, variant in enumerate(variants)
        }
        with quiet(self.pipe):
            return paired(states, rounds, self.warmup, self.pipe._execution_device, self.progress)

    def _run(self, variant: Variant, calls_a_round: int) -> Callable[[], Any]:
        count = itertools.count(-self.warmup)

        def run() -> Any:
            turn = max(next(count), 0) // calls_a_round
            noise = torch.Generator().manual_seed(turn)
            prompt = self.prompts[turn % len(self.prompts)]
            return self.pipe(**self.call | dict(variant.call) | {"prompt": prompt, "generator": noise})

        return run


@dataclass
class Notebook:
    """Measured speeds by setting, in a file. Measurements of another machine, model or version are not taken over.

    Attributes:
        file: where.
        asked: what they depend on beside the setting, as plain data.
    """

    file: Path
    asked: dict[str, Any]
    speeds: dict[str, dict[str, Any]] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.asked = json.loads(to_json(self.asked))
        if self.file.exists():
            try:
                data = json.loads(self.file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(f"{self.file} is damaged: {error}; delete it, and the search begins anew") from error
            if data.get("asked") == self.asked:
                self.speeds = data["speeds"]

    def write(self) -> None:
        write_text(self.file, to_json({"asked": self.asked, "found": self.found, "speeds": self.speeds}))

    def speed(self, timer: Timer, steps: int) -> Speed:
        """What measures a setting, or looks it up if it was measured in as many rounds. It raises UnsupportedError and
        ConfigError with the words of the variant, which are kept too."""

        def speed(text: str, rounds: int) -> Interval:
            there = self.speeds.get(text, {})
            if "error" not in there and there.get("n", 0) < rounds:
                try:
                    variant = parse_variant(text, steps)
                    timing = timer((Variant(UNPATCHED), variant), rounds)
                    there = vars(timing.speedup(variant.name))
                except (ConfigError, UnsupportedError) as error:
                    there = {"error": str(error)}
                self.speeds[text] = there
                self.write()
            if "error" in there:
                raise UnsupportedError(there["error"])
            return Interval(**there)

        return speed


def asked_of(pipe: Any, prompts: Sequence[str], call: dict[str, Any], packages: Sequence[str]) -> dict[str, Any]:
    """What speeds depend on beside the variant and the rounds."""
    return asked(pipe, (), list(prompts), call, 0) | {"packages": {name: version(name) for name in packages}}


def timing_result(timing: Timing, device: torch.device | str) -> dict[str, Any]:
    """Times as `cost.measure_cost` gives them; FLOPs, which it also has, are not counted here."""
    rows = []
    for name, seconds in timing.seconds.items():
        low, high = timing.quartiles(name)
        spread = {"median": timing.median(name), "low": low, "high": high, "n": len(seconds)}
        row: dict[str, Any] = {"name": name, "seconds": spread}
        row |= {"speedup": vars(timing.speedup(name)), "flops": None, "flops_unpatched": None, "tokens_saved": None}
        row |= {"why_null": dict.fromkeys(("flops", "flops_unpatched", "tokens_saved"), "not counted")}
        rows.append(row | {"seconds_raw": list(seconds)})
    parts: dict[str, Any] = dict(env=environment(device), pipeline={}, reduction=None, prompts=None, rows=rows)
    return plain(result("timing", **parts, intervals={"unpatched_again": vars(timing.noise)}))

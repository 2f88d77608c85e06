"""What `tune` returns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.results import to_json, write_text
from ..methods import MethodConfig
from ..schedule.policy import Policy


@dataclass(frozen=True)
class Tuned:
    """A policy, and what was found on the way to it.

    `tokred.patch(pipe, policy=tuned.policy)` puts it to work. Entries below are plain data, as in
    `result.json`: `setting` (in words), `composed` (speed from the costs of steps), `speedup` (measured, an interval),
    `train` (the metric on the training prompts), `paired` (held-out: mean, interval, the worst 5 %).

    Attributes:
        policy: with `method`, `model`, `scheduler` and `measured` filled in.
        config: the method's.
        data: all of it, `tokred.result/1` of kind "tune".
    """

    policy: Policy
    config: MethodConfig
    data: Mapping[str, Any] = field(repr=False)

    @property
    def status(self) -> str:
        """ "complete", or "interrupted": the best on the training prompts so far."""
        return str(self.data["status"])

    @property
    def reached(self) -> bool:
        """Whether the target is; the policy is the fastest found, or the best one, otherwise."""
        return bool(self.data["reached"])

    @property
    def best(self) -> Mapping[str, Any]:
        """The entry of the policy."""
        return self._entry("best") or {}

    @property
    def best_constant(self) -> Mapping[str, Any] | None:
        """The best constant setting of a single method, at the same speed."""
        return self._entry("best_constant")

    @property
    def random_search(self) -> Mapping[str, Any] | None:
        """The best of as many random settings."""
        return self._entry("random_search")

    @property
    def fewer_steps(self) -> Mapping[str, Any] | None:
        """The unpatched pipeline with fewer steps, in the same time."""
        return self._entry("fewer_steps")

    @property
    def front(self) -> Sequence[Mapping[str, Any]]:
        """Settings that no other one beats in both speed and quality, from slow to fast; training prompts."""
        return tuple(self.data["front"])

    @property
    def cliff(self) -> Mapping[str, Any] | None:
        """Where the front falls fastest: `before` and `after` (speeds), `lost` (of the metric)."""
        found = self.data["cliff"]
        return None if found is None else dict(found)

    @property
    def notes(self) -> Sequence[str]:
        """What is to be said."""
        return tuple(self.data["notes"])

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return dict(self.data)

    def report(self) -> str:
        """As a page of Markdown."""
        from .report import markdown

        return markdown(self.data)

    def save(self, folder: str | Path) -> Path:
        """Write `policy.json`, `result.json`, `report.md`, `report.html` and, with matplotlib, `plot.png`."""
        from .report import html, markdown, plot

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.policy.save(folder / "policy.json")
        write_text(folder / "result.json", to_json(self.data))
        drawn = plot(self.data, folder / "plot.png")
        write_text(folder / "report.md", markdown(self.data, "plot.png" if drawn else None))
        write_text(folder / "report.html", html(self.data, folder / "plot.png" if drawn else None))
        return folder

    def _entry(self, which: str) -> Mapping[str, Any] | None:
        name = self.data[which]
        return next((one for one in self.data["entries"] if one["name"] == name), None)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of points (speed, score) no other one beats in both, from slow to fast."""
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], -points[i][1]))
    found, best = list[int](), -math.inf
    for i in order:
        if points[i][1] > best:
            best = points[i][1]
            found.append(i)
    return found[::-1]


def cliff(points: Sequence[tuple[float, float]]) -> dict[str, float] | None:
    """Between which neighbours of a front (speed, score) the score falls most for a given factor of speed.

    Neighbours closer than 2 % are no slope but noise: they are taken with the next ones.
    """
    kept: list[tuple[float, float]] = []
    for point in points:
        if not kept or point[0] > kept[-1][0] * 1.02:
            kept.append(point)
    if len(kept) < 2:
        return None
    slopes = [(a[1] - b[1]) / math.log(b[0] / a[0]) for a, b in itertools.pairwise(kept)]
    steepest = int(np.argmax(slopes))
    before, after = kept[steepest], kept[steepest + 1]
    return {"before": before[0], "after": after[0], "lost": before[1] - after[1]}

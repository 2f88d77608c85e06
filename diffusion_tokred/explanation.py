"""What `explain` says, as data, a table and a plot."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from .drawing import draw_plan
from .errors import ConfigError
from .extras import need
from .measure.prediction import Prediction


@dataclass(frozen=True)
class SiteLine:
    """A site. `tokens`: of the image; `queries`, `keys`: rows left of them (text tokens, where only those are keys).

    `reason`: why the method leaves it alone, None where it acts. FLOPs are those of the step shown.
    """

    name: str
    kind: str
    level: int
    block: int
    reason: str | None
    tokens: int
    queries: int
    keys: int
    flops_dense: int
    flops: int


@dataclass(frozen=True)
class LevelLine:
    """A level: its grid (h, w), and `queries` and `keys` left of its `tokens` at the `used` of its `sites`."""

    level: int
    grid: tuple[int, int]
    tokens: int
    queries: int
    keys: int
    sites: int
    used: int


@dataclass(frozen=True)
class StepLine:
    """A step of the plan. `fresh`: a decision that is kept over steps (a matching, say) is made anew.

    `ratio` is what it comes to where counts of tokens are snapped (`align`). `parts`, where the policy has rules: mode
    and ratio of each of the explanation's groups; `mode` and `ratio` are then those of the largest ratio.
    """

    index: int
    u: float
    mode: str
    ratio: float
    fresh: bool
    flops: int
    parts: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Explanation:
    """What a method would do; nothing was run, nothing was timed. FLOPs (2 a multiply-add) are of the whole batch.

    Attributes:
        method, config, model: as in `Report`.
        height, width: of the latents; batch: rows of a step, guidance included; text_tokens: of a prompt.
        calls: denoiser calls that `flops` adds up: 1, or the steps of the run.
        sites, levels: see their classes; with several steps, at the step with the largest ratio.
        flops: kind of site -> (dense, reduced), with "method" (what the method spends itself, on matching), "rest"
            (outside of sites) and "total".
        ceiling: the FLOP ratio if what the method touches cost nothing.
        cache_bytes: the most that it keeps from step to step.
        steps: the plan step by step, if `num_inference_steps` was given.
        warnings: sentences.
        time: predicted seconds of the calls, if they were asked for.
        groups: where the policy has rules, the sites that go by the same points, in words.
        asked: what the policy asks of each group, or of all sites, ("reduce", 0.5), by the noise level from which on it
            holds.
        default: where nothing but the method was named, what chose its settings.
    """

    method: str
    config: dict[str, Any]
    model: str
    height: int
    width: int
    batch: int
    text_tokens: int
    calls: int
    sites: tuple[SiteLine, ...]
    levels: tuple[LevelLine, ...]
    flops: dict[str, tuple[int, int]]
    ceiling: float
    cache_bytes: int
    steps: tuple[StepLine, ...]
    warnings: tuple[str, ...]
    groups: tuple[str, ...] = ()
    asked: tuple[dict[float, tuple[str, float]], ...] = ()
    default: str = ""
    time: Prediction | None = None

    @property
    def flop_ratio(self) -> float:
        """Dense FLOPs / reduced FLOPs. Not a speed-up."""
        dense, reduced = self.flops["total"]
        return dense / reduced

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, with `flop_ratio`."""
        data = asdict(self) | {"flop_ratio": self.flop_ratio}
        for name in ("sites", "levels", "steps", "warnings", "groups"):
            data[name] = list(data[name])
        data["levels"] = [line | {"grid": list(line["grid"])} for line in data["levels"]]
        data["flops"] = {kind: list(pair) for kind, pair in self.flops.items()}
        data["steps"] = [
            s | {"u": None if math.isnan(s["u"]) else s["u"], "parts": list(map(list, s["parts"]))}
            for s in data["steps"]
        ]
        if self.time is not None:
            data["time"] |= {"dense": self.time.dense, "reduced": self.time.reduced, "speedup": self.time.speedup}
        data["asked"] = [[[u, ratio, mode] for u, (mode, ratio) in points.items()] for points in self.asked]
        return data

    def to_pandas(self) -> Any:
        """The steps of the plan as a pandas DataFrame, one row each.

        Raises:
            ImportError: pandas is not installed.
            ConfigError: there are no steps: `num_inference_steps` was not given.
        """
        pandas = need("pandas", "eval", "to_pandas()")
        rows = [asdict(step) for step in self._planned()]
        for row in rows:
            parts = row.pop("parts")
            row |= {f"ratio, {name}": ratio for name, (_, ratio) in zip(self.groups, parts, strict=False)}
        return pandas.DataFrame(rows)

    def plot(self) -> Any:
        """A matplotlib figure: what the policy asks for against the noise level, with a mark for each step.

        Raises:
            ImportError: matplotlib is not installed.
            ConfigError: there are no steps: `num_inference_steps` was not given.
        """
        steps = [(step.u, step.parts or ((step.mode, step.ratio),)) for step in self._planned()]
        names = self.groups or ("all sites",)
        return draw_plan(
            steps, dict(zip(names, self.asked, strict=True)), f"{self.method} on {self.model}, {self.calls} steps"
        )

    def _planned(self) -> tuple[StepLine, ...]:
        if not self.steps:
            raise ConfigError("there is no plan step by step: give explain num_inference_steps")
        return self.steps

    def table(self) -> str:
        """Plain text."""
        what = "one denoiser call" if self.calls == 1 else f"{self.calls} denoiser calls"
        lines = [
            f"{self.method} on {self.model}: latents {self.height}x{self.width}, batch {self.batch}, "
            f"{self.text_tokens} text tokens, {what}",
            *([f"Settings: {self.default}"] if self.default else []),
            "",
            f"{'level':>5} {'grid':>9} {'tokens':>8} {'queries':>8} {'keys':>8} {'sites used':>12}",
        ]
        for v in self.levels:
            grid, used = f"{v.grid[0]}x{v.grid[1]}", f"{v.used} of {v.sites}"
            lines.append(f"{v.level:>5} {grid:>9} {v.tokens:>8} {v.queries:>8} {v.keys:>8} {used:>12}")
        lines += ["", f"{'GFLOP':>16} {'dense':>12} {'reduced':>12} {'saved':>7}"]
        for kind, (dense, reduced) in self.flops.items():
            saved = f"{1 - reduced / dense:.1%}" if dense else "-"
            lines.append(f"{kind:>16} {dense / 1e9:>12.3f} {reduced / 1e9:>12.3f} {saved:>7}")
        lines += [
            "",
            f"FLOP ratio {self.flop_ratio:.3f}x, ceiling {self.ceiling:.3f}x (if what {self.method} touches cost "
            "nothing). FLOP ratios are not speed-ups.",
            f"Kept from step to step: {self.cache_bytes:,} bytes.",
        ]
        if self.time is not None:
            lines += ["", self.time.table()]
        if reasons := Counter(site.reason for site in self.sites if site.reason):
            lines += ["", "Left alone:", *(f"{n:>5} x {reason}" for reason, n in reasons.items())]
        if self.steps:
            lines += ["", *(f"  [{i}] {name}" for i, name in enumerate(self.groups, 1)), *([""] if self.groups else [])]
            wide = [f"{f'[{i + 1}]':>6}" for i in range(len(self.groups))]
            lines.append(" ".join([f"{'step':>5} {'u':>6} {'mode':>8} {'ratio':>6} {'GFLOP':>12}", *wide]))
            for s in self.steps:
                u = "-" if math.isnan(s.u) else f"{s.u:.3f}"
                parts = [f"{ratio:>6.3f}" for _, ratio in s.parts]
                lines.append(
                    " ".join([f"{s.index:>5} {u:>6} {s.mode:>8} {s.ratio:>6.3f} {s.flops / 1e9:>12.3f}", *parts])
                )
        return "\n".join([*lines, *(["", *(f"! {text}" for text in self.warnings)] if self.warnings else [])])

    def __str__(self) -> str:
        return self.table()

"""Two result files of `evaluate` held against each other: another version, another machine, another day."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .layout import NONE, Result, Table, check, escaped, figure, label, markdown_table, middle, read

CONDITIONS = ("extractor", "weights_sha256", "resize", "reference", "n", "n_reference")  # of FID, KID
INDEPENDENT = (
    "Intervals of differences are made from the two files' own as if the runs were independent. Of many rows some"
    " exclude 0 by chance: about one in 20. Brackets of seconds are quartiles, of which no such interval can be made."
)


def compare(a: Result, b: Result, *, any_prompts: bool = False) -> str:
    """Two result files held against each other, as Markdown: for each variant that both have, b minus a.

    The intervals of the differences are made from the two files' own (Zou and Donner, 2008), as if the runs had nothing
    in common. Runs of the same prompts have, so the intervals are rather too wide than too narrow.

    Args:
        any_prompts: also if the prompts differ, where a difference may come from the prompts alone.

    Raises:
        ConfigError: not result files of `evaluate`, other prompts, or no variant that both have.
    """
    check(a), check(b)
    shas = [(r.get("prompts") or {}).get("sha256") for r in (a, b)]
    same = shas[0] == shas[1]
    if not same and not any_prompts:
        counts = [(r.get("prompts") or {}).get("n") for r in (a, b)]
        raise ConfigError(
            f"the two runs had other prompts ({counts[0]} and {counts[1]}; sha256 {str(shas[0])[:8]} and"
            f" {str(shas[1])[:8]}): their difference says nothing about the methods (any_prompts compares"
            " them all the same)"
        )
    ours, theirs = ({v["name"]: v for v in r["variants"]} for r in (a, b))
    names = [name for name in ours if name in theirs]
    if not names:
        raise ConfigError(f"no variant is in both files: {', '.join(ours)}; {', '.join(theirs)}")
    warnings = [] if same else ["the prompts differ: a difference may come from them alone"]
    warnings += [f"{key}: {x} and {y}" for key, x, y in _differing(_conditions(a), _conditions(b))]
    for name in names:
        for key in ("reduction", "steps", "anchor"):
            if ours[name].get(key) != theirs[name].get(key):
                warnings.append(f"{name}, {key}: {ours[name].get(key)} and {theirs[name].get(key)}")
    rows = [row for name in names for row in _compared(name, ours[name], theirs[name], warnings)]
    table = Table("b - a", ("variant", "metric", "a", "b", "b - a", "0 outside"), tuple(rows))
    made = [f"* {name}: {escaped(r.get('created') or '')}" for name, r in (("a", a), ("b", b))]
    lines = ["# Two evaluations", "", *made]
    if warnings:
        lines += ["", "**Not alike:**", "", *(f"* {escaped(line)}" for line in dict.fromkeys(warnings))]
    lines += ["", *markdown_table(table), "", INDEPENDENT]
    for title, here, there in (("Only in a", ours, theirs), ("Only in b", theirs, ours)):
        if alone := [name for name in here if name not in there]:
            lines += ["", f"{title}: {escaped(', '.join(alone))}."]
    return "\n".join(lines) + "\n"


def compare_files(a: Path, b: Path, *, any_prompts: bool = False) -> str:
    """`compare` of two `result.json`. Raises ConfigError also for files that are none."""
    return compare(read(a), read(b), any_prompts=any_prompts)


def _compared(name: str, x: Result, y: Result, warnings: list[str]) -> Iterable[tuple[str, ...]]:
    """A row for each figure that both have."""
    parts = [(part, metric) for part in ("paired", "scores", "change", "distribution") for metric in x.get(part) or {}]
    parts += [("cost", key) for key in ("seconds", "speedup")]
    for part, metric in parts:
        one, other = (v.get(part) or {} for v in (x, y))
        p, q = one.get(metric), other.get(metric)
        if not p or not q or middle(p) is None or middle(q) is None:
            continue
        shown = "change of " * (part == "change") + label(metric, p.get("better"))
        if part == "distribution":
            unlike = [key for key, *_ in _differing(p, q) if key in CONDITIONS]
            if unlike:
                warnings.append(f"{name}, {label(metric)}: other {', '.join(unlike)}, so no difference is given")
                yield name, shown, figure(p), figure(q), NONE, NONE
                continue
        # Quartiles say how the calls spread, not how well the median is known.
        gap = {"mean": middle(q) - middle(p), "low": None, "high": None} if metric == "seconds" else _difference(p, q)
        low, high = gap["low"], gap["high"]
        outside = NONE if low is None or high is None else "yes" if low > 0 or high < 0 else "no"
        yield name, shown, figure(p), figure(q), figure(gap, sign=True), outside


def _difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, float | None]:
    """b - a with its interval by square-and-add: each end from the distances of the two figures to their own ends."""
    x, y = middle(a), middle(b)
    ends = [e.get(key) for e in (a, b) for key in ("low", "high")]
    if any(end is None for end in ends):
        return {"mean": y - x, "low": None, "high": None}
    low = math.hypot(y - b["low"], a["high"] - x)
    high = math.hypot(b["high"] - y, x - a["low"])
    return {"mean": y - x, "low": y - x - low, "high": y - x + high}


def _conditions(result: Result) -> dict[str, Any]:
    """What a figure depends on beside the variant."""
    timing = (result.get("timing") or {}).get("env") or {}
    parts = {key: result.get(key) or {} for key in ("env", "pipeline", "judges")} | {"timing": timing}
    found = {f"{part}.{key}": value for part, data in parts.items() for key, value in data.items() if key != "load"}
    return found | {"protocol": result.get("protocol")}


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(key, a.get(key), b.get(key)) for key in dict.fromkeys((*a, *b)) if a.get(key) != b.get(key)]

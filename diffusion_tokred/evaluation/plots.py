"""Quality against measured time: what a reduction costs and gains, between the three anchors, with intervals.

Matplotlib's own objects, no pyplot: nothing global changes, and no display is needed. Colours are after Okabe and Ito,
which colour-blind readers tell apart; markers differ too.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError
from .layout import check, half, label, number

# For each panel the first that the result has: fidelity three ways, and whether the prompt is followed.
PANELS = (
    ("psnr",),
    ("ssim", "ms_ssim"),
    ("lpips_alex", "lpips_vgg", "clip_distance", "toy_clip_distance"),
    ("clip_score", "fact_relation", "fact_shape", "fact_color", "toy_clip_score"),
)
MARKERS = "o^Dvph"  # squares are the run of fewer steps


@dataclass(frozen=True)
class Theme:
    """Colours on light or dark paper."""

    paper: str
    ink: str
    soft: str
    methods: tuple[str, ...]


LIGHT = Theme("#ffffff", "#1c1e22", "#6c7078", ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"))
DARK = Theme("#16181d", "#e8eaed", "#9aa0a8", ("#56b4e9", "#e69f00", "#2fbf94", "#e08fc0", "#f0e442", "#d98a52"))
LINES = {"numerics floor": (0, (1, 1.5)), "seed to seed": (0, (5, 2)), "time, unpatched": "-"}
STEPS = "fewer steps, unpatched"


@dataclass(frozen=True)
class Point:
    """A variant in a panel: seconds and quality, each (middle, low, high); what is written beside it."""

    name: str
    x: tuple[float, float, float]
    y: tuple[float, float, float]


def panels(result: Mapping[str, Any]) -> list[str]:
    """The metrics that `quality_plot` shows by default, the first of each of `PANELS` that the result has."""
    had = {metric for v in check(result)["variants"] for part in ("paired", "scores") for metric in v.get(part) or {}}
    return [found[0] for group in PANELS if (found := [metric for metric in group if metric in had])]


def quality_plot(
    result: Mapping[str, Any],
    path: str | os.PathLike[str] | io.BytesIO,
    metrics: Sequence[str] | None = None,
    theme: Theme = LIGHT,
) -> None:
    """Draw quality against seconds, a panel a metric, as PNG.

    Points are variants with their intervals; those that differ in a number alone are joined. A dotted line is the
    numerics floor, a dashed one the seed-to-seed distance (where a line would squeeze the points it is written in the
    corner instead), a gray curve the unpatched pipeline with fewer steps: a method on its worse side is worth nothing.
    Where nothing was timed the variants stand side by side.

    Args:
        path: a file, written whole or not at all, or a buffer.
        metrics: of `paired` or `scores`; by default `panels`.

    Raises:
        ConfigError: matplotlib is missing; a metric that the result does not have; none at all.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError('a plot needs matplotlib: pip install "diffusion-tokred[eval]"') from None
    chosen = list(panels(result) if metrics is None else metrics)
    if not chosen:
        raise ConfigError("nothing to plot: the result has neither distances nor scores")
    across = 1 if len(chosen) == 1 else 2
    down = -(-len(chosen) // across)
    figure = Figure(
        figsize=((4.4, 5.4)[across > 1] * across, (3.6, 3.9)[across > 1] * down + 0.5), dpi=150, facecolor=theme.paper
    )
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
    colors: dict[str, tuple[str, str]] = {}
    drawn: list[tuple[Any, list[tuple[Point, str]]]] = []
    for place, metric in enumerate(chosen):
        axes = figure.add_subplot(down, across, place + 1)
        drawn.append((axes, _panel(axes, result, metric, theme, colors)))
    entries = {
        text: handle for axes, _ in drawn for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    entries = {text: entries[text] for text in sorted(entries, key=lambda text: (text not in colors, text in LINES))}
    for columns in range(min(len(entries), 2 * across), 0, -1):  # as many as have room
        legend = figure.legend(
            entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False,
            labelcolor=theme.ink, fontsize=9.5 if across > 1 else 8.5, handlelength=2.4, columnspacing=1.4,
        )  # fmt: skip
        if columns == 1 or legend.get_window_extent().width < figure.bbox.width:
            break
        legend.remove()
    figure.canvas.draw()  # from here on it is known where things lie
    figure.set_layout_engine("none")
    for axes, points in drawn:
        _name_points(axes, points)
    if isinstance(path, io.BytesIO):
        figure.savefig(path, format="png", facecolor=theme.paper)
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png", facecolor=theme.paper)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _panel(
    axes: Any, result: Mapping[str, Any], metric: str, theme: Theme, colors: dict[str, tuple[str, str]]
) -> list[tuple[Point, str]]:
    """Draw one metric. `colors`: of each family of variants, shared by the panels. Returns the points with theirs."""
    variants = check(result)["variants"]
    entries = {v["name"]: entry for v in variants if (entry := _entry(v, metric)) and entry.get("mean") is not None}
    timed = any(_seconds(v) for v in variants)
    families: dict[str, list[Point]] = {}
    for place, v in enumerate(variants):
        point = _point(v, entries.get(v["name"]), None if timed else place)
        if point is not None and v.get("anchor") in (None, "steps"):
            if v is variants[0]:
                family = "unpatched"
            else:
                family = (
                    "fewer steps, unpatched" if v.get("anchor") else re.sub(r"[-_]?[\d.]+", "", v["name"]) or v["name"]
                )
            families.setdefault(family, []).append(point)
    if not families:
        raise ConfigError(f"nothing to plot for {metric}: no variant has it, with seconds where others have them")
    for family, points in families.items():
        points.sort(key=lambda point: point.x[0])
        if family in ("unpatched", STEPS):
            color, marker = theme.soft, "X" if family == "unpatched" else "s"
        else:
            at, lap = len(colors), len(colors) // len(theme.methods)
            color, marker = colors.setdefault(
                family, (theme.methods[at % len(theme.methods)], MARKERS[(at + lap) % len(MARKERS)])
            )
        x, y = zip(*(point.x for point in points), strict=True), zip(*(point.y for point in points), strict=True)
        (xs, left, right), (ys, low, high) = x, y
        axes.errorbar(
            xs, ys, xerr=_arms(xs, left, right), yerr=_arms(ys, low, high), label=family, color=color, marker=marker,
            markersize=6.5, markeredgecolor=theme.paper, markeredgewidth=0.8, linewidth=1.4, elinewidth=1.1,
            zorder=3 if color == theme.soft else 4,
        )  # fmt: skip
    if (whole := _seconds(variants[0])) and "unpatched" not in families:
        axes.axvline(whole["median"], color=theme.soft, linewidth=1, zorder=1, label="time, unpatched")
    _anchors(axes, variants, entries, theme)
    better = next(iter(entries.values())).get("better")
    axes.set_title(label(metric), loc="left", fontsize=12, color=theme.ink, fontweight="bold")
    axes.set_title(f"{better} is better" if better else "", loc="right", fontsize=9.5, color=theme.soft)
    axes.set_xlabel(
        "seconds of a call, measured (further left is faster)" if timed else "nothing was timed",
        fontsize=9.5, color=theme.soft,
    )  # fmt: skip
    if not timed:
        shown = {point.x[0]: point.name for points in families.values() for point in points}
        axes.set_xticks(list(shown), list(shown.values()), rotation=30, ha="right")
    axes.set_facecolor(theme.paper)
    axes.tick_params(colors=theme.soft, labelsize=9.5)
    axes.grid(color=theme.soft, alpha=0.22, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.soft)
    families = families if timed else {}  # the axis names them
    return [(point, colors.get(family, (theme.soft,))[0]) for family, points in families.items() for point in points]


def _anchors(axes: Any, variants: Sequence[Any], entries: Mapping[str, Any], theme: Theme) -> None:
    """Lines with bands for what rounding changes and for what other noise changes; in words if far off the points."""
    axes.margins(x=0.12, y=0.14)
    bottom, top = axes.get_ylim()
    reach, beyond = (top - bottom), []
    for anchor, name in (("numerics", "numerics floor"), ("seed", "seed to seed")):
        for v in variants:
            entry = entries.get(v["name"])
            if v.get("anchor") != anchor:
                continue
            if entry is None:
                paired = (v.get("paired") or {}).values()
                if any(e.get("identical") for e in paired):
                    beyond.append(f"{name}: no difference")
                continue
            value = entry["mean"]
            if not bottom - 0.8 * reach <= value <= top + 0.8 * reach:
                beyond.append(f"{name}: {number(value, half(entry))}")
                continue
            axes.axhline(value, color=theme.ink, linestyle=LINES[name], linewidth=1.3, zorder=2, label=name)
            if half(entry) is not None:
                axes.axhspan(entry["low"], entry["high"], color=theme.ink, alpha=0.09, linewidth=0, zorder=1)
            axes.set_ylim(min(axes.get_ylim()[0], value - 0.08 * reach), max(axes.get_ylim()[1], value + 0.08 * reach))
    if beyond:
        axes.annotate(
            "off the scale: " + "; ".join(beyond), (0, 0), (0, -36), xycoords="axes fraction",
            textcoords="offset points", va="top", fontsize=8.5, color=theme.soft,
        )  # fmt: skip


def _name_points(axes: Any, points: Sequence[tuple[Point, str]]) -> None:
    """Write each point's name beside it, where it covers no marker, arm, curve or other name, inside the axes."""
    renderer = axes.figure.canvas.get_renderer()
    inside, em = axes.get_window_extent(renderer), axes.figure.dpi / 72
    leader = {"arrowstyle": "-", "linewidth": 0.6}  # a line to the point, for names that stand further off
    taken = np.array([box for container in axes.containers for box in _boxes(axes, container, em)]).reshape(-1, 4)
    for point, color in points:
        if not point.name:
            continue
        best: tuple[float, Any] | None = None
        for dx, dy, across, along in _places():
            text = axes.annotate(
                point.name, (point.x[0], point.y[0]), (dx, dy), textcoords="offset points", ha=across, va=along,
                fontsize=8.5, color=color, zorder=6, annotation_clip=False,
                arrowprops=leader | {"color": color} if max(abs(dx), abs(dy)) > 15 else None,
            )  # fmt: skip
            box = _written(text, renderer).padded(1.5 * em)
            out = box.width * box.height - _covered(box, np.array([inside.extents]))
            cost = _covered(box, taken) + 4 * out
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = (cost, text)
            else:
                text.remove()
            if cost < 1e-6:
                break
        if best is not None:
            taken = np.vstack([taken, _written(best[1], renderer).extents])


def _written(text: Any, renderer: Any) -> Any:
    """The box of the words alone: an annotation's own would take its line to the point in."""
    from matplotlib.text import Text

    text.update_positions(renderer)
    return Text.get_window_extent(text, renderer)


def _places() -> Iterator[tuple[float, float, str, str]]:
    """Where a name may stand around its point, in points, with its alignment: the nearest first."""
    for far in (7, 12, 18, 26):
        yield from ((far, far * 0.6, "left", "bottom"), (-far, far * 0.6, "right", "bottom"))
        yield from ((far, -far * 0.6, "left", "top"), (-far, -far * 0.6, "right", "top"))
        yield from ((0, far, "center", "bottom"), (0, -far, "center", "top"))
        yield from ((far, 0, "left", "center"), (-far, 0, "right", "center"))


def _boxes(axes: Any, container: Any, em: float) -> Iterator[tuple[float, float, float, float]]:
    """Boxes (left, bottom, right, top) over a curve, its markers and the arms of its intervals, in pixels."""
    line, _, arms = container
    segments = [segment for collection in arms for segment in collection.get_segments()]
    at = axes.transData.transform(line.get_xydata())
    for x, y in at:
        yield x - 4 * em, y - 4 * em, x + 4 * em, y + 4 * em
    paths = [axes.transData.transform(segment) for segment in segments] + [at[i : i + 2] for i in range(len(at) - 1)]
    for (x0, y0), (x1, y1) in paths:
        count = max(1, round(max(abs(x1 - x0), abs(y1 - y0)) / (5 * em)))
        for i in range(count + 1):
            x, y = x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count
            yield x - em, y - em, x + em, y + em


def _covered(box: Any, others: np.ndarray) -> float:
    """The area, in pixels, that a box shares with others `(N, 4)`, summed."""
    width = np.minimum(box.x1, others[:, 2]) - np.maximum(box.x0, others[:, 0])
    height = np.minimum(box.y1, others[:, 3]) - np.maximum(box.y0, others[:, 1])
    return float((width.clip(0) * height.clip(0)).sum())


def _entry(variant: Mapping[str, Any], metric: str) -> Mapping[str, Any] | None:
    return (variant.get("paired") or {}).get(metric) or (variant.get("scores") or {}).get(metric)


def _seconds(variant: Mapping[str, Any]) -> Mapping[str, Any]:
    """Median and quartiles; empty where it was not timed."""
    seconds = (variant.get("cost") or {}).get("seconds") or {}
    return seconds if seconds.get("median") is not None else {}


def _point(variant: Mapping[str, Any], entry: Mapping[str, Any] | None, place: int | None) -> Point | None:
    """Where a variant stands: at its seconds, or at `place` where nothing was timed."""
    seconds = _seconds(variant) if place is None else {"median": place}
    if entry is None or not seconds:
        return None
    x, y = seconds["median"], entry["mean"]
    ends = [e.get(key) for e in (seconds, entry) for key in ("low", "high")]
    left, right, low, high = (m if end is None else end for end, m in zip(ends, (x, x, y, y), strict=True))
    name, short = variant["name"], re.search(r"[\d.]+", variant["name"])
    if place is None:
        steps = f"{variant['steps']} steps" if variant.get("anchor") and variant.get("steps") else None
        name = "" if name == "unpatched" else steps or (short[0] if short else name)
    return Point(name, (x, left, right), (y, low, high))


def _arms(middle: Sequence[float], low: Sequence[float], high: Sequence[float]) -> list[list[float]]:
    """Lengths of the intervals' arms below and above; a median outside its interval has none on that side."""
    return [
        [max(m - end, 0.0) for m, end in zip(middle, low, strict=True)],
        [max(end - m, 0.0) for m, end in zip(middle, high, strict=True)],
    ]

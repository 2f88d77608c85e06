"""The plan of a run as a figure: what the policy asks for, and what each step does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .extras import need

# Of Okabe and Ito's palette, which the colour-blind can tell apart; with a shape of its own for each.
_MODES = {
    "full": ("#000000", "o"), "reduce": ("#0072B2", "s"), "reuse": ("#D55E00", "^"), "forecast": ("#009E73", "D"),
    "skip": ("#CC79A7", "X"),
}  # fmt: skip


def draw_plan(
    steps: Sequence[tuple[float, Sequence[tuple[str, float]]]],
    asked: Mapping[str, Mapping[float, tuple[str, float]]],
    title: str,
) -> Any:
    """A matplotlib figure: ratio against the noise level, a mark a step, its shape and colour the mode.

    Args:
        steps: of each step the noise level (nan: unknown, then steps are numbered), and of each group of sites the
            mode and the ratio.
        asked: the groups of sites by name, in that order; each with mode and ratio by the noise level from which on
            they hold, which are drawn as a line.
        title: of the figure.
    """
    figure = need("matplotlib.figure", "eval", "a plot").Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    known = not any(math.isnan(u) for u, _ in steps)
    if known:
        for place, (name, points) in enumerate(asked.items()):
            starts = [*points, 0.0]
            ratios = [ratio for _, ratio in points.values()]
            label = f"asked for{f', {name}' if len(asked) > 1 else ''}"
            axes.stairs(ratios[::-1], starts[::-1], baseline=None, color=str(0.45 + 0.3 * place / len(asked)),
                        linestyle=("-", "--", ":", "-.")[place % 4], linewidth=1.5, label=label)  # fmt: skip
    places = [u if known else index for index, (u, _) in enumerate(steps)]
    for mode, (colour, marker) in _MODES.items():
        at = [(x, ratio) for x, (_, parts) in zip(places, steps, strict=True) for m, ratio in parts if m == mode]
        if at:
            x, y = zip(*at, strict=True)
            axes.plot(x, y, marker, color=colour, markersize=5, label=mode, clip_on=False, linestyle="none")
    axes.set(
        title=title, ylabel="ratio (share not computed)", ylim=(0, 1),
        xlabel="noise level u (1 = noise)" if known else "step",
    )  # fmt: skip
    if known:
        axes.set_xlim(1, 0)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure

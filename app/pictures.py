"""What the app draws: the difference, the tokens of a step over the picture, ratios by noise, a grid of many pictures.

Colours are after Okabe and Ito: colour-blind readers tell them apart.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffusion_tokred import Policy, StepRecord
from diffusion_tokred.evaluation.images import INFERNO, colored, difference

# As `Report.token_map` counts them, with the colour that is laid over the picture; what is computed stays as it is.
STATES = (
    ("computed", None), ("merged", "#0072b2"), ("reused", "#e69f00"), ("forecast", "#cc79a7"), ("pruned", "#d55e00"),
    ("protected", "#009e73"),
)  # fmt: skip
SIDE_COLORS = ("#0072b2", "#d55e00")  # of A and B in plots
SHOWN = 512  # pixels: small pictures are enlarged to about this many, by a whole factor
COVER = 0.62  # how much of a colour covers the picture
MODE_MARKS = {"full": ".", "reduce": "o", "reuse": "s", "forecast": "^", "skip": "X"}
INK = "#123456"  # in the plot's SVG, the place of the page's own text colour


def enlarged(picture: Image.Image, filter: Image.Resampling = Image.Resampling.NEAREST) -> Image.Image:
    """By a whole factor, to about `SHOWN` pixels."""
    factor = max(1, round(SHOWN / max(picture.size)))
    return picture if factor == 1 else picture.resize((picture.width * factor, picture.height * factor), filter)


def heat(a: Image.Image, b: Image.Image, gain: float) -> Image.Image:
    """The difference of two pictures through a colour scale, `gain` times amplified."""
    return enlarged(colored(difference(a, b), INFERNO, 1 / gain))


def layers(token_map: np.ndarray | None) -> list[tuple[str, tuple[int, int]]]:
    """(name, (pass, level)) of the maps that a run has."""
    if token_map is None:
        return []
    _, passes, levels = token_map.shape[:3]
    found = []
    for i in range(passes):
        for j in range(levels):
            name = ", ".join(([f"pass {i + 1} of {passes}"] if passes > 1 else []) + [f"level {j}"])
            found.append((name, (i, j)))
    return found


def tokens(picture: Image.Image, token_map: np.ndarray, step: int, place: tuple[int, int]) -> Image.Image:
    """The picture, gray, under the colours of what became of each token at a step."""
    states = token_map[step, place[0], place[1]]
    page = enlarged(picture.convert("L").convert("RGB"))
    colors = np.zeros((*states.shape, 4), dtype=np.uint8)
    for state, (_, color) in enumerate(STATES):
        if color is not None:
            colors[states == state] = (*_rgb(color), round(255 * COVER))
    over = Image.fromarray(colors).resize(page.size, Image.Resampling.NEAREST)
    return Image.alpha_composite(page.convert("RGBA"), over).convert("RGB")


def counts(token_map: np.ndarray, step: int, place: tuple[int, int]) -> list[tuple[str, int]]:
    """How many tokens of a step are in which state; those in none are left out."""
    found = np.bincount(token_map[step, place[0], place[1]].ravel(), minlength=len(STATES))
    return [(name, int(n)) for (name, _), n in zip(STATES, found, strict=True) if n]


@dataclass(frozen=True)
class Curve:
    """A side in the plot of ratios: its name, policy and steps."""

    name: str
    policy: Policy
    steps: Sequence[StepRecord]
    place: int = 0


def ratios_svg(curves: Sequence[Curve]) -> str:
    """Ratio by noise level, the steps of the runs marked: SVG that takes the page's text colour. "" without curves."""
    if not curves:
        return ""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "tokred", "font.size": 11}):
        figure = Figure(figsize=(6.4, 3.1), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        known = not any(math.isnan(step.u) for curve in curves for step in curve.steps)
        for curve in curves:
            color = SIDE_COLORS[curve.place]
            if known:
                noise = np.linspace(1, 0, 401)
                ratio = [curve.policy.at(float(u))[1] for u in noise]
                axes.plot(noise, ratio, color=color, linewidth=1.6, alpha=0.55, label=curve.name)
            seen: set[int] = set()
            for step in curve.steps:
                if step.index not in seen:
                    seen.add(step.index)
                    axes.plot(
                        step.u if known else step.index, step.ratio, MODE_MARKS.get(step.mode, "o"), color=color,
                        markersize=6.5, markeredgecolor=color, markerfacecolor="none" if step.mode == "full" else color,
                    )  # fmt: skip
        axes.set(ylim=(-0.06, 1.06), ylabel="share not computed", xlabel="noise level u" if known else "step")
        if known:
            axes.set_xlim(1.03, -0.03)
        axes.patch.set_alpha(0)
        axes.grid(color=INK, alpha=0.15, linewidth=0.7)
        axes.tick_params(colors=INK)
        for name, spine in axes.spines.items():
            spine.set_visible(name in ("left", "bottom"))
            spine.set_color(INK)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set_color(INK)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return text.replace("<svg ", '<svg role="img" aria-label="ratio by noise level" ', 1)


def grid(rows: Sequence[tuple[str, Sequence[Image.Image]]], heads: Sequence[str]) -> Image.Image:
    """Pictures in rows (seeds) and columns (settings), with their names."""
    cell = min(max(rows[0][1][0].width, 160), 320)
    height = round(cell * rows[0][1][0].height / rows[0][1][0].width)
    left, top, gap, font = 84, 64, 8, ImageFont.load_default(14)
    page = Image.new("RGB", (left + len(heads) * (cell + gap), top + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(page)
    for column, head in enumerate(heads):
        draw.text((left + column * (cell + gap), 38), _cut(draw, head, font, cell), fill="#1c1e22", font=font)
    for line, (name, pictures) in enumerate(rows):
        y = top + line * (height + gap)
        draw.text((8, y + 6), name, fill="#1c1e22", font=font)
        for column, picture in enumerate(pictures):
            filter = Image.Resampling.NEAREST if picture.width < cell else Image.Resampling.LANCZOS
            page.paste(picture.resize((cell, height), filter), (left + column * (cell + gap), y))
    return page


def _cut(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, room: int) -> str:
    while text and draw.textlength(text, font=font) > room:
        text = text[:-2].rstrip(".") + "." if len(text) > 2 else ""
    return text


def _rgb(color: str) -> tuple[int, int, int]:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)

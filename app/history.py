"""What was drawn before, in this session: newest first, and no more than memory should hold."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from .runs import Result

LONGEST = 12
TILE = 200  # pixels of a picture in the gallery


def add(history: Sequence[Result], found: Result) -> list[Result]:
    """With one more in front; what is too old falls off."""
    return [found, *history][:LONGEST]


def tiles(history: Sequence[Result]) -> list[tuple[Image.Image, str]]:
    """For the gallery: both pictures side by side, and in words what they are."""
    return [(_tile(found), _caption(found)) for found in history]


def _tile(found: Result) -> Image.Image:
    a, b = (drawn.picture.copy() for drawn in found.sides)
    for picture in (a, b):
        picture.thumbnail((TILE, TILE))
    page = Image.new("RGBA", (a.width + b.width + 4, max(a.height, b.height)))
    page.paste(a, (0, 0))
    page.paste(b, (a.width + 4, 0))
    return page


def _caption(found: Result) -> str:
    speed = found.speedup
    words = f"{found.a.side.name} | {found.b.side.name}, seed {found.setup.seed}"
    return words + ("" if speed is None else f", {speed.median:.2f}×")

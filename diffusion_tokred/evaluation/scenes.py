"""Reads a scene off a picture by rule, and compares it with what the prompt asked for.

The toy world is made so that this can be done exactly: no background has a tone of an object's colour, textures lie on
a fixed grid, shapes and sizes are few. No model is involved, so the scores hold for every picture, however it was made.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..zoo import scenes

FACTS = ("color", "shape", "size", "count", "relation", "background", "texture")
SIDE = 128  # pixels a side at which pictures are read
SMALLEST = 0.008  # share of the picture below which a blob of colour is not an object
MATCH = 0.6  # overlap (intersection over union) that a blob must reach with its best shape
APART = 0.15  # picture widths between the centres of two objects, for a relation to be read
AREAS = {"circle": 3.14, "square": 2.89, "star": 1.83, "ring": 2.54}  # of radius 1
_NAMES = tuple(scenes.COLORS)
_TONES = tuple(scenes.BACKGROUNDS)


@dataclass(frozen=True)
class Seen:
    """A blob of one colour. `shape` is `None` where it is like none; centre in picture widths, area as a share."""

    color: str
    shape: str | None
    size: str
    x: float
    y: float
    area: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows: its objects, the largest first, and its background."""

    objects: tuple[Seen, ...]
    background: str
    texture: str


@dataclass(frozen=True)
class Score:
    """How often a fact is right: `right` of `total`, with the 95 % Wilson interval for as many independent pictures.

    Objects of one picture are not independent, so the interval counts pictures, not objects.
    """

    right: int
    total: int
    low: float
    high: float

    @property
    def share(self) -> float:
        return self.right / self.total if self.total else math.nan

    def __str__(self) -> str:
        return f"{self.share:.1%} [{self.low:.1%}, {self.high:.1%}] ({self.right} of {self.total})"


def _grid(side: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    middle = (torch.arange(side, device=device) + 0.5) / side
    y, x = torch.meshgrid(middle, middle, indexing="ij")
    return x, y


def _classes(pictures: torch.Tensor) -> torch.Tensor:
    """For each pixel the object colour (0 to 5) or, from 6 on, the background whose two tones it lies between."""
    colors = torch.tensor(list(scenes.COLORS.values()), device=pictures.device)
    tones = torch.tensor(list(scenes.BACKGROUNDS.values()), device=pictures.device)
    pixels = pictures.movedim(1, -1)[..., None, :]  # (B, H, W, 1, 3)
    first, along = tones[:, 0], tones[:, 1] - tones[:, 0]
    t = (((pixels - first) * along).sum(-1) / along.square().sum(-1)).clamp(0, 1)
    to_tones = (pixels - first - t[..., None] * along).square().sum(-1)
    nearest = torch.cat(((pixels - colors).square().sum(-1), to_tones), -1).argmin(-1)
    # Each pixel takes the most frequent class around it: edges mix two colours into a third, noise flips single pixels.
    counts = F.one_hot(nearest, len(_NAMES) + len(_TONES)).movedim(-1, 1).float()
    return F.avg_pool2d(counts, 5, 1, 2, count_include_pad=False).argmax(1)


def _blobs(mask: torch.Tensor) -> list[torch.Tensor]:
    """Connected parts of a mask `(H, W)` that are large enough, the largest first."""
    ys, xs = mask.nonzero().unbind(1)
    box = (slice(int(ys.min()), int(ys.max()) + 1), slice(int(xs.min()), int(xs.max()) + 1))
    inside = mask[box]
    label = torch.arange(1, inside.numel() + 1, device=mask.device, dtype=torch.float32).view(inside.shape) * inside
    while True:
        spread = label
        for _ in range(8):
            spread = F.max_pool2d(spread[None, None], 3, 1, 1)[0, 0] * inside
        if torch.equal(spread, label):
            break
        label = spread
    numbers, sizes = label[inside].unique(return_counts=True)
    parts = []
    for size, number in sorted(zip(sizes.tolist(), numbers.tolist(), strict=True), reverse=True):
        if size >= SMALLEST * mask.numel():
            parts.append(torch.zeros_like(mask))
            parts[-1][box] = label == number
    return parts


def _shape(blob: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> tuple[str | None, float, float, float]:
    """The shape that overlaps a blob best, with its radius and centre."""
    size = int(blob.sum())
    cx, cy = x[blob].mean().item(), y[blob].mean().item()
    best, overlap, radius = None, MATCH, math.sqrt(size / blob.numel() / 2.5)
    reach = 1.35 * max(*scenes.SIZES.values(), math.sqrt(size / blob.numel()))
    rows, columns = (slice(max(0, int((c - reach) * SIDE)), int((c + reach) * SIDE) + 1) for c in (cy, cx))
    around, x, y = blob[rows, columns], x[rows, columns] - cx, y[rows, columns] - cy
    beyond = size - int(around.sum())
    for shape in scenes.SHAPES:
        for r in (r * scale for r in scenes.SIZES.values() for scale in (0.9, 1.0, 1.1)):
            area = r * r * AREAS[shape] * blob.numel()
            if min(area, size) < 0.95 * overlap * max(area, size):
                continue  # their sizes differ too much for that overlap
            drawn = scenes.distance(shape, x / r, y / r) < 0
            found = int((drawn & around).sum()) / (int((drawn | around).sum()) + beyond)
            if found > overlap:
                best, overlap, radius = shape, found, r
    return best, radius, cx, cy


def _texture(picture: torch.Tensor, free: torch.Tensor, tone: str, templates: torch.Tensor) -> str:
    """The texture that explains the background's pixels best."""
    first, second = torch.tensor(scenes.BACKGROUNDS[tone], device=picture.device)
    along = second - first
    share = ((picture - first[:, None, None]) * along[:, None, None]).sum(0) / along.square().sum()
    errors = (templates - share).square()[:, free].mean(1)
    return scenes.TEXTURES[int(errors.argmin())]


def read(pictures: torch.Tensor) -> list[Reading]:
    """Read scenes off pictures `(B, 3, H, W)`, RGB in [0, 1], square, of any size from 64 px.

    Raises `ValueError` for another shape or range.
    """
    if pictures.ndim != 4 or pictures.shape[1] != 3 or pictures.shape[2] != pictures.shape[3]:
        raise ValueError(f"pictures have shape {tuple(pictures.shape)}; give square ones as (B, 3, H, W)")
    if not pictures.is_floating_point() or pictures.amin() < 0 or pictures.amax() > 1:
        raise ValueError("pictures are floats in [0, 1]; divide 8-bit values by 255, and clamp")
    pictures = pictures.float()
    if pictures.shape[-1] != SIDE:
        pictures = F.interpolate(pictures, (SIDE, SIDE), mode="bilinear", antialias=True)
    x, y = _grid(SIDE, pictures.device)
    templates = torch.stack([scenes.texture(kind, x, y, 1 / SIDE) for kind in scenes.TEXTURES])
    readings = []
    for picture, classes in zip(pictures, _classes(pictures), strict=True):
        objects = []
        for number in classes[classes < len(_NAMES)].unique().tolist():
            for blob in _blobs(classes == number):
                shape, radius, cx, cy = _shape(blob, x, y)
                size = min(scenes.SIZES, key=lambda name: abs(scenes.SIZES[name] - radius))
                objects.append(Seen(_NAMES[number], shape, size, cx, cy, blob.float().mean().item()))
        free = classes >= len(_NAMES)
        votes = classes[free].bincount(minlength=len(_NAMES) + len(_TONES))
        tone = _TONES[int(votes.argmax()) - len(_NAMES)] if free.any() else _TONES[0]
        objects.sort(key=lambda seen: -seen.area)
        # Pixels beside an object are mixed with its colour.
        clear = F.max_pool2d((~free)[None, None].float(), 5, 1, 2)[0, 0] == 0
        texture = _texture(picture, clear if clear.any() else free, tone, templates)
        readings.append(Reading(tuple(objects), tone, texture))
    return readings


def relation(first: Seen, second: Seen) -> str | None:
    """How the first lies to the second; `None` where they are not clearly apart."""
    dx, dy = second.x - first.x, second.y - first.y
    if max(abs(dx), abs(dy)) < APART:
        return None
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def check(scene: scenes.Scene, reading: Reading) -> dict[str, list[bool]]:
    """What of a scene a picture got right: a list of verdicts for each of `FACTS`, one an object where they are asked.

    An object is the largest blob of its colour; without one its shape, size and the relation are wrong too.
    """
    found = [next((seen for seen in reading.objects if seen.color == o.color), None) for o in scene.objects]
    pairs = list(zip(scene.objects, found, strict=True))
    verdicts = {
        "color": [seen is not None for seen in found],
        "shape": [seen is not None and seen.shape == o.shape for o, seen in pairs],
        "size": [seen is not None and seen.size == o.size for o, seen in pairs],
        "count": [len(reading.objects) == len(scene.objects)],
        "relation": [],
        "background": [reading.background == scene.background],
        "texture": [reading.texture == scene.texture],
    }
    if scene.relation is not None:
        a, b = found
        verdicts["relation"] = [a is not None and b is not None and relation(a, b) == scene.relation]
    return verdicts


def wilson(right: int, total: int, pictures: int) -> Score:
    """`Score` with the 95 % Wilson interval of `right / total` for `pictures` independent trials."""
    if not total:
        return Score(0, 0, math.nan, math.nan)
    p, n, z = right / total, pictures, 1.959964
    middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return Score(right, total, max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale))


def score(wanted: Sequence[scenes.Scene], readings: Sequence[Reading]) -> dict[str, Score]:
    """Share of right verdicts for each of `FACTS`, over pictures of the wanted scenes, in the same order."""
    if len(wanted) != len(readings):
        raise ValueError(f"{len(wanted)} scenes and {len(readings)} readings; give one reading a scene")
    verdicts = [check(scene, reading) for scene, reading in zip(wanted, readings, strict=True)]
    scores = {}
    for fact in FACTS:
        asked = [verdict[fact] for verdict in verdicts if verdict[fact]]
        scores[fact] = wilson(sum(map(sum, asked)), sum(map(len, asked)), len(asked))
    return scores


def confusion(wanted: Sequence[scenes.Scene], readings: Sequence[Reading], fact: str) -> dict[str, Counter[str]]:
    """For each value of "shape", "size", "relation", "background" or "texture" that was asked, what was seen how often.

    "none": there is no object of the colour, or it is like no shape, or the two are not apart.
    """
    if fact not in ("shape", "size", "relation", "background", "texture"):
        raise ValueError(f"no confusion table of {fact!r}; there are: shape, size, relation, background, texture")
    table: dict[str, Counter[str]] = {}
    for scene, reading in zip(wanted, readings, strict=True):
        found = [next((seen for seen in reading.objects if seen.color == o.color), None) for o in scene.objects]
        if fact in ("shape", "size"):
            both = zip(scene.objects, found, strict=True)
            pairs = [(getattr(o, fact), seen and getattr(seen, fact)) for o, seen in both]
        elif fact == "relation":
            a, b = [*found, None][:2]
            pairs = [(scene.relation, relation(a, b) if a and b else None)] if scene.relation else []
        else:
            pairs = [(getattr(scene, fact), getattr(reading, fact))]
        for asked, seen in pairs:
            table.setdefault(asked, Counter())[seen or "none"] += 1
    return table

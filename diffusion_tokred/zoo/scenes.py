"""The toy world of the embedded pipelines: captioned scenes, seeded, endless, drawn at any resolution.

A scene is one or two coloured shapes on a textured background. Shapes are signed distances on the unit square
(x to the right, y down), so a drawing is anti-aliased and the same picture at every size.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

COLORS = {
    "red": (0.88, 0.10, 0.12),
    "yellow": (1.00, 0.82, 0.08),
    "green": (0.08, 0.60, 0.22),
    "cyan": (0.05, 0.80, 0.86),
    "blue": (0.10, 0.28, 0.90),
    "purple": (0.56, 0.16, 0.74),
}
SHAPES = ("circle", "square", "star", "ring")
SIZES = {"small": 0.125, "big": 0.195}  # radius, in picture widths
RELATIONS = ("above", "below", "left of", "right of")  # of the first object to the second
TEXTURES = ("plain", "striped", "checked", "dotted", "shaded")
# Two tones a background; none of them is the colour of an object, so that colours can be read off a picture.
BACKGROUNDS = {
    "white": ((0.96, 0.96, 0.96), (0.78, 0.78, 0.78)),
    "gray": ((0.58, 0.58, 0.58), (0.42, 0.42, 0.42)),
    "black": ((0.08, 0.08, 0.08), (0.26, 0.26, 0.26)),
    "pink": ((1.00, 0.80, 0.85), (0.93, 0.60, 0.70)),
    "brown": ((0.72, 0.54, 0.38), (0.52, 0.36, 0.22)),
}
# Never drawn for training: they show whether a model composes or remembers.
HELD_OUT = frozenset({("purple", "star"), ("green", "square"), ("yellow", "ring")})
PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES)
WORDS = (
    "a",
    "on",
    "of",
    "background",
    *COLORS,
    *SHAPES,
    *SIZES,
    "above",
    "below",
    "left",
    "right",
    *TEXTURES,
    *BACKGROUNDS,
)
CELLS = 8  # stripes, checks and dots repeat this often in a picture: one latent pixel or more at 64 px


@dataclass(frozen=True)
class Object:
    """One coloured shape; its centre `(x, y)` in picture widths."""

    color: str
    shape: str
    size: str
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `relation` is that of the first object to the second, `None` for a single object."""

    objects: tuple[Object, ...]
    texture: str
    background: str
    relation: str | None = None


def sample_scene(
    seed: int | random.Random, *, relation: str | None = "any", texture: str | None = None, held_out: bool = False
) -> Scene:
    """A random scene, the same for the same seed; `held_out=True` puts a pair that training never sees first.

    `relation`: one of `RELATIONS`, `None` for a single object, or "any" (a single object in one scene of four).
    """
    rng = seed if isinstance(seed, random.Random) else random.Random(seed)
    if relation == "any":
        relation = None if rng.random() < 0.25 else rng.choice(RELATIONS)
    allowed = [pair for pair in PAIRS if pair not in HELD_OUT]
    pairs = [rng.choice(sorted(HELD_OUT) if held_out else allowed)]
    spots = [(rng.uniform(0.42, 0.58), rng.uniform(0.42, 0.58))]
    if relation is not None:
        pairs.append(rng.choice([pair for pair in allowed if pair[0] != pairs[0][0]]))
        near, far = rng.uniform(0.25, 0.28), rng.uniform(0.72, 0.75)
        along = (near, far) if relation in ("above", "left of") else (far, near)
        across = (rng.uniform(0.44, 0.56), rng.uniform(0.44, 0.56))
        xs, ys = (along, across) if relation in ("left of", "right of") else (across, along)
        spots = list(zip(xs, ys, strict=True))
    objects = tuple(Object(*pair, rng.choice(list(SIZES)), *spot) for pair, spot in zip(pairs, spots, strict=True))
    return Scene(objects, texture or rng.choice(TEXTURES), rng.choice(list(BACKGROUNDS)), relation)


def caption(scene: Scene, *, sizes: bool = True, background: bool = True) -> str:
    """The scene in words, e.g. "a big red star above a small blue ring on a striped pink background"."""
    named = [f"a {o.size} {o.color} {o.shape}" if sizes else f"a {o.color} {o.shape}" for o in scene.objects]
    text = f" {scene.relation} ".join(named)
    return f"{text} on a {scene.texture} {scene.background} background" if background else text


def evaluation_scenes(count: int = 512, *, held_out: bool = False) -> list[Scene]:
    """The fixed scenes of every evaluation, stratified: relations (and none) and textures take turns."""
    relations = (*RELATIONS, None)
    return [
        sample_scene(
            random.Random(f"evaluation-{held_out}-{i}"),
            relation=relations[i % 5],
            texture=TEXTURES[i // 5 % 5],
            held_out=held_out,
        )
        for i in range(count)
    ]


def evaluation_prompts(count: int = 512, *, held_out: bool = False) -> list[str]:
    """Captions of `evaluation_scenes`."""
    return [caption(scene) for scene in evaluation_scenes(count, held_out=held_out)]


_TIP, _NOTCH = 1.2, 0.52  # radii of a star's points and of the corners between them
_SIDE = 0.85  # half a square's side


def distance(shape: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Signed distance to a shape of radius 1 about the origin, in radii, negative inside. `y` points down."""
    if shape == "circle":
        return torch.hypot(x, y) - 1
    if shape == "ring":
        return (torch.hypot(x, y) - 0.75).abs() - 0.27
    if shape == "square":
        over = torch.stack((x.abs(), y.abs())) - _SIDE
        return over.clamp(min=0).norm(dim=0) + over.amax(0).clamp(max=0)
    # Star: its ten half points are mirror images, so one edge tells it all. The tip lies on the first axis.
    fifth = 2 * math.pi / 5
    angle = ((torch.atan2(x, -y) + fifth / 2) % fifth - fifth / 2).abs()
    radius = torch.hypot(x, y)
    u, v = radius * angle.cos() - _TIP, radius * angle.sin()
    ex, ey = _NOTCH * math.cos(fifth / 2) - _TIP, _NOTCH * math.sin(fifth / 2)
    t = ((u * ex + v * ey) / (ex * ex + ey * ey)).clamp(0, 1)
    return torch.hypot(u - t * ex, v - t * ey) * (ex * v - ey * u).sign() * -1


def texture(kind: str, x: torch.Tensor, y: torch.Tensor, pixel: float) -> torch.Tensor:
    """Share of the second tone at each pixel, `(H, W)` in [0, 1]."""

    def wave(v: torch.Tensor) -> torch.Tensor:  # +1 and -1 in turns, with edges one pixel wide
        phase = (v * CELLS) % 1
        return ((0.25 - (phase - 0.5).abs()) * 2 / (CELLS * pixel)).clamp(-1, 1)

    if kind == "plain":
        return torch.zeros_like(x)
    if kind == "striped":
        return (1 + wave(x)) / 2
    if kind == "checked":
        return (1 + wave(x / 2) * wave(y / 2)) / 2
    if kind == "dotted":
        cell = torch.hypot((x * CELLS) % 1 - 0.5, (y * CELLS) % 1 - 0.5)
        return (0.5 + (0.3 - cell) / (CELLS * pixel)).clamp(0, 1)
    return y  # shaded: from the first tone at the top to the second


def render(scenes: Sequence[Scene], size: int | tuple[int, int], device: torch.device | str = "cpu") -> torch.Tensor:
    """Draw scenes at `size` pixels (a side, or height and width): `(B, 3, H, W)`, float32 RGB in [0, 1]."""
    height, width = (size, size) if isinstance(size, int) else size
    pixel = 1 / min(height, width)
    y, x = torch.meshgrid(
        (torch.arange(height, device=device) + 0.5) / height,
        (torch.arange(width, device=device) + 0.5) / width,
        indexing="ij",
    )
    textures = torch.stack([texture(kind, x, y, pixel) for kind in TEXTURES])
    share = textures[[TEXTURES.index(s.texture) for s in scenes], None]  # (B, 1, H, W)
    tones = torch.tensor([BACKGROUNDS[s.background] for s in scenes], device=device)  # (B, 2, 3)
    first, second = tones[..., None, None].unbind(1)
    picture = first + (second - first) * share
    for layer in range(max(len(s.objects) for s in scenes)):
        for shape in SHAPES:  # all objects of one shape at once
            rows = [i for i, s in enumerate(scenes) if len(s.objects) > layer and s.objects[layer].shape == shape]
            if rows:
                chosen = [scenes[i].objects[layer] for i in rows]
                values = torch.tensor([(o.x, o.y, SIZES[o.size], *COLORS[o.color]) for o in chosen], device=device)
                cx, cy, r = values[:, :3, None, None].unbind(1)
                cover = (0.5 - distance(shape, (x - cx) / r, (y - cy) / r) * r / pixel).clamp(0, 1)[:, None]
                picture[rows] = torch.lerp(picture[rows], values[:, 3:, None, None], cover)
    return picture

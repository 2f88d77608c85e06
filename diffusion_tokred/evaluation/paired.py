"""Figures of single pictures: of pairs (`Paired`: how far a picture is from the unpatched one), and alone (`Scores`).

Both take 8-bit RGB batches `(B, 3, H, W)` and return one float64 figure a picture, by name. A figure that does not
exist is nan or infinite, and `why_null` says why.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from ..errors import ConfigError
from ..zoo import scenes as world
from . import scenes
from .clip import Clip
from .lpips import Lpips
from .metrics import psnrs
from .similarity import BETAS, WINDOW, ms_ssims, scales, ssims

LEAST_SCENE = 64  # pixels a side from which a scene is read
PIXELS = 2**20  # of the pictures that are compared at once: so many take about 0.4 GB, and 2.4 GB with LPIPS' VGG16


class Paired:
    """Metrics of picture pairs: `(a, b)` to a figure for each pair, `a` the unpatched pipeline's pictures.

    Always `psnr` (dB), `ssim`, `ms_ssim` and `sharpness_ratio`; with its judges also `lpips_alex` or `lpips_vgg`, and
    `clip_distance`: 1 minus the cosine of the two embeddings (`toy_clip_distance` with the embedded toy-clip).

    Attributes:
        better: "higher" or "lower" for each metric. `sharpness_ratio` is better the higher it is, since reduction
            blurs; but above 1 there is noise or ringing that the unpatched picture does not have.
    """

    def __init__(self, lpips: Sequence[Lpips] = (), clip: Clip | None = None) -> None:
        self.lpips, self.clip = tuple(lpips), clip
        self.better = dict.fromkeys(("psnr", "ssim", "ms_ssim", "sharpness_ratio"), "higher")
        self.better |= {judge.name: "lower" for judge in self.lpips}
        if clip is not None:
            self.better[f"{clip.prefix}_distance"] = "lower"

    @torch.no_grad()
    def __call__(
        self, a: torch.Tensor, b: torch.Tensor, seen: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """`{metric: (B,)}` on the CPU, computed where the pictures are, `PIXELS` of them at a time.

        Args:
            seen: what calling `clip` on `a` and `b` gave, if that was done already.

        Raises:
            ConfigError: pictures that are no pairs.
        """
        _check(a)
        _check(b)
        if a.shape != b.shape:
            raise ConfigError(f"pictures come in pairs of one size, got {tuple(a.shape)} and {tuple(b.shape)}")
        count = max(1, PIXELS // (a.shape[2] * a.shape[3]))
        parts = [self._pixels(x, y) for x, y in zip(a.split(count), b.split(count), strict=True)]
        found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if self.clip is not None:
            x, y = (self.clip.project(features).double().cpu() for features in seen or (self.clip(a), self.clip(b)))
            found[f"{self.clip.prefix}_distance"] = 1 - torch.cosine_similarity(x, y)
        return found

    def _pixels(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is computed from the pictures themselves."""
        # Apple's GPUs have no float64.
        x, y = ((p.cpu() if p.device.type == "mps" else p).double() for p in (a, b))
        found = {"sharpness_ratio": _high_pass(y) / _high_pass(x)}
        x, y = x / 255, y / 255
        found = {"psnr": psnrs(x, y), "ssim": ssims(x, y), "ms_ssim": ms_ssims(x, y)} | found
        for judge in self.lpips:
            small = min(a.shape[2:]) < judge.smallest
            found[judge.name] = torch.full((len(a),), math.nan) if small else judge(a, b)
        return {name: values.double().cpu() for name, values in found.items()}

    def notes(self, size: tuple[int, int]) -> dict[str, str]:
        """What is to be said beside a metric for pictures of this size (height and width)."""
        count = scales(size)
        if count in (0, len(BETAS)):
            return {}
        sides = f"sides of {min(size)} pixels are not above {10 * 2 ** (len(BETAS) - 1)}"
        return {"ms_ssim": f"{count} of {len(BETAS)} scales, their weights scaled to a sum of 1: {sides}"}


class Scores:
    """Scores of single pictures: `(pictures, prompts)` to a figure for each.

    `clip_score` with a judge (`toy_clip_score` with toy-clip): 100 times the cosine of picture and prompt; the same by
    CLIPModels that were tuned to people's preferences, under the names they are given (`pick_score`, arXiv 2305.01569;
    `hps_score`, arXiv 2306.09341). These reward what people like, and do not notice blur. With `facts`
    also `fact_color` and so on: which share of what the prompt says about colours (shapes, ...) the picture shows, read
    by rule; the prompt must be a caption of the embedded world's.

    Attributes:
        better: "higher" for all.
    """

    def __init__(
        self, clip: Clip | None = None, facts: bool = False, preferences: Mapping[str, Clip] | None = None
    ) -> None:
        self.clip, self.facts = clip, facts
        self.judges = {} if clip is None else {f"{clip.prefix}_score": clip}
        self.judges |= preferences or {}
        names = list(self.judges)
        self.better = dict.fromkeys(names + [f"fact_{fact}" for fact in scenes.FACTS if facts], "higher")

    @torch.no_grad()
    def __call__(
        self, pictures: torch.Tensor, prompts: Sequence[str], seen: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """`{score: (B,)}` on the CPU. Raises `ConfigError` without one prompt a picture.

        `seen`: what calling `clip` on the pictures gave, if that was done already.
        """
        _check(pictures)
        if len(pictures) != len(prompts):
            raise ConfigError(f"{len(pictures)} pictures and {len(prompts)} prompts; give one prompt a picture")
        found = {}
        for name, judge in self.judges.items():
            features = seen if judge is self.clip else None
            found[name] = judge.score(pictures, prompts, features).double().cpu()
        if self.facts:
            found |= _facts(pictures.cpu(), [scene_of(prompt) for prompt in prompts])
        return found


def why_null(values: Mapping[str, float]) -> dict[str, str]:
    """The reason for each figure that is not finite."""
    reasons = {
        "psnr": "the pictures are equal: infinite",
        "ssim": f"the pictures are smaller than SSIM's window of {WINDOW} pixels",
        "ms_ssim": f"the pictures are smaller than SSIM's window of {WINDOW} pixels",
        "sharpness_ratio": "the unpatched picture is flat: it has no detail to compare with",
    }
    found = {}
    for name, value in values.items():
        if not math.isfinite(value):
            by_kind = "not a finite number"
            if name.startswith("lpips"):
                by_kind = "the pictures are smaller than the network can take"
            elif name.startswith("fact"):
                by_kind = (
                    f"the prompt does not ask for it, or the picture is not square and {LEAST_SCENE} pixels or more"
                )
            found[name] = reasons.get(name, by_kind)
    return found


def _high_pass(x: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of 8 times a pixel and its eight neighbours, over places and channels: `(B,)`.

    Borders are mirrored. ToDo (arXiv 2402.13573) compares pictures by a mean absolute high-pass. `x`: float64, whole
    numbers, so that a flat picture has exactly 0.
    """
    if min(x.shape[2:]) < 2:
        return x.new_full((len(x),), math.nan)
    kernel = x.new_full((3, 1, 3, 3), -1)
    kernel[:, :, 1, 1] = 8
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, groups=3).abs().mean((1, 2, 3))


_COLORS, _SHAPES, _SIZES, _RELATIONS, _TEXTURES, _TONES = (
    "|".join(words)
    for words in (world.COLORS, world.SHAPES, world.SIZES, world.RELATIONS, world.TEXTURES, world.BACKGROUNDS)
)
_OBJECT = f"a ({_SIZES}) ({_COLORS}) ({_SHAPES})"
_CAPTION = re.compile(f"{_OBJECT}(?: ({_RELATIONS}) {_OBJECT})? on a ({_TEXTURES}) ({_TONES}) background")


def scene_of(prompt: str) -> world.Scene | None:
    """The scene that a full caption of the embedded world describes, its places left in the middle; None for any other.

    Two objects of one colour are none of its captions: colours tell objects apart.
    """
    match = _CAPTION.fullmatch(prompt.strip())
    if match is None or match[2] == match[6]:
        return None
    objects = [world.Object(match[2], match[3], match[1], 0.5, 0.5)]
    if match[4]:
        objects.append(world.Object(match[6], match[7], match[5], 0.5, 0.5))
    return world.Scene(tuple(objects), match[8], match[9], match[4])


def _facts(pictures: torch.Tensor, wanted: Sequence[world.Scene | None]) -> dict[str, torch.Tensor]:
    """The share of right verdicts for each fact; nan where none is asked."""
    found = {f"fact_{fact}": torch.full((len(pictures),), math.nan, dtype=torch.float64) for fact in scenes.FACTS}
    asked = [place for place, scene in enumerate(wanted) if scene is not None]
    if not asked or pictures.shape[2] != pictures.shape[3] or pictures.shape[2] < LEAST_SCENE:
        return found
    for place, reading in zip(asked, scenes.read(pictures[asked].float() / 255), strict=True):
        scene = wanted[place]
        assert scene is not None
        for fact, verdicts in scenes.check(scene, reading).items():
            if verdicts:
                found[f"fact_{fact}"][place] = sum(verdicts) / len(verdicts)
    return found


def _check(pictures: torch.Tensor) -> None:
    if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
        raise ConfigError(f"pictures are {pictures.dtype} {tuple(pictures.shape)}; give uint8 (B, 3, H, W)")

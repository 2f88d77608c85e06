"""The pictures of a run, looked at: figures of each, as they are on disk, before anything is averaged."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..errors import ConfigError
from .judges import Judges
from .paired import Paired, Scores, scene_of
from .store import Item, Run, pictures
from .variants import UNPATCHED

Values = dict[str, list[float | None]]  # a figure's name to its values, None where a picture has none


@dataclass
class Figures:
    """Of one variant's pictures: `metrics` are distances to the unpatched ones, `features` `(n, d)` by extractor."""

    items: list[Item] = field(default_factory=list)
    metrics: Values = field(default_factory=dict)
    scores: Values = field(default_factory=dict)
    features: list[torch.Tensor] = field(default_factory=list)

    @property
    def prompts(self) -> list[int]:
        """A number for each picture, the same for all pictures of one text: a prompt that a file has twice is one."""
        numbers: dict[str, int] = {}
        return [numbers.setdefault(item.prompt, len(numbers)) for item in self.items]


class Panel:
    """All judges at one table.

    Attributes:
        paired, scores: what they tell of pairs, and of single pictures.
        extractors: what makes features for FID and KID.
        better: "higher" or "lower", for each figure.
    """

    def __init__(self, judges: Judges, texts: Sequence[str], device: torch.device | str = "cpu") -> None:
        """Args:
        texts: the run's prompts: facts are read if all are captions of the embedded world.
        device: what the judges run on; they are moved there.
        """
        judges.load(device)
        self.device, self.extractors, self.clip = torch.device(device), judges.extractors, judges.clip
        self.paired = Paired(judges.lpips, judges.clip)
        self.scores = Scores(judges.clip, all(map(scene_of, texts)), judges.preferences)

    @property
    def better(self) -> dict[str, str]:
        return self.paired.better | self.scores.better

    def look(
        self,
        run: Run,
        name: str,
        keys: set[tuple[int, int]],
        unpatched: Figures | None = None,
        batch: int = 16,
        progress: Callable[[float], None] | None = None,
    ) -> Figures:
        """All figures of a variant's pictures.

        Args:
            keys: (index, repeat) of the pictures to look at.
            unpatched: figures of the unpatched pictures with these keys. None: no distances are taken.
            batch: pictures looked at together.
            progress: called after each batch with the share that is done.

        Raises:
            ConfigError: a damaged picture.
        """
        found, parts, eye = Figures(), list[list[torch.Tensor]](), self.extractors.index(self.clip)
        others = iter(()) if unpatched is None else batches(run, UNPATCHED, keys, batch)
        for items, some in batches(run, name, keys, batch):
            seen = some.to(self.device)
            features = [extractor(seen) for extractor in self.extractors]
            by_clip = features[eye]  # CLIP looks once: its scores and distances are made of the same
            _append(found.scores, self.scores(seen, [item.prompt for item in items], by_clip))
            if unpatched is not None:
                rows = slice(len(found.items), len(found.items) + len(items))
                before = unpatched.features[eye][rows]
                _append(found.metrics, self.paired(next(others)[1].to(self.device), seen, (before, by_clip)))
            found.items += items
            parts.append([values.float().cpu() for values in features])
            if progress is not None:
                progress(len(found.items) / len(keys))
        found.features = [torch.cat(some) for some in zip(*parts, strict=True)]
        return found


@contextlib.contextmanager
def exactly(device: torch.device, batch: int) -> Iterator[None]:
    """For judges on a GPU: without TF32, whose 10 bits would show in the figures. Where its memory does not suffice,
    ConfigError says what to do."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"out of memory on {device} while {batch} pictures are judged together: judge fewer at once, or on the cpu;"
            " what was drawn is kept"
        ) from error
    finally:
        torch.backends.cudnn.allow_tf32 = before


def batches(run: Run, name: str, keys: set[tuple[int, int]], batch: int) -> Iterator[tuple[list[Item], torch.Tensor]]:
    """A variant's pictures with these keys, 8-bit `(B, 3, H, W)`, in the order of repeat and index."""
    waiting: list[tuple[Item, torch.Tensor]] = []
    for item, picture in pictures(run, name):
        if (item.index, item.repeat) in keys:
            waiting.append((item, picture))
        if len(waiting) == batch:
            yield [item for item, _ in waiting], torch.stack([picture for _, picture in waiting])
            waiting = []
    if waiting:
        yield [item for item, _ in waiting], torch.stack([picture for _, picture in waiting])


def foreign(run: Run, measured: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Scores made elsewhere (ImageReward needs an environment of its own), by name and picture: `scores.jsonl` in the
    run's folder, a line a picture such as {"file": "images/unpatched/000000-0-1a2b3c4d.png", "image_reward": 0.31}.

    Raises:
        ConfigError: a line that is none, a picture that is none of the run's, a name that is among the `measured` ones.
    """
    file, found = run.out / "scores.jsonl", dict[str, dict[str, float]]()
    known = {item.file for items in run.items.values() for item in items}
    if not file.exists():
        return found
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            place, values = data.pop("file"), {str(name): float(value) for name, value in data.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f'{file}, line {number}: not {{"file": ..., "name": number, ...}}: {error}') from error
        if place not in known:
            raise ConfigError(f"{file}, line {number}: {place} is no picture of this run")
        if wrong := [name for name, value in values.items() if not math.isfinite(value)]:
            raise ConfigError(f"{file}, line {number}: {', '.join(wrong)} is not a finite number")
        if taken := [name for name in values if name in measured]:
            raise ConfigError(
                f"{file}, line {number}: {', '.join(taken)} is measured here already; give that score another name"
            )
        for name, value in values.items():
            found.setdefault(name, {})[place] = value
    return found


def _append(to: Values, found: Mapping[str, torch.Tensor]) -> None:
    """nan is no figure; infinite ones (the PSNR of equal pictures) are kept."""
    for name, values in found.items():
        to.setdefault(name, []).extend(None if math.isnan(value) else value for value in values.tolist())

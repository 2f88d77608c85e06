"""What judges the pictures of an evaluation: found before anything is drawn, loaded when the pictures are there."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigError
from ..zoo import JUDGE, path
from ..zoo import scenes as world
from . import features, weights
from .inception import RESIZES

if TYPE_CHECKING:
    from .clip import Clip
    from .features import Statistics
    from .inception import Inception
    from .lpips import Lpips

DRAWN = "drawn"  # as a reference: scenes of the embedded world, drawn and not generated
DRAWN_COUNT = 1024
LPIPS = {"alexnet": "alex", "vgg16": "vgg"}  # weights -> net
PREFERENCES = {"pickscore": "pick_score", "hps": "hps_score"}  # weights -> score


@dataclass(frozen=True)
class Judges:
    """Weights on this machine, by their names in `weights.NEEDS`; without CLIP's the embedded toy-clip judges.

    Attributes:
        found: where each is.
        missing: names of those that are not here: not asked for, so no error.
        resize: of Inception's pictures, see `inception`.
    """

    found: Mapping[str, weights.Found] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    resize: str = "tf1"

    @classmethod
    def find(cls, given: Mapping[str, str | Path | None] | None = None, resize: str = "tf1") -> Judges:
        """Look for all of them; takes milliseconds.

        Args:
            given: paths (or a hub id) by name. "toy" for clip: the embedded model, whatever else is there.

        Raises:
            ConfigError: one that was given, or named by its environment variable, is not there.
        """
        if resize not in RESIZES:
            raise ConfigError(f"resize is one of {', '.join(RESIZES)}, got {resize!r}")
        given, found, missing = dict(given or {}), {}, []
        for name, need in weights.NEEDS.items():
            if name == "clip" and given.get(name) == "toy":
                continue
            try:
                found[name] = weights.find(name, given.get(name))
            except ConfigError:
                if given.get(name) is not None or weights.named(need):
                    raise
                missing.append(name)
        return cls(found, tuple(missing), resize)

    @cached_property
    def clip(self) -> Clip:
        """Raises ConfigError if the files are not what they should be, as all of these do."""
        from .clip import Clip

        return Clip(self.found["clip"].path, self.found["clip"].label) if "clip" in self.found else Clip()

    @cached_property
    def preferences(self) -> dict[str, Clip]:
        """CLIPModels tuned to people's preferences, by the names of their scores."""
        from .clip import Clip

        return {
            score: Clip(self.found[name].path, self.found[name].label)
            for name, score in PREFERENCES.items()
            if name in self.found
        }

    @cached_property
    def lpips(self) -> tuple[Lpips, ...]:
        """Those whose weights are here."""
        from .lpips import Lpips

        return tuple(Lpips(net, self.found[name].path) for name, net in LPIPS.items() if name in self.found)

    @cached_property
    def extractors(self) -> tuple[Inception | Clip, ...]:
        """What makes features for FID and KID: Inception if it is here, and CLIP's image model."""
        from .inception import Inception

        if "inception" not in self.found:
            return (self.clip,)
        return Inception(self.found["inception"].path, self.resize), self.clip

    def load(self, device: torch.device | str = "cpu") -> None:
        """Load all, so that a file that is cut or holds something else is found out now; onto a device."""
        for judge in (*self.extractors, *self.lpips, *self.preferences.values()):
            judge.to(device)

    def to_dict(self) -> dict[str, Any]:
        """For a result file: what judged, with its hashes."""
        toy = {"name": "clip", "label": JUDGE, "sha256": weights.sha256(path(JUDGE))}
        return {"clip": toy} | {name: found.to_dict() for name, found in self.found.items()}


def check_reference(reference: str | Path | None, extractors: Sequence[Inception | Clip] = ()) -> None:
    """Refuse what cannot be a reference of FID before anything is drawn (ConfigError). Reads no picture.

    `extractors`: one of them must have made it.
    """
    if reference is None or str(reference) == DRAWN:
        return
    features.check_reference(reference)
    refused = []
    for extractor in extractors:
        try:
            features.check_reference(reference, extractor)
            return
        except ConfigError as error:
            refused.append(str(error))
    if refused:
        raise ConfigError(f"{refused[0]}; load the weights of the network that made {reference}")


def references(
    reference: str | Path | None, extractors: Sequence[Inception | Clip], side: int, batch: int = 32
) -> tuple[list[Statistics | None], list[str]]:
    """The reference's statistics for each extractor, its pictures read `batch` at a time; and what is to be said.

    An `.npz` belongs to one extractor: the others have no reference then, which is said. Errors are raised if it
    belongs to none.
    """

    if reference is None:
        return [None] * len(extractors), []
    if str(reference) == DRAWN:
        source = f"{DRAWN_COUNT} drawn scenes of {side} pixels"
        return [features.Statistics.of(drawn(side, batch=batch), extractor, source) for extractor in extractors], []
    found: list[Statistics | None] = []
    refused = []
    for extractor in extractors:
        try:
            found.append(features.Statistics.load(reference, extractor, batch))
        except ConfigError as error:
            if Path(reference).is_dir():
                raise
            refused.append(str(error))
            found.append(None)
    if all(statistics is None for statistics in found):
        raise ConfigError(f"{refused[0]}; load the weights of the network that made {reference}")
    return found, refused


def drawn(side: int, count: int = DRAWN_COUNT, batch: int = 64) -> Iterator[torch.Tensor]:
    """Scenes of the embedded world, none of them an evaluation's: 8-bit batches `(B, 3, side, side)`."""
    for start in range(0, count, batch):
        some = [world.sample_scene(random.Random(f"reference-{i}")) for i in range(start, min(start + batch, count))]
        yield (world.render(some, side) * 255).round().byte()

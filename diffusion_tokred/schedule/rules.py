"""Rules of a policy: what holds at the sites of a level, of a kind, of a group of blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .points import Point, checked

_KINDS = ("attention", "cross_attention", "feed_forward", "parallel", "stack", "deep")


@dataclass(frozen=True)
class Rule:
    """What holds at some of the sites instead of the policy's own points.

    Attributes:
        points: as `Policy.points`.
        level: of the site, 0 the one with the most tokens.
        kind: of the site: "attention", "cross_attention", "feed_forward", "parallel", "stack" or "deep".
        blocks: first and last block, both inclusive, numbered as `explain` shows them.

    None means any; one at least must be given.

    Raises:
        ConfigError: nothing given, or something that is none of these.
    """

    points: tuple[Point, ...]
    level: int | None = None
    kind: str | None = None
    blocks: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", checked(self.points))
        if self.level is None and self.kind is None and self.blocks is None:
            raise ConfigError("a rule is for a level, a kind or blocks: name one, or give the policy these points")
        if self.level is not None and not _is_count(self.level):
            raise ConfigError(f"level of a rule is a whole number from 0 on, found {self.level!r}")
        if self.kind is not None and self.kind not in _KINDS:
            raise ConfigError(f"kind of a rule is one of {', '.join(_KINDS)}, found {self.kind!r}")
        if self.blocks is not None:
            pair = self.blocks
            right = isinstance(pair, Sequence) and len(pair) == 2 and all(map(_is_count, pair)) and pair[0] <= pair[1]
            if not right:
                raise ConfigError(f"blocks of a rule are the first and the last block, such as [0, 7], found {pair!r}")
            object.__setattr__(self, "blocks", (pair[0], pair[1]))

    def matches(self, level: int, kind: str, block: int) -> bool:
        """Whether it is for this site."""
        return (
            self.level in (None, level)
            and self.kind in (None, kind)
            and (self.blocks is None or self.blocks[0] <= block <= self.blocks[1])
        )

    def __str__(self) -> str:
        words = [] if self.level is None else [f"level {self.level}"]
        words += [self.kind.replace("_", "-")] if self.kind else []
        words += [f"blocks {self.blocks[0]}-{self.blocks[1]}"] if self.blocks else []
        return " ".join(words)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        named = {"level": self.level, "kind": self.kind, "blocks": list(self.blocks) if self.blocks else None}
        return {key: value for key, value in named.items() if value is not None} | {
            "points": list(map(list, self.points))
        }


def as_rule(value: Any) -> Rule:
    """A rule, or a dict of its attributes. Raises ConfigError for anything else."""
    if isinstance(value, Rule):
        return value
    known = [f.name for f in dataclasses.fields(Rule)]
    if not isinstance(value, Mapping) or not set(value) <= set(known) or "points" not in value:
        raise ConfigError(f"a rule has points, and level, kind or blocks, found {value!r}")
    return Rule(**value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0

"""What is kept from step to step: a memory for each pass of a run, with a clock, and in it a slot for each site.

Plain classes: a compiled graph may set and read their attributes. Everything goes when the run ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Clock:
    """When a pass was last computed in full. Plain numbers, turned at the root, once a step.

    Attributes:
        full: the last full step, None before the first; before: the one before that.
        count: full steps so far.
        kinds: the mode of each step so far, by index.
        noise: the noise level of each, where known.
        falls: whether it has fallen at each step so far. (Second-order solvers come twice to one level.)
    """

    def __init__(self) -> None:
        self.full: int | None = None
        self.before: int | None = None
        self.count = 0
        self.kinds: dict[int, str] = {}
        self.noise: dict[int, float] = {}
        self.falls = True

    def arrive(self, index: int, u: float) -> None:
        """A step begins, at noise level `u`."""
        if index not in self.noise:
            self.falls = self.falls and (not self.noise or u < self.noise[max(self.noise)] - 1e-6)  # False for nan
            self.noise[index] = u

    def since(self, index: int, other: int | None, noise: bool = True) -> float:
        """From another step to this one: in noise level, or in steps where that does not fall from step to step."""
        if other is None:
            return 1.0
        return self.noise[other] - self.noise[index] if noise and self.falls else float(index - other)

    def places(self, steps: Sequence[int], noise: bool = True) -> list[float]:
        """Where steps are: at their noise level, or, where that does not fall from step to step, at their number."""
        return [self.noise[step] if noise and self.falls else float(step) for step in steps]

    def fulls(self, most: int) -> list[int]:
        """The last full steps, the latest first, `most` at most."""
        return sorted((step for step, kind in self.kinds.items() if kind == "full"), reverse=True)[:most]

    def turn(self, index: int, mode: str) -> None:
        """A step is to be done in this mode. (A second call of the same step changes nothing.)"""
        if index in self.kinds:
            return
        self.kinds[index] = mode
        if mode == "full":
            self.before, self.full = self.full, index
            self.count += 1

    def amend(self, index: int) -> None:
        """It was done in full after all."""
        if self.kinds[index] != "full":
            del self.kinds[index]
            self.turn(index, "full")


class Slot:
    """What one site keeps in one pass: which of these it uses is the method's business.

    Attributes:
        out: its last output, whole; rows of it may be newer than others.
        factors: of a forecast, highest order last: what `out`, or the residual, changes by in a step.
        residual: (B, N, C), what a stack added to its tokens.
        age, since: (B, N), steps since a token was computed, and how far that is in the method's coordinate.
        score: (B, N), what a selection goes by.
        error: (B, N, C), how far a forecast was off.
        rate: (B, N), how much a token's residual changed in a step, when that was last seen.
        cache: keys and values.
        dtype: of what was kept, before it was packed.
    """

    def __init__(self) -> None:
        self.out: Any = None
        self.factors: list[Any] = []
        self.residual: Tensor | None = None
        self.age: Tensor | None = None
        self.since: Tensor | None = None
        self.score: Tensor | None = None
        self.error: Tensor | None = None
        self.rate: Tensor | None = None
        self.cache: Any = None
        self.dtype: Any = None

    def tensors(self) -> list[Tensor]:
        """All that it holds, each once."""
        found: dict[int, Tensor] = {}
        stack: list[Any] = [self.__dict__]
        while stack:
            thing = stack.pop()
            if isinstance(thing, Tensor):
                found[thing.data_ptr()] = thing
            elif isinstance(thing, dict):
                stack += thing.values()
            elif isinstance(thing, (list, tuple)):
                stack += thing
            elif hasattr(thing, "__dict__"):
                stack += thing.__dict__.values()
        return list(found.values())


class Memory:
    """What a method keeps of one level, in one pass of a run.

    Attributes:
        value: a slot for the level. `index` and `text` say at which step, and at which ratio, it was made.
        prepared: what `Method.prepare` made, by ratio; `scratch`: what sites derive from it.
        slots: by site. clock: see `Clock`.
        notes: what a method makes of the denoiser's outputs; words: the prompt: embeddings of text and pictures, class
            labels, None for what there is not.
        need: bytes that the slots will come to.
    """

    def __init__(self) -> None:
        self.value: Any = None
        self.prepared: dict[str, Any] = {}
        self.index = 0
        self.text = ""
        self.scratch: dict[str, Any] = {}
        self.slots: dict[str, Slot] = {}
        self.clock = Clock()
        self.notes: dict[str, Any] = {}
        self.words: Sequence[Any] = ()
        self.need = 0

    def serves(self, words: Sequence[Any]) -> bool:
        """Whether what is kept is good for a call with this prompt: it is the same one, or there is none to tell."""
        return len(words) == len(self.words) and all(map(_same, words, self.words))

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors in the slots keep from being freed: a view keeps all that it is a view of."""
        found = [tensor.untyped_storage() for slot in self.slots.values() for tensor in slot.tensors()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in found}.values())


def _same(now: Any, before: Any) -> bool:
    """Of tensors by their values: this waits for the device, but only if they are not one object, as pipelines have."""
    if now is before or not (isinstance(now, Tensor) and isinstance(before, Tensor)):
        return isinstance(now, Tensor) == isinstance(before, Tensor)
    return now.shape == before.shape and torch.equal(now, before)

"""The `stack` site: all transformer blocks of a denoiser, taken as one.

What a method does at its two ends is a pair of calls, because the loop between them belongs to the model. At the first
block it may hand on fewer tokens, or stop; the blocks then see packed tokens, with their own rotary rows, and attend
to keys and values that are kept of all; after the last block it gives all tokens back. The blocks are wrapped one by
one, and their loop is not copied.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StateError, UnsupportedError
from ..tokens.select import rows_at
from .ledger import Wrapper
from .rows import Cache, Out, packed, row_by_row
from .site import Block, Call, Leaf, Level, Site
from .store import Slot
from .work import Weights


class PairCall:
    """A run through a pair site, as a method sees it. Attributes: site, plan, level, slot, prepared: as in `Call`."""

    def __init__(self, site: Site) -> None:
        self.site, self.plan, self.level = site, site.plan, site.level

    @property
    def slot(self) -> Slot:
        return self.level.memory.slots[self.site.name]

    @property
    def prepared(self) -> Any:
        return self.level.memory.prepared[self.plan.text]

    def note(self, status: Callable[[], Tensor]) -> None:
        """As `Call.note`."""
        if self.level.recording and self.level.status is None:
            self.level.status = status()


class StackCall(PairCall):
    """A run through the stack.

    Attributes:
        x: (B, N, C), the image tokens before the first block.
        at: (M,) or (B, M) int64, which of them are computed; None for all.
        entered: (B, M, C), these tokens, as they go in.
        after: (B, N, C), the image tokens after the blocks that run in any case (see `StackSite.divide`).
    """

    def __init__(self, site: StackSite, x: Tensor) -> None:
        super().__init__(site)
        self.x = self.entered = self.after = x
        self.at: Tensor | None = None


class StackSite(Site):
    """All blocks of a denoiser.

    Args:
        name: where the blocks are.
        blocks: the modules in the order of execution, each with whether it takes text and image as one sequence.
        level: the level that they work on.
        inner: all sites inside of them.

    Attributes:
        refused: arguments of the denoiser's call that hand something to the tokens between two blocks -> what it is.
        ahead: how many blocks run in any case, before the method decides about the others.
        first, last: of the blocks that this call of the denoiser runs (skip-layer guidance leaves some out).
    """

    kind = "stack"
    offers = frozenset({"pack"})
    separate = False  # text goes through the blocks beside the image, and comes out first

    def __init__(
        self, name: str, blocks: Sequence[tuple[nn.Module, bool]], level: Level, inner: Sequence[Site],
        refused: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(name, blocks[0][0], Block(0, name, blocks[0][0], inner[0].block.width, level), level)
        self.blocks, self.inner = list(blocks), tuple(inner)
        self.refused = refused or {}
        self.attentions: list[Any] = [site for site in inner if site.kind == "attention" and "cache" in site.offers]
        self.packs = False
        self.store: torch.dtype | None = None  # see `Method.store`
        self.ahead = 0
        self.first, self.last = 0, len(self.blocks) - 1
        self.call: StackCall | None = None
        self.changes: dict[str, Any] = {}

    # --- installing ----------------------------------------------------------------------------------------------

    def divide(self, ahead: int) -> None:
        """Let the first blocks run in any case: after them, `Method.goes_on` says whether the others do. Before it is
        installed.

        Raises:
            UnsupportedError: there are no others.
        """
        if ahead >= len(self.blocks):
            raise UnsupportedError(f"{self.name} has {len(self.blocks)} block(s): nothing is left after {ahead}")
        self.ahead = ahead
        inside = {id(part) for part in self.parts()}
        self.inner = tuple(site for site in self.inner if id(site.module) in inside)

    def wrappers(self, method: Any) -> list[Wrapper]:
        self.packs, self.store = "pack" in method.needs(self.kind), method.store
        found: list[Wrapper] = [
            StackBlock(self, module, joint, i, method) for i, (module, joint) in enumerate(self.blocks)
        ]
        if self.packs:
            for site in self.attentions:
                found.append(Leaf(site, attend))
            found += [TextRows(self, name, module) for name, module in self._of_the_text()]
            for inner in self.inner:
                inner.wrapped = frozenset(inner.of_the_text())
        return found

    def _of_the_text(self) -> Iterator[tuple[str, nn.Module]]:
        for site in self.inner:
            yield from site.of_the_text().items()

    def refusal(self, needs: frozenset[str]) -> str | None:
        if "pack" not in needs:
            return None
        reasons = ((site.name, site.refusal(frozenset({"cache", "at"}))) for site in self.attentions)
        return next((f"{name}: {reason}" for name, reason in reasons if reason), None)

    def enter(self, needs: frozenset[str]) -> None:
        if "pack" in needs:
            for site in self.attentions:
                site.enter(frozenset({"cache"}))

    def leave(self) -> None:
        self.call, self.changes, self.level.at = None, {}, None
        for site in self.attentions if self.packs else ():
            site.leave()

    def check(self, inputs: Mapping[str, Any]) -> None:
        """See which blocks a call of the denoiser runs, and refuse one that this cannot be combined with.

        Raises:
            UnsupportedError: something is added to the tokens between two blocks.
        """
        skipped = inputs.get("skip_layers") or ()
        runs = [i for i in range(len(self.blocks)) if i not in skipped]
        self.first, self.last = runs[0], runs[-1]
        for name, what in self.refused.items():
            if inputs.get(name) is not None:
                raise UnsupportedError(
                    f"{what} are added to all tokens between two blocks, so blocks cannot be run on some of them, or "
                    "left out as a whole: use a form that works inside of the blocks (mode='faithful', "
                    "what='modules')"
                )

    def parts(self) -> Iterator[nn.Module]:
        for module, _ in self.blocks[self.ahead :]:
            yield from module.modules()

    def slots(self) -> dict[str, Slot]:
        found = super().slots()
        for site in self.attentions if self.packs else ():
            found[site.name] = Slot()
            found[site.name].cache = Cache(dtype=self.store)
        return found | {name: Slot() for name, _ in (self._of_the_text() if self.packs else ())}

    def weights(self) -> Weights:
        return Weights(query=0)  # all that it computes is its inner sites'

    # --- at its two ends -----------------------------------------------------------------------------------------

    def open(self, method: Any, kwargs: dict[str, Any], joint: bool) -> None:
        """At the first block: what goes in, and how the rest of the call follows it."""
        rows = kwargs[self.argument] = row_by_row(kwargs[self.argument])
        x = self.level.image(rows, self.level.start if joint else 0)
        grid = self.level.grid
        if grid is None or x.shape[1] != grid[0] * grid[1]:
            raise StateError(f"{self.name} got {x.shape[1]} tokens, where its level has a grid of {grid}")
        self.call = StackCall(self, x)
        self.call.at = method.enter(self.call)
        if self.call.at is not None:
            self.call.entered = rows_at(x, self.call.at)
            self.changes = self.follow(kwargs, x, rows, self.call.at)
            self.level.at = self.call.at

    def follow(self, kwargs: dict[str, Any], x: Tensor, rows: Tensor, at: Tensor) -> dict[str, Any]:
        """Arguments of the blocks that have a row for each token, for the tokens `at`: rotary positions."""
        attention = self.attentions[0]
        text = kwargs.get("encoder_hidden_states")
        beside = text.shape[1] if isinstance(text, Tensor) and attention.text_first else 0
        start = attention.start + beside
        call = Call.__new__(Call)  # as the attention's own would be, if it were handed all tokens
        call.x, call.rows, call.kwargs = x, rows, kwargs
        found: dict[str, Any] = attention.place(call, at, start, beside)
        return found

    def decide(self, method: Any, out: Any, joint: bool) -> None:
        """After the blocks that run in any case: do the others?"""
        call = self.call
        assert call is not None
        rows = out[-1] if isinstance(out, tuple) else out
        call.after = self.level.image(rows, self.level.start if joint else 0)
        if method.goes_on(call):
            self.plan.mode = "full"  # the root sees it after the call

    def close(self, method: Any, out: Any, joint: bool) -> Any:
        """After the last block: all tokens again."""
        call = self.call
        assert call is not None
        parts = out if isinstance(out, tuple) else (out,)
        start = self.level.start if joint else 0
        rows = parts[-1]
        skipped = call.plan.mode in ("reuse", "forecast", "skip")
        y = method.leave(call, None if skipped else self.level.image(rows, start))
        self.level.at = None
        n = call.x.shape[1] if call.at is None else call.at.shape[-1]
        if y is not rows:
            tail = rows.shape[1] - start - n
            pieces = ([rows[:, :start]] if start else []) + [y] + ([rows[:, start + n :]] if tail else [])
            rows = y if len(pieces) == 1 else torch.cat(pieces, 1)
        return (*parts[:-1], rows) if isinstance(out, tuple) else rows


def attend(call: Call) -> Out:
    """At an attention inside of a stack: the tokens under way attend to the kept keys and values of all."""
    cache = call.slot.cache
    cache.at = call.level.at
    out = call.compute(kv=cache)
    cache.at = None  # of this step, not to be kept
    return out


class TextRows(Wrapper):
    """A module of a stack that is handed the prompt: what it makes of it at a full step serves until the next."""

    def __init__(self, site: StackSite, name: str, module: nn.Module) -> None:
        super().__init__(module)
        self.site, self.name = site, name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self.retire(args, kwargs)
        plan, level = self.site.plan, self.site.level
        if plan.idle or not level.running:
            return self.base(*args, **kwargs)
        slot = level.memory.slots[self.name]
        if plan.mode == "full":
            out = self.base(*args, **kwargs)
            slot.out, slot.dtype = packed(out, self.site.store), out.dtype
            return out
        # Nothing is kept where skip-layer guidance left the block out of the full step.
        return self.base(*args, **kwargs) if slot.out is None else slot.out.to(slot.dtype)


class StackBlock(Wrapper):
    """One block of a stack."""

    def __init__(self, site: StackSite, module: nn.Module, joint: bool, index: int, method: Any) -> None:
        super().__init__(module)
        self.site, self.joint, self.index, self.method = site, joint, index, method
        self.names = [*inspect.signature(type(module).forward).parameters][1:]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self.retire(args, kwargs)
        site = self.site
        if site.plan.idle or not site.level.running:
            return self.base(*args, **kwargs)
        kwargs = dict(zip(self.names, args, strict=False)) | kwargs
        if self.index == site.first:
            site.open(self.method, kwargs, self.joint)
        if site.call is None:
            raise StateError(f"{site.name}: the first block was left out of this call, so its tokens are not known")
        if site.plan.mode == "full" or self.index < site.first + site.ahead:
            out = self.base(**kwargs)
        elif site.plan.mode == "reduce":
            if self.index == site.first:
                kwargs[site.argument] = self._packed(kwargs[site.argument])
            kwargs |= {name: value for name, value in site.changes.items() if name in kwargs}
            out = self.base(**kwargs)
        else:
            out = self._passed(kwargs)
        if self.index + 1 == site.first + site.ahead:
            site.decide(self.method, out, self.joint)
        return site.close(self.method, out, self.joint) if self.index == site.last else out

    def _packed(self, rows: Tensor) -> Tensor:
        """The sequence with the chosen tokens in the place of the image's."""
        call, start = self.site.call, self.site.level.start if self.joint else 0
        assert call is not None
        end = start + call.x.shape[1]
        pieces = [rows[:, :start]] if start else []
        pieces.append(call.entered)
        if rows.shape[1] > end:
            pieces.append(rows[:, end:])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)

    def _passed(self, kwargs: dict[str, Any]) -> Any:
        """What comes out of a block that is left out: what went in."""
        rows, text = kwargs[self.site.argument], kwargs.get("encoder_hidden_states")
        return (text, rows) if self.site.separate and not self.joint else rows

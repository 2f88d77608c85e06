"""The site protocol: what makes M methods and A architectures cost M + A files.

A backbone turns a denoiser into *sites*: modules that take image tokens and return image tokens. A method, which knows
no model, is handed a `Call` at a site and returns an `Out`. Between the two stand only these classes.

They are plain classes on purpose: a compiled graph may build them, and may set and read their attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StateError
from ..tokens import lifted
from .ledger import Wrapper
from .rows import KV, Attended, Cache, Out
from .store import Memory, Slot
from .work import Weights

KINDS = ("attention", "cross_attention", "feed_forward", "parallel", "stack", "deep")
OFFERS = {
    "at": "run on tokens at chosen places, one index set a sample",
    "kv": "attention with keys and values from any linear reduction of the tokens",
    "kv_select": "attention with keys and values from chosen tokens",
    "cache": "attention whose keys and values of other tokens are kept from earlier steps",
    "attended": "run on tokens at chosen places, with what attention returned for them kept from earlier steps",
    "watch": "see the queries, keys and values as the attention does",
    "queries": "see the queries and the prompt's keys",
    "pack": "run all blocks on chosen tokens, with the others' keys and values kept",
}


class Plan:
    """What a site does at this step. Written by the root, eagerly, before the denoiser runs; read by the leaves.

    `mode` is "full" (dense), "reduce", "reuse", "forecast" or "skip". `text` is the ratio as a string: Dynamo makes
    floats dynamic, which would turn every token count into a symbol, but specialises on strings. `keep`: a full step
    whose result a later one will use.
    """

    def __init__(self) -> None:
        self.mode = "full"
        self.text = "0.0"
        self.refresh = True
        self.keep = False

    @property
    def idle(self) -> bool:
        """Nothing to do: the module runs as if nobody were here."""
        return self.mode == "full" and not self.keep

    @property
    def ratio(self) -> float:
        """Share of tokens not computed."""
        return float(self.text)

    def set(self, mode: str, ratio: float, refresh: bool = True, keep: bool = False) -> None:
        self.mode, self.text, self.refresh, self.keep = mode, repr(float(ratio)), refresh, keep


class Level:
    """What the sites of one resolution share: the token grid, a key for random draws, and a slot of memory.

    Attributes:
        index: 0 for the largest attention level.
        grid: (h, w) tokens, known once the level has been reached. A video's frames lie one below another.
        start: rows before the image where text and image are one sequence.
        halves: how many parts of the batch belong to the same images ([uncond; cond] = 2), 1 when unknown.
        key: 0-d int64 tensor on the tokens' device, new at each step; see `tokens.draw`.
        memory: this pass's `Memory`, kept over the steps of a run.
        scratch: what sites derive from a plan, such as rows of a rotary table; emptied before each denoiser call.
        status: (B, N) uint8, what became of each token, when the run records it.
        running: False outside of the denoiser's calls, where another model may call modules that it shares with it.
        at: (M,) or (B, M) int64, which of the tokens are under way, while a stack runs on some of them; else None.
        guard: the protected tokens (`runtime.regions`), or None; protected: whether there are any in this run.
        weights: (1 or pictures, N) float32, how much each token matters to the user, or None.
        gap, pace: 0-d float32, for methods that keep something: how far it is from the last full step of this pass,
            and from its last step, in steps or in noise level (`Method.coordinate`).
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.running = True
        self.at: Tensor | None = None
        self.gap: Tensor | None = None
        self.pace: Tensor | None = None
        self.grid: tuple[int, int] | None = None
        self.start = 0
        self.halves = 1
        self.key: Tensor | None = None
        self.guard: Any = None
        self.protected = False
        self.weights: Tensor | None = None
        self.weighed: Any = None  # of what the weights were made
        self.memory = Memory()
        self.scratch: dict[str, Any] = {}
        self.recording = False
        self.status: Tensor | None = None

    @property
    def marked(self) -> bool:
        """Whether the user has marked anything of it."""
        return self.guard is not None or self.weights is not None

    def lift(self, scores: Tensor, shared: bool = False) -> Tensor:
        """Scores (R, N) by which tokens are chosen, large means compute, with what the user has marked: see
        `tokens.lifted`. `shared`: for one index set for all pictures, R = 1."""
        if self.weights is not None:
            scores = lifted(scores, self.weights.mean(0, keepdim=True) if shared else self.weights)
        if self.guard is not None:
            scores = lifted(scores, None, self.guard.shared if shared else self.guard.tokens)
        return scores

    def image(self, rows: Tensor, start: int) -> Tensor:
        """The image tokens of a sequence (B, S, C), where they begin at row `start`: (B, N, C).

        What follows them (reference pictures, padding) is not theirs. A sequence of fewer rows is returned whole.
        """
        n = (
            rows.shape[1]
            if self.grid is None
            else self.grid[0] * self.grid[1]
            if self.at is None
            else self.at.shape[-1]
        )
        return rows if rows.shape[1] <= n else rows.narrow(1, start, n)


class Block:
    """What the sites of one transformer block share during a call: its input (`width` channels), and a scratch slot.

    `joint`: the block is handed text and image as one sequence. `argument`: the name it has for it.
    """

    argument = "hidden_states"

    def __init__(
        self, index: int, name: str, module: nn.Module, width: int = 0, level: Level | None = None, joint: bool = False
    ) -> None:
        self.index, self.name, self.module, self.width = index, name, module, width
        self.level, self.joint = level, joint
        self.input: Tensor | None = None
        self.scratch: Any = None

    def keep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember the image tokens that the block is handed."""
        rows = args[0] if args else kwargs[self.argument]
        level = self.level
        self.input = rows if level is None else level.image(rows, level.start if self.joint else 0)


class Site:
    """One module where a method may act. Backbones subclass it; a method sees the attributes and `Call`.

    Attributes:
        name: the module's path in the denoiser.
        kind: one of `KINDS`.
        block: the `Block` it belongs to (the site's place in the order of execution is `block.index`).
        level: the `Level` it belongs to.
        offers: which of `OFFERS` it can do; `lacks`: why it cannot do others, for users to read.
        joint: it is handed text and image as one sequence.
        extras: rows that are none of the picture's may follow it (reference pictures, padding).
        inner: sites inside of it (the attention of a `parallel` site): a method acts on it or on them.
        leader: True at the first of its level's sites that the method uses.
        depth: the place of its block among the model's blocks with sites of its kind, and their number.
        gives_text: what comes out has rows for the text too.
        width: channels of what comes out.
    """

    kind = "attention"
    argument = "hidden_states"
    joint = False
    extras = False
    offers: frozenset[str] = frozenset()
    lacks: Mapping[str, str] = MappingProxyType({})
    inner: tuple[Site, ...] = ()
    wrapped: frozenset[str] | None = None  # of `of_the_text`, in a patched model
    tapping: Any = None  # see `TappedSite`

    def __init__(self, name: str, module: nn.Module, block: Block, level: Level) -> None:
        self.name, self.block, self.level = name, block, level
        self.module: Any = module  # diffusers' modules are not typed
        self.holder: Any = module  # what has the `processor` that does the work, at an attention
        self.plan = Plan()
        self.leader = False
        self.depth = (0, 1)

    @property
    def gives_text(self) -> bool:
        return self.joint

    def beside(self, text: int) -> int:
        """Of `text` rows beside the image's, those that what comes out has."""
        return text if self.gives_text else 0

    @property
    def width(self) -> int:
        return self.block.width

    @property
    def start(self) -> int:
        """The row at which the image begins in what the module is handed."""
        return self.level.start if self.joint else 0

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The sequence among a call's arguments, (B, S, C)."""
        return args[0] if args else kwargs[self.argument]

    def run(self, call: Call, x: Tensor, at: Tensor | None, kv: KV | Cache | Attended | None, watch: Any) -> Out:
        """Call the module itself on `x`."""
        raise NotImplementedError

    def fill(self, call: Call, x: Tensor) -> Tensor:
        """The sequence handed in, with `x` in the place of its image tokens."""
        rows, start, n = call.rows, self.start, call.x.shape[1]
        if rows.shape[1] == n or x is call.x:
            return x if rows.shape[1] == n else rows
        parts = [rows[:, :start]] if start else []
        return (
            torch.cat([*parts, x, rows[:, start + n :]], 1) if rows.shape[1] > start + n else torch.cat([*parts, x], 1)
        )

    def cut(self, call: Call, rows: Tensor, m: int, rest: tuple[Any, ...] = ()) -> Out:
        """The other way round: of a sequence that came back, `m` rows are image tokens."""
        if rows.shape[1] == m:
            return Out(rows, rest)
        start = self.start
        tail = rows[:, start + m :] if rows.shape[1] > start + m else None
        return Out(rows[:, start : start + m], rest, rows[:, :start] if start else None, tail, rows)

    def write(self, call: Call, out: Out) -> Any:
        """What the module's caller expects."""
        if not out.rest:
            return out.rows()
        return (out.rows(), *out.rest, *(other.rows() for other in out.beside))

    def kept(self, call: Call, out: Out) -> Out:
        """What is to be kept of an output, for `given` to make one of it at another step. Default: itself."""
        return out

    def given(self, call: Call, kept: Out) -> Out:
        """An output, from one that was kept."""
        return kept

    def weights(self) -> Weights:
        """The cost of a row, for `measure.flops`."""
        raise NotImplementedError

    def refusal(self, needs: frozenset[str]) -> str | None:
        """Why a method that needs this (of `OFFERS`) cannot work with what is installed here now; None if it can."""
        return None

    def wrappers(self, method: Any) -> list[Wrapper]:
        """What makes a method act here."""
        return [Leaf(self, method.apply)]

    def parts(self) -> Iterator[nn.Module]:
        """The modules inside of it."""
        yield from self.module.modules()

    def of_the_text(self) -> dict[str, nn.Module]:
        """Modules, by path, that are handed nothing but the prompt, which is the same at each step of a run."""
        return {}

    def keeps_text(self) -> bool:
        """Whether what these make of it is kept, where the site is in a stack that packs. (Projections that are fused
        after the patch are others than those that it knows.)"""
        names = set(self.of_the_text())
        return bool(names) and (self.wrapped is None or names <= self.wrapped)

    def slots(self) -> dict[str, Slot]:
        """Empty slots for what is kept here, by name of the site."""
        return {self.name: Slot()}

    def check(self, inputs: Mapping[str, Any]) -> None:
        """Refuse a call of the denoiser that reduction here cannot be combined with. Raises UnsupportedError."""

    def enter(self, needs: frozenset[str]) -> None:
        """Eagerly, before each call of the denoiser."""

    def leave(self) -> None:
        """Eagerly, after each call of the denoiser, also after an exception."""


class Call:
    """One call of a site's module, as a method sees it.

    Attributes:
        x: (B, N, C) image tokens handed to the module (after the block's norm and modulation; at a `parallel` site,
            which is a whole block, before them).
        rows: (B, S, C) the sequence that they are part of.
        site, plan, level, block: see those classes; `block.input` is the block's input, before its first norm.
    """

    def __init__(self, site: Site, base: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.site, self.base, self.args, self.kwargs = site, base, args, kwargs
        self.plan, self.level, self.block = site.plan, site.level, site.block
        self.rows = site.read(args, kwargs)
        self.x = self.level.image(self.rows, site.start)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the image tokens.

        Raises:
            StateError: the module was handed another number of tokens than its level's grid has.
        """
        grid, n = self.level.grid, self.x.shape[1]
        if n < self.rows.shape[1] and not (self.site.extras or self.site.joint):
            n = self.rows.shape[1]
        if grid is None or grid[0] * grid[1] != n:
            found = "no grid" if grid is None else f"a grid of {grid[0]} x {grid[1]}"
            raise StateError(
                f"{self.site.name} got {n} tokens where level {self.level.index} has {found}. "
                "Chunked feed-forward, and other tools that split the tokens, cannot be combined with reduction here."
            )
        return grid

    @property
    def prepared(self) -> Any:
        """What the method's `prepare` made for this plan."""
        return self.level.memory.prepared[self.plan.text]

    @property
    def slot(self) -> Slot:
        """What the site keeps from step to step, in this pass of the run."""
        return self.level.memory.slots[self.site.name]

    def compute(
        self,
        x: Tensor | None = None,
        at: Tensor | None = None,
        kv: KV | Cache | Attended | None = None,
        watch: Callable[[Tensor, Tensor, Tensor], None] | None = None,
    ) -> Out:
        """Run the module.

        Args:
            x: (B, M, C) tokens to run it on; the call's own when None.
            at: (M,) or (B, M) int64, where each row of `x` sits: rotary rows, per-token modulation and masks follow.
            kv: where keys and values come from, when not from `x`; or what attention returned, for a whole block.
            watch: sees (q, k, v) as the attention does, and changes nothing.
        """
        return self.site.run(self, self.x if x is None else x, at, kv, watch)

    def module(self, rows: Tensor, **changes: Any) -> Any:
        """Call the module as it was called, but on these rows and with these keyword arguments changed."""
        kwargs = {**self.kwargs, **changes}
        if self.args:
            return self.base(rows, *self.args[1:], **kwargs)
        return self.base(**{**kwargs, self.site.argument: rows})

    def note(self, status: Callable[[], Tensor]) -> None:
        """Say what became of each token, (B, N) uint8 of `TOKEN_STATES`; evaluated only when the run records it."""
        if self.level.recording and self.level.status is None:  # by the level's first site that runs
            self.level.status = status()


class Leaf(Wrapper):
    """The method at one site."""

    def __init__(self, site: Site, apply: Callable[[Call], Out]) -> None:
        super().__init__(site.module)
        self.site, self.apply = site, apply

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self.retire(args, kwargs)
        if self.site.plan.idle or not self.site.level.running:
            return self.base(*args, **kwargs)
        call = Call(self.site, self.base, args, kwargs)
        return self.site.write(call, self.apply(call))


class BlockKeeper(Wrapper):
    """Keeps a transformer block's input for the sites inside it, while the block runs."""

    def __init__(self, block: Block) -> None:
        super().__init__(block.module)
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self.retire(args, kwargs)
        self.block.keep(args, kwargs)
        try:
            return self.base(*args, **kwargs)
        finally:
            self.block.input = None
            self.block.scratch = None


class GridKeeper(Wrapper):
    """On a module that turns an image (B, C, h, w) into tokens: it knows the grid, whatever the size."""

    def __init__(self, module: nn.Module, level: Level) -> None:
        super().__init__(module)
        self.level = level

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self.retire(args, kwargs)
        image = args[0] if args else kwargs["hidden_states"]
        self.level.grid = (image.shape[-2], image.shape[-1])
        return self.base(*args, **kwargs)

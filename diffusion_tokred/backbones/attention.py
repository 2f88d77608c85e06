"""Sites that families share: attention of the usual kinds, cross-attention, feed-forward, whole parallel blocks."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..runtime.rows import KV, Attended, Cache, Out
from ..runtime.site import Block, Call, Level, Site
from ..runtime.tap import Tap, follow, tapped, why_not
from ..runtime.work import Weights, macs

# Attention module -> its tap and tapped processor, as long as it lives: a compiled model that is patched again finds
# the same code, and compiles nothing anew. They do not refer to the module.
_TAPPING: weakref.WeakKeyDictionary[nn.Module, tuple[Tap, Any, Any]] = weakref.WeakKeyDictionary()


class FeedForwardSite(Site):
    """An MLP on image tokens: each row by itself."""

    kind = "feed_forward"
    offers = frozenset({"at"})

    def run(self, call: Call, x: Tensor, at: Tensor | None, kv: KV | Cache | Attended | None, watch: Any) -> Out:
        return self.cut(call, call.module(self.fill(call, x)), x.shape[1])

    def weights(self) -> Weights:
        cost = macs(self.module)
        return Weights(query=cost, text=cost if self.joint else 0)


class TappedSite(Site):
    """An attention whose queries, keys and values a `Tap` can reach, while a method needs them.

    The tapped processor is in place during a call of the denoiser only. Between calls the model has its own, so
    whatever replaces processors (QKV fusion, adapters, slicing) finds what it expects and is followed at the next step.

    Attributes:
        text_first: the order of text and image in the attention's own sequence, where the two come in separately.
        table: the argument that holds rotary positions of the whole sequence, None if there are none.
        rotary: the function that applies them, where it takes one table for the whole batch.
        masks_text: masks in the attention hide text rows only, never the image's.
    """

    text_first = False
    table: str | None = None
    rotary: str | None = None
    masks_text = False

    def __init__(self, name: str, module: nn.Module, block: Block, level: Level) -> None:
        super().__init__(name, module, block, level)
        self.tapping = _TAPPING.get(module) or (Tap(), None, None)

    @property
    def tapping(self) -> Any:
        """The tap and the tapped processor, for a later site at this module to go on with: nothing is compiled anew."""
        return self.tap, self._own, self._tapped

    @tapping.setter
    def tapping(self, value: Any) -> None:
        self.tap: Tap = value[0]
        self._own: Any = value[1]
        self._tapped: Any = value[2]

    def attend(
        self, call: Call, x: Tensor, at: Tensor | None, kv: KV | Cache | Attended | None, watch: Any, text: int = 0
    ) -> Any:
        """Call the module on `x`, through the tap where one is needed; `text`: rows that come in beside the image's."""
        rows = self.fill(call, x)
        start = self.start + (text if self.text_first else 0)
        changes = {} if at is None else self.place(call, at, start, text)
        if kv is None and watch is None:
            return call.module(rows, **changes)
        tap = self.tap
        tap.kv, tap.watch = kv, watch
        tap.start, tap.tokens, tap.length = start, x.shape[1], text + rows.shape[1]
        tap.masks_text = self.masks_text
        if isinstance(kv, KV) and kv.at is not None:
            tap.rows = self.rows(kv.at, start, tap.length - start - x.shape[1], x.shape[1])
        try:
            return call.module(rows, **changes)
        finally:
            tap.clear()

    def place(self, call: Call, at: Tensor, start: int, text: int) -> dict[str, Any]:
        """Arguments that follow the tokens `at`, such as rotary positions; `start` rows come before the image."""
        n, table = call.x.shape[1], call.kwargs.get(self.table or "")
        if table is None:
            return {}
        rows = self.rows(at, start, text + call.rows.shape[1] - start - n, n)
        return {str(self.table): self.tables(table, rows)}

    def rows(self, at: Tensor, start: int, tail: int, n: int) -> Tensor:
        """Rows of a sequence that keeps the tokens `at` of the image's `n`, and the `start` and `tail` rows around it.

        Made once for all blocks that share `at`.
        """
        if not start and not tail:
            return at
        # Kept as long as the plan; but a graph that keeps something is another one the next time, so not inside one.
        scratch = self.level.scratch if torch.compiler.is_compiling() else self.level.memory.scratch
        key = f"rows {start} {tail}"
        if key not in scratch or scratch[key][0] is not at:

            def count(first: int, last: int) -> Tensor:
                return torch.arange(first, last, device=at.device).expand(*at.shape[:-1], -1)

            scratch[key] = (at, torch.cat([count(0, start), at + start, count(start + n, start + n + tail)], -1))
        return scratch[key][1]

    def tables(self, table: Any, rows: Tensor) -> Any:
        """Rotary positions of `rows` (M,) or (B, M), from one table or several, each (S, D): (M, D) or (B, M, D).

        Made once for all blocks that share them.
        """
        first = table if isinstance(table, Tensor) else table[0]
        scratch, key = self.level.scratch, "tables"
        if key not in scratch or scratch[key][0] is not first or scratch[key][1] is not rows:
            single = isinstance(table, Tensor)
            chosen = self.pick(table, rows) if single else tuple(self.pick(t, rows) for t in table)
            scratch[key] = (first, rows, chosen)
        return scratch[key][2]

    def pick(self, table: Tensor, rows: Tensor) -> Tensor:
        """`rows` of one rotary table, as the processor takes it."""
        return take(table, rows)

    def needs_tap(self, needs: frozenset[str]) -> bool:
        """Whether a method that needs this cannot do without the tap, with what is installed now."""
        return bool(needs & {"kv", "kv_select", "cache", "attended", "watch"}) or (
            "at" in needs and self.rotary is not None
        )

    def refusal(self, needs: frozenset[str]) -> str | None:
        return why_not(self.holder.processor, self.rotary) if self.needs_tap(needs) else None

    def enter(self, needs: frozenset[str]) -> None:
        self.leave()  # after a KeyboardInterrupt, which passes no hook, it is still in place
        if not self.needs_tap(needs):
            return
        if self._own is not self.holder.processor:
            self._own = self.holder.processor
            self._tapped = tapped(self._own, self.tap, self.rotary)
            if self.holder is self.module:
                _TAPPING[self.module] = self.tapping
        else:
            follow(self._tapped, self._own, self.tap)
        self.holder.processor = self._tapped

    def leave(self) -> None:
        if self._tapped is not None and self.holder.processor is self._tapped:
            self.holder.processor = self._own


class JointAttention(TappedSite):
    """Image and text attend to both, and come in (and go out) separately: (image, text, ...)."""

    offers = frozenset({"at", "kv", "kv_select", "cache", "watch"})

    def run(self, call: Call, x: Tensor, at: Tensor | None, kv: KV | Cache | Attended | None, watch: Any) -> Out:
        text = call.kwargs.get("encoder_hidden_states")
        out = self.attend(call, x, at, kv, watch, 0 if text is None else text.shape[1])
        image, *rest = out if isinstance(out, tuple) else (out,)
        if call.plan.keep and getattr(self.module, "to_add_out", None) is None:
            rest = [rows.clone() for rows in rest]  # views, which would keep the image's rows too
        result = self.cut(call, image, x.shape[1], tuple(rest[:1]))
        result.beside = [self.cut(call, other, x.shape[1]) for other in rest[1:]]
        return result

    @property
    def gives_text(self) -> bool:
        return getattr(self.module, "add_k_proj", None) is not None

    def weights(self) -> Weights:
        a = self.module
        text = macs(*(getattr(a, name, None) for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")))
        # All rows handed in are projected, whatever is attended to: keys and values are reduced after it.
        return Weights(
            query=macs(a.to_q, a.to_k, a.to_v, a.to_out),
            text=text,
            core=2 * a.inner_dim,
            text_is="joined" if text else "absent",
        )


class StreamAttention(TappedSite):
    """Self-attention of text and image in one sequence."""

    joint = True
    offers = frozenset({"at", "kv", "kv_select", "cache", "watch"})

    def run(self, call: Call, x: Tensor, at: Tensor | None, kv: KV | Cache | Attended | None, watch: Any) -> Out:
        return self.cut(call, self.attend(call, x, at, kv, watch), x.shape[1])

    def weights(self) -> Weights:
        a = self.module
        cost = macs(a.to_q, a.to_k, a.to_v, getattr(a, "to_out", None))
        return Weights(query=cost, text=cost, core=2 * a.inner_dim, text_is="joined")


class ParallelSite(Site):
    """A whole block in which attention and MLP stand side by side: (text, image) in and out, or both as one sequence.

    What goes out is what the block adds to its input: a token that was merged away keeps its own residual. `inner` is
    the block's attention.
    """

    kind = "parallel"
    offers = frozenset({"at", "cache", "attended", "watch"})

    def __init__(self, name: str, module: nn.Module, block: Block, level: Level, attention: TappedSite) -> None:
        super().__init__(name, module, block, level)
        self.inner = (attention,)

    def run(self, call: Call, x: Tensor, at: Tensor | None, kv: KV | Cache | Attended | None, watch: Any) -> Out:
        (attention,) = self.inner
        assert isinstance(attention, TappedSite)
        text = call.kwargs.get("encoder_hidden_states")
        before = self.start if text is None else text.shape[1]
        changes = {} if at is None else attention.place(call, at, before, 0 if text is None else before)
        rows, tap = self.fill(call, x), attention.tap
        tap.kv, tap.watch, tap.start, tap.tokens = kv, watch, before, x.shape[1]
        tap.length = rows.shape[1] + (0 if text is None else before)
        try:
            out = call.module(rows, **changes)
        finally:
            tap.clear()
        rest, rows = ((), out) if isinstance(out, Tensor) else (out[:-1], out[-1])
        result = self.cut(call, rows, x.shape[1], rest)
        return result.map(lambda y: y - x)

    def write(self, call: Call, out: Out) -> Any:
        y = call.x + out.x
        if y.dtype == torch.float16:
            y = y.clip(-65504, 65504)  # as such blocks do
        rows = Out(y, (), out.head, out.tail).rows()
        return (*out.rest, rows) if out.rest else rows

    def kept(self, call: Call, out: Out) -> Out:
        """What the block adds to the text, too."""
        return self._text(call, out, torch.sub)

    def given(self, call: Call, kept: Out) -> Out:
        return self._text(call, kept, torch.add)

    def _text(self, call: Call, out: Out, change: Callable[[Tensor, Tensor], Tensor]) -> Out:
        """`change` of the rows that are none of the image's, and what they were before the block."""
        start, n = self.start, call.x.shape[1]
        rest = tuple(change(part, call.kwargs["encoder_hidden_states"]) for part in out.rest)
        head = None if out.head is None else change(out.head, call.rows[:, :start])
        tail = None if out.tail is None else change(out.tail, call.rows[:, start + n :])
        return Out(out.x, rest, head, tail)

    @property
    def gives_text(self) -> bool:
        return True

    def enter(self, needs: frozenset[str]) -> None:
        self.inner[0].enter(needs)

    def leave(self) -> None:
        self.inner[0].leave()

    def refusal(self, needs: frozenset[str]) -> str | None:
        return self.inner[0].refusal(needs)

    def mlp(self, *modules: nn.Module) -> Weights:
        """The cost of a row beside the attention, which is counted at its own site: image and text rows alike."""
        cost = macs(*modules)
        return Weights(query=cost, text=cost)


class SelfAttention(TappedSite):
    """Self-attention of diffusers' `Attention`, which takes separate keys and values."""

    offers = frozenset({"at", "kv", "kv_select", "cache", "watch"})

    def run(self, call: Call, x: Tensor, at: Tensor | None, kv: KV | Cache | Attended | None, watch: Any) -> Out:
        mask = call.kwargs.get("attention_mask")
        if isinstance(kv, KV) and watch is None and not _fused(self.module):
            # The processor takes separate keys and values here: reduce before they are projected.
            changes = {"encoder_hidden_states": kv.reduce(call.x)}
            if mask is not None:
                if kv.at is None:
                    raise UnsupportedError("keys and values under a mask can be chosen, not averaged")
                changes["attention_mask"] = mask.index_select(-1, kv.at)
            return Out(call.module(x, **changes))
        return Out(self.attend(call, x, at, kv, watch))

    def place(self, call: Call, at: Tensor, start: int, text: int) -> dict[str, Any]:
        mask = call.kwargs.get("attention_mask")
        if mask is None or mask.shape[-1] != call.x.shape[1]:
            return {}
        rows = at.expand(mask.shape[0], -1)[:, None].expand(-1, mask.shape[1], -1)
        return {"attention_mask": mask.gather(-1, rows)}

    def needs_tap(self, needs: frozenset[str]) -> bool:
        # Fused projections have no keys and values of their own to call: those are reduced after the projection.
        return bool(needs & {"cache", "watch"}) or (bool(needs & {"kv", "kv_select"}) and _fused(self.module))

    def weights(self) -> Weights:
        a = self.module
        if _fused(a):  # all rows handed in are projected, whatever is attended to
            return Weights(query=macs(a.to_q, a.to_k, a.to_v, a.to_out), core=2 * a.inner_dim)
        return Weights(query=macs(a.to_q, a.to_out), key=macs(a.to_k, a.to_v), core=2 * a.inner_dim)


# What cross-attentions project the prompt by; the last are those of fused projections, and of Wan's pictures.
_OF_THE_TEXT = ("to_k", "to_v", "to_kv", "add_k_proj", "add_v_proj", "to_added_kv")


class CrossAttention(Site):
    """Image tokens ask, the prompt answers."""

    kind = "cross_attention"
    offers = frozenset({"at", "queries"})

    def queries(self, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries (B, H, N, D) and the prompt's keys (B, H, T, D), projected once more, and the mask that they have."""
        a = self.module
        text = call.args[1] if len(call.args) > 1 else call.kwargs["encoder_hidden_states"]
        q, k = _heads(a.to_q(call.x), a.norm_q, a.heads), _heads(a.to_k(text), a.norm_k, a.heads)
        return q, k, call.kwargs.get("attention_mask")

    def run(self, call: Call, x: Tensor, at: Tensor | None, kv: KV | Cache | Attended | None, watch: Any) -> Out:
        if call.kwargs.get("ip_adapter_masks") is not None:
            # An adapter's mask is an image, resized to the number of queries: it needs them all, in their places.
            out = call.module(x if at is None else _put(call.x, at, x))
            return Out(out if at is None else take(out, at, 1))
        return Out(call.module(x))

    def weights(self) -> Weights:
        a = self.module
        return Weights(query=macs(a.to_q, a.to_out), text=macs(a.to_k, a.to_v), core=2 * a.inner_dim, text_is="keys")

    def of_the_text(self) -> dict[str, nn.Module]:
        found = {name: getattr(self.module, name, None) for name in _OF_THE_TEXT}
        return {f"{self.name}.{name}": module for name, module in found.items() if isinstance(module, nn.Module)}


def basic_sites(block: Block, level: Level) -> list[Site]:
    """The sites of diffusers' BasicTransformerBlock, in the order of execution."""
    module: Any = block.module
    kinds: list[tuple[str, type[Site]]] = [("attn1", CrossAttention if module.only_cross_attention else SelfAttention)]
    if module.attn2 is not None:
        kinds.append(("attn2", CrossAttention if module.attn2.is_cross_attention else SelfAttention))
    kinds.append(("ff", FeedForwardSite))
    return [kind(f"{block.name}.{name}", getattr(module, name), block, level) for name, kind in kinds]


def take(rows: Tensor, at: Tensor, dim: int = 0) -> Tensor:
    """Rows `at` (M,) or (B, M) of a table (S, D), or of sequences (B, S, C) with dim=1: (M, D) or (B, M, D)."""
    if at.ndim == 2 and len(at) == 1:
        at = at[0]
    if at.ndim == 1:
        return rows.index_select(dim, at)
    return rows[at] if dim == 0 else rows.gather(1, at[:, :, None].expand(-1, -1, rows.shape[2]))


def _heads(rows: Tensor, norm: nn.Module | None, heads: int) -> Tensor:
    """(B, S, H * D) -> (B, H, S, D), normed over all heads or in each, as the norm's weights are."""
    weight = getattr(norm, "weight", None)
    if norm is not None and weight is not None and weight.shape[-1] == rows.shape[-1]:
        rows, norm = norm(rows), None
    rows = rows.unflatten(2, (heads, -1)).transpose(1, 2)
    return rows if norm is None else norm(rows)


def _fused(attention: Any) -> bool:
    return bool(getattr(attention, "fused_projections", False))


def _put(x: Tensor, at: Tensor, rows: Tensor) -> Tensor:
    """x (B, N, C) with `rows` (B, M, C) in the places `at` (M,) or (B, M)."""
    return x.scatter(1, at.expand(rows.shape[:2])[:, :, None].expand_as(rows), rows)

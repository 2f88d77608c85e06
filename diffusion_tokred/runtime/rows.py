"""The rows that go in and out of a module at a site: which keys and values an attention shall see, and what came back.

Plain classes on purpose, as in `site`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..tokens.select import rows_at, scatter_rows


class KV:
    """Keys and values from `reduce(tokens)` instead of from all of them: (B, N, C) -> (B, M, C), linear over tokens.

    `at` (M,) int64 says which tokens were chosen, where `reduce` chooses and does not average. A site that sees the
    tokens before their projection reduces there; one that sees them after (joint attention) reduces there.
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor], at: Tensor | None = None) -> None:
        self.reduce, self.at = reduce, at

    def rows(self, rows: Tensor) -> Tensor:
        """Projected keys or values of the image, (B, N, H * D) -> what the attention shall see."""
        return self.reduce(rows)


def packed(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """As it is kept, in `dtype`; itself if that is None, or its own. What float16 has no room for becomes its largest
    number, as infinity would spread."""
    if dtype is None or x.dtype == dtype:
        return x
    return (x.clamp(-65504, 65504) if dtype == torch.float16 else x).to(dtype)


def row_by_row(x: Tensor) -> Tensor:
    """Tokens (B, N, C), contiguous. Patch embeddings hand on a view of an image, channels first, whose rows are slow to
    take and to add."""
    if x.is_contiguous() or x.device.type != "cpu" or torch.compiler.is_compiling():
        return x.contiguous()
    # PyTorch's own copy takes 4 to 11 times as long, but for matrices.
    return torch.stack([sample.contiguous() for sample in x.unbind()])


class Cache:
    """Keys and values of all tokens, of which this call renews the rows `at` in place (CAT, RAS, packed stacks).

    `at` is (M,) or (B, M) int64, or None when the call hands in all tokens. `dtype`: of what is kept, None as it comes.
    Rows that the call computes are seen as they are, whatever that is.
    """

    def __init__(self, at: Tensor | None = None, dtype: torch.dtype | None = None) -> None:
        self.at, self.dtype = at, dtype
        self.stored: list[Tensor] = []
        self._next = 0

    def rows(self, rows: Tensor) -> Tensor:
        """Projected rows of `at`, (B, M, H * D) -> rows of all tokens, (B, N, H * D). Called for k, then for v."""
        place, self._next = self._next, 1 - self._next
        kept = packed(rows, self.dtype)
        if len(self.stored) <= place:
            self.stored.append(rows.clone() if kept is rows else kept)
        elif self.at is None:
            self.stored[place].copy_(kept)
        else:
            scatter_rows(self.stored[place], self.at, kept)
        if kept is rows:
            return self.stored[place]
        return rows if self.at is None else scatter_rows(self.stored[place].to(rows.dtype), self.at, rows)


class Attended:
    """What an attention returned for all rows, before its output projection, kept for later calls: these attend to
    nothing, and get their rows of it (ToCa).

    `at` is (M,) or (B, M) int64, the image tokens of this call, or None when it hands in all of them and is to be kept.
    `dtype`: of what is kept, None as it comes.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.at: Tensor | None = None
        self.dtype, self.given = dtype, dtype
        self.stored: Tensor | None = None

    def keep(self, out: Tensor, dim: int) -> Tensor:
        """`out` of a call with all rows, tokens on axis `dim`: (B, H, S, D) or (B, S, H, D)."""
        self.given = out.dtype
        self.stored = packed(out.transpose(1, 2) if dim == 2 else out, self.dtype)
        return out

    def rows(self, start: int, tail: int, dim: int) -> Tensor:
        """The `start` rows before the image, the image's `at`, and the `tail` rows after it, as `keep` got them."""
        assert self.stored is not None and self.at is not None
        end = self.stored.shape[1] - tail
        image = rows_at(self.stored[:, start:end].flatten(2), self.at).unflatten(2, self.stored.shape[2:])
        found = torch.cat([self.stored[:, :start], image, self.stored[:, end:]], 1).to(self.given)
        return found.transpose(1, 2) if dim == 2 else found


class Out:
    """What a module returned: image tokens `x` (B, N, C), and the rest as it was.

    `rest`: other results (the text stream, for one); `head` and `tail`: rows before and after the image in its
    sequence; `whole`: that sequence, as long as the image is unchanged; `beside`: further results that have a row for
    each image token (FLUX's IP-Adapter), and go the same way.
    """

    def __init__(
        self,
        x: Tensor,
        rest: tuple[Any, ...] = (),
        head: Tensor | None = None,
        tail: Tensor | None = None,
        whole: Tensor | None = None,
    ) -> None:
        self.x, self.rest, self.head, self.tail, self.whole = x, rest, head, tail, whole
        self.beside: list[Out] = []

    def map(self, change: Callable[[Tensor], Tensor]) -> Out:
        """Change the image tokens, leave the rest."""
        out = Out(change(self.x), self.rest, self.head, self.tail)
        out.beside = [other.map(change) for other in self.beside]
        return out

    def image(self) -> Out:
        """The image tokens alone, with what has a row for each of them; no view, which keeps the whole sequence."""
        out = Out(self.x if self.head is self.tail is None else self.x.clone())
        out.beside = [other.image() for other in self.beside]
        return out

    def combine(self, change: Callable[..., Tensor], *others: Out) -> Out:
        """`change` of all that is in it, and of the same in others."""
        every = (self, *others)

        def of(name: str) -> Tensor | None:
            parts = [getattr(out, name) for out in every]
            return None if parts[0] is None else change(*parts)

        rest = tuple(
            change(*parts) if isinstance(parts[0], Tensor) else parts[0]
            for parts in zip(*(out.rest for out in every), strict=True)
        )
        out = Out(change(*(out.x for out in every)), rest, of("head"), of("tail"))
        besides = zip(*(out.beside for out in every), strict=True)
        out.beside = [first.combine(change, *more) for first, *more in besides]
        return out

    def packed(self, dtype: torch.dtype | None) -> Out:
        """As it is kept, in `dtype`: see `packed`."""
        return self if dtype is None else self.combine(lambda x: packed(x, dtype))

    def renewed(self, at: Tensor, rows: Out) -> Out:
        """A copy, with the image tokens `at`, (M,) or (B, M), and all that is none of them, from `rows`."""
        around = (None if part is None else part.clone() for part in (rows.head, rows.tail))  # views, of more than them
        out = Out(scatter_rows(self.x.clone(), at, rows.x), rows.rest, *around)
        out.beside = [old.renewed(at, new) for old, new in zip(self.beside, rows.beside, strict=True)]
        return out

    def rows(self) -> Tensor:
        """The whole sequence, (B, S, C)."""
        if self.whole is not None:
            return self.whole
        parts = [part for part in (self.head, self.x, self.tail) if part is not None]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

"""What a matching decided, ready to apply: mean into fewer tokens, and copy back out."""

from __future__ import annotations

import torch
from torch import Tensor

from .cells import compact


class Merge:
    """Merge N tokens into M and copy M outputs back to N places (ToMe-SD, arXiv 2303.17604).

    A plain class on purpose: Dynamo can build it inside a graph and keep it as an attribute, which it cannot do with a
    frozen or slotted dataclass.

    Attributes:
        at: (B, M) int64, ascending positions of the kept tokens.
        slot: (B, N) int64 in [0, M), the place in `at` of each token's representative.
    """

    def __init__(self, representative: Tensor, m: int) -> None:
        """Build from `representative` (B, N) int64, the position that speaks for each token.

        A token that speaks for itself is kept; there must be exactly `m` of them in each row, and every entry must
        name one of them.
        """
        b, n = representative.shape
        kept = representative == torch.arange(n, device=representative.device)
        self.at = compact(kept, m)
        self.slot = (kept.cumsum(-1) - 1).gather(1, representative)
        batch = torch.arange(b, device=representative.device)[:, None]
        self._kept = kept
        self._rows = (self.slot + batch * m).flatten()  # of each token, in the flattened (B * M, C)
        ones = torch.ones(b * n, device=representative.device)
        self._weight = torch.zeros(b * m, device=representative.device).index_add_(0, self._rows, ones).reciprocal_()

    def merge(self, y: Tensor) -> Tensor:
        """Average the tokens of each slot, the kept one included: (B, N, C) -> (B, M, C), in `y`'s dtype."""
        b, n, c = y.shape
        m = self.at.shape[1]
        total = torch.zeros(b * m, c, dtype=y.dtype, device=y.device).index_add_(0, self._rows, y.reshape(b * n, c))
        return (total * self._weight[:, None].to(y.dtype)).view(b, m, c)

    def unmerge(self, z: Tensor) -> Tensor:
        """Give each token its representative's row: (B, M, C) -> (B, N, C). Exact: rows are copied."""
        b, m, c = z.shape
        return z.reshape(b * m, c).index_select(0, self._rows).view(b, -1, c)

    def status(self) -> Tensor:
        """Tell what became of each token: (B, N) uint8, 0 = has an output of its own, 1 = merged away."""
        return (~self._kept).to(torch.uint8)

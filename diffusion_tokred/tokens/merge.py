"""What a matching decided, ready to apply: mean into fewer tokens, and copy back out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Merge:
    """Merge N tokens into M, and copy M outputs back to N places (ToMe-SD, arXiv 2303.17604).

    A plain class on purpose: Dynamo can build it inside a graph and keep it as an attribute, which it cannot do with a
    frozen or slotted dataclass.

    Attributes:
        at: (B, M) int64, positions of the kept tokens, ascending.
        slot: (B, N) int64 in [0, M), the place in `at` of each token's representative.
    """

    def __init__(self, representative: Tensor, m: int) -> None:
        """Build from the position that speaks for each token.

        Args:
            representative: (B, N) int64. A token that names itself is kept; every token names a kept one. (Not
                checked: that would read the device.)
            m: M, the number of kept tokens, the same in each row.
        """
        b, n = representative.shape
        device = representative.device
        self._kept = representative == torch.arange(n, device=device)
        self.slot = (self._kept.cumsum(-1) - 1).gather(1, representative)
        # Tokens of a slot all write the same position, so the order of the writes does not matter.
        self.at = torch.empty(b, m, dtype=torch.int64, device=device).scatter_(1, self.slot, representative)
        # Row of each token's slot in the flattened (B * M, C); and the same as lists: the tokens (rows of the flattened
        # (B * N, C)) ordered by slot, and where the list of each slot starts.
        self._row = (self.slot + torch.arange(0, b * m, m, device=device)[:, None]).flatten()
        ordered, self._token = self._row.sort(stable=True)
        self._start = torch.searchsorted(ordered, torch.arange(b * m + 1, device=device))

    def merge(self, y: Tensor) -> Tensor:
        """Average the tokens of each slot, the kept one included: (B, N, C) -> (B, M, C), in `y`'s dtype.

        Half types are summed and divided in float32, and rounded once.
        """
        b, n, c = y.shape
        # The CPU's kernel rounds the sum to a half type before it divides, and float16 overflows; a GPU's does not.
        narrow = y.device.type == "cpu" and y.dtype in (torch.float16, torch.bfloat16)
        rows = (y.float() if narrow else y).reshape(b * n, c)
        # One segmented mean in a fixed order: many times faster than scatter_reduce, and free of its atomic adds.
        z = F.embedding_bag(self._token, rows, self._start, mode="mean", include_last_offset=True)
        return z.to(y.dtype).view(b, -1, c)

    def unmerge(self, z: Tensor) -> Tensor:
        """Give each token its representative's row: (B, M, C) -> (B, N, C). Exact: rows are copied."""
        b, m, c = z.shape
        return z.reshape(b * m, c).index_select(0, self._row).view(b, -1, c)

    def counts(self) -> Tensor:
        """Count the tokens of each slot, the kept one included: (B, M) int64; a row adds up to N."""
        return self._start.diff().view(self.at.shape)

    def status(self) -> Tensor:
        """Tell what became of each token: (B, N) uint8, 0 = has an output of its own, 1 = merged away."""
        return (~self._kept).to(torch.uint8)

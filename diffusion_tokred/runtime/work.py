"""How much a site computes: rows, and the multiply-adds that a row costs."""

from __future__ import annotations

import math

from torch import nn


class Work:
    """Image rows a site computes of one sample: `queries` rows attend to (or, in a feed-forward, are) `keys` rows.

    `extra`: multiply-adds a sample that the method itself spends at the site, such as on matching. `projected`: of how
    many rows keys are computed, where the others are kept. `text`: False if the text rows are not computed either.
    `attends`: False if rows are projected, but what they attend to is kept. `text_kept`: True if rows attend to the
    text by keys and values of it that are kept.
    """

    def __init__(
        self, queries: int, keys: int | None = None, extra: int = 0, projected: int | None = None, text: bool = True,
        attends: bool = True, text_kept: bool = False,
    ) -> None:  # fmt: skip
        self.queries, self.keys, self.extra = queries, queries if keys is None else keys, extra
        self.projected = self.keys if projected is None else projected
        self.text, self.attends, self.text_kept = text, attends, text_kept


class Weights:
    """Multiply-adds of a site: for an image row as query, as key, for a text row, and (`core`) for a query-key pair.

    `text_is`: "absent" | "joined" (text rows are queries and keys beside the image) | "keys" (the only keys).
    """

    def __init__(self, query: int, key: int = 0, text: int = 0, core: int = 0, text_is: str = "absent") -> None:
        self.query, self.key, self.text, self.core, self.text_is = query, key, text, core, text_is

    def flops(self, work: Work, batch: int, text: int) -> int:
        """FLOPs (2 a multiply-add) of `batch` samples with `text` text tokens. Norms and softmax are not counted."""
        if not work.text:
            text = 0
        if self.text_is == "joined":
            pairs = (work.queries + text) * (work.keys + text)
        else:
            pairs = work.queries * (text if self.text_is == "keys" else work.keys)
        pairs = pairs if work.attends else 0
        rows = work.queries * self.query + work.projected * self.key + (0 if work.text_kept else text * self.text)
        return 2 * batch * (rows + pairs * self.core)


def macs(*modules: nn.Module | None) -> int:
    """Multiply-adds of one row (linear layers) or one output pixel (convolutions), over all layers inside `modules`."""
    total = 0
    for module in modules:
        for layer in module.modules() if module is not None else ():
            if isinstance(layer, nn.Linear):
                total += layer.in_features * layer.out_features
            elif isinstance(layer, (nn.Conv2d, nn.Conv3d)):
                total += layer.in_channels // layer.groups * layer.out_channels * math.prod(layer.kernel_size)
    return total

"""Each kernel against its plain version, on the machine at hand: whether they agree, and how long each takes.

The kernels are those of `tokens.kernels`. Without a GPU they run through Triton's interpreter, if `TRITON_INTERPRET=1`
is set before Triton is imported: slowly, and what they take then says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..tokens.kernels import matching, rows, selection
from .timing import paired

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Checked:
    """A kernel in one dtype. `error`: the largest difference from the plain version, in units of what rounding explains
    (more than 1 is wrong). `plain`, `kernel`: median seconds of a call."""

    name: str
    dtype: str
    error: float
    plain: float
    kernel: float

    @property
    def right(self) -> bool:
        return self.error <= 1


def check_kernels(
    device: str, batch: int, tokens: int, width: int, ratio: float = 0.75, rounds: int = 20
) -> Iterator[Checked]:
    """Check all kernels in all dtypes, with fresh random inputs.

    Args:
        device: "cuda", or "cpu" with Triton's interpreter on.
        batch, tokens, width: of the sequences, (B, N, C).
        ratio: share of tokens left out.
        rounds: timed calls of each.
    """
    for dtype in DTYPES:
        for name, plain, kernel, error in _cases(device, dtype, batch, tokens, width, tokens - int(tokens * ratio)):
            found = error(kernel(), plain())
            times = paired({"plain": plain, "kernel": kernel}, rounds=rounds, device=device)
            yield Checked(name, str(dtype).removeprefix("torch."), found, times.median("plain"), times.median("kernel"))


def _cases(device: str, dtype: torch.dtype, b: int, n: int, c: int, m: int) -> Iterator[tuple[str, Any, Any, Any]]:
    """(name, plain call, kernel's call, error of one result against the other)."""
    from ..tokens.kernels import matching_triton, rows_triton, selection_triton  # they need Triton

    def randn(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device).to(kind)

    x, y, gate, shift = randn(b, n, c), randn(b, m, c), randn(b, c), randn(b, c)
    order = torch.rand(b, n, device=device).argsort(-1)
    at = order[:, :m].sort(-1).values
    dst, src = order[0, : n // 4].sort().values, order[0, n // 4 :].sort().values
    norm = x.float().norm(dim=-1, keepdim=True).reciprocal()
    scores = randn(b, n).round(decimals=1)  # with ties
    unit = torch.finfo(dtype).eps

    def each(function: Callable[..., Any], start: Tensor, *rest: Any) -> Callable[[], Tensor]:
        """A call that changes `start` in place: of a copy made once, since the same change may be made again."""
        mine = start.clone()

        def call() -> Tensor:
            function(mine, *rest)
            return mine

        return call

    def same(found: Tensor, expected: Tensor) -> float:
        return 0.0 if torch.equal(found, expected) else float("inf")

    def near(found: Tensor, expected: Tensor) -> float:
        allowed = 8 * unit * (1 + expected.abs().double().amax())
        return float((found.double() - expected.double()).abs().amax() / allowed)

    def nearest(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> float:
        value, place = found[0].double(), found[1]
        chosen = x[:, src].double() * (x.double() * norm.double())[:, dst].gather(1, place[..., None].expand(-1, -1, c))
        allowed = 1e-5 * (1 + expected[0].abs().double().amax())  # in float32, whatever the inputs are
        wrong = torch.stack([(value - expected[0].double()).abs().amax(), (value - chosen.sum(-1)).abs().amax()])
        return float(wrong.amax() / allowed)

    def case(name: str, plain: Any, kernel: Any, *args: Any, error: Any) -> tuple[str, Any, Any, Any]:
        return name, lambda: plain(*args), lambda: kernel(*args), error

    k, t = rows, rows_triton
    yield case("take rows", k.take, t.take, x, at, error=same)
    yield case("take + norm + modulate", k.modulate, t.modulate, x, at, shift, gate, 1e-6, error=near)
    yield "put rows (K/V)", each(k.put, x, at, y), each(t.put, x, at, y), same
    yield "put + gate + residual", each(k.add, x, at, y, gate), each(t.add, x, at, y, gate), near

    def plain_best() -> tuple[Tensor, Tensor]:
        return matching.best(x.float(), dst, src, norm)  # it sums half types in float32 too, and has to convert them

    yield "match", plain_best, lambda: matching_triton.best(x, dst, src, norm), nearest
    yield case("select", selection.top, selection_triton.top, scores, m, error=same)

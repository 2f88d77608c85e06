"""Forecasts of a module's output from its last full steps: finite differences and a polynomial in the step index."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BASES = ("taylor", "hermite")


def factors(new: Tensor, old: Sequence[Tensor], gap: float | Tensor, order: int = 1) -> list[Tensor]:
    """Renew the factors of a forecast at a full step (TaylorSeer, arXiv 2503.06923).

    F_0 is the feature, F_(i+1) = (F_i - F_i of the full step before) / gap: backward differences, the same gap at
    every order, also where earlier gaps were other ones.

    Args:
        new: the feature of this step, any shape.
        old: the factors of the full step before; empty at the first one.
        gap: steps from that one to this, a number or a 0-d tensor.
        order: the highest order, 0 or more. The list grows by one factor a full step until it is reached.

    Returns:
        min(order, len(old)) + 1 tensors. The first one is `new` itself, no copy.

    Raises:
        ValueError: a negative order, or a gap of 0 steps.
    """
    if order < 0 or (not isinstance(gap, Tensor) and gap == 0):
        raise ValueError(f"need an order of 0 or more and a gap other than 0 steps, got order {order} and gap {gap}")
    found = [new]
    for before in old[:order]:
        found.append((found[-1] - before) / gap)
    return found


def weights(nodes: Sequence[float], place: float) -> list[float]:
    """What each of some features counts in the polynomial through all of them, at `place`: Lagrange's, sum 1.

    Exact for features that are a polynomial of a lower order than there are nodes, however far apart these are.

    Args:
        nodes: where the features were seen, all different.
        place: where one is wanted.

    Raises:
        ValueError: no nodes, or two that are the same.
    """
    if not nodes or len(set(nodes)) < len(nodes):
        raise ValueError(f"a polynomial needs nodes that differ, got {list(nodes)}")
    found = []
    for i, node in enumerate(nodes):
        weight = 1.0
        for other in (*nodes[:i], *nodes[i + 1 :]):
            weight *= (place - other) / (node - other)
        found.append(weight)
    return found


def extrapolate(
    factors: Sequence[Tensor], distance: float | Tensor, basis: str = "taylor", sigma: float = 0.5
) -> Tensor:
    """Forecast the feature `distance` steps after the full step that the factors belong to.

    "taylor": sum of F_i x^i / i! (TaylorSeer, arXiv 2503.06923). "hermite": sum of F_i sigma^i H_i(sigma x) / i!, with
    the physicists' Hermite polynomials (HiCache, arXiv 2508.16984), which damp the higher orders; sigma = 1 is known
    to fail. Both give a constant back exactly; "taylor" a feature that is linear in the step, too, from order 1 on. A
    quadratic one they miss also at order 2: the factors are differences over a gap, not derivatives, and the term of
    order 1 is late by half a gap.

    Args:
        factors: one to any number of tensors of one shape.
        distance: x in steps, a number or a 0-d tensor.
        basis: "taylor" or "hermite".
        sigma: contraction of "hermite".

    Returns:
        A tensor of the shape and dtype of the first factor; half types are summed in float32. With one factor it is
        that factor itself, no copy.

    Raises:
        ValueError: no factors, or an unknown basis.
    """
    if not factors:
        raise ValueError("a forecast needs at least the feature itself, got no factors")
    if basis not in BASES:
        raise ValueError(f"unknown basis {basis!r}: use one of {', '.join(BASES)}")
    if len(factors) == 1:
        return factors[0]
    narrow = factors[0].dtype in (torch.float16, torch.bfloat16)
    total = factors[0].float() if narrow else factors[0]
    # x^i, or sigma^i H_i(sigma x) by its recurrence; `fade` is what the latter takes off.
    step, fade = (distance, 0.0) if basis == "taylor" else (2 * sigma**2 * distance, 2 * sigma**2)
    earlier: float | Tensor = 0.0
    power: float | Tensor = 1.0
    factorial = 1
    for i, factor in enumerate(factors[1:], 1):
        earlier, power = power, step * power - (i - 1) * fade * earlier
        factorial *= i
        total = total + factor.to(total.dtype) * (power / factorial)
    return total.to(factors[0].dtype)

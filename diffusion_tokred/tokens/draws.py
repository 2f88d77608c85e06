"""Random draws without a generator: a hash of (key, position).

A draw depends on nothing but its key and its place, so an image never depends on what ran before it, every device gives
the same numbers, and a compiled graph stays valid when the key (a tensor) changes from step to step.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK32 = (1 << 32) - 1
_MASK64 = (1 << 64) - 1


def _finalise(x: Tensor) -> Tensor:
    """Scramble int64 values in [0, 2**32): murmur3's finaliser (xor-shift, multiply, twice, xor-shift), 32 bits.

    Both multipliers are below 2**31, unlike murmur3's own, so no product reaches 2**63: nothing wraps on any device.
    They and the shifts are the best pair found by the hash-prospector search for this form.
    """
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK32
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK32
    return x ^ (x >> 15)


def draw(key: Tensor, n: int, high: int) -> Tensor:
    """Draw `n` integers, uniform on [0, high): the value at position p is a hash of (key, p), modulo `high`.

    The first k draws are the same for every n >= k, and no random state of torch is read or changed.

    Args:
        key: 0-d int64 tensor, from `mix` (any bits will do); the draws are made on its device.
        n: number of draws, in [0, 2**31).
        high: exclusive upper end, in [1, 2**32). The bias of the modulo is below high / 2**32.

    Returns:
        (n,) int64.

    Raises:
        ValueError: `key` is not a 0-d int64 tensor, or `n` or `high` is out of range.
    """
    if key.ndim != 0 or key.dtype != torch.int64:
        raise ValueError(f"key must be a 0-d int64 tensor, got shape {tuple(key.shape)} of {key.dtype}")
    if not 0 <= n < 1 << 31 or not 1 <= high < 1 << 32:
        raise ValueError(f"need 0 <= n < 2**31 and 1 <= high < 2**32, got n={n} and high={high}")
    position = torch.arange(n, device=key.device)
    # Multiplied by the golden ratio, positions are far apart: close keys give unrelated draws, not shuffled ones. (For
    # n < 2**31 the product does not wrap. Few operations on purpose: on a GPU each is a launch.)
    x = (position * 0x9E3779B9 ^ key ^ (key >> 32)) & _MASK32
    return _finalise(x) % high


def mix(*values: int) -> int:
    """Mix integers, such as (seed, step, level), into one key in [0, 2**63), on the host; the order of them matters."""
    state = len(values)
    for value in values:
        # One splitmix64 step a value: it is a bijection of the state, so no two values collide after one.
        state = ((state ^ (value & _MASK64)) + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state >> 1

"""`record="tokens"`: what became of each token, step by step. Costs nothing when off: statuses are not even made."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .site import Level
from .stats import TOKEN_STATES
from .tracker import StepInfo

_PROTECTED = TOKEN_STATES.index("protected")


class TokenRecord:
    """Collects the statuses of a run, of the first picture of its batch; each part of a guidance pair is a pass."""

    def __init__(self) -> None:
        self._maps: list[tuple[int, str, dict[int, Tensor]]] = []

    def add(self, info: StepInfo, levels: Sequence[Level]) -> None:
        """A denoiser call is over."""
        for half in range(info.halves):
            name = info.pass_key if info.halves == 1 else f"{info.pass_key}.{half}"
            row = half * (info.batch // info.halves)
            self._maps.append((info.index, name, {v.index: _map(v, row) for v in levels if v.status is not None}))

    def result(self, levels: Sequence[Level]) -> np.ndarray | None:
        """uint8 [step, pass, level, h, w] on the grid of the first of the levels; None if there was no step."""
        if not self._maps or levels[0].grid is None:
            return None
        steps, passes = max(m[0] for m in self._maps) + 1, list(dict.fromkeys(m[1] for m in self._maps))
        found = np.zeros((steps, len(passes), len(levels), *levels[0].grid), dtype=np.uint8)
        for step, name, maps in self._maps:
            for place, level in enumerate(levels):
                if level.index in maps:
                    full = F.interpolate(maps[level.index][None, None].float(), size=levels[0].grid, mode="nearest")
                    found[step, passes.index(name), place] = full[0, 0].to(torch.uint8).numpy()
        return found


def _map(level: Level, row: int) -> Tensor:
    """(h, w) uint8, on the host."""
    assert level.status is not None and level.grid is not None
    status = level.status[row].cpu()
    if level.guard is not None:
        status = torch.where(level.guard.host[0], _PROTECTED, status).to(torch.uint8)
    return status.reshape(level.grid)

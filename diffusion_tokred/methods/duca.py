"""DuCa: dual feature caching (arXiv 2412.18911). Token-wise and reusing steps by turns."""

from __future__ import annotations

from dataclasses import dataclass

from ..runtime.store import Clock
from .base import option, register_method
from .selectors import SELECTORS
from .toca import ToCa, ToCaConfig


@dataclass(frozen=True)
class DuCaConfig(ToCaConfig):
    """Dual feature caching (arXiv 2412.18911): after a full step, steps that compute some tokens and steps that leave
    out all blocks follow each other by turns. Tokens are chosen by the norms of their values; the paper's second
    version finds `select="random"` as good."""

    interval: int = option(3, "a full step every so many steps; 1 is dense", low=1, high=1000)
    ratio: float = option(0.9, "share of tokens that are reused at token-wise steps", low=0.0, high=0.99)
    mode: str = option("packed", "all blocks on one set of tokens", choices=("packed",))
    select: str = option("value", "what tokens are chosen by", choices=tuple(SELECTORS))
    forecast: bool = option(False, "reused tokens move on as they last did, instead of standing still")


@register_method("duca", DuCaConfig)
class DuCa(ToCa):
    paper = "Accelerating Diffusion Transformers with Dual Feature Caching, arXiv 2412.18911"

    def between(self, clock: Clock, index: int, total: int | None, mode: str, ratio: float) -> tuple[str, float]:
        assert clock.full is not None
        # full, token, reuse, token, ...: the paper's order. (The releases go by the step's number, so that DiT, which
        # counts down, begins some cycles with a reusing step.)
        return (mode, ratio) if (index - clock.full) % 2 else ("reuse", 1.0)

"""RAS: region-adaptive sampling (arXiv 2502.10389). Only active tokens run; which, the predicted noise decides."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.site import Site
from ..tokens.scores import deviation
from ..tokens.select import top, untie
from .base import option, register_method
from .caching import CHOICE, StackCache, TokenConfig
from .selectors import conditional


@dataclass(frozen=True)
class RASConfig(TokenConfig):
    """Region-adaptive sampling (arXiv 2502.10389).

    Left out are the tokens whose predicted noise deviates most over its channels (the background), or least: `high` is
    the share of the former. What was left out often weighs less: `starvation` is the paper's kappa. Its released code
    lets a token that is dropped from the top become *likelier* to be dropped again; here it is the other way round at
    both ends, as the paper says. Others than the paper's are: full steps come every `interval` steps (there: 12 and 20
    of 28), and an inactive token gets the residual that the blocks gave it last (there: the model's last output).
    """

    interval: int = option(8, "a full step every so many steps: the paper's resets; 1 is dense", low=1, high=1000)
    warmup: int = option(4, "first steps of a run, which are full", low=1, high=1000)
    high: float = option(
        1.0, "share of the tokens left out that deviate most; the rest deviate least", low=0.0, high=1.0
    )
    starvation: float = option(0.1, "how much being left out counts, each time", low=0.0, high=10.0)


@register_method("ras", RASConfig)
class RAS(StackCache):
    paper = "Region-Adaptive Sampling for Diffusion Transformers, arXiv 2502.10389"
    watches_output = True
    heeds = CHOICE
    config: RASConfig

    def select(self, site: Site, m: int) -> Tensor:
        c, level = self.config, site.level
        notes = level.memory.notes
        spread = deviation(conditional(site, notes["output"]))
        n = spread.shape[1]
        drops = notes.get("drops")
        if drops is None:
            drops = torch.zeros_like(spread)
        from_top = int((n - m) * c.high)
        weight = torch.exp(c.starvation * drops)
        # First those that deviate most go, then those that deviate least: m are left.
        gone = top(-level.lift(-spread / weight), from_top)
        left = level.lift(spread * weight)
        left = left.scatter(1, gone, float("-inf"))
        at = top(left, m)
        notes["drops"] = drops.add(1).scatter_add(1, at, drops.new_full(at.shape, -1))
        return at if len(at) == 1 else untie(at, level.halves)

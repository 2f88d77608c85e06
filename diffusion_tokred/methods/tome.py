"""ToMe-SD: merge similar tokens before a module, copy its output back after (arXiv 2303.17604)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError, StateError
from ..runtime.rows import Out
from ..runtime.site import Call, Site
from ..runtime.work import Work
from ..tokens import Merge, destinations, draw, match, split
from ..tokens.regions import mergeable, ratio_of
from ..tokens.select import untie
from .base import Method, MethodConfig, option, register_method

_OPTIONS = {
    "attention": "merge_attn",
    "cross_attention": "merge_cross_attn",
    "feed_forward": "merge_ff",
    "parallel": "merge_parallel",
}


@dataclass(frozen=True)
class ToMeConfig(MethodConfig):
    """Token merging for Stable Diffusion (arXiv 2303.17604). The defaults are the published ones.

    In each `sy` x `sx` cell of the token grid one token is a destination; of all others, the share `ratio` of tokens
    that is most like a destination (cosine similarity of the block's input) is averaged into it.
    """

    ratio: float = option(0.5, "share of tokens merged away; the paper's r. 0 is dense", low=0.0, high=0.99)
    levels: tuple[int, ...] = option((0,), "attention levels, 0 the largest (SD1.5 at 512: 64x64, 32x32, ...)")
    sx: int = option(2, "width of a cell in tokens", low=1, high=64)
    sy: int = option(2, "height of a cell in tokens", low=1, high=64)
    randomize: bool = option(True, "draw each cell's destination anew at each step; False: its top-left token")
    merge_attn: bool = option(True, "merge around self-attention")
    merge_cross_attn: bool = option(False, "merge around cross-attention")
    merge_ff: bool = option(False, "merge around the feed-forward")
    merge_parallel: bool = option(
        True, "where attention and MLP are one (FLUX's single blocks), merge around both; False: around the attention"
    )
    reuse_every: int = option(
        0, "0: match in each block, as published; k: one matching a level, shared by its blocks for k steps", low=0
    )
    share_cfg: bool = option(False, "the level's matching is one for the conditional and the unconditional half")
    align: int = option(1, "counts of tokens left are snapped down to it in large pictures", low=1, high=4096)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sx * self.sy < 2:
            raise ConfigError("tome: a cell of sx=1, sy=1 has no token to merge: use sx=2, sy=2")
        _check(self.ratio, self)
        if self.share_cfg and not self.reuse_every:
            raise ConfigError("tome: share_cfg shares a level's matching: set reuse_every=1 or more with it")
        if not (self.merge_attn or self.merge_cross_attn or self.merge_ff):
            raise ConfigError("tome: nothing to merge around: set merge_attn, merge_cross_attn or merge_ff")

    @property
    def share(self) -> float:
        return self.ratio


@register_method("tome", ToMeConfig)
class ToMe(Method):
    paper = "Token Merging for Fast Stable Diffusion, arXiv 2303.17604"
    kinds = ("attention", "cross_attention", "feed_forward", "parallel")
    watches_input = True
    heeds = frozenset({"protect", "importance"})
    config: ToMeConfig

    def __init__(self, config: ToMeConfig) -> None:
        super().__init__(config)
        self.every, self.shares_passes = config.reuse_every, config.share_cfg
        self.shares = "ratio" if config.reuse_every else ""

    def wants(self, site: Site) -> bool:
        return self._is_on(site.kind) and site.level.index in self.config.levels

    def leaves(self, site: Site) -> str:
        if site.kind in _OPTIONS and not self._is_on(site.kind):
            return f"{_OPTIONS[site.kind]} is off"
        return super().leaves(site)

    def _is_on(self, kind: str) -> bool:
        on = kind in _OPTIONS and getattr(self.config, _OPTIONS[kind])
        return on and (kind != "parallel" or self.config.merge_attn)

    def asks(self) -> dict[str, str]:
        kinds = ("cross_attention", "feed_forward")
        return {kind: _OPTIONS[kind] for kind in kinds if getattr(self.config, _OPTIONS[kind])}

    def needs(self, kind: str) -> frozenset[str]:
        return frozenset({"at"})

    def check(self, ratio: float) -> None:
        _check(ratio, self.config)

    def count(self, grid: tuple[int, int], ratio: float) -> int:
        """Snapped up where the destinations are more than the count snapped down."""
        m, align = super().count(grid, ratio), self.config.align
        least = len(destinations(*grid, self.config.sy, self.config.sx)) if align > 1 else 0
        return m if m >= least else -(-least // align) * align

    def spare(self, site: Site, mode: str, ratio: float) -> tuple[str, float]:
        """As many tokens as can be merged away, if that is fewer."""
        guard, grid, c = site.level.guard, site.level.grid, self.config
        if guard is None or grid is None or mode == "full" or not guard.most():
            return mode, ratio
        n = grid[0] * grid[1]
        most = guard.once("mergeable", lambda tokens: mergeable(tokens, grid, c.sy, c.sx))
        if n - self.count(grid, ratio) <= most:
            return mode, ratio
        m, align = n - most, self.align_of(n)
        m = -(-m // align) * align
        return ("reduce", ratio_of(n, m)) if m < n else ("full", 0.0)

    def work(self, site: Site, grid: tuple[int, int], ratio: float) -> Work:
        return Work(self.count(grid, ratio))

    def overhead(self, site: Site, grid: tuple[int, int], ratio: float) -> int:
        dst = len(destinations(*grid, self.config.sy, self.config.sx))
        return (grid[0] * grid[1] - dst) * dst * site.block.width

    def stored(
        self, site: Site, grid: tuple[int, int], ratio: float, batch: int, dtype: torch.dtype, text: int = 0
    ) -> int:
        if not (self.config.reuse_every and site.leader):
            return 0
        n = grid[0] * grid[1]
        m = Merge(torch.zeros(batch, n, dtype=torch.int64, device="meta"), self.count(grid, ratio))
        return sum(t.nbytes for t in vars(m).values() if isinstance(t, Tensor))

    def apply(self, call: Call) -> Out:
        m = self._plan(call)
        if call.x.shape[:2] != m.slot.shape:
            raise StateError(
                f"{call.site.name} got {tuple(call.x.shape[:2])} (samples, tokens) where the matching is for "
                f"{tuple(m.slot.shape)}. Chunked feed-forward cannot be combined with merging around it."
            )
        call.note(m.status)
        return call.compute(m.merge(call.x), at=m.at).map(m.unmerge)

    def _plan(self, call: Call) -> Merge:
        """This block's matching, or the level's: made by the first that needs it, in a slot that outlives the call."""
        if not self.config.reuse_every:
            text = call.plan.text  # a policy may have another ratio for other kinds of site
            if call.block.scratch is None or call.block.scratch[0] != text:
                call.block.scratch = (text, self._match(call))
            return call.block.scratch[1]
        # Some calls leave out blocks (SD3's skip-layer guidance), the leader perhaps: then the first that is there.
        if call.plan.refresh and (call.site.leader or call.level.memory.value is None):
            call.level.memory.value = self._match(call)
        return call.level.memory.value

    def prepare(self, site: Site) -> tuple[Tensor, Tensor]:
        c, key = self.config, site.level.key
        assert site.level.grid is not None and key is not None  # set by the root
        h, w = site.level.grid
        offset = draw(key, (h // c.sy) * (w // c.sx), c.sy * c.sx) if c.randomize else None
        dst = destinations(h, w, c.sy, c.sx, offset, device=key.device)
        return dst, split(dst, h * w)

    def _match(self, call: Call) -> Merge:
        (h, w), x = call.grid, call.block.input
        assert x is not None  # kept by the block, since `watches_input`
        dst, src = call.prepared
        r, level, share = h * w - self.count((h, w), call.plan.ratio), call.level, self.config.share_cfg
        weights, tokens = level.weights, None if level.guard is None else level.guard.tokens
        if not share:  # each half has rows of its own
            weights, tokens = (
                part if part is None or len(part) == 1 else untie(part, level.halves) for part in (weights, tokens)
            )
        return match(x, dst, src, r, level.halves if share else 1, weights, tokens)


def _check(ratio: float, config: ToMeConfig) -> None:
    cap = 1 - 1 / (config.sx * config.sy)
    if not 0 <= ratio <= cap:
        raise ConfigError(
            f"tome: ratio {ratio:g} is not in [0, {cap:g}]: a cell of {config.sy}x{config.sx} keeps one token in "
            f"{config.sx * config.sy}; for more, enlarge sx and sy"
        )

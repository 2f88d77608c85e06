"""Which steps compute all, and how much the others compute: the published schedules, as plain numbers.

A decision needs the index of the step in its run (from 0 where the run begins, in img2img too), the run's number of
steps, and the index of the last full step (None: there was none): nothing is counted by calls. Indices go up. "share"
is the share of tokens *computed*, as in the papers: 1 - ratio.
"""

from __future__ import annotations

from typing import NamedTuple

from ..errors import ConfigError

_KINDS = ("attention", "cross_attention", "feed_forward", "parallel")


class _Rule(NamedTuple):
    """ToCa's factors of a family: a + b x each, x from 0 to 1."""

    step: tuple[float, float]  # x: step / total
    down: bool  # the release counts steps down
    modules: dict[str, tuple[float, float, float]]  # kind: its factor, and a and b of the layer's


# The releases write layer / 27, right for DiT and PixArt (28 layers). FLUX has it too, for its 19 double and 38 single
# blocks; the slopes here give the same numbers for those.
_TOCA = {
    "dit": _Rule((3.0, -4.0), True, {"feed_forward": (2.5, 0.8, 0.4)}),
    "dit-ddpm": _Rule((1.4, -0.8), True, {"feed_forward": (2.5, 1.8, -1.6)}),
    "pixart": _Rule((1.9, -1.8), False, {"cross_attention": (0.6, 1.6, -1.2), "feed_forward": (1.6, 1.6, -1.2)}),
    "flux": _Rule((1.0, 0.0), False, {"feed_forward": (0.4, 1.5, -18 / 27), "parallel": (1.6, 1.5, -37 / 27)}),
    "default": _Rule((1.0, 0.0), False, dict.fromkeys(_KINDS[1:], (1.0, 1.0, 0.0))),
}


def is_full(
    index: int, total: int | None, last: int | None, interval: int, family: str = "default", first: int = 1
) -> bool:
    """Whether a step computes everything.

    * "default": the first `first` steps, then `interval` steps after the last full one (FORA, arXiv 2407.01425;
      TaylorSeer, arXiv 2503.06923).
    * "flux": the same, with the first 3 steps at least (ToCa, arXiv 2410.05317).
    * "dit", "dit-ddpm", "pixart": ToCa's intervals that change with the step. Full is each step whose number the
      interval, as it was at the last full step, divides, so that gaps are irregular. The release numbers DiT's steps
      down, to 0 at the last.

    The first step of a run is full, and with an interval of 1 each one is (ToCa's formula would not give that).

    Args:
        index, total: step of the run and number of its steps; `total` may be None for "default" and "flux".
        last: index of the last full step, None before there is one.
        interval: N of the papers, 1 or more.
        family: one of the above.
        first: steps at the beginning of the run that are full.

    Raises:
        ConfigError: an unknown family, an interval below 1, or no `total` where the family needs it.
    """
    rule = _rule(family)
    if interval < 1:
        raise ConfigError(f"interval is a number of steps, 1 or more, found {interval}")
    if last is None or interval == 1 or index < (max(first, 3) if family == "flux" else first):
        return True
    if family in ("default", "flux"):
        return index - last >= interval
    if total is None:
        raise ConfigError(f"the schedule {family!r} needs the number of steps, which is unknown here: use 'default'")
    step = total - 1 - index if rule.down else index
    return step % _interval(rule, last, total, interval) == 0


def fixed_full_steps(steps: int, interval: int, first: int = 1) -> list[int]:
    """The full steps of a run with a fixed interval: FORA's with first=1, TaylorSeer's with first=3 (DiT: 2)."""
    return _full_steps("default", steps, interval, first)


def toca_full_steps(family: str, steps: int, interval: int) -> list[int]:
    """The full steps of a run with ToCa's schedule (arXiv 2410.05317), see `is_full`."""
    return _full_steps(family, steps, interval, 1)


def toca_share(family: str, step: int, steps: int, layer: int, layers: int, module: str, base: float) -> float:
    """The share of tokens that a module computes at a step that is not full (ToCa, arXiv 2410.05317).

    base * f(step) * f(layer) * f(module), in [0, 1]; of N tokens int(share * N) are computed, which may be none. The
    factors are those of the releases: "dit" DDIM with 50 steps, "dit-ddpm" DDPM with 250, "pixart", "flux"; "default",
    for other models, has `base` for all but self-attention. Self-attention is always reused whole: 0. So are modules
    that a release does not compute in part.

    The releases divide the layer by 27, also for FLUX's 19 and 38 blocks. Here it is the relative depth, with slopes
    that give the same numbers at the published depths, and fit others.

    Args:
        family: as in `is_full`.
        step, steps: index of the step in its run, from 0 up, and number of its steps.
        layer, layers: index among the blocks of its kind, and their number (FLUX: double and single blocks apart).
        module: kind of site: "attention", "cross_attention", "feed_forward" or "parallel" (FLUX's single blocks).
        base: R of the paper, the share computed (1 - ratio), in [0, 1].

    Raises:
        ConfigError: an unknown family or module, or a number out of range.
    """
    rule = _rule(family)
    if module not in _KINDS:
        raise ConfigError(f"unknown module {module!r}: one of {', '.join(_KINDS)}")
    if not 0 <= step < steps or not 0 <= layer < layers or not 0 <= base <= 1:
        raise ConfigError(
            "need a step and a layer of the run and the model, and a share in [0, 1], found"
            f" step {step} of {steps}, layer {layer} of {layers}, share {base:g}"
        )
    factor, start, slope = rule.modules.get(module, (0.0, 0.0, 0.0))
    at_step = rule.step[0] + rule.step[1] * (steps - 1 - step if rule.down else step) / steps
    at_layer = start + slope * layer / max(layers - 1, 1)
    # Each clamped: the product of two negative factors is no share.
    return min(base * max(at_step, 0.0) * max(at_layer, 0.0) * factor, 1.0)


def duca_kind(
    index: int, total: int | None, last: int | None, interval: int, family: str = "default", first: int = 1
) -> str:
    """What a step of DuCa (arXiv 2412.18911) is: "full", "token" (some rows, as ToCa) or "reuse" (skip all blocks).

    Full steps are those of `is_full`; after one come token-wise and reusing steps by turns: full, token, reuse, token,
    and so on, as in the paper. (The releases take the turn from the step's number: for DiT, which counts down, some
    cycles begin with the reusing step.)
    """
    if last is None or is_full(index, total, last, interval, family, first):
        return "full"
    return "token" if (index - last) % 2 else "reuse"


def ras_active(
    index: int,
    total: int,
    tokens: int,
    share: float,
    start: int = 4,
    end: int = 30,
    resets: tuple[int, ...] = (12, 20),
    slope: int = 0,
    length: int = 4,
) -> int:
    """How many image tokens RAS (arXiv 2502.10389) carries through the network at a step.

    All before `start`, at `resets` and after `end`; else all but the whole part of (1 - share) * tokens. With a `slope`
    the number left out grows by it every `length` steps, around that mean in the middle of the run, down to a multiple
    of 64 (the release's Lumina script: 256 every 4 of 30 steps).

    Args:
        index, total: step of the run, from 0 up, and number of its steps.
        tokens: number of image tokens.
        share: mean share computed, 1 - ratio, in (0, 1].
        start, end, resets: step indices; the defaults are those of the SD3 script.
        slope: tokens more left out in each group of steps; 0: a constant number.
        length: steps of a group.

    Raises:
        ConfigError: the share is out of range, or the slope leaves no token, or more than there are.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"share is the share of tokens computed, in (0, 1], found {share:g}")
    if index < start or index in resets or index > end:
        return tokens
    skip = (1 - share) * tokens
    if slope:
        skip = (skip + slope * (index // length - (total + start) // length // 2)) // 64 * 64
    if not 0 <= skip < tokens:
        raise ConfigError(
            f"a slope of {slope} every {length} steps leaves out {skip:g} of {tokens} tokens at step {index} of"
            f" {total}: use a smaller one"
        )
    return tokens - _floor(skip)


class CatCounts(NamedTuple):
    """Rows that CAT Pruning computes of N tokens, see `cat_counts`."""

    total: int  # at each step that is not full
    first_cap: int  # of one cluster, at the first choice, which takes all from clusters
    hot: int  # from clusters, at later choices
    caps: tuple[int, int, int]  # of the hottest cluster, the second, each other
    oldest: int  # total - hot


def cat_counts(tokens: int, share: float = 0.3, share_hot: float = 0.25) -> CatCounts:
    """The budget of CAT Pruning (arXiv 2502.00433), and who gets it.

    Args:
        tokens: number of image tokens.
        share: share computed, 1 - ratio, in (0, 1].
        share_hot: share of the budget that goes to the most changed clusters, in [0, 1]; the others go by age.

    Raises:
        ConfigError: a share out of range, or one that leaves no token.
    """
    if not 0 < share <= 1 or not 0 <= share_hot <= 1:
        raise ConfigError(f"need a share in (0, 1] and share_hot in [0, 1], found {share:g} and {share_hot:g}")
    total = _floor(share * tokens)
    if total < 1:
        raise ConfigError(f"a share of {share:g} leaves none of {tokens} tokens")
    # Of small grids one token at least, or clusters would get nothing.
    unit = max(int(total // 5 * share_hot), 1)
    hot = int(total * share_hot)
    return CatCounts(total, max(total // 10, 1), hot, (3 * unit, 2 * unit, unit), total - hot)


def cat_is_full(index: int, stop: int = 5) -> bool:
    """Whether a step of CAT Pruning computes all: up to stop + 2, and never after.

    The noise of step stop + 1 is what changes are measured from; at stop + 2 tokens are clustered and first chosen.
    """
    return index <= stop + 2


def _floor(count: float) -> int:
    """int() that forgives rounding: 0.29 * 100 is 28.999999999999996, and means 29."""
    return int(count + 1e-6)


def _rule(family: str) -> _Rule:
    if family not in _TOCA:
        raise ConfigError(f"unknown family {family!r}: one of {', '.join(_TOCA)}")
    return _TOCA[family]


def _interval(rule: _Rule, index: int, total: int, interval: int) -> int:
    """ToCa's interval at a full step, 1 or more."""
    if not rule.down:
        return round(interval / (0.8 + 0.4 * index / total))
    step = total - 1 - index
    # DiT: 2 from 60 to 80 % of the run, whatever N.
    return 2 if int(0.2 * total) <= step < int(0.4 * total) else round(interval / (1.4 - 0.8 * step / total))


def _full_steps(family: str, steps: int, interval: int, first: int) -> list[int]:
    found: list[int] = []
    for index in range(steps):
        if is_full(index, steps, found[-1] if found else None, interval, family, first):
            found.append(index)
    return found

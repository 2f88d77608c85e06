"""The `deep` site: the inner part of a UNet, whose output can be reused whole.

A UNet hands what its outer layers find to their opposites on the way up, beside what comes out of the layers between.
So the layers between can be left out, if their output is known from an earlier step: nothing else needs them. They are
wrapped one by one, or block by block, and the UNet's own loop runs as it is: what is left out returns stand-ins, and
only the last one returns something. They have no samples, so that it takes no time to join them; where others add
something to them (ControlNets, T2I-Adapters, FreeU, torch's hooks), they are of the right shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import ConfigError, StateError
from .ledger import Wrapper
from .site import Block, Level, Site
from .stack import PairCall
from .store import Slot
from .work import Weights

# Arguments of a UNet's call that nothing between its blocks sees. Others are added to what blocks return: ControlNets'
# and adapters' residuals, and what forks of the UNet have.
_APART = frozenset({
    "sample", "timestep", "encoder_hidden_states", "class_labels", "timestep_cond", "attention_mask",
    "cross_attention_kwargs", "added_cond_kwargs", "encoder_attention_mask", "return_dict",
})  # fmt: skip
_FREEU = ("s1", "s2", "b1", "b2")  # what it leaves at blocks


class Cut(NamedTuple):
    """One way to divide a UNet into an outer and an inner part.

    Attributes:
        modules: the inner part in the order of execution: blocks, or modules of a block that is outside in part.
        width: channels of what the last one returns.
        scale: sides of what it returns, in sides of the level's grid.
    """

    modules: tuple[nn.Module, ...]
    width: int
    scale: float


class DeepSite(Site):
    """The inner part of a UNet.

    Args:
        name: of a module that is always in it.
        cuts: the ways to divide the UNet, the one with the largest inner part first; a method chooses with `divide`.
        level: the level whose memory, clock and grid it goes by.
        sites: all sites of the UNet; `inner` are those of the inner part.
        ups: the UNet's blocks of the way up.

    Attributes:
        touched: in this call something is added to what modules return, or made of it.
    """

    kind = "deep"

    def __init__(
        self, name: str, cuts: Sequence[Cut], level: Level, sites: Sequence[Site], ups: Sequence[nn.Module]
    ) -> None:
        module = cuts[-1].modules[0]
        super().__init__(name, module, Block(0, name, module, cuts[0].width, level), level)
        self.cuts, self._sites, self._ups, self.touched = list(cuts), tuple(sites), tuple(ups), True
        self.divide(0)

    def divide(self, branch: int) -> None:
        """Choose one of the `cuts`. Before it is installed.

        Raises:
            ConfigError: there are not so many.
        """
        if branch >= len(self.cuts):
            raise ConfigError(f"branch={branch} is deeper than this UNet: it has branches 0 to {len(self.cuts) - 1}")
        self.chosen = self.cuts[branch]
        inside = {id(part) for part in self.parts()}
        self.inner = tuple(site for site in self._sites if id(site.module) in inside)

    @property
    def width(self) -> int:
        return self.chosen.width

    def pixels(self, grid: tuple[int, int]) -> int:
        """Pixels of what is kept, for a token grid of the level; where its side is odd, of the even one above it."""
        h, w = (-int(-side * self.chosen.scale // 1) for side in grid)
        return h * w

    def parts(self) -> Iterator[nn.Module]:
        for module in self.chosen.modules:
            yield from module.modules()

    def weights(self) -> Weights:
        return Weights(query=0)  # all that it computes is its inner sites', or lies between them

    def check(self, inputs: Mapping[str, Any]) -> None:
        """See whether anybody uses what the modules return in this call. Refuses nothing."""
        seen = (*self.chosen.modules, *self._ups)
        self.touched = (
            any(value is not None for name, value in inputs.items() if name not in _APART)
            or any(getattr(block, name, None) for block in self._ups for name in _FREEU)
            or any(module._forward_hooks or module._forward_pre_hooks for module in seen)
        )

    def slots(self) -> dict[str, Slot]:
        return {name: Slot() for name in (self.name, *self._names())}

    def wrappers(self, method: Any) -> list[Wrapper]:
        *others, last = (DeepPart(self, *pair) for pair in zip(self.chosen.modules, self._names(), strict=True))
        last.method = method
        return [*others, last]

    def _names(self) -> list[str]:
        """Of the slots of its modules."""
        return [f"{self.name} {i}" for i in range(len(self.chosen.modules))]


class DeepPart(Wrapper):
    """One module of the inner part. `method`: acts on what the last one returns."""

    method: Any = None

    def __init__(self, site: DeepSite, module: nn.Module, name: str) -> None:
        super().__init__(module)
        self.site, self.name = site, name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self.retire(args, kwargs)
        site = self.site
        if site.plan.idle or not site.level.running:
            return self.base(*args, **kwargs)
        slot = site.level.memory.slots[self.name]
        if site.plan.mode == "full":
            out = self.base(*args, **kwargs)
            hidden = out if isinstance(out, Tensor) else out[0]
            slot.out = _stand_in(out, hidden.new_zeros(()))
            if self.method is not None:
                # A copy: FreeU and T2I-Adapters write into what a module has returned.
                self.method.leave(PairCall(site), hidden.clone())
            return out
        if slot.out is None:
            raise StateError(f"{site.name}: nothing is kept of this run, its full step was broken off: begin a new run")
        kept = slot.out if site.touched else _none_of(slot.out)
        hidden, *rest = (kept,) if isinstance(kept, Tensor) else kept
        # Written into, too, but of a stand-in nothing is ever used: filling it would be a good part of such a step.
        hidden = hidden.new_empty(hidden.shape) if self.method is None else self.method.leave(PairCall(site), None)
        return (hidden, *rest) if isinstance(slot.out, tuple) else hidden


def _none_of(out: Any) -> Any:
    """The same without a sample."""
    return out[:0] if isinstance(out, Tensor) else tuple(_none_of(part) for part in out)


def _stand_in(out: Any, zero: Tensor) -> Any:
    """Zeros in the place of each tensor in what a module returned. They take no room, and nobody writes into skips."""
    return zero.expand(out.shape) if isinstance(out, Tensor) else tuple(_stand_in(part, zero) for part in out)

"""What a backbone file provides, and the registry of them. One file an architecture family; no method is known here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedError
from ..runtime.site import KV, Block, Cache, Call, Level, Out, Site
from ..runtime.tap import Tap, tapped, why_not
from ..runtime.work import Weights, macs


class Layout:
    """A denoiser seen as sites.

    Attributes:
        sites: all sites, in the order of execution.
        levels: one `Level` for each resolution with attention, largest first.
        images: (module, level) pairs: modules whose input image (B, C, h, w) has the level's token grid.
    """

    def __init__(self, sites: list[Site], levels: list[Level], images: list[tuple[nn.Module, Level]]) -> None:
        self.sites, self.levels, self.images = sites, levels, images


class Backbone:
    """An architecture family. Subclass it in one file and decorate with `register_backbone`.

    Attributes:
        name: short name, as in the README's table.
        models: class names of the denoisers it knows.
        sites: the site classes it makes, which say what each kind offers.
    """

    name = ""
    models: tuple[str, ...] = ()
    sites: tuple[type[Site], ...] = ()

    def layout(self, denoiser: Any) -> Layout:
        """Find the sites. Reads the denoiser, changes nothing."""
        raise NotImplementedError

    def grids(self, denoiser: Any, height: int, width: int) -> list[tuple[int, int]]:
        """Token grid (h, w) of each level for a latent of `height` x `width`."""
        raise NotImplementedError

    def observe(self, layout: Layout, denoiser: Any, sample: Tensor) -> None:
        """Set the grids that the denoiser's input decides (the others are seen at `layout.images`)."""

    def rest(self, denoiser: Any, height: int, width: int, text: int) -> Iterator[tuple[nn.Module, int]]:
        """Everything outside the sites that computes: (module, rows or pixels of one sample)."""
        raise NotImplementedError


class FeedForwardSite(Site):
    """An MLP on image tokens: each row by itself."""

    kind = "feed_forward"
    offers = frozenset({"at"})

    def run(self, call: Call, x: Tensor, at: Tensor | None, kv: KV | Cache | None, watch: Any) -> Out:
        return Out(call.base(x, *call.args[1:], **without(call.kwargs, "hidden_states")))

    def weights(self) -> Weights:
        return Weights(query=macs(self.module))


class TappedSite(Site):
    """An attention whose queries, keys and values a `Tap` can reach, while a method needs them.

    The tapped processor is in place during a call of the denoiser only. Between calls the model has its own, so
    whatever replaces processors (QKV fusion, adapters, slicing) finds what it expects and is followed at the next step.
    """

    text_first = False

    def __init__(self, name: str, module: nn.Module, block: Block, level: Level) -> None:
        super().__init__(name, module, block, level)
        self.tap = Tap(self.text_first)
        self._own: Any = None
        self._tapped: Any = None

    def attend(self, call: Call, kwargs: dict[str, Any], text: int, kv: KV | Cache | None, watch: Any) -> Any:
        """Call the module by keywords, through the tap where one is needed."""
        if kv is None and watch is None:
            return call.base(**kwargs)
        tap = self.tap
        tap.kv, tap.watch, tap.tokens, tap.text = kv, watch, kwargs["hidden_states"].shape[1], text
        try:
            return call.base(**kwargs)
        finally:
            tap.clear()

    def needs_tap(self, needs: frozenset[str]) -> bool:
        """Whether a method that needs this cannot do without the tap, with what is installed now."""
        return bool(needs & {"kv", "kv_select", "cache", "watch"})

    def refusal(self, needs: frozenset[str]) -> str | None:
        return why_not(self.module.processor) if self.needs_tap(needs) else None

    def enter(self, needs: frozenset[str]) -> None:
        self.leave()  # after a KeyboardInterrupt, which passes no hook, it is still in place
        if not self.needs_tap(needs):
            return
        if self._own is not self.module.processor:
            self._own = self.module.processor
            self._tapped = tapped(self._own, self.tap)
        self.module.processor = self._tapped

    def leave(self) -> None:
        if self._tapped is not None and self.module.processor is self._tapped:
            self.module.processor = self._own


BACKBONES: dict[str, Backbone] = {}


def register_backbone(backbone: type[Backbone]) -> type[Backbone]:
    """Class decorator: make an architecture family known to `patch`."""
    BACKBONES[backbone.name] = backbone()
    return backbone


def backbone_of(denoiser: Any) -> Backbone:
    """The backbone that knows a denoiser, by the names of its class and its ancestors.

    Raises:
        UnsupportedError: none does; the message lists those that are known.
    """
    for kind in type(denoiser).__mro__:
        for backbone in BACKBONES.values():
            if kind.__name__ in backbone.models:
                return backbone
    known = ", ".join(model for backbone in BACKBONES.values() for model in backbone.models)
    raise UnsupportedError(f"{type(denoiser).__name__} is not supported; supported denoisers: {known}")


def without(kwargs: dict[str, Any], name: str) -> dict[str, Any]:
    """`kwargs` less one entry."""
    return {key: value for key, value in kwargs.items() if key != name}

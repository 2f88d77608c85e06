"""FLOPs of a denoiser call, counted from the modules: 2 a multiply-add of linear layers, convolutions and attention.

They agree with `torch.utils.flop_counter` under maths attention (which, for CPU flash attention, does not count the
attention at all). A FLOP ratio is not a speed-up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from torch import nn

from ..backbones import Backbone
from ..runtime.site import Site
from ..runtime.work import Weights, Work, macs


class Flops:
    """FLOPs of one denoiser at any size; the modules are read once.

    Args:
        backbone: the denoiser's family.
        denoiser: the model.
        sites: its sites, all of them.
        pairs: those around others. What lies inside of a site, and is none itself, is left out with it.
    """

    def __init__(self, backbone: Backbone, denoiser: nn.Module, sites: list[Site], pairs: Sequence[Site] = ()) -> None:
        self.backbone, self.denoiser, self.sites, self.pairs = backbone, denoiser, sites, pairs
        self._weights: dict[str, Weights] = {}
        self._between: dict[tuple[int, int, int], list[tuple[nn.Module, int, int, frozenset[str]]]] = {}

    def weights(self, site: Site) -> Weights:
        """What a row costs at a site."""
        if site.name not in self._weights:
            self._weights[site.name] = site.weights()
        return self._weights[site.name]

    def site(self, site: Site, work: Work, batch: int, text: int) -> int:
        """FLOPs of a site that computes `work` rows of each of `batch` samples, with `text` text tokens."""
        return self.weights(site).flops(work, batch, text)

    def between(
        self, height: int, width: int, text: int, works: Mapping[str, Work] = MappingProxyType({})
    ) -> Iterator[tuple[nn.Module, int, int]]:
        """What computes outside the sites and is not left out: (module, rows or pixels of one sample, FLOPs of one)."""
        key = (height, width, text)
        if key not in self._between:
            inside: dict[int, set[str]] = {}  # module -> the sites around it
            for site in (*self.pairs, *self.sites):
                for part in site.parts():
                    inside.setdefault(id(part), set()).add(site.name)
            self._between[key] = [
                (module, rows, 2 * macs(module), frozenset(inside.get(id(module), ())))
                for module, rows in self.backbone.rest(self.denoiser, height, width, text)
            ]
        left_out = {name for name, work in works.items() if not work.text}
        return (found[:3] for found in self._between[key] if left_out.isdisjoint(found[3]))

    def rest(
        self, height: int, width: int, batch: int, text: int, works: Mapping[str, Work] = MappingProxyType({})
    ) -> int:
        """FLOPs outside the sites, for latents of `height` x `width`."""
        return batch * sum(rows * each for _, rows, each in self.between(height, width, text, works))

    def parts(
        self,
        height: int,
        width: int,
        batch: int,
        text: int,
        grids: Mapping[int, tuple[int, int]],
        works: Mapping[str, Work] = MappingProxyType({}),
    ) -> dict[str, int]:
        """FLOPs of one denoiser call by kind of site, with "method" (what the method itself spends) and "rest".

        Args:
            height, width: latent size.
            batch: samples, both halves of a CFG pair counted.
            text: text tokens.
            grids: token grid of each level, by index.
            works: what sites compute, by name; the others are dense.
        """
        result = {site.kind: 0 for site in self.sites} | {"method": 0}
        for site in self.sites:
            grid = grids[site.level.index]
            work = works.get(site.name) or Work(grid[0] * grid[1])
            result[site.kind] += self.site(site, work, batch, text)
            result["method"] += 2 * batch * work.extra
        return result | {"rest": self.rest(height, width, batch, text, works)}

    def call(
        self,
        height: int,
        width: int,
        batch: int,
        text: int,
        grids: Mapping[int, tuple[int, int]],
        works: Mapping[str, Work] = MappingProxyType({}),
    ) -> int:
        """FLOPs of one denoiser call; arguments as in `parts`."""
        return sum(self.parts(height, width, batch, text, grids, works).values())

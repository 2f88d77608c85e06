"""FLOPs of a denoiser call, counted from the modules: 2 a multiply-add of linear layers, convolutions and attention.

They agree with `torch.utils.flop_counter` under maths attention (which, for CPU flash attention, does not count the
attention at all). A FLOP ratio is not a speed-up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        self._rest: dict[tuple[int, int, int], dict[tuple[str, ...], int]] = {}

    def site(self, site: Site, work: Work, batch: int, text: int) -> int:
        """FLOPs of a site that computes `work` rows of each of `batch` samples, with `text` text tokens."""
        if site.name not in self._weights:
            self._weights[site.name] = site.weights()
        return self._weights[site.name].flops(work, batch, text)

    def rest(
        self, height: int, width: int, batch: int, text: int, works: Mapping[str, Work] = MappingProxyType({})
    ) -> int:
        """FLOPs outside the sites, for latents of `height` x `width`."""
        key = (height, width, text)
        if key not in self._rest:
            self._rest[key] = found = dict[tuple[str, ...], int]()
            inside: dict[int, tuple[str, ...]] = {}  # module -> the sites around it
            for site in (*self.pairs, *self.sites):
                for part in site.parts():
                    inside[id(part)] = (*inside.get(id(part), ()), site.name)
            for module, rows in self.backbone.rest(self.denoiser, height, width, text):
                where = inside.get(id(module), ())
                found[where] = found.get(where, 0) + 2 * macs(module) * rows
        left_out = {name for name, work in works.items() if not work.text}
        return batch * sum(count for where, count in self._rest[key].items() if left_out.isdisjoint(where))

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

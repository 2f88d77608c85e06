"""What a denoiser call makes a device do: products, attentions, convolutions and passes over memory, site by site.

FLOPs are those of `Flops`, exactly. Bytes are what must cross the memory if each operation reads what it needs and
writes what it makes once: weights and rows of products, queries, keys, values and outputs of attentions (flash: no
scores), and the passes of norms, modulation, activations and residuals, which have next to no FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn

from ..runtime.site import Site
from ..runtime.work import Work, macs
from .flops import Flops

PASSES = 6  # over the rows of a site: norm, modulation, gate and residual, by convention
CALLS = 4  # operations that they are
MOVES = 4  # operations that a method adds to a block, at most (a test counts them)


@dataclass(frozen=True)
class Operation:
    """Work of one kind: "linear", "conv", "attention", "match" (a whole matching); without FLOPs to speak of: "norm"
    (with what goes with it, `PASSES`), activations ("gelu", "tanh": the one by a tanh) and "memory".

    `size`: what the device's speed depends on: (rows, width); (pixels, channels); (tokens, width of a head) of an
    attention; (tokens, width) of a matching.
    `calls`: how many operations it is, each of which has to be started.
    """

    kind: str
    flops: float
    bytes: float
    size: tuple[float, float] = (1, 1)
    calls: int = 1


def operations(
    flops: Flops,
    height: int,
    width: int,
    batch: int,
    text: int,
    grids: Mapping[int, tuple[int, int]],
    itemsize: int,
    works: Mapping[str, Work] = MappingProxyType({}),
) -> dict[str, list[Operation]]:
    """Operations of one denoiser call by kind of site, with "method" and "rest"; arguments as in `Flops.parts`.

    Args:
        itemsize: bytes of a value.
    """
    found: dict[str, list[Operation]] = {kind: [] for kind in [site.kind for site in flops.sites] + ["method"]}
    packed = any(pair.name in works for pair in flops.pairs)  # blocks run on fewer tokens, or not at all
    for site in flops.sites:
        tokens = math.prod(grids[site.level.index])
        work = works.get(site.name) or Work(tokens)
        found[site.kind] += _site(flops, site, work, tokens, batch, text, itemsize, packed)
        if site.name in works:
            found["method"] += _moves(site, work, tokens, batch, itemsize, packed)
    for pair in flops.pairs:
        if pair.name in works:  # tokens chosen, and all of them put together again with what was kept
            rows = batch * math.prod(grids[pair.level.index])
            size = (rows, pair.width)
            found["method"].append(Operation("norm", 0, PASSES * rows * pair.width * itemsize, size, calls=20))
    rest = [
        operation
        for module, rows, _ in flops.between(height, width, text, works)
        for operation in _layers(module, batch * rows, itemsize)
    ]
    return found | {"rest": rest}


def _site(
    flops: Flops, site: Site, work: Work, tokens: int, batch: int, text: int, itemsize: int, packed: bool
) -> Iterator[Operation]:
    weights = flops.weights(site)
    text = text if work.text else 0
    layers = _linear(site)
    whole = macs(*layers) or 1
    ends = sum(layer.in_features + layer.out_features for layer in layers) / whole  # values in and out, a multiply-add
    width = math.sqrt(whole / max(len(layers), 1))  # of a typical layer
    hidden = 0.0
    projected = 0 if work.text_kept else text
    for rows, cost in ((work.queries, weights.query), (work.projected, weights.key), (projected, weights.text)):
        if rows * cost:
            rows *= batch
            moved = (rows * cost * ends + cost) * itemsize
            calls = max(1, round(len(layers) * cost / whole))
            yield Operation("linear", 2 * rows * cost, moved, (rows, width), calls)
            if not weights.core:  # an MLP: what is between its layers is written, read and written by the activation
                hidden += rows * cost / site.width
    queries, keys = work.queries, work.keys
    if weights.text_is == "joined":
        queries, keys = queries + text, keys + text
    elif weights.text_is == "keys":
        keys = text
    if weights.core and queries * keys:
        heads = getattr(site.module, "heads", 1)
        moved = batch * (queries + keys) * weights.core * itemsize  # q, k, v and the output are core / 2 wide each
        size = (math.sqrt(queries * keys), weights.core / 2 / heads)
        yield Operation("attention", 2 * batch * queries * keys * weights.core, moved, size)
    rows = batch * (work.queries if packed else tokens)
    if rows:
        yield Operation("norm", 0, PASSES * rows * site.width * itemsize, (rows, site.width), CALLS)
    if hidden:
        size = (batch * work.queries, hidden / max(batch * work.queries, 1) / 2)
        yield Operation(_activation(site.module), 0, hidden * itemsize, size)


def _moves(site: Site, work: Work, tokens: int, batch: int, itemsize: int, packed: bool) -> Iterator[Operation]:
    """What a method does itself: taking tokens out, putting them back, keeping keys and values, matching."""
    row = batch * site.width * itemsize
    if work.projected < work.keys:  # keys and values into those that are kept, read and written
        yield Operation("memory", 0, 4 * work.projected * row, calls=2)
    if not packed:
        if work.queries < tokens:
            yield Operation("memory", 0, 2 * (work.queries + tokens) * row, calls=MOVES)
        elif work.keys < tokens:
            yield Operation("memory", 0, 2 * work.keys * row, calls=1)
    if work.extra:
        yield Operation("match", 2 * batch * work.extra, 0, (tokens, site.block.width))


def _linear(site: Site) -> list[nn.Linear]:
    """The linear layers of a site, without those of sites inside of it."""
    inside = {id(part) for inner in site.inner for part in inner.module.modules()}
    return [m for m in site.module.modules() if isinstance(m, nn.Linear) and id(m) not in inside]


def _activation(module: nn.Module) -> str:
    tanh = any(getattr(part, "approximate", None) == "tanh" for part in module.modules())
    return "tanh" if tanh else "gelu"


def _layers(module: nn.Module, rows: int, itemsize: int) -> Iterator[Operation]:
    """Linear layers and convolutions of a module outside the sites, with a norm and an activation before each."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            kind, ins, outs = "linear", layer.in_features, layer.out_features
        elif isinstance(layer, (nn.Conv2d, nn.Conv3d)):
            kind, ins, outs = "conv", layer.in_channels, layer.out_channels
        else:
            continue
        weights = macs(layer)
        moved = (rows * (ins + outs) + weights) * itemsize
        yield Operation(kind, 2 * rows * weights, moved, (rows, math.sqrt(ins * outs)))
        if kind == "conv":
            yield Operation("norm", 0, PASSES * rows * ins * itemsize, (rows, ins), CALLS)
            yield Operation("gelu", 0, 2 * rows * ins * itemsize, (rows, ins))

"""Checks of a backbone by itself: is the token grid what it says, and can its sites do what they offer?"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backbones import backbone_of
from ..errors import UnsupportedError
from ..methods import CONFIGS, METHODS, Method, MethodConfig, register_method
from ..patching import patch
from ..runtime.rows import KV, Attended, Cache, Out
from ..runtime.site import KINDS, Call, Site
from ..runtime.work import Work
from .cases import Broken, Case, expect_near, model_of, sample_of

ALLOWED = 1e-8  # in float64


@contextlib.contextmanager
def probe(name: str, wants: Callable[[Site], bool], needs: frozenset[str], act: Callable[[Call], Out]) -> Iterator[Any]:
    """A method, for the length of a `with` block: `act` at the sites that it `wants`. Yields its config."""

    @dataclass(frozen=True)
    class ProbeConfig(MethodConfig):
        @property
        def share(self) -> float:
            return 0.5

    class Probe(Method):
        kinds = KINDS

        def wants(self, site: Site) -> bool:
            return wants(site)

        def needs(self, kind: str) -> frozenset[str]:
            return needs

        def check(self, ratio: float) -> None:
            """Any."""

        def work(self, site: Site, grid: tuple[int, int], ratio: float) -> Work:
            return Work(grid[0] * grid[1])

        def apply(self, call: Call) -> Out:
            return act(call)

    register_method(name, ProbeConfig)(Probe)
    try:
        yield ProbeConfig()
    finally:
        del METHODS[name], CONFIGS[name]


def grid(case: Case) -> str | None:
    """Each site gets as many tokens as its level's grid has, in their places: a changed latent is found in its token,
    at the first site of each kind. (Where convolutions come before it, as in a UNet, next to it and at the first.)"""
    plain = _inputs(case, bump=False)
    bumped = _inputs(case, bump=True)
    text = ", ".join(f"{h} x {w}" for h, w in dict.fromkeys(plain.grids))
    if plain.image is None:
        return f"grids {text}; which way round was not looked at, the latent is no picture"
    (height, width), (row, column) = plain.image, plain.spot
    convolved = bool(backbone_of(model_of(case.build())).layout(model_of(case.build())).images)
    for name, ((h, w), x) in list(plain.x.items())[: 1 if convolved else None]:
        place = int((bumped.x[name][1] - x)[0].norm(dim=-1).argmax())
        found, wanted = divmod(place, w), (row * h // height, column * w // width)
        if max(abs(found[0] - wanted[0]), abs(found[1] - wanted[1])) > int(convolved):
            raise Broken(
                f"at {name}, in a grid of {h} x {w} tokens (rows x columns), a change at row {row}, column {column} of "
                f"the {height} x {width} latent moves the token at {found} most, expected {wanted}: are "
                "rows and columns swapped, or does the image begin at another row (`start`)?"
            )
    return f"grids {text}; a change in the latent is found in its token"


class _Seen:
    def __init__(self) -> None:
        self.grids: list[tuple[int, int]] = []
        self.x: dict[str, tuple[tuple[int, int], Tensor]] = {}  # of the first site of each class: grid and tokens
        self.image: tuple[int, int] | None = None
        self.spot = (0, 0)


def _inputs(case: Case, bump: bool) -> _Seen:
    """One step at another size than the usual square: the grids, and what the first site of each class is handed."""
    pipe, seen, classes = case.cast(torch.float64), _Seen(), set()

    def act(call: Call) -> Out:
        seen.grids.append(call.grid)
        if type(call.site) not in classes:
            classes.add(type(call.site))
            seen.x[call.site.name] = call.grid, call.x.clone()
        return call.compute()

    def change(module: Any, args: Any, kwargs: Any) -> Any:
        name = "hidden_states" if "hidden_states" in kwargs else "sample"
        sample = copy.deepcopy(sample_of(args, kwargs))  # a tensor, or a list of one for each picture
        first = sample[0]
        if first.shape[:-2].numel() == model_of(pipe).config.in_channels and not seen.x:  # one frame
            seen.image = first.shape[-2:]
            seen.spot = row, column = first.shape[-2] // 2, first.shape[-1] - 1
            for picture in sample if bump else ():
                picture[..., row, column] += 10
        return ((sample, *args[1:]), kwargs) if args else (args, {**kwargs, name: sample})

    with probe("probe-grid", lambda site: site.kind not in ("stack", "deep"), frozenset(), act) as config:
        patch(model_of(pipe), config)
        model_of(pipe).register_forward_pre_hook(change, with_kwargs=True)
        case.run(pipe, steps=1, **case.other)
    return seen


def offers(case: Case) -> str | None:
    """What a site offers it can do: on rearranged tokens, and with keys and values in another order, a module gives
    what it gives anyway; fewer keys change its output; renewing a cache with the same tokens changes nothing."""
    layout = backbone_of(model_of(case.build())).layout(model_of(case.build()))
    pairs = dict.fromkeys((site.kind, offer) for site in layout.sites for offer in sorted(site.offers))
    broken, worst = [], 0.0
    for kind, offer in pairs:
        found: list[tuple[str, float, str]] = []

        def act(call: Call, offer: str = offer, found: Any = found) -> Out:
            dense = call.compute()
            try:
                found.append((call.site.name, _DO[offer](call, dense), ""))
            except Broken as error:
                found.append((call.site.name, 0.0, str(error)))
            except Exception as error:
                found.append((call.site.name, 0.0, f"{type(error).__name__}: {error}"))
            return dense

        def wants(site: Site, kind: str = kind, offer: str = offer) -> bool:
            return site.kind == kind and offer in site.offers

        pipe = case.cast(torch.float64)
        with probe(f"probe-{offer}", wants, frozenset({offer}), act) as config:
            patch(pipe, config)
            case.run(pipe, steps=1)
        if wrong := [(name, text) for name, _, text in found if text]:
            broken.append(f"{wrong[0][0]} offers {offer!r}: {wrong[0][1]}")
        elif not found:
            broken.append(f"no {kind} site that offers {offer!r} was reached")
        worst = max([worst, *(difference for _, difference, _ in found)])
    if broken:
        raise Broken("; ".join(broken))
    return f"{', '.join(f'{kind}: {offer}' for kind, offer in pairs)}; they differ by {worst:.1e} at most, in float64"


def _order(call: Call) -> Tensor:
    """A fixed permutation of the tokens."""
    return torch.randperm(call.x.shape[1], generator=torch.Generator().manual_seed(0)).to(call.x.device)


def _rows(x: Tensor, at: Tensor) -> Tensor:
    return x.gather(1, at.expand(x.shape[0], -1)[:, :, None].expand(-1, -1, x.shape[2]))


def _at(call: Call, dense: Out) -> float:
    order = _order(call)
    each = torch.stack([order.roll(i) for i in range(call.x.shape[0])])
    worst = 0.0
    for at, what in ((order, "one order for the batch"), (each, "one order a sample")):
        try:
            out = call.compute(_rows(call.x, at), at=at)
        except UnsupportedError:
            if at.ndim == 1:
                raise
            continue  # rotary tables that the batch shares
        worst = max(worst, expect_near(out.x, _rows(dense.x, at), ALLOWED, f"on rearranged tokens, {what}"))
        if call.site.kind in ("feed_forward", "cross_attention"):  # rows by themselves
            some = at[..., : at.shape[-1] // 2]
            found = call.compute(_rows(call.x, some), at=some)
            worst = max(worst, expect_near(found.x, _rows(dense.x, some), ALLOWED, f"on half of the tokens, {what}"))
    return worst


def _kv(call: Call, dense: Out) -> float:
    return _reduced(call, dense, lambda at: KV(lambda tokens: tokens.index_select(1, at)))


def _kv_select(call: Call, dense: Out) -> float:
    return _reduced(call, dense, lambda at: KV(lambda tokens: tokens.index_select(1, at), at))


def _reduced(call: Call, dense: Out, make: Callable[[Tensor], KV]) -> float:
    order = _order(call)
    if len(order) > 1:
        fewer = call.compute(kv=make(order[: len(order) // 2].sort().values))
        if torch.equal(fewer.x, dense.x):
            raise Broken("with half of the keys and values the output is the same: they are not used")
    return expect_near(call.compute(kv=make(order)).x, dense.x, ALLOWED, "with keys and values in another order")


def _watch(call: Call, dense: Out) -> float:
    seen: list[tuple[Tensor, ...]] = []
    out = call.compute(watch=lambda q, k, v: seen.append((q, k, v)))
    if len(seen) != 1:
        raise Broken(f"the queries, keys and values were shown {len(seen)} times in a call, expected once")
    return expect_near(out.x, dense.x, ALLOWED, "watched")


def _cache(call: Call, dense: Out) -> float:
    cache = Cache()
    worst = expect_near(call.compute(kv=cache).x, dense.x, ALLOWED, "filling a cache")
    if len(cache.stored) != 2:
        raise Broken(f"{len(cache.stored)} tensors are in the cache, expected 2: keys and values")
    order = _order(call)
    cache.at = order[: max(len(order) // 2, 1)].sort().values
    out = call.compute(call.x.index_select(1, cache.at), at=cache.at, kv=cache)
    wanted = dense.x.index_select(1, cache.at)
    return max(worst, expect_near(out.x, wanted, ALLOWED, "half of the tokens, with the others' keys from the cache"))


def _attended(call: Call, dense: Out) -> float:
    kept = Attended()
    worst = expect_near(call.compute(kv=kept).x, dense.x, ALLOWED, "keeping what attention returns")
    if kept.stored is None:
        raise Broken("nothing was kept of what attention returned")
    order = _order(call)
    kept.at = order[: max(len(order) // 2, 1)].sort().values
    out = call.compute(call.x.index_select(1, kept.at), at=kept.at, kv=kept)
    wanted = dense.x.index_select(1, kept.at)
    return max(worst, expect_near(out.x, wanted, ALLOWED, "half of the tokens, with what attention returned for them"))


def _queries(call: Call, dense: Out) -> float:
    """Queries and keys are those whose attention the module computes: with its values they give its output."""
    site: Any = call.site
    q, k, mask = site.queries(call)
    module: Any = call.site.module
    text = call.args[1] if len(call.args) > 1 else call.kwargs["encoder_hidden_states"]
    values = module.to_v(text[:, text.shape[1] - k.shape[2] :]).unflatten(2, (q.shape[1], -1)).transpose(1, 2)
    if mask is not None:
        mask = mask.view(len(q), 1, 1, -1)
    found = F.scaled_dot_product_attention(q, k, values, attn_mask=mask).transpose(1, 2).flatten(2)
    return expect_near(module.to_out[0](found.to(dense.x.dtype)), dense.x, ALLOWED, "from its queries and keys")


_DO = {"queries": _queries, "at": _at, "kv": _kv, "kv_select": _kv_select, "watch": _watch, "cache": _cache,
       "attended": _attended}  # fmt: skip
SITE_CHECKS: dict[str, Callable[[Case], str | None]] = {"grid": grid, "offers": offers}

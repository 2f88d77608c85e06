"""The table of methods, sites and families says what is true: each cell is tried on a tiny pipeline of the family."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import diffusion_tokred as tokred
from diffusion_tokred.coverage import Cell, coverage
from diffusion_tokred.evaluation.tables import site_rows
from diffusion_tokred.methods.caching import CacheConfig
from diffusion_tokred.testing import families, tiny

BUILDERS = {"unet": tiny.sd, **{name: tiny.BUILDERS[name] for name in ("dit", "flux", "pixart", "sd3")}}
BUILDERS |= {name: families.BUILDERS[name] for name in families.BUILDERS if name != "flux2_klein"}
TOME = {"attention": "merge_attn", "cross_attention": "merge_cross_attn", "feed_forward": "merge_ff"}
CELLS = coverage()
CACHING = [m.name for m in tokred.methods() if issubclass(m.config, CacheConfig)]


def only(cell: Cell) -> dict[str, Any]:
    """Options with which a method acts at this kind of site alone."""
    if cell.method == "tome":
        if cell.kind == "parallel":
            return dict(merge_parallel=True)
        return {option: kind == cell.kind for kind, option in TOME.items()} | dict(merge_parallel=False)
    if cell.method == "random-keep":
        return {kind: kind == cell.kind for kind in TOME} | ({"attention": True} if cell.kind == "parallel" else {})
    return {}


def test_no_cell_is_missing() -> None:
    names = {info.name for info in tokred.methods()}
    assert {cell.method for cell in CELLS} == names
    for info in tokred.methods():
        mine = [cell for cell in CELLS if cell.method == info.name]
        assert len(mine) == len(info.sites) * len(BUILDERS)
        assert {cell.backbone for cell in mine if cell.works} == set(info.backbones)
    assert {cell.backbone for cell in CELLS} == set(BUILDERS)


@pytest.mark.parametrize(
    "cell",
    [cell for cell in CELLS if cell.method not in CACHING],
    ids=lambda cell: f"{cell.method}-{cell.kind}-{cell.backbone}",
)
def test_cell(cell: Cell) -> None:
    pipe = BUILDERS[cell.backbone]()
    if cell.works:
        plain = tiny.run(pipe, steps=1)
        tokred.patch(pipe, method=cell.method, **only(cell))
        kinds = {site.kind for site in tiny.denoiser(pipe)._tokred.sites}  # type: ignore[union-attr]
        assert cell.kind in kinds
        changed = tiny.run(pipe, steps=1)
        assert torch.isfinite(changed).all() and not torch.equal(changed, plain)
        tokred.unpatch(pipe)
        for option, why in cell.limits:
            if option == "all its sites":
                left = [
                    s.reason for s in tokred.explain(pipe, method=cell.method, height=32, width=32, **only(cell)).sites
                ]
                # random-keep takes the whole block there: nothing is left alone.
                assert cell.method == "random-keep" or any(reason and why in reason for reason in left)
                continue
            name, _, value = option.partition("=")
            with pytest.raises(tokred.UnsupportedError) as caught:
                tokred.patch(pipe, method=cell.method, **{name: value.strip("'")})
            assert why in str(caught.value)
    elif cell.kind == "parallel":
        assert cell.absent  # such a site is used where there is one; nobody asks for it by name
    else:
        with pytest.raises(tokred.UnsupportedError) as caught:
            tokred.patch(pipe, method=cell.method, **only(cell))
        assert cell.absent or str(cell.reason) in str(caught.value)
    line = next(row for row in site_rows() if row[:2] == (cell.method, cell.kind.replace("_", "-")))
    assert (cell.backbone in line[2].split(", ")) == cell.works
    assert cell.absent or cell.works or str(cell.reason) in line[3]


@functools.cache
def plain(name: str) -> torch.Tensor:
    return tiny.run(BUILDERS[name](), steps=3)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("method", CACHING)
def test_caching_method(method: str, name: str) -> None:
    """Caching methods act at all kinds of site of a form, or not at all: one run a form."""
    cells = [cell for cell in CELLS if (cell.method, cell.backbone) == (method, name) and not cell.absent]
    quick: dict[str, Any] = dict(warmup=2, interval=2, min_steps=0)
    quick |= {"toca": dict(schedule="default"), "firstblock": dict(threshold=10.0)}.get(method, {})
    for form in dict.fromkeys(cell.only for cell in cells if cell.works):
        pipe, (option, _, value) = BUILDERS[name](), form.partition("=")
        tokred.patch(pipe, method=method, **quick, **({option: value.strip("'")} if form else {}))
        used = {site.kind for site in tiny.denoiser(pipe)._tokred.sites}  # type: ignore[union-attr]
        assert used == {cell.kind for cell in cells if cell.works and cell.only == form}
        changed = tiny.run(pipe, steps=3)
        assert torch.isfinite(changed).all() and not torch.equal(changed, plain(name))
    if not any(cell.works for cell in cells):
        with pytest.raises(tokred.UnsupportedError) as caught:
            tokred.patch(BUILDERS[name](), method=method)
        assert not cells or any(str(cell.reason) in str(caught.value) for cell in cells)


@pytest.mark.parametrize("name", BUILDERS)
def test_explain_says_it_site_by_site(name: str) -> None:
    """Every site of the model is in the explanation, used or with the reason why not."""
    pipe = BUILDERS[name]()
    if name == "sana":
        with pytest.raises(tokred.UnsupportedError, match="linear"):
            tokred.explain(pipe, method="todo", height=32, width=32)
    for method in ("tome", "random-keep", *(["todo"] if name != "sana" else [])):
        found = tokred.explain(pipe, method=method, height=32, width=32)
        kinds = {site.kind for site in found.sites if site.reason is None}
        assert kinds and all(site.reason != "" for site in found.sites)
        works = {cell.kind for cell in CELLS if cell.works and cell.method == method and cell.backbone == name}
        assert kinds <= works
        assert found.flop_ratio > 1 or found.warnings

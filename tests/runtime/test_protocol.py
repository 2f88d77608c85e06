"""The site protocol carries more than merging: a packed stack with kept keys and values, on three families, one code.

A throw-away method, written here to prove the interface before token caching is built on it. All transformer blocks
see only the chosen tokens; attention keeps the keys and values of all; tokens that sat out get their last residual.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion_tokred.backbones.attention import JointAttention, SelfAttention
from diffusion_tokred.backbones.flux import FluxJointAttention, FluxStreamAttention
from diffusion_tokred.runtime.ledger import Ledger, Wrapper
from diffusion_tokred.runtime.rows import Cache, Out
from diffusion_tokred.runtime.site import Block, Call, Leaf, Level, Site
from diffusion_tokred.testing import tiny


class Packed:
    """The method: which rows run, and what was kept. `rows` is None at a full step."""

    def __init__(self, text: int, joined: bool) -> None:
        self.rows: Tensor | None = None
        self.text, self.joined = text, joined
        self.entry: Tensor | None = None
        self.residual: Tensor | None = None

    def attention(self, call: Call) -> Out:
        cache = call.level.memory.value[call.site.block.index, call.site.name]
        cache.at = self.rows
        if self.joined and call.kwargs.get("encoder_hidden_states") is None and self.rows is not None:
            cache.at = torch.cat([torch.arange(self.text), self.rows + self.text])  # [text, image] as one stream
        return call.compute(kv=cache)


class StackBlock(Wrapper):
    """One block of the stack: the first lets go of the others' tokens, the last gives them back."""

    def __init__(self, module: nn.Module, method: Packed, first: bool, last: bool, image: int | None) -> None:
        super().__init__(module)
        self.method, self.first, self.last, self.image = method, first, last, image

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        m, rows = self.method, self.method.rows
        x = args[0] if args else kwargs["hidden_states"]
        if self.first:
            m.entry = x
            x = x if rows is None else x.index_select(1, rows)
        kwargs = {**kwargs}
        if rows is not None and kwargs.get("image_rotary_emb") is not None:
            at = torch.cat([torch.arange(m.text), rows + m.text])
            kwargs["image_rotary_emb"] = tuple(table.index_select(0, at) for table in kwargs["image_rotary_emb"])
        out = self.base(x, *args[1:], **kwargs) if args else self.base(**{**kwargs, "hidden_states": x})
        if not self.last:
            return out
        y = out if self.image is None else out[self.image]
        if rows is None:
            m.residual = y - m.entry
        else:
            m.residual = m.residual.index_copy(1, rows, y - m.entry.index_select(1, rows))
            y = m.entry + m.residual
        return y if self.image is None else tuple(y if i == self.image else part for i, part in enumerate(out))


def flux_attention(name: str, module: Any, block: Block, level: Level) -> Site:
    kind = FluxJointAttention if hasattr(block.module, "norm1") else FluxStreamAttention
    return kind(name, module, block, level)


def case(name: str) -> tuple[nn.Module, list[nn.Module], list[tuple[str, Callable[..., Site]]], int, bool, int | None]:
    if name == "sd3":
        model = tiny.sd3(dual=(0,), qk_norm="rms_norm").transformer
        parts: list[tuple[str, Callable[..., Site]]] = [("attn", JointAttention), ("attn2", JointAttention)]
        return model, list(model.transformer_blocks), parts, 5, False, 1
    if name == "pixart":
        model = tiny.pixart().transformer
        return model, list(model.transformer_blocks), [("attn1", SelfAttention)], 0, False, None
    model = tiny.flux().transformer
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    return model, blocks, [("attn", flux_attention)], 5, True, 1


def arguments(model: nn.Module, name: str, seed: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    text = torch.randn(2, 5, tiny.TEXT, generator=torch.Generator().manual_seed(9))
    common = {"encoder_hidden_states": text, "return_dict": False}
    if name == "flux":
        ids = torch.zeros(64, 3)
        ids[:, 1], ids[:, 2] = torch.arange(64) // 8, torch.arange(64) % 8
        return common | {
            "hidden_states": torch.randn(2, 64, model.config.in_channels, generator=draw),
            "pooled_projections": torch.ones(2, tiny.POOLED), "timestep": torch.tensor([0.5, 0.5]),
            "img_ids": ids, "txt_ids": torch.zeros(5, 3),
        }  # fmt: skip
    sample = torch.randn(2, model.config.in_channels, 16, 16, generator=draw)
    common |= {"hidden_states": sample, "timestep": torch.tensor([5.0, 5.0])}
    if name == "sd3":
        return common | {"pooled_projections": torch.ones(2, tiny.POOLED)}
    return common | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


_slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "compiled"),
    [
        ("sd3", False), ("pixart", False), ("flux", False),
        pytest.param("sd3", True, marks=_slow), pytest.param("pixart", True, marks=_slow),
        pytest.param("flux", True, marks=_slow),
    ],
)  # fmt: skip
@torch.no_grad()
def test_packed_stack(name: str, compiled: bool) -> None:
    torch.compiler.reset()
    model, blocks, parts, text, joined, image = case(name)
    first, second = arguments(model, name, 1), arguments(model, name, 2)
    dense1, dense2 = model(**first)[0], model(**second)[0]

    ledger, level, sites = Ledger(), Level(0), []
    level.memory.value = {}
    method = Packed(text, joined)
    for index, module in enumerate(blocks):
        block = Block(index, f"block {index}", module)
        for attribute, kind in parts:
            if getattr(module, attribute, None) is not None:
                site = kind(f"{index}.{attribute}", getattr(module, attribute), block, level)
                assert "cache" in site.offers
                site.plan.set("reduce", 0.5)
                level.memory.value[index, site.name] = Cache()
                sites.append(site)
                ledger.wrap(Leaf(site, method.attention))
        # A double block returns (text, image); FLUX's single blocks too; PixArt's returns the image alone.
        ledger.wrap(StackBlock(module, method, index == 0, index == len(blocks) - 1, image))

    needs = frozenset({"cache"})
    run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model

    def call(rows: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
        method.rows = rows
        for site in sites:
            site.enter(needs)
        try:
            return run(**kwargs)[0]
        finally:
            for site in sites:
                site.leave()

    assert torch.equal(call(None, first), dense1)  # a full step is the model, bit for bit
    torch.testing.assert_close(call(torch.arange(64), second), dense2, rtol=0, atol=1e-5)  # so is one of all rows

    # The same input again: whatever rows run, kept keys, values and residuals are exactly what they would be anew.
    call(None, first)
    rows = torch.arange(0, 64, 3)
    seen: list[int] = []
    handle = blocks[1].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
        with_kwargs=True,
    )
    torch.testing.assert_close(call(rows, first), dense1, rtol=0, atol=1e-5)
    handle.remove()
    assert seen == [22] or compiled  # 22 of 64 tokens went through the blocks

    # Another input: rows that ran move towards it, and the others stay where their last residual puts them.
    packed = call(rows, second)
    assert torch.isfinite(packed).all()
    assert (packed - dense2).abs().mean() < (dense1 - dense2).abs().mean()
    assert (packed - dense2).abs().max() > 1e-4

    assert not ledger.revert()
    assert torch.equal(model(**second)[0], dense2)

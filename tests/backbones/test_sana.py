"""Sana: the contract, linear attention by definition, FLOPs, Sprint's options, refusals."""

import copy

import pytest
import torch
from diffusers import SanaTransformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import diffusion_tokred as tokred
from diffusion_tokred import testing
from diffusion_tokred.measure.shares import profile
from diffusion_tokred.testing import families, tiny
from tests.backbones.common import assert_flops
from tests.contract.helpers import near
from tests.reference import rotary_model, tome_model

SIZE = dict(height=32, width=64)  # 16 x 32 tokens


def test_contract(monkeypatch):
    """Linear attention is computed in float32, whatever the model's dtype."""
    monkeypatch.setattr(testing.sites, "ALLOWED", 1e-6)
    testing.assert_contract(testing.check_backbone(families.sana, tiny.run, other=SIZE))


# --- by definition ---------------------------------------------------------------------------------------------------


def linear_attention(attn, x):
    """Each query against each key, in the square way: weights relu(q) . relu(k), which add up to 1."""
    q, k, v = (layer(x).unflatten(2, (attn.heads, -1)).transpose(1, 2) for layer in (attn.to_q, attn.to_k, attn.to_v))
    weights = q.relu() @ k.relu().mT
    out = (weights / (weights.sum(-1, keepdim=True) + 1e-15)) @ v
    return attn.to_out[0](out.transpose(1, 2).flatten(2))


def test_tome_definition():
    pipe = families.sana().to(torch.float64)
    other = copy.deepcopy(pipe)
    plain = tiny.run(pipe, steps=1, **SIZE)
    tokred.patch(pipe, method="tome", randomize=False, merge_cross_attn=True)
    ours = tiny.run(pipe, steps=1, **SIZE)
    for block in other.transformer.transformer_blocks:
        now = {}
        rotary_model.watch_input(block, now)
        block.attn1.forward = lambda x, attn=block.attn1: linear_attention(attn, x)

        def matching(now=now):
            if now.get("seen") is not now["input"]:
                now["seen"], now["matching"] = now["input"], tome_model.Matching(now["input"], 16, 32, 2, 2, 0.5)
            return now["matching"]

        tome_model.around(block.attn1, matching)
        tome_model.around(block.attn2, matching)
    assert (ours - plain).abs().max() > 1e-3
    near(ours, tiny.run(other, steps=1, **SIZE), 1e-5)


# --- FLOPs, compiled -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [dict(method="tome"), dict(method="tome", merge_cross_attn=True, ratio=0.7),
     dict(method="random-keep", cross_attention=True), dict(method="tome", policy=0.0)],
    ids=["tome", "tome-cross", "random-keep", "dense"],
)  # fmt: skip
def test_flops(options):
    assert_flops(families.sana, options, **SIZE)


def test_shares():
    """The time of linear attention is that of its rows: there is no attention function to wait for."""
    denoiser = families.sana().transformer
    layout = tokred.backbones.backbone_of(denoiser).layout(denoiser)
    names = {id(module): name for name, module in denoiser.named_modules()}
    found = profile(denoiser, lambda: call(denoiser), rounds=1)
    for site in layout.sites:
        assert found.seconds[names[id(site.module)]] > 0
        assert (f"{names[id(site.module)]} core" in found.seconds) == (site.kind == "cross_attention")


def model(**config):
    known = {k: v for k, v in families.sana().transformer.config.items() if not k.startswith("_")}
    torch.manual_seed(0)
    return families._awake(SanaTransformer2DModel(**known | config))


@torch.no_grad()
def call(denoiser, height=16, width=12):
    draw = torch.Generator().manual_seed(1)
    guidance = dict(guidance=torch.tensor([0.5, 0.5])) if denoiser.config.guidance_embeds else {}
    return denoiser(
        torch.randn(2, 4, height, width, generator=draw), torch.randn(2, 7, 32, generator=draw),
        torch.tensor([500.0, 500.0]), encoder_attention_mask=torch.tensor([[1] * 6 + [0], [1] * 7]),
        return_dict=False, **guidance,
    )[0]  # fmt: skip


EVERYTHING = dict(method="tome", merge_cross_attn=True, randomize=False)


@pytest.mark.parametrize(
    "config",
    [dict(guidance_embeds=True, qk_norm="rms_norm_across_heads"), dict(interpolation_scale=1), dict(patch_size=2)],
    ids=["sprint", "positions", "patches"],
)
def test_other_configs(config):
    denoiser = model(**config)
    plain = call(denoiser)
    tokred.patch(denoiser, policy=0.0, **EVERYTHING)
    assert torch.equal(call(denoiser), plain)
    tokred.patch(denoiser, **EVERYTHING)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = call(denoiser)
    assert (out - plain).abs().max() > 1e-4
    assert denoiser._tokred.levels[0].grid == ((8, 6) if "patch_size" in config else (16, 12))
    assert denoiser._tokred.report.steps[-1].flops == counter.get_total_flops()
    assert torch.equal(call(tokred.unpatch(denoiser)), plain)


def test_compiled(dynamo):
    denoiser = tokred.patch(model(), **EVERYTHING)
    want = call(denoiser)
    compiled = torch.compile(denoiser, backend="eager", fullgraph=True)
    near(call(compiled), want, 1e-5)
    call(compiled)
    assert dynamo["stats"]["unique_graphs"] == 1


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(method="todo"), "linear here.*fewer keys save next to nothing"),
        (dict(method="todo", mode="area"), "linear here.*fewer keys save next to nothing"),
        (dict(method="tome", merge_ff=True), "convolves neighbouring tokens.*all of them, in their places"),
        (dict(method="random-keep", feed_forward=True), "convolves neighbouring tokens"),
    ],
    ids=str,
)
def test_refusals(options, reason):
    with pytest.raises(tokred.UnsupportedError, match=reason):
        tokred.patch(families.sana(), **options)

"""Wan: the contract, the methods by definition, FLOPs, per-token times, start pictures, two experts, refusals."""

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import diffusion_tokred as tokred
from diffusion_tokred import testing
from diffusion_tokred.testing import families, tiny
from tests.backbones.common import assert_defined, assert_flops
from tests.contract.helpers import near, same
from tests.reference import rotary_model

SMALL = dict(height=16, width=32)  # 3 frames of 4 x 8


def test_contract():
    """CFG in two passes."""
    testing.assert_contract(testing.check_backbone(families.wan, tiny.run, [tokred.ToMeConfig(), tokred.ToDoConfig()]))
    some = ("neutral", "machinery", "batch", "repeat")
    testing.assert_contract(testing.check_backbone(families.wan, tiny.run, [tokred.RandomKeepConfig()], some))


# --- by definition ---------------------------------------------------------------------------------------------------


def attention(attn, x, tables, at, keys):
    """Self-attention, written out: queries and keys are normalised over all heads."""

    def heads(y):
        return y.unflatten(2, (attn.heads, -1))

    def turned(y):
        cos, sin = (table[0, at, 0].to(y.dtype) for table in tables)
        return rotary_model.rotate(y, cos[:, ::2], sin[:, 1::2])

    q, k = turned(heads(attn.norm_q(attn.to_q(x)))), turned(heads(attn.norm_k(attn.to_k(x))))
    return (attn.to_out[0](rotary_model.attend(q, k[:, keys], heads(attn.to_v(x))[:, keys])),)


def install(model, method, grid):
    for block in model.blocks:
        now = {}
        rotary_model.watch_input(block, now)

        def forward(x, text, mask, tables, attn=block.attn1, now=now):
            def run(i, x, at, keys):
                return attention(attn, x, tables, at, keys)

            return rotary_model.reduced(method, now["input"], grid, x, run)[0]

        block.attn1.forward = forward


@pytest.mark.parametrize("method", ["tome", "todo"])
def test_definition(method):
    """Frames lie one below another. Two samples, so that each has its own matching."""
    assert_defined(families.wan, install, method, least=1e-4, **SMALL)


# --- FLOPs, compiled -------------------------------------------------------------------------------------------------

EVERYTHING = dict(merge_cross_attn=True, merge_ff=True)


@pytest.mark.parametrize(
    "options",
    [dict(method="tome"), dict(method="tome", ratio=0.7, **EVERYTHING), dict(method="todo"),
     dict(method="random-keep", cross_attention=True, feed_forward=True), dict(method="todo", policy=0.0)],
    ids=["tome", "tome-all", "todo", "random-keep", "dense"],
)  # fmt: skip
def test_flops(options):
    assert_flops(families.wan, options, **SMALL)


def model(**config):
    known = {k: v for k, v in families.wan().transformer.config.items() if not k.startswith("_")}
    torch.manual_seed(0)
    return WanTransformer3DModel(**known | config).eval()


@torch.no_grad()
def call(denoiser, height=8, width=12, text=512, image=None, time=(2,)):
    draw = torch.Generator().manual_seed(1)
    return denoiser(
        torch.randn(2, 4, 3, height, width, generator=draw), torch.full(time, 500.0),
        torch.randn(2, text, 32, generator=draw),
        None if image is None else torch.randn(2, image, 24, generator=draw), return_dict=False,
    )[0]  # fmt: skip


@pytest.mark.parametrize("options", [dict(method="tome", **EVERYTHING), dict(method="todo")], ids=["tome", "todo"])
def test_start_pictures(options):
    """Wan 2.1 from pictures: their tokens stand before the prompt's, with projections of their own. Odd heights."""
    denoiser = model(image_dim=24, added_kv_proj_dim=32, num_layers=2)
    plain = call(denoiser, height=9, image=5)
    tokred.patch(denoiser, **options)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = call(denoiser, height=9, image=5)
    assert (out - plain).abs().max() > 1e-4
    assert denoiser._tokred.levels[0].grid == (3 * 4, 6)
    assert denoiser._tokred.report.steps[-1].flops == counter.get_total_flops()


class _All:
    """A policy that forces the machinery on, with nothing left out."""

    def at(self, *args, **kwargs):
        return "reduce", 0.0


def test_a_time_for_each_token():
    """Wan 2.2 TI2V modulates each token by a time of its own: outside of the sites, so it stays where it was."""
    pipe = families.wan()
    pipe.register_to_config(expand_timesteps=True)
    plain = tiny.run(pipe, **SMALL)
    tokred.patch(pipe, method="tome", **EVERYTHING)
    reduced = tiny.run(pipe, **SMALL)
    assert (reduced - plain).abs().max() > 1e-4
    pipe.transformer._tokred.policy = _All()
    near(tiny.run(pipe, **SMALL), plain, 1e-5)
    tokred.unpatch(pipe)
    assert same(tiny.run(pipe, **SMALL), plain)


def test_fused_projections():
    pipe, fused = families.wan(), families.wan()
    fused.transformer.fuse_qkv_projections()
    for method in ("tome", "todo"):
        want = tiny.run(tokred.patch(pipe, method=method), **SMALL)
        near(tiny.run(tokred.patch(fused, method=method), **SMALL), want, 1e-5)


def test_compiled(dynamo):
    pipe = families.wan()
    pipe.transformer = tokred.patch(model(num_layers=2), method="tome")
    want = tiny.run(pipe, steps=2, batch=2, **SMALL)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
    near(tiny.run(pipe, steps=2, batch=2, **SMALL), want, 1e-5)
    assert dynamo["stats"]["unique_graphs"] == 1


def test_compiled_blocks(dynamo):
    """12 blocks, above the recompile limit. Keys are chosen in the first, for all."""
    pipe = families.wan()
    pipe.transformer = tokred.patch(model(num_layers=12), method="todo")
    want = tiny.run(pipe, steps=1, **SMALL)
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    near(tiny.run(pipe, steps=1, **SMALL), want, 1e-5)
    assert dynamo["stats"]["unique_graphs"] <= 4


# --- two experts, refusals -------------------------------------------------------------------------------------------


def experts():
    """Wan 2.2's: one for the noisy steps, one for the others."""
    one = families.wan()
    parts = one.components | dict(transformer_2=model(num_layers=2))
    pipe = WanPipeline(**parts, boundary_ratio=0.8)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_two_experts():
    pipe = experts()
    steps = {"transformer": [], "transformer_2": []}
    for name, seen in steps.items():
        getattr(pipe, name).register_forward_pre_hook(lambda m, args, seen=seen: seen.append(1))
    plain = tiny.run(pipe, steps=4, **SMALL)
    assert len(steps["transformer"]) and len(steps["transformer_2"])
    tokred.patch(pipe, method="tome", reuse_every=2)
    reduced = tiny.run(pipe, steps=4, **SMALL)
    assert (reduced - plain).abs().max() > 1e-4
    assert same(tiny.run(pipe, steps=4, **SMALL), reduced)
    found = [tokred.report(part).steps for part in (pipe.transformer, pipe.transformer_2)]
    assert [step.index for part in found for step in part] == [0, 0, 1, 1, 2, 2, 3, 3]  # two passes each
    assert all(step.flops < step.flops_dense for part in found for step in part)
    tokred.unpatch(pipe)
    assert not any("_tokred" in vars(part) for part in (pipe.transformer, pipe.transformer_2))
    assert same(tiny.run(pipe, steps=4, **SMALL), plain)


def test_refusals():
    with pytest.raises(tokred.UnsupportedError, match="rotary keys can be chosen, not averaged"):
        tokred.patch(families.wan(), method="todo", mode="area")

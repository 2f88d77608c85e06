"""AuraFlow: the contract, the methods by definition, register tokens, FLOPs, fused projections, refusals."""

import copy

import pytest
import torch
from diffusers import AuraFlowTransformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import diffusion_tokred as tokred
from diffusion_tokred import testing
from diffusion_tokred.backbones import auraflow
from diffusion_tokred.testing import families, tiny
from tests.backbones.common import assert_flops
from tests.contract.helpers import near
from tests.reference import todo_model, tome_model

SIZE = dict(height=48, width=32)  # 12 x 8 tokens
CONTRACT = (tokred.ToMeConfig(), tokred.ToDoConfig(mode="area"), tokred.RandomKeepConfig(feed_forward=True))


def test_sites():
    """Site checks, and each method's quick ones."""
    checks = ["grid", "offers", "acts", "machinery", "batch"]
    testing.assert_contract(testing.check_backbone(families.auraflow, tiny.run, CONTRACT, checks))


@pytest.mark.slow
@pytest.mark.parametrize("config", CONTRACT, ids=lambda config: config.name)
def test_contract(config):
    testing.assert_contract(testing.check_backbone(families.auraflow, tiny.run, [config], testing.CHECKS))


# --- by definition ---------------------------------------------------------------------------------------------------


def attend(attn, image, before, pool):
    """The attention written out: [before, image] in one sequence; keys and values of the image through `pool`.

    Args:
        attn: the module, for its layers.
        image: (B, N, C).
        before: (B, T, C) rows before the image.
        pool: (B, N, C) -> (B, M, C).

    Returns:
        The outputs of `image` and of `before`.
    """
    joint = attn.add_q_proj is not None
    q2, k2, v2 = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj) if joint else (attn.to_q, attn.to_k, attn.to_v)
    norms = (attn.norm_added_q, attn.norm_added_k) if joint else (attn.norm_q, attn.norm_k)

    def heads(y, norm=None):
        y = y.unflatten(2, (attn.heads, -1))
        return y if norm is None else norm(y)

    q = torch.cat([heads(q2(before), norms[0]), heads(attn.to_q(image), attn.norm_q)], 1)
    k = pool(heads(attn.to_k(image), attn.norm_k).flatten(2)).unflatten(2, (attn.heads, -1))
    k = torch.cat([heads(k2(before), norms[1]), k], 1)
    v = torch.cat([heads(v2(before)), heads(pool(attn.to_v(image)))], 1)
    out = todo_model.softmax_attention(*(y.transpose(1, 2) for y in (q, k, v))).transpose(1, 2).flatten(2)
    end = before.shape[1]
    return attn.to_out[0](out[:, end:]), (attn.to_add_out if joint else attn.to_out[0])(out[:, :end])


def install(model, grid, merge, pool):
    """Put a method's definition on the blocks; the feed-forward is merged around too, if `merge`."""
    n = grid[0] * grid[1]
    for block in [*model.joint_transformer_blocks, *model.single_transformer_blocks]:
        now = {}

        def see(module, args, kwargs, now=now):
            if merge:
                now["matching"] = tome_model.Matching(kwargs["hidden_states"][:, -n:], *grid, 2, 2, 0.5)

        block.register_forward_pre_hook(see, with_kwargs=True)

        def reduced(x, run, now=now):
            if not merge:
                return run(x)
            image, rest = run(now["matching"].merge(x))
            return now["matching"].unmerge(image), rest

        def attention(hidden_states, encoder_hidden_states=None, attn=block.attn, reduced=reduced):
            image, text = hidden_states[:, -n:], encoder_hidden_states
            before = hidden_states[:, :-n] if text is None else text
            out, rest = reduced(image, lambda x: attend(attn, x, before, pool))
            return (out, rest) if text is not None else torch.cat([rest, out], 1)

        def mlp(x, forward=block.ff.forward, reduced=reduced):
            image, before = x[:, -n:], x[:, :-n]
            return torch.cat(reduced(image, lambda y: (forward(y), forward(before)))[::-1], 1)

        block.attn.forward = attention
        if merge:
            block.ff.forward = mlp


@pytest.mark.parametrize("method", ["none", "tome", "nearest", "area"])
def test_definition(method):
    """Two samples, so that each has its own matching; `none`: the definition with nothing left out is the model."""
    pipe = families.auraflow().to(torch.float64)
    other = copy.deepcopy(pipe)
    more = dict(steps=1, batch=2) | SIZE
    ours = plain = tiny.run(pipe, **more)
    if method == "tome":
        ours = tiny.run(tokred.patch(pipe, method="tome", randomize=False, merge_ff=True), **more)
    elif method != "none":
        ours = tiny.run(tokred.patch(pipe, method="todo", mode=method), **more)

    def pool(y):
        return todo_model.pooled(y, 12, 8, 2, method) if method in ("nearest", "area") else y

    install(other.transformer, (12, 8), method == "tome", pool)
    assert method == "none" or (ours - plain).abs().max() > 1e-3
    near(ours, tiny.run(other, **more), 1e-9)


def test_register_tokens_are_no_image():
    """What a method is handed is the image, wherever its rows are: one step, blocks of both kinds."""
    pipe = tokred.patch(families.auraflow(), method="tome", merge_ff=True)
    registers = pipe.transformer.register_tokens.shape[1]
    rows = {}

    def see(module, args, kwargs):
        rows["sequence"] = kwargs["hidden_states"].shape[1]

    pipe.transformer.single_transformer_blocks[0].register_forward_pre_hook(see, with_kwargs=True)
    tiny.run(pipe, steps=1, **SIZE)
    (level,) = pipe.transformer._tokred.levels
    assert level.start == registers + 7 == rows["sequence"] - level.grid[0] * level.grid[1]


# --- FLOPs, compiled -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [dict(method="tome"), dict(method="tome", merge_ff=True, ratio=0.7), dict(method="todo", mode="area"),
     dict(method="random-keep", feed_forward=True), dict(method="todo", policy=0.0)],
    ids=["tome", "tome-ff", "todo", "random-keep", "dense"],
)  # fmt: skip
def test_flops(options):
    assert_flops(families.auraflow, options, **SIZE)


def test_explained_flops_are_the_runs():
    """The model's own rows come on top of a prompt's; a bare denoiser has the pipeline's default."""
    pipe = families.auraflow()
    found = tokred.explain(pipe, method="tome", text_tokens=7, **SIZE)
    tiny.run(tokred.patch(pipe, method="tome"), steps=1, **SIZE)
    assert found.flops["total"] == (tokred.report(pipe).flops_dense, tokred.report(pipe).flops)
    backbone = auraflow.AuraFlow()
    model = pipe.transformer
    assert backbone.prompt(model, pipe) == backbone.prompt(model, model) == 256


def model(**config):
    known = {k: v for k, v in families.auraflow().transformer.config.items() if not k.startswith("_")}
    torch.manual_seed(0)
    return families._awake(AuraFlowTransformer2DModel(**known | config))


@pytest.mark.parametrize("options", [dict(method="tome", merge_ff=True), dict(method="todo")], ids=["tome", "todo"])
def test_compiled(options, dynamo):
    pipe = tokred.patch(families.auraflow(), **options)
    want = tiny.run(pipe, steps=2)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
    near(tiny.run(pipe, steps=2), want, 1e-5)
    assert dynamo["stats"]["unique_graphs"] == 1


# --- fused, single blocks only, refusals -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tome", "todo"])
def test_fused_projections(method):
    """Fused while patched, at half the way: the same pictures, and the same FLOPs."""
    pipe = tokred.patch(families.auraflow().to(torch.float64), method=method)
    want, flops = tiny.run(pipe), tokred.report(pipe).flops
    pipe.transformer.fuse_qkv_projections()
    near(tiny.run(pipe), want, 1e-9)
    assert tokred.report(pipe).flops == flops
    pipe.transformer.unfuse_qkv_projections()
    assert torch.equal(tiny.run(pipe), want)


@pytest.mark.parametrize("layers", [dict(num_mmdit_layers=0), dict(num_single_dit_layers=0)], ids=["single", "joint"])
def test_blocks_of_one_kind(layers):
    pipe = families.auraflow()
    pipe.transformer = model(**layers)
    plain = tiny.run(pipe, steps=1)
    tokred.patch(pipe, method="tome", merge_ff=True)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        assert not torch.equal(tiny.run(pipe, steps=1), plain)
    assert tokred.report(pipe).flops == counter.get_total_flops()


def test_refusals():
    pipe = families.auraflow()
    with pytest.raises(tokred.UnsupportedError, match="no cross_attention here"):
        tokred.patch(pipe, method="tome", merge_cross_attn=True)
    with pytest.raises(tokred.UnsupportedError, match="nothing to act on at level 1; the levels here: 0"):
        tokred.patch(pipe, method="todo", levels=(0, 1))
    assert "_tokred" not in vars(pipe.transformer)

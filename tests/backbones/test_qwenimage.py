"""Qwen-Image: the contract, the methods by definition, FLOPs, edit and layered models, refusals."""

import pytest
import torch
from diffusers import QwenImageTransformer2DModel

import diffusion_tokred as tokred
from diffusion_tokred import testing
from diffusion_tokred.testing import families, tiny
from tests.backbones.common import assert_defined, assert_flops, each_option
from tests.contract.helpers import near
from tests.reference import rotary_model

TEXT = 7
SIZE = dict(height=48, width=32)  # 12 x 8 tokens


def test_contract():
    """CFG in two passes; the conditional prompt is masked."""
    testing.assert_contract(
        testing.check_backbone(families.qwenimage, tiny.run, [tokred.ToMeConfig(), tokred.ToDoConfig()])
    )
    some = ("neutral", "machinery", "batch", "repeat")
    testing.assert_contract(testing.check_backbone(families.qwenimage, tiny.run, [tokred.RandomKeepConfig()], some))


# --- by definition ---------------------------------------------------------------------------------------------------


def attention(attn, x, text, mask, tables, at, keys):
    """The joint attention, written out: text first; masked words are left out of the keys."""

    def heads(y, norm=None):
        y = y.unflatten(2, (attn.heads, -1))
        return y if norm is None else norm(y)

    def turned(y, table):
        return rotary_model.rotate(y, table.real.to(y.dtype), table.imag.to(y.dtype))

    places, words = tables
    words_kept = torch.arange(TEXT) if mask is None else mask.nonzero()[:, 0]
    q = [turned(heads(attn.add_q_proj(text), attn.norm_added_q), words)]
    q.append(turned(heads(attn.to_q(x), attn.norm_q), places[at]))
    k = [turned(heads(attn.add_k_proj(text), attn.norm_added_k), words)[:, words_kept]]
    k.append(turned(heads(attn.to_k(x), attn.norm_k), places[at])[:, keys])
    v = [heads(attn.add_v_proj(text))[:, words_kept], heads(attn.to_v(x))[:, keys]]
    out = rotary_model.attend(*(torch.cat(parts, 1) for parts in (q, k, v)))
    return attn.to_out[0](out[:, TEXT:]), attn.to_add_out(out[:, :TEXT])


def install(model, method, grid):
    for block in model.transformer_blocks:
        now = {}
        rotary_model.watch_input(block, now)

        def forward(
            hidden_states, encoder_hidden_states, encoder_hidden_states_mask, image_rotary_emb, attn=block.attn, now=now
        ):
            def run(i, x, at, keys):
                mask = None if encoder_hidden_states_mask is None else encoder_hidden_states_mask[i]
                return attention(attn, x, encoder_hidden_states[i : i + 1], mask, image_rotary_emb, at, keys)

            return rotary_model.reduced(method, now["input"], grid, hidden_states, run)

        block.attn.forward = forward


@pytest.mark.parametrize("method", ["tome", "todo"])
def test_definition(method):
    """Two samples, so that each has its own matching."""
    assert_defined(families.qwenimage, install, method, **SIZE)


# --- FLOPs, compiled -------------------------------------------------------------------------------------------------


@each_option
def test_flops(options):
    assert_flops(families.qwenimage, options, **SIZE)


def test_compiled(dynamo):
    pipe = families.qwenimage()
    pipe.transformer = tokred.patch(model(num_layers=2), method="tome")
    want = tiny.run(pipe, steps=2, batch=2)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
    near(tiny.run(pipe, steps=2, batch=2), want, 1e-5)
    assert dynamo["stats"]["unique_graphs"] == 2  # with a mask, and without: the pipeline drops one that hides nothing


def test_compiled_blocks(dynamo):
    """12 blocks, above the recompile limit. Keys are chosen in the first, for all."""
    pipe = families.qwenimage()
    pipe.transformer = tokred.patch(model(num_layers=12), method="todo")
    want = tiny.run(pipe, steps=1)
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    near(tiny.run(pipe, steps=1), want, 1e-5)
    assert dynamo["stats"]["unique_graphs"] <= 4


# --- pictures to edit, layers ----------------------------------------------------------------------------------------


def model(**config):
    known = {k: v for k, v in families.qwenimage().transformer.config.items() if not k.startswith("_")}
    torch.manual_seed(0)
    return QwenImageTransformer2DModel(**known | config).eval()


@torch.no_grad()
def call(denoiser, shapes):
    tokens = sum(f * h * w for f, h, w in shapes)
    draw = torch.Generator().manual_seed(1)
    more = {}
    if denoiser.config.use_additional_t_cond:
        more["additional_t_cond"] = torch.zeros(2, dtype=torch.long)
    return denoiser(
        torch.randn(2, tokens, 16, generator=draw), torch.randn(2, TEXT, 32, generator=draw), None,
        torch.tensor([0.7, 0.7]), [shapes] * 2, return_dict=False, **more,
    )[0]  # fmt: skip


class _All:
    """A policy that forces the machinery on, with nothing left out."""

    def at(self, *args, **kwargs):
        return "reduce", 0.0


@pytest.mark.parametrize(
    "config, shapes, grid",
    [
        (dict(zero_cond_t=True), [(1, 6, 4), (1, 4, 4), (1, 6, 4)], (6, 4)),
        (dict(use_layer3d_rope=True, use_additional_t_cond=True), [(1, 4, 6)] * 3 + [(1, 2, 2)], (12, 6)),
    ],
    ids=["edit", "layered"],
)
def test_references_stay_whole(config, shapes, grid):
    denoiser = model(**config)
    plain = call(denoiser, shapes)
    tokred.patch(denoiser, method="tome", merge_ff=True)
    denoiser._tokred.policy = _All()
    near(call(denoiser, shapes), plain, 1e-5)
    assert denoiser._tokred.levels[0].grid == grid
    for method in ("tome", "todo", "random-keep"):
        tokred.patch(denoiser, method=method)
        assert (call(denoiser, shapes) - plain).abs().max() > 1e-4
        rows = denoiser._tokred.report.steps[-1]
        assert rows.tokens_computed < rows.tokens_total == 3 * grid[0] * grid[1]


def test_shapes_without_lists():
    """ControlNet's pipelines pass one shape a sample, not a list of them."""
    pipe = tokred.patch(families.qwenimage(), method="tome")
    want = tiny.run(pipe, **SIZE)
    flat = lambda m, args, kw: (args, kw | dict(img_shapes=[shapes[0] for shapes in kw["img_shapes"]]))  # noqa: E731
    pipe.transformer.register_forward_pre_hook(flat, with_kwargs=True, prepend=True)
    assert torch.equal(tiny.run(pipe, **SIZE), want)


def test_refusals():
    with pytest.raises(tokred.UnsupportedError, match="rotary keys can be chosen, not averaged"):
        tokred.patch(families.qwenimage(), method="todo", mode="area")
    with pytest.raises(tokred.UnsupportedError, match="no cross_attention here"):
        tokred.patch(families.qwenimage(), method="tome", merge_cross_attn=True)

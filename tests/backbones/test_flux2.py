"""FLUX.2, dev and klein: the contract, the methods by definition, FLOPs, pictures to edit, refusals."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor
from PIL import Image

import diffusion_tokred as tokred
from diffusion_tokred import testing
from diffusion_tokred.testing import families, tiny
from tests.backbones.common import assert_defined, assert_flops
from tests.contract.helpers import near
from tests.reference import rotary_model

TEXT = 7
SIZE = dict(height=48, width=32)  # 12 x 8 tokens


def test_contract():
    testing.assert_contract(
        testing.check_backbone(families.flux2, tiny.run, [tokred.ToMeConfig(), tokred.ToDoConfig()])
    )
    some = ("neutral", "machinery", "batch", "repeat")
    testing.assert_contract(testing.check_backbone(families.flux2, tiny.run, [tokred.RandomKeepConfig()], some))


def test_contract_klein():
    """CFG in two passes."""
    checks = ("machinery", "passes", "batch")
    testing.assert_contract(testing.check_backbone(families.flux2_klein, tiny.run, checks=checks))


# --- by definition ---------------------------------------------------------------------------------------------------


def heads(x, attn, norm=None):
    x = x.unflatten(2, (attn.heads, -1))
    return x if norm is None else norm(x)


def turned(x, tables, rows):
    cos, sin = (table[rows].to(x.dtype)[:, ::2] for table in tables)
    return rotary_model.rotate(x, cos, sin)


def double(attn, x, text, tables, at, keys):
    """Attention of a double block, written out: text first."""
    rows = torch.cat([torch.arange(TEXT), TEXT + at])
    q = torch.cat([heads(attn.add_q_proj(text), attn, attn.norm_added_q), heads(attn.to_q(x), attn, attn.norm_q)], 1)
    k = torch.cat([heads(attn.add_k_proj(text), attn, attn.norm_added_k), heads(attn.to_k(x), attn, attn.norm_k)], 1)
    v = torch.cat([heads(attn.add_v_proj(text), attn), heads(attn.to_v(x), attn)], 1)
    some = torch.cat([torch.arange(TEXT), TEXT + keys])
    out = rotary_model.attend(turned(q, tables, rows), turned(k, tables, rows)[:, some], v[:, some])
    return attn.to_out[0](out[:, TEXT:]), attn.to_add_out(out[:, :TEXT])


def single(attn, x, tables, at, keys):
    """Attention and MLP of a single block, written out: one sequence, text first."""
    rows = torch.cat([torch.arange(TEXT), TEXT + at])
    width = attn.inner_dim
    q, k, v, gate, up = attn.to_qkv_mlp_proj(x).split([width] * 3 + [attn.mlp_hidden_dim] * 2, -1)
    q, k = turned(heads(q, attn, attn.norm_q), tables, rows), turned(heads(k, attn, attn.norm_k), tables, rows)
    some = torch.cat([torch.arange(TEXT), TEXT + keys])
    out = rotary_model.attend(q, k[:, some], heads(v, attn)[:, some])
    return attn.to_out(torch.cat([out, F.silu(gate) * up], -1))


def install(model, method, grid):
    for block in model.transformer_blocks:
        now = {}
        rotary_model.watch_input(block, now)

        def forward(hidden_states, encoder_hidden_states, image_rotary_emb, attn=block.attn, now=now):
            def run(i, x, at, keys):
                return double(attn, x, encoder_hidden_states[i : i + 1], image_rotary_emb, at, keys)

            return rotary_model.reduced(method, now["input"], grid, hidden_states, run)

        block.attn.forward = forward
    for block in model.single_transformer_blocks:
        install_single(block, method, grid)


def install_single(block, method, grid):
    """ToMe takes the block whole: what it adds is merged. ToDo chooses keys inside of its layer."""
    dense = block.forward

    def forward(hidden_states, temb_mod, image_rotary_emb, **kwargs):
        text, image = hidden_states[:, :TEXT], hidden_states[:, TEXT:]

        def run(i, x, at, keys):
            def layer(hidden_states, image_rotary_emb):
                return single(block.attn, hidden_states, image_rotary_emb, at, keys)

            block.attn.forward = layer
            x = torch.cat([text[i : i + 1], x], 1)
            mod = temb_mod.expand(len(text), -1)[i : i + 1]
            change = dense(hidden_states=x, temb_mod=mod, image_rotary_emb=image_rotary_emb, **kwargs) - x
            return change[:, TEXT:], change[:, :TEXT]

        image, text = rotary_model.reduced(method, image, grid, image, run)
        return hidden_states + torch.cat([text, image], 1)

    block.forward = forward


@pytest.mark.parametrize("method", ["tome", "todo"])
def test_definition(method):
    """Two samples, so that each has its own matching."""
    assert_defined(families.flux2, install, method, **SIZE)


# --- FLOPs, compiled, edits, refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [dict(method="tome"), dict(method="tome", merge_ff=True, merge_parallel=False, ratio=0.7), dict(method="todo"),
     dict(method="random-keep", feed_forward=True), dict(method="todo", policy=0.0)],
    ids=["tome", "tome-ff", "todo", "random-keep", "dense"],
)  # fmt: skip
def test_flops(options):
    assert_flops(families.flux2, options, **SIZE)


def deep(layers=12):
    pipe = families.flux2()
    torch.manual_seed(0)
    config = dict(pipe.transformer.config) | dict(num_layers=layers, num_single_layers=layers)
    pipe.transformer = type(pipe.transformer).from_config(config).eval()
    return pipe


def test_compiled(dynamo):
    pipe = tokred.patch(families.flux2(), method="tome")
    want = tiny.run(pipe, steps=2, batch=2)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
    near(tiny.run(pipe, steps=2, batch=2), want, 1e-5)
    assert dynamo["stats"]["unique_graphs"] == 1


def test_compiled_blocks(dynamo):
    """24 blocks, far above the recompile limit. Keys are chosen in the first, for all."""
    pipe = tokred.patch(deep(), method="todo")
    want = tiny.run(pipe, steps=1)
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    near(tiny.run(pipe, steps=1), want, 1e-5)
    assert dynamo["stats"]["unique_graphs"] <= 4  # the two classes; the first block of each makes what all share


class _All:
    """A policy that forces the machinery on, with nothing left out."""

    def at(self, *args, **kwargs):
        return "reduce", 0.0


def test_pictures_to_edit_stay_whole():
    more = dict(image=[Image.radial_gradient("L").resize((64, 96)).convert("RGB")], steps=2, **SIZE)
    pipe = families.flux2()
    rows, grids = [], []
    pipe.transformer.x_embedder.register_forward_hook(lambda m, args, out: rows.append(out.shape[1]))
    plain = tiny.run(pipe, **more)
    assert rows[0] > 12 * 8
    tokred.patch(pipe, method="tome", merge_ff=True)
    driver = pipe.transformer._tokred
    driver.policy = _All()
    pipe.transformer.register_forward_hook(lambda *args: grids.append(driver.levels[0].grid))
    near(tiny.run(pipe, **more), plain, 1e-5)
    assert set(grids) == {(12, 8)}
    for method in ("tome", "todo", "random-keep"):
        tokred.patch(pipe, method=method)
        assert (tiny.run(pipe, **more) - plain).abs().max() > 1e-4


def test_refusals():
    pipe = families.flux2()
    with pytest.raises(tokred.UnsupportedError, match="rotary keys can be chosen, not averaged"):
        tokred.patch(pipe, method="todo", mode="area")
    left = {line.name: line.reason for line in tokred.explain(pipe, method="tome", merge_parallel=False, **SIZE).sites}
    assert "attention and MLP are one layer" in left["single_transformer_blocks.0.attn"]
    assert left["transformer_blocks.0.attn"] is None
    for block in pipe.transformer.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in pipe.transformer.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    for options in (dict(method="todo"), dict(method="tome", merge_attn=False, merge_ff=True)):
        with pytest.raises(tokred.UnsupportedError, match="Flux2KleinKVPipeline"):
            tokred.patch(pipe, **options)

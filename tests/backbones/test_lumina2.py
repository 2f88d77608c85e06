"""Lumina 2: the contract, the methods by definition, FLOPs, prompts of several lengths, refusals."""

import pytest
import torch
from diffusers import Lumina2Transformer2DModel

import diffusion_tokred as tokred
from diffusion_tokred import testing
from diffusion_tokred.testing import families, tiny
from tests.backbones.common import assert_defined, assert_flops, each_option
from tests.contract.helpers import near
from tests.reference import rotary_model

SIZE = dict(height=48, width=32)  # 12 x 8 tokens


def test_contract():
    """CFG in two passes; the conditional prompt is a token shorter."""
    testing.assert_contract(testing.check_backbone(families.lumina2, tiny.run))


# --- by definition ---------------------------------------------------------------------------------------------------


def attention(attn, x, table, keys):
    """The attention of one sample, written out: two heads share a head of keys and values."""

    def heads(y, norm=None):
        y = y.unflatten(2, (-1, 16))
        y = y if norm is None else norm(y)
        return y.repeat_interleave(attn.heads // y.shape[2], 2)

    def turned(y):
        return rotary_model.rotate(y, table.real.to(y.dtype), table.imag.to(y.dtype))

    q, k = turned(heads(attn.to_q(x), attn.norm_q)), turned(heads(attn.to_k(x), attn.norm_k))
    return attn.to_out[0](rotary_model.attend(q, k[:, keys], heads(attn.to_v(x))[:, keys]))


def install(model, method, grid):
    n = grid[0] * grid[1]
    for block in [*model.noise_refiner, *model.layers]:
        now = {}
        rotary_model.watch_input(block, now)

        def forward(hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, attn=block.attn, now=now):
            assert encoder_hidden_states is hidden_states
            assert attention_mask is None
            x, words = hidden_states, hidden_states.shape[1] - n

            def run(i, image, at, keys):
                text = torch.arange(words)
                rows, some = torch.cat([text, words + at]), torch.cat([text, words + keys])
                out = attention(attn, torch.cat([x[i : i + 1, :words], image], 1), image_rotary_emb[i, rows], some)
                return out[:, words:], out[:, :words]

            image, text = rotary_model.reduced(method, now["input"][:, words:], grid, x[:, words:], run)
            return torch.cat([text, image], 1)

        block.attn.forward = forward


@pytest.mark.parametrize("method", ["tome", "todo"])
def test_definition(method):
    """Two samples, so that each has its own matching."""
    assert_defined(families.lumina2, install, method, **SIZE)


# --- FLOPs, compiled -------------------------------------------------------------------------------------------------


@each_option
def test_flops(options):
    """The context refiner works on the padding too, the layers do not: 7 rows and 6 in the conditional pass."""
    found = assert_flops(families.lumina2, options, **SIZE)
    assert found.steps[0].flops < found.steps[1].flops


def model(**config):
    known = {k: v for k, v in families.lumina2().transformer.config.items() if not k.startswith("_")}
    torch.manual_seed(0)
    return families._awake(Lumina2Transformer2DModel(**known | config))


@torch.no_grad()
def call(denoiser, lengths, size=(16, 16)):
    draw = torch.Generator().manual_seed(1)
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    return denoiser(
        torch.randn(len(lengths), 4, *size, generator=draw), torch.full((len(lengths),), 0.5),
        torch.randn(len(lengths), 9, 32, generator=draw), mask, return_dict=False,
    )[0]  # fmt: skip


@pytest.mark.parametrize("method", ["tome", pytest.param("todo", marks=pytest.mark.slow)])
def test_compiled_layers(method, dynamo):
    """The model as a whole reads prompt lengths back from the device, patched or not: its layers can be one graph."""
    pipe = tokred.patch(families.lumina2(), method=method)
    want = tiny.run(pipe, steps=1)
    for layer in [*pipe.transformer.noise_refiner, *pipe.transformer.layers]:
        layer.compile(backend="eager", fullgraph=True)
    near(tiny.run(pipe, steps=1), want, 1e-5)
    first = dynamo["stats"]["unique_graphs"]
    tiny.run(pipe, steps=1)
    assert dynamo["stats"]["unique_graphs"] == first <= 8


@pytest.mark.slow
def test_compiled_with_breaks(dynamo):
    denoiser = tokred.patch(model(), method="tome", randomize=False)
    want = call(denoiser, [6, 6])
    near(call(torch.compile(denoiser, backend="eager"), [6, 6]), want, 1e-5)


# --- prompts, refusals -----------------------------------------------------------------------------------------------


def test_prompts_of_several_lengths():
    """One after the other they may have any; in one batch they may not."""
    options = dict(method="tome", randomize=False)
    denoiser = tokred.patch(model(), **options)
    alone = [call(tokred.patch(model(), **options), [length]) for length in (5, 8, 3)]
    for length, want in zip((5, 8, 3), alone, strict=True):
        assert torch.equal(call(denoiser, [length]), want)
    with pytest.raises(tokred.UnsupportedError, match=r"have 5, 8 tokens.*prompts of one length"):
        call(denoiser, [5, 8, 5])
    assert torch.equal(call(denoiser, [8]), alone[1])


def test_refusals():
    pipe = families.lumina2()
    with pytest.raises(tokred.UnsupportedError, match="rotary keys can be chosen, not averaged"):
        tokred.patch(pipe, method="todo", mode="bilinear")
    with pytest.raises(tokred.UnsupportedError, match="no cross_attention here"):
        tokred.patch(pipe, method="tome", merge_cross_attn=True)

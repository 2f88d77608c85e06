"""Z-Image: the contract, the methods by definition, FLOPs, masks, a ControlNet that shares blocks, refusals."""

import copy

import pytest
import torch
from diffusers import ZImageControlNetModel, ZImageTransformer2DModel

import diffusion_tokred as tokred
from diffusion_tokred import testing
from diffusion_tokred.testing import families, tiny
from tests.backbones.common import assert_flops, each_option
from tests.contract.helpers import near, same
from tests.reference import rotary_model

SIZE = dict(height=40, width=24)  # 10 x 6 tokens, and 4 rows of padding


def test_contract():
    testing.assert_contract(testing.check_backbone(families.zimage, tiny.run, other=SIZE))


# --- by definition ---------------------------------------------------------------------------------------------------


def attention(attn, x, mask, table, keys):
    """The attention of one sample, written out; masked rows are left out of the keys."""

    def heads(y, norm=None):
        y = y.unflatten(2, (attn.heads, -1))
        return y if norm is None else norm(y)

    def turned(y):
        return rotary_model.rotate(y, table.real.to(y.dtype), table.imag.to(y.dtype))

    if mask is not None:
        keys = keys[mask[keys]]
    q, k = turned(heads(attn.to_q(x), attn.norm_q)), turned(heads(attn.to_k(x), attn.norm_k))
    return attn.to_out[0](rotary_model.attend(q, k[:, keys], heads(attn.to_v(x))[:, keys]))


def install(model, method, grid):
    n = grid[0] * grid[1]
    for block in [*model.noise_refiner, *model.layers]:
        now = {}
        rotary_model.watch_input(block, now)

        def forward(x, attention_mask, freqs_cis, attn=block.attention, now=now):
            beside = x.shape[1] - n

            def run(i, image, at, keys):
                m = len(at)
                rows, some = (
                    torch.cat([at, torch.arange(n, n + beside)]),
                    torch.cat([keys, torch.arange(m, m + beside)]),
                )
                mask = None if attention_mask is None else attention_mask[i, rows]
                out = attention(attn, torch.cat([image, x[i : i + 1, n:]], 1), mask, freqs_cis[i, rows], some)
                return out[:, :m], out[:, m:]

            return torch.cat(rotary_model.reduced(method, now["input"][:, :n], grid, x[:, :n], run), 1)

        block.attention.forward = forward


def long_prompt():
    """An unconditional prompt of 40 tokens, 64 rows, where the conditional one has 32: masks."""
    return dict(negative_prompt_embeds=[torch.randn(40, 32, generator=torch.Generator().manual_seed(5)).double()])


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("method", ["tome", "todo"])
def test_definition(method, masked):
    """Both halves of the guidance have their own matching."""
    pipe = families.zimage().to(torch.float64)
    other = copy.deepcopy(pipe)
    more = dict(steps=1) | SIZE | (long_prompt() if masked else {})
    plain = tiny.run(pipe, **more)
    tokred.patch(pipe, method=method, **(dict(randomize=False) if method == "tome" else {}))
    ours = tiny.run(pipe, **more)
    install(other.transformer, method, (10, 6))
    assert (ours - plain).abs().max() > 1e-3
    near(ours, tiny.run(other, **more), 1e-5)


def test_offers_under_a_mask():
    """What sites offer, with prompts of two lengths."""

    def run(pipe, **more):
        return tiny.run(pipe, **long_prompt() | more)

    testing.assert_contract(testing.check_backbone(families.zimage, run, configs=[], checks=["offers"]))


# --- FLOPs, compiled -------------------------------------------------------------------------------------------------


@each_option
@pytest.mark.parametrize("size", [SIZE, dict(height=32, width=32)], ids=["padded", "even"])
def test_flops(options, size):
    assert_flops(families.zimage, options, **size)


_slow = pytest.mark.slow


def model(**config):
    known = {k: v for k, v in families.zimage().transformer.config.items() if not k.startswith("_")}
    torch.manual_seed(0)
    return families._awake(ZImageTransformer2DModel(**known | config))


@pytest.mark.parametrize(
    "options",
    [dict(method="tome", merge_ff=True), pytest.param(dict(method="todo"), marks=_slow)],
    ids=["tome", "todo"],
)
def test_compiled(options, dynamo):
    pipe = tokred.patch(families.zimage(), **options)
    want = tiny.run(pipe, steps=1)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
    near(tiny.run(pipe, steps=1), want, 1e-5)
    first = dynamo["stats"]["unique_graphs"]
    tiny.run(pipe, steps=2)
    assert dynamo["stats"]["unique_graphs"] == first <= 2


@pytest.mark.parametrize("method", ["todo", pytest.param("tome", marks=_slow)])
def test_compiled_blocks(method, dynamo):
    """12 blocks, above the recompile limit."""
    pipe = families.zimage()
    pipe.transformer = tokred.patch(model(n_layers=12), method=method)
    want = tiny.run(pipe, steps=1)
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    near(tiny.run(pipe, steps=1), want, 1e-5)
    assert dynamo["stats"]["unique_graphs"] <= 8


# --- a ControlNet, refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tome", "todo", "random-keep"])
@torch.no_grad()
def test_a_controlnet_shares_the_refiner(method):
    """Its calls come before the denoiser's and are dense, in a second run too."""
    pipe = families.zimage()
    torch.manual_seed(0)
    net = ZImageControlNetModel(control_layers_places=[0, 2], control_in_dim=4, dim=32, n_heads=2, n_kv_heads=2)
    net = ZImageControlNetModel.from_transformer(families._awake(net), pipe.transformer)
    draw = torch.Generator().manual_seed(1)
    x, text = (list(torch.randn(2, *shape, generator=draw)) for shape in ((4, 1, 16, 16), (7, 32)))
    time = torch.tensor([0.5, 0.5])

    def control():
        return net(x, time, text, x)

    def step():
        samples = control()
        return samples, torch.stack(pipe.transformer(x, time, text, False, samples)[0])

    samples, plain = step()
    tokred.patch(pipe, method=method)
    changed = []
    for _ in range(2):
        for _ in range(2):
            found, out = step()
            assert found.keys() == samples.keys()
            assert all(torch.equal(found[place], samples[place]) for place in samples)
            changed.append((out - plain).abs().max() > 1e-4)
        pipe.transformer._reset_stateful_cache()
    assert all(changed)


def test_refusals():
    pipe = families.zimage()
    with pytest.raises(tokred.UnsupportedError, match="rotary keys can be chosen, not averaged"):
        tokred.patch(pipe, method="todo", mode="area")
    with pytest.raises(tokred.UnsupportedError, match="no cross_attention here"):
        tokred.patch(pipe, method="tome", merge_cross_attn=True)
    denoiser = tokred.patch(model(), method="tome")
    words, time = [torch.randn(7, 32)] * 2, torch.tensor([0.5, 0.5])
    with pytest.raises(tokred.UnsupportedError, match=r"different sizes \(1x16x16, 1x16x8\)"):
        denoiser([torch.randn(4, 1, 16, 16), torch.randn(4, 1, 16, 8)], time, words)
    with pytest.raises(tokred.UnsupportedError, match="Omni"):
        denoiser([[torch.randn(4, 1, 16, 16)]] * 2, time, words)
    with torch.no_grad():  # and goes on
        denoiser([torch.randn(4, 1, 16, 16)] * 2, time, words)
    assert same(tiny.run(tokred.unpatch(pipe)), tiny.run(families.zimage()))

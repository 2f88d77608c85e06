"""Random keep: the choice and the copies against loops, whole models against the definition in float64."""

import copy
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import diffusion_tokred as tokred
from diffusion_tokred.methods.random_keep import keep
from diffusion_tokred.testing import tiny
from diffusion_tokred.tokens import draw, mix
from tests.contract.helpers import PIPES, loop, near, run, same
from tests.contract.test_tome_definition import blocks_at
from tests.reference import random_keep_model

RANGE = 1 << 31  # of the method's draws


def expected(key, h, w, count):
    places = random_keep_model.kept(draw(key, h * w, RANGE).tolist(), count)
    return places, random_keep_model.nearest(places, h, w)


@pytest.mark.parametrize("h, w", [(1, 1), (1, 7), (6, 1), (5, 5), (4, 9), (12, 8)])
def test_choice_and_copies(h, w):
    n = h * w
    for seed, count in itertools.product(range(4), sorted({1, (n + 1) // 2, n})):
        key = torch.tensor(mix(seed, h, w))
        at, slot = keep(key, h, w, count)
        places, copied = expected(key, h, w, count)
        assert at.tolist() == places
        assert at[slot].tolist() == copied


def test_each_token_is_as_likely():
    counts = torch.zeros(16)
    for seed in range(4000):
        counts[keep(torch.tensor(mix(seed)), 4, 4, 4)[0]] += 1
    assert ((counts / 4000 - 0.25).abs() < 0.03).all()  # 4 standard deviations


@pytest.mark.parametrize(
    "kind, levels, more",
    [
        ("sd", (0,), dict()),
        ("sd", (0, 1), dict(feed_forward=True, cross_attention=True, ratio=0.7)),
        ("sd", (1,), dict(attention=False, feed_forward=True, ratio=0.99)),
        ("sdxl", (0, 1), dict(ratio=0.3)),
        ("sd3", (0,), dict(feed_forward=True)),
        ("sd3-dual", (0,), dict(ratio=0.8)),
        ("pixart", (0,), dict(feed_forward=True, cross_attention=True)),
        ("dit", (0,), dict(feed_forward=True, ratio=0.25)),
    ],
    ids=str,
)
def test_loop_definition(kind, levels, more):
    """Three steps with guidance at 48 x 32 pixels; each step has its own subset, both halves the same."""
    pipe = PIPES[kind]().to(torch.float64)
    height, width = (32, 32) if kind == "dit" else (48, 32)  # DiT has one size
    size, steps = dict(height=height, width=width), 3
    other = copy.deepcopy(pipe)
    plain = run(pipe, steps=steps, **size)
    tokred.patch(pipe, method="random-keep", levels=levels, seed=3, **more)
    ours = run(pipe, steps=steps, **size)

    config = tokred.RandomKeepConfig(**more)
    joint = kind.startswith("sd3")
    names = ["attn", "attn2"] if joint and config.attention else ["attn1"] if config.attention else []
    names += ["attn2"] * (config.cross_attention and not joint) + ["ff"] * config.feed_forward
    shrink = {"sd": 2, "sdxl": 4}.get(kind, 4)  # pixels a token, at level 0
    originals, calls = {}, itertools.count()

    def each_call(module, args, kwargs):
        step = next(calls)
        for level in levels:
            h, w = height // shrink // 2**level, width // shrink // 2**level
            places, copied = expected(torch.tensor(mix(3, step, level)), h, w, h * w - int(h * w * config.ratio))
            for part in (getattr(b, n, None) for b in blocks_at(other, level) for n in names):
                if part is not None:
                    part.forward = originals.setdefault(part, part.forward)
                    random_keep_model.around(part, places, copied)

    tiny.denoiser(other).register_forward_pre_hook(each_call, with_kwargs=True)
    theirs = run(other, steps=steps, **size)
    assert originals and (theirs - plain).abs().max() > 1e-3
    near(ours, theirs, 1e-10)


def test_loop_definition_flux():
    """Rotary rows follow the kept tokens; a single block is run whole, and dropped tokens copy what it adds."""
    pipe = PIPES["flux"]().to(torch.float64)
    size, (h, w), text = dict(height=48, width=32), (12, 8), 7
    other = copy.deepcopy(pipe)
    plain = run(pipe, **size)
    tokred.patch(pipe, method="random-keep", ratio=0.7, seed=3)
    ours = run(pipe, **size)

    calls, model, now = itertools.count(), tiny.denoiser(other), {}

    def each_call(module, args, kwargs):
        key = torch.tensor(mix(3, next(calls) // 2, 0))  # two calls a step: with and without the prompt
        now["places"], now["copied"] = expected(key, h, w, h * w - int(h * w * 0.7))

    def reduced(forward, whole):
        def call(**kwargs):
            x, places = kwargs["hidden_states"], now["places"]
            rows = [*range(text), *(text + p for p in places)]
            kwargs["image_rotary_emb"] = tuple(table[rows] for table in kwargs["image_rotary_emb"])
            kwargs["hidden_states"] = x[:, places]
            out = forward(**kwargs)
            image = out[1] - x[:, places] if whole else out[0]
            full = torch.stack([image[:, places.index(q)] for q in now["copied"]], 1)
            return (out[0], x + full) if whole else (full, *out[1:])

        return call

    model.register_forward_pre_hook(each_call, with_kwargs=True)
    for block in model.transformer_blocks:
        block.attn.forward = reduced(block.attn.forward, whole=False)
    for block in model.single_transformer_blocks:
        block.forward = reduced(block.forward, whole=True)
    theirs = run(other, **size)
    assert (theirs - plain).abs().max() > 1e-3
    near(ours, theirs, 1e-10)


@pytest.mark.parametrize("kind", PIPES)
def test_one_subset_a_step_and_level(kind):
    """Drawn from (seed, step, level): the same for both passes, batched or apart; another at the next step."""
    pipe = tokred.patch(PIPES[kind](), method="random-keep", record="tokens")
    run(pipe, steps=3)
    maps = tokred.report(pipe).token_map[:, :, 0]
    assert ((maps == 0) | (maps == 4)).all() and (maps == 4).mean() == 0.5
    assert (maps[:, 0] == maps[:, 1]).all()
    assert (maps[0] != maps[1]).any() and (maps[1] != maps[2]).any()
    loop(pipe, ("uncond", "cond"), steps=3)
    assert (tokred.report(pipe).token_map[:, :, 0] == maps).all()
    one = run(tokred.patch(pipe, method="random-keep", seed=1))
    assert not torch.equal(one, run(tokred.patch(pipe, method="random-keep", seed=2)))
    assert same(run(tokred.patch(pipe, method="random-keep", seed=1)), one)


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_few_operations_a_block(kind):
    """Once the subset exists, a block needs 4 ATen calls more at most; to draw it takes 40 a step and level."""
    pipe = PIPES[kind]()
    with Operations() as dense:
        run(pipe, steps=1)
    tokred.patch(pipe, method="random-keep")
    with Operations() as reduced:
        run(pipe, steps=1)
    assert reduced.count - dense.count <= 40 + 4 * len(blocks_at(pipe, 0))


@pytest.mark.parametrize("ratio", [-0.1, 0.995, 1.0])
def test_ratios_that_it_cannot_do(ratio):
    with pytest.raises(tokred.ConfigError, match=rf"0\.99\].*{ratio:g}"):
        tokred.patch(tiny.sd(), method="random-keep", ratio=ratio)
    with pytest.raises(tokred.ConfigError, match=f"{ratio:g}"):
        tokred.patch(tiny.sd(), method="random-keep", policy=ratio)


def test_compiled(dynamo):
    pipe = tokred.patch(tiny.sd3(), method="random-keep", feed_forward=True)
    want = run(pipe, steps=3)
    tiny.denoiser(pipe).compile(fullgraph=True, backend="eager")
    near(run(pipe, steps=3), want, 1e-5)
    assert not dynamo["graph_break"] and dynamo["stats"]["unique_graphs"] == 1

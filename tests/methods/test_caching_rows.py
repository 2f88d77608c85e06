"""No masking in disguise: how many rows each linear layer of each block is handed, seen by hooks on the layers; and
FLOPs, which are torch's own count."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import FusedAttnProcessor2_0
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import diffusion_tokred as tokred
from diffusion_tokred.backbones.attention import CrossAttention
from diffusion_tokred.runtime.store import Memory
from diffusion_tokred.testing import families, tiny
from tests.contract.helpers import PIPES, same
from tests.methods.caches import CACHES, KINDS, PACKED, modes, options, patched

SIDES: dict[str, Any] = {"dit": {}}  # square pictures only
RATIO = 0.9


def size(kind):
    return SIDES.get(kind, dict(height=48, width=32))


def linears(pipe, **run):
    """For each denoiser call: path of a linear layer inside of the blocks -> rows of a sample that it was handed. (But
    for DiT's embeddings of the time: the first block's are the output's, too.)"""
    model, calls = tiny.denoiser(pipe), []
    model.register_forward_pre_hook(lambda module, args: calls.append({}))
    for name, layer in model.named_modules():
        if "transformer_blocks." in name and ".emb." not in name and isinstance(layer, torch.nn.Linear):
            layer.register_forward_pre_hook(
                lambda module, args, name=name: calls[-1].update({name: args[0][0].numel() // args[0].shape[-1]})
            )
    tiny.run(pipe, **run)
    return calls


@pytest.fixture(scope="module")
def dense():
    """kind -> tokens, and the rows of each layer in a dense step."""
    found = {}
    for kind in KINDS:
        (calls, *_) = linears(PIPES[kind](), steps=1, **size(kind))
        found[kind] = (64 if kind == "dit" else 96), calls
    return found


def kept(rows, n, m):
    """The same layer's rows with `m` of the `n` image tokens: text rows are as they were."""
    return {name: count - n + m if count >= n else count for name, count in rows.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PACKED)
def test_packed_rows(name, kind, dense):
    """At a step of ratio 0.9 every layer of every block gets ceil(0.1 N) image rows, and no layer is left out."""
    n, rows = dense[kind]
    pipe = patched(kind, name, ratio=RATIO, interval=3, warmup=2)
    calls = linears(pipe, steps=4, guidance=1.0, **size(kind))
    m = math.ceil((1 - RATIO) * n)
    assert modes(pipe) == ["full", "full", "reduce", "reuse" if name == "duca" else "reduce"]
    assert calls[0] == calls[1] == rows
    assert calls[2] == kept(rows, n, m)
    assert calls[3] == ({} if name == "duca" else calls[2])  # a reusing step: no layer of any block


def projections(pipe):
    """For each denoiser call, how often the prompt was projected to keys and values. Before a patch."""
    model, calls = tiny.denoiser(pipe), []
    model.register_forward_pre_hook(lambda module, args: calls.append(0))

    def seen(inner):
        def forward(*args):
            calls[-1] += 1
            return inner(*args)

        return forward

    for name, layer in model.named_modules():
        if name.endswith((".attn2.to_k", ".attn2.to_v")):
            layer.forward = seen(layer.forward)
    return calls


@pytest.mark.parametrize("build", [PIPES["pixart"], families.wan])
@pytest.mark.parametrize("name", PACKED)
def test_the_prompt_is_projected_at_full_steps(name, build, monkeypatch):
    """And to the same picture, bit by bit, as if it were projected at each; the next prompt is another."""
    again = build()
    monkeypatch.setattr(CrossAttention, "of_the_text", lambda self: {})
    tokred.patch(again, **options(name, interval=3, warmup=2))
    wanted = [tiny.run(again, steps=5, seed=seed, batch=2) for seed in (0, 1)]
    monkeypatch.undo()

    pipe = build()
    calls = projections(pipe)
    tokred.patch(pipe, **options(name, interval=3, warmup=2))
    found = [tiny.run(pipe, steps=5, seed=seed, batch=2) for seed in (0, 1)]
    assert all(same(a, b) for a, b in zip(found, wanted, strict=True)) and not same(*found)
    last = [step.mode for step in tokred.report(pipe).steps]
    assert calls[len(last) :] == [calls[0] if mode == "full" else 0 for mode in last] and calls[0] > 0
    tokred.unpatch(pipe)
    calls.clear()
    tiny.run(pipe, steps=2)
    assert 0 not in calls


def test_a_picture_that_changes_in_the_middle_of_a_run_begins_anew():
    """Wan's: its keys are kept, too. As a prompt that changes."""
    memory = Memory()
    text, picture = torch.ones(1, 3, 4), torch.ones(1, 2, 4)
    memory.words = (text, picture, None)
    assert memory.serves((text.clone(), picture.clone(), None)) and not memory.serves((text, picture + 1, None))
    assert not memory.serves((text + 1, picture, None)) and not memory.serves((text, torch.ones(1, 3, 4), None))
    memory.words = (text, None, None)
    assert memory.serves((text, None, None)) and not memory.serves((text, picture, None))
    memory.words = (text, picture, None)
    assert not memory.serves((text, None, None))


def test_projections_that_are_fused_after_the_patch():
    """Those are computed at each step, and counted."""
    pipe = patched("pixart", "toca", interval=3, warmup=2)
    tiny.run(pipe, steps=4)
    apart = tokred.report(pipe).steps[2]
    model, counters = tiny.denoiser(pipe), []
    for block in model.transformer_blocks:
        block.attn2.fuse_projections()
        block.attn2.set_processor(FusedAttnProcessor2_0())
    model.register_forward_pre_hook(lambda *_: counters.append(FlopCounterMode(display=False).__enter__()))
    model.register_forward_hook(lambda *_: counters[-1].__exit__(None, None, None))
    with sdpa_kernel(SDPBackend.MATH):
        tiny.run(pipe, steps=4)
    fused = tokred.report(pipe).steps[2]
    assert apart.mode == fused.mode == "reduce" and fused.flops > apart.flops
    assert fused.flops == counters[2].get_total_flops()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["fora-stack", "taylorseer"])
def test_nothing_runs_between_full_steps(name, kind, dense):
    pipe = patched(kind, name, interval=3)
    calls = linears(pipe, steps=4, guidance=1.0, **size(kind))
    assert calls == [dense[kind][1], {}, {}, dense[kind][1]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["fora", "taylorseer-modules", "toca-faithful", "cat-faithful"])
def test_rows_inside_of_blocks(name, kind, dense):
    """Modulation is computed anew, and SD3's and FLUX's own feed-forward of the text, which is no site."""
    n, rows = dense[kind]
    pipe = patched(kind, name, interval=3, warmup=2, **({"ratio": RATIO} if name[-8:] == "faithful" else {}))
    calls = linears(pipe, steps=3, guidance=1.0, **size(kind))
    assert calls[:2] == [rows, rows]
    beside = {path: count for path, count in rows.items() if ".norm" in path or ".ff_context." in path}
    single = {path: count for path, count in rows.items() if path.startswith("single")}
    feed = {path: count for path, count in rows.items() if ".ff." in path or (kind == "pixart" and ".attn2." in path)}
    if name == "cat-faithful":
        want = kept(rows, n, math.ceil((1 - RATIO) * n))
    else:  # the paper's count is int(R N); reused whole, FLUX's single blocks do not run
        some = kept(feed | single, n, int((1 - RATIO) * n)) if name == "toca-faithful" else {}
        want = {path: count for path, count in beside.items() if path not in single} | some
    assert calls[2] == want


CELLS = [(name, kind) for name in CACHES for kind in KINDS[1:]]


@pytest.mark.parametrize("name, kind", [*CELLS, ("fora", "sd"), ("toca-faithful", "sd"), ("cat-faithful", "sd")])
def test_flops_are_torch_s(name, kind):
    """Of each step of a run, whatever its mode; and the dry run has the same."""
    run = dict(steps=5, batch=2, **size(kind))
    pipe = tokred.patch(PIPES[kind](), **options(name, interval=3, warmup=2))
    model, counters = tiny.denoiser(pipe), []

    def begin(module, args):
        counters.append(FlopCounterMode(display=False).__enter__())

    def end(module, args, output):
        counters[-1].__exit__(None, None, None)

    model.register_forward_pre_hook(begin)
    model.register_forward_hook(end)
    with sdpa_kernel(SDPBackend.MATH):
        tiny.run(pipe, **run)
    steps = tokred.report(pipe).steps
    assert [s.flops for s in steps] == [counter.get_total_flops() for counter in counters]
    assert {"full"} < {s.mode for s in steps}

    tokred.unpatch(pipe)
    told = tokred.explain(
        pipe, **options(name, interval=3, warmup=2), **size(kind), num_inference_steps=5, batch_size=2,
        text_tokens=0 if kind == "dit" else 7, guidance=True,
    )  # fmt: skip
    passes = [[s for s in steps if s.index == index] for index in range(5)]
    assert [(s.mode, s.ratio) for s in told.steps] == [(step[0].mode, step[0].ratio) for step in passes]
    assert [s.flops for s in told.steps] == [sum(s.flops for s in step) for step in passes]

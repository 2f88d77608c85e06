"""What the caching methods keep: as much as they say, no more than is allowed, and nothing after a run."""

from __future__ import annotations

import gc
import re

import pytest
import torch

import diffusion_tokred as tokred
from diffusion_tokred.testing import tiny
from tests.contract.helpers import PIPES, run, same
from tests.methods.caches import CACHES, KINDS, driver, options, patched

LONGER = dict(warmup=2, interval=3)  # at the third step, which is not full, all is there


def kept(pipe, **more):
    """Bytes of all passes' slots after the third step of a run."""
    found, known = [], driver(pipe)
    handle = tiny.denoiser(pipe).register_forward_hook(
        lambda *args: found.append((known.info.index, sum(memory.nbytes for memory in known._memories.values())))
    )
    run(pipe, steps=3, batch=2, **more)
    handle.remove()
    return found[-1][1]


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("name", CACHES)
def test_bytes_are_those_that_are_told(name, kind):
    """`explain` says them, `stored` adds up to them, and the run keeps them: all storages of all slots."""
    told = tokred.explain(
        PIPES[kind](), **options(name, **LONGER), num_inference_steps=3, batch_size=2, guidance=True,
        text_tokens=0 if kind == "dit" else 7, height=32, width=32,
    ).cache_bytes  # fmt: skip
    pipe = patched(kind, name, **LONGER, cache_budget=told)
    assert kept(pipe) == told > 0
    assert kept(pipe, guidance=1.0) == told // 2
    tokred.patch(pipe, **options(name, **LONGER), cache_budget=told - 1)
    with pytest.raises(tokred.ConfigError, match=f"{name.split('-')[0]} would keep {told:,} bytes .*{told - 1:,}"):
        run(pipe, steps=3, batch=2)


@pytest.mark.parametrize("name", ["fora", "toca", "cat-faithful"])
def test_refused_before_anything_is_kept(name):
    pipe, calls = patched("sd3", name, cache_budget="1kB"), []
    pipe.transformer.transformer_blocks[0].register_forward_hook(lambda *args: calls.append(args))
    with pytest.raises(tokred.ConfigError, match="cache_budget=1,000"):
        run(pipe)
    assert calls == [] and driver(pipe)._memories == {}
    assert same(run(tokred.unpatch(pipe)), run(PIPES["sd3"]()))


def test_budget_is_of_one_run_at_a_time():
    """Guidance switched off half way: what was kept for both halves makes room."""
    pipe = patched("sd3", "toca", interval=3)
    most = kept(pipe)
    tokred.patch(pipe, **options("toca", interval=3), cache_budget=most)
    run(pipe, steps=6, batch=2, **switch_off(at=2))
    assert {s.mode for s in tokred.report(pipe).steps[3:]} == {"full", "reduce"}


def switch_off(at):
    """Keywords of an SD3 run that ends guidance after a step."""

    def end(pipe, index, t, kwargs):
        if index == at:
            pipe._guidance_scale = 1.0
            return {key: value[len(value) // 2 :] for key, value in kwargs.items()}
        return kwargs

    names = ["prompt_embeds", "pooled_prompt_embeds"]
    return dict(callback_on_step_end=end, callback_on_step_end_tensor_inputs=names)


BUDGETS = {"2GB": 2e9, "500MiB": 500 * 2**20, "1.5 gb": 1.5e9, " 64 k": 64e3, "10": 10, 0: 0, 7: 7, None: None}


@pytest.mark.parametrize("budget, most", BUDGETS.items())
def test_budgets(budget, most):
    assert driver(patched("sd3", "fora", cache_budget=budget)).budget == most


@pytest.mark.parametrize("budget", ["", "much", "2 GB!", "-1", -1, True, "1e9", "GB", float("nan")])
def test_no_budgets(budget):
    with pytest.raises(tokred.ConfigError, match="cache_budget is .*2GB.*" + re.escape(repr(budget))):
        patched("sd3", "fora", cache_budget=budget)


def held(known):
    """What a driver keeps of a run."""
    memories = [*known._memories.values(), *(level.memory for level in known.levels)]
    calls = [call for site in known.sites if (call := getattr(site, "call", None)) is not None]
    return [slot for memory in memories for slot in memory.slots] + [v for m in memories for v in m.notes] + calls


@pytest.mark.parametrize("name", CACHES)
def test_nothing_is_kept_after_a_run(name):
    pipe = patched("flux", name, interval=3)
    known, during = driver(pipe), []
    tiny.denoiser(pipe).register_forward_hook(lambda *args: during.append(len(held(known))))
    run(pipe, steps=3)
    assert all(during) and held(known) == []

    def fail(module, args):
        if known.info.index == 1:  # not a full one
            raise RuntimeError("block")

    handle = pipe.transformer.single_transformer_blocks[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="block"):
        run(pipe, steps=3)
    handle.remove()
    assert known._memories == {}
    once = run(pipe, steps=3)
    assert held(known) == [] and same(once, run(patched("flux", name, interval=3), steps=3))


def tensors():
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("name", ["fora", "toca"])
def test_an_interrupt_from_the_keyboard_frees_at_once(name):
    """It passes no hook of torch's; pipelines that name their passes tell us all the same."""
    pipe = patched("flux", name)
    known, during = driver(pipe), []

    def fail(module, args):
        during.append(len(held(known)))
        if known.info.index == 1:
            raise KeyboardInterrupt

    handle = pipe.transformer.single_transformer_blocks[-1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        run(pipe, steps=3)
    assert during[-1] and held(known) == [] and not any(level.running for level in known.levels)
    handle.remove()
    assert same(run(pipe, steps=3), run(patched("flux", name), steps=3))


@pytest.mark.parametrize("name", ["taylorseer-modules", "toca", "cat-faithful"])
def test_twenty_runs_do_not_grow(name):
    pipe, counts = patched("sd3", name), []
    for sizes in [dict(height=48, width=32), dict(batch=2), dict(guidance=1.0), {}] * 5:
        run(pipe, **sizes)
        if not sizes and len(counts) < 2:
            counts.append(tensors())
    assert counts[1] == tensors()


@pytest.mark.parametrize("name", CACHES)
def test_what_was_returned_is_not_written_into(name):
    """Somebody may have kept what a module returned: later steps leave it as it was."""
    pipe, found = patched("sd3", name, interval=3), []

    def keep(module, args, out):
        found.extend((part, part.clone()) for part in (out if isinstance(out, tuple) else (out,)) if part is not None)

    for name, module in pipe.transformer.named_modules():
        if name.endswith(("attn", ".ff")) or re.search(r"blocks\.\d+$", name):
            module.register_forward_hook(keep)
    run(pipe, steps=4)
    assert len(found) >= 40 and all(torch.equal(now, then) for now, then in found)

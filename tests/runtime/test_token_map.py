"""`record="tokens"`: at each step of every method on every family, as many tokens of each state as by definition."""

import itertools

import numpy as np
import pytest
import torch

import diffusion_tokred as tokred
from diffusion_tokred.runtime.stats import TOKEN_STATES
from diffusion_tokred.testing import families, tiny
from tests.contract.helpers import PIPES, loop, run, same
from tests.methods.caches import options

FAMILIES = PIPES | families.BUILDERS
SIZES = dict(dit={}, sana=dict(height=64, width=32))
OTHER = dict(height=48, width=32)
METHODS = {
    "tome": dict(method="tome", ratio=0.5, levels=(0,)),
    "todo": dict(method="todo"),
    "todo-area": dict(method="todo", mode="area"),
    "random-keep": dict(method="random-keep", ratio=0.75),
    "deepcache": dict(method="deepcache", warmup=1, interval=2, min_steps=0),
    "firstblock": dict(method="firstblock", threshold=100.0, warmup=1, interval=2, min_steps=0),
}
METHODS |= {name: options(name) for name in ("fora", "fora-stack", "taylorseer", "taylorseer-modules")}
METHODS |= {name: options(name, ratio=0.75) for name in ("toca", "toca-faithful", "ras", "cat", "cat-faithful")}
METHODS["clusca"] = options("clusca", clusters=4)
METHODS["duca"] = options("duca", ratio=0.75, interval=3)
FAST = {("sd3", name) for name in METHODS} | set(
    zip(FAMILIES, ("deepcache", "tome", "fora", "toca-faithful", "ras", "cat-faithful", "duca", "tome", "taylorseer",
                   "todo", "toca", "random-keep", "taylorseer-modules", "firstblock", "cat"), strict=False)
)  # fmt: skip
FAST |= {("sd", "toca-faithful"), ("sd", "cat-faithful")}
CELLS = [
    pytest.param(kind, name, marks=() if (kind, name) in FAST else pytest.mark.slow)
    for kind, name in itertools.product(FAMILIES, METHODS)
]


def wanted(name, grid, index):
    """State -> how many of a level's tokens have it at a step."""
    n = grid[0] * grid[1]
    few = n - int(0.75 * n)
    if name == "tome":
        return {0: n - n // 2, 1: n // 2}
    if name == "todo":
        kept = (grid[0] // 2) * (grid[1] // 2)
        return {0: kept, 4: n - kept}
    if name == "todo-area":
        return {1: n}
    if name == "random-keep":
        return {0: few, 4: n - few}
    warmup = 2 if name.startswith("cat") else 1
    full = index < warmup or (index - warmup + 1) % (3 if name == "duca" else 2) == 0
    if full:
        return {0: n}
    if name in ("fora", "fora-stack", "deepcache", "firstblock") or (name == "duca" and index % 3 == 2):
        return {2: n}
    if name.startswith("taylorseer"):
        return {3: n}
    few = n // 4 if name == "toca-faithful" else few  # the paper rounds down what is computed
    few = min(4, n) if name == "clusca" else few  # a token of each cluster
    return {0: few, (3 if name in ("toca", "clusca") else 2): n - few}


@pytest.mark.parametrize("kind, name", CELLS)
def test_as_many_of_each_state(kind, name):
    try:
        pipe = tokred.patch(FAMILIES[kind](), **METHODS[name], record="tokens")
    except tokred.UnsupportedError as error:
        pytest.skip(str(error))
    run(pipe, steps=4, batch=2, **SIZES.get(kind, OTHER))
    report, driver = tokred.report(pipe), tiny.denoiser(pipe)._tokred
    found = report.token_map
    passes = 1 if kind == "flux2" else 2  # guidance is embedded there
    levels = [level for level in driver.levels]
    assert found.dtype == np.uint8 and found.shape == (4, passes, len(levels), *levels[0].grid)
    assert found.shape[3] != found.shape[4] or kind == "dit"
    for index, level in itertools.product(range(4), range(len(levels))):
        scale = (levels[0].grid[0] * levels[0].grid[1]) // (levels[level].grid[0] * levels[level].grid[1])
        want = {state: scale * count for state, count in wanted(name, levels[level].grid, index).items() if count}
        for states in found[index, :, level]:
            values, counts = np.unique(states, return_counts=True)
            there = dict(zip(values.tolist(), counts.tolist(), strict=True))
            if name == "clusca" and 0 < there.get(0, 0) < 4 * scale:  # k-means may leave a cluster empty
                there = {0: 4 * scale, 3: there[3] + there[0] - 4 * scale}
            assert there == want, (index, level)


@pytest.mark.parametrize("name", ["tome", "toca", "random-keep"])
def test_passes_of_their_own(name):
    """One after the other: a map for each, by the pass's own name; without guidance there is one."""
    pipe = tokred.patch(tiny.sd3(), **METHODS[name], record="tokens")
    with tokred.steps(pipe):
        loop(pipe, order=("uncond", "cond"))
    found = tokred.report(pipe).token_map
    assert found.shape == (4, 2, 1, 8, 8) and (found[1] != 0).any((1, 2, 3)).all()
    run(pipe, steps=4, guidance=1.0)
    assert tokred.report(pipe).token_map.shape == (4, 1, 1, 8, 8)


@pytest.mark.parametrize("name", ["tome", "toca-faithful", "fora"])
def test_recording_changes_nothing_and_costs_nothing_when_off(name, monkeypatch):
    pipe = tokred.patch(tiny.sd3(), **METHODS[name], record="tokens")
    recorded = run(pipe, steps=4)
    tokred.patch(pipe, **METHODS[name])
    made = []
    monkeypatch.setattr(torch, "where", lambda *a, real=torch.where, **k: (made.append(a), real(*a, **k))[1])
    assert same(run(pipe, steps=4), recorded)
    assert tokred.report(pipe).token_map is None and all(
        t.dtype != torch.uint8 for args in made for t in args if isinstance(t, torch.Tensor)
    )
    assert all(level.status is None for level in pipe.transformer._tokred.levels)


def test_processors_that_reuse_attention_whole():
    """SD3 has no cross-attention: all that the processors of ToCa do there is to reuse."""
    pipe = tiny.sd3()
    config = tokred.ToCaConfig(**{k: v for k, v in METHODS["toca-faithful"].items() if k != "method"})
    model = pipe.transformer
    model.set_attn_processor(tokred.TokenCacheAttnProcessor.around(model, config))
    with tokred.steps(pipe, record="tokens"):
        run(pipe, steps=3)
    found = tokred.report(pipe).token_map
    assert [set(step.flatten().tolist()) for step in found] == [{0}, {TOKEN_STATES.index("reused")}, {0}]


def test_as_plain_data():
    pipe = tokred.patch(tiny.sd3(), method="tome", record="tokens")
    run(pipe)
    found = tokred.report(pipe)
    assert np.array_equal(np.array(found.to_dict()["token_map"], dtype=np.uint8), found.token_map)

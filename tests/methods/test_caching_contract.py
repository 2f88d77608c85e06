"""The contract of the caching methods, and that they compile: `fullgraph=True`, no breaks, few graphs."""

from __future__ import annotations

import pytest

import diffusion_tokred as tokred
from diffusion_tokred import testing
from diffusion_tokred.testing import tiny
from tests.contract.helpers import PIPES, near, run
from tests.methods.caches import CACHES, KINDS, config, options

CHECKS = [name for name in testing.CHECKS if name not in testing.SLOW]
# In these a method has little to say: for one of each base class.
COMMON = ("unpatched", "deepcopy", "saved", "two", "errors", "generators")
BASES = ("fora", "toca", "cat-faithful")
CELLS = [(name, kind) for name in CACHES for kind in KINDS]
SLOW = pytest.mark.slow


@pytest.mark.parametrize("name, kind", CELLS)
def test_contract(name, kind):
    """Each check of each method on one of the pipelines, in turns."""
    turn = [*CACHES].index(name) + KINDS.index(kind)
    checks = [c for i, c in enumerate(CHECKS) if (i + turn) % len(KINDS) == 0 and (c not in COMMON or name in BASES)]
    testing.assert_contract(testing.check_method(config(name), {kind: PIPES[kind]}, checks))


@SLOW
@pytest.mark.parametrize("name, kind", [*CELLS, *((name, "sd") for name in ("fora", "toca-faithful", "cat-faithful"))])
def test_whole_contract(name, kind):
    testing.assert_contract(testing.check_method(config(name), {kind: PIPES[kind]}))


def shallow(kind):
    """A pipeline with as few blocks as there are kinds of them."""
    pipe = PIPES[kind]()
    few = dict(num_layers=1, num_single_layers=1) if kind == "flux" else dict(num_layers=2)
    pipe.transformer = type(pipe.transformer)(**pipe.transformer.config | few).eval()
    return pipe


QUICK = {("sd3", "duca"), ("flux", "toca")}


@pytest.mark.parametrize(
    "kind, name",
    [
        pytest.param(kind, name, marks=() if (kind, name) in QUICK else SLOW)
        for kind in ("sd3", "flux") for name in CACHES
    ],
)  # fmt: skip
def test_compiled(kind, name, dynamo):
    """At most four graphs: the first full step, full, reduced and reused ones. A second run, on other tokens, adds
    none."""
    pipe = tokred.patch(shallow(kind), **options(name, warmup=2, interval=3))
    want = [run(pipe, steps=6, seed=seed) for seed in range(2)]
    tiny.denoiser(pipe).compile(fullgraph=True, backend="eager")
    near(run(pipe, steps=6), want[0], 1e-5)
    graphs = dynamo["stats"]["unique_graphs"]
    assert 2 <= graphs <= 4 and not dynamo["graph_break"]
    near(run(pipe, steps=6, seed=1), want[1], 1e-5)
    assert dynamo["stats"]["unique_graphs"] == graphs and not dynamo["graph_break"]

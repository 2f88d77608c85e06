"""Contract 7: `torch.compile(fullgraph=True)`, in both orders, whole models and blocks, graphs and breaks counted."""

import pytest
import torch

import diffusion_tokred as tokred
from diffusion_tokred.testing import tiny
from tests.contract.helpers import PIPES, dense, near, patch, reduced, run, same

TWO_RATIOS = dict(sd=[(1.0, 0.5), (0.6, 0.0)], sd3=[(1.0, 0.5), (0.8, 0.0)])


def whole(pipe):
    tiny.denoiser(pipe).compile(fullgraph=True, backend="eager")


def wrapper(pipe):
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    setattr(pipe, name, torch.compile(tiny.denoiser(pipe), fullgraph=True, backend="eager"))


def blocks(pipe):
    tiny.denoiser(pipe).compile_repeated_blocks(fullgraph=True, backend="eager")


HOW = dict(whole=whole, wrapper=wrapper, blocks=blocks)
SLOW = pytest.mark.slow
CASES = [
    ("sd3", "tome", "whole", "patch first"),
    ("sd3", "todo", "whole", "compile first"),
    ("sd", "tome-all", "blocks", "compile first"),
    ("flux", "tome", "whole", "patch first"),
    ("flux", "todo", "blocks", "compile first"),
    ("pixart", "tome-reuse", "whole", "compile first"),
    pytest.param("sd3-dual", "tome-reuse", "wrapper", "patch first", marks=SLOW),
    pytest.param("sd3-dual", "todo-area", "wrapper", "compile first", marks=SLOW),
    pytest.param("sd3", "todo", "whole", "patch first", marks=SLOW),
    pytest.param("sd", "tome", "whole", "patch first", marks=SLOW),
    pytest.param("sd", "tome-reuse", "whole", "compile first", marks=SLOW),
    pytest.param("sd", "tome-share", "wrapper", "compile first", marks=SLOW),
    pytest.param("sd", "todo", "wrapper", "patch first", marks=SLOW),
    pytest.param("sd", "todo-area", "blocks", "patch first", marks=SLOW),
    pytest.param("sdxl", "tome-reuse", "blocks", "patch first", marks=SLOW),
    pytest.param("sdxl", "tome-all", "whole", "patch first", marks=SLOW),
    pytest.param("flux", "tome-reuse", "wrapper", "compile first", marks=SLOW),
    pytest.param("flux", "todo", "whole", "patch first", marks=SLOW),
    pytest.param("flux", "tome-all", "blocks", "patch first", marks=SLOW),
    pytest.param("pixart", "todo-area", "whole", "patch first", marks=SLOW),
    pytest.param("dit", "tome-all", "wrapper", "patch first", marks=SLOW),
    pytest.param("dit", "todo", "whole", "compile first", marks=SLOW),
]


def graphs(counters):
    assert not counters["graph_break"], dict(counters["graph_break"])
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("kind, config, how, order", CASES)
def test_compiled_is_eager(kind, config, how, order, dynamo):
    pipe = PIPES[kind]()
    steps = [lambda: patch(pipe, kind, config), lambda: HOW[how](pipe)]
    for step in steps if order == "patch first" else steps[::-1]:
        step()
    near(run(pipe, steps=3), reduced(kind, config, steps=3), 1e-5)
    first = graphs(dynamo)
    assert first >= 1
    near(run(pipe, steps=3, seed=1), reduced(kind, config, steps=3, seed=1), 1e-5)
    assert graphs(dynamo) == first  # the second run is all cached
    if how != "blocks":
        # One graph; two where a matching is made in some steps and kept in others.
        assert first <= (2 if config in ("tome-reuse",) else 1)
    tokred.unpatch(pipe)
    near(run(pipe, steps=3), dense(kind, steps=3), 1e-5)
    graphs(dynamo)


@pytest.mark.parametrize("how", ["whole", pytest.param("wrapper", marks=SLOW)])
@pytest.mark.parametrize("kind", ["sd3", pytest.param("sd", marks=SLOW)])
def test_two_ratios(kind, how, dynamo):
    pipe = tokred.patch(PIPES[kind](), method="tome", policy=TWO_RATIOS[kind])
    want = run(pipe, steps=4)
    ratios = [s.ratio for s in tokred.report(pipe).steps]
    assert 0 in ratios and 0.5 in ratios
    HOW[how](pipe)
    near(run(pipe, steps=4), want, 1e-5)
    first = graphs(dynamo)
    assert first <= 3
    near(run(pipe, steps=4), want, 1e-5)
    assert graphs(dynamo) == first


def test_unpatched_and_compiled_is_untouched(dynamo):
    """patch, compile, unpatch: the compiled model is the dense one again, bit by bit."""
    pipe = tiny.sd3()
    whole(pipe)
    compiled = run(pipe)
    patch(pipe, "sd3", "tome")
    assert not torch.equal(run(pipe), compiled)
    tokred.unpatch(pipe)
    assert same(run(pipe), compiled)


@pytest.mark.parametrize("config", ["todo", pytest.param("tome-all", marks=SLOW)])
def test_one_graph_for_all_blocks(config, dynamo):
    """`compile_repeated_blocks` on a deep model: graphs are counted by kinds of block, not by blocks."""
    torch.manual_seed(0)
    pipe = tiny.flux()
    deep = type(pipe.transformer)(**pipe.transformer.config | dict(num_layers=12, num_single_layers=12)).eval()
    pipe.transformer = deep
    patch(pipe, "flux", config)
    want = run(pipe, steps=2)
    deep.compile_repeated_blocks(fullgraph=True, backend="eager")
    near(run(pipe, steps=2), want, 1e-5)
    assert graphs(dynamo) <= 6  # double and single blocks; the first of each run makes what the others share


@SLOW
@pytest.mark.parametrize("kind, config", [("sd", "tome-all"), ("sd3", "todo"), ("flux", "tome"), ("pixart", "todo")])
def test_inductor(kind, config, dynamo):
    pipe = patch(PIPES[kind](), kind, config)
    tiny.denoiser(pipe).compile(fullgraph=True)
    near(run(pipe), reduced(kind, config), 1e-3)
    graphs(dynamo)


def test_patched_again_compiles_nothing(dynamo):
    """An app that goes to and fro between patched and unpatched, on a compiled model."""
    pipe = tiny.sd3()
    whole(pipe)
    counts = []
    for _ in range(3):
        patch(pipe, "sd3", "todo")
        near(run(pipe), reduced("sd3", "todo"), 1e-5)
        tokred.unpatch(pipe)
        near(run(pipe), dense("sd3"), 1e-5)
        counts.append(graphs(dynamo))
    assert counts[0] == counts[-1]

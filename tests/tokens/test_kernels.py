"""Kernels as operators on the CPU, and through Triton's interpreter (`interpreted.py`)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_tokred.tokens import kernels
from diffusion_tokred.tokens.kernels import matching, operators, rows, selection

OPS = torch.ops.tokred
AT = [torch.tensor([4, 0, 7]), torch.tensor([[4, 0, 7], [1, 8, 2]])]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def arguments(at: torch.Tensor) -> dict[str, tuple]:
    x, new, pair = randn(2, 9, 5), randn(2, 3, 5, seed=1), randn(2, 2, 5, seed=2)
    dst, src = torch.tensor([1, 5]), torch.tensor([0, 2, 3, 4, 6, 7, 8])
    return {
        "take": (x, at),
        "modulate": (x, at, pair[0], pair[1], 1e-6),
        "put": (x, at, new),
        "add": (x, at, new, pair[0]),
        "best": (x, dst, src, x.norm(dim=-1, keepdim=True)),
        "top": (x[..., 0], 4),
    }


@pytest.mark.parametrize("name", ["take", "modulate", "put", "add", "best", "top"])
def test_operators_are_whole(name: str) -> None:
    """Schema, fake version, and what autograd and AOT make of it."""
    for at in AT:
        torch.library.opcheck(getattr(OPS, name).default, arguments(at)[name])


@pytest.mark.parametrize("at", AT, ids=["shared", "each"])
def test_operators_are_the_plain_versions_on_the_cpu(at: torch.Tensor) -> None:
    plain = {"take": rows.take, "modulate": rows.modulate, "put": rows.put, "add": rows.add, "best": matching.best,
             "top": selection.top}  # fmt: skip
    for name, function in plain.items():
        mine, other = arguments(at)[name], arguments(at)[name]
        found, expected = getattr(OPS, name)(*mine), function(*other)
        for a, b in zip(pytree.tree_leaves((mine, found)), pytree.tree_leaves((other, expected)), strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_one_graph(dynamo: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the operators in it, as on a GPU: all that dispatches does so while it is traced."""

    def step(x: torch.Tensor, stored: torch.Tensor, scores: torch.Tensor, pair: torch.Tensor) -> tuple:
        at = kernels.largest(scores, 3)
        y = kernels.norm_rows(x, at, pair[0], pair[1])
        kernels.scatter_rows(stored, at, y)
        kernels.add_rows(x, at, kernels.rows_at(stored, at), pair[1])
        return x, stored, *kernels.nearest(x, at[0], at[1])

    def inputs() -> tuple:
        return randn(2, 9, 5), randn(2, 9, 5, seed=1), randn(2, 9, seed=2), randn(2, 2, 5, seed=3)

    expected = step(*inputs())
    for module in (rows, matching, selection):
        monkeypatch.setattr(module, "on", lambda x: True)
    nodes = []

    class Backend(CompileCounter):
        def __call__(self, graph, example):
            nodes.extend(str(node.target) for node in graph.graph.nodes)
            return super().__call__(graph, example)

    compiled = torch.compile(step, fullgraph=True, backend=(counter := Backend()))
    for _ in range(2):
        assert all(map(torch.equal, compiled(*inputs()), expected))
    assert counter.frame_count == 1
    assert sum("tokred" in node for node in nodes) == 6


def test_the_cpu_takes_the_plain_version() -> None:
    assert not kernels.on(torch.zeros(1))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        kernels.rows_at(randn(1, 3, 2), torch.tensor([1]))
    assert not [event.name for event in profile.events() if "tokred" in event.name]


@needs_triton
def test_the_switch() -> None:
    code = "from diffusion_tokred.tokens.kernels import operators; print(operators._WANTED)"
    env = os.environ | {"TOKRED_KERNELS": "0"}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert operators._WANTED and out.stdout.strip() == "False"


@needs_triton
def test_through_the_interpreter() -> None:
    file = Path(__file__).with_name("interpreted.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=file.parents[2],
    )  # fmt: skip
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-6000:]


@needs_triton
def test_the_script() -> None:
    script = Path(__file__).parents[2] / "scripts" / "check_kernels.py"
    run = subprocess.run(
        [sys.executable, str(script), "--device", "cpu", "--tokens", "35", "--width", "9"],
        capture_output=True, text=True, env=os.environ | {"COLUMNS": "160"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [line for line in run.stdout.splitlines() if "float" in line]
    assert len(lines) == 18 and all("yes" in line for line in lines)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_kernels_compile_for_gpus(dtype: str, capability: int) -> None:
    """Down to machine code, which needs no GPU: the interpreter accepts what the compiler may refuse."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from diffusion_tokred.tokens.kernels import matching_triton, rows_triton, selection_triton

    def build(kernel: Any, warps: int, **constants: Any) -> None:
        kinds = {"at": "*i64", "dst": "*i64", "src": "*i64", "places": "*i64", "values": "*fp32", "eps": "fp32"}
        kinds |= dict.fromkeys(("x", "y", "stored", "rows", "shift", "gate", "scores"), f"*{dtype}")
        kinds["out"] = "*i64" if kernel is selection_triton._top else f"*{dtype}"
        kinds["scale"] = "*fp32" if kernel is matching_triton._best else f"*{dtype}"
        signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
        source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()})
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        assert built.asm["cubin"] and built.metadata.shared < 48 * 1024

    for scaled in (True, False):
        columns = 32 if dtype == "fp32" else 64
        build(matching_triton._best, 4, HAS_SCALE=scaled, WIDEN=False, SOURCES=64, TARGETS=64, COLUMNS=columns)
    build(selection_triton._top, 16, SIZE=16384)
    for kernel in (rows_triton._take, rows_triton._put, rows_triton._add):
        build(kernel, 4, ROWS=1, COLUMNS=2048)
        build(kernel, 4, ROWS=64, COLUMNS=1)
    build(rows_triton._modulate, 8, ROWS=1, COLUMNS=4096)


@needs_triton
def test_cuda_tensors_take_the_kernels() -> None:
    """On fake tensors, which need no GPU: what is dispatched, and what the fake versions say comes out."""
    seen: list[str] = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "tokred":
                seen.append(func._opname)
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Log():
        x = torch.empty(2, 64, 32, dtype=torch.bfloat16, device="cuda")
        gate, dst = x.new_empty(2, 32), torch.empty(16, dtype=torch.int64, device="cuda")
        values, places = kernels.nearest(x, dst, dst.new_empty(48), torch.empty(2, 64, 1, device="cuda"))
        assert (values.shape, values.dtype) == ((2, 48), torch.float32)
        assert (places.shape, places.dtype) == ((2, 48), torch.int64)
        at = kernels.largest(x.new_empty(2, 64), 9)
        assert (at.shape, at.dtype, at.device.type) == ((2, 9), torch.int64, "cuda")
        for rows_ in (kernels.rows_at(x, at), kernels.norm_rows(x, at, gate, gate)):
            assert (rows_.shape, rows_.dtype) == ((2, 9, 32), torch.bfloat16)
        assert kernels.scatter_rows(x, at, rows_) is x and kernels.add_rows(x, at, rows_, gate) is x
        assert seen == ["best", "top", "take", "modulate", "put", "add"]
        kernels.largest(torch.empty(1, 16, dtype=torch.float64, device="cuda"), 3)  # what a kernel does not do
        kernels.nearest(x.double(), dst, dst)
        assert len(seen) == 6

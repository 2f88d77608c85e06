"""The caching methods on the tiny transformers: what their tests share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

import diffusion_tokred as tokred
from diffusion_tokred.methods import make_config
from diffusion_tokred.testing import tiny
from tests.contract.helpers import PIPES

KINDS = ("sd3", "sd3-dual", "pixart", "dit", "flux")
SHORT = dict(warmup=1, interval=2, min_steps=0)  # the second step is the first that is not full
CACHES: dict[str, dict[str, Any]] = {
    "fora": dict(method="fora", what="modules"),
    "fora-stack": dict(method="fora", what="stack"),
    "taylorseer": dict(method="taylorseer", what="stack"),
    "taylorseer-modules": dict(method="taylorseer", what="modules"),
    "clusca": dict(method="clusca"),
    "toca": dict(method="toca", mode="packed"),
    "toca-faithful": dict(method="toca", mode="faithful", schedule="default"),
    "duca": dict(method="duca", mode="packed"),
    "ras": dict(method="ras"),
    "cat": dict(method="cat", mode="packed", warmup=2),
    "cat-faithful": dict(method="cat", mode="faithful", warmup=2),
}
PACKED = ("toca", "duca", "ras", "cat")


def options(name: str, **more: Any) -> dict[str, Any]:
    """Keywords of `patch`."""
    return SHORT | CACHES[name] | more


def config(name: str, **more: Any) -> Any:
    return make_config(**options(name, **more))


def patched(kind: str, name: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """A fresh tiny pipeline, patched."""
    return tokred.patch(cast(PIPES[kind](), dtype), **options(name, **more))


def cast(pipe: Any, dtype: torch.dtype) -> Any:
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, dtype)
    return pipe


def driver(pipe: Any) -> Any:
    return tiny.denoiser(pipe)._tokred


def all_rows(pipe: Any) -> Any:
    """Force the machinery on, with nothing left out."""
    driver(pipe).policy = type("All", (), {"is_dense": False, "at": lambda *args: ("reduce", 0.0)})()
    return pipe


def modes(pipe: Any) -> list[str]:
    """Of the last run's denoiser calls; of each step's first pass only."""
    steps = tokred.report(pipe).steps
    return [s.mode for s in steps if s.pass_key == steps[0].pass_key]


@contextlib.contextmanager
def hooks(handles: list[Any]) -> Iterator[None]:
    """Hooks for the length of a block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

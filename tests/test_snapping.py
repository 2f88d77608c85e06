"""Counts of tokens are snapped to `align` in large pictures, and the ratio that is left is the one shown."""

from __future__ import annotations

from typing import Any

import pytest

import diffusion_tokred as tokred
from diffusion_tokred import ConfigError
from diffusion_tokred.testing import tiny

SIDE = 128  # pixels: 32 x 32 tokens in the tiny SD3, the least that are snapped


@pytest.mark.parametrize(
    "method, options, ratio, count",
    [
        ("toca", dict(interval=2, warmup=1, min_steps=0), 0.6, 384),  # 410, down to a multiple of 128
        ("toca", dict(interval=2, warmup=1, min_steps=0, align=50), 0.6, 400),
        ("toca", dict(interval=2, warmup=1, min_steps=0), 0.95, 128),  # 52: never to none
        ("tome", dict(align=128), 0.6, 384),
        ("tome", dict(align=100), 0.75, 300),  # 256 are destinations, which stay: up
        ("tome", {}, 0.6, 410),
        ("cat", dict(mode="faithful", warmup=2, min_steps=0), 0.6, 410),  # as published
    ],
    ids=str,
)
def test_explained_and_run(method: str, options: dict[str, Any], ratio: float, count: int) -> None:
    pipe = tiny.sd3()
    size = dict(height=SIDE, width=SIDE)
    found = tokred.explain(pipe, method=method, ratio=ratio, **options, **size, num_inference_steps=4, text_tokens=7)
    with tokred.patched(pipe, method=method, ratio=ratio, **options):
        tiny.run(pipe, steps=4, **size)
    steps = tokred.report(pipe).steps
    left = next(
        site for site in found.sites if (site.reason is None and site.kind == "attention") or site.kind == "stack"
    )
    assert left.queries == count
    shown = {step.ratio for step in steps if step.mode == "reduce"}
    snapped = 1024 - int(1024 * ratio) != count
    assert shown == {1 - count / 1024 if snapped else ratio}
    assert [(s.mode, s.ratio, s.flops) for s in found.steps] == [(s.mode, s.ratio, s.flops) for s in steps]


def test_small_pictures_are_left() -> None:
    found = tokred.explain(tiny.sd3(), method="toca", ratio=0.6, num_inference_steps=12)
    assert {step.ratio for step in found.steps} == {0.0, 0.6}


def test_an_align_that_cannot_be() -> None:
    for method in ("toca", "tome"):
        with pytest.raises(ConfigError, match="align=2000: there are only 1024 tokens"):
            tokred.explain(tiny.sd3(), method=method, ratio=0.6, align=2000, height=SIDE, width=SIDE)

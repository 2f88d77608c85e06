"""The timing pass: what is called, in which order, and what the figures are made of."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import diffusion_tokred as tokred
from diffusion_tokred.evaluation.cost import cost_of, measure_cost, same_time
from diffusion_tokred.evaluation.variants import Variant
from diffusion_tokred.methods import make_config
from tests.evaluation import toys

VARIANTS = (
    Variant("unpatched"),
    Variant("tome", make_config("tome", ratio=0.5)),
    Variant("two-steps", call={"num_inference_steps": 2}, anchor="steps"),
    Variant("numerics", anchor="numerics"),
)


@pytest.fixture
def calls(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """(steps, method) of each call of the pipeline."""
    seen: list[tuple[int, str]] = []
    real = type(pipe).__call__

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        driver = self.unet.__dict__.get("_tokred")
        what = "-" if driver is None else f"{driver.method.config.name} {driver.method.config.ratio}"
        seen.append((kwargs["num_inference_steps"], what))
        return real(self, *args, **kwargs)

    spy.__signature__ = inspect.signature(real)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(pipe), "__call__", spy)
    return seen


def test_rounds_alternate_and_figures_follow(pipe: Any, calls: list[tuple[int, str]]) -> None:
    told: list[float] = []
    found = measure_cost(
        pipe, VARIANTS, toys.PROMPT, call={"num_inference_steps": 3}, rounds=2, warmup=1,
        progress=lambda what, share: told.append(share),
    )  # fmt: skip
    plain, tome, few = (3, "-"), (3, "tome 0.5"), (2, "-")
    assert calls[:3] == [(3, "tome 0.0"), tome, (2, "tome 0.0")]  # counted: dense where nothing is reduced
    assert calls[3:] == [plain, tome, few, plain, tome, few, plain, plain, few, tome, plain]
    assert told == sorted(told) and told[-1] == 1.0
    assert [row["name"] for row in found["rows"]] == ["unpatched", "tome", "two-steps"]
    assert cost_of(found, "numerics") is None
    for row in found["rows"]:
        cost = cost_of(found, row["name"])
        assert cost is not None and cost["seconds"]["median"] == np.median(row["seconds_raw"]) > 0
        assert cost["speedup"]["n"] == cost["seconds"]["n"] == 2
    assert found["schema"] == "tokred.result/1" and found["kind"] == "timing"
    assert "_tokred" not in pipe.unet.__dict__


def test_flops_are_those_of_the_denoiser(pipe: Any) -> None:
    found = measure_cost(pipe, VARIANTS, toys.PROMPT, call={"num_inference_steps": 3}, rounds=1, warmup=0)
    unpatched, tome, few = found["rows"]
    assert few["flops"] * 3 == unpatched["flops"] * 2 and few["flops_unpatched"] == unpatched["flops"]
    assert tome["flops"] < unpatched["flops"] and 0.4 < tome["tokens_saved"] < 0.6
    x, text = torch.randn(2, 4, 16, 16), torch.randn(2, 8, pipe.unet.config.cross_attention_dim)
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)  # whose products torch counts
    with torch.no_grad(), math, FlopCounterMode(display=False) as counter:
        pipe.unet(x, torch.tensor(1), text)
    assert unpatched["flops"] == pytest.approx(3 * counter.get_total_flops(), rel=0.02)


def test_fewer_steps_that_take_the_same_time() -> None:
    def row(name: str, speedup: float) -> dict[str, Any]:
        return {"name": name, "speedup": {"median": speedup}, "seconds_raw": []}

    variants = (*VARIANTS[:2], Variant("todo", make_config("todo")), Variant("slow", make_config("random-keep")))
    timing = {"rows": [row("unpatched", 1.0), row("tome", 1.52), row("todo", 1.5), row("slow", 0.8)]}
    (fewer,) = same_time(timing, variants, 30)
    assert fewer == Variant("steps-20", call={"num_inference_steps": 20}, anchor="steps")
    assert same_time(timing, (*variants, fewer), 30) == []


def test_refusals(pipe: Any) -> None:
    with pytest.raises(tokred.ConfigError, match="first variant"):
        measure_cost(pipe, VARIANTS[1:], toys.PROMPT)
    with pytest.raises(tokred.UnsupportedError, match="matches nothing"):
        measure_cost(pipe, (VARIANTS[0], Variant("bad", make_config("tome", levels=(9,)))), toys.PROMPT, rounds=1)
    assert "_tokred" not in pipe.unet.__dict__

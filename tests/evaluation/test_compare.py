"""compare: the right pictures, honest figures, nothing left behind."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

import diffusion_tokred as tokred
from diffusion_tokred.evaluation.compare import Comparison, compare
from diffusion_tokred.evaluation.metrics import psnr, speedup
from diffusion_tokred.testing import tiny
from tests.evaluation import toys


def test_pictures_are_those_of_the_pipeline(comparison: Comparison, pipe: Any) -> None:
    call = dict(prompt=toys.PROMPT, num_inference_steps=3, width=32, height=48, guidance_scale=3.0)
    for row in comparison.rows:
        by_hand = pipe(**call, generator=torch.Generator().manual_seed(row.seed)).images[0]
        assert row.unpatched.tobytes() == by_hand.tobytes() and row.unpatched.size == (32, 48)
        with tokred.patched(pipe, method="tome"):
            by_hand = pipe(**call, generator=torch.Generator().manual_seed(row.seed)).images[0]
        assert row.patched.tobytes() == by_hand.tobytes()
        assert row.unpatched.tobytes() != row.patched.tobytes()
        assert row.psnr == psnr(row.unpatched, row.patched) and row.repeatable


def test_figures_follow_from_what_was_recorded(comparison: Comparison) -> None:
    before = [t for row in comparison.rows for t in row.seconds_unpatched]
    after = [t for row in comparison.rows for t in row.seconds_patched]
    assert len(before) == len(after) == 4 and min(before + after) > 0
    assert comparison.speedup == speedup(before, after)
    assert comparison.seconds_unpatched.median == np.median(before)
    report = comparison.rows[0].report
    assert report.flops < report.flops_dense and report.tokens_saved == pytest.approx(0.5, abs=0.01)
    assert report.token_map is not None and report.token_map.shape == (3, 2, 1, 24, 16)


def test_the_result_is_json_of_the_schema(comparison: Comparison) -> None:
    data = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    check_schema(data)
    assert data["kind"] == "compare" and data["prompts"]["n"] == 2 and data["prompts"]["unique"] == 1
    assert data["pipeline"] | {"model": None} == {
        "model": None, "class": "StableDiffusionPipeline", "denoiser": "UNet2DConditionModel",
        "scheduler": "DDIMScheduler", "steps": 3, "guidance": 3.0, "width": 32, "height": 48, "dtype": "float32",
    }  # fmt: skip
    assert data["reduction"]["config"] == tokred.ToMeConfig().to_dict()


def test_neutral_settings_give_equal_pictures(pipe: Any) -> None:
    found = compare(pipe, method="tome", ratio=0.0, prompt=toys.PROMPT, steps=2, repeat=1)
    row = found.rows[0]
    assert row.psnr == math.inf and row.ssim == pytest.approx(1.0, abs=1e-12)
    data = found.to_dict()
    check_schema(data)
    assert data["rows"][0]["psnr"] is None and "infinite" in data["rows"][0]["why_null"]["psnr"]
    assert data["intervals"]["psnr"]["median"] is None and data["intervals"]["speedup"]["low"] is None


def test_the_order_alternates_and_only_the_last_call_records(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = type(pipe).__call__

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        driver = self.unet.__dict__.get("_tokred")
        calls.append((kwargs["num_inference_steps"], "-" if driver is None else driver.record or "patched"))
        return real(self, *args, **kwargs)

    spy.__signature__ = __import__("inspect").signature(real)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(pipe), "__call__", spy)
    told = []
    compare(pipe, prompt=toys.PROMPT, steps=3, repeat=2, progress=lambda what, share: told.append(share))
    assert calls == [(2, "-"), (2, "patched"), *((3, who) for who in ("-", "patched", "patched", "-", "tokens"))]
    assert told == sorted(told) and told[-1] == 1.0 and len(told) > 15


def test_nothing_is_left_behind(pipe: Any) -> None:
    pipe(toys.PROMPT, num_inference_steps=2)
    del pipe._progress_bar_config
    before = set(pipe.__dict__), set(pipe.unet.__dict__)
    compare(pipe, prompt=toys.PROMPT, steps=2, repeat=1)
    assert (set(pipe.__dict__), set(pipe.unet.__dict__)) == before


def test_embeddings_instead_of_a_prompt() -> None:
    pipe = tiny.sd3()
    call = tiny.inputs(pipe) | {"prompt": None, "negative_prompt": None}
    found = compare(pipe, method="todo", steps=2, repeat=1, call=call)
    assert found.rows[0].report.model == "SD3Transformer2DModel" and found.rows[0].prompt == ""


def test_refusals(pipe: Any) -> None:
    with pytest.raises(tokred.ConfigError, match="repeat must be at least 1"):
        compare(pipe, repeat=0)
    with pytest.raises(tokred.ConfigError, match="no seeds"):
        compare(pipe, seeds=())
    with pytest.raises(tokred.ConfigError, match="divisible by 8"):
        compare(pipe, size=(33, 33), steps=2)
    with pytest.raises(tokred.ConfigError, match="unknown method"):
        compare(pipe, method="tomee")
    with pytest.raises(tokred.UnsupportedError, match="takes no prompt"):
        compare(tiny.dit(), steps=2)
    with pytest.raises(tokred.UnsupportedError, match="matches nothing"):
        compare(pipe, method="tome", levels=(9,))
    tokred.patch(pipe, method="tome")
    with pytest.raises(tokred.StateError, match="patched already"):
        compare(pipe)


def check_schema(data: dict[str, Any]) -> None:
    """What every file of `tokred.result/1` has; a null has a reason."""
    assert data["schema"] == "tokred.result/1" and data["status"] == "complete"
    assert {"kind", "created", "env", "pipeline", "reduction", "prompts", "rows", "intervals"} <= set(data)
    assert {"torch", "diffusers", "device", "threads"} <= set(data["env"])
    assert {"n", "unique", "sha256"} == set(data["prompts"]) and len(data["rows"]) == data["prompts"]["n"]
    for spread in data["intervals"].values():
        assert {"median", "low", "high", "n"} <= set(spread)
    for part in (*data["rows"], *data["intervals"].values()):
        assert {name for name, value in part.items() if value is None} == set(part.get("why_null", {}))

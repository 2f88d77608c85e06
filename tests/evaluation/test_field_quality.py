"""The pictures of the comparison of the field: drawn again by hand, and compared by the formula."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

import diffusion_tokred as tokred
from diffusion_tokred.evaluation import comparison
from diffusion_tokred.evaluation.comparison import Settings, compare_field
from diffusion_tokred.evaluation.field import Row, default_rows
from diffusion_tokred.evaluation.field_quality import Pictures
from diffusion_tokred.evaluation.layout import figure
from tests.evaluation import toys

PROMPTS = ("a star", "a ring", "a star and a ring")
CALL = dict(prompt="another", height=32, width=32, guidance_scale=3.0)


def by_hand(pipe: Any, steps: int) -> list[np.ndarray]:
    return [
        np.asarray(
            pipe(
                prompt, height=32, width=32, guidance_scale=3.0, num_inference_steps=steps,
                generator=torch.Generator().manual_seed(seed),
            ).images[0], dtype=np.float64,
        )
        for seed, prompt in enumerate(PROMPTS)
    ]  # fmt: skip


def test_pictures_are_those_of_the_patched_pipeline() -> None:
    pipe, row = toys.sd(), default_rows("sd15")["fora"]
    assert row.config is not None
    pictures = Pictures(pipe, "unet", CALL, 10, PROMPTS)
    found = pictures.quality(row)["psnr"]
    plain = by_hand(pipe, 10)
    with tokred.patched(toys.sd(), row.config) as patched:
        reduced = by_hand(patched, 10)
    wanted = [10 * np.log10(255**2 / ((a - b) ** 2).mean()) for a, b in zip(plain, reduced, strict=True)]
    assert found["mean"] == pytest.approx(np.mean(wanted)) and found["n"] == 3
    assert min(wanted) - 1e-4 <= found["low"] <= found["high"] <= max(wanted) + 1e-4  # ours are of float32
    assert "_tokred" not in pipe.unet.__dict__ and len(pictures.unpatched) == 3


def test_equal_pictures_are_counted() -> None:
    found = Pictures(toys.sd(), "unet", CALL, 2, PROMPTS[:2]).quality(Row("the same"))["psnr"]
    assert found["identical"] == 2 and np.isnan(found["mean"])


def test_embedded_pipelines_have_a_quality_beside_each_time(tmp_path: Any) -> None:
    pytest.importorskip("torchmetrics")
    settings = Settings(steps=4, rounds=1, pictures=2)
    data = compare_field([], ["todo"], settings, pipelines=["toy-sd"], out=tmp_path / "a.json")
    plain, todo = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert plain["quality"] is None and plain["why_null"]["quality"] == "unpatched"
    assert todo["quality"]["psnr"]["n"] == 2 and 20 < todo["quality"]["psnr"]["mean"] < 80
    assert comparison.cells(todo)[-1] == figure(todo["quality"]["psnr"])
    assert comparison.cells(plain)[-1] == "-" and data["asked"]["pictures"] == 2


def test_times_are_kept_if_drawing_fails(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchmetrics")

    def fails(*_: Any) -> None:
        raise OSError("no space left")

    quality = Pictures.quality
    monkeypatch.setattr(Pictures, "quality", fails)
    settings = Settings(steps=4, rounds=1, pictures=2)
    data = compare_field([], ["todo"], settings, pipelines=["toy-sd"], out=tmp_path / "a.json")
    assert data["rows"][1]["error"] is None and data["rows"][1]["quality_error"] == "OSError: no space left"
    monkeypatch.setattr(comparison, "measure", fails)
    monkeypatch.setattr(Pictures, "quality", quality)
    compare_field([], ["todo"], settings, pipelines=["toy-sd"], out=tmp_path / "a.json")
    row = json.loads((tmp_path / "a.json").read_text())["rows"][1]
    assert row["quality"]["psnr"]["n"] == 2 and "quality_error" not in row and "quality" not in row["why_null"]
    assert row["kinds"] == data["rows"][1]["kinds"]  # they were not measured again


def test_shapes_of_random_weights_have_none() -> None:
    (_, tome) = compare_field(["tiny-sd3-64"], ["tome"], Settings(steps=4, rounds=1, pictures=2))["rows"]
    assert tome["quality"] is None and tome["why_null"]["quality"].startswith("random weights")

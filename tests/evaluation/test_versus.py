"""Two results held against each other; every figure is fake."""

from __future__ import annotations

import numpy as np
import pytest

from diffusion_tokred.errors import ConfigError
from diffusion_tokred.evaluation import report, versus
from diffusion_tokred.evaluation.results import prompts_of
from tests.evaluation.test_evaluation_report import around, fake, rows_of


def test_compare_gives_differences_with_intervals() -> None:
    other = fake()
    ssim = next(v for v in other["variants"] if v["name"] == "tome-0.5")["paired"]["ssim"]
    ssim |= around(0.85, 0.016, "higher")
    text = report.compare(fake(), other)
    rows = {(row[0], row[1]): row[2:] for row in rows_of("## T\n" + text, "T")[1:]}
    assert "Not alike" not in text
    # half widths 0.012 and 0.016 make 0.020 together
    assert rows["tome-0.5", "SSIM ↑"] == [
        "0.800 [0.788, 0.812]",
        "0.850 [0.834, 0.866]",
        "+0.050 [+0.030, +0.070]",
        "yes",
    ]
    assert rows["tome-0.5", "PSNR (dB) ↑"][3] == "no" and ("tome-0.5", "change of fact_relation") not in rows
    skew = versus._difference({"mean": 1.0, "low": 0.0, "high": 4.0}, {"mean": 5.0, "low": 1.0, "high": 5.5})
    assert skew == {"mean": 4.0, "low": 4.0 - 5.0, "high": pytest.approx(4.0 + np.hypot(0.5, 1.0))}


def test_quartiles_of_seconds_make_no_interval() -> None:
    """They say how single calls spread: the difference of two medians is given alone. Speed-ups have an interval."""
    other = fake()
    cost = next(v for v in other["variants"] if v["name"] == "tome-0.5")["cost"]
    cost["seconds"] |= {"median": 9.0, "low": 8.9, "high": 9.1}
    cost["speedup"] |= {"median": 0.3, "low": 0.29, "high": 0.31}
    text = report.compare(fake(), other)
    rows = {(row[0], row[1]): row[2:] for row in rows_of("## T\n" + text, "T")[1:]}
    assert rows["tome-0.5", "seconds"][:2] == ["1.400 [1.358, 1.456]", "9.000 [8.900, 9.100]"]
    assert rows["tome-0.5", "seconds"][2:] == ["+7.60", "–"]
    assert rows["tome-0.5", "speed-up"][2:] == ["-1.129 [-1.166, -1.085]", "yes"]
    assert "Brackets of seconds are quartiles" in text


def test_compare_says_what_is_not_alike_and_refuses_other_prompts() -> None:
    other = fake(prompts={"name": "fake"} | prompts_of(["a", "c"]))
    with pytest.raises(ConfigError, match="other prompts"):
        report.compare(fake(), other)
    assert "the prompts differ" in report.compare(fake(), other, any_prompts=True)
    moved = fake()
    moved["env"] |= {"device": "cuda: fake", "load": 7.0}
    moved["pipeline"] |= {"steps": 30}
    fid = next(v for v in moved["variants"] if v["name"] == "todo-0.5")["distribution"]["toy_fid"]
    fid |= {"extractor": "inception", "value": 1.0}
    del moved["variants"][1]
    moved["judges"] = {"lpips": "other weights"}
    text = report.compare(fake(), moved)
    assert (
        "env.device: cpu: fake and cuda: fake" in text
        and "env.load" not in text
        and "pipeline.steps: 25 and 30" in text
    )
    assert "judges.lpips: None and other weights" in text
    assert "todo-0.5, toy-FID: other extractor" in text and "Only in a: tome-0.25." in text
    rows = {(row[0], row[1]): row[2:] for row in rows_of("## T\n" + text, "T")[1:]}
    assert rows["todo-0.5", "toy-FID ↓"][2:] == ["–", "–"] and rows["todo-0.25", "toy-FID ↓"][3] == "no"
    with pytest.raises(ConfigError, match="no variant is in both"):
        report.compare(fake(), fake(variants=[{"name": "else"}]))

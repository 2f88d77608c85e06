"""`tokred evaluate` as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffusion_tokred.evaluation import models
from tests.cli.test_cli import ROOT, tokred

SMALL = (
    "--prompts",
    "p.txt",
    "--unique",
    "--steps",
    3,
    "--size",
    32,
    "--rounds",
    1,
    "--device",
    "cpu",
    "--clip-model",
    "toy",
    "--no-anchors",
)


@pytest.fixture(autouse=True)
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in ("INCEPTION", "ALEXNET", "VGG", "CLIP"):
        monkeypatch.delenv(f"TOKRED_{variable}", raising=False)
    Path("p.txt").write_text("a red star\na blue zebra\na red star\n")


def test_evaluate_and_go_on(folder: Path) -> None:
    words = ("--variant", "tome:ratio=0.5", "--variant", "steps:2", "--claim", "steps-2", "--margin", "psnr=0")
    first = tokred("evaluate", "run", "--model", folder, *SMALL, *words)
    for text in ("tome-ratio-0.5", "PSNR", "run/report.html", "run/result.json"):
        assert text in first.stdout
    assert "1 of 2 different prompts are not read whole, first 'a blue zebra'" in first.stderr
    data = json.loads(Path("run/result.json").read_text())
    assert [v["name"] for v in data["variants"]] == ["unpatched", "tome-ratio-0.5", "steps-2"]
    assert data["pipeline"]["steps"] == 3 and data["pipeline"]["width"] == 32 and data["prompts"]["n"] == 2
    assert data["claim"] == {"against": "steps-2", "margins": {"psnr": 0.0}, "stated": "before the pictures were drawn"}
    assert data["variants"][1]["cost"]["speedup"]["n"] == 1
    drawn = {path: path.stat().st_mtime_ns for path in Path("run/images").rglob("*.png")}
    assert len(drawn) == 6
    tokred("evaluate", "run", "--model", folder, *SMALL, *words, "--variant", "todo")
    assert {path: path.stat().st_mtime_ns for path in drawn} == drawn
    assert len(json.loads(Path("run/result.json").read_text())["variants"]) == 4

    again = tokred("evaluate", "--compare", "run/result.json", "run/result.json")
    assert "tome-ratio-0.5" in again.stdout
    other = data | {"prompts": data["prompts"] | {"sha256": "0" * 64}}
    Path("other.json").write_text(json.dumps(other))
    assert "prompts" in tokred("evaluate", "--compare", "run/result.json", "other.json", code=2).stderr
    tokred("evaluate", "--compare", "run/result.json", "other.json", "--any-prompts")

    script = (sys.executable, ROOT / "scripts" / "evaluate.py", "run", "--clip-model", "toy")
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0 and "tome-ratio-0.5" in done.stdout, done.stderr
    measured = json.loads(Path("run/result.json").read_text())
    assert [v["paired"] for v in measured["variants"][:3]] == [v["paired"] for v in data["variants"]]
    assert measured["variants"][1]["cost"] is not None  # of the timing that is there


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "name the run's folder"),
        (("run", "--variant", "tomee"), "no method 'tomee'"),
        (("run", "--variant", "tome:ratio=2"), "ratio must be in"),
        (("run", "--variant", "steps:3", "--steps", 3), "not fewer than the run's 3"),
        (("run", "--prompts", "nothing.txt"), "nothing.txt"),
        (("run", "--prompts", "p.txt", "--column", "caption"), "p.txt has no columns: leave 'caption' out"),
        (("run", "--margin", "psnr=0"), "belongs to a claim"),
        (("run", "--claim", "steps-2", "--margin", "psnr"), "METRIC=NUMBER"),
        (("run", "--reference", "nothing.npz"), "there is no nothing.npz"),
        (("run", "--inception-weights", "nothing.pth"), "--inception-weights: there is no file nothing.pth"),
        (("run", "--clip-model", "./nothing"), "nothing"),
        (("run", "--protocol", "mine"), "no protocol 'mine'"),
        (("run", "--protocol", "coco5k"), "prompts that are not shipped"),
        (("run", "--compare", "a.json", "b.json"), "cannot read a.json"),
    ],
)
def test_what_cannot_work_is_said_before_a_model_is_loaded(
    words: tuple[Any, ...], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load_model", lambda *a, **k: pytest.fail("loaded"))
    result = tokred("evaluate", *words, code=2)
    assert says in result.stderr and result.stderr.count("\n") == 1
    assert not Path("run").exists()


def test_a_scheduler_by_name(folder: Path) -> None:
    pipe = models.load_model(str(folder), device="cpu")
    models.set_scheduler(pipe, "EulerDiscreteScheduler")
    assert type(pipe.scheduler).__name__ == "EulerDiscreteScheduler"
    result = tokred("evaluate", "run", "--model", folder, *SMALL, "--scheduler", "Euler", code=2)
    assert "no scheduler 'Euler'" in result.stderr
    result = tokred("evaluate", "run", "--model", folder, *SMALL, "--scheduler", "DDPMWuerstchenScheduler", code=2)
    assert "cannot become" in result.stderr

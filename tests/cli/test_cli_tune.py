"""`tokred tune` as a user meets it. The clock is made up: no time is looked at."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from diffusion_tokred.cli import app
from diffusion_tokred.measure.timing import Timing
from diffusion_tokred.tuning.bench import Bench

pytest.importorskip("optuna")
ROOT = Path(__file__).parents[2]
WORDS = "--methods fora --steps 5 --size 32 --guidance 1 --limit 1 --held-out 2 --rounds 1 --budget 4 --device cpu"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, on an idle machine with a clock of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKRED_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    (tmp_path / "mine.txt").write_text("a red star\na blue ring\na red star\na red ring\na blue star\n")
    before = Bench.time_steps

    def times(self: Bench, form: Any, steps: Any) -> dict[str, Any]:
        did = before(self, form, steps)["steps"]
        lines = [[mode, ratio, 0.1 if mode == "full" else 0.01] for mode, ratio, _ in did]
        return {"seconds": 0.5 + sum(line[2] for line in lines), "steps": lines}

    def race(self: Bench, variants: Any, rounds: int) -> Timing:
        seconds = {v.name: (1.0 if v.name == "unpatched" else 1 / 1.25,) * rounds for v in variants}
        return Timing(seconds, (1.0,) * rounds)

    monkeypatch.setattr(Bench, "time_steps", times)
    monkeypatch.setattr(Bench, "time_unpatched", lambda self: {"seconds": 1.0, "steps": 0.6})
    monkeypatch.setattr(Bench, "race", race)


def tune(folder: Path, *words: Any, code: int = 0) -> Any:
    every = ["tune", "--model", folder, "--prompts", "mine.txt", *WORDS.split(), *words]
    result = CliRunner().invoke(app, [str(word) for word in every])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def test_tune_and_use(folder: Path, tmp_path: Path) -> None:
    result = tune(folder, "--target-speedup", 1.2, "--json", "deep/result.json")
    for words in ("Asked for: 1.2x", "Speed-up 1.25", "best constant", "random search", "time with fewer steps"):
        assert words in " ".join(result.stdout.split())
    assert "tokred-tune/policy.json" in result.stdout
    data = json.loads((tmp_path / "deep" / "result.json").read_text())
    assert data["kind"] == "tune" and data["reached"] and data["prompts"]["train"]["n"] == 1
    assert {p.name for p in (tmp_path / "tokred-tune").iterdir()} >= {
        "policy.json", "result.json", "report.md", "report.html", "plot.png", "journal.jsonl",
    }  # fmt: skip
    assert len(list((tmp_path / "home" / "policies").iterdir())) == 1


def test_ctrl_c_keeps_the_best_so_far(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, drawn = Bench.draw, list[str]()

    def draw(self: Bench, variant: Any, part: str, place: int) -> dict[str, Any]:
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(part)
        return before(self, variant, part, place)

    monkeypatch.setattr(Bench, "draw", draw)
    result = tune(folder, "--target-speedup", 1.2, code=130)
    assert "interrupted: this is the best so far; the same command goes on" in result.stderr
    data = json.loads((tmp_path / "tokred-tune" / "result.json").read_text())
    assert data["status"] == "interrupted" and (tmp_path / "tokred-tune" / "policy.json").exists()
    assert not (tmp_path / "home").exists()
    monkeypatch.setattr(Bench, "draw", before)
    tune(folder, "--target-speedup", 1.2)
    assert json.loads((tmp_path / "tokred-tune" / "result.json").read_text())["status"] == "complete"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--max-lpips 0.1", "ask for min_psnr instead"),
        ("--target-speedup 0.5", "target_speedup is a number above 1, found 0.5"),
        ("--target-speedup 2 --min-psnr 30", "one target at a time"),
        ("--budget ten", "budget is a number of evaluations, or a time"),
        ("--methods fora,foro", "unknown method 'foro' (did you mean 'fora'?)"),
        ("--held-out 9", "mine.txt has 4 different prompts, --limit and --held-out ask for 10"),
        ("--steps 2", "a run of 2 noise levels has nothing to tune"),
    ],
)
def test_what_is_refused(folder: Path, words: str, says: str) -> None:
    result = tune(folder, *words.split(), code=2)
    assert says in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.slow
def test_ctrl_c_in_a_process_of_its_own(folder: Path, tmp_path: Path) -> None:
    every = ["tune", "--model", folder, "--prompts", "mine.txt", *WORDS.split(), "--budget", 500]
    command = [sys.executable, "-m", "diffusion_tokred.cli", *map(str, every)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    journal = tmp_path / "tokred-tune" / "journal.jsonl"
    for _ in range(3000):
        if journal.exists() and journal.read_text().count('"draw train') > 12:
            break
        time.sleep(0.1)
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "the same command goes on" in err, (out, err)
    assert json.loads((tmp_path / "tokred-tune" / "result.json").read_text())["status"] == "interrupted"

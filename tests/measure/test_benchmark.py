"""The benchmark, on a tiny UNet: what it measures, and that it leaves the model as it was. No time is judged."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_tokred import ConfigError
from diffusion_tokred.evaluation.benchmark import benchmark, random_unet

ROOT = Path(__file__).parents[2]


def state(unet: torch.nn.Module) -> list[Any]:
    return [(type(m), sorted(k for k in m.__dict__ if k != "_tome_info")) for m in unet.modules()]


def test_lines() -> None:
    pytest.importorskip("tomesd")
    unet = random_unet("tiny", torch.float32)
    before, told = state(unet), []
    found = benchmark(unet, 16, 24, batch=2, rounds=3, progress=lambda what, share: told.append(share))
    assert [line.name for line in found.lines] == [
        "unpatched", "unpatched again", "tome", "tome, one matching", "todo", "tomesd"
    ]  # fmt: skip
    lines = {line.name: line for line in found.lines}
    assert all(len(line.seconds) == 3 for line in found.lines)
    assert lines["tome"].flop_ratio == lines["tomesd"].flop_ratio < lines["tome, one matching"].flop_ratio
    assert lines["tome"].ideal == lines["tomesd"].ideal == lines["tome, one matching"].ideal > 1
    assert lines["tome"].kernels > lines["tome, one matching"].kernels > lines["unpatched"].kernels
    assert lines["tomesd"].kernels > lines["unpatched"].kernels  # so it did patch
    assert told[0] == 0 and told[-1] == 1 and told == sorted(told)
    peer = found.intervals()["16x24 tomesd / tome"]
    rows = found.rows()
    assert rows[0]["why_null"]["phi"] == "nothing is reduced" and len(rows) == 6
    assert all(row["phi"] is not None or row["why_null"]["phi"] for row in rows)
    assert peer["low"] <= peer["median"] <= peer["high"] and peer["n"] == 3
    assert state(unet) == before


def test_without_tomesd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = benchmark(random_unet("tiny", torch.bfloat16), 16, 16, rounds=1)
    assert found.peer is None and "tomesd" not in [line.name for line in found.lines]


def test_unets() -> None:
    one, other = random_unet("tiny", torch.float32), random_unet("tiny", torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert torch.get_default_dtype() == torch.float32
    with pytest.raises(ConfigError, match="sd15"):
        random_unet("sd9", torch.float32)


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    """The script, in this process: importing torch again would take most of the time."""
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--tiny", "--latent", "16", *options])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / "benchmark.py"), run_name="__main__")
    return end.value.code


def test_the_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "out.json"
    assert run(monkeypatch, "--rounds", "2", "--threads", "1", "--out", str(file)) == 0
    shown = capsys.readouterr().out
    assert "unpatched again" in shown and "S*" in shown
    data = json.loads(file.read_text())
    assert data["schema"] == "tokred.result/1" and data["kind"] == "benchmark"
    assert data["env"]["threads"] == 1
    assert {row["variant"] for row in data["rows"]} >= {"unpatched", "unpatched again", "tome", "todo"}
    assert data["intervals"]["16x16 unpatched / tome"]["n"] == 2
    assert [p.name for p in file.parent.iterdir()] == ["out.json"]


def test_wrong_options_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--ratio", "0.9") == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("benchmark: tome: ratio 0.9 is not in [0, 0.75]")
    assert run(monkeypatch, "--help") == 0
    assert "--latent" in capsys.readouterr().out

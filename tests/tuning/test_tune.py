"""`tune` on a tiny pipeline, from the first measurement to the files. No time is looked at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import diffusion_tokred as tokred
from diffusion_tokred import ConfigError, Policy, StateError, UnsupportedError
from diffusion_tokred.auto import file_of
from diffusion_tokred.evaluation.judges import Judges
from diffusion_tokred.evaluation.metrics import psnr
from diffusion_tokred.evaluation.variants import Variant
from diffusion_tokred.measure.timing import Timing
from diffusion_tokred.testing import tiny
from diffusion_tokred.tuning.bench import Bench
from tests.evaluation import toys

pytest.importorskip("optuna")
PROMPTS = ("a red star", "a blue ring", "a red ring", "a blue star")
CALL = {"num_inference_steps": 6, "height": 32, "width": 32, "guidance_scale": 1.0}
QUICK: dict[str, Any] = dict(call=CALL, holdout=2, methods=["fora"], rounds=(1, 1), progress=False)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKRED_HOME", str(tmp_path / "home"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reused steps cost a tenth of full ones, whatever the machine does."""
    before = Bench.time_steps

    def times(self: Bench, form: Any, steps: Any) -> dict[str, Any]:
        lines = [
            [mode, ratio, 0.1 if mode == "full" else 0.01] for mode, ratio, _ in before(self, form, steps)["steps"]
        ]
        return {"seconds": 0.4 + sum(line[2] for line in lines), "steps": lines}

    monkeypatch.setattr(Bench, "time_steps", times)

    def race(self: Bench, variants: Any, rounds: int) -> Timing:
        seconds = {v.name: (1.0 if v.name == "unpatched" else 1 / 1.35,) * rounds for v in variants}
        return Timing(seconds, (1.0,) * rounds)

    monkeypatch.setattr(Bench, "time_unpatched", lambda self: {"seconds": 1.0, "steps": 0.6})
    monkeypatch.setattr(Bench, "race", race)


def test_from_the_first_measurement_to_the_files(tmp_path: Path, clock: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = toys.sd()
    attributes = dict(vars(pipe.unet))
    found = tokred.tune(pipe, PROMPTS, target_speedup=1.3, budget=12, out=tmp_path / "out", model="tiny", **QUICK)
    assert vars(pipe.unet) == attributes
    assert isinstance(found, tokred.Tuned) and found.status == "complete"
    assert found.config.name == "fora" and found.best["composed"] >= 1.3 * 0.99
    # 0.4 + 0.1 full + 0.01 (6 - full) <= 1 / 1.3: three full steps.
    full = found.data["steps"]["full"]
    assert len(full) == 3 and found.best["composed"] == pytest.approx(1 / (0.4 + 0.3 + 0.03))

    def draw(prompt: str, seed: int) -> Any:
        import torch

        return pipe(prompt, **CALL, generator=torch.Generator().manual_seed(seed)).images[0]

    dense = [draw(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    policy = Policy.load(tmp_path / "out" / "policy.json")
    assert policy == found.policy and policy.method == found.config.to_dict()
    with tokred.patched(pipe, found.config, policy=policy):
        mine = [draw(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
        assert [s.index for s in tokred.report(pipe).steps if s.mode == "full"] == full
    figures = [psnr(a, b) for a, b in zip(dense, mine, strict=True)]
    assert found.best["train"] == pytest.approx(sum(figures[:2]) / 2)
    assert found.best["paired"]["psnr"]["mean"] == pytest.approx(sum(figures[2:]) / 2)
    assert policy.model["class"] == "UNet2DConditionModel" and policy.measured["prompts"] == 2
    assert policy.library == f"diffusion_tokred {tokred.__version__}"

    data = json.loads((tmp_path / "out" / "result.json").read_text())
    assert data == found.to_dict() and (data["schema"], data["kind"]) == ("tokred.result/1", "tune")
    assert data["pipeline"]["model"] == "tiny" and data["pipeline"]["steps"] == 6
    losses = data["sensitivity"]["forms"]["fora what=modules"]
    assert losses[0] is None and all(isinstance(value, float) for value in losses[1:])
    page = (tmp_path / "out" / "report.md").read_text()
    for words in ("Asked for: 1.3x", "best constant", "random search, same budget", "same time with fewer steps"):
        assert words in page
    assert "What a step costs" in page and "fora what=modules" in page
    html = (tmp_path / "out" / "report.html").read_text()
    assert html.count("<table>") >= 4 and "data:image/png;base64," in html
    assert found.reached and found.best["speedup"]["median"] == pytest.approx(1.35)
    again = tokred.patch(toys.sd(), method="auto")
    assert again.unet._tokred.policy == policy and again.unet._tokred.method.config == found.config

    monkeypatch.setattr(Bench, "_called", lambda *args: pytest.fail("the pipeline was called"))
    monkeypatch.setattr(Bench, "describe", lambda self: {})
    tokred.tune(pipe, PROMPTS, target_speedup=1.3, budget=12, out=tmp_path / "out", model="tiny", **QUICK)


def test_what_is_refused(tmp_path: Path) -> None:
    pipe = toys.sd()
    with pytest.raises(ConfigError, match=r"max_lpips needs the weights .* min_psnr"):
        tokred.tune(pipe, PROMPTS, max_lpips=0.1, **QUICK)
    with pytest.raises(UnsupportedError, match="has no tokenizer and text encoder"):
        tokred.tune(tiny.sd(), PROMPTS, **QUICK)
    with pytest.raises(ConfigError, match="a run of 2 noise levels"):
        tokred.tune(pipe, PROMPTS, **QUICK | {"call": CALL | {"num_inference_steps": 2}})
    with pytest.raises(ConfigError, match="refuses this call"):
        tokred.tune(pipe, PROMPTS, **QUICK | {"call": CALL | {"height": 31}})
    with tokred.patched(pipe, method="todo"), pytest.raises(StateError, match="patched already"):
        tokred.tune(pipe, PROMPTS, **QUICK)
    assert "_tokred" not in vars(pipe.unet) and not file_of(pipe.unet).exists()


def test_optuna_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r'pip install "diffusion-tokred\[tune\]"'):
        tokred.tune(toys.sd(), PROMPTS, **QUICK)


def test_levels_and_blocks_by_themselves() -> None:
    """Of a pipeline: what reducing a level, or a group of blocks, does to the picture."""
    from diffusion_tokred.tuning.forms import Candidate, known
    from diffusion_tokred.tuning.steps import Steps

    pipe = toys.sd()
    bench = Bench(pipe, {"train": PROMPTS[:1], "held out": PROMPTS[1:2]}, CALL, 0, Judges())
    steps = Steps(tuple(bench.noise()))
    assert bench.blocks == 10
    form = [form for form in known(bench.kinds, (0, 1, 2, 3)) if form.method == "tome"][-1]
    assert form.fixed["levels"] == (0, 1, 2, 3)
    drawn = {}
    for name, candidate in {
        "first": Candidate(form, (), 0.5, blocks=(0, 4)),
        "last": Candidate(form, (), 0.5, blocks=(5, 9)),
        "level 0": Candidate(form, (), 0.5, (("levels", (0,)),)),
        "all": Candidate(form, (), 0.5),
    }.items():
        variant = Variant("candidate", candidate.config(6), candidate.policy(steps))
        drawn[name] = bench.draw(variant, "train", 0)["psnr"]
    assert len(set(drawn.values())) == 4

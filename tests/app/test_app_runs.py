"""What the app runs, without a page: pictures as the pipeline itself draws them, times without anything in them."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusion_tokred.app import batch, export, history, pictures, previews, tuning, words
from diffusion_tokred.app.jobs import Job, Stops
from diffusion_tokred.app.limits import Setup, Side, side_of
from diffusion_tokred.app.models import Model, Models
from diffusion_tokred.app.page import kept_of
from diffusion_tokred.app.runs import Result, Stopped, Tick, compare
from PIL import Image

import diffusion_tokred as tokred
from tests.evaluation.test_compare import check_schema

SETUP = Setup("toy-sd", "a red star on a plain gray background", 5, 4, 64, 64, 3.0, 2)
PLAIN, HALF = Side(), side_of("tome:ratio=0.5,levels=0,1")


@pytest.fixture(scope="module")
def model() -> Model:
    return Models(("toy-sd",)).get("toy-sd")


def run(model: Model, setup: Setup = SETUP, a: Side = PLAIN, b: Side = HALF, **more: Any) -> Result:
    return compare(model, setup, (a, b), lambda tick: None, threading.Event(), **more)


def directly(model: Model, **arguments: Any) -> Image.Image:
    """What a user's own call draws."""
    generator = torch.Generator().manual_seed(SETUP.seed)
    return model.pipe(
        SETUP.prompt, num_inference_steps=4, guidance_scale=3.0, width=64, height=64, generator=generator, **arguments
    ).images[0]


@pytest.fixture(scope="module")
def found(model: Model) -> Result:
    return run(model)


def test_the_pictures_are_the_pipelines_own(model: Model, found: Result) -> None:
    assert found.a.picture.tobytes() == directly(model).tobytes()
    with tokred.patched(model.pipe, method="tome", ratio=0.5, levels=(0, 1)):
        assert found.b.picture.tobytes() == directly(model).tobytes()
    assert found.a.picture.tobytes() != found.b.picture.tobytes()


def test_the_noise_is_the_same_and_is_what_it_says(model: Model, found: Result) -> None:
    side = 64 // model.pipe.vae_scale_factor
    noise = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(SETUP.seed))
    digest = hashlib.sha256((noise * model.pipe.scheduler.init_noise_sigma).numpy().tobytes()).hexdigest()[:16]
    assert found.a.noise == found.b.noise == digest and found.same_noise
    assert "The initial noise of both sides is the same." in words.figures(found)


def test_nothing_is_recorded_while_timing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, real = [], tokred.patched
    monkeypatch.setattr(tokred, "patched", lambda *a, **k: asked.append(k.get("record")) or real(*a, **k))
    shown: list[Result] = []
    found = run(model, show=shown.append)
    assert asked == [None, "tokens", None, None]  # tried; drawn with what became of each token; timed twice
    assert len(found.a.seconds) == len(found.b.seconds) == 2
    assert shown[0].a.seconds == () and shown[0].speedup is None and not shown[0].finished  # pictures come first
    speed = found.speedup
    assert speed is not None
    ratios = [a / b for a, b in zip(found.a.seconds, found.b.seconds, strict=True)]
    assert speed.median == pytest.approx(sum(ratios) / 2) and speed.n == 2
    assert found.a.repeatable and found.b.repeatable


def test_a_kept_side_is_not_drawn_and_its_time_is_not_shown(model: Model, found: Result) -> None:
    found = dataclasses.replace(found, a=dataclasses.replace(found.a, seconds=(1234.567,)))  # no other time is as long
    kept = kept_of(found, SETUP, Side())
    calls = []
    handle = model.denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    again = run(model, b=side_of("todo"), kept=kept)
    handle.remove()
    assert len(calls) == 3 * SETUP.steps  # B: drawn once, timed twice
    assert again.a.kept and again.a.picture is found.a.picture and again.speedup is None
    assert again.to_dict()["rows"][0]["seconds"] == [] and "speedup" not in again.to_dict()["intervals"]
    text = words.figures(again)
    assert "kept, not timed" in text and "1234.567" not in text
    assert "A was kept" in words.verdict(again)


@pytest.mark.parametrize(
    ("other", "side", "message"),
    [({"seed": 6}, Side(), "seed changed"), ({"width": 128}, Side(), "width changed"), ({}, HALF, "own settings")],
)
def test_a_changed_side_cannot_be_kept(found: Result, other: dict[str, Any], side: Side, message: str) -> None:
    with pytest.raises(tokred.ConfigError, match=message):
        kept_of(found, Setup(**(vars(SETUP) | other)), side)
    with pytest.raises(tokred.ConfigError, match="no A to keep"):
        kept_of(None, SETUP, Side())


def test_stop_takes_effect_within_one_step_and_leaves_nothing(model: Model, found: Result) -> None:
    stop, calls = threading.Event(), []

    def tell(tick: Tick) -> None:
        if tick.side == 1:  # B has made its first step
            stop.set()

    handle = model.denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(Stopped):
        compare(model, SETUP, (Side(), HALF), tell, stop)
    handle.remove()
    # Our count comes before the hook that stops: the call in which it does is counted, and not made.
    assert len(calls) <= SETUP.steps + 2
    assert not any("_tokred" in module.__dict__ for module in model.denoiser.modules())
    assert directly(model).tobytes() == found.a.picture.tobytes()


def test_a_job_ends_with_its_watcher() -> None:
    began, ended = threading.Event(), threading.Event()

    def work(tell: Any, stop: threading.Event) -> None:
        began.set()
        tell(Tick("on it", 0.5, 1.0))
        stop.wait(10)
        ended.set()
        raise Stopped

    lock = threading.Lock()
    watcher = iter(Job(work, lock, threading.Event()))
    assert [tick.what for tick in next(watcher)] == ["on it"]
    watcher.close()  # as gradio does when a page is closed
    assert began.is_set() and ended.is_set() and not lock.locked()


def test_a_job_waits_for_its_turn_and_can_be_stopped_there() -> None:
    lock, stop, stops = threading.Lock(), threading.Event(), Stops()
    stop = stops.new("session")
    with lock:
        threading.Timer(0.1, lambda: stops.stop("session", patience=1)).start()
        job = Job(lambda tell, stop: pytest.fail("it ran"), lock, stop)
        assert list(job) == []
        with pytest.raises(Stopped):
            job.result()
    stops.forget("session", stop)
    assert stops.stop("session") == 0


@pytest.mark.parametrize(
    "side",
    [
        {"method": "tome", "options": {"ratio": 0.25, "merge_ff": True, "levels": [1, 0]}},
        {"method": "tome", "policy": [[0.8, 0.6], [0.3, 0.0]]},
        {"method": "fora", "options": {"min_steps": 0, "warmup": 1}},
    ],
)
def test_python_and_policy_make_the_same_pictures(
    model: Model, side: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(model, Setup(**(vars(SETUP) | {"repeat": 0})), b=side_of(side))
    assert found.psnr < 60, "this side changes nothing: it would prove nothing"
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(export.code(found), "exported.py", "exec"), names)
    assert names["a"].tobytes() == found.a.picture.tobytes()
    assert names["b"].tobytes() == found.b.picture.tobytes()
    assert Image.open("b.png").tobytes() == found.b.picture.tobytes()

    text = export.policy_text(found, found.b)
    assert text is not None and export.policy_text(found, found.a) is None
    Path("policy.json").write_text(text)
    policy = tokred.Policy.load("policy.json")
    with tokred.patched(model.pipe, tokred.MethodConfig.from_dict(policy.method), policy=policy):
        assert directly(model).tobytes() == found.b.picture.tobytes()


def test_the_figures_are_the_reports(model: Model, found: Result) -> None:
    with tokred.patched(model.pipe, method="tome", ratio=0.5, levels=(0, 1)):
        directly(model)
    report = tokred.report(model.pipe)
    assert report is not None
    rows = found.to_dict()["rows"]
    assert rows[0]["flops"] == report.flops_dense and rows[1]["flops"] == report.flops
    assert rows[1]["tokens_saved"] == report.tokens_saved
    check_schema(found.to_dict())


def test_tokens_are_drawn_where_they_are() -> None:
    token_map = np.zeros((2, 1, 1, 4, 4), dtype=np.uint8)
    token_map[1, 0, 0, 0, 3] = 1  # merged, at the top right, in the second step
    token_map[1, 0, 0, 2, 1] = 5
    gray = Image.new("RGB", (64, 64), (128, 128, 128))
    plain = np.asarray(pictures.tokens(gray, token_map, 0, (0, 0)))
    assert (plain == 128).all()
    page = np.asarray(pictures.tokens(gray, token_map, 1, (0, 0)), dtype=int)
    cell = page.shape[0] // 4
    changed = (page != 128).any(axis=2).reshape(4, cell, 4, cell).mean(axis=(1, 3))
    assert changed[0, 3] == changed[2, 1] == 1 and changed.sum() == 2
    assert page[0, -1].argmax() == 2 and page[2 * cell, cell].argmax() == 1  # blue, green
    assert pictures.counts(token_map, 1, (0, 0)) == [("computed", 14), ("merged", 1), ("protected", 1)]


def test_the_difference_is_amplified() -> None:
    a, b = Image.new("RGB", (8, 8), (100, 100, 100)), Image.new("RGB", (8, 8), (120, 120, 120))
    faint, bright = (np.asarray(pictures.heat(a, b, gain)).mean() for gain in (1, 8))
    assert np.asarray(pictures.heat(a, a, 16)).max() <= 4 and faint < bright


def test_previews(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded where that is cheap; else the linear map, fitted to the VAE, finds colours that it was not fitted on."""
    vae = model.pipe.vae
    colours = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    pixels = torch.nn.functional.interpolate(colours, scale_factor=32, mode="nearest")
    with torch.no_grad():
        z = vae.encode(pixels * 2 - 1).latent_dist.mode() * vae.config.scaling_factor
        decoded = vae.decode(z[..., :16, :16] / vae.config.scaling_factor).sample[0]
    shown = np.asarray(previews.preview(model, z[..., :16, :16], 64, 64), dtype=float)
    assert np.abs(shown - ((decoded / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).numpy()).max() <= 0.5
    monkeypatch.setattr(previews, "CHEAP", 0)
    linear = np.asarray(previews.preview(model, z, 256, 256), dtype=float)
    truth = (pixels[0] * 255).permute(1, 2, 0).numpy()
    assert np.abs(linear - truth).mean() < 20 < 50 < np.abs(truth - truth.mean((0, 1))).mean()
    assert previews.preview(model, torch.zeros(1, 4, 4, 8, 8), 64, 64) is None  # a video's


def test_the_plot_has_a_mark_for_each_step(found: Result) -> None:
    assert found.b.report is not None
    curve = pictures.Curve("tome", tokred.Policy.constant(0.5), found.b.report.steps, 1)
    svg = pictures.ratios_svg([curve])
    assert svg.startswith("<svg") and "currentColor" in svg and pictures.INK not in svg
    assert svg.count("<use") - pictures.ratios_svg([pictures.Curve("x", curve.policy, [], 1)]).count("<use") >= 4
    assert pictures.ratios_svg([]) == ""


def test_what_users_write_is_escaped() -> None:
    assert "<script" not in words.note("<script>alert(1)</script>")
    assert "<script" not in words.progress(Tick("<script>", 0.1, None), "<script>", {})
    assert "<script" not in words.table(["<script>"], [["<script>", "<script>"]])


def test_a_slow_down_is_said_as_one(found: Result) -> None:
    from diffusion_tokred.evaluation.metrics import Spread

    assert words.faster(Spread(0.8, 0.75, 0.9, 3)) == "B is 1.25× slower (1.11–1.33)"
    assert words.faster(Spread(0.998, float("nan"), float("nan"), 1)) == "B is as fast as A"
    assert words.faster(Spread(1.25, 1.2, 1.3, 3)) == "B is 1.25× faster (1.20–1.30)"


def test_the_history_forgets(found: Result) -> None:
    past: list[Result] = []
    for _ in range(20):
        past = history.add(past, found)
    assert len(past) == history.LONGEST
    tiles = history.tiles(past[:1])
    assert tiles[0][0].size == (64 + 64 + 4, 64) and "tome ratio 0.5" in tiles[0][1]


def test_a_batch(model: Model) -> None:
    told: list[Any] = []
    sides = [HALF, side_of("todo")]
    grid = batch.draw(model, SETUP, (5, 6), sides, told.append, threading.Event())
    assert [drawn.side for drawn in grid.counted] == [Side(), *sides]
    assert grid.pictures[0][0].tobytes() == directly(model).tobytes()
    assert grid.pictures[0][0].tobytes() != grid.pictures[0][1].tobytes()
    rows = grid.rows()
    assert rows[0]["psnr"] == [float("inf")] * 2 and rows[1]["tokens_saved"] > 0.4
    assert rows[1]["speedup"]["n"] == 2 and rows[1]["flops"] < rows[1]["flops_unpatched"] == rows[0]["flops"]
    check_schema(grid.to_dict())
    assert "todo" in grid.table() and sum(told[-1] is message for message in told) >= 1
    assert grid.picture().width > 3 * 64


def test_a_protected_region(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Painted tokens are computed and marked, others are not; and the Python has the mask in it."""
    painted = np.zeros((64, 64), dtype=np.uint8)
    painted[:, :16] = 255
    side = side_of("tome:ratio=0.5", Image.fromarray(painted))
    found = run(model, Setup(**(vars(SETUP) | {"repeat": 0})), b=side)
    assert found.b.report is not None and found.b.report.token_map is not None
    states = found.b.report.token_map[:, :, 0]
    cut = states.shape[-1] // 4
    assert (states[..., :cut] == 5).all() and not (states[..., cut:] == 5).any() and (states[..., cut:] == 1).any()
    assert side.name == "tome ratio 0.5 protected" and found.b.side.to_dict()["protected"] == 0.25
    assert found.b.picture.tobytes() != run(model, found.setup, b=side_of("tome:ratio=0.5")).b.picture.tobytes()
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(export.code(found), "exported.py", "exec"), names)
    assert names["b"].tobytes() == found.b.picture.tobytes()


@pytest.mark.slow
def test_a_search_and_one_that_is_stopped(model: Model) -> None:
    setup = Setup("toy-sd", "-", 0, 12, 64, 64, 3.0)
    asked: Any = (model, setup, ["a red star", "a blue ring", "a green circle"], tuning.GOALS[0], 1.2, ["fora"], 3)
    told: list[Tick] = []
    found = tuning.search(*asked, told.append, threading.Event())
    assert found.status == "complete" and found.config.name == "fora" and told[-1].share <= 1
    assert found.policy.method["_type"] == "fora"

    stop = threading.Event()

    def tell(tick: Tick) -> None:
        if tick.share > 0.3:  # something is found by then
            stop.set()

    found = tuning.search(*asked, tell, stop)
    assert found.status == "interrupted"
    stop.set()
    with pytest.raises(Stopped):
        tuning.search(*asked, tell, stop)
    assert not any("_tokred" in module.__dict__ for module in model.denoiser.modules())


def test_a_model_that_is_not_there_is_said() -> None:
    models = Models(("toy-sd", "./nothing"))
    with pytest.raises(tokred.ConfigError, match="does not exist"):
        models.get("./nothing")
    assert models.state("./nothing")[0] == "failed" and "does not exist" in models.state("./nothing")[1]
    assert models.state("toy-sd")[0] == "waiting"
    with pytest.raises(tokred.ConfigError, match="no model 'x'"):
        models.start("x")
    started = time.monotonic()
    models.start("toy-sd")  # in the background
    assert time.monotonic() - started < 1 and models.state("toy-sd")[0] in ("loading", "ready")
    assert "tome" in models.get("toy-sd").works and "ras" in models.get("toy-sd").refused

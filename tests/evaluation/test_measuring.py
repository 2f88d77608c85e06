"""From pictures to a result: every figure is that of the pictures on disk, and what they say together follows."""

from __future__ import annotations

import html
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import diffusion_tokred as tokred
from diffusion_tokred.evaluation import metrics, statistics
from diffusion_tokred.evaluation.clip import Clip
from diffusion_tokred.evaluation.evaluate import made_before, write_report
from diffusion_tokred.evaluation.generation import generate
from diffusion_tokred.evaluation.judges import Judges, drawn, references
from diffusion_tokred.evaluation.measuring import Claim, measure, read_items
from diffusion_tokred.evaluation.prompts import PromptSet
from diffusion_tokred.evaluation.variants import Variant
from diffusion_tokred.methods import make_config
from diffusion_tokred.zoo import scenes
from tests.evaluation import toys

PROMPTS = PromptSet("three", ("a red star", "a blue ring", "a red ring"))
VARIANTS = (
    Variant("unpatched"),
    Variant("tome", make_config("tome", ratio=0.5)),
    Variant("steps-2", call={"num_inference_steps": 2}, anchor="steps"),
    Variant("numerics", anchor="numerics"),
)
TOY = Judges()  # the embedded toy-clip, whatever else this machine has


@pytest.fixture(scope="module")
def drawn_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    generate(toys.sd(), PROMPTS, VARIANTS, out, repeats=2, call={"num_inference_steps": 4})
    return out


@pytest.fixture
def run(drawn_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(drawn_run, tmp_path / "run"))


def variant(data: dict[str, Any], name: str) -> dict[str, Any]:
    return next(v for v in data["variants"] if v["name"] == name)


def test_every_figure_is_that_of_the_files(run: Path) -> None:
    data = measure(run, judges=TOY)
    assert json.loads((run / "result.json").read_text()) == data and data["status"] == "complete"
    items = read_items(run)
    assert len(items) == 4 * 3 * 2
    clip = Clip()
    base = {(i["index"], i["repeat"]): run / i["file"] for i in items if i["variant"] == "unpatched"}
    for item in items:
        picture = Image.open(run / item["file"])
        values = torch.from_numpy(np.array(picture)).movedim(-1, 0)[None]
        assert item["prompt"] == PROMPTS.texts[item["index"]] and picture.text["prompt"] == item["prompt"]
        assert item["scores"]["toy_clip_score"] == pytest.approx(clip.score(values, [item["prompt"]]).item(), abs=1e-4)
        if item["variant"] == "unpatched":
            assert item["metrics"] == {}
            continue
        psnr = metrics.psnr(Image.open(base[item["index"], item["repeat"]]), picture)
        assert item["metrics"]["psnr"] == (None if math.isinf(psnr) else pytest.approx(psnr, abs=1e-9))
    for name in ("tome", "steps-2"):
        mine = [i for i in items if i["variant"] == name]
        values = [i["metrics"]["psnr"] for i in mine]
        entry = variant(data, name)["paired"]["psnr"]
        assert entry["mean"] == pytest.approx(np.mean(values), abs=1e-9) and entry["n"] == 6 and entry["prompts"] == 3
        assert entry["worst5"] == pytest.approx(min(values)) and entry["better"] == "higher"
        scores = [i["scores"]["toy_clip_score"] for i in mine]
        before = [i["scores"]["toy_clip_score"] for i in items if i["variant"] == "unpatched"]
        gap = variant(data, name)["change"]["toy_clip_score"]
        assert gap["mean"] == pytest.approx(np.mean(np.subtract(scores, before)))
        assert gap["p"] == statistics.sign_flip(list(np.subtract(scores, before)), [0, 1, 2] * 2)


def test_what_is_written_says_what_it_is(run: Path) -> None:
    data = measure(run, judges=TOY)
    assert data["schema"] == "tokred.result/1" and data["kind"] == "evaluate"
    assert data["prompts"] | {"n": 3, "unique": 3, "measured": 3, "repeats": 2} == data["prompts"]
    unpatched, tome = variant(data, "unpatched"), variant(data, "tome")
    assert unpatched["paired"] == unpatched["change"] == {} and unpatched["reduction"] is None
    assert tome["reduction"]["config"]["ratio"] == 0.5 and tome["reduction"]["seed"] == 0 and tome["steps"] == 4
    assert variant(data, "steps-2")["steps"] == 2 and variant(data, "steps-2")["anchor"] == "steps"
    assert {"toy_fid_to_unpatched", "toy_kid_to_unpatched"} == set(tome["distribution"])
    keys = {key for v in data["variants"] for part in ("paired", "scores", "distribution") for key in v[part]}
    assert all(key.startswith("toy_") for key in keys if "clip" in key or "fid" in key or "kid" in key)
    assert not any(key.startswith("fact_") for key in keys)  # the prompts are no captions of the embedded world
    # Another attention backend rounds differently, and no more than that.
    numerics = variant(data, "numerics")["paired"]["psnr"]
    assert numerics["identical"] == 6 or numerics["mean"] > 60


def test_facts_of_embedded_scenes(tmp_path: Path) -> None:
    """Pictures drawn by rule have every fact right, and a swapped prompt is found out."""
    wanted = scenes.evaluation_scenes(3)
    generate(toys.sd(), PromptSet("scenes", tuple(map(scenes.caption, wanted))), VARIANTS[:2], tmp_path / "run",
             call={"num_inference_steps": 1, "width": 128, "height": 128})  # fmt: skip
    repaint(tmp_path / "run", "unpatched", wanted)
    repaint(tmp_path / "run", "tome", wanted[1:] + wanted[:1])
    data = measure(tmp_path / "run", judges=TOY, reference="drawn")
    right, wrong = variant(data, "unpatched")["scores"], variant(data, "tome")["scores"]
    assert all(entry["mean"] == 1.0 for name, entry in right.items() if name.startswith("fact_"))
    assert wrong["fact_color"]["mean"] < 0.7 and wrong["toy_clip_score"]["mean"] < right["toy_clip_score"]["mean"]
    found = variant(data, "unpatched")["distribution"]["toy_fid"]
    assert found["n"] == 3 and found["n_reference"] == 1024 and "relative only" in found["label"]


def repaint(out: Path, name: str, pictures: list[scenes.Scene]) -> None:
    """Other pictures in place of the run's, listed as if it had drawn them."""
    import hashlib

    manifest = next((out / "images" / name).glob("manifest-*.jsonl"))
    lines = []
    for line in map(json.loads, manifest.read_text().splitlines()):
        file = out / line["file"]
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        for key, text in Image.open(file).text.items():
            info.add_text(key, text)
        pixels = (scenes.render([pictures[line["index"]]], 128)[0] * 255).round().byte().movedim(0, -1).numpy()
        Image.fromarray(pixels).save(file, pnginfo=info)
        data = file.read_bytes()
        lines.append(json.dumps(line | {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}))
    manifest.write_text("\n".join(lines) + "\n")


def test_a_run_that_is_not_finished_is_measured_where_all_have_pictures(run: Path) -> None:
    lost = next((run / "images" / "tome").glob("000001-0-*.png"))
    lost.unlink()
    data = measure(run, judges=TOY)
    assert data["status"] == "partial" and data["missing"] == {"tome": 1}
    assert all(v["scores"]["toy_clip_score"]["n"] == 5 for v in data["variants"])
    assert len(read_items(run)) == 4 * 5


def test_a_claim_is_tested_against_what_it_names(run: Path) -> None:
    data = measure(run, judges=TOY, claim=Claim("steps-2", {"psnr": 3.0, "toy_clip_score": 0.5}))
    assert variant(data, "unpatched")["verdict"] is None and variant(data, "steps-2")["verdict"] is None
    verdict = variant(data, "tome")["verdict"]
    assert verdict["psnr"]["margin"] == 3.0 and verdict["psnr"]["against"] == "steps-2"
    assert not verdict["psnr"]["passed"] and "too few" in verdict["psnr"]["statement"]
    items = read_items(run)
    psnr = {name: [i["metrics"]["psnr"] for i in items if i["variant"] == name] for name in ("tome", "steps-2")}
    gap = np.mean(np.subtract(psnr["tome"], psnr["steps-2"]))
    assert verdict["psnr"]["difference"]["mean"] == pytest.approx(gap)


def test_a_timing_becomes_costs(run: Path) -> None:
    entry = {"median": 2.0, "low": 1.9, "high": 2.1, "n": 3}
    timing = {
        "rows": [{"name": "tome", "seconds": entry, "speedup": entry, "flops": 5, "flops_unpatched": 10,
                  "tokens_saved": 0.5, "seconds_raw": [2.0]}],
        "env": {"device": "cpu"}, "created": "now", "intervals": {"unpatched_again": entry},
    }  # fmt: skip
    data = measure(run, judges=TOY, timing=timing)
    assert variant(data, "tome")["cost"]["speedup"] == entry and "seconds_raw" not in variant(data, "tome")["cost"]
    assert variant(data, "unpatched")["cost"] is None


def test_what_a_reader_must_know_is_in_the_notes(run: Path) -> None:
    """And so in the report, as Markdown and as a page."""
    env = {"device": "cpu: some", "threads": 2, "cpus": 8, "load": 0.25, "torch": "2.x"}
    timing = {"rows": [], "env": env, "created": "2026-01-01", "intervals": {}}
    judges = Judges(missing=("inception", "clip"))
    data = measure(run, judges=judges, timing=timing, protocol="scenes", departures=("limit 3 instead of 64",))
    told = {
        "missing": "FID's Inception-v3 (--inception-weights); a CLIPModel with its processor (--clip-model)",
        "scales": "MS-SSIM: 2 of 5 scales, their weights scaled to a sum of 1",
        "few": "3 different prompts, fewer than 20: the intervals are too narrow",
        "protocol": "Not as in scenes: limit 3 instead of 64",
        "timing": "Timed on cpu: some with 2 threads (pictures are drawn with 1), torch 2.x, load 0.2 on 8 CPUs before",
    }
    write_report(run, data)
    page = html.unescape((run / "report.html").read_text())
    for text in told.values():
        assert sum(text in note for note in data["notes"]) == 1
        assert text in (run / "report.md").read_text() and text in page
    quiet = measure(run, judges=TOY)["notes"]
    assert not any(word in note for note in quiet for word in ("Not here", "Not as in", "Timed on"))
    assert made_before(run)[2] == {"protocol": None, "departures": ()}


def test_the_embedded_judge_is_named_with_its_hash(run: Path) -> None:
    judged = measure(run, judges=TOY)["judges"]["clip"]
    assert judged == {"name": "clip", "label": "toy-clip", "sha256": Clip().weights_sha256}
    assert len(judged["sha256"]) == 64


def test_scores_made_elsewhere(run: Path) -> None:
    files = sorted(str(f.relative_to(run)) for f in (run / "images").rglob("*.png"))
    scored = {name: 0.5 if "tome" in name else 0.25 for name in files[1:]}
    lines = [json.dumps({"file": name, "image_reward": value}) for name, value in scored.items()]
    (run / "scores.jsonl").write_text("\n".join(lines) + "\n")
    data = measure(run, judges=TOY)
    gap = variant(data, "tome")["change"]["image_reward"]
    assert gap["mean"] == 0.25 and gap["n"] + gap.get("missing", 0) == 6 and gap["better"] == "higher"
    assert sum(v["scores"]["image_reward"].get("missing", 0) for v in data["variants"]) == 1
    for line, says in (
        ('{"file": "images/x.png", "a": 1}', "line 1: images/x.png is no picture"),
        ('{"a": 1}', "line 1: not"),
        (f'{{"file": "{files[0]}", "a": NaN}}', "a is not a finite number"),
    ):
        (run / "scores.jsonl").write_text(line + "\n")
        with pytest.raises(tokred.ConfigError, match=says):
            measure(run, judges=TOY)


def test_preference_models_score_beside_clip(run: Path) -> None:
    """Any CLIPModel does; here toy-clip itself, so the two scores are the same."""
    from diffusion_tokred import zoo

    judges = Judges.find({"clip": "toy", "pickscore": zoo.path("toy-clip")})
    data = measure(run, judges=judges)
    scores = variant(data, "tome")["scores"]
    assert scores["pick_score"] == scores["toy_clip_score"] and "hps_score" not in scores
    assert data["judges"]["pickscore"]["sha256"] == Clip().weights_sha256


def test_refusals(run: Path, tmp_path: Path) -> None:
    with pytest.raises(tokred.ConfigError, match="no run in"):
        measure(tmp_path / "nothing")
    with pytest.raises(tokred.ConfigError, match="held against 'steps-3'"):
        measure(run, judges=TOY, claim=Claim("steps-3"))
    with pytest.raises(tokred.ConfigError, match="margin for lpips_alex, which is not measured here"):
        measure(run, judges=TOY, claim=Claim("steps-2", {"lpips_alex": 0.1}))
    np.savez(tmp_path / "other.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(tokred.ConfigError, match="load the weights"):
        measure(run, judges=TOY, reference=tmp_path / "other.npz")
    damaged = next((run / "images" / "tome").glob("*.png"))
    data = bytearray(damaged.read_bytes())
    data[-20] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(tokred.ConfigError, match=f"{damaged.name} is damaged"):
        measure(run, judges=TOY)


def test_drawn_references_are_none_of_the_evaluation_scenes() -> None:
    pictures = torch.cat(list(drawn(32, count=100, batch=64)))
    assert pictures.shape == (100, 3, 32, 32) and pictures.dtype == torch.uint8
    evaluated = (scenes.render(scenes.evaluation_scenes(512), 32) * 255).round().byte().flatten(1)
    assert not (pictures.flatten(1)[:, None] == evaluated[None]).all(-1).any()
    found, notes = references(None, (Clip(),), 32)
    assert found == [None] and notes == []

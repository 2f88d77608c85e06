"""Tables, plots and the page, from a result that is made up here: every figure in it is fake."""

from __future__ import annotations

import copy
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from diffusion_tokred.errors import ConfigError
from diffusion_tokred.evaluation import html as page
from diffusion_tokred.evaluation import layout, plots, report
from diffusion_tokred.evaluation.evaluate import write_report
from diffusion_tokred.evaluation.results import plain, prompts_of, result, to_json
from diffusion_tokred.zoo import scenes

HOSTILE = [
    '<script>alert("x")</script><img src=x onerror=alert(1)>',
    "a | b | c `code` *bold* [click](http://evil.example) ![pic](http://evil.example/x.png)",
    "\u202egnp.elif\u202c & \"quotes\" 'and' </td></table>",
]
ENV = {
    "diffusion_tokred": "0",
    "torch": "0.fake",
    "diffusers": "0.fake",
    "device": "cpu: fake",
    "threads": 1,
    "load": 0.1,
}
PIPELINE = {"model": "fake-model", "steps": 25, "guidance": 3.0, "width": 128, "height": 128, "dtype": "float32"}
TONES = {"tome": 1.0, "todo": 0.6}


def around(middle: float, half: float, better: str, **more: Any) -> dict[str, Any]:
    return {"mean": middle, "low": middle - half, "high": middle + half, "n": 64, "better": better} | more


def entry(name: str, seconds: float, harm: float, anchor: str | None = None, **more: Any) -> dict[str, Any]:
    """A variant whose made-up figures follow from how much harm it does."""
    cost = {
        "seconds": {"median": seconds, "low": seconds * 0.97, "high": seconds * 1.04, "n": 10},
        "speedup": {"median": 2 / seconds, "low": 1.94 / seconds, "high": 2.05 / seconds, "n": 10},
        "flops": None if anchor else int(1e12 * seconds / 2),
        "flops_unpatched": None if anchor else int(1e12),
    }
    paired = {
        "psnr": around(34 - 20 * harm, 0.8, "higher", worst5=25 - 20 * harm, identical=0),
        "ssim": around(1 - 0.4 * harm, 0.012, "higher", worst5=0.9 - 0.6 * harm),
        "toy_clip_distance": around(0.3 * harm, 0.01, "lower", worst5=0.5 * harm),
    }
    made = {"name": name, "anchor": anchor, "reduction": None, "steps": 25, "paired": paired, "cost": cost}
    if anchor == "numerics":
        paired = {"psnr": around(61, 2, "higher"), "ssim": around(0.9999, 0.00004, "higher"),
                  "toy_clip_distance": around(0.0004, 0.0001, "lower")}  # fmt: skip
        made["paired"] = paired
    made |= {"scores": {"fact_relation": around(0.9 - 0.3 * harm, 0.04, "higher")}}
    made["change"] = {"fact_relation": around(-0.3 * harm, 0.03, "higher", p=0.01, win_rate=0.4)}
    label = "FID (n<2048, relative only)"
    fid = {"value": 20 + 60 * harm, "low": 18 + 60 * harm, "high": 23 + 60 * harm, "n": 64, "n_reference": 5000}
    fid |= {"reference": "drawn scenes", "extractor": "toy-clip", "resize": "none", "better": "lower", "label": label}
    return made | {"distribution": {"toy_fid": fid}, "verdict": None} | more


def fake(**changes: Any) -> dict[str, Any]:
    variants = [
        {"name": "unpatched", "anchor": None, "reduction": None, "steps": 25, "paired": None, "verdict": None,
         "scores": {"fact_relation": around(0.91, 0.03, "higher")}, "cost": entry("", 2.0, 0)["cost"]},
    ]  # fmt: skip
    for method, tone in TONES.items():
        for ratio in (0.25, 0.5, 0.75):
            config = {"_type": "ToMeConfig", "_version": 1, "ratio": ratio, "levels": [0]}
            reduction = {"method": method, "config": config, "policy": None, "seed": 0}
            variants.append(entry(f"{method}-{ratio}", 2 - 1.2 * ratio * tone, ratio * tone**2, reduction=reduction))
    verdict = {"margin": 0.01, "against": "steps-22", "statement": "not shown, it may be worse: fake", "passed": False}
    variants[1]["verdict"] = {"ssim": verdict | {"passed": True}, "psnr": verdict}
    variants += [entry("numerics", 2.0, 0.0, "numerics"), entry("seed", 2.0, 1.1, "seed")]
    variants += [entry(f"steps-{n}", 2 * n / 25, 1 - n / 27, "steps", steps=n) for n in (12, 16, 20, 22)]
    parts = {"env": ENV, "pipeline": PIPELINE, "prompts": {"name": "fake"} | prompts_of(["a", "b"]), "protocol": None}
    made = result("evaluate", **parts, reduction=None, rows=[], intervals={}, failures=[], variants=variants)
    return made | plain(changes)


def run_folder(folder: Path, names: list[str], count: int = 6, side: int = 128) -> list[dict[str, Any]]:
    """A run's pictures and items: of each variant, picture i is blurred the more the larger i is."""
    drawn = scenes.render(scenes.evaluation_scenes(count), side).mul(255).byte().permute(0, 2, 3, 1).numpy()
    items = []
    for name in names:
        (folder / "images" / name).mkdir(parents=True)
        for i, array in enumerate(drawn):
            harm = 0 if name == "unpatched" else 0.5 * i
            file = f"images/{name}/{i:06d}-0-abcdef01.png"
            Image.fromarray(array).filter(ImageFilter.GaussianBlur(harm)).save(folder / file)
            prompt = HOSTILE[i] if i < len(HOSTILE) else scenes.evaluation_prompts(count)[i]
            item = {"variant": name, "index": i, "repeat": 0, "prompt": prompt, "seed": i, "file": file}
            item |= {"metrics": {"psnr": None if harm == 0 else 40 - 4 * harm, "ssim": 1 - 0.1 * harm}, "scores": {}}
            items.append(item | {"why_null": {"psnr": "equal pictures: infinite"} if harm == 0 else {}})
    return items


class Reader(HTMLParser):
    """Checks that tags are closed in order, and keeps what is of interest."""

    VOID = ("meta", "img", "br", "source")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def rows_of(text: str, title: str) -> list[list[str]]:
    """Cells of the Markdown table under a heading, without the ruler."""
    part = text.split(f"## {title}\n", 1)[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in [lines[0], *lines[2:]]]


def test_markdown_has_the_figures_with_intervals_and_the_anchors_apart() -> None:
    text = report.markdown(fake())
    head, *rows = rows_of(text, "Distance to the unpatched pictures, and cost")
    assert head == ["variant", "seconds ↓", "speed-up ↑", "FLOPs", "PSNR (dB) ↑", "SSIM ↑", "toy-CLIP distance ↓"]
    assert [row[0] for row in rows] == ["unpatched", *(f"{m}-{r}" for m in TONES for r in (0.25, 0.5, 0.75))]
    assert rows[0][4:] == ["–"] * 3
    assert rows[2][1:] == ["1.400 [1.358, 1.456]", "1.429x [1.386, 1.464]", "70%", "24.00 [23.20, 24.80]",
                           "0.800 [0.788, 0.812]", "0.150 [0.140, 0.160]"]  # fmt: skip
    assert [row[0] for row in rows_of(text, "Anchors")[1:]] == [
        "numerics",
        "seed",
        *(f"steps-{n}" for n in (12, 16, 20, 22)),
    ]
    worst = {row[0]: row[1:] for row in rows_of(text, "The worst 5 % of the pictures")[1:]}
    assert worst["tome-0.5"] == ["15.00", "0.600", "0.250"]
    assert "a FLOP ratio is not a speed-up" in text and "mean nothing elsewhere" in text


def test_fid_stands_with_all_it_depends_on() -> None:
    head, *rows = rows_of(report.markdown(fake()), "Distributions")
    name = "toy FID (n\\<2048, relative only) ↓"
    assert rows[0] == ["tome-0.25", name, "35.0 [33.0, 38.0]", "64", "5000", "drawn scenes", "toy-clip", "none"]
    assert "n of reference" in head and "compare it at equal n only" in report.markdown(fake())


def test_p_values_are_corrected_over_the_variants_without_the_anchors() -> None:
    rows = {row[0]: row for row in rows_of(report.markdown(fake()), "Change of scores")[1:]}
    assert rows["tome-0.25"][3] == "0.060"  # 6 tests of 0.01
    assert (
        rows["steps-12"][3] == "–" and rows["tome-0.5"][2] == "-0.150 [-0.180, -0.120]" and rows["tome-0.5"][4] == "40%"
    )


def test_verdicts_and_settings_are_tables() -> None:
    text = report.markdown(fake())
    assert [row[1:5] for row in rows_of(text, "No worse than the control?")[1:]] == [
        ["SSIM", "shown", "0.01", "steps-22"], ["PSNR (dB)", "not shown", "0.01", "steps-22"],
    ]  # fmt: skip
    assert "share the 5 %" not in text
    made = fake()
    for verdict in made["variants"][1]["verdict"].values():
        verdict["level"] = 0.975
    assert "These 2 verdicts share the 5 %: each takes the 97.5 % interval." in report.markdown(made)
    settings = {row[0]: row[1:] for row in rows_of(text, "Settings")[1:]}
    assert settings["tome-0.25"] == ["tome ratio=0.25", "25", "–"]  # levels [0] are the default
    assert settings["steps-12"] == ["none", "12", "steps"] and settings["unpatched"][0] == "none"


@pytest.mark.parametrize(
    ("value", "width", "shown"),
    [(24.3123, 0.4, "24.31"), (0.9123, 0.0041, "0.9123"), (1234.5, 60, "1234"), (0.0, None, "0"), (0.5, None, "0.500"),
     (None, 1.0, "–"), (1e-5, None, "0.000010"), (float("nan"), None, "–"), (7.0, 0.0, "7.00"), (0.3, -1e-12, "0.300"),
     (2.0, float("inf"), "2.00"), (2.0, float("nan"), "2.00"), (2.0, 5e-324, "2.000000")],
)  # fmt: skip
def test_digits_follow_the_interval(value: Any, width: Any, shown: str) -> None:
    assert layout.number(value, width) == shown


def test_identical_pictures_are_counted_not_averaged() -> None:
    assert layout.figure({"mean": None, "low": None, "high": None, "identical": 64}) == "identical"
    assert layout.figure({"mean": 50.0, "low": 48.0, "high": 52.0, "identical": 3}) == "50.0 [48.0, 52.0] (3 identical)"
    assert layout.figure({"mean": 50.0, "low": None, "high": None}) == "50.0"


def test_names_from_outside_stay_text_in_markdown() -> None:
    made = fake(failures=HOSTILE)
    made["pipeline"] |= {"model": HOSTILE[1]}
    text = report.markdown(made)
    assert "3 failed" in text and "\n* \\<script>" in text
    assert not re.search(r"(?<!\\)<", text) and "](" not in text
    assert all(len(row) == 7 for row in rows_of(text, "Distance to the unpatched pictures, and cost"))


def test_what_a_reader_must_know_is_said() -> None:
    text = report.markdown(fake())
    assert "busy" not in text and "missing" not in text and "Claim" not in text
    claim = {"against": "steps-22", "margins": {"ssim": 0.01}, "stated": "after pictures were drawn"}
    timing = {"env": {"cpus": 2, "load": 7.5}, "created": ""}
    text = report.markdown(fake(claim=claim, missing={"seed": 3}, timing=timing, notes=["a note of the run"]))
    assert "Claim: no worse than steps-22; margins SSIM 0.01; stated after pictures were drawn." in text
    assert "seed: 3 pictures are missing" in text and "load 7.5" in text and "a note of the run" in text


def test_only_results_of_evaluate_are_taken(tmp_path: Path) -> None:
    for wrong in ({"schema": "tokred.result/1", "kind": "compare"}, {}, [], {**fake(), "variants": []}):
        for call in (report.markdown, report.tables, plots.panels, lambda r: report.compare(r, r)):
            with pytest.raises(ConfigError, match="result file"):
                call(wrong)  # type: ignore[operator]
    with pytest.raises(ConfigError, match="result file"):
        page.html({}, [], tmp_path, tmp_path / "report.html")


def test_the_plot_draws_what_the_result_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    curves, lines = [], []
    real = Axes.errorbar, Axes.axhline

    def errorbar(self: Any, x: Any, y: Any, *args: Any, **kwargs: Any) -> Any:
        curves.append((kwargs["label"], list(x), list(y), kwargs["yerr"]))
        return real[0](self, x, y, *args, **kwargs)

    def axhline(self: Any, y: Any, *args: Any, **kwargs: Any) -> Any:
        lines.append((kwargs["label"], y))
        return real[1](self, y, *args, **kwargs)

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    monkeypatch.setattr(Axes, "axhline", axhline)
    assert plots.panels(fake()) == ["psnr", "ssim", "toy_clip_distance", "fact_relation"]
    plots.quality_plot(fake(), tmp_path / "deep" / "plot.png", ["ssim"])
    found = {name: (x, y, arms) for name, x, y, arms in curves}
    assert set(found) == {"tome", "todo", "fewer steps, unpatched"}
    assert found["tome"][0] == pytest.approx([1.1, 1.4, 1.7]) and found["tome"][1] == pytest.approx([0.7, 0.8, 0.9])
    assert np.allclose(found["tome"][2], 0.012)
    assert found["fewer steps, unpatched"][0] == pytest.approx([0.96, 1.28, 1.6, 1.76])  # in order of time: one curve
    assert lines == [("numerics floor", 0.9999), ("seed to seed", pytest.approx(0.56))]
    lines.clear()
    plots.quality_plot(fake(), io.BytesIO(), ["psnr"])
    assert [name for name, _ in lines] == ["seed to seed"]  # 61 dB would squeeze the points: it stands in words
    picture = Image.open(tmp_path / "deep" / "plot.png")
    assert picture.format == "PNG" and min(picture.size) > 400
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["plot.png"]


@pytest.mark.parametrize("metrics", [["psnr", "fact_relation"], ["toy_clip_distance"]])
def test_nothing_in_the_plot_covers_anything(metrics: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes of the names, taken from the drawn figure, are apart from each other and the markers."""
    seen: list[Any] = []
    real = plots._name_points

    def watch(axes: Any, points: Any) -> None:
        real(axes, points)
        renderer = axes.figure.canvas.get_renderer()
        names = [plots._written(text, renderer) for text in axes.texts if not text.get_text().startswith("off")]
        assert len(names) == sum(bool(point.name) for point, _ in points) > 9
        for i, box in enumerate(names):
            assert not any(box.padded(-0.5).overlaps(other) for other in names[:i])
            for point, _ in points:
                x, y = axes.transData.transform((point.x[0], point.y[0]))
                assert not box.padded(-1).contains(x, y)
        seen.append(axes)

    monkeypatch.setattr(plots, "_name_points", watch)
    plots.quality_plot(fake(), io.BytesIO(), metrics)
    figure = seen[0].figure
    paper, renderer = figure.bbox, figure.canvas.get_renderer()
    parts = [*figure.legends, *(axes.title for axes in seen), *(axes.xaxis.label for axes in seen), *seen]
    boxes = [part.get_window_extent(renderer) for part in parts]
    assert all(min(b.x0, b.y0) >= 0 and b.x1 <= paper.width and b.y1 <= paper.height for b in boxes)
    assert not any(boxes[0].overlaps(other) for other in boxes[1:])
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words[:3] == ["tome", "todo", "fewer steps, unpatched"] and "seed to seed" in words


def test_many_families_can_be_told_apart_and_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    many, seen = fake(), []
    one = next(v for v in many["variants"] if v["name"].startswith("tome"))
    many["variants"] += [copy.deepcopy(one) | {"name": f"{letter * 40}-0.5"} for letter in "abcdefghijklmno"]
    monkeypatch.setattr(plots, "_name_points", lambda axes, points: seen.append(axes))
    plots.quality_plot(many, io.BytesIO(), ["psnr", "ssim"])
    figure, axes = seen[0].figure, seen[0]
    box = figure.legends[0].get_window_extent()
    assert len(figure.legends) == 1 and box.x0 >= 0 and box.x1 <= figure.bbox.width
    marks = [(c.lines[0].get_color(), c.lines[0].get_marker()) for c in axes.containers]
    assert len(marks) == len(set(marks)) > 16


def test_without_times_the_variants_stand_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    untimed, seen = fake(), []
    for v in untimed["variants"]:
        v["cost"] = None
    monkeypatch.setattr(plots, "_name_points", lambda axes, points: seen.append((axes, points)))
    plots.quality_plot(untimed, tmp_path / "plot.png", ["ssim"])
    (axes, points), names = seen[0], [v["name"] for v in untimed["variants"]]
    assert points == [] and axes.get_xlabel() == "nothing was timed"
    where = {text.get_text(): x for x, text in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)}
    assert where == {name: i for i, name in enumerate(names) if name not in ("unpatched", "numerics", "seed")}
    report.markdown(untimed)


def test_what_cannot_be_plotted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to plot for cmmd"):
        plots.quality_plot(fake(), tmp_path / "plot.png", ["cmmd"])
    bare = fake(variants=[{"name": "unpatched", "anchor": None}])
    with pytest.raises(ConfigError, match="neither distances nor scores"):
        plots.quality_plot(bare, tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())
    page.html(bare, [], tmp_path, tmp_path / "report.html")
    timed = fake()
    del timed["variants"][0]["cost"]["seconds"]["median"]  # one that was not timed is left out, others stay
    plots.quality_plot(timed, tmp_path / "plot.png", ["ssim"])


def test_the_page_is_whole_safe_and_worst_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "panels", lambda result: ["ssim"])
    items = run_folder(tmp_path, ["unpatched", "tome-0.5", "seed"])
    made = fake(failures=HOSTILE)
    page.html(json.loads(to_json(made)), items, tmp_path, tmp_path / "report.html", pairs=4)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    reader = Reader(text)
    # Nothing is fetched, nothing runs.
    for tag, attrs in reader.tags:
        assert tag not in ("script", "link", "iframe", "object", "base", "form", "svg")
        assert not [name for name in attrs if name.startswith("on")]
        for name in ("src", "srcset"):
            assert (attrs.get(name) or "data:image/").startswith("data:image/")
        if "href" in attrs:
            assert (tmp_path / str(attrs["href"])).is_file()
    assert not re.search(r"url\(|@import|http", re.sub(r"http-equiv", "", text.replace("http://evil.example", "")))
    for prompt in HOSTILE:
        assert prompt in reader.text and prompt not in text.replace(HOSTILE[1], "")
    policy = next(attrs for tag, attrs in reader.tags if attrs.get("http-equiv"))["content"]
    assert policy is not None and "default-src 'none'" in policy
    # Picture 5 is blurred most: worst by SSIM. Anchors show fewer.
    first, second = text.split("<details")[1:]
    assert re.findall(r'href="images/tome-0.5/(\d+)', first) == ["000005", "000004", "000003", "000002"]
    assert re.findall(r'href="images/seed/(\d+)', second) == ["000005"] and "open" not in second[:10]
    assert [tag for tag, _ in reader.tags].count("picture") == 1 and "No plot" not in reader.text
    assert "worst SSIM first" in reader.text and "toy-CLIP distance" in reader.text


def test_a_report_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the plot, and what to install for it."""
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it raises ImportError
    items = run_folder(tmp_path, ["unpatched", "tome-0.5"], count=1, side=32)
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    write_report(tmp_path, fake())
    assert "tome-0.5" in (tmp_path / "report.md").read_text() and not (tmp_path / "plot.png").exists()
    text = Reader((tmp_path / "report.html").read_text()).text
    assert 'No plot: a plot needs matplotlib: pip install "diffusion-tokred[eval]"' in text and "tome-0.5" in text


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "panels", lambda result: [])


@pytest.mark.usefixtures("no_plots")
def test_embedded_pictures_are_the_files(tmp_path: Path) -> None:
    items = run_folder(tmp_path, ["unpatched", "tome-0.5"], count=3)
    page.html(fake(), items, tmp_path, tmp_path / "report.html", pairs=1, order="psnr")
    text = (tmp_path / "report.html").read_text().split("<details")[1]
    shown = [
        Image.open(io.BytesIO(__import__("base64").b64decode(raw))) for raw in re.findall(r"png;base64,([^\"]+)", text)
    ]
    a, b = (
        np.asarray(Image.open(tmp_path / f"images/{name}/000002-0-abcdef01.png")) for name in ("unpatched", "tome-0.5")
    )
    assert np.array_equal(np.asarray(shown[0]), a) and np.array_equal(np.asarray(shown[1]), b)
    gap, heat = np.abs(a.astype(float) - b).mean(2), np.asarray(shown[2]).astype(float).sum(2)
    assert np.corrcoef(gap.ravel(), heat.ravel())[0, 1] > 0.9  # brighter where they differ more
    large = page._embedded(Image.new("RGB", (1024, 512)))
    assert large.startswith("data:image/webp") and len(large) < 5000


@pytest.mark.usefixtures("no_plots")
def test_pictures_that_are_not_there_are_named(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    folder = tmp_path / "run"
    items = run_folder(folder, ["unpatched", "tome-0.5"], count=4)
    items[4]["file"] = "../secret.png"
    items[5]["file"], items[5]["failure"] = None, "black: <b>all</b> values are 0"
    (folder / items[6]["file"]).unlink()
    (folder / items[7]["file"]).write_bytes(b"no picture")
    page.html(fake(), items, folder, folder / "report.html")
    text = (folder / "report.html").read_text()
    for words in ("not in the run&#x27;s folder", "no picture was made", "is missing", "cannot be read"):
        assert words in text
    assert "failed: black: &lt;b&gt;all&lt;/b&gt; values are 0" in text
    assert "secret" not in text and text.count("not to be compared") == 4
    with pytest.raises(ConfigError, match="no picture has the metric 'lpips_alex'"):
        page.html(fake(), items, folder, folder / "report.html", order="lpips_alex")

"""The scorer reads drawn scenes without an error, and reports every deviation as what it is."""

import io
import random
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from diffusion_tokred.errors import ConfigError
from diffusion_tokred.evaluation import scenes as scorer
from diffusion_tokred.evaluation.generation import generate
from diffusion_tokred.evaluation.prompts import PromptSet
from diffusion_tokred.evaluation.variants import Variant
from diffusion_tokred.methods import CONFIGS, METHODS, RandomKeep, make_config, make_method
from diffusion_tokred.zoo import scenes

SCENES = [scenes.sample_scene(random.Random(f"scorer-{i}"), held_out=i % 4 == 0) for i in range(40)]


def noisy(pictures):
    return pictures + 0.1 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))


def blurred(pictures):
    at = torch.arange(-5, 6.0)
    kernel = torch.exp(-at.square() / (2 * 1.5**2))
    kernel = (kernel / kernel.sum())[None, None, :, None].repeat(3, 1, 1, 1)
    padded = F.pad(pictures, (5,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.mT, groups=3)


def jpeg(pictures):
    again = []
    for picture in pictures:
        file = io.BytesIO()
        Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy()).save(file, "JPEG", quality=60)
        again.append(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255)
    return torch.stack(again)


@pytest.mark.parametrize("size", [128, 256])
@pytest.mark.parametrize("spoil", [lambda p: p, noisy, blurred, jpeg], ids=["clean", "noise", "blur", "jpeg"])
def test_exact_on_drawn_scenes(size, spoil):
    readings = scorer.read(spoil(scenes.render(SCENES, size)).clamp(0, 1))
    scores = scorer.score(SCENES, readings)
    assert tuple(scores) == scorer.FACTS
    assert {fact: score.share for fact, score in scores.items()} == dict.fromkeys(scorer.FACTS, 1.0)
    assert scores["color"].total == sum(len(s.objects) for s in SCENES)
    assert scores["relation"].total == sum(s.relation is not None for s in SCENES)


def test_places_are_read():
    for scene, reading in zip(SCENES, scorer.read(scenes.render(SCENES, 128)), strict=True):
        for o in scene.objects:
            (seen,) = [s for s in reading.objects if s.color == o.color]
            assert abs(seen.x - o.x) < 0.02 and abs(seen.y - o.y) < 0.02


def wrong_color(scene):
    first = scene.objects[0]
    free = [c for c in scenes.COLORS if c not in {o.color for o in scene.objects}]
    return replace(scene, objects=(replace(first, color=free[0]), *scene.objects[1:]))


def wrong_shape(scene):
    first = scene.objects[0]
    other = scenes.SHAPES[(scenes.SHAPES.index(first.shape) + 1) % len(scenes.SHAPES)]
    return replace(scene, objects=(replace(first, shape=other), *scene.objects[1:]))


def wrong_size(scene):
    first = scene.objects[0]
    other = next(size for size in scenes.SIZES if size != first.size)
    return replace(scene, objects=(replace(first, size=other), *scene.objects[1:]))


def swapped(scene):
    a, b = scene.objects
    return replace(scene, objects=(replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)))


def one_lost(scene):
    return replace(scene, objects=scene.objects[:1])


def other_background(scene):
    names = list(scenes.BACKGROUNDS)
    return replace(scene, background=names[(names.index(scene.background) + 1) % len(names)])


def other_texture(scene):
    names = scenes.TEXTURES
    return replace(scene, texture=names[(names.index(scene.texture) + 1) % len(names)])


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (wrong_color, {"color", "shape", "size", "relation"}),
        (wrong_shape, {"shape"}),
        (wrong_size, {"size"}),
        (swapped, {"relation"}),
        (one_lost, {"color", "shape", "size", "count", "relation"}),
        (other_background, {"background"}),
        (other_texture, {"texture"}),
    ],
)
def test_each_mistake_is_named(change, facts):
    """A picture of another scene is wrong in just the facts in which the scenes differ."""
    pairs = [scene for scene in SCENES if scene.relation is not None][:20]
    readings = scorer.read(scenes.render([change(scene) for scene in pairs], 128))
    for scene, reading in zip(pairs, readings, strict=True):
        verdicts = scorer.check(scene, reading)
        assert {fact for fact in verdicts if not all(verdicts[fact])} == facts


def test_confusion_table():
    pairs = [scene for scene in SCENES if scene.relation is not None][:20]
    table = scorer.confusion(pairs, scorer.read(scenes.render([wrong_shape(s) for s in pairs], 128)), "shape")
    for asked, seen in table.items():
        after = scenes.SHAPES[(scenes.SHAPES.index(asked) + 1) % len(scenes.SHAPES)]
        firsts = sum(s.objects[0].shape == asked for s in pairs)
        seconds = sum(s.objects[1].shape == asked for s in pairs)
        assert seen == {k: n for k, n in ((after, firsts), (asked, seconds)) if n}
    lost = scorer.confusion(pairs, scorer.read(scenes.render([one_lost(s) for s in pairs], 128)), "relation")
    assert all(set(seen) == {"none"} for seen in lost.values())
    with pytest.raises(ValueError, match="shape, size, relation"):
        scorer.confusion(pairs, [], "colour")


def test_areas_of_the_shapes():
    side = (torch.arange(1500) + 0.5) / 1500 * 3 - 1.5
    y, x = torch.meshgrid(side, side, indexing="ij")
    for shape in scenes.SHAPES:
        area = (scenes.distance(shape, x, y) < 0).float().mean().item() * 9
        assert scorer.AREAS[shape] == pytest.approx(area, rel=0.01)


def test_a_blot_has_no_shape():
    picture = torch.full((1, 3, 128, 128), 0.96)
    picture[0, :, 60:68, 10:118] = torch.tensor(scenes.COLORS["red"])[:, None, None]
    (reading,) = scorer.read(picture)
    assert [(seen.color, seen.shape) for seen in reading.objects] == [("red", None)]


def test_a_picture_full_of_one_color_is_read():
    (reading,) = scorer.read(torch.tensor(scenes.COLORS["blue"])[None, :, None, None].expand(1, 3, 64, 64))
    assert [seen.color for seen in reading.objects] == ["blue"]


def test_wilson_interval():
    """Newcombe 1998, table I, method 3: 81 of 263 gives 0.2553 to 0.3662, 0 of 20 gives 0 to 0.1611."""
    score = scorer.wilson(81, 263, 263)
    assert (score.low, score.high) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))
    assert scorer.wilson(0, 20, 20).high == pytest.approx(0.1611, abs=5e-5)
    assert scorer.wilson(0, 20, 20).low == 0 and scorer.wilson(20, 20, 20).high == 1
    # Two objects a picture: as many items, half as many trials, a wider interval.
    assert scorer.wilson(30, 40, 20).low < scorer.wilson(30, 40, 40).low
    assert np.isnan(scorer.wilson(0, 0, 0).share)


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (torch.zeros(3, 64, 64), "shape"),
        (torch.zeros(1, 3, 64, 32), "square"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "8-bit"),
        (torch.full((1, 3, 64, 64), 2.0), "clamp"),
    ],
)
def test_other_pictures_are_refused(pictures, message):
    with pytest.raises(ValueError, match=message):
        scorer.read(pictures)


def test_counts_must_agree():
    with pytest.raises(ValueError, match="40 scenes and 0 readings"):
        scorer.score(SCENES, [])


@pytest.fixture
def score_zoo(monkeypatch):
    """What is in scripts/score_zoo.py; the method that it registers goes away again."""
    for table in (CONFIGS, METHODS):
        monkeypatch.setitem(table, "broken", None)
    return runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "score_zoo.py"))


def test_the_broken_method_is_what_is_drawn(score_zoo):
    """Not the baseline that it is made of."""
    assert type(make_method(make_config("broken", ratio=0.5))) is score_zoo["Broken"]
    assert type(make_method(make_config("random-keep"))) is RandomKeep and RandomKeep.name == "random-keep"


def test_facts_are_read_of_the_evaluation_prompts_only(score_zoo, tmp_path, pipe, capsys):
    """Another prompt at the same place would be scored against a scene that nobody asked for."""
    call, facts = {"num_inference_steps": 1, "width": 64, "height": 64}, score_zoo["facts"]
    prompts = tuple(scenes.evaluation_prompts(2))
    generate(pipe, PromptSet("scenes", prompts), [Variant("unpatched")], tmp_path / "a", call=call)
    facts(tmp_path / "a", "unpatched", "shape", None)
    assert "all: 2 pictures" in capsys.readouterr().out
    generate(pipe, PromptSet("p.txt", (prompts[0], "a red star")), [Variant("unpatched")], tmp_path / "b", call=call)
    with pytest.raises(ConfigError, match="not drawn from the evaluation prompts: its prompt 1 is 'a red star', not"):
        facts(tmp_path / "b", "unpatched", "shape", None)

"""The toy world: seeded, captioned, the same picture at every size."""

import pytest
import torch

from diffusion_tokred.zoo import scenes

SCENES = [scenes.sample_scene(i) for i in range(400)]


def test_deterministic_by_seed():
    assert scenes.sample_scene(7) == scenes.sample_scene(7)
    assert len({scenes.sample_scene(i) for i in range(400)}) == 400
    assert torch.equal(scenes.render(SCENES[:8], 64), scenes.render(SCENES[:8], 64))


def test_a_batch_draws_what_single_scenes_draw():
    assert torch.equal(scenes.render(SCENES[:8], 64)[5], scenes.render(SCENES[5:6], 64)[0])


def test_caption_names_what_is_drawn():
    pictures = scenes.render(SCENES, 128)
    for scene, picture in zip(SCENES, pictures, strict=True):
        text = scenes.caption(scene)
        for o in scene.objects:
            assert f"a {o.size} {o.color} {o.shape}" in text
            # The centre, except of a ring: there a point of its band.
            x, y = int(o.x * 128 + (scenes.SIZES[o.size] * 0.75 * 128 if o.shape == "ring" else 0)), int(o.y * 128)
            assert torch.allclose(picture[:, y, x], torch.tensor(scenes.COLORS[o.color]), atol=0.02)
        assert text.endswith(f"on a {scene.texture} {scene.background} background")
        # Every pixel of the corner lies between the two tones (no object reaches it).
        low, high = torch.tensor(scenes.BACKGROUNDS[scene.background]).sort(0).values
        corner = picture[:, :16, :16].flatten(1).T
        assert (corner >= low - 1e-5).all() and (corner <= high + 1e-5).all()
        varies = (corner.amax(0) - corner.amin(0)).max() > 0.1
        assert varies == (scene.texture in ("striped", "checked", "dotted")), text


def test_relations_hold():
    for scene in SCENES:
        if scene.relation is None:
            assert len(scene.objects) == 1
            continue
        first, second = scene.objects
        assert {
            "above": first.y < second.y,
            "below": first.y > second.y,
            "left of": first.x < second.x,
            "right of": first.x > second.x,
        }[scene.relation]
        assert first.color != second.color
        gap = max(abs(first.x - second.x), abs(first.y - second.y))
        assert gap > 0.4  # two big ones do not overlap


@pytest.mark.parametrize("size", [32, 64, (64, 128)])
def test_sizes_agree(size):
    height, width = (size, size) if isinstance(size, int) else size
    small = scenes.render(SCENES[:32], size)
    large = scenes.render(SCENES[:32], (4 * height, 4 * width))
    assert small.shape == (32, 3, height, width) and small.min() >= 0 and small.max() <= 1
    difference = (torch.nn.functional.avg_pool2d(large, 4) - small).abs()
    assert difference.mean() < 0.01 and difference.amax() < 0.45  # only edges differ


def test_held_out_pairs_are_never_trained():
    pairs = {(o.color, o.shape) for i in range(20000) for o in scenes.sample_scene(i).objects}
    assert pairs == set(scenes.PAIRS) - scenes.HELD_OUT
    first = [scenes.sample_scene(i, held_out=True).objects[0] for i in range(50)]
    assert {(o.color, o.shape) for o in first} == scenes.HELD_OUT


def test_evaluation_prompts_are_fixed_and_stratified():
    prompts = scenes.evaluation_prompts()
    assert len(prompts) == 512 and prompts[:3] == scenes.evaluation_prompts(3)
    chosen = scenes.evaluation_scenes(500)
    assert all(sum(s.relation == r for s in chosen) == 100 for r in (*scenes.RELATIONS, None))
    assert all(sum(s.texture == t for s in chosen) == 100 for t in scenes.TEXTURES)
    assert {word for text in prompts for word in text.split()} == set(scenes.WORDS)
    assert len(scenes.WORDS) <= 60 and max(len(text.split()) for text in prompts) < 20


def test_objects_never_have_a_colour_of_the_background():
    objects = torch.tensor(list(scenes.COLORS.values()))
    tones = torch.tensor(list(scenes.BACKGROUNDS.values())).flatten(0, 1)
    assert torch.cdist(objects, tones).min() > 0.3

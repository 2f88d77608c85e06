"""toy-clip: matches captions and pictures, and its features tell scenes apart."""

import random
from dataclasses import replace

import pytest
import torch

from diffusion_tokred import zoo
from diffusion_tokred.evaluation.clip import Clip, probe
from diffusion_tokred.zoo import scenes


@pytest.fixture(scope="module")
def clip():
    return Clip()


def draw(some):
    return (scenes.render(some, 128) * 255).round().byte()


def test_labelled_toy(clip):
    assert clip.name.startswith("toy")
    assert (zoo.path(zoo.JUDGE) / "README.md").read_text().count("toy")


def test_prefers_the_right_caption(clip):
    """To the caption with both colours swapped: the same words in another order."""
    some = [scene for scene in scenes.evaluation_scenes(64) if scene.relation is not None]
    swapped = []
    for scene in some:
        a, b = scene.objects
        swapped.append(replace(scene, objects=(replace(a, color=b.color), replace(b, color=a.color))))
    right = clip.score(draw(some), [scenes.caption(s) for s in some])
    wrong = clip.score(draw(some), [scenes.caption(s) for s in swapped])
    assert right.shape == (len(some),) and right.max() <= 100
    assert (right > wrong).float().mean() > 0.9


def test_score_is_the_cosine(clip):
    """Against the same taken from CLIPModel's own forward."""
    some = scenes.evaluation_scenes(4)
    texts = [scenes.caption(s) for s in some]
    ids = clip.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        out = clip.model(input_ids=ids, pixel_values=scenes.render(some, 128).mul(255).round() / 127.5 - 1)
    logits = out.logits_per_image / clip.model.logit_scale.exp()
    assert torch.allclose(clip.score(draw(some), texts), 100 * logits.diagonal(), atol=0.05)


def test_features_serve_torchmetrics(clip):
    """FID of a set to itself is 0, to the same set blurred it is not."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    pictures = draw(scenes.evaluation_scenes(160))
    blurred = torch.nn.functional.avg_pool2d(pictures.float(), 9, 1, 4, count_include_pad=False).round().byte()
    distances = []
    for other in (pictures, blurred):
        fid = FrechetInceptionDistance(feature=clip, input_img_size=(3, 128, 128))
        fid.update(pictures, real=True)
        fid.update(other, real=False)
        distances.append(fid.compute().item())
    assert clip(pictures[:2]).shape == (2, clip.num_features)
    assert abs(distances[0]) < 1e-3 < 0.1 < distances[1]


def test_a_linear_probe_reads_color_and_shape(clip):
    """Bars of the model card, on fewer scenes; lone objects."""
    train = [scenes.sample_scene(random.Random(f"train-{i}"), relation=None) for i in range(800)]
    test = [scene for scene in scenes.evaluation_scenes(640) if scene.relation is None]
    seen, new = (torch.cat([clip(draw(part[i : i + 64])) for i in range(0, len(part), 64)]) for part in (train, test))
    for fact, values, bar in (("color", list(scenes.COLORS), 0.95), ("shape", list(scenes.SHAPES), 0.85)):
        labels, truth = (torch.tensor([values.index(getattr(s.objects[0], fact)) for s in x]) for x in (train, test))
        assert (probe(seen, labels, new) == truth).float().mean() >= bar, fact


def test_the_probe_is_a_linear_classifier():
    """It separates what a line separates, and nothing else."""
    x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    assert (probe(x, (x[:, 0] > 0.3).long(), x) == (x[:, 0] > 0.3)).float().mean() > 0.98
    assert (probe(x, (x[:, 0] * x[:, 1] > 0).long(), x) == (x[:, 0] * x[:, 1] > 0)).float().mean() < 0.7


def test_other_input_is_refused(clip, tmp_path):
    with pytest.raises(ValueError, match="give uint8"):
        clip(torch.rand(1, 3, 128, 128))
    with pytest.raises(ValueError, match="1 pictures and 2 prompts"):
        clip.score(draw(scenes.evaluation_scenes(1)), ["a", "b"])
    with pytest.raises(FileNotFoundError, match="no CLIPModel in"):
        Clip(tmp_path)

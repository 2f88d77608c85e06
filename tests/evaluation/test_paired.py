"""Figures of pairs and single pictures against numpy's definitions, transformers' own CLIP and drawn scenes."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusion_tokred.errors import ConfigError
from diffusion_tokred.evaluation import paired
from diffusion_tokred.evaluation.clip import Clip
from diffusion_tokred.evaluation.lpips import Lpips
from diffusion_tokred.evaluation.metrics import psnr, ssim
from diffusion_tokred.evaluation.paired import Paired, Scores, scene_of, why_null
from diffusion_tokred.evaluation.similarity import BETAS, ms_ssims, scales, ssims
from diffusion_tokred.zoo import scenes
from tests.reference import quality


@pytest.fixture(scope="module")
def clip() -> Clip:
    return Clip()


def pictures(n: int, size: int | tuple[int, int], first: int = 0) -> torch.Tensor:
    some = scenes.evaluation_scenes(first + n)[first:]
    return (scenes.render(some, size) * 255).round().byte()


def spoiled(a: torch.Tensor, amount: int = 25) -> torch.Tensor:
    noise = torch.randint(-amount, amount + 1, a.shape, generator=torch.Generator().manual_seed(0))
    return (a.int() + noise).clamp(0, 255).byte()


def blurred(a: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.avg_pool2d(a.float(), 5, 1, 2, count_include_pad=False).round().byte()


def array(picture: torch.Tensor) -> np.ndarray:
    return picture.permute(1, 2, 0).numpy()


def test_every_pair_alone() -> None:
    """Equal to what the functions on single pictures say, and independent of the batch."""
    from PIL import Image

    a = pictures(3, (48, 64))
    b = torch.stack([spoiled(a)[0], blurred(a)[1], a[2]])
    found = Paired()(a, b)
    assert list(found) == ["psnr", "ssim", "ms_ssim", "sharpness_ratio"]
    assert all(values.dtype == torch.float64 and values.shape == (3,) for values in found.values())
    for i in range(3):
        both = [Image.fromarray(array(p[i])) for p in (a, b)]
        assert found["psnr"][i] == psnr(*both) and found["ssim"][i].item() == pytest.approx(ssim(*both), abs=1e-12)
        alone = Paired()(a[i : i + 1], b[i : i + 1])
        assert all(alone[name][0] == pytest.approx(found[name][i].item(), abs=1e-12) for name in ("ssim", "ms_ssim"))
    assert found["psnr"][2] == math.inf and found["ms_ssim"][2].item() == pytest.approx(1)
    assert why_null({name: values[2].item() for name, values in found.items()}) == {
        "psnr": "the pictures are equal: infinite"
    }


def test_psnr_of_uint8_does_not_wrap_around() -> None:
    """Black against white is 0 dB; differences modulo 256 would give 48."""
    black = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    assert Paired()(black, black + 255)["psnr"].item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("size", "count"), [((161, 170), 5), ((160, 200), 4), ((81, 81), 4), ((64, 64), 3), ((24, 40), 2)]
)
def test_ms_ssim(size: tuple[int, int], count: int) -> None:
    """Five scales above 160 pixels, with the published weights; fewer below, and their weights add up to 1."""
    assert scales(size) == count
    weights = BETAS if count == 5 else tuple(beta / sum(BETAS[:count]) for beta in BETAS[:count])
    assert sum(weights) == pytest.approx(1, abs=1e-4)
    a = pictures(1, size)
    b = spoiled(blurred(a), 10)
    expected = quality.ms_ssim(array(a[0]), array(b[0]), weights)
    found = ms_ssims(a.double() / 255, b.double() / 255)
    assert 0.1 < expected < 0.99 and found.item() == pytest.approx(expected, rel=1e-6)
    assert ("ms_ssim" in Paired().notes(size)) == (count < 5)


@pytest.mark.parametrize("size", [(11, 11), (33, 64), (90, 51)])
@pytest.mark.parametrize("tone", [None, 250])
def test_ssim_is_torchmetrics(size: tuple[int, int], tone: int | None) -> None:
    """To rounding, also of flat and bright pictures: in float32 torchmetrics' own would be off there by 1e-3."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    a = pictures(2, size) if tone is None else torch.full((2, 3, *size), tone, dtype=torch.uint8)
    x, y = a.double() / 255, spoiled(a, 1).double() / 255
    theirs = structural_similarity_index_measure(x, y, data_range=1.0, reduction="none")
    torch.testing.assert_close(ssims(x, y), theirs, rtol=0, atol=1e-10)
    assert ssims(x, x).tolist() == pytest.approx([1, 1], abs=1e-12)


def test_ms_ssim_is_torchmetrics_where_that_is_defined() -> None:
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    a = pictures(2, 192)
    x, y = a.double() / 255, spoiled(a).double() / 255
    theirs = [
        multiscale_structural_similarity_index_measure(x[i : i + 1], y[i : i + 1], data_range=1.0) for i in (0, 1)
    ]
    torch.testing.assert_close(ms_ssims(x, y), torch.stack(theirs))
    assert ms_ssims(x, 1 - x).tolist() == [0, 0]  # what is negative counts as 0


def test_large_pictures_are_compared_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded by pixels: never more at once than said, at least one picture, and the figures stay."""
    a = pictures(7, 24)
    b = spoiled(a)
    judges, counts = Paired(lpips=[Lpips("vgg", None)]), []
    whole = judges(a, b)
    monkeypatch.setattr(paired, "ssims", lambda x, y: counts.append(len(x)) or ssims(x, y))
    for pixels, parts in ((3 * 24 * 24 + 5, [3, 3, 1]), (10, [1] * 7)):
        counts.clear()
        monkeypatch.setattr(paired, "PIXELS", pixels)
        found = judges(a, b)
        assert counts == parts
        for name, values in found.items():
            torch.testing.assert_close(values, whole[name], rtol=1e-6, atol=1e-9)


def test_the_note_says_how_many_scales() -> None:
    note = Paired().notes((128, 128))["ms_ssim"]
    assert note.startswith("4 of 5 scales") and "128 pixels are not above 160" in note


def test_sharpness_ratio() -> None:
    a = pictures(2, 24)
    for b in (blurred(a), spoiled(a)):
        expected = [quality.sharpness(array(q)) / quality.sharpness(array(p)) for p, q in zip(a, b, strict=True)]
        np.testing.assert_allclose(Paired()(a, b)["sharpness_ratio"].numpy(), expected, rtol=1e-9)
    ratios = [Paired()(a, b)["sharpness_ratio"].max().item() for b in (blurred(a), a)]
    assert ratios[0] < 0.9 and ratios[1] == 1


def test_flat_and_small_pictures_have_reasons() -> None:
    flat = torch.full((1, 3, 8, 8), 90, dtype=torch.uint8)
    judges = Paired(lpips=[Lpips("alex", None)])
    found = {name: values.item() for name, values in judges(flat, pictures(1, 8)).items()}
    assert {name for name, value in found.items() if not math.isfinite(value)} == {*judges.better} - {"psnr"}
    reasons = why_null(found)
    assert "window of 11" in reasons["ssim"] and "window of 11" in reasons["ms_ssim"]
    assert "flat" in reasons["sharpness_ratio"] and "smaller than the network" in reasons["lpips_alex"]


def test_judges_add_their_metrics(clip: Clip) -> None:
    lpips = Lpips("alex", None)
    judges = Paired(lpips=[lpips], clip=clip)
    a = pictures(2, 128)
    b = blurred(a)
    found = judges(a, b)
    assert list(found) == list(judges.better) == [*Paired().better, "lpips_alex", "toy_clip_distance"]
    assert {judges.better[name] for name in ("lpips_alex", "toy_clip_distance")} == {"lower"}
    assert {judges.better[name] for name in ("psnr", "ssim", "ms_ssim")} == {"higher"}
    torch.testing.assert_close(found["lpips_alex"], lpips(a, b).double())


def test_clip_distance_is_one_minus_the_cosine(clip: Clip) -> None:
    """Against CLIPModel's own image embeddings, pixels normalised by hand; 0 for a picture and itself."""
    a = pictures(3, 128)
    b = torch.stack([a[1], blurred(a)[1], a[2]])
    with torch.no_grad():
        outs = [clip.model.get_image_features(pixel_values=p / 127.5 - 1) for p in (a, b)]
    x, y = (getattr(out, "pooler_output", out).double().numpy() for out in outs)
    cosine = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    found = Paired(clip=clip)(a, b)["toy_clip_distance"]
    np.testing.assert_allclose(found.numpy(), 1 - cosine, atol=1e-5)
    assert found[0] > 0.1 > found[1] > 1e-4 and abs(found[2]) < 1e-12


def test_features_that_are_there_serve(clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    """CLIP does not look again, and says the same."""
    a = pictures(2, 128)
    b, prompts = blurred(a), ["a red star", "a blue ring"]
    seen = clip(a), clip(b)
    distances, scores = Paired(clip=clip)(a, b), Scores(clip)(b, prompts)
    monkeypatch.setattr(clip, "forward", lambda pictures: pytest.fail("looked again"))
    name = "toy_clip_distance"
    torch.testing.assert_close(Paired(clip=clip)(a, b, seen)[name], distances[name])
    torch.testing.assert_close(Scores(clip)(b, prompts, seen[1]), scores)


def test_only_the_embedded_judge_is_called_toy(clip: Clip, tmp_path) -> None:
    import shutil

    from diffusion_tokred import zoo

    assert clip.prefix == "toy_clip" and Clip(name="x").prefix == "toy_clip"  # also under another name
    shutil.copytree(zoo.path(zoo.JUDGE), tmp_path / "model")
    other = Clip(tmp_path / "model")
    assert other.prefix == "clip" and list(Scores(other).better) == ["clip_score"]
    assert "clip_distance" in Paired(clip=other).better
    assert other.weights_sha256 == clip.weights_sha256 and clip.resize == "CLIP's processor to 128x128, PIL"


def test_scores(clip: Clip) -> None:
    """Facts of drawn scenes are all right; with one colour asked otherwise, exactly that fact falls."""
    some = [scene for scene in scenes.evaluation_scenes(20) if scene.relation is not None][:2]
    some.append(next(scene for scene in scenes.evaluation_scenes(20) if scene.relation is None))
    drawn = (scenes.render(some, 128) * 255).round().byte()
    prompts = [scenes.caption(scene) for scene in some]
    scores = Scores(clip, facts=True)
    found = scores(drawn, prompts)
    assert list(found) == list(scores.better) and set(scores.better.values()) == {"higher"}
    torch.testing.assert_close(found["toy_clip_score"], clip.score(drawn, prompts).double())
    for name, values in found.items():
        if name.startswith("fact"):
            assert values[:2].tolist() == [1, 1], name
            assert values[2] == 1 or (name == "fact_relation" and math.isnan(values[2])), name

    first, second = some[0].objects
    free = next(c for c in scenes.COLORS if c not in (first.color, second.color))
    wrong = scenes.caption(replace(some[0], objects=(replace(first, color=free), second)))
    changed = {name: values.item() for name, values in scores(drawn[:1], [wrong]).items()}
    assert changed["fact_color"] == changed["fact_shape"] == 0.5 and changed["fact_relation"] == 0
    assert changed["fact_background"] == changed["fact_texture"] == changed["fact_count"] == 1


def test_facts_that_cannot_be_read_are_nan() -> None:
    prompt = scenes.evaluation_prompts(1)[0]
    for seen, said in (
        (pictures(1, 128), "a photo of a dog"),
        (pictures(1, (64, 128)), prompt),
        (pictures(1, 32), prompt),
    ):
        found = {name: value.item() for name, value in Scores(facts=True)(seen, [said]).items()}
        assert len(found) == 7 and all(map(math.isnan, found.values()))
        assert set(why_null(found)) == set(found)


def test_scenes_are_read_off_their_captions() -> None:
    for scene in scenes.evaluation_scenes(60) + scenes.evaluation_scenes(20, held_out=True):
        read = scene_of(scenes.caption(scene))
        assert read is not None
        middle = tuple(replace(o, x=0.5, y=0.5) for o in scene.objects)
        assert read == replace(scene, objects=middle)
    for other in (
        "a red star",
        "a big red star on a striped pink background, oil painting",
        "a big red star above a small red ring on a striped pink background",
        "a big mauve star on a striped pink background",
        "",
    ):
        assert scene_of(other) is None, other


def test_wrong_input_is_refused(clip: Clip) -> None:
    a = pictures(2, 32)
    with pytest.raises(ConfigError, match="pairs of one size"):
        Paired()(a, a[:1])
    with pytest.raises(ConfigError, match="give uint8"):
        Paired()(a, a.float())
    with pytest.raises(ConfigError, match="2 pictures and 1 prompts"):
        Scores(clip)(a, ["a"])

"""FID and KID against numpy's definitions and torchmetrics called by hand; files of every layout; intervals redone."""

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diffusion_tokred.errors import ConfigError
from diffusion_tokred.evaluation import distribution, inception, launch
from diffusion_tokred.evaluation.clip import Clip
from diffusion_tokred.evaluation.distribution import changes, distances, fid, key, kid
from diffusion_tokred.evaluation.features import Statistics, array_pictures, check_reference, folder_pictures
from diffusion_tokred.zoo import scenes
from tests.evaluation.runs import in_two_processes
from tests.reference import quality


class Means(nn.Module):
    """Colours of four quarters: an extractor that costs nothing."""

    name, num_features, weights_sha256, resize = "toy-means", 12, "aa", "none"

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(pictures.float() / 255, 2).flatten(1)


def drawn(n: int, first: int = 0, size: int = 64) -> torch.Tensor:
    return (scenes.render(scenes.evaluation_scenes(first + n)[first:], size) * 255).round().byte()


def random_set(n: int, d: int = 6, seed: int = 0, shift: float = 0.0, name: str = "toy-x") -> Statistics:
    draws = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(99))
    return Statistics.from_features(torch.randn(n, d, generator=draws) @ mixing + shift, name, source=f"set {seed}")


def array(statistics: Statistics) -> np.ndarray:
    assert statistics.features is not None
    return statistics.features.double().numpy()


def without(x: np.ndarray, rows: list[int]) -> np.ndarray:
    return np.delete(x, rows, axis=0)


# FID


def test_fid_is_that_of_the_definition() -> None:
    a, b = random_set(60, shift=0.4), random_set(45, seed=1)
    assert fid(a, b) == pytest.approx(quality.fid(array(a), array(b)), rel=1e-9)
    assert fid(a, a) == pytest.approx(0, abs=1e-6) and fid(a, b) > 0.1


def test_the_process_that_measures_waits_for_no_other(tmp_path: Path) -> None:
    """Of a run by several processes one measures: torchmetrics would gather from all of them."""

    def work(processes: launch.Processes) -> list[float] | None:
        found = None
        if processes.rank == 0:
            a, b = random_set(30, shift=0.4), random_set(30, seed=1)
            found = [d.value for d in distances(a, b, paired=True, resamples=2).values()]
        processes.gather(None)  # the other one is here from the start
        return found

    first, second = in_two_processes(tmp_path, work)
    a, b = random_set(30, shift=0.4), random_set(30, seed=1)
    assert first == pytest.approx([fid(a, b), kid(a, b, paired=True)]) and second is None


def test_fid_with_fewer_pictures_than_features() -> None:
    """The covariance is singular; the value is that of the definition all the same."""
    a, b = random_set(10, d=24), random_set(14, d=24, seed=1, shift=0.2)
    assert fid(a, b) == pytest.approx(quality.fid(array(a), array(b)), rel=1e-4)


def test_fid_is_torchmetrics_fed_with_the_pictures() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    clip, a, b = Clip(), drawn(40, size=128), drawn(48, first=40, size=128)
    metric = FrechetInceptionDistance(feature=clip)
    metric.update(a, real=False)
    metric.update(b, real=True)
    sets = [Statistics.of(x.split(20), clip) for x in (a, b)]
    assert (sets[0].n, sets[0].extractor) == (40, "toy-clip") and sets[0].weights_sha256 == clip.weights_sha256
    assert fid(*sets) == pytest.approx(metric.compute().item(), rel=1e-4)


# KID


@pytest.mark.parametrize("paired", [False, True])
def test_kid_is_that_of_the_definition(paired: bool) -> None:
    a, b = random_set(17, shift=0.3), random_set(17 if paired else 11, seed=1)
    assert kid(a, b, paired) == pytest.approx(quality.kid(array(a), array(b), paired), rel=1e-9)


def test_kid_does_not_depend_on_the_blocks() -> None:
    x, y = (array(random_set(23, seed=seed)) for seed in (0, 1))
    whole = distribution._sums(*map(torch.from_numpy, (x, y)))
    for cut, full in zip(distribution._sums(*map(torch.from_numpy, (x, y)), block=5), whole, strict=True):
        torch.testing.assert_close(cut, full)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save")
def test_kid_is_torchmetrics_on_one_subset_of_all() -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    a, b = drawn(30), drawn(30, first=30)
    metric = KernelInceptionDistance(feature=Means(), subsets=1, subset_size=30)
    metric.update(a, real=True)
    metric.update(b, real=False)
    sets = [Statistics.of([x], Means()) for x in (a, b)]
    assert kid(*sets) == pytest.approx(metric.compute()[0].item(), abs=1e-6)


def test_kid_of_pairs_is_unbiased() -> None:
    """Pairs that share their noise, both sets from one distribution: 0 on average only if (i, i) is left out."""
    found = []
    for seed in range(200):
        common = torch.randn(12, 4, generator=torch.Generator().manual_seed(seed))
        noise = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(1000 + seed))
        x, y = (Statistics.from_features(common + 0.3 * part, "toy-x") for part in noise)
        found.append((kid(x, y, paired=True), kid(x, y)))
    paired, independent = np.array(found).T
    error = paired.std() / math.sqrt(len(found))
    assert abs(paired.mean()) < 3 * error and independent.mean() < -10 * error


# Intervals


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("repeats", [1, 3])
def test_kid_interval_is_the_jackknife_over_prompts(paired: bool, repeats: int) -> None:
    """Redone by leaving out the pictures of one prompt at a time, of both sets where they are pairs."""
    n = 4 * repeats
    a, b = random_set(n, shift=0.3), random_set(n if paired else 7, seed=1)
    prompts = [i % 4 for i in range(n)]
    left = []
    for prompt in range(4):
        rows = [i for i in range(n) if prompts[i] == prompt]
        left.append(quality.kid(without(array(a), rows), without(array(b), rows) if paired else array(b), paired))
    found = distances(a, b, paired=paired, prompts=prompts, resamples=0)["toy_kid"]
    half = 1.959964 * quality.jackknife(left)
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), rel=1e-9)


@pytest.mark.parametrize("paired", [False, True])
def test_fid_interval_is_the_bootstrap_over_prompts(paired: bool) -> None:
    """Redone in numpy with the same draws: whole prompts, and in pairs both sides of them."""
    a, b = random_set(40, shift=0.6), random_set(40, seed=1)
    prompts = [i // 2 for i in range(40)]
    draws, values = torch.Generator().manual_seed(5), []
    for _ in range(12):
        drawn_prompts = torch.randint(20, (20,), generator=draws).tolist()
        rows = [row for prompt in drawn_prompts for row in (2 * prompt, 2 * prompt + 1)]
        values.append(quality.fid(array(a)[rows], array(b)[rows] if paired else array(b)))
    found = distances(a, b, paired=paired, prompts=prompts, resamples=12, seed=5)["toy_fid"]
    half = 1.959964 * np.std(values, ddof=1)
    assert found.value == pytest.approx(quality.fid(array(a), array(b)), rel=1e-6)
    assert (found.low, found.high) == pytest.approx((max(found.value - half, 0), found.value + half), rel=1e-6)


def test_changes_are_paired() -> None:
    """The reference alone moves both; what a reduction adds is told apart far better by the difference."""
    reference, unpatched = random_set(80, seed=1), random_set(60)
    generated = Statistics.from_features(unpatched.features * 1.02 + 0.05, "toy-x")
    found = changes(generated, unpatched, reference, resamples=40)
    singles = [distances(s, reference, resamples=40) for s in (generated, unpatched)]
    assert set(found) == {"toy_fid_change", "toy_kid_change"}
    for name in ("toy_fid", "toy_kid"):
        change = found[f"{name}_change"]
        assert change.value == pytest.approx(singles[0][name].value - singles[1][name].value)
        assert change.low < change.value < change.high and " change on toy-x" in change.label
        assert change.high - change.low < 0.5 * (singles[0][name].high - singles[0][name].low)
    same = changes(unpatched, unpatched, reference, resamples=5)["toy_fid_change"]
    assert (same.value, same.low, same.high) == (0, 0, 0)  # and a change may be below 0: no bound there


def test_intervals_that_cannot_be_had_say_why(tmp_path: Path) -> None:
    a, many = random_set(8), random_set(12, d=300, seed=1)
    one = distances(a, a, prompts=[0] * 8)
    assert math.isnan(one["toy_fid"].low) and "two prompts or more" in one["toy_fid"].why_null["high"]
    assert math.isnan(one["toy_kid"].high) and math.isfinite(one["toy_kid"].value)
    large = distances(many, many)
    assert "not resampled: 300 features" in large["toy_fid"].why_null["low"]
    assert math.isfinite(large["toy_kid"].low)
    assert math.isfinite(distances(many, many, resamples=2)["toy_fid"].high)
    assert "fewer than two resamples" in distances(a, a, resamples=1)["toy_fid"].why_null["low"]

    a.save(tmp_path / "a.npz")
    bare = Statistics.load(tmp_path / "a.npz")
    found = distances(random_set(8, seed=2), bare, resamples=3)
    assert math.isfinite(found["toy_fid"].low) and math.isnan(found["toy_kid"].value)
    assert all("needs the features of every picture" in found["toy_kid"].why_null[k] for k in ("value", "low", "high"))
    with pytest.raises(ConfigError, match="KID needs the features"):
        kid(a, bare)
    with pytest.raises(ConfigError, match="not pairs"):
        distances(a, bare, paired=True)


# What is said beside a figure


def test_names_tell_the_extractor() -> None:
    assert key("fid", inception.NAME) == "fid" and key("kid", "toy-clip") == "toy_kid"
    assert key("fid", "openai/clip-vit-large-patch14") == "clip_fid"


def test_label_and_record() -> None:
    few = distances(random_set(5), random_set(9, seed=1), resamples=3)
    assert few["toy_fid"].label == "toy FID on toy-x, n=5 (relative only: n < 6 features)"
    assert few["toy_kid"].label == "toy KID on toy-x, n=5"
    small = distances(random_set(9), random_set(5, seed=1), resamples=3)["toy_fid"]
    assert small.label == "toy FID on toy-x, n=9 (relative only: the reference's n < 6 features)"
    assert distances(random_set(9), random_set(9, seed=1), resamples=3)["toy_fid"].label == "toy FID on toy-x, n=9"
    data = small.to_dict()
    assert {"value", "low", "high", "n", "n_reference", "reference", "extractor", "resize", "label", "better"} <= {
        *data
    }
    assert (data["n"], data["n_reference"], data["reference"], data["better"]) == (9, 5, "set 1", "lower")
    wide = torch.randn(3, 2048)
    made = Statistics.from_features(wide, inception.NAME, "ff", "tf1")
    unknown = Statistics.from_features(wide, inception.NAME)
    label = distribution._label("fid", made, unknown, "")
    assert label.startswith(
        "FID on inception-v3-fid, n=3 (relative only: n < 2048 features; how the reference was resized"
    )


# Files


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    """By name, in any format, of any size; hidden and other files are let be."""
    a = drawn(5)
    for i, picture in enumerate(a):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.{'png' if i % 2 else 'bmp'}")
    Image.fromarray(drawn(1, size=32)[0].permute(1, 2, 0).numpy()).convert("L").save(tmp_path / "3a.png")
    (tmp_path / "manifest.jsonl").write_text("")
    (tmp_path / ".4.png").write_text("")
    batches = list(folder_pictures(tmp_path, batch=3))
    assert [tuple(b.shape) for b in batches] == [(3, 3, 64, 64), (1, 3, 64, 64), (1, 3, 32, 32), (1, 3, 64, 64)]
    assert torch.equal(torch.cat([batches[0], batches[1], batches[3]]), a)
    (tmp_path / "3a.png").unlink()
    found, expected = Statistics.load(tmp_path, Means()), Statistics.of([a], Means())
    assert found.n == 5 and found.source == str(tmp_path) and found.resize == "none"
    torch.testing.assert_close(found.sigma, expected.sigma)
    assert check_reference(tmp_path, Means()) == "a folder of 5 pictures"
    (tmp_path / "9.png").write_text("no picture")
    with pytest.raises(ConfigError, match=r"9\.png is no picture"):
        Statistics.load(tmp_path, Means())


@pytest.mark.parametrize("features", [False, True])
def test_our_file_comes_back_as_it_was(tmp_path: Path, features: bool) -> None:
    made = Statistics.of([drawn(6)], Means(), source="drawn")
    made.save(tmp_path / "deep" / "s.npz", features)
    back = Statistics.load(tmp_path / "deep" / "s.npz", Means())
    assert torch.equal(back.mu, made.mu) and torch.equal(back.sigma, made.sigma)
    assert (back.n, back.extractor, back.weights_sha256, back.resize) == (6, "toy-means", "aa", "none")
    assert (back.features is None) == (not features) and back.source == str(tmp_path / "deep" / "s.npz")
    assert features is False or torch.equal(back.features, made.features)
    with np.load(tmp_path / "deep" / "s.npz") as file:  # what pytorch-fid does
        np.testing.assert_allclose(file["sigma"], np.cov(array(made), rowvar=False))
        assert str(file["source"]) == "drawn"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["s.npz"]
    assert check_reference(tmp_path / "deep" / "s.npz") == "statistics of 6 pictures"


def test_files_of_pytorch_fid_and_adm(tmp_path: Path) -> None:
    """mu and sigma of 2048 features are Inception's; ADM's are of the original graph, which resizes as TensorFlow 1."""
    mu, sigma = np.arange(2048.0), np.eye(2048)
    np.savez(tmp_path / "fid.npz", mu=mu, sigma=sigma)
    np.savez(tmp_path / "adm.npz", mu=mu, sigma=sigma, mu_s=np.zeros(3), sigma_s=np.eye(3))
    model = inception.Inception(None)
    for name, resize in (("fid", None), ("adm", "tf1")):
        found = Statistics.load(tmp_path / f"{name}.npz", model)
        assert (found.n, found.extractor, found.resize) == (None, "inception-v3-fid", resize)
        assert found.mu[7] == 7 and found.sigma.shape == (2048, 2048)
    with pytest.raises(ConfigError, match="different ways to resize, tf1 and antialias"):
        Statistics.load(tmp_path / "adm.npz", inception.Inception(None, resize="antialias"))
    with pytest.raises(ConfigError, match="different extractors, inception-v3-fid and toy-means"):
        Statistics.load(tmp_path / "fid.npz", Means())
    np.savez(tmp_path / "short.npz", mu=mu[:12], sigma=sigma[:12, :12])
    with pytest.raises(ConfigError, match="names no extractor: then it must be Inception's 2048 features, not 12"):
        Statistics.load(tmp_path / "short.npz", Means())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_pictures_in_an_array(tmp_path: Path, save) -> None:
    a = drawn(5)
    save(tmp_path / "samples.npz", a.permute(0, 2, 3, 1).numpy())
    assert [len(batch) for batch in array_pictures(tmp_path / "samples.npz", 2)] == [2, 2, 1]
    assert torch.equal(torch.cat(list(array_pictures(tmp_path / "samples.npz", 2))), a)
    found = Statistics.load(tmp_path / "samples.npz", Means(), batch=2)
    torch.testing.assert_close(found.mu, Statistics.of([a], Means()).mu)
    assert check_reference(tmp_path / "samples.npz", Means()) == "an array of 5 pictures"
    # ADM's references have both: another extractor reads the pictures.
    zeros = np.zeros(2048), np.eye(2048)
    save(tmp_path / "both.npz", a.permute(0, 2, 3, 1).numpy(), mu=zeros[0], sigma=zeros[1], mu_s=zeros[0])
    assert Statistics.load(tmp_path / "both.npz", Means()).n == 5
    assert Statistics.load(tmp_path / "both.npz", inception.Inception(None)).n is None


def test_other_files_are_refused(tmp_path: Path) -> None:
    """By `check_reference` too, before anything is generated."""
    made = Statistics.of([drawn(4)], Means())
    made.save(tmp_path / "ours.npz")

    def refused(path: Path, extractor: nn.Module | None, words: str) -> None:
        for check in (Statistics.load, check_reference):
            with pytest.raises(ConfigError, match=words):
                check(path, extractor)

    refused(tmp_path / "none.npz", Means(), "there is no .*none.npz: a reference is a folder")
    (tmp_path / "old.pkl").write_bytes(pickle.dumps((0, 1)))
    refused(tmp_path / "old.pkl", Means(), "no .npz; pickled statistics are not read")
    np.savez(tmp_path / "objects.npz", mu=np.array([{}], dtype=object), sigma=np.eye(1))
    refused(tmp_path / "objects.npz", Means(), "without unpickling")
    np.savez(tmp_path / "else.npz", weights=np.eye(2))
    refused(tmp_path / "else.npz", Means(), "holds weights; statistics are mu and sigma")
    np.savez(tmp_path / "shape.npz", mu=np.zeros(3), sigma=np.eye(2))
    refused(tmp_path / "shape.npz", Means(), r"are not \(d,\) and \(d, d\)")
    np.savez(tmp_path / "floats.npz", np.zeros((4, 8, 8, 3)))
    one = np.zeros((1, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "one.npz", one)
    with pytest.raises(ConfigError, match="arr_0 is float64"):
        Statistics.load(tmp_path / "floats.npz", Means())
    refused(tmp_path / "one.npz", Means(), "2 pictures or more are needed for statistics, found 1")
    (tmp_path / "folder").mkdir()
    Image.fromarray(one[0]).save(tmp_path / "folder" / "a.png")
    refused(tmp_path / "folder", Means(), "2 pictures or more .* found 1")
    with pytest.raises(ConfigError, match="an extractor is needed"):
        Statistics.load(tmp_path / "floats.npz")

    class Other(Means):
        weights_sha256 = "bb"

    class Wide(Means):
        num_features = 13

    refused(tmp_path / "ours.npz", Other(), r"different weights \(sha256\), aa and bb: no comparison")
    refused(tmp_path / "ours.npz", Wide(), "different numbers of features, 12 and 13")
    refused(tmp_path / "ours.npz", inception.Inception(None), "different extractors, toy-means and inception-v3-fid")


def test_sets_that_do_not_compare_are_refused() -> None:
    a, other, wide = random_set(8), random_set(8, name="toy-y"), random_set(8, d=7)
    for function in (fid, kid, distances):
        with pytest.raises(ConfigError, match="different extractors, toy-x and toy-y"):
            function(a, other)
        with pytest.raises(ConfigError, match="different numbers of features, 6 and 7"):
            function(a, wide)
    with pytest.raises(ConfigError, match="not pairs"):
        distances(a, random_set(9), paired=True)
    with pytest.raises(ConfigError, match="not pairs"):
        changes(a, random_set(9), a)
    with pytest.raises(ConfigError, match="3 prompt numbers for 8 pictures"):
        distances(a, a, prompts=[0, 1, 2])
    with pytest.raises(ConfigError, match="resamples is 0 or more, got -1"):
        distances(a, a, resamples=-1)


def test_sets_without_statistics_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 pictures or more are needed for statistics, found 1"):
        Statistics.of([drawn(1)], Means())
    with pytest.raises(ConfigError, match="found 0"):
        Statistics.of([], Means())
    with pytest.raises(ConfigError, match="not finite"):
        Statistics.from_features(torch.tensor([[0.0], [math.nan]]), "toy-x")
    with pytest.raises(ConfigError, match=r"features are \(n, d\), toy-x gave \(2, 3, 1\)"):
        Statistics.from_features(torch.zeros(2, 3, 1), "toy-x")

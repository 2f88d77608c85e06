"""Figures against their definitions, written out in numpy."""

import math

import numpy as np
import pytest
from PIL import Image

from diffusion_tokred.errors import ConfigError
from diffusion_tokred.evaluation.metrics import Spread, psnr, speedup, ssim


@pytest.fixture
def pair() -> tuple[Image.Image, Image.Image]:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (40, 52, 3)).astype(np.uint8)
    b = np.clip(a.astype(int) + rng.integers(-30, 31, a.shape), 0, 255).astype(np.uint8)
    return Image.fromarray(a), Image.fromarray(b)


def test_psnr(pair: tuple[Image.Image, Image.Image]) -> None:
    x, y = (np.asarray(p, dtype=np.float64) / 255 for p in pair)
    assert psnr(*pair) == pytest.approx(-10 * math.log10(((x - y) ** 2).mean()), rel=1e-6)
    assert psnr(pair[0], pair[0]) == math.inf


def test_ssim(pair: tuple[Image.Image, Image.Image]) -> None:
    """Wang et al. 2004: Gaussian window of sigma 1.5 and 11 pixels, mean over all places and channels.

    The borders are mirrored, as torchmetrics does it.
    """
    place = np.arange(11) - 5
    window = np.exp(-(place**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    x, y = (np.asarray(p, dtype=np.float64) / 255 for p in pair)
    values = []
    for channel in range(3):
        mirrored = [np.pad(v[..., channel], 5, mode="reflect") for v in (x, y)]
        patches = [np.lib.stride_tricks.sliding_window_view(v, (11, 11)) for v in mirrored]
        mean = [(p * window).sum((-1, -2)) for p in patches]
        spread = [(p * q * window).sum((-1, -2)) for p, q in ((patches[0],) * 2, (patches[1],) * 2, patches)]
        var_x, var_y = spread[0] - mean[0] ** 2, spread[1] - mean[1] ** 2
        cov = spread[2] - mean[0] * mean[1]
        c1, c2 = 0.01**2, 0.03**2
        values.append(
            (2 * mean[0] * mean[1] + c1) * (2 * cov + c2) / ((mean[0] ** 2 + mean[1] ** 2 + c1) * (var_x + var_y + c2))
        )
    assert ssim(*pair) == pytest.approx(np.mean(values), abs=1e-6)
    assert ssim(pair[0], pair[0]) == pytest.approx(1.0, abs=1e-12)


def test_pictures_that_cannot_be_compared(pair: tuple[Image.Image, Image.Image]) -> None:
    with pytest.raises(ConfigError, match="different sizes"):
        psnr(pair[0], pair[1].resize((8, 8)))
    assert math.isnan(ssim(*(p.resize((8, 8)) for p in pair)))


def test_speedup_is_that_of_pairs() -> None:
    found = speedup([2.0, 6.0, 3.0], [1.0, 2.0, 3.0])  # 2, 3 and 1 times
    assert (found.median, found.low, found.high, found.n) == (2.0, 1.5, 2.5, 3)
    assert found.text(unit="x") == "2.00x (1.50-2.50)"
    for wrong in (([1.0], []), ([1.0], [0.0]), ([], []), ([math.nan], [1.0])):
        with pytest.raises(ConfigError):
            speedup(*wrong)


def test_one_measurement_has_no_spread() -> None:
    found = Spread.of([2.0])
    assert found.median == 2.0 and found.n == 1 and math.isnan(found.low) and found.text() == "2.00"

"""Structural similarity of picture pairs, at one scale and at several. In float64, and in the memory of a few pictures.

SSIM: Wang et al., IEEE TIP 13, 2004; MS-SSIM: Wang, Simoncelli and Bovik, Asilomar 2003. Borders are mirrored, as in
torchmetrics, whose figures these are. It convolves with the whole window, which costs 121 times the pictures' memory in
float64 on the CPU; in float32 the figures of flat, bright pictures are off by more than 1e-3.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

WINDOW, SIGMA = 11, 1.5  # of the Gaussian: pixels a side, and standard deviation
BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # weights of MS-SSIM's five scales
_REACH = WINDOW // 2
_LUMINANCE, _CONTRAST = 0.01**2, 0.03**2  # keep quotients finite where pictures are black, or flat


def ssims(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """SSIM of each pair of two batches `(B, 3, H, W)`, in [0, 1]: `(B,)`, nan where the window does not fit."""
    if min(x.shape[2:]) < WINDOW:
        return x.new_full((len(x),), math.nan)
    return _maps(x, y)[0].mean((1, 2, 3))


def scales(size: tuple[int, int]) -> int:
    """How many of MS-SSIM's scales a picture of this size has: the coarsest has sides of 10 pixels or more.

    So the five published ones need sides above 160, and one (plain SSIM) sides above 10; 0 for smaller pictures.
    """
    return sum(min(size) > 10 * 2**scale for scale in range(len(BETAS)))


def ms_ssims(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Multi-scale SSIM of each pair of two batches `(B, 3, H, W)`, in [0, 1]: `(B,)`.

    As published on sides above 160 pixels. Smaller pictures have fewer scales (`scales`), the finest ones, and their
    weights are scaled to a sum of 1; the window stays 11 pixels wide. Such figures compare with others of the same size
    only. nan where not one scale is left.
    """
    count = scales((x.shape[2], x.shape[3]))
    if not count:
        return x.new_full((len(x),), math.nan)
    # The published weights add up to 1.0001 where all are used, and stay as they are.
    betas = BETAS if count == len(BETAS) else [beta / sum(BETAS[:count]) for beta in BETAS[:count]]
    product = x.new_ones(len(x))
    for scale, beta in enumerate(betas):
        whole, contrast = _maps(x, y)
        if scale < count - 1:  # but at the coarsest scale windows that cross a border are left out
            whole = contrast[..., _REACH:-_REACH, _REACH:-_REACH]
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        product *= whole.mean((1, 2, 3)).clamp(min=0) ** beta
    return product


def _maps(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """At every place: SSIM, and its part without luminance."""
    mean_x, mean_y = _windowed(x), _windowed(y)
    spread = (_windowed(x * x) - mean_x**2).clamp(min=0) + (_windowed(y * y) - mean_y**2).clamp(min=0)
    product = mean_x * mean_y
    contrast = (2 * (_windowed(x * y) - product) + _CONTRAST) / (spread + _CONTRAST)
    return contrast * (2 * product + _LUMINANCE) / (mean_x**2 + mean_y**2 + _LUMINANCE), contrast


def _windowed(x: torch.Tensor) -> torch.Tensor:
    """Means under the Gaussian window at every place, borders mirrored: along one axis, then along the other."""
    weights = [math.exp(-((i - _REACH) ** 2) / (2 * SIGMA**2)) for i in range(WINDOW)]
    x = F.pad(x, (_REACH,) * 4, mode="reflect")
    for dim in (2, 3):
        size = x.shape[dim] - 2 * _REACH
        total = torch.zeros_like(x.narrow(dim, 0, size))
        for i, weight in enumerate(weights):
            total.add_(x.narrow(dim, i, size), alpha=weight / sum(weights))
        x = total
    return x

"""Figures from pictures and from times. Pictures are compared one by one, values in [0, 1]."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from ..errors import ConfigError
from .similarity import ssims


@dataclass(frozen=True)
class Spread:
    """Median and quartiles (25 and 75 %) of `n` measurements. With one measurement, low and high are nan."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Raises ConfigError without a value."""
        data = np.asarray(list(values), dtype=np.float64)
        if not len(data):
            raise ConfigError("no measurements: at least one repetition is needed")
        low, high = np.quantile(data, (0.25, 0.75)) if len(data) > 1 else (float("nan"), float("nan"))
        return cls(float(np.median(data)), float(low), float(high), len(data))

    def text(self, digits: int = 2, unit: str = "") -> str:
        """Such as "1.25x (1.21-1.30)"."""
        spread = f" ({self.low:.{digits}f}-{self.high:.{digits}f})" if self.n > 1 else ""
        return f"{self.median:.{digits}f}{unit}{spread}"


def speedup(unpatched: Sequence[float], patched: Sequence[float]) -> Spread:
    """How many times faster: the spread of the ratios of times measured side by side, `unpatched[i] / patched[i]`.

    Raises:
        ConfigError: times that are not pairs, or not positive.
    """
    if len(unpatched) != len(patched):
        raise ConfigError(f"a speed-up needs pairs of times, found {len(unpatched)} and {len(patched)}")
    if any(not t > 0 for t in (*unpatched, *patched)):
        raise ConfigError("a speed-up needs times above 0 seconds")
    return Spread.of(a / b for a, b in zip(unpatched, patched, strict=True))


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio of two RGB pictures in dB; infinite if they are equal."""
    return psnrs(*_pair(a, b)).item()


def ssim(a: Image.Image, b: Image.Image) -> float:
    """Structural similarity of two RGB pictures (Gaussian window, sigma 1.5, mirrored borders); 1 if they are equal."""
    return ssims(*_pair(a, b)).item()


def psnrs(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`psnr` of each pair of two batches `(B, 3, H, W)`, floats in [0, 1]: `(B,)`."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    # reduction="none" and dim: else torchmetrics pools the errors of a batch before the logarithm.
    return peak_signal_noise_ratio(x, y, data_range=1.0, reduction="none", dim=(1, 2, 3))


def _pair(a: Image.Image, b: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
    """`(1, 3, H, W)` float64 in [0, 1]."""
    if a.size != b.size:
        raise ConfigError(f"pictures of different sizes cannot be compared: {a.size} and {b.size}")
    x, y = (torch.from_numpy(np.asarray(p.convert("RGB"), dtype=np.float64) / 255) for p in (a, b))
    return x.permute(2, 0, 1)[None], y.permute(2, 0, 1)[None]

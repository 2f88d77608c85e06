"""FID's Inception-v3: 2048 features of a picture, in plain torch, with the weights everyone's figures are made with.

The network is that of the TensorFlow file `inception-2015-12-05` (Szegedy et al., arXiv 1512.00567; FID: Heusel et
al., arXiv 1706.08500), which differs from torchvision's: average pooling leaves the border out of the mean, the last
block pools by the maximum, and there are 1008 classes. Modules are named as in the weight file of pytorch-fid and
torch-fidelity, so that it loads as it is.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import ConfigError
from .weights import load_into, sha256

NAME = "inception-v3-fid"
SIDE = 299
RESIZES = ("tf1", "antialias")

Kernel = int | tuple[int, int]


class _Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: Kernel, stride: int = 1, padding: Kernel = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Mixed(nn.Module):
    """Branches side by side, their channels joined.

    A branch is a list of `(name, channels, kernel)`; names that end in a and b fork: both read the same, and both are
    joined. The last branch pools: with `stride` 2 by the maximum, without padding; else by `pool`, with a convolution
    behind.
    """

    def __init__(
        self,
        inputs: int,
        branches: tuple[tuple[tuple[str, int, Kernel], ...], ...],
        pooled: int = 0,
        pool: str = "average",
        stride: int = 1,
    ) -> None:
        super().__init__()
        self.names = [[name for name, _, _ in branch] for branch in branches]
        self.pool, self.stride = pool, stride
        for branch in branches:
            width, before = inputs, inputs
            for place, (name, outputs, kernel) in enumerate(branch):
                # Only the last convolution of a branch has the stride, and then no padding.
                last = stride > 1 and place == len(branch) - 1
                h, w = (kernel, kernel) if isinstance(kernel, int) else kernel
                reads = before if name.endswith("b") else width
                padding = 0 if last else (h // 2, w // 2)
                self.add_module(name, _Conv(reads, outputs, kernel, stride if last else 1, padding))
                before, width = reads, outputs
        if pooled:
            self.branch_pool = _Conv(inputs, pooled, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = []
        for names in self.names:
            y = before = x
            for name in names:
                if name.endswith("b"):
                    out.append(y)
                    y = before
                before, y = y, getattr(self, name)(y)
            out.append(y)
        if self.stride > 1:
            out.append(F.max_pool2d(x, 3, self.stride))
        elif self.pool == "maximum":
            out.append(self.branch_pool(F.max_pool2d(x, 3, 1, 1)))
        else:
            out.append(self.branch_pool(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)))
        return torch.cat(out, 1)


def _a(inputs: int, pooled: int) -> _Mixed:
    double = (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3))
    return _Mixed(
        inputs, ((("branch1x1", 64, 1),), (("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)), double), pooled=pooled
    )


def _b(inputs: int) -> _Mixed:
    double = (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3))
    return _Mixed(inputs, ((("branch3x3", 384, 3),), double), stride=2)


def _c(inputs: int, c: int) -> _Mixed:
    once = (("branch7x7_1", c, 1), ("branch7x7_2", c, (1, 7)), ("branch7x7_3", 192, (7, 1)))
    twice = (
        ("branch7x7dbl_1", c, 1),
        ("branch7x7dbl_2", c, (7, 1)),
        ("branch7x7dbl_3", c, (1, 7)),
        ("branch7x7dbl_4", c, (7, 1)),
        ("branch7x7dbl_5", 192, (1, 7)),
    )
    return _Mixed(inputs, ((("branch1x1", 192, 1),), once, twice), pooled=192)


def _d(inputs: int) -> _Mixed:
    seven = (
        ("branch7x7x3_1", 192, 1),
        ("branch7x7x3_2", 192, (1, 7)),
        ("branch7x7x3_3", 192, (7, 1)),
        ("branch7x7x3_4", 192, 3),
    )
    return _Mixed(inputs, ((("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)), seven), stride=2)


def _e(inputs: int, pool: str) -> _Mixed:
    once = (("branch3x3_1", 384, 1), ("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1)))
    twice = (
        ("branch3x3dbl_1", 448, 1),
        ("branch3x3dbl_2", 384, 3),
        ("branch3x3dbl_3a", 384, (1, 3)),
        ("branch3x3dbl_3b", 384, (3, 1)),
    )
    return _Mixed(inputs, ((("branch1x1", 320, 1),), once, twice), pooled=192, pool=pool)


class Inception(nn.Module):
    """8-bit pictures `(B, 3, H, W)` to features `(B, 2048)`; what torchmetrics' FID and KID take as `feature=`.

    Attributes:
        name: of the network, as recorded beside every figure.
        resize: how pictures come to 299 x 299. "tf1" is the original FID's (bilinear without anti-aliasing, see
            `tf1_resize`: TensorFlow 1, torch-fidelity); "antialias" is the default of torchmetrics 1.9. Their figures
            do not compare.
        weights_sha256: of the weight file; None without one.
    """

    name = NAME
    num_features = 2048

    def __init__(self, weights: str | Path | None, resize: str = "tf1") -> None:
        """Args:
            weights: the file, see `weights.NEEDS["inception"]`. None: random ones, for tests.

        Raises:
            ConfigError: a file that holds something else, or an unknown `resize`.
        """
        super().__init__()
        if resize not in RESIZES:
            raise ConfigError(f"resize is one of {', '.join(RESIZES)}, got {resize!r}")
        self.resize = resize
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _a(192, 32), _a(256, 64), _a(288, 64)
        self.Mixed_6a = _b(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (_c(768, c) for c in (128, 160, 160, 192))
        self.Mixed_7a = _d(768)
        self.Mixed_7b, self.Mixed_7c = _e(1280, "average"), _e(2048, "maximum")
        self.fc = nn.Linear(2048, 1008)
        if weights is not None:
            load_into(self, weights, "inception")
        self.weights_sha256 = None if weights is None else sha256(weights)
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Inception:
        """Stays in evaluation mode: batch statistics would make a picture's features depend on its neighbours."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Features of 8-bit RGB pictures `(B, 3, H, W)`: `(B, 2048)`. Raises `ValueError` for any other."""
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
            raise ValueError(f"pictures are {pictures.dtype} {tuple(pictures.shape)}; give uint8 (B, 3, H, W)")
        x = pictures.to(self.fc.weight.device, self.fc.weight.dtype)
        if self.resize == "tf1":
            x = tf1_resize(x, SIDE)
        else:
            x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
        x = (x - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return F.adaptive_avg_pool2d(x, 1).flatten(1)

    @torch.no_grad()
    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Class scores `(B, 1008)` of features `(B, 2048)`."""
        return self.fc(features)


def tf1_resize(x: torch.Tensor, side: int) -> torch.Tensor:
    """Bilinear, as TensorFlow 1 did it without aligned corners: pixel i of the new picture is read at i * old / new.

    No half-pixel offset and no anti-aliasing: a larger picture is sampled, not averaged. FID's features are defined
    with it.
    """
    for dim in (3, 2):  # in TensorFlow's order
        size = x.shape[dim]
        at = torch.arange(side, device=x.device, dtype=x.dtype) * (size / side)
        low = at.floor().long().clamp(max=size - 1)
        high = (low + 1).clamp(max=size - 1)
        share = (at - low).view((-1, 1) if dim == 2 else (-1,))
        first = x.index_select(dim, low)
        x = first + (x.index_select(dim, high) - first) * share
    return x

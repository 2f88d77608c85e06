"""LPIPS: how far apart two pictures are for a network that was fitted to people's judgements.

Zhang et al., arXiv 1801.03924, version 0.1. The features are those of torchvision's AlexNet or VGG16, whose weight
files load as they are; the linear heads come with torchmetrics. Neither torchvision nor a download is needed.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from ..errors import ConfigError
from .weights import load_into, sha256

# A convolution as (channels, kernel, stride, padding), a maximum pool as (kernel, stride). "tap" ends a stage: its
# activations are compared.
Stack = tuple[tuple[int, ...] | str, ...]
ALEXNET: Stack = (
    *((64, 11, 4, 2), "tap", (3, 2), (192, 5, 1, 2), "tap", (3, 2)),
    *((384, 3, 1, 1), "tap", (256, 3, 1, 1), "tap", (256, 3, 1, 1), "tap"),
)
VGG16: Stack = (
    *((64, 3, 1, 1), (64, 3, 1, 1), "tap", (2, 2), (128, 3, 1, 1), (128, 3, 1, 1), "tap", (2, 2)),
    *((256, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1), "tap", (2, 2)),
    *((512, 3, 1, 1), (512, 3, 1, 1), (512, 3, 1, 1), "tap", (2, 2)),
    *((512, 3, 1, 1), (512, 3, 1, 1), (512, 3, 1, 1), "tap"),
)
# net -> layers, name in `weights.NEEDS`, the shortest side that leaves a place in the last stage
NETS: dict[str, tuple[Stack, str, int]] = {"alex": (ALEXNET, "alexnet", 31), "vgg": (VGG16, "vgg16", 16)}
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's, for values in [-1, 1]


class Lpips(nn.Module):
    """Two batches of 8-bit pictures `(B, 3, H, W)` to their distances `(B,)`, 0 for equal ones.

    Attributes:
        name: the metric's: "lpips_alex" or "lpips_vgg".
        smallest: pixels a side that pictures must have.
        weights_sha256: of the features' file; None without one.
    """

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(self, net: str, weights: str | Path | None) -> None:
        """Args:
            net: "alex", the authors' choice for comparing pictures, or "vgg".
            weights: torchvision's file, see `weights.NEEDS["alexnet"]` and `["vgg16"]`; of it the features are read.
                None: random ones, for tests.

        Raises:
            ConfigError: another net, a file that holds something else.
        """
        super().__init__()
        if net not in NETS:
            raise ConfigError(f"LPIPS is defined on the nets {', '.join(NETS)}, got {net!r}")
        layers, need, self.smallest = NETS[net]
        self.name = f"lpips_{net}"
        self.features, self.taps, widths = _stack(layers)
        if weights is not None:
            load_into(self.features, weights, need, prefix="features.")
        self.weights_sha256 = None if weights is None else sha256(weights)
        self.heads = nn.ParameterList(_heads(net, widths))
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None])
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Distances of 8-bit RGB pictures, pair by pair. Raises `ConfigError` for any other, and for too small ones."""
        for pictures in (a, b):
            if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
                raise ConfigError(f"pictures are {pictures.dtype} {tuple(pictures.shape)}; give uint8 (B, 3, H, W)")
        if a.shape != b.shape:
            raise ConfigError(f"pictures come in pairs of one size, got {tuple(a.shape)} and {tuple(b.shape)}")
        if min(a.shape[2:]) < self.smallest:
            raise ConfigError(f"{self.name} needs sides of {self.smallest} pixels or more, got {tuple(a.shape[2:])}")
        total = torch.zeros(len(a), device=self.scale.device)
        for head, x, y in zip(self.heads, self.stages(a), self.stages(b), strict=True):
            total += ((_unit(x) - _unit(y)).square() * head).sum(1).mean((1, 2))
        return total

    def stages(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        """Activations `(B, C, h, w)` behind each tap, of 8-bit pictures."""
        x = (pictures.to(self.scale.device, self.scale.dtype) / 127.5 - 1 - self.shift) / self.scale
        found = []
        for place, layer in enumerate(self.features):
            x = layer(x)
            if place in self.taps:
                found.append(x)
        return found


def _unit(x: torch.Tensor) -> torch.Tensor:
    """Every place's activations at length 1. The small number is the authors': where nothing is active it stays 0."""
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)


def _stack(layers: Stack) -> tuple[nn.Sequential, frozenset[int], list[int]]:
    """torchvision's `features`, numbered as there, with the places of the taps and the channels at each."""
    modules: list[nn.Module] = []
    width, taps, widths = 3, [], []
    for layer in layers:
        if isinstance(layer, str):
            taps.append(len(modules) - 1)
            widths.append(width)
        elif len(layer) == 2:
            modules.append(nn.MaxPool2d(*layer))
        else:
            channels, kernel, stride, padding = layer
            modules += [nn.Conv2d(width, channels, kernel, stride, padding), nn.ReLU()]
            width = channels
    return nn.Sequential(*modules), frozenset(taps), widths


def _heads(net: str, widths: list[int]) -> list[torch.Tensor]:
    """A weight for each channel of each stage, `(C, 1, 1)`, from torchmetrics' files."""
    spec = find_spec("torchmetrics")
    folder = Path((spec and spec.origin) or "").parent / "functional" / "image" / "lpips_models"
    file = folder / f"{net}.pth"
    if not file.is_file():
        raise ConfigError(f"LPIPS' linear heads are not in {folder}: install torchmetrics 1.4 or later")
    state = torch.load(file, map_location="cpu", weights_only=True)
    heads = [state[f"lin{i}.model.1.weight"][0] for i in range(len(widths))]
    if [len(head) for head in heads] != widths:
        raise ConfigError(f"{file} holds no heads for {net}: {[len(head) for head in heads]} channels, not {widths}")
    return heads

"""LPIPS against its definition in numpy, with torchmetrics' heads read by hand and torchvision's names of the weights.

scripts/check_reference_metrics.py compares it with the lpips package and torchvision.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics

from diffusion_tokred.errors import ConfigError
from diffusion_tokred.evaluation.lpips import Lpips
from tests.reference import quality

# (inputs, outputs, kernel) of torchvision's convolutions, by their numbers in `features`.
ALEXNET = {0: (3, 64, 11), 3: (64, 192, 5), 6: (192, 384, 3), 8: (384, 256, 3), 10: (256, 256, 3)}
VGG16 = {0: (3, 64, 3), 2: (64, 64, 3), 5: (64, 128, 3), 7: (128, 128, 3), 10: (128, 256, 3), 12: (256, 256, 3)}
VGG16 |= {14: (256, 256, 3), 17: (256, 512, 3), **{i: (512, 512, 3) for i in (19, 21, 24, 26, 28)}}
NETS = {"alex": (ALEXNET, quality.ALEXNET, 37), "vgg": (VGG16, quality.VGG16, 21)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random weights in torchvision's layout, classifier included."""
    draws, found = torch.Generator().manual_seed(0), {}
    for net, (layers, _, _) in NETS.items():
        state = {"classifier.1.weight": torch.zeros(4, 4)}
        for number, (inputs, outputs, kernel) in layers.items():
            shape = (outputs, inputs, kernel, kernel)
            state[f"features.{number}.weight"] = torch.randn(shape, generator=draws) * (2 / inputs / kernel**2) ** 0.5
            state[f"features.{number}.bias"] = 0.1 * torch.randn(outputs, generator=draws)
        found[net] = tmp_path_factory.mktemp("weights") / f"{net}.pth"
        torch.save(state, found[net])
    return found


def pair(n: int, h: int, w: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures, and the same with ever more noise."""
    draws = torch.Generator().manual_seed(1)
    a = torch.randint(0, 256, (n, 3, h, w), generator=draws)
    noise = torch.randn((n, 3, h, w), generator=draws) * torch.tensor([4.0, 40.0, 90.0])[:n, None, None, None]
    return a.byte(), (a + noise).clamp(0, 255).byte()


@pytest.mark.parametrize("net", NETS)
def test_distances_are_those_of_the_definition(files: dict[str, Path], net: str) -> None:
    _, layers, side = NETS[net]
    a, b = pair(3, side, side + 3)
    state = {key: value.double().numpy() for key, value in torch.load(files[net], weights_only=True).items()}
    shipped = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / f"{net}.pth"
    heads = [
        head.double().numpy().reshape(-1)
        for _, head in sorted(torch.load(shipped, weights_only=True, map_location="cpu").items())
    ]
    assert len(heads) == 5
    expected = [
        quality.lpips(layers, state, heads, *(p.permute(1, 2, 0).numpy() for p in both))
        for both in zip(a, b, strict=True)
    ]
    found = Lpips(net, files[net])(a, b)
    assert found.shape == (3,) and expected[0] < expected[1] < expected[2]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("net", NETS)
def test_equal_pictures_and_symmetry(files: dict[str, Path], net: str) -> None:
    model, (a, b) = Lpips(net, files[net]), pair(2, 40, 40)
    assert torch.equal(model(a, a), torch.zeros(2))
    torch.testing.assert_close(model(a, b), model(b, a))
    torch.testing.assert_close(model(a, b)[1], model(a[1:], b[1:])[0])  # its neighbours do not matter
    flat = torch.full((1, 3, 40, 40), 128, dtype=torch.uint8)
    assert model(flat, flat).isfinite().all()


@pytest.mark.parametrize("net", NETS)
def test_the_smallest_pictures(files: dict[str, Path], net: str) -> None:
    """At the named side it works, one pixel below torch has no place left; both orientations."""
    model = Lpips(net, files[net])
    assert model(*pair(1, model.smallest, 64)).isfinite().all()
    with pytest.raises(RuntimeError, match=r"(?i)output size is too small|kernel size can't be greater"):
        model.stages(pair(1, model.smallest - 1, 64)[0])
    with pytest.raises(ConfigError, match=f"lpips_{net} needs sides of {model.smallest} pixels"):
        model(*pair(1, 64, model.smallest - 1))


def test_other_input_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the nets alex, vgg, got 'squeeze'"):
        Lpips("squeeze", None)
    with pytest.raises(ConfigError, match=r"is not torchvision's VGG16, .* features\.2\.weight, features\.2\.bias, "):
        Lpips("vgg", files["alex"])
    with pytest.raises(ConfigError, match="no file"):
        Lpips("alex", tmp_path / "none.pth")
    model, (a, b) = Lpips("alex", files["alex"]), pair(2, 40, 40)
    with pytest.raises(ConfigError, match="pairs of one size"):
        model(a, b[:1])
    with pytest.raises(ConfigError, match="give uint8"):
        model(a, b.float())

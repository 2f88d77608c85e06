"""FID's Inception against the network written out in numpy, and its weight file against torch-fidelity's keys.

scripts/check_reference_metrics.py compares it with torch-fidelity itself.
"""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion_tokred.errors import ConfigError
from diffusion_tokred.evaluation.inception import Inception, tf1_resize
from tests.reference import quality

# Of "key shape" lines, sorted, of torch-fidelity 0.4.0's `FeatureExtractorInceptionV3.state_dict()`.
LAYOUT = "760681d791cb624e1bf7a2e802a68933dd17aa5e3109fcf498d9dfa521bc10d7"


def random_pictures(n: int, h: int, w: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random, with batch norms that do something, so that activations neither vanish nor explode."""
    torch.manual_seed(0)
    model = Inception(None)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, torch.nn.BatchNorm2d):
            for values, low, high in ((module.running_var, 0.5, 2), (module.weight, 0.5, 1.5)):
                torch.nn.init.uniform_(values, low, high)
            torch.nn.init.normal_(module.running_mean, std=0.3)
            torch.nn.init.normal_(module.bias, std=0.3)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(model.state_dict(), path)
    return path


def test_features_are_those_of_the_definition(weights: Path) -> None:
    model = Inception(weights)
    pictures = random_pictures(2, 299, 299)
    features = model(pictures)
    state = {key: value.double().numpy() for key, value in torch.load(weights, weights_only=True).items()}
    expected = quality.inception(state, pictures[0].permute(1, 2, 0).numpy())
    assert features.shape == (2, 2048) and expected.std() > 0.1
    np.testing.assert_allclose(features[0].numpy(), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        model.logits(features)[0].numpy(), state["fc.weight"] @ expected + state["fc.bias"], rtol=1e-3, atol=1e-3
    )
    assert not torch.allclose(features[0], features[1], atol=0.01)
    assert model.weights_sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()


@pytest.mark.parametrize("size", [(7, 5), (40, 23)])
def test_resize_is_tensorflow_1s(size: tuple[int, int]) -> None:
    """Up and down; a picture of the wanted size stays as it is."""
    pictures = random_pictures(1, *size)
    expected = quality.tf1_resize(pictures[0].permute(1, 2, 0).numpy().astype(np.float64), 19)
    found = tf1_resize(pictures.double(), 19)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-9)
    same = random_pictures(1, 19, 19).float()
    assert torch.equal(tf1_resize(same, 19), same)


def test_pictures_of_any_size_are_resized_first(weights: Path) -> None:
    model, smooth = Inception(weights), Inception(weights, resize="antialias")
    small = random_pictures(1, 80, 120)
    large = tf1_resize(small.float(), 299)
    averaged = torch.nn.functional.interpolate(small.float(), (299, 299), mode="bilinear", antialias=True)
    for ours, seen in ((model, large), (smooth, averaged)):
        hooked: list[torch.Tensor] = []
        handle = ours.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, args, into=hooked: into.append(args[0]))
        ours(small)
        handle.remove()
        torch.testing.assert_close(hooked[0], (seen - 128) / 128)


def test_layout_of_the_weight_file() -> None:
    lines = sorted(f"{key} {tuple(value.shape)}" for key, value in Inception(None).state_dict().items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == LAYOUT


def test_counters_may_be_missing_and_more_may_be_there(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    fewer = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    torch.save(fewer | {"AuxLogits.fc.bias": torch.zeros(3)}, tmp_path / "w.pth")
    pictures = random_pictures(1, 75, 75)
    assert torch.equal(Inception(tmp_path / "w.pth")(pictures), Inception(weights)(pictures))


def test_it_never_trains(weights: Path) -> None:
    model = Inception(weights).train()
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_other_files_are_refused(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    cut = {key: value for key, value in state.items() if not key.startswith("Mixed_7c.branch1x1")}
    torch.save(cut, tmp_path / "cut.pth")
    with pytest.raises(ConfigError, match=r"has no Mixed_7c.branch1x1.conv.weight, .* and 2 more; get it \(96 MB\)"):
        Inception(tmp_path / "cut.pth")
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match="is not FID's Inception-v3"):
        Inception(tmp_path / "other.pth")
    torch.save(state | {"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "classes.pth")
    with pytest.raises(ConfigError, match=r"fc.weight is \(1000, 2048\) instead of \(1008, 2048\)"):
        Inception(tmp_path / "classes.pth")
    with pytest.raises(ConfigError, match="resize is one of tf1, antialias, got 'bicubic'"):
        Inception(None, resize="bicubic")
    with pytest.raises(ValueError, match="give uint8"):
        Inception(None)(torch.rand(1, 3, 8, 8))

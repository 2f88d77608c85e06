"""ToDo's downsampling, against index loops and against torch's own interpolate."""

import pytest
import torch
import torch.nn.functional as F

from diffusion_tokred.tokens import MODES, downsample, pooled_grid, positions
from tests.reference import pooling

GRIDS = [(8, 8, 2), (8, 12, 4), (6, 9, 3), (7, 9, 2), (9, 8, 2), (11, 7, 3), (13, 10, 4), (5, 5, 1), (5, 7, 5)]
LOOPS = dict(zip(MODES, [pooling.nearest, pooling.nearest_exact, pooling.area, pooling.bilinear], strict=True))


def tokens(b, n, c, dtype=torch.float64):
    return torch.randn(b, n, c, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(dtype)


def interpolate(x, h, w, factor, mode):
    """What ToDo does: tokens to an image, torch's interpolate, and back."""
    image = x.transpose(1, 2).reshape(x.shape[0], -1, h, w)
    return F.interpolate(image, size=(h // factor, w // factor), mode=mode).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("h, w, factor", GRIDS)
@pytest.mark.parametrize("mode", MODES)
def test_definition(h, w, factor, mode):
    x = tokens(2, h * w, 3)
    y = downsample(x, h, w, factor, mode)
    assert y.shape == (2, (h // factor) * (w // factor), 3)
    for row in range(2):
        expected = torch.tensor(LOOPS[mode](x[row].tolist(), h, w, factor), dtype=torch.float64)
        torch.testing.assert_close(y[row], expected, rtol=0, atol=0 if "nearest" in mode else 1e-14)


@pytest.mark.parametrize("h, w, factor", GRIDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_interpolate(h, w, factor, mode, dtype):
    x = tokens(2, h * w, 5, dtype)
    y, expected = downsample(x, h, w, factor, mode), interpolate(x, h, w, factor, mode)
    assert y.dtype == dtype
    if "nearest" in mode:
        assert torch.equal(y, expected)
    else:
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("mode", MODES[:2])
def test_positions(mode):
    for h, w, factor in GRIDS:
        at = positions(h, w, factor, mode)
        index = pooling.nearest_index if mode == "nearest" else pooling.nearest_exact_index
        rows, cols = pooled_grid(h, w, factor)
        assert at.tolist() == [index(i, h, rows) * w + index(j, w, cols) for i in range(rows) for j in range(cols)]
        x = tokens(1, h * w, 2)
        assert torch.equal(x[:, at], downsample(x, h, w, factor, mode))


@pytest.mark.parametrize("mode", MODES[:2])
def test_positions_of_every_length_are_interpolates(mode):
    """In float64: in float32 interpolate rounds its own formula, and for a few lengths lands one lower."""
    for factor in range(1, 9):
        for h in range(factor, 260, 3):
            line = F.interpolate(torch.arange(h).double()[None, None], size=(h // factor,), mode=mode)[0, 0]
            assert positions(h, 1, 1, mode).numel() == h
            column = downsample(torch.arange(h * factor).double()[None, :, None], h, factor, factor, mode)[0, :, 0]
            shift = 0 if mode == "nearest" else factor // 2  # the column that the only cell of a row keeps
            assert torch.equal(column, line * factor + shift)


@pytest.mark.parametrize("mode, at", [("nearest", [0, 2, 8, 10]), ("nearest-exact", [5, 7, 13, 15])])
def test_divisible_grids_keep_one_corner(mode, at):
    assert positions(4, 4, 2, mode).tolist() == at


def test_grids():
    assert pooled_grid(64, 48, 2) == (32, 24)
    assert pooled_grid(7, 9, 2) == (3, 4)
    for bad in [(3, 8, 4), (8, 3, 4), (4, 4, 0)]:
        with pytest.raises(ValueError, match=f"{bad[0]} x {bad[1]} tokens by {bad[2]}"):
            pooled_grid(*bad)


@pytest.mark.parametrize("mode", ["bicubic", "", "max", "Nearest"])
def test_unknown_modes(mode):
    with pytest.raises(ValueError, match="nearest, nearest-exact, area, bilinear"):
        downsample(tokens(1, 16, 2), 4, 4, 2, mode)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="nearest, nearest-exact"):
        positions(4, 4, 2, "area")
    with pytest.raises(ValueError, match="4 x 5 has 20 tokens, got 16"):
        downsample(tokens(1, 16, 2), 4, 5, 2)

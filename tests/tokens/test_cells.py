"""Destinations and sources of a token grid, against the loops of the definition."""

import pytest
import torch

from diffusion_tokred.tokens import compact, destinations, draw, mix, split
from tests.reference import merging

GRIDS = [
    (8, 8, 2, 2),
    (6, 10, 2, 2),
    (7, 9, 2, 2),
    (5, 8, 3, 2),
    (9, 11, 4, 4),
    (3, 7, 1, 7),
    (4, 4, 1, 1),
    (2, 3, 2, 3),
]


@pytest.mark.parametrize("h, w, sy, sx", GRIDS)
@pytest.mark.parametrize("random", [False, True])
def test_cells(h, w, sy, sx, random):
    offset = draw(torch.tensor(mix(h, w)), (h // sy) * (w // sx), sy * sx) if random else None
    dst = destinations(h, w, sy, sx, offset)
    expected = merging.destinations(h, w, sy, sx, offset.tolist() if random else None)
    assert dst.tolist() == expected and dst.dtype == torch.int64
    src = split(dst, h * w)
    assert src.tolist() == merging.sources(h * w, expected) and src.dtype == torch.int64


def test_leftover_rows_and_columns_are_sources():
    src = split(destinations(5, 7, 2, 2), 35).tolist()
    assert all(4 * 7 + j in src for j in range(7)) and all(i * 7 + 6 in src for i in range(5))


def test_every_offset_lands_in_its_cell():
    for k in range(6):
        dst = destinations(4, 9, 2, 3, torch.full((6,), k))
        assert [(p // 9 % 2) * 3 + p % 9 % 3 for p in dst.tolist()] == [k] * 6
        assert [p // 9 // 2 * 3 + p % 9 // 3 for p in dst.tolist()] == list(range(6))


def test_compact_rows():
    mask = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 1, 1]], dtype=torch.bool)
    assert compact(mask, 3).tolist() == [[1, 2, 4], [0, 3, 4]]
    assert compact(torch.zeros(2, 4, dtype=torch.bool), 0).shape == (2, 0)
    assert compact(torch.ones(2, 3, dtype=torch.bool), 3).tolist() == [[0, 1, 2]] * 2


@pytest.mark.parametrize("h, w, sy, sx", [(1, 8, 2, 2), (8, 1, 2, 2), (0, 8, 1, 1), (8, 8, 0, 2)])
def test_no_cell_fits(h, w, sy, sx):
    with pytest.raises(ValueError, match=f"{h} x {w} tokens holds no complete cell of {sy} x {sx}"):
        destinations(h, w, sy, sx)


def test_wrong_offset():
    with pytest.raises(ValueError, match=r"\(12,\).*got \(16,\)"):
        destinations(7, 8, 2, 2, torch.zeros(16, dtype=torch.int64))

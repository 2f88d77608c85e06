"""Matching, merging and unmerging, token by token, against the loops of the definition in float64."""

import pytest
import torch

from diffusion_tokred.tokens import destinations, draw, match, mix, split
from diffusion_tokred.tokens.kernels import matching
from tests.reference import merging

# h, w, sy, sx, r: square, not square, not divisible (left-over rows and columns), other strides, none and all merged
CASES = [
    (8, 8, 2, 2, 32), (6, 10, 2, 2, 20), (7, 9, 2, 2, 30), (9, 8, 3, 2, 25), (5, 12, 1, 4, 11), (9, 10, 4, 4, 60),
    (6, 6, 2, 2, 0), (6, 6, 2, 2, 27), (5, 7, 2, 2, 29), (4, 4, 1, 1, 0),
]  # fmt: skip


def tokens(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cells(h, w, sy, sx, random=True):
    offset = draw(torch.tensor(mix(h, w, sy)), (h // sy) * (w // sx), sy * sx) if random else None
    dst = destinations(h, w, sy, sx, offset)
    return dst, split(dst, h * w)


def check_row(m, row, merged, n):
    """The Merge's indices in one row are those of the reference's {source: destination}."""
    kept = merging.kept(n, merged)
    assert m.at[row].tolist() == kept
    assert m.slot[row].tolist() == [kept.index(merged.get(i, i)) for i in range(n)]
    assert m.status()[row].tolist() == [int(i in merged) for i in range(n)]


@pytest.mark.parametrize("h, w, sy, sx, r", CASES)
@pytest.mark.parametrize("random", [False, True])
def test_definition(h, w, sy, sx, r, random):
    n = h * w
    x, y, z = tokens(2, n, 5), tokens(2, n, 3, seed=1), tokens(2, n - r, 4, seed=2)
    dst, src = cells(h, w, sy, sx, random)
    m = match(x, dst, src, r)
    assert m.at.shape == (2, n - r) and m.slot.shape == (2, n) and m.status().dtype == torch.uint8
    for row in range(2):
        merged = merging.match([x[row].tolist()], dst.tolist(), src.tolist(), r)
        check_row(m, row, merged, n)
        expected = torch.tensor(merging.merge(y[row].tolist(), merged), dtype=torch.float64)
        torch.testing.assert_close(m.merge(y)[row], expected, rtol=0, atol=1e-14)
        assert m.unmerge(z)[row].tolist() == merging.unmerge(z[row].tolist(), n, merged)


@pytest.mark.parametrize("h, w, sy, sx, r", CASES[:4])
@pytest.mark.parametrize("halves", [2, 3])
def test_parts_of_a_batch_share_a_matching(h, w, sy, sx, r, halves):
    x = tokens(2 * halves, h * w, 5) * torch.tensor([1.0, 100.0] * halves)[:, None, None]
    x[0] *= 7  # similarity is a cosine: no part counts more because its tokens are longer
    dst, src = cells(h, w, sy, sx)
    m = match(x, dst, src, r, halves=halves)
    alone = match(x, dst, src, r)
    for row in range(2 * halves):
        parts = [x[p].tolist() for p in range(row % 2, 2 * halves, 2)]
        check_row(m, row, merging.match(parts, dst.tolist(), src.tolist(), r), h * w)
    assert not torch.equal(m.slot, alone.slot)  # sharing does change something on this input


def test_a_row_does_not_know_its_batch():
    x, y = tokens(5, 63, 6), tokens(5, 63, 4, seed=1)
    dst, src = cells(7, 9, 2, 2)
    m = match(x, dst, src, 25)
    for row in range(5):
        alone = match(x[row : row + 1], dst, src, 25)
        assert torch.equal(m.at[row], alone.at[0]) and torch.equal(m.slot[row], alone.slot[0])
        assert torch.equal(m.merge(y)[row], alone.merge(y[row : row + 1])[0])


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("chunk", [1, 48, 200])
def test_streaming_over_chunks_changes_nothing(monkeypatch, chunk, halves):
    """1, 2 or 4, and 11 or 22 of the 27 sources at a time."""
    x = tokens(2, 36, 6)
    dst, src = cells(6, 6, 2, 2)
    whole = match(x, dst, src, 15, halves=halves)
    monkeypatch.setattr(matching, "_SCORES_PER_CHUNK", chunk)
    assert torch.equal(match(x, dst, src, 15, halves=halves).slot, whole.slot)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("halves", [1, 2])
def test_scores_of_narrow_types_are_float32(dtype, halves):
    """All cosines lie within 1e-3 of 1, where bfloat16 and float16 could not tell them apart."""
    x = (1 + 0.02 * tokens(2, 64, 16)).to(dtype)
    dst, src = cells(8, 8, 2, 2)
    m = match(x, dst, src, 24, halves=halves)
    for row in range(2):
        parts = [x[row].tolist()] if halves == 1 else [x[0].tolist(), x[1].tolist()]
        check_row(m, row, merging.match(parts, dst.tolist(), src.tolist(), 24), 64)


def test_autocast_does_not_lower_the_scores():
    x = 1 + 0.02 * tokens(1, 64, 16, dtype=torch.float32)
    dst, src = cells(8, 8, 2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        m = match(x, dst, src, 24)
    assert torch.equal(m.slot, match(x, dst, src, 24).slot)


def test_float64_stays_float64():
    """Two destinations whose cosines with the source differ by 1e-10."""
    x = torch.zeros(1, 4, 2, dtype=torch.float64)
    x[0, :, 0] = 1
    x[0, :, 1] = torch.tensor([1e-3 + 1e-7, 0.0, 1e-3, 5.0])  # cosines with token 1: 1 - 5e-7 (1 + 2e-4), 1 - 5e-7
    m = match(x, torch.tensor([0, 2, 3]), torch.tensor([1]), 1)
    assert m.slot.tolist() == [[0, 1, 1, 2]]


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_tokens_of_no_length(dtype, halves):
    """They are 0 to all: matched after every positive cosine; nothing becomes NaN."""
    x = tokens(2, 48, 4).abs() + 0.1  # all cosines positive
    x[:, [3, 9, 20, 21]] = 0
    dst, src = cells(6, 8, 2, 2, random=False)
    assert {3, 9, 20, 21} & set(src.tolist()) and {3, 9, 20, 21} & set(dst.tolist())
    silent = torch.tensor(sorted({3, 9, 20, 21} & set(src.tolist())))
    m = match(x.to(dtype), dst, src, len(src) - len(silent), halves=halves)
    assert not m.status()[:, silent].any() and m.status().sum() == 2 * (len(src) - len(silent))
    assert m.merge(x.to(dtype)).isfinite().all()


def test_a_token_of_no_length_is_preferred_to_an_opposite_one():
    x = torch.tensor([[[1.0, 0], [0, 0], [-1, 0], [-1, 1e-3]]])
    m = match(x, torch.tensor([0]), torch.tensor([1, 2, 3]), 1)
    assert m.status().tolist() == [[0, 1, 0, 0]]


@pytest.mark.parametrize("r", [-1, 28])
def test_r_out_of_range(r):
    dst, src = cells(6, 6, 2, 2)
    with pytest.raises(ValueError, match=f"cannot merge {r} tokens.*27 sources.*36"):
        match(tokens(1, 36, 3), dst, src, r)


def test_wrong_positions_and_batches():
    dst, src = cells(6, 6, 2, 2)
    with pytest.raises(ValueError, match=r"each of the 40 tokens once, got 9 \+ 27"):
        match(tokens(1, 40, 3), dst, src, 4)
    for halves in (0, 2):
        with pytest.raises(ValueError, match=f"batch of 3 does not have {halves} equal parts"):
            match(tokens(3, 36, 3), dst, src, 4, halves=halves)

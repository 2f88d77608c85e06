"""Regions of the picture, by their definitions, in loops and fractions."""

import itertools
from fractions import Fraction

import pytest
import torch

from diffusion_tokred.tokens import (
    Merge,
    cat_select,
    lifted,
    match,
    mergeable,
    ranked,
    ratio_of,
    room,
    touched,
    weighed,
)
from tests.reference.regions import overlap, protected_tokens


def mask_of(*size, share=0.1, seed=0):
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed)) < share


SIZES = [((7, 5), (3, 4)), ((16, 16), (8, 8)), ((3, 2), (8, 5)), ((1, 1), (2, 3)), ((37, 20), (6, 9))]


@pytest.mark.parametrize("size, grid", SIZES)
def test_a_token_that_shares_area_is_touched(size, grid):
    mask = mask_of(*size)
    mask[0, -1] = True
    assert touched(mask, grid).nonzero().flatten().tolist() == protected_tokens(mask.tolist(), *grid)


@pytest.mark.parametrize("size, grid", SIZES)
def test_weights_are_means_over_what_a_token_touches(size, grid):
    pixels = torch.rand(*size, generator=torch.Generator().manual_seed(1))
    (h, w), (H, W) = grid, size
    for token, found in enumerate(weighed(pixels, grid).tolist()):
        rows = [y for y in range(H) if overlap(y, H, token // w, h)]
        columns = [x for x in range(W) if overlap(x, W, token % w, w)]
        want = [float(pixels[y, x]) for y in rows for x in columns]
        assert found == pytest.approx(sum(want) / len(want), rel=1e-5)


def test_a_video_is_its_frames():
    mask = mask_of(9, 4)
    assert torch.equal(touched(mask, (6, 4), frames=2), touched(mask, (3, 4)).repeat(2))


@pytest.mark.parametrize("grid, sy, sx", [((4, 4), 2, 2), ((5, 3), 2, 2), ((2, 6), 1, 3), ((3, 4), 3, 2)])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9])
def test_as_many_can_be_merged_whatever_is_drawn(grid, sy, sx, share):
    """The least over all choices of destinations: free sources, if there is a free destination."""
    h, w = grid
    protected = mask_of(2, h * w, share=share, seed=int(10 * share))
    cells = [
        [(i * sy + y) * w + j * sx + x for y in range(sy) for x in range(sx)] for i in range(h // sy)
        for j in range(w // sx)
    ]  # fmt: skip
    least = []
    for row in protected.tolist():
        for choice in itertools.product(*cells):
            free = sum(not row[p] for p in range(h * w) if p not in choice)
            least.append(free if any(not row[p] for p in choice) else 0)
    assert mergeable(protected, grid, sy, sx) == min(least)


def test_counts():
    for n, need in itertools.product((1, 5, 16, 63, 64, 255, 1024), (0, 1, 3, 17, 60, 1000)):
        need = min(need, n)
        assert need <= room(n, need) <= n and (room(n, need) == n or room(n, need) - need < -(-n // 16))
        assert n - int(n * ratio_of(n, need)) == need
    assert {room(4096, need, 128) % 128 for need in range(4097)} == {0}
    assert len({room(4096, need, 128) for need in range(4097)}) == 17


def test_lifted():
    scores = torch.tensor([[3.0, 1.0, 2.0, 1.0]])
    assert ranked(scores).tolist() == [[0.75, 0, 0.5, 0.25]]  # of equal ones the first is below
    assert lifted(scores, torch.tensor([[0.0, 1, 0, 0.5]])).tolist() == [
        [0.75, 1.25, 0.5, 0.5]
    ]  # the first is the higher
    protected = torch.tensor([[False, True, False, False], [True, False, False, False]])
    inf = float("inf")
    assert lifted(scores, None, protected).tolist() == [[3, inf, 2, 1], [inf, 1, 2, 1]]
    whole = lifted(torch.tensor([[3, -1]]), None, torch.tensor([[False, True]]))
    assert whole.dtype == torch.int64 and whole[0, 1] == torch.iinfo(torch.int64).max
    assert lifted(scores) is scores


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("weighs", [False, True])
def test_protected_tokens_are_neither_merged_nor_merged_into(halves, weighs):
    n, r, rows = 24, 6, 4 // halves
    gen = torch.Generator().manual_seed(3)
    x = torch.randn(4, n, 8, generator=gen, dtype=torch.float64)
    dst = torch.arange(0, n, 4)
    src = torch.tensor([p for p in range(n) if p % 4])
    protected = mask_of(rows, n, share=0.3, seed=4)
    weights = torch.rand(rows, n, generator=gen) if weighs else None
    m = match(x, dst, src, r, halves, weights, protected)
    assert isinstance(m, Merge) and m.at.shape == (4, n - r)
    unit = x / x.norm(dim=-1, keepdim=True)
    for b in range(4):
        row = b % rows
        parts = [unit[row + part * rows] for part in range(halves)] if halves > 1 else [unit[b]]
        safe = [p for p in range(n) if not protected[row, p]]
        best = {}
        for p in src.tolist():
            near = {q: sum(float(u[p] @ u[q]) for u in parts) for q in dst.tolist() if q in safe}
            best[p] = max(near, key=near.get), max(near.values())
        order = sorted(src.tolist(), key=lambda p: best[p][1])
        score = {p: order.index(p) / len(order) - float(weights[row, p]) if weighs else best[p][1] for p in order}
        gone = sorted((p for p in order if p in safe), key=lambda p: -score[p])[:r]
        assert sorted(set(range(n)) - set(m.at[b].tolist())) == sorted(gone)
        for p in range(n):
            assert int(m.at[b, m.slot[b, p]]) == (best[p][0] if p in gone else p)


def test_cat_chooses_the_first_before_all_others():
    gen = torch.Generator().manual_seed(5)
    n, k = 30, 9
    change, labels = torch.rand(2, n, generator=gen), torch.randint(0, 4, (2, n), generator=gen)
    counts = torch.rand(2, n, generator=gen)
    first = mask_of(1, n, share=0.2, seed=6)
    first[:, -2:] = True
    plain = cat_select(change, labels, counts, k, 4, 3, (2, 1))
    found = cat_select(change, labels, counts, k, 4, 3, (2, 1), first=first)
    hot = cat_select(change, labels, counts, 3, 4, 3, (2, 1))  # those of the clusters alone
    need = set(first[0].nonzero().flatten().tolist())
    assert 2 <= len(need) <= 6
    for b in range(2):
        chosen = set(found[b].tolist())
        assert len(chosen) == k and need <= chosen
        assert set(hot[b].tolist()) <= chosen  # there was room
        others = [p for p in range(n) if p not in need | set(hot[b].tolist())]
        oldest = sorted(others, key=lambda p: (float(counts[b, p]), -float(change[b, p])))
        assert chosen - need - set(hot[b].tolist()) == set(oldest[: k - len(need | set(hot[b].tolist()))])
    assert not torch.equal(plain, found)
    assert Fraction(1, 2) == overlap(0, 2, 0, 1)  # the reference itself: half of the picture

"""The k best rows, ties over guidance halves, and rows taken out and put back."""

import pytest
import torch

from diffusion_tokred.tokens import rows_at, scatter_rows, tie, top, untie
from tests.reference import caching

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("n", [1, 2, 15, 64, 63])
@pytest.mark.parametrize("levels", [1, 2, 5, 10**6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_top(n, levels, dtype):
    scores = (randn(3, n, seed=n) * levels).round().to(dtype)
    for k in {0, 1, n // 3, n // 2, n - 1, n}:
        found = top(scores, k)
        assert found.dtype == torch.int64 and found.shape == (3, k)
        assert found.tolist() == [caching.top(scores[i].tolist(), k) for i in range(3)]


def test_top_of_what_is_not_finite():
    inf, nan = float("inf"), float("nan")
    scores = torch.tensor([[nan, 1, -inf, inf, nan, inf], [-inf, -inf, nan, 0.0, -0.0, nan], [nan] * 6])
    assert top(scores, 2).tolist() == [[3, 5], [3, 4], [0, 1]]
    assert top(scores, 4).tolist() == [[0, 1, 3, 5], [0, 1, 3, 4], [0, 1, 2, 3]]
    large = torch.tensor([[3.4e38, inf, 3.4028235e38]])
    assert top(large, 1).tolist() == [[1]]


@pytest.mark.parametrize("halves", [1, 2, 3])
def test_tie(halves):
    scores = randn(6, 10)
    tied = tie(scores, halves)
    m = 6 // halves
    expected = [[sum(scores[p * m + i, j].item() for p in range(halves)) / halves for j in range(10)] for i in range(m)]
    torch.testing.assert_close(tied, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-14)
    rows = untie(top(tied, 4), halves)
    assert rows.shape == (6, 4) and all(torch.equal(rows[i], rows[i % m]) for i in range(6))
    assert untie(randn(2, 3, 4), halves).shape == (2 * halves, 3, 4)


@pytest.mark.parametrize("halves", [0, 4])
def test_uneven_halves(halves):
    with pytest.raises(ValueError, match=f"batch of 6 does not have {halves} equal parts"):
        tie(randn(6, 10), halves)


@pytest.mark.parametrize("at", [[0, 3, 6], [[0, 3, 6]], [[0, 3, 6], [2, 1, 4], [5, 6, 0]], []])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(at, dtype):
    at = torch.tensor(at, dtype=torch.int64)
    x, rows = (9 * randn(3, m, 4, seed=m).to(dtype) for m in (7, at.shape[-1]))
    taken, stored = rows_at(x, at), x.clone()
    assert scatter_rows(stored, at, rows) is stored
    expected = x.clone()
    for i in range(3):
        for j, place in enumerate((at[i % at.shape[0]] if at.ndim == 2 else at).tolist()):
            assert torch.equal(taken[i, j], x[i, place])
            expected[i, place] = rows[i, j]
    assert taken.shape == rows.shape and torch.equal(stored, expected)
    assert torch.equal(rows_at(stored, at), rows)


def test_rows_are_cast_to_what_is_stored():
    stored = torch.zeros(2, 5, 3, dtype=torch.bfloat16)
    for at in (torch.tensor([1, 4]), torch.tensor([[1, 4], [0, 2]])):
        assert scatter_rows(stored, at, randn(2, 2, 3)).dtype == torch.bfloat16


def test_one_graph(dynamo):
    def refresh(scores, stored, x):
        at = untie(top(tie(scores, 2), 5), 2)
        return scatter_rows(stored, at, 2 * rows_at(x, at)), top(scores, 3)

    compiled = torch.compile(refresh, fullgraph=True, backend="eager")
    for seed in range(3):
        scores, stored, x = randn(4, 12, seed=seed), randn(4, 12, 3, seed=seed), randn(4, 12, 3, seed=9)
        mine = stored.clone()
        found, expected = compiled(scores, mine, x), refresh(scores, stored, x)
        assert torch.equal(mine, stored) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("k", [-1, 11])
def test_too_many(k):
    with pytest.raises(ValueError, match=f"cannot choose {k} of 10 tokens"):
        top(randn(2, 10), k)

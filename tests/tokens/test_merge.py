"""The Merge itself, from plans written by hand and drawn at random."""

import pytest
import torch

from diffusion_tokred.tokens import Merge

# Token 1 speaks for 0 and 4, token 2 for 3, token 5 for itself; in the second row token 0 speaks for all of 0 to 3.
BY_HAND = torch.tensor([[1, 1, 2, 2, 1, 5], [0, 0, 0, 4, 4, 5]])


def random_plan(b, n, m, seed=0):
    """Each row keeps m random tokens; each other token is given to a random kept one."""
    g = torch.Generator().manual_seed(seed)
    kept = torch.stack([torch.randperm(n, generator=g)[:m] for _ in range(b)])
    representative = kept.gather(1, torch.randint(m, (b, n), generator=g))
    return representative.scatter(1, kept, kept)


def loop_merge(y, representative):
    """Means in float64 of the tokens of each representative, ascending."""
    rows = []
    for row, speaker in zip(y.double(), representative.tolist(), strict=True):
        rows.append([row[[i for i, s in enumerate(speaker) if s == k]].mean(0) for k in sorted(set(speaker))])
    return torch.stack([torch.stack(row) for row in rows])


def test_by_hand():
    m = Merge(BY_HAND, 3)
    assert m.at.tolist() == [[1, 2, 5], [0, 4, 5]]
    assert m.slot.tolist() == [[0, 0, 1, 1, 0, 2], [0, 0, 0, 1, 1, 2]]
    assert m.counts().tolist() == [[3, 2, 1], [3, 2, 1]]
    assert m.status().tolist() == [[1, 0, 0, 1, 1, 0], [0, 1, 1, 1, 0, 0]]
    y = torch.tensor([[3.0, 6, 10, 20, 9, 7], [1, 2, 6, 3, 4, 5]])[..., None]
    assert m.merge(y)[..., 0].tolist() == [[6, 15, 7], [3, 3.5, 5]]
    z = torch.tensor([[1.0, 2, 3], [4, 5, 6]])[..., None]
    assert m.unmerge(z)[..., 0].tolist() == [[1, 1, 2, 2, 1, 3], [4, 4, 4, 5, 5, 6]]


# The unit roundoff of the half types: their means are rounded once, and are as good as float32's before that.
TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("b, n, m, c", [(2, 60, 20, 8), (3, 50, 50, 5), (1, 40, 1, 3), (2, 600, 7, 33), (2, 9, 4, 1)])
def test_mean(dtype, b, n, m, c):
    plan = Merge(representative := random_plan(b, n, m), m)
    y = (torch.randn(b, n, c, generator=torch.Generator().manual_seed(1)) + 3).to(dtype)
    z = plan.merge(y)
    assert z.dtype == dtype and z.shape == (b, m, c)
    expected = loop_merge(y, representative)
    assert ((z.double() - expected).abs() <= TOLERANCES[dtype] * (expected.abs() + 1e-3)).all()
    assert (plan.counts().sum(1) == n).all()
    total = (z.double() * plan.counts()[..., None]).sum(1)
    torch.testing.assert_close(total / n, y.double().mean(1), rtol=2 * TOLERANCES[dtype], atol=1e-12)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_nothing_merged_is_exact(dtype):
    y = torch.randn(2, 30, 7).to(dtype)
    plan = Merge(torch.arange(30).repeat(2, 1), 30)
    assert torch.equal(plan.merge(y), y) and torch.equal(plan.unmerge(y), y)
    assert not plan.status().any() and (plan.counts() == 1).all()


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_equal_tokens_survive(dtype):
    """Tokens equal within their slot come back: exactly, where the type is narrower than the sum."""
    plan = Merge(representative := random_plan(2, 400, 90), 90)
    y = torch.randn(2, 400, 16).to(dtype).gather(1, representative[..., None].expand(-1, -1, 16))
    back = plan.unmerge(plan.merge(y))
    if dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(back, y)
    else:
        torch.testing.assert_close(back, y, rtol=8 * torch.finfo(dtype).eps, atol=0)


def test_means_of_powers_of_two_are_exact():
    y = torch.randint(-1000, 1000, (1, 64, 8)).float()
    expected = y.view(1, 16, 4, 8).double().mean(2)
    assert torch.equal(Merge((torch.arange(64) // 4 * 4)[None], 16).merge(y).double(), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_merging_twice_is_merging_once(dtype):
    plan = Merge(random_plan(2, 100, 30), 30)
    once = plan.merge(torch.randn(2, 100, 8, dtype=dtype))
    torch.testing.assert_close(plan.merge(plan.unmerge(once)), once, rtol=8 * torch.finfo(dtype).eps, atol=0)


def test_a_large_sum_does_not_overflow_float16():
    plan = Merge(torch.zeros(1, 50, dtype=torch.int64), 1)
    y = torch.full((1, 50, 4), 40000.0, dtype=torch.float16)
    assert ((plan.merge(y) - 40000).abs() <= 32).all()  # one ulp there


def test_views_and_widths():
    """Inputs need not be contiguous, and one plan serves tokens of any width."""
    plan = Merge(representative := random_plan(2, 24, 10), 10)
    y = torch.randn(24, 2, 6, dtype=torch.float64).transpose(0, 1)
    torch.testing.assert_close(plan.merge(y), loop_merge(y, representative))
    torch.testing.assert_close(plan.merge(y[..., ::2]), loop_merge(y, representative)[..., ::2])
    z = torch.randn(6, 10, 2).permute(2, 1, 0)
    assert torch.equal(plan.unmerge(z), torch.stack([z[i, plan.slot[i]] for i in range(2)]))

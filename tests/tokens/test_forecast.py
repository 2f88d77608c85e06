"""Forecasts from finite differences, against the recursion in numbers and polynomials whose answer is known."""

import pytest
import torch

from diffusion_tokred.tokens import extrapolate, factors
from tests.reference import caching


def run(features, steps, order):
    """Factors after full steps at `steps`."""
    held, last = [], None
    for feature, step in zip(features, steps, strict=True):
        held = factors(feature, held, 1 if last is None else step - last, order)
        last = step
    return held


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("order", [0, 1, 2, 4])
@pytest.mark.parametrize("steps", [[0], [0, 1], [0, 1, 2], [0, 1, 2, 6, 10, 14], [3, 4, 9, 11, 12]])
@pytest.mark.parametrize("down", [1, -1])
def test_definition(order, steps, down):
    """Also with steps counted down, as DiT's release does: gaps and distances are negative then."""
    values = randn(len(steps), 6)
    held = run(values, [down * step for step in steps], order)
    assert len(held) == min(order + 1, len(steps))
    for j in range(6):
        expected = caching.factors(values[:, j].tolist(), [down * step for step in steps], order)
        assert [f[j].item() for f in held] == pytest.approx(expected, abs=1e-12)
        for x in (0, 1, 3, 5):
            taylor, hermite = extrapolate(held, down * x), extrapolate(held, down * x, "hermite")
            assert taylor[j].item() == pytest.approx(caching.taylor_forecast(expected, down * x), abs=1e-9)
            assert hermite[j].item() == pytest.approx(caching.hermite_forecast(expected, down * x, 0.5), abs=1e-9)


@pytest.mark.parametrize("basis", ["taylor", "hermite"])
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_constants_are_exact(basis, order):
    feature = randn(2, 5, 3)
    held = run([feature] * 5, [0, 1, 2, 6, 8], order)
    assert all(torch.equal(extrapolate(held, x, basis), feature) for x in range(4))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_linear_features_are_exact_from_order_1(order):
    a, b = randn(2, 5, 3), randn(2, 5, 3, seed=1)
    held = run([a + b * p for p in (0, 1, 2, 6, 11)], [0, 1, 2, 6, 11], order)
    for x in range(6):
        torch.testing.assert_close(extrapolate(held, x), a + b * (11 + x), rtol=0, atol=1e-12)
    low = run([a + b * p for p in (0, 1)], [0, 1], 0)
    assert torch.equal(extrapolate(low, 3), a + b)  # order 0 is reuse


def test_quadratic_features_with_equal_gaps():
    """The second factor is the second derivative; what the forecast misses is known: half a gap of it, times x."""
    a, b, c = randn(3, 4, 2, dtype=torch.float64)
    gap, steps = 3, [0, 3, 6]
    held = run([a + b * p + c * p * p for p in steps], steps, 2)
    torch.testing.assert_close(held[2], 2 * c, rtol=0, atol=1e-12)
    for x in range(4):
        p = steps[-1] + x
        torch.testing.assert_close(a + b * p + c * p * p - extrapolate(held, x), c * gap * x, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("basis", ["taylor", "hermite"])
def test_lower_precision(dtype, basis):
    held = [randn(3, 7, seed=i, dtype=dtype) for i in range(3)]
    found = extrapolate(held, 3, basis)
    assert found.dtype == dtype
    assert torch.equal(found, extrapolate([f.float() for f in held], 3, basis).to(dtype))
    assert all(f.dtype == dtype for f in factors(held[0], held[1:], 2, 2))


def test_numbers_and_tensors_count_alike():
    held = [randn(3, 4, seed=i) for i in range(3)]
    for basis in ("taylor", "hermite"):
        assert torch.equal(extrapolate(held, 5, basis), extrapolate(held, torch.tensor(5), basis))
    found = factors(held[0], held[1:], torch.tensor(4), 2)
    assert all(map(torch.equal, found, factors(held[0], held[1:], 4, 2)))


@pytest.mark.parametrize("basis", ["taylor", "hermite"])
def test_one_graph_for_all_distances(basis, dynamo):
    graphs = torch._dynamo.testing.CompileCounter()

    def step(new, old, gap, x):
        held = factors(new, old, gap, 2)
        return [*held, extrapolate(held, x, basis)]

    compiled = torch.compile(step, fullgraph=True, backend=graphs)
    old = [randn(2, 6, seed=i) for i in range(3)]
    for n in range(1, 5):
        values = randn(2, 6, seed=n), old, torch.tensor(n), torch.tensor(n + 1)
        assert all(map(torch.equal, compiled(*values), step(*values)))
    assert graphs.frame_count == 1


def test_wrong_arguments():
    x = randn(2, 3)
    with pytest.raises(ValueError, match="got order -1"):
        factors(x, [], 1, -1)
    with pytest.raises(ValueError, match="gap 0"):
        factors(x, [x], 0)
    with pytest.raises(ValueError, match="no factors"):
        extrapolate([], 1)
    with pytest.raises(ValueError, match="'fourier': use one of taylor, hermite"):
        extrapolate([x, x], 1, "fourier")

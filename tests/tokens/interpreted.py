"""The kernels against the plain versions.

`test_kernels.py` runs this in a process of its own, where Triton's interpreter is on before Triton is imported. On a
machine with a GPU:

    python -m pytest tests/tokens/interpreted.py
"""

import os
import time

import pytest
import torch
import torch.nn.functional as F

from diffusion_tokred.tokens.kernels import matching, rows, selection

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
if DEVICE == "cpu" and not INTERPRETED:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from diffusion_tokred.tokens.kernels import matching_triton, rows_triton, selection_triton  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SEED = time.time_ns() % 2**31  # fresh inputs each time; printed when a test fails


@pytest.fixture(autouse=True)
def seeded():
    print(f"seed {SEED}")
    torch.manual_seed(SEED)


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).to(DEVICE)


def indices(kind, b, n, m):
    """(M,) or (B, M) positions, each once, in no order."""
    lots = 1 if kind == "shared" else b
    at = torch.stack([torch.randperm(n)[:m] for _ in range(lots)]).to(DEVICE)
    return at[0] if kind == "shared" else at


def strided(x):
    """The same values, with gaps between samples, rows and columns."""
    b, n, c = x.shape
    wide = x.new_zeros(b, 2 * n, c + 3)
    wide[:, ::2, :c] = x
    return wide[:, ::2, :c]


SIZES = [
    (1, 1, 1, 1),
    (2, 7, 5, 3),
    (3, 33, 17, 33),
    (2, 19, 2100, 4),
    (2, 130, 1, 67),
]  # samples, rows, columns, chosen


def ulp(dtype):
    """Relative error of one rounding. (The interpreter cuts off what does not fit into bfloat16; a GPU rounds.)"""
    return torch.finfo(dtype).eps / (1 if INTERPRETED and dtype == torch.bfloat16 else 2)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int32, torch.float64])
@pytest.mark.parametrize("kind", ["shared", "each"])
@pytest.mark.parametrize("b, n, c, m", SIZES)
def test_rows_taken_and_put(b, n, c, m, kind, dtype):
    x, new, at = (9 * randn(b, n, c)).to(dtype), (9 * randn(b, m, c)).to(dtype), indices(kind, b, n, m)
    expected = x.clone()
    rows.put(expected, at, new)
    mine = strided(x) if kind == "each" else x.clone()
    assert torch.equal(rows_triton.take(mine, at), rows.take(x, at))
    rows_triton.put(mine, at, new)
    assert torch.equal(mine, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_cast_to_what_is_stored(dtype):
    mine, new, at = randn(2, 9, 7, dtype=dtype), randn(2, 4, 7), indices("each", 2, 9, 4)
    expected = mine.clone()
    rows_triton.put(mine, at, new)
    rows.put(expected, at, new)
    torch.testing.assert_close(mine, expected, rtol=2 * ulp(dtype) if dtype == torch.bfloat16 else 0, atol=0)


def test_rows_put_into_a_view():
    wide = randn(2, 6, 8)
    before, at, new = wide.clone(), torch.tensor([4, 1], device=DEVICE), randn(2, 2, 3)
    rows_triton.put(wide[:, :, 2:5], at, new)
    before[:, [4, 1], 2:5] = new
    assert torch.equal(wide, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["shared", "each"])
@pytest.mark.parametrize("b, n, c, m", SIZES)
def test_norm_and_modulation(b, n, c, m, kind, dtype):
    x, at = (randn(b, n, c) * 3 + 5).to(dtype), indices(kind, b, n, m)
    shift, scale = randn(b, c, dtype=dtype), randn(b, c, dtype=dtype)
    exact = F.layer_norm(rows.take(x.double(), at), (c,), eps=1e-6)
    exact = exact * (1 + scale.double()[:, None]) + shift.double()[:, None]
    # rounded once: half an ulp, and what float32 loses where large equal numbers are subtracted
    bound = ulp(dtype) * exact.abs() + 1e-4 * (1 + scale.double().abs())[:, None] + 1e-6
    found = rows_triton.modulate(strided(x) if kind == "each" else x, at, shift, scale, 1e-6)
    assert found.dtype == dtype and found.shape == (b, m, c)
    assert (found.double() - exact).abs().le(bound).all()
    plain = rows.modulate(x, at, shift, scale, 1e-6).double()  # rounded several times
    slack = 4 * torch.finfo(dtype).eps * (1 + exact.abs() + plain.abs()) * (2 + scale.double().abs())[:, None]
    assert (found.double() - plain).abs().le(bound + slack).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["shared", "each"])
@pytest.mark.parametrize("b, n, c, m", SIZES)
def test_gated_residual(b, n, c, m, kind, dtype):
    x, y, gate = randn(b, n, c, dtype=dtype), randn(b, m, c, dtype=dtype), randn(b, c, dtype=dtype)
    at = indices(kind, b, n, m)
    product = gate.double()[:, None] * y.double()
    exact = x.double()
    exact.scatter_(1, at.expand(b, -1)[:, :, None].expand(-1, -1, c), rows.take(exact, at) + product)
    mine, plain = strided(x), x.clone()
    rows_triton.add(mine, at, y, gate)
    rows.add(plain, at, y, gate)
    slack = 2 * torch.finfo(dtype).eps * (x.double().abs() + exact.abs() + 4 * product.abs().amax())
    assert (mine.double() - exact).abs().le(ulp(dtype) * exact.abs() + 1e-6).all()
    assert (plain.double() - mine.double()).abs().le(slack + 1e-6).all()
    left = torch.ones(b, n, dtype=torch.bool, device=DEVICE).scatter_(1, at.expand(b, -1), False)
    assert torch.equal(mine[left], x[left])  # untouched


def parts(n, d):
    order = torch.randperm(n).to(DEVICE)
    return order[:d], order[d:]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("b, n, c, d", [(1, 2, 1, 1), (2, 35, 40, 9), (2, 150, 33, 70), (1, 140, 70, 129)])
def test_nearest(b, n, c, d, scaled, dtype):
    x, (dst, src) = randn(b, n, c, dtype=dtype), parts(n, d)
    scale = x.float().norm(dim=-1, keepdim=True).reciprocal() if scaled else None
    values, places = matching_triton.best(x, dst, src, scale)
    scores = x[:, src].double() @ x[:, dst].double().mT
    if scale is not None:
        scores = scores * scale[:, dst].double().mT
    assert values.shape == places.shape == (b, n - d) and places.dtype == torch.int64
    chosen = scores.gather(2, places[..., None])[..., 0]
    error = 1e-5 * (1 + scores.abs().amax())
    assert (chosen - values).abs().le(error).all()  # a value is that of its place
    assert (scores.amax(-1) - chosen).le(error).all()  # and none is larger
    plain, _ = matching.best(x.float(), dst, src, scale)
    assert (plain - values).abs().le(error).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nearest_of_equal_ones(dtype):
    x = torch.randint(-1, 2, (2, 200, 3)).to(dtype).to(DEVICE)  # sums of whole numbers are exact: many ties
    x[0, 5] = 0
    dst, src = parts(200, 90)
    values, places = matching_triton.best(x, dst, src, None)
    scores = x[:, src].double() @ x[:, dst].double().mT
    top = scores.amax(-1)
    first = (scores == top[..., None]).int().argmax(-1)  # the first of equal ones
    assert torch.equal(values.double(), top) and torch.equal(places, first)
    plain, _ = matching.best(x.float(), dst, src, None)
    assert torch.equal(values, plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b, n", [(1, 2), (3, 17), (2, 300), (1, 1025)])
@pytest.mark.parametrize("levels", [2, 1e6])
def test_largest(b, n, levels, dtype):
    scores = (randn(b, n) * levels).round().clamp(-60000, 60000).to(dtype)
    for k in sorted({n // 3 or 1, n - 1}):
        found = selection_triton.top(scores, k)
        assert torch.equal(found, selection.top(scores, k))
        for row, mine in zip(scores.tolist(), found.tolist(), strict=True):  # the definition
            assert mine == sorted(sorted(range(n), key=lambda i: (-row[i], i))[:k])


def test_largest_of_what_is_not_finite():
    inf, nan = float("inf"), float("nan")
    scores = torch.tensor([[nan, 1, -inf, inf, nan, inf, -0.0], [-inf, -inf, nan, 0.0, -0.0, nan, 0.0], [nan] * 7])
    for k in range(1, 7):
        assert torch.equal(selection_triton.top(scores.to(DEVICE), k).cpu(), selection.top(scores, k))
    strided_scores = torch.randn(2, 40, device=DEVICE)[:, ::2]
    assert torch.equal(selection_triton.top(strided_scores, 7), selection.top(strided_scores, 7))

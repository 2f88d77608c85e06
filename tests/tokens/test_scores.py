"""Scores of tokens, against the loops of the papers in float64."""

import math

import pytest
import torch

from diffusion_tokred.tokens import bonus, change, deviation, entropy, normalise, norms, received
from tests.reference import caching

HALVES = [torch.bfloat16, torch.float16]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(found, expected, atol=1e-12):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=0, atol=atol)


# batch, heads, queries, keys, channels
SHAPES = [(2, 3, 15, 15, 4), (1, 1, 7, 12, 8), (3, 2, 20, 9, 5), (1, 2, 1, 3, 2)]


@pytest.mark.parametrize("b, h, n, m, d", SHAPES)
@pytest.mark.parametrize("chunk", [None, 1, 4, 100])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_received(b, h, n, m, d, chunk, scale):
    q, k = 3 * randn(b, h, n, d), randn(b, h, m, d, seed=1)
    found = received(q, k, scale, chunk)
    assert found.shape == (b, m) and found.dtype == torch.float64
    close(found, [caching.received(q[i].tolist(), k[i].tolist(), scale or d**-0.5) for i in range(b)])
    close(found.sum(1), [n] * b)


@pytest.mark.parametrize("share", [1.0, 0.5, 1 / 3, 1 / 8])
def test_received_from_a_share_of_the_queries(share):
    q, k = randn(2, 2, 24, 4), randn(2, 2, 10, 4, seed=1)
    stride = round(1 / share)
    asked = range(stride // 2, 24, stride)
    found = received(q, k, share=share, chunk=3)
    expected = [caching.received(q[i].tolist(), k[i].tolist(), 0.5, asked) for i in range(2)]
    close(found, torch.tensor(expected, dtype=torch.float64) * 24 / len(asked))
    close(found.sum(1), [24, 24])
    close(received(q[:, :, :3], k, share=1 / 8).sum(1), [3, 3])  # fewer queries than a stride: the middle one


@pytest.mark.parametrize("function", [received, entropy])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_attention_in_lower_precision(function, dtype):
    q, k = randn(2, 3, 15, 8, dtype=dtype), randn(2, 3, 9, 8, seed=1, dtype=dtype)
    found = function(q, k)
    assert found.dtype == torch.float32
    close(found, function(q.double(), k.double()), atol=2e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(function(q, k), found)


@pytest.mark.parametrize("function", [received, entropy])
def test_large_logits_stay_finite(function):
    q, k = randn(1, 2, 9, 8, dtype=torch.float32) * 1e3, randn(1, 2, 6, 8, seed=1, dtype=torch.float32) * 1e3
    found = function(q, k)
    assert found.isfinite().all() and (found >= 0).all()
    assert received(q, k).sum() == pytest.approx(9, abs=1e-4)


@pytest.mark.parametrize("b, h, n, m, d", SHAPES)
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_entropy(b, h, n, m, d, chunk):
    q, k = 2 * randn(b, h, n, d), randn(b, h, m, d, seed=1)
    rows = [(q[i].tolist(), k[i].tolist(), d**-0.5) for i in range(b)]
    close(entropy(q, k, chunk=chunk), [caching.entropies(*row) for row in rows])
    close(entropy(q, k, chunk=chunk, average="map"), [caching.entropies_of_map(*row) for row in rows])


def test_entropy_is_the_releases_without_its_epsilon():
    q, k = 2 * randn(1, 3, 10, 4), randn(1, 3, 20, 4, seed=1)
    released = caching.entropies_of_map(q[0].tolist(), k[0].tolist(), 0.5, epsilon=1e-7)
    close(entropy(q, k, average="map")[0], released, atol=20 * 1e-7)
    assert (entropy(q, k, average="map") >= entropy(q, k)).all()  # entropy is concave


def test_entropy_of_the_certain_and_of_the_uncertain():
    k = torch.eye(4).expand(1, 2, 4, 4)
    found = entropy(torch.stack([torch.zeros(4), 1e4 * torch.eye(4)[2]]).expand(1, 2, 2, 4), k)
    close(found, [[math.log(4), 0]], atol=1e-6)


@pytest.mark.parametrize("average", ["entropy", "map"])
def test_masks(average):
    q, k = randn(2, 3, 11, 4), randn(2, 3, 8, 4, seed=1)
    seen = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0], [1, 0, 1, 1, 1, 1, 1, 0]], dtype=torch.bool)
    loop = caching.entropies if average == "entropy" else caching.entropies_of_map
    expected = [loop(q[i].tolist(), k[i].tolist(), 0.5, seen[i].tolist()) for i in range(2)]
    for least in (float("-inf"), torch.finfo(torch.float64).min, -10000.0):
        added = torch.zeros(2, 8, dtype=torch.float64).masked_fill(~seen, least)
        for mask in (seen, added, added[:, None], added[:, None, None], added[:, None, None].expand(2, 3, 1, 8)):
            close(entropy(q, k, mask, average=average), expected)
    assert entropy(q, k, torch.zeros_like(seen), average=average).isfinite().all()
    half = entropy(q.bfloat16(), k.bfloat16(), added.bfloat16(), average=average)
    close(half, expected, atol=0.05)


def test_norms_have_the_order_and_distances_of_the_paper():
    values = randn(2, 3, 14, 5) * 10
    found = norms(values)
    expected = torch.tensor([caching.small_norms(values[i].tolist()) for i in range(2)], dtype=torch.float64)
    close(found, expected - expected.amin(1, keepdim=True))
    assert (expected < 0).all() and (found >= 0).all() and (found.amin(1) == 0).all()
    assert norms(values.bfloat16()).dtype == torch.float32


def test_normalise():
    scores = randn(3, 20).abs()
    scores[1] = 0
    found = normalise(scores)
    close(found.norm(dim=1), [1, 0, 1])
    close(found[0], scores[0] / caching.norm(scores[0].tolist()))
    assert normalise(torch.full((1, 4), 1e-15)).norm() == pytest.approx(1)


@pytest.mark.parametrize(
    "h, w, cell", [(8, 8, 2), (6, 10, 2), (7, 9, 2), (9, 8, 4), (5, 11, 3), (3, 5, 1), (4, 3, 8), (1, 7, 2)]
)
@pytest.mark.parametrize("ties", [False, True])
def test_bonus(h, w, cell, ties):
    scores = randn(2, h * w, seed=h).abs()
    if ties:
        scores = (scores * 2).floor()
    found = bonus(scores, (h, w), cell, 0.6)
    close(found, [caching.bonus(scores[i].tolist(), h, w, cell, 0.6) for i in range(2)])
    assert bonus(scores.bfloat16(), (h, w), cell, 0.6).dtype == torch.bfloat16


def test_change_and_deviation():
    x, y = randn(2, 6, 5), randn(2, 6, 5, seed=1)
    close(change(x, y), [[caching.norm(row) for row in sample] for sample in (x - y).tolist()])
    close(deviation(x), [[caching.deviation(row) for row in sample] for sample in x.tolist()])
    for dtype in HALVES:
        low, lower = x.to(dtype), y.to(dtype)
        assert change(low, lower).dtype == deviation(low).dtype == torch.float32
        close(change(low, lower), change(low.double(), lower.double()), atol=1e-5)
        close(deviation(low), deviation(low.double()), atol=1e-5)


def test_one_graph(dynamo):
    q, k = randn(2, 3, 20, 4, dtype=torch.float32), randn(2, 3, 20, 4, seed=1, dtype=torch.float32)
    mask = torch.arange(20).expand(2, 20) < 13

    def all_scores(q, k, mask):
        scores = normalise(received(q, k, chunk=6, share=0.5)) + norms(k)
        scores = scores + entropy(q, k, mask, chunk=7) + entropy(q, k, average="map")
        return bonus(scores, (4, 5), 3, 0.4), change(q[:, 0], k[:, 0]), deviation(q[:, 0])

    compiled = torch.compile(all_scores, fullgraph=True, backend="eager")
    for found, expected in zip(compiled(q, k, mask), all_scores(q, k, mask), strict=True):
        assert torch.equal(found, expected)


def test_wrong_arguments():
    q = randn(1, 1, 4, 2)
    for share in (0, -0.5, 1.5):
        with pytest.raises(ValueError, match=f"in \\(0, 1\\], got {share:g}"):
            received(q, q, share=share)
    for function in (received, entropy):
        with pytest.raises(ValueError, match="1 or more, got 0"):
            function(q, q, chunk=0)
    with pytest.raises(ValueError, match="'entropy' or 'map', got 'mean'"):
        entropy(q, q, average="mean")
    with pytest.raises(ValueError, match="4 x 5 = 20 tokens, got cells of 2 and 16 tokens"):
        bonus(randn(1, 16), (4, 5), 2, 0.5)
    with pytest.raises(ValueError, match="got cells of 0"):
        bonus(randn(1, 16), (4, 4), 0, 0.5)
    with pytest.raises(ValueError, match="two channels or more, got 1"):
        deviation(randn(1, 4, 1))

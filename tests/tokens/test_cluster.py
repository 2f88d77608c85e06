"""Clusters and the choice by cluster and age, against loops in float64."""

import pytest
import torch

from diffusion_tokred.schedule import cat_counts
from diffusion_tokred.tokens import cat_select, draw, features, kmeans, mix, one_of_each, pool, spread
from tests.reference import caching

GRIDS = [(8, 8), (6, 9), (7, 5), (1, 11)]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def labels_of(b, n, k, seed=0):
    return torch.randint(0, k, (b, n), generator=torch.Generator().manual_seed(seed))


def close(found, expected, atol=1e-12):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=0, atol=atol)


@pytest.mark.parametrize("n, k, f", [(40, 5, 3), (33, 7, 2), (12, 12, 4), (9, 1, 3), (50, 20, 1)])
@pytest.mark.parametrize("iterations", [0, 1, 6])
def test_lloyd(n, k, f, iterations):
    points, start = randn(2, n, f, seed=n), randn(2, k, f, seed=k)  # some of these clusters are empty
    labels, centroids = kmeans(points, k, iterations, start)
    assert labels.dtype == torch.int64 and labels.shape == (2, n)
    for i in range(2):
        expected = caching.lloyd(points[i].tolist(), start[i].tolist(), iterations)
        assert labels[i].tolist() == expected[0]
        close(centroids[i], expected[1])


def test_kmeans_starts_from_tokens_in_equal_stretches():
    for n, k in [(4096, 16), (4096, 20), (63, 7), (10, 10), (11, 10), (1, 1)]:
        points = torch.arange(n).double()[None, :, None]
        _, start = kmeans(points, k, 0)
        at = start[0, :, 0].long().tolist()
        assert all(i * n // k <= p < (i + 1) * n // k for i, p in enumerate(at))
    # A stride of 256 = 4 * 64 would put all of them in one column.
    columns = {p % 64 for p in kmeans(torch.arange(4096).double()[None, :, None], 16, 0)[1][0, :, 0].long().tolist()}
    assert len(columns) > 8


def test_kmeans_finds_what_is_there_and_goes_on_from_there():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    truth = torch.arange(4).repeat_interleave(25)[None]
    points = centres[truth] + 0.5 * randn(1, 100, 2, dtype=torch.float32) + 1e3  # far from zero
    labels, centroids = kmeans(points, 4, 10)
    assert torch.equal(labels, truth)
    again, same = kmeans(points, 4, 0, centroids)
    assert torch.equal(again, labels) and torch.equal(same, centroids)


def test_an_empty_cluster_keeps_its_centroid():
    start = torch.tensor([[[0.0], [100.0], [1.0]]])
    _, centroids = kmeans(torch.tensor([[[0.0], [0.2], [1.0], [1.2]]]), 3, 5, start)
    close(centroids[0, :, 0], [0.1, 100, 1.1], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kmeans_in_lower_precision(dtype):
    points = randn(2, 30, 4, dtype=dtype)
    labels, centroids = kmeans(points, 4, 3)
    assert centroids.dtype == torch.float32
    wide = kmeans(points.double(), 4, 3)
    assert torch.equal(labels, wide[0])
    close(centroids, wide[1].float(), atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kmeans(points, 4, 3)[1], centroids)


@pytest.mark.parametrize("how", ["max", "mean"])
@pytest.mark.parametrize("n, k", [(30, 4), (7, 9), (5, 1)])
def test_pool(how, n, k):
    values, labels = randn(3, n), labels_of(3, n, k)
    close(
        pool(values, labels, k, how), [caching.pool(values[i].tolist(), labels[i].tolist(), k, how) for i in range(3)]
    )


@pytest.mark.parametrize("h, w", GRIDS)
@pytest.mark.parametrize("k", [1, 4, 12])
def test_spread(h, w, k):
    # Clusters that are stripes of the sequence, so that not all touch; and one that has no token, for k > 1.
    labels = torch.stack([torch.arange(h * w) * max(k - 1, 1) // (h * w), labels_of(1, h * w, max(k // 2, 1))[0]])
    heat = randn(2, k).abs()
    found = spread(heat, labels, (h, w))
    close(found, [caching.spread(heat[i].tolist(), labels[i].tolist(), h, w) for i in range(2)])


def test_an_empty_cluster_stays_the_coldest():
    labels = torch.tensor([[0, 0, 2, 2]])
    heat = spread(pool(torch.tensor([[1.0, 2, 3, 4]]), labels, 3), labels, (2, 2))
    assert heat.tolist() == [[2 * 3 + 4, float("-inf"), 2 * 3 + 4]]


@pytest.mark.parametrize("h, w", GRIDS)
@pytest.mark.parametrize("f", [2, 5, 8])
def test_features(h, w, f):
    noise = randn(2, h * w, f)
    close(features(noise, (h, w)), [caching.features(noise[i].tolist(), h, w, 0.05) for i in range(2)])
    assert features(noise.bfloat16(), (h, w), 0.1).dtype == torch.float32


# tokens, clusters, rows, of them by cluster, caps
CHOICES = [
    (64, 6, 20, 5, (3, 2, 1)), (63, 5, 19, 19, (4,)), (40, 20, 12, 12, (1,)), (40, 3, 30, 30, (2,)),
    (30, 4, 30, 8, (3,)), (25, 4, 9, 0, (3, 2, 1)), (25, 1, 9, 4, (9, 9, 9)), (25, 4, 9, 6, (0, 0, 3)),
    (16, 16, 0, 0, (1,)), (50, 7, 25, 11, (9, 6, 3)),
]  # fmt: skip


@pytest.mark.parametrize("n, clusters, k_total, hot, caps", CHOICES)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_choice(n, clusters, k_total, hot, caps, ties, given):
    change, labels, counts = randn(3, n).abs(), labels_of(3, n, clusters), labels_of(3, n, 4, seed=1).double() / 4
    heat = randn(3, clusters, seed=2) if given else None
    if ties:
        change, heat = (change * 2).floor(), None if heat is None else heat.round()
    found = cat_select(change, labels, counts, k_total, clusters, hot, caps, heat)
    assert found.dtype == torch.int64 and found.shape == (3, k_total)
    for i in range(3):
        hotness = heat[i].tolist() if given else caching.pool(change[i].tolist(), labels[i].tolist(), clusters, "max")
        rows = [v[i].tolist() for v in (change, labels, counts)]
        assert found[i].tolist() == caching.cat_select(*rows, k_total, hotness, hot, caps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_budget_of_the_paper(dtype):
    """SD3 at 1024 x 1024: 4096 tokens, 20 clusters; and each token comes round by its age."""
    change, noise = randn(2, 4096, dtype=dtype).abs(), randn(2, 4096, 64, dtype=dtype)
    labels, _ = kmeans(features(noise, (64, 64)), 20, 10)
    c = cat_counts(4096)
    heat = spread(pool(change, labels, 20), labels, (64, 64))
    counts = torch.zeros(2, 4096)
    first = cat_select(change, labels, counts, c.total, 20, c.total, (c.first_cap,), heat)
    assert first.shape == (2, 1228)
    for i in range(2):
        assert torch.bincount(labels[i, first[i]], minlength=20).max() <= 122
    counts.scatter_add_(1, first, torch.ones(2, 1228))
    for step in range(5):
        change = randn(2, 4096, seed=step, dtype=dtype).abs()
        at = cat_select(change, labels, counts, c.total, 20, c.hot, c.caps)
        assert at.shape == (2, 1228) and (at.diff(dim=1) > 0).all()
        counts = (counts * 0.5).scatter_add(1, at, torch.ones(2, 1228))
    assert (counts > 0).all()


def test_one_graph(dynamo):
    def choose(noise, before, counts, start):
        change = (noise - before).norm(dim=-1)
        labels, centroids = kmeans(features(noise, (6, 7)), 5, 3)
        labels, centroids = kmeans(noise, 5, 2, start)
        heat = spread(pool(change, labels, 5), labels, (6, 7)) + pool(change, labels, 5, "mean")
        first = cat_select(change, labels, counts, 14, 5, 14, (4,), heat)
        return first, cat_select(change, labels, counts, 14, 5, 6, (3, 2, 1)), centroids

    compiled = torch.compile(choose, fullgraph=True, backend="eager")
    for seed in range(3):
        values = randn(2, 42, 4, seed=seed), randn(2, 42, 4), torch.rand(2, 42), randn(2, 5, 4, seed=seed)
        assert all(map(torch.equal, compiled(*values), choose(*values)))


def test_wrong_arguments():
    x = randn(1, 6, 4)
    for k in (0, 7):
        with pytest.raises(ValueError, match=f"{k} clusters of 6 points"):
            kmeans(x, k, 1)
    with pytest.raises(ValueError, match=r"shape \(1, 2, 4\), got \(1, 3, 4\)"):
        kmeans(x, 2, 1, randn(1, 3, 4))
    with pytest.raises(ValueError, match="'max' or 'mean', got 'sum'"):
        pool(x[..., 0], labels_of(1, 6, 2), 2, "sum")
    for bad, says in [((2, 4), "8 tokens of 2"), ((1, 5), "5 tokens of 2")]:
        with pytest.raises(ValueError, match=says):
            features(x, bad)
    with pytest.raises(ValueError, match="got 6 of 1"):
        features(x[..., :1], (2, 3))
    labels, counts = labels_of(1, 6, 2), torch.zeros(1, 6)
    for k_total, hot, caps in [(7, 2, (1,)), (3, 4, (1,)), (3, -1, (1,)), (3, 2, ())]:
        with pytest.raises(ValueError, match=rf"hot <= k_total <= 6 tokens and a cap, got {hot}, {k_total}"):
            cat_select(x[..., 0], labels, counts, k_total, 2, hot, caps)


def test_one_of_each_has_the_largest_draw():
    """And every token of a cluster comes up equally often."""
    labels = labels_of(2, 40, 6)
    draws = torch.randint(0, 1 << 24, (5, 1, 40), generator=torch.Generator().manual_seed(1))
    draws[4] = 7  # of equal ones the last
    found = one_of_each(draws, labels, 7)  # the seventh has no tokens
    assert found.shape == (5, 2, 7) and found[:, :, 6].eq(0).all()
    for layer in range(5):
        for row in range(2):
            for cluster in range(6):
                mine = [p for p in range(40) if labels[row, p] == cluster]
                assert found[layer, row, cluster] == max(mine, key=lambda p: (int(draws[layer, 0, p]), p))
    many = one_of_each(draw(torch.tensor(mix(3)), 6000 * 40, 1 << 24).view(6000, 1, 40), labels, 6)
    for cluster in range(6):
        seen = many[:, 0, cluster].bincount(minlength=40)[labels[0] == cluster]
        expected = 6000 / len(seen)
        assert (seen - expected).abs().max() < 5 * expected**0.5

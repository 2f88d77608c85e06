"""Clusters of tokens: k-means of fixed length, pooling, and the choice of rows by cluster and age (CAT Pruning)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def kmeans(points: Tensor, k: int, iterations: int, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm, `iterations` rounds of it, always: Euclidean, in float32 at least, nothing random.

    A cluster that loses all its points keeps its centroid. Of equally near centroids the first counts.

    Args:
        points: (B, N, F).
        k: number of clusters, in [1, N].
        iterations: rounds, 0 or more; 0 only assigns.
        start: (B, k, F) centroids to start from, such as an earlier call's; None: k of the points, one from each of k
            equal stretches of the sequence.

    Returns:
        labels (B, N) int64 in [0, k), each the nearest of the centroids; centroids (B, k, F).

    Raises:
        ValueError: `k` is not in [1, N], or `start` has another shape.
    """
    b, n, f = points.shape
    if not 1 <= k <= n:
        raise ValueError(f"cannot make {k} clusters of {n} points")
    if start is not None and start.shape != (b, k, f):
        raise ValueError(f"start needs shape {(b, k, f)}, got {tuple(start.shape)}")
    if points.dtype in (torch.float16, torch.bfloat16):
        points = points.float()
    centroids = points.index_select(1, _spaced(n, k, points.device)) if start is None else start.to(points.dtype)
    # Distances are taken from the centre: the squares of what all points share would drown the differences.
    centre = points.mean(1, keepdim=True)
    around = points - centre
    with torch.autocast(points.device.type, enabled=False):
        labels = _nearest(around, centroids - centre)
        for _ in range(iterations):
            member = _members(labels, k).to(points.dtype)
            size = member.sum(1)[:, :, None]
            # Sums as a product: in a fixed order, where a scatter on a GPU adds in any.
            centroids = torch.where(size > 0, (member.mT @ points) / size.clamp_min(1), centroids)
            labels = _nearest(around, centroids - centre)
    return labels, centroids


def pool(values: Tensor, labels: Tensor, k: int, how: str = "max") -> Tensor:
    """Pool one value a token over its cluster: (B, N) and labels (B, N) -> (B, k); -inf for a cluster without tokens.

    Raises:
        ValueError: `how` is neither "max" nor "mean".
    """
    if how not in ("max", "mean"):
        raise ValueError(f"how is 'max' or 'mean', got {how!r}")
    member, none = _members(labels, k), float("-inf")
    if how == "max":
        return values[:, :, None].masked_fill(~member, none).amax(1)
    size = member.sum(1)
    total = values[:, :, None].masked_fill(~member, 0).sum(1)
    return (total / size.clamp_min(1)).masked_fill(size == 0, none)


def one_of_each(draws: Tensor, labels: Tensor, k: int) -> Tensor:
    """One token of each cluster: that of the largest draw, of equal ones the last (ClusCa, arXiv 2509.10312).

    Args:
        draws: (L, B or 1, N) int64 in [0, 2**24), one row for each of L choices.
        labels: (B, N) int64 in [0, k).
        k: number of clusters.

    Returns:
        (L, B, k) int64 positions; 0 for a cluster without tokens.
    """
    n = labels.shape[1]
    # Draw and place in one integer: the largest of a cluster says where it is.
    keys = (draws * n + torch.arange(n, device=labels.device)).expand(-1, len(labels), -1)
    found = keys.new_zeros(*keys.shape[:2], k)
    return found.scatter_reduce(2, labels.expand_as(keys), keys, "amax") % n


def spread(heat: Tensor, labels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Add up mean, mean and max of `heat` over each cluster and those that touch it (CAT, arXiv 2502.00433).

    CAT ranks clusters so for its first choice: what is near a place of change comes along. Clusters touch where tokens
    of theirs are neighbours in a row or a column of the grid.

    Args:
        heat: (B, k).
        labels: (B, h * w), row-major.
        grid: (h, w).

    Returns:
        (B, k); 3 times its heat for a cluster that touches none.
    """
    (h, w), k = grid, heat.shape[1]
    member = _members(labels, k).to(heat.dtype).unflatten(1, (h, w))
    down = member[:, 1:].flatten(1, 2).mT @ member[:, :-1].flatten(1, 2)
    right = member[:, :, 1:].flatten(1, 2).mT @ member[:, :, :-1].flatten(1, 2)
    touch = down + right
    near = ((touch + touch.mT) > 0) | torch.eye(k, dtype=torch.bool, device=heat.device)
    row = heat[:, None]
    mean = row.masked_fill(~near, 0).sum(-1) / near.sum(-1)
    return 2 * mean + row.masked_fill(~near, float("-inf")).amax(-1)


def features(noise: Tensor, grid: tuple[int, int], weight: float = 0.05) -> Tensor:
    """Features that CAT clusters by: `weight` times the noise plus the place (arXiv 2502.00433).

    The place is row / h in the first F // 2 channels and column / w in the others: in [0, 1) on both axes, on any grid.
    (CAT knows grids of 64 x 64 with 64 channels. The small weight makes its clusters mostly ones of place.)

    Args:
        noise: (B, h * w, F), the model's output tokens or how they changed.
        grid: (h, w).
        weight: factor of the noise.

    Returns:
        (B, h * w, F) in float32 at least.

    Raises:
        ValueError: `noise` does not have h * w tokens, or fewer than 2 channels.
    """
    (h, w), (_, n, f) = grid, noise.shape
    if n != h * w or f < 2:
        raise ValueError(f"need {h} x {w} = {h * w} tokens of 2 channels or more, got {n} of {f}")
    if noise.dtype in (torch.float16, torch.bfloat16):
        noise = noise.float()
    y = torch.arange(h, device=noise.device, dtype=noise.dtype)[:, None, None] / h
    x = torch.arange(w, device=noise.device, dtype=noise.dtype)[:, None] / w
    place = torch.cat([y.expand(h, w, f // 2), x.expand(h, w, f - f // 2)], -1)
    return weight * noise + place.flatten(0, 1)


def cat_select(
    change: Tensor,
    labels: Tensor,
    counts: Tensor,
    k_total: int,
    clusters: int,
    hot: int,
    caps: Sequence[int],
    heat: Tensor | None = None,
    first: Tensor | None = None,
) -> Tensor:
    """Choose exactly `k_total` rows a sample: the most changed of the hottest clusters, then the oldest (CAT, arXiv
    2502.00433).

    Clusters are ranked by `heat`. From the hottest on, each gives its most changed tokens, `caps[rank]` at most, until
    there are `hot`. All other rows go to the tokens that were chosen least often, the more changed first. Equal tokens
    count in the order of their positions.

    The first choice of a run takes all from clusters: `hot=k_total`, one cap, `heat=spread(...)`. The numbers that the
    paper's release uses come from `schedule.cat_counts`. What it does by accident is not done here: its pooled maximum
    is blind to large negative changes, and it drops and repeats some tokens. (It also lets the second cluster add its
    oldest tokens, but cuts nearly all of them off again.)

    Args:
        change: (B, N), how much each token's output changed, from `change`.
        labels: (B, N) int64 in [0, clusters).
        counts: (B, N) float, how often each was chosen, recent choices counting more (CAT halves them at each step).
        k_total: rows chosen, in [0, N].
        clusters: number of clusters.
        hot: rows chosen by cluster at most, in [0, k_total].
        caps: at most so many of the hottest cluster, the second, and so on; the last holds for all that follow.
        heat: (B, clusters), larger is hotter; None: the largest change in each cluster.
        first: (1 or B, N) bool, tokens that are chosen before all others, if there is room; then come those of the
            clusters, and what is left goes by age.

    Returns:
        (B, k_total) int64 positions, ascending, no two equal.

    Raises:
        ValueError: `k_total` or `hot` is out of range, or there are no caps.
    """
    n = change.shape[1]
    if not 0 <= hot <= k_total <= n or not caps:
        raise ValueError(f"need 0 <= hot <= k_total <= {n} tokens and a cap, got {hot}, {k_total} and {tuple(caps)}")
    order = change.argsort(dim=1, descending=True, stable=True)
    rank = _rank(pool(change, labels, clusters) if heat is None else heat).gather(1, labels)
    # One integer a token, no two equal, orders them cluster by cluster, the most changed first.
    place = _inverse((rank * n + _inverse(order)).argsort(1))
    ranks = torch.arange(clusters, device=change.device)
    sizes = (rank[:, :, None] == ranks).sum(1)
    cap = torch.full_like(ranks, caps[-1])
    for i, most in enumerate(caps[:clusters][:-1]):
        cap = cap.masked_fill(ranks == i, most)
    given = torch.minimum(sizes, cap)
    # A token's place in its cluster, and how many tokens the hotter clusters give.
    within = place - (sizes.cumsum(1) - sizes).gather(1, rank)
    before = (given.cumsum(1) - given).gather(1, rank)
    chosen = (within < given.gather(1, rank)) & (before + within < hot)
    # The oldest of what is left: a stable sort by count of tokens that are in the order of their change.
    age = counts.masked_fill(chosen, -1)  # counts are not negative
    age = (age if first is None else age.masked_fill(first, -2)).gather(1, order)
    return order.gather(1, age.argsort(dim=1, stable=True)[:, :k_total]).sort(1).values


def _spaced(n: int, k: int, device: torch.device) -> Tensor:
    """One position in each of k equal stretches of [0, n), at a place in it that the golden ratio gives: (k,) int64.

    (A plain stride puts all in one column of the grid where it is a multiple of the width.)
    """
    i = torch.arange(k, device=device)
    return i * n // k + (i * 40503 % 65536 * (n // k) >> 16)


def _nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """The nearest centroid of each point, (B, N) int64: the least of |c|^2 - 2 p c, as |p|^2 is the same for all."""
    return (centroids.square().sum(-1)[:, None] - 2 * points @ centroids.mT).argmin(-1)


def _members(labels: Tensor, k: int) -> Tensor:
    """(B, N) -> (B, N, k) bool."""
    return labels[:, :, None] == torch.arange(k, device=labels.device)


def _rank(scores: Tensor) -> Tensor:
    """The place of each entry of a row in descending order, equal ones in the order of their positions."""
    return _inverse(scores.argsort(dim=1, descending=True, stable=True))


def _inverse(order: Tensor) -> Tensor:
    """The inverse of each row's permutation."""
    return torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )

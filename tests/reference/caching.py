"""Scores, choices, clusters, forecasts and schedules of token-wise caching, as the papers define them: one sample,
Python lists, loops, float64. Rows are lists of numbers; heads are lists of rows; tokens are row-major on an h x w grid.
"""

import math

# Scores


def softmax(logits):
    exps = [math.exp(v - max(logits)) for v in logits]
    return [e / math.fsum(exps) for e in exps]


def weights(q, k, scale, seen=None):
    """Attention of one head: a row a query, a weight a key; 0 for keys that are not seen."""
    kept = [j for j in range(len(k)) if seen is None or seen[j]]
    rows = []
    for query in q:
        row = [0.0] * len(k)
        logits = [scale * math.fsum(a * b for a, b in zip(query, k[j], strict=True)) for j in kept]
        for j, weight in zip(kept, softmax(logits), strict=True):
            row[j] = weight
        rows.append(row)
    return rows


def received(q, k, scale, queries=None):
    """ToCa's s1 (2410.05317): what a key receives from all queries, mean over heads; `queries`: only from these."""
    queries = range(len(q[0])) if queries is None else queries
    total = [0.0] * len(k[0])
    for head in range(len(q)):
        rows = weights(q[head], k[head], scale)
        for i in queries:
            for j, weight in enumerate(rows[i]):
                total[j] += weight / len(q)
    return total


def entropy_of(row):
    return -math.fsum(c * math.log(c) for c in row if c > 0)


def entropies(q, k, scale, seen=None):
    """ToCa's s2 a head, mean over heads."""
    heads = [weights(a, b, scale, seen) for a, b in zip(q, k, strict=True)]
    return [math.fsum(entropy_of(rows[i]) for rows in heads) / len(heads) for i in range(len(q[0]))]


def entropies_of_map(q, k, scale, seen=None, epsilon=0.0):
    """ToCa's s2 of the mean map, as released: -sum c ln(c + 1e-7)."""
    heads = [weights(a, b, scale, seen) for a, b in zip(q, k, strict=True)]
    found = []
    for i in range(len(q[0])):
        c = [math.fsum(rows[i][j] for rows in heads) / len(heads) for j in range(len(k[0]))]
        found.append(-math.fsum(v * math.log(v + epsilon) for v in c if v + epsilon > 0))
    return found


def norm(row):
    return math.sqrt(math.fsum(v * v for v in row))


def small_norms(values):
    """DuCa's v-norm (2412.18911): sum over heads of 1 - |v|."""
    return [math.fsum(1 - norm(head[i]) for head in values) for i in range(len(values[0]))]


def bonus(scores, h, w, cell, beta):
    """ToCa's s4: the best token of each cell gets s + beta s. Cells at the end may be smaller."""
    raised = list(scores)
    for top in range(0, h, cell):
        for left in range(0, w, cell):
            inside = [
                i * w + j for i in range(top, min(top + cell, h)) for j in range(left, min(left + cell, w))
            ]  # row-major, so that the first of equal ones is the first token
            best = max(inside, key=lambda p: scores[p])
            raised[best] = scores[best] + beta * scores[best]
    return raised


def deviation(row):
    mean = math.fsum(row) / len(row)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in row) / (len(row) - 1))


# Choices


def top(scores, k):
    """The k largest, of equal ones the first; ascending."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])


# Clusters


def nearest(point, centroids):
    distances = [math.fsum((a - b) ** 2 for a, b in zip(point, c, strict=True)) for c in centroids]
    return distances.index(min(distances))


def lloyd(points, centroids, iterations):
    """Labels and centroids after so many rounds."""
    centroids = [list(c) for c in centroids]
    labels = [nearest(p, centroids) for p in points]
    for _ in range(iterations):
        for c in range(len(centroids)):
            mine = [p for p, label in zip(points, labels, strict=True) if label == c]
            if mine:
                centroids[c] = [math.fsum(values) / len(mine) for values in zip(*mine, strict=True)]
        labels = [nearest(p, centroids) for p in points]
    return labels, centroids


def pool(values, labels, k, how):
    groups = [[v for v, label in zip(values, labels, strict=True) if label == c] for c in range(k)]
    if how == "max":
        return [max(group, default=-math.inf) for group in groups]
    return [math.fsum(group) / len(group) if group else -math.inf for group in groups]


def touching(labels, h, w, k):
    """For each cluster: itself, and those with a token beside one of its own."""
    near = [{c} for c in range(k)]
    for i in range(h):
        for j in range(w):
            for y, x in ((i + 1, j), (i, j + 1)):
                if y < h and x < w:
                    a, b = labels[i * w + j], labels[y * w + x]
                    near[a].add(b)
                    near[b].add(a)
    return near


def spread(heat, labels, h, w):
    """CAT's (2502.00433) mean + mean + max over touching clusters."""
    found = []
    for near in touching(labels, h, w, len(heat)):
        values = [heat[c] for c in near]
        found.append(2 * sum(values) / len(values) + max(values))
    return found


def features(noise, h, w, weight):
    """CAT's 0.05 n + e: e is the row in the first half of the channels, the column in the second, as shares."""
    found = []
    for p, row in enumerate(noise):
        half = len(row) // 2
        place = [p // w / h] * half + [p % w / w] * (len(row) - half)
        found.append([weight * v + e for v, e in zip(row, place, strict=True)])
    return found


def cat_select(change, labels, counts, k_total, heat, hot, caps):
    """CAT's choice, as meant: down the ranking of clusters, the most changed of each, up to its cap, until there are
    `hot`; then the least often chosen."""
    ranking = sorted(range(len(heat)), key=lambda c: (-heat[c], c))
    chosen = []
    for rank, cluster in enumerate(ranking):
        mine = sorted((i for i in range(len(change)) if labels[i] == cluster), key=lambda i: (-change[i], i))
        chosen += mine[: caps[min(rank, len(caps) - 1)]]
    chosen = chosen[:hot]
    rest = sorted((i for i in range(len(change)) if i not in chosen), key=lambda i: (counts[i], -change[i], i))
    return sorted(chosen + rest[: k_total - len(chosen)])


# Forecasts


def factors(features, steps, order):
    """TaylorSeer's (2503.06923) factors after full steps `steps` with these features (numbers), from the recursion."""
    held = []
    for i, feature in enumerate(features):
        renewed = [feature]
        for level in range(min(order, len(held))):
            renewed.append((renewed[level] - held[level]) / (steps[i] - steps[i - 1]))
        held = renewed
    return held


def hermite(n, x):
    """Physicists' Hermite polynomial, from its explicit sum."""
    return math.factorial(n) * math.fsum(
        (-1) ** m / (math.factorial(m) * math.factorial(n - 2 * m)) * (2 * x) ** (n - 2 * m) for m in range(n // 2 + 1)
    )


def taylor_forecast(held, x):
    return math.fsum(f * x**i / math.factorial(i) for i, f in enumerate(held))


def hermite_forecast(held, x, sigma):
    """HiCache (2508.16984)."""
    return math.fsum(f / math.factorial(i) * sigma**i * hermite(i, sigma * x) for i, f in enumerate(held))


# Schedules: as the releases run them, with their own counting and a threshold that only full steps renew


def toca_dit_full(steps, n):
    found, threshold = [], None
    for step in range(steps - 1, -1, -1):
        if threshold is None or step % threshold == 0:
            found.append(steps - 1 - step)
            threshold = round(n / (1.4 - 0.8 * step / steps))
            if int(0.2 * steps) <= step < int(0.4 * steps):
                threshold = 2
    return found


def toca_pixart_full(steps, n):
    found, threshold = [], None
    for step in range(steps):
        if threshold is None or step % threshold == 0:
            found.append(step)
            threshold = round(n / (0.8 + 0.4 * step / steps))
    return found


def counted_full(steps, n, first):
    found, counter = [], 0
    for step in range(steps):
        if step < first or counter == n - 1:
            found.append(step)
            counter = 0
        else:
            counter += 1
    return found


def toca_share(family, step, steps, layer, module, base):
    """r by progress `step`, for the depths of the releases: 28 layers, FLUX 19 double and 38 single."""
    down = steps - 1 - step
    step_factor = {
        "dit": 3 - 4 * down / steps,
        "dit-ddpm": 1.4 - 0.8 * down / steps,
        "pixart": 1.9 - 1.8 * step / steps,
        "flux": 1,
    }[family]
    layer_factor = {
        "dit": 0.8 + 0.4 * layer / 27,
        "dit-ddpm": 1.8 - 1.6 * layer / 27,
        "pixart": 1.6 - 1.2 * layer / 27,
        "flux": 1.5 - layer / 27,
    }[family]
    module_factor = {
        "dit": {"feed_forward": 2.5},
        "dit-ddpm": {"feed_forward": 2.5},
        "pixart": {"cross_attention": 0.6, "feed_forward": 1.6},
        "flux": {"feed_forward": 0.4, "parallel": 1.6},
    }[family].get(module, 0)
    return min(max(base * step_factor * layer_factor * module_factor, 0), 1)

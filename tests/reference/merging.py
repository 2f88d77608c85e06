"""Bipartite soft matching on a token grid, as ToMe (2210.09461) and ToMe-SD (2303.17604) define it: one sample, plain
Python lists, loops, float64. A token is a list of C numbers; tokens are row-major on an h x w grid."""

import math


def destinations(h, w, sy, sx, offset=None):
    """One token of each complete sy x sx cell: cell-local index dy * sx + dx, 0 (the top-left one) by default."""
    found = []
    for cy in range(h // sy):
        for cx in range(w // sx):
            k = offset[len(found)] if offset is not None else 0
            dy, dx = k // sx, k % sx
            found.append((cy * sy + dy) * w + (cx * sx + dx))
    return found


def sources(n, dst):
    return [i for i in range(n) if i not in set(dst)]


def cosine(a, b):
    na, nb = math.sqrt(sum(v * v for v in a)), math.sqrt(sum(v * v for v in b))
    if na == 0 or nb == 0:
        return 0.0
    return sum(u * v for u, v in zip(a, b, strict=True)) / (na * nb)


def match(parts, dst, src, r):
    """{source: destination} of the r most similar sources. Similarity is the mean of the cosines over `parts`, each a
    list of N tokens (one part: plain ToMe; two: a classifier-free guidance pair that shares its matching)."""
    best = []
    for s in src:
        similar = [sum(cosine(x[s], x[d]) for x in parts) / len(parts) for d in dst]
        top = max(similar)
        best.append((top, s, dst[similar.index(top)]))
    best.sort(key=lambda entry: -entry[0])
    return {s: d for _, s, d in best[:r]}


def kept(n, merged):
    return [i for i in range(n) if i not in merged]


def merge(y, merged):
    """Kept tokens in ascending order; a destination is the mean of itself and of all that merge into it."""
    out = []
    for i in kept(len(y), merged):
        group = [y[i]] + [y[s] for s, d in merged.items() if d == i]
        out.append([math.fsum(values) / len(group) for values in zip(*group, strict=True)])
    return out


def unmerge(z, n, merged):
    """A kept token gets its own output, a merged one its destination's."""
    place = {i: k for k, i in enumerate(kept(n, merged))}
    return [z[place[merged.get(i, i)]] for i in range(n)]

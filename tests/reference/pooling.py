"""Downsampling of a token grid, as ToDo (2402.13573) takes it from `interpolate`: one sample, plain Python lists,
loops, exact fractions for the indices. A token is a list of C numbers; tokens are row-major on an h x w grid."""

from fractions import Fraction
from math import ceil, floor


def nearest_index(i, old, new):
    return floor(Fraction(i * old, new))


def nearest_exact_index(i, old, new):
    return floor(Fraction(2 * i + 1, 2) * Fraction(old, new))


def _gather(x, h, w, factor, index):
    rows, cols = h // factor, w // factor
    return [x[index(i, h, rows) * w + index(j, w, cols)] for i in range(rows) for j in range(cols)]


def nearest(x, h, w, factor):
    return _gather(x, h, w, factor, nearest_index)


def nearest_exact(x, h, w, factor):
    return _gather(x, h, w, factor, nearest_exact_index)


def area(x, h, w, factor):
    """Mean over rows floor(i h / h') up to, not including, ceil((i + 1) h / h'); columns alike."""
    rows, cols = h // factor, w // factor
    out = []
    for i in range(rows):
        for j in range(cols):
            ys = range(floor(Fraction(i * h, rows)), ceil(Fraction((i + 1) * h, rows)))
            xs = range(floor(Fraction(j * w, cols)), ceil(Fraction((j + 1) * w, cols)))
            window = [x[y * w + k] for y in ys for k in xs]
            out.append([sum(values) / len(window) for values in zip(*window, strict=True)])
    return out


def _between(i, old, new):
    """The two neighbours of a sample on one axis and the weight of the second: pixel centres, clamped at the edge."""
    at = max(Fraction(2 * i + 1, 2) * Fraction(old, new) - Fraction(1, 2), Fraction(0))
    low = floor(at)
    return low, min(low + 1, old - 1), float(at - low)


def bilinear(x, h, w, factor):
    rows, cols = h // factor, w // factor
    out = []
    for i in range(rows):
        y0, y1, ty = _between(i, h, rows)
        for j in range(cols):
            x0, x1, tx = _between(j, w, cols)
            places = (y0 * w + x0, y0 * w + x1, y1 * w + x0, y1 * w + x1)
            corners = zip(*(x[p] for p in places), strict=True)
            out.append([(1 - ty) * ((1 - tx) * a + tx * b) + ty * ((1 - tx) * c + tx * d) for a, b, c, d in corners])
    return out

"""Masks on a token grid by definition, in fractions."""

from fractions import Fraction


def overlap(pixel, pixels, token, tokens):
    """What part of a side a pixel and a token have in common, if the side is so many pixels and so many tokens."""
    start = max(Fraction(pixel, pixels), Fraction(token, tokens))
    end = min(Fraction(pixel + 1, pixels), Fraction(token + 1, tokens))
    return max(end - start, Fraction(0))


def protected_tokens(mask, h, w):
    """Positions of the tokens of an h x w grid that share area with a true pixel of `mask`, nested lists."""
    height, width = len(mask), len(mask[0])
    return [
        i * w + j
        for i in range(h)
        for j in range(w)
        if any(
            mask[y][x] and overlap(y, height, i, h) and overlap(x, width, j, w)
            for y in range(height)
            for x in range(width)
        )
    ]

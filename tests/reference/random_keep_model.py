"""Random keep on whole models by definition, in loops: a random subset, and the nearest kept token for every other."""

import torch


def kept(values, count):
    """The `count` positions of the smallest values, ascending; of equal values the first ones."""
    return sorted(sorted(range(len(values)), key=lambda p: (values[p], p))[:count])


def nearest(places, h, w):
    """For each position its nearest kept one on the grid: Euclidean, and of equally near ones the first."""
    found = []
    for p in range(h * w):
        best = None
        for q in places:  # ascending, so the first of equals wins
            distance = (p // w - q // w) ** 2 + (p % w - q % w) ** 2
            if best is None or distance < best[0]:
                best = (distance, q)
        found.append(best[1])
    return found


def around(module, places, copied):
    """Call a module with the tokens at `places` only; `copied[p]` is the position whose output p gets."""
    forward = module.forward

    def reduced(*args, **kwargs):
        def take(x):
            return torch.stack([x[:, p] for p in places], 1)

        if args:
            args = (take(args[0]), *args[1:])
        else:
            kwargs["hidden_states"] = take(kwargs["hidden_states"])
        out = forward(*args, **kwargs)
        image, rest = (out[0], out[1:]) if isinstance(out, tuple) else (out, None)
        full = torch.stack([image[:, places.index(q)] for q in copied], 1)
        return full if rest is None else (full, *rest)

    module.forward = reduced

"""ToMe-SD on whole models by definition (2303.17604): the loops of `merging.py` around a module's own forward."""

import torch

from tests.reference import merging


class Matching:
    """One matching a sample, from the tokens (B, h * w, C) of a block's input."""

    def __init__(self, x, h, w, sy, sx, ratio, offset=None):
        n = h * w
        dst = merging.destinations(h, w, sy, sx, offset)
        src = merging.sources(n, dst)
        self.n = n
        self.merged = [merging.match([sample.tolist()], dst, src, int(n * ratio)) for sample in x]

    def merge(self, y):
        rows = [merging.merge(sample.tolist(), merged) for sample, merged in zip(y, self.merged, strict=True)]
        return torch.tensor(rows, dtype=y.dtype)

    def unmerge(self, z):
        rows = [merging.unmerge(sample.tolist(), self.n, merged) for sample, merged in zip(z, self.merged, strict=True)]
        return torch.tensor(rows, dtype=z.dtype)


def install(blocks, grid_of, ratio, parts, sy=2, sx=2, offset_of=None):
    """Put the definition on transformer blocks. There is no way back: use a pipeline of its own.

    Args:
        blocks: the blocks to act in.
        grid_of: number of tokens -> (h, w).
        ratio: share merged away.
        parts: names of the modules inside a block to merge around.
        offset_of: number of cells -> place of the destination in each; None for the top-left token.
    """
    for block in blocks:
        _install(block, grid_of, ratio, parts, sy, sx, offset_of)


def _install(block, grid_of, ratio, parts, sy, sx, offset_of):
    now = {}

    def see(module, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        h, w = grid_of(x.shape[1])
        offset = offset_of((h // sy) * (w // sx)) if offset_of is not None else None
        now["matching"] = Matching(x, h, w, sy, sx, ratio, offset)

    block.register_forward_pre_hook(see, with_kwargs=True)
    for part in parts:
        around(getattr(block, part), lambda: now["matching"])


def around(module, matching):
    """Merge before a module and unmerge after it; `matching()` says how."""
    forward = module.forward

    def merged(*args, **kwargs):
        m = matching()
        if args:
            args = (m.merge(args[0]), *args[1:])
        else:
            kwargs["hidden_states"] = m.merge(kwargs["hidden_states"])
        out = forward(*args, **kwargs)
        return (m.unmerge(out[0]), *out[1:]) if isinstance(out, tuple) else m.unmerge(out)

    module.forward = merged

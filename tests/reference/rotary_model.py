"""ToMe and ToDo by definition where positions are rotary: a merged token asks and answers from its destination's
place, and keys and values are those of chosen tokens. Sample by sample, with the loops of `merging.py`.
"""

import torch

from tests.reference import merging, todo_model, tome_model


def reduced(method, seen, grid, x, run):
    """What a module gives under a method.

    Args:
        method: "tome" (half of the tokens, 2 x 2 cells, their top-left tokens) or "todo" (every other row and column).
        seen: (B, N, C) tokens that decide what is merged: the block's input.
        grid: (h, w).
        x: (B, N, C) tokens handed to the module.
        run: (sample, its tokens (1, M, C), their places (M,), places of the keys (K,)) -> (image, other results...),
            the keys counted in the tokens handed in.
    """
    h, w = grid
    n = h * w
    place = torch.arange(n)
    if method == "tome":
        matching = tome_model.Matching(seen, h, w, 2, 2, 0.5)
    else:
        kept = todo_model.pooled(place.view(1, n, 1).double(), h, w, 2, "nearest").flatten().long()
    results = []
    for i in range(x.shape[0]):
        if method == "tome":
            merged = matching.merged[i]
            at = torch.tensor(merging.kept(n, merged))
            rows = torch.tensor([merging.merge(x[i].tolist(), merged)], dtype=x.dtype)
            image, *rest = run(i, rows, at, torch.arange(len(at)))
            image = torch.tensor([merging.unmerge(image[0].tolist(), n, merged)], dtype=x.dtype)
        else:
            image, *rest = run(i, x[i : i + 1], place, kept)
        results.append((image, *rest))
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


def attend(q, k, v):
    """Softmax attention in full: (1, S, H, D) -> (1, S, H * D)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return todo_model.softmax_attention(q, k, v).transpose(1, 2).flatten(2)


def rotate(x, cos, sin):
    """Turn each pair of channels of x (1, S, H, D) by its angle; cos and sin (S, D / 2), one angle a pair."""
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[None, :, None], sin[None, :, None]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(3)


def watch_input(block, now):
    """Keep a block's input in `now["input"]`."""

    def see(module, args, kwargs):
        now["input"] = args[0] if args else kwargs["hidden_states"]

    block.register_forward_pre_hook(see, with_kwargs=True)

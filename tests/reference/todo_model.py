"""ToDo on whole models by definition: the paper's attention, written out, in the place of a module's own."""

import torch
import torch.nn.functional as F


def pooled(x, h, w, factor, mode):
    """(B, h * w, C) -> (B, h' * w', C), by `interpolate` on the picture of the tokens, or by slices of it."""
    image = x.transpose(1, 2).unflatten(2, (h, w))
    if mode == "slices":
        return image[:, :, ::factor, ::factor].flatten(2).transpose(1, 2)
    return F.interpolate(image, (h // factor, w // factor), mode=mode).flatten(2).transpose(1, 2)


def softmax_attention(q, k, v):
    """Attention in full: (B, H, S, D)."""
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v


def joint_attention(attn, image, text, pool):
    """SD3's `Attention` with keys and values of the image pooled after projection (and after their norms).

    Args:
        attn: the module, for its layers.
        image: (B, N, C); text: (B, T, C) or None.
        pool: (B, N, C) -> (B, M, C).

    Returns:
        (image, text) outputs, text None if there is none or if the block drops it.
    """

    def heads(x, norm=None):
        x = x.unflatten(2, (attn.heads, -1)).transpose(1, 2)
        return norm(x) if norm is not None else x

    def pool_heads(x):
        flat = x.transpose(1, 2).flatten(2)
        return pool(flat).unflatten(2, (attn.heads, -1)).transpose(1, 2)

    q = heads(attn.to_q(image), attn.norm_q)
    k, v = pool_heads(heads(attn.to_k(image), attn.norm_k)), pool_heads(heads(attn.to_v(image)))
    n = q.shape[2]
    if text is not None:
        q = torch.cat([q, heads(attn.add_q_proj(text), attn.norm_added_q)], 2)
        k = torch.cat([k, heads(attn.add_k_proj(text), attn.norm_added_k)], 2)
        v = torch.cat([v, heads(attn.add_v_proj(text))], 2)
    out = softmax_attention(q, k, v).transpose(1, 2).flatten(2)
    first, rest = out[:, :n], out[:, n:]
    first = attn.to_out[0](first)
    if text is None:
        return first, None
    return first, rest if attn.context_pre_only else attn.to_add_out(rest)

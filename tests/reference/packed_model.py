"""A packed run through SD3's blocks by definition: one sample, one token after the other, keys and values of the others
as they were last computed; a token that is left out gets what the blocks added to it last, moved on by its slope.
"""

import torch


def attend(queries, keys, values, heads):
    """Rows (M, C) to rows (S, C): the softmax of one query and one head at a time."""
    size = queries.shape[1] // heads
    out = torch.zeros_like(queries)
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        for i in range(len(queries)):
            logits = keys[:, part] @ queries[i, part] / size**0.5
            weights = torch.exp(logits - logits.max())
            out[i, part] = (weights / weights.sum()) @ values[:, part]
    return out


def normed(rows, norm, heads):
    return rows if norm is None else norm(rows.unflatten(1, (heads, -1))).flatten(1)


class PackedStack:
    """All blocks, for one sample of `n` tokens.

    Attributes:
        kept: for each attention, keys and values (n, C) of all tokens.
        residual: (n, C), what the blocks added to each token when it was computed last, which was at `then` (n,).
        slope: (n, C), what the residual changed by until then, in a unit of `now`.
    """

    def __init__(self, blocks, n, forecast):
        self.blocks, self.n, self.forecast = blocks, n, forecast
        self.kept, self.residual, self.slope, self.then = {}, [None] * n, [None] * n, [None] * n

    def drift(self, row, now):
        """How far a token has moved by now since it was computed, if it goes on as it did."""
        return float(self.slope[row].norm()) * (now - self.then[row])

    def step(self, image, text, temb, rows, now):
        """Tokens (n, C) after all blocks, of which `rows` are computed, in this order, at the time `now`."""
        x = image[rows]
        for block in self.blocks:
            x, text = self.block(block, x, text, temb, rows)
        for place, row in enumerate(rows):
            fresh = x[place] - image[row]
            before, then = self.residual[row], self.then[row]
            self.slope[row] = torch.zeros_like(fresh) if then is None else (fresh - before) / (now - then)
            self.residual[row], self.then[row] = fresh, now
        moved = [slope * (now - then) for slope, then in zip(self.slope, self.then, strict=True)]
        residual = [r + m if self.forecast else r for r, m in zip(self.residual, moved, strict=True)]
        return image + torch.stack(residual)

    def block(self, block, x, text, temb, rows):
        own = block.norm1(x[None], emb=temb[None])
        normal, gate, shift_ff, scale_ff, gate_ff = own[:5]
        if block.context_pre_only:
            beside, others = block.norm1_context(text[None], temb[None]), None
        else:
            beside, *others = block.norm1_context(text[None], emb=temb[None])
        image_out, text_out = self.attention(block.attn, normal[0], beside[0], rows)
        x1 = x + gate[0] * image_out
        if block.attn2 is not None:
            x1 = x1 + own[6][0] * self.attention(block.attn2, own[5][0], None, rows)[0]
        y = x1 + gate_ff[0] * block.ff(block.norm2(x1) * (1 + scale_ff[0]) + shift_ff[0])
        if others is None:
            return y, None
        gate, shift_ff, scale_ff, gate_ff = (part[0] for part in others)
        text = text + gate * text_out
        return y, text + gate_ff * block.ff_context(block.norm2_context(text) * (1 + scale_ff) + shift_ff)

    def attention(self, a, x, text, rows):
        q, k, v = normed(a.to_q(x), a.norm_q, a.heads), normed(a.to_k(x), a.norm_k, a.heads), a.to_v(x)
        keys, values = self.kept.setdefault(a, (k.new_zeros(self.n, k.shape[1]), v.new_zeros(self.n, v.shape[1])))
        for place, row in enumerate(rows):
            keys[row], values[row] = k[place], v[place]
        if text is not None:
            q = torch.cat([q, normed(a.add_q_proj(text), a.norm_added_q, a.heads)])
            keys = torch.cat([keys, normed(a.add_k_proj(text), a.norm_added_k, a.heads)])
            values = torch.cat([values, a.add_v_proj(text)])
        out = attend(q, keys, values, a.heads)
        beside = out[len(x) :]
        return a.to_out[0](out[: len(x)]), a.to_add_out(beside) if getattr(a, "to_add_out", None) else beside

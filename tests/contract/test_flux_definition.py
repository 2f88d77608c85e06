"""ToMe and ToDo on FLUX by definition, in float64: rotary positions follow the tokens, single blocks are merged whole,
text and reference pictures stay. The definition runs sample by sample, with upstream's shared table of positions."""

import copy

import pytest
import torch

import diffusion_tokred as tokred
from diffusion_tokred.testing import tiny
from diffusion_tokred.tokens import draw, mix
from tests.contract.helpers import near
from tests.reference import pooling
from tests.reference.tome_model import Matching

TEXT, H, W = 5, 6, 8
N = H * W
# FLUX computes its rotary tables in float32 (float64 on the CPU, cast), so float64 agrees to this.
ATOL = 1e-9


def call(model, references=0, samples=slice(None), seed=0):
    """One call with a batch of 2 different samples, or some of them; Kontext hands in reference pictures after it."""
    draws = torch.Generator().manual_seed(seed)

    def ids(picture, rows, columns):
        return torch.cartesian_prod(torch.tensor([picture]), torch.arange(rows), torch.arange(columns)).float()

    places = [ids(0, H, W), *(ids(1, 1, 7) for _ in range(references))]
    tokens = torch.randn(2, N + 7 * references, model.config.in_channels, generator=draws, dtype=torch.float64)
    text = torch.randn(2, TEXT, tiny.TEXT, generator=draws, dtype=torch.float64)
    pooled = torch.randn(2, tiny.POOLED, generator=draws, dtype=torch.float64)
    time = torch.tensor([0.7, 0.7], dtype=torch.float64)
    with torch.no_grad():
        return model(
            tokens[samples], text[samples], pooled[samples], time[samples], torch.cat(places), torch.zeros(TEXT, 3),
            return_dict=False,
        )[0]  # fmt: skip


def by_sample(model, references):
    return torch.cat([call(model, references, slice(i, i + 1)) for i in (0, 1)])


def rows_of(kept, references):
    """Rows of [text, image, references] that remain when `kept` (positions of the image) do."""
    rest = range(TEXT + N, TEXT + N + 7 * references)
    return torch.tensor([*range(TEXT), *(TEXT + k for k in kept), *rest])


def install_tome(model, references, ratio, whole, parts, offset):
    """Merging in loops around the modules of a model of its own, for calls of one sample."""

    def reduce(m, kwargs):
        x = kwargs["hidden_states"]
        kept = [i for i in range(N) if i not in m.merged[0]]
        rows = rows_of(kept, references)
        kwargs["hidden_states"] = torch.cat([m.merge(x[:, :N]), x[:, N:]], 1)
        if "image_rotary_emb" in kwargs:
            kwargs["image_rotary_emb"] = tuple(table[rows] for table in kwargs["image_rotary_emb"])
        return len(kept)

    def restore(m, y, k):
        return torch.cat([m.unmerge(y[:, :k]), y[:, k:]], 1)

    def matching(x):
        return Matching(x[:, :N], H, W, 2, 2, ratio, offset)

    def around_block(block):
        forward = block.forward

        def merged(**kwargs):
            x = kwargs["hidden_states"]
            m = matching(x)
            k = reduce(m, kwargs)
            text, y = forward(**kwargs)
            return text, x + restore(m, y - kwargs["hidden_states"], k)

        block.forward = merged

    def around_part(block, name, joint):
        module = getattr(block, name)
        forward, now = module.forward, {}
        block.register_forward_pre_hook(
            lambda b, args, kwargs: now.update(m=matching(kwargs["hidden_states"])), with_kwargs=True
        )

        def merged(*args, **kwargs):
            m = now["m"]
            if joint:  # text and image as one sequence
                x = kwargs["hidden_states"]
                part = {**kwargs, "hidden_states": x[:, TEXT:]}
                k = reduce(m, part)
                y = forward(**{**part, "hidden_states": torch.cat([x[:, :TEXT], part["hidden_states"]], 1)})
                return torch.cat([y[:, :TEXT], restore(m, y[:, TEXT:], k)], 1)
            kwargs = dict(kwargs, hidden_states=args[0]) if args else kwargs
            k = reduce(m, kwargs)
            out = forward(kwargs["hidden_states"]) if args else forward(**kwargs)
            return (restore(m, out[0], k), *out[1:]) if isinstance(out, tuple) else restore(m, out, k)

        module.forward = merged

    for block in model.transformer_blocks:
        for name in parts:
            around_part(block, name, joint=False)
    for block in model.single_transformer_blocks:
        if whole:
            around_block(block)
        elif "attn" in parts:
            around_part(block, "attn", joint=True)


@pytest.mark.parametrize("references", [0, 2], ids=["plain", "kontext"])
@pytest.mark.parametrize(
    ("whole", "parts", "more"),
    [
        (True, ["attn"], dict()),
        (False, ["attn"], dict(merge_parallel=False, ratio=0.75)),
        (True, ["attn", "ff"], dict(merge_ff=True, ratio=0.3)),
        (False, ["ff"], dict(merge_attn=False, merge_ff=True)),
    ],
    ids=["default", "attention", "all", "feed-forward"],
)
def test_tome(whole, parts, more, references):
    model = tiny.flux().transformer.double()
    other, plain = copy.deepcopy(model), call(model, references)
    tokred.patch(model, method="tome", seed=3, **more)
    ours = call(model, references)
    assert (ours - plain).abs().max() > 1e-3
    offset = draw(torch.tensor(mix(3, 0, 0)), (H // 2) * (W // 2), 4).tolist()
    install_tome(other, references, more.get("ratio", 0.5), whole, parts, offset)
    near(ours, by_sample(other, references), ATOL)


class Reference:
    """FLUX's attention written out, with keys and values of some tokens only."""

    def __init__(self, chosen, references):
        self.rows = rows_of(chosen, references)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        def heads(x, norm=None):
            x = x.unflatten(-1, (attn.heads, -1))
            return x if norm is None else norm(x)

        q, k, v = (heads(f(hidden_states), n) for f, n in (
            (attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k), (attn.to_v, None),
        ))  # fmt: skip
        if encoder_hidden_states is not None:
            added = [heads(f(encoder_hidden_states), n) for f, n in (
                (attn.add_q_proj, attn.norm_added_q), (attn.add_k_proj, attn.norm_added_k), (attn.add_v_proj, None),
            )]  # fmt: skip
            q, k, v = (torch.cat([a, b], 1) for a, b in zip(added, (q, k, v), strict=True))
        cos, sin = (table[:, ::2] for table in image_rotary_emb)  # each angle stands there twice
        turn = torch.complex(cos, sin)[:, None]

        def rotate(x):
            return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

        q, k = rotate(q), rotate(k)
        k, v = k[:, self.rows], v[:, self.rows]
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
        if encoder_hidden_states is None:
            return out
        text, image = out[:, :TEXT], out[:, TEXT:]
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)


@pytest.mark.parametrize("references", [0, 1], ids=["plain", "kontext"])
@pytest.mark.parametrize(("factor", "mode"), [(2, "nearest"), (2, "nearest-exact"), (3, "nearest")])
def test_todo(factor, mode, references):
    model = tiny.flux().transformer.double()
    other, plain = copy.deepcopy(model), call(model, references)
    tokred.patch(model, method="todo", factor=factor, mode=mode)
    ours = call(model, references)
    assert (ours - plain).abs().max() > 1e-3
    choose = pooling.nearest if mode == "nearest" else pooling.nearest_exact
    chosen = choose(list(range(N)), H, W, factor)
    for block in [*other.transformer_blocks, *other.single_transformer_blocks]:
        block.attn.processor = Reference(chosen, references)
    near(ours, by_sample(other, references), 1e-6)  # upstream rotates in float32


def test_reference_attention_is_fluxs():
    model = tiny.flux().transformer.double()
    plain = call(model)
    for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
        block.attn.processor = Reference(range(N), 0)
    near(call(model), plain, 1e-6)


def test_grids_are_read_once_a_run():
    """A read of the positions waits for the device: not in every step."""
    model = tiny.flux().transformer
    tokred.patch(model, method="todo")
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(12.0))
    reads = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if getattr(function, "__name__", "") == "max":
                reads.append(1)
            return super().__torch_function__(function, types, args, kwargs or {})

    watched = ids.as_subclass(Watched)
    layout = model._tokred.layout
    for _ in range(3):
        inputs = dict(img_ids=watched, hidden_states=torch.zeros(1, 48, 16), encoder_hidden_states=torch.zeros(1, 5, 8))
        assert model._tokred.backbone.size(layout, inputs) == (8, 24)
    assert len(reads) == 2  # rows and columns
    tokred.unpatch(model)

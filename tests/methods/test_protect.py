"""`protect=`: tokens that a mask touches are never reduced, in no method, family, batch or pass."""

import contextlib
import functools
import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image

import diffusion_tokred as tokred
from diffusion_tokred.methods import METHODS
from diffusion_tokred.runtime.rows import KV
from diffusion_tokred.runtime.site import Call
from diffusion_tokred.runtime.stack import StackSite
from diffusion_tokred.testing import families, tiny
from tests.compat.test_compile import graphs, whole
from tests.contract.helpers import PIPES, run, same
from tests.methods.caches import driver, options
from tests.reference.caching import toca_share
from tests.reference.regions import protected_tokens

FAMILIES = PIPES | families.BUILDERS
CHOOSING = {
    "tome": dict(method="tome", ratio=0.5),
    "tome-reuse": dict(method="tome", ratio=0.5, reuse_every=2),
    "tome-share": dict(method="tome", ratio=0.5, reuse_every=1, share_cfg=True),
    "todo": dict(method="todo"),
    "todo-area": dict(method="todo", mode="area"),
    "random-keep": dict(method="random-keep", ratio=0.75, feed_forward=True),
} | {name: options(name) for name in ("toca", "toca-faithful", "duca", "ras", "cat", "cat-faithful")}
SIZES = dict(dit={}, sana=dict(height=64, width=32), wan=dict(height=48, width=32))
SLOW = pytest.mark.slow
FAST = {("sd3", name) for name in CHOOSING} | {("sd", "toca-faithful"), ("sd", "tome"), ("flux", "toca-faithful")}
FAST |= {("sdxl", "cat-faithful"), ("dit", "ras"), ("pixart", "toca-faithful"), ("flux", "duca"), ("wan", "toca")}
FAST |= {("flux2", "tome"), ("qwenimage", "cat"), ("zimage", "random-keep"), ("lumina2", "todo"), ("sana", "tome")}
CELLS = [
    pytest.param(kind, name, marks=() if (kind, name) in FAST else SLOW)
    for kind, name in itertools.product(FAMILIES, CHOOSING)
]


def masks(pictures=2, height=17, width=11):
    """A corner of one picture, a stripe of the other."""
    found = np.zeros((pictures, height, width), dtype=bool)
    found[0, :4, :5] = True
    found[-1, -3:, 2:9] = True
    return found


@contextlib.contextmanager
def rows_seen(monkeypatch):
    """(site, rows that were computed (B, M) or None for all, tokens) of each call that a method makes, and of each
    stack that runs on some tokens."""
    found, compute, close = [], Call.compute, StackSite.close

    def spy(self, x=None, at=None, kv=None, watch=None):
        if self.plan.mode != "full" and (at is not None or isinstance(kv, KV)):
            found.append((self.site, self.x, x, at, kv))
        return compute(self, x, at, kv, watch)

    def spy_stack(self, method, out, joint):
        if self.plan.mode != "full":
            found.append((self, self.call.x, self.call.entered, self.call.at, None))
        return close(self, method, out, joint)

    with monkeypatch.context() as patch:
        patch.setattr(Call, "compute", spy)
        patch.setattr(StackSite, "close", spy_stack)
        yield found


@pytest.mark.parametrize("kind, name", CELLS)
def test_protected_tokens_are_computed(kind, name, monkeypatch):
    """By definition of the mask, and of what a module is handed: each protected token as it was, in its place."""
    pipe = FAMILIES[kind]()
    try:
        tokred.patch(pipe, **CHOOSING[name], protect=masks(), record="tokens")
    except tokred.UnsupportedError as error:
        assert "heed" not in str(error)  # the family cannot do what the method needs
        pytest.skip(str(error))
    with rows_seen(monkeypatch) as seen:
        run(pipe, steps=3, batch=2, **SIZES.get(kind, dict(height=48, width=32)))
    assert seen
    frames = 3 if kind == "wan" else 1
    for site, before, x, at, kv in seen:
        for row in range(len(before)):
            need = needed(row % 2, site.level.grid, frames)
            if name.startswith("todo"):  # all ask; protected tokens have keys and values of their own
                reduced = kv.reduce(before)
                assert all((reduced[row] == before[row, token]).all(-1).any() for token in need)
                continue
            places = (at if at.ndim == 1 else at[row]).tolist()
            assert torch.equal(x[row, [places.index(token) for token in need]], before[row, list(need)])
    report = tokred.report(pipe)
    step = max(s.index for s in report.steps if s.mode != "full")
    states = report.token_map[step, :, 0]
    need = needed(0, states.shape[1:], frames)
    for part in states.reshape(len(states), -1):
        assert np.flatnonzero(part == 5).tolist() == list(need)
        assert set(part.tolist()) <= {0, 1, 2, 3, 4, 5} and set(part.tolist()) != {0, 5}


@functools.cache
def needed(picture, grid, frames=1):
    """Which tokens are protected."""
    h, w = grid[0] // frames, grid[1]
    one = protected_tokens(masks()[picture].tolist(), h, w)
    assert one
    return tuple(token + frame * h * w for frame in range(frames) for token in one)


STEPS = ("fora", "fora-stack", "taylorseer", "taylorseer-modules")


@pytest.mark.parametrize("word", ["protect", "importance"])
@pytest.mark.parametrize("name", STEPS)
def test_methods_that_choose_no_tokens_are_refused(name, word):
    with pytest.raises(tokred.UnsupportedError, match=f"cannot heed {word}=: .*none of the tokens.*toca, .*tome"):
        tokred.patch(tiny.sd3(), **options(name), **{word: masks()})


def test_refusals_of_the_other_methods():
    for method, pipe in (("deepcache", tiny.sd()), ("firstblock", tiny.sd3()), ("clusca", tiny.sd3())):
        with pytest.raises(tokred.UnsupportedError, match="cannot heed protect="):
            tokred.patch(pipe, method=method, protect=masks())
    with pytest.raises(tokred.UnsupportedError, match=r"todo cannot heed importance=: .*by their place"):
        tokred.patch(tiny.sd3(), method="todo", importance=masks())
    heeding = {name for name, kind in METHODS.items() if "protect" in kind.heeds}
    assert heeding == {"tome", "todo", "random-keep", "toca", "duca", "ras", "cat"}


FORMS = {
    "array": lambda mask: mask,
    "ints": lambda mask: mask.astype(np.uint16) * 300,
    "tensor": lambda mask: torch.from_numpy(mask)[None, None].float(),
    "image": lambda mask: Image.fromarray(mask),
    "gray": lambda mask: Image.fromarray(mask.astype(np.uint8)),
    "blue": lambda mask: Image.fromarray(np.stack([0 * mask, 0 * mask, mask], -1).astype(np.uint8)),
    "list": lambda mask: [Image.fromarray(mask)],
    "nested": lambda mask: mask.tolist(),
    "transparent": lambda mask: Image.fromarray(
        np.dstack([np.full((*mask.shape, 3), 255), 255 * mask]).astype(np.uint8)
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_mask(form):
    pipe = tokred.patch(tiny.sd3(), method="tome", protect=FORMS[form](masks()[0]))
    (found,) = driver(pipe).regions.masks
    assert found.dtype == torch.bool and torch.equal(found, torch.from_numpy(masks()[0]))


WRONG = {
    "marks nothing": np.zeros((4, 4)),
    "seems to have channels": np.ones((8, 8, 3)),
    "not finite": np.full((4, 4), math.nan),
    "got the shape": np.ones(4),
    "got str": "mask.png",
    "got dict": {},
}


@pytest.mark.parametrize("text, mask", WRONG.items(), ids=lambda v: v if isinstance(v, str) else "")
def test_no_masks(text, mask):
    pipe = tiny.sd3()
    with pytest.raises(tokred.ConfigError, match=text):
        tokred.patch(pipe, method="tome", protect=mask)
    assert "_tokred" not in pipe.transformer.__dict__


def test_a_mask_for_each_picture_needs_as_many():
    pipe = tokred.patch(tiny.sd3(), method="tome", protect=masks(3))
    with pytest.raises(tokred.ConfigError, match="protect is for 3 pictures, and this run makes 2"):
        run(pipe, batch=2)


def test_a_picture_s_mask_is_its_own():
    """A batch with a mask for each is the pictures by themselves."""
    pipe = tokred.patch(tiny.sd3().to(torch.float64), method="tome", ratio=0.25, protect=masks())
    both = run(pipe, batch=2)
    for i, mask in enumerate(masks()):
        tokred.patch(pipe, method="tome", ratio=0.25, protect=mask)
        torch.testing.assert_close(run(pipe, seed=i), both[i : i + 1], rtol=0, atol=1e-8)


def half(height=8, width=8):
    mask = np.zeros((height, width), dtype=bool)
    mask[: height // 2] = True
    return mask


GROWN = {"toca": 0.5, "ras": 0.5, "random-keep": 0.5, "tome": 24 / 64}


@pytest.mark.parametrize("name, ratio", GROWN.items())
def test_the_count_grows_where_more_is_protected(name, ratio):
    """Of 64 tokens 32 are protected: as many are computed; in ToMe three of each free cell of four are merged."""
    more = CHOOSING[name] | dict(ratio=0.75)
    explanation = tokred.explain(tiny.sd3(), **more, protect=half())
    assert any("32 of 64 tokens" in text for text in explanation.warnings)
    assert any(f"ratio is {ratio:.3g} instead of 0.75" in text for text in explanation.warnings)
    pipe = tokred.patch(tiny.sd3(), **more, protect=half())
    with pytest.warns(UserWarning, match=f"ratio is {ratio:.3g} instead of 0.75"):
        run(pipe)
    step = tokred.report(pipe).steps[-1]
    assert step.ratio == ratio and step.tokens_computed == round(step.tokens_total * (1 - ratio))


def test_published_shares_stay_where_they_have_room():
    """A layer that computes fewer tokens than are protected computes these, and no other layer more than published."""
    steps, share = 6, 0.3
    more = options("toca-faithful", interval=3, ratio=1 - share, schedule="pixart")
    pipe = tokred.patch(tiny.pixart(), **more, protect=half())
    rows = [[], [], []]
    for block, found in zip(pipe.transformer.transformer_blocks, rows, strict=True):
        block.ff.net[0].proj.register_forward_pre_hook(lambda m, args, found=found: found.append(args[0].shape[1]))
    with pytest.warns(UserWarning, match="ratio is 0.5 instead of 0.7"):
        run(pipe, steps=steps, guidance=1.0)
    published = [
        [int(64 * toca_share("pixart", step, steps, depth, "feed_forward", share) + 1e-9) for step in range(steps)]
        for depth in (0, 13.5, 27)
    ]
    full = [s.index for s in tokred.report(pipe).steps if s.mode == "full"]
    assert len(full) < steps - 2
    assert rows == [[64 if i in full else max(n, 32) for i, n in enumerate(counts)] for counts in published]
    assert 32 < published[1][1] < 64 and published[2][1] < 32


@pytest.mark.parametrize("name", ["tome", "toca", "toca-faithful", "cat-faithful", "random-keep"])
def test_all_protected_is_dense(name):
    with pytest.warns(UserWarning, match="ratio is 0 instead of"):
        out = run(tokred.patch(tiny.sd3(), **CHOOSING[name], protect=np.ones((3, 3))), steps=4)
    assert same(out, run(tiny.sd3(), steps=4))


@pytest.mark.parametrize("name", ["toca-faithful", "duca", "todo", "cat-faithful"])
def test_explain_counts_what_runs(name):
    """FLOPs of the plan and of the run, and bytes kept."""
    more = CHOOSING[name] | (dict(warmup=2, interval=4) if name != "todo" else {})
    told = tokred.explain(
        tiny.sd3(), **more, protect=masks()[0], num_inference_steps=4, text_tokens=7, height=32, width=32
    )
    pipe = tokred.patch(tiny.sd3(), **more, protect=masks()[0])
    kept = []
    pipe.transformer.register_forward_hook(
        lambda *args: kept.append(sum(memory.nbytes for memory in driver(pipe)._memories.values()))
    )
    run(pipe, steps=4)
    steps = tokred.report(pipe).steps
    assert [(s.mode, s.ratio, s.flops) for s in steps] == [(s.mode, s.ratio, s.flops) for s in told.steps]
    if name != "todo":
        assert max(kept) == told.cache_bytes


def test_another_mask_for_the_next_run():
    """As if patched anew; in the middle of a run nothing changes."""
    a, b = masks()
    want = {
        name: run(tokred.patch(tiny.sd3(), **CHOOSING["toca"], protect=m), steps=4)
        for name, m in dict(a=a, b=b).items()
    }
    pipe = tokred.patch(tiny.sd3(), **CHOOSING["toca"], protect=a)
    assert tokred.protect(pipe, b) is pipe and same(run(pipe, steps=4), want["b"])
    tokred.protect(pipe, a)

    def switch(pipe, index, t, kwargs):
        tokred.protect(pipe, b)
        return kwargs

    assert same(run(pipe, steps=4, callback_on_step_end=switch), want["a"])
    assert same(run(pipe, steps=4), want["b"])
    assert same(run(tokred.protect(pipe, None), steps=4), run(tokred.patch(tiny.sd3(), **CHOOSING["toca"]), steps=4))
    with pytest.raises(tokred.ConfigError, match="marks nothing"):
        tokred.protect(pipe, np.zeros((2, 2)))
    for other in (tiny.sd3(), tokred.patch(tiny.sd3(), method="tome")):
        with pytest.raises(tokred.StateError, match="not patched with protect="):
            tokred.protect(other, a)


@pytest.mark.parametrize("name", ["toca-faithful", "toca"])
def test_no_mask_any_more_is_the_method_as_it_is(name):
    pipe = tokred.patch(tiny.flux(), **CHOOSING[name], protect=masks()[0])
    run(pipe, steps=3)
    want = run(tokred.patch(tiny.flux(), **CHOOSING[name]), steps=3)
    assert same(run(tokred.protect(pipe, None), steps=3), want)


@pytest.mark.parametrize("name", ["tome", pytest.param("toca-faithful", marks=SLOW), pytest.param("toca", marks=SLOW)])
def test_another_mask_compiles_nothing(name, dynamo):
    more = CHOOSING[name] | dict(ratio=0.25)
    pipe = tokred.patch(tiny.sd3(), **more, protect=masks()[0])
    whole(pipe)
    run(pipe, steps=4)
    first = graphs(dynamo)
    other = masks()[0][::-1, ::-1].copy()  # as many tokens, elsewhere
    out = run(tokred.protect(pipe, other), steps=4)
    assert graphs(dynamo) == first
    torch.testing.assert_close(out, run(tokred.patch(tiny.sd3(), **more, protect=other), steps=4), rtol=0, atol=1e-5)


def test_processors():
    """As `patch` restricted to attention does."""
    model = (pipe := tiny.pixart()).transformer
    model.set_attn_processor(tokred.TokenCacheAttnProcessor.around(model, driver_config()))
    with tokred.steps(pipe, protect=masks()[0], record="tokens"):
        run(pipe, steps=3)
    states = tokred.report(pipe).token_map[1, 0, 0].flatten()
    assert np.flatnonzero(states == 5).tolist() == protected_tokens(masks()[0].tolist(), 8, 8)
    assert (states == 2).any()


def driver_config():
    return tokred.ToCaConfig(**{k: v for k, v in CHOOSING["toca-faithful"].items() if k != "method"})

"""`store_dtype` and `blocks`: what bounds the memory of the caching methods."""

import re

import pytest
import torch

import diffusion_tokred as tokred
from diffusion_tokred.methods.fora import FORA
from diffusion_tokred.runtime.rows import Cache, packed
from diffusion_tokred.testing import tiny
from tests.compat.test_compile import graphs, whole
from tests.contract.helpers import PIPES, run, same
from tests.methods.caches import CACHES, cast, driver, modes, options, patched

SLOW = pytest.mark.slow
LONGER = dict(warmup=2, interval=3)
HALF = {torch.float16: 2**-11, torch.bfloat16: 2**-8}  # relative error of one rounding
DEEP = dict(method="deepcache", warmup=1, interval=2, min_steps=0)
FIRST = dict(method="firstblock", warmup=1, interval=2, min_steps=0, threshold=100.0)


def slots(pipe):
    return {name: slot for memory in driver(pipe)._memories.values() for name, slot in memory.slots.items()}


def held(pipe, steps=3, **more):
    """Bytes of all slots, and the types of what floats in them, after the last step of a run."""
    found = []

    def see(*args):
        tensors = [t for slot in slots(pipe).values() for t in slot.tensors() if t.is_floating_point()]
        types = {t.dtype for t in tensors if t.untyped_storage().nbytes() > 4}  # without stand-ins
        found.append((sum(m.nbytes for m in driver(pipe)._memories.values()), types))

    with_hook = tiny.denoiser(pipe).register_forward_hook(see)
    run(pipe, steps=steps, batch=2, **more)
    with_hook.remove()
    return found[-1]


@pytest.mark.parametrize(
    "store, dtype", [("bfloat16", torch.bfloat16), pytest.param("float32", torch.float32, marks=SLOW)]
)
@pytest.mark.parametrize("name", [*CACHES, "firstblock", "deepcache"])
def test_bytes_are_those_that_are_told(name, store, dtype):
    """A float32 model that keeps bfloat16, and a bfloat16 model that keeps float32."""
    kind, model = "sd" if name == "deepcache" else "sd3", {torch.bfloat16: torch.float32}.get(dtype, torch.bfloat16)
    more = {"firstblock": FIRST, "deepcache": DEEP}.get(name) or options(name, **LONGER)
    told = {
        s: tokred.explain(
            cast(PIPES[kind](), model), **more, store_dtype=s, num_inference_steps=3, batch_size=2, text_tokens=7,
            height=32, width=32,
        ).cache_bytes
        for s in (store, "auto")
    }  # fmt: skip
    pipe = tokred.patch(cast(PIPES[kind](), model), **more, store_dtype=store)
    nbytes, types = held(pipe)
    stand_ins = 64 if name == "deepcache" else 0  # for modules that are left out, a number each
    assert 0 < told[store] <= nbytes <= told[store] + stand_ins
    assert dtype in types and types <= {dtype, torch.float32}  # scores and clocks are float32 always
    assert (told[store] < told["auto"]) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("store", ["float16", pytest.param("bfloat16", marks=SLOW)])
@pytest.mark.parametrize("name", [*CACHES, "firstblock", "deepcache"])
def test_results_are_within_the_type_s_precision(name, store):
    """Near the same run that keeps float32, in proportion to the rounding, and not the same."""
    kind = "sd" if name == "deepcache" else "sd3"
    more = {"firstblock": FIRST, "deepcache": DEEP}.get(name) or options(name)
    if name in ("toca", "duca", "toca-faithful"):  # the choice of tokens shall not turn on a rounding
        more |= dict(select="random") if name != "toca-faithful" else dict(score="random")
    if name == "clusca":
        more |= dict(clusters=1)
    want = run(tokred.patch(PIPES[kind](), **more), steps=4)
    found = run(tokred.patch(PIPES[kind](), **more, store_dtype=store), steps=4)
    assert found.dtype == torch.float32
    error = float((found - want).abs().max() / want.abs().max())
    assert 0 < error < 8 * HALF[getattr(torch, store)]


@pytest.mark.parametrize("name", [*CACHES])
def test_the_model_s_own_type_changes_nothing(name):
    assert same(run(patched("sd3", name, store_dtype="float32"), steps=4), run(patched("sd3", name), steps=4))


@pytest.mark.parametrize("name", ["fora", "toca", "cat-faithful"])
def test_a_half_model_gives_its_own_type(name):
    out = run(patched("sd3", name, torch.bfloat16, store_dtype="float32"), steps=4)
    assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()


def test_full_steps_are_exact():
    """What is kept is rounded, what a step computes is not."""
    pipe = patched("sd3", "cat-faithful", store_dtype="bfloat16", warmup=4)
    assert same(run(pipe, steps=4), run(tiny.sd3(), steps=4))
    rows = torch.randn(1, 6, 4)
    cache = Cache(dtype=torch.float16)
    assert all(torch.equal(cache.rows(rows), rows) for _ in "kv")
    cache.at, new = torch.tensor([1, 4]), torch.randn(1, 2, 4)
    for _ in "kv":
        found = cache.rows(new)
        assert found.dtype == torch.float32 and torch.equal(found[:, [1, 4]], new)
        assert torch.equal(found[:, [0, 2, 3, 5]], rows[:, [0, 2, 3, 5]].half().float())


def test_float16_has_no_infinity():
    x = torch.tensor([1e6, -1e6, 3.0])
    assert packed(x, torch.float16).tolist() == [65504, -65504, 3] and packed(x, None) is x
    assert packed(x, torch.bfloat16).dtype == torch.bfloat16 and packed(x, torch.float32) is x


def test_budget_names_what_keeps_less():
    pipe = patched("sd3", "fora", cache_budget=1)
    with pytest.raises(tokred.ConfigError, match="store_dtype='bfloat16', or with blocks="):
        run(pipe)
    told = tokred.explain(tiny.sd3(), **options("fora"), store_dtype="float16", guidance=True, text_tokens=7)
    whole_bytes = tokred.explain(tiny.sd3(), **options("fora"), guidance=True, text_tokens=7).cache_bytes
    assert told.cache_bytes == whole_bytes // 2
    run(patched("sd3", "fora", cache_budget=told.cache_bytes, store_dtype="float16"))


MODULES = ("fora", "taylorseer-modules", "toca-faithful", "cat-faithful", "clusca")


def linear_rows(pipe):
    """Of each block, the rows that its linear layers are called with in a run of 4 steps, summed up."""
    found = {}
    blocks = [m for n, m in pipe.transformer.named_modules() if re.search(r"blocks\.\d+$", n)]
    for place, block in enumerate(blocks):
        for part in block.modules():
            if isinstance(part, torch.nn.Linear):
                part.register_forward_hook(
                    lambda m, args, out, p=place: found.update({p: found.get(p, 0) + out.numel() // out.shape[-1]})
                )
    run(pipe, steps=4)
    return found


@pytest.mark.parametrize("kind", ["sd3", "flux"])
@pytest.mark.parametrize("name", MODULES)
def test_only_these_blocks_keep(kind, name):
    """The others run in full at each step: their layers see as many rows as ever."""
    pipe = patched(kind, name, blocks=(1, 2))
    found, dense = linear_rows(pipe), linear_rows(PIPES[kind]())
    assert set(modes(pipe)) > {"full"}
    assert {place for place in dense if found[place] < dense[place]} == {1, 2}
    assert {place for place in dense if found[place] > dense[place]} == set()


@pytest.mark.parametrize("name", MODULES)
def test_bytes_of_some_blocks(name):
    more = options(name, **LONGER, blocks=(0, 2))
    told = tokred.explain(tiny.sd3(), **more, num_inference_steps=3, batch_size=2, text_tokens=7, height=32, width=32)
    assert any(site.reason == "not in blocks: computed in full" for site in told.sites)
    nbytes, _ = held(tokred.patch(tiny.sd3(), **more))
    assert nbytes == told.cache_bytes
    assert nbytes < held(patched("sd3", name, **LONGER))[0]


def test_blocks_that_are_not_there():
    with pytest.raises(tokred.ConfigError, match=r"blocks=\(1, 7\): nothing to act on in block 7"):
        patched("sd3", "fora", blocks=(1, 7))
    with pytest.raises(tokred.UnsupportedError, match="matches nothing"):
        patched("sd3", "fora", blocks=(7,))


@pytest.mark.parametrize("name", ["fora-stack", "taylorseer", "toca", "cat", "duca"])
def test_all_blocks_as_one_cannot_leave_some_out(name):
    with pytest.raises(tokred.UnsupportedError, match="takes all blocks as one here, so blocks= cannot"):
        patched("sd3", name, blocks=(0,))


@SLOW
@pytest.mark.parametrize("name", ["toca", "cat-faithful"])
def test_compiled(name, dynamo):
    pipe = patched("sd3", name, store_dtype="bfloat16")
    want = run(pipe, steps=4)
    whole(pipe)
    torch.testing.assert_close(run(pipe, steps=4), want, rtol=0, atol=1e-4)
    first = graphs(dynamo)
    run(pipe, steps=4)
    assert graphs(dynamo) == first


def test_a_method_that_keeps_nothing_has_no_type():
    assert tokred.explain(tiny.sd3(), method="tome").cache_bytes == 0 and FORA(tokred.FORAConfig()).store is None
    with pytest.raises(tokred.ConfigError, match="tome has no option 'store_dtype'"):
        tokred.patch(tiny.sd3(), method="tome", store_dtype="float16")

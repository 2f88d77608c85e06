"""The caching methods against their definitions: what is reused, forecast, packed; and ToCa's published schedules."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import diffusion_tokred as tokred
from diffusion_tokred.testing import tiny
from tests.contract.helpers import PIPES, dense, near, run, same
from tests.methods.caches import CACHES, KINDS, all_rows, cast, driver, modes, options, patched
from tests.reference import caching, packed_model

# --- neutral ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CACHES)
def test_interval_1_is_dense(name):
    kind = KINDS[[*CACHES].index(name) % len(KINDS)]
    assert same(run(patched(kind, name, interval=1)), dense(kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["toca", "cat-faithful"])
def test_all_rows_are_the_dense_model(kind, name):
    """In whatever order they come: the same one of both samples, or another one of each."""
    want = run(cast(PIPES[kind](), torch.float64), batch=2, guidance=1.0, steps=3)
    pipe = all_rows(patched(kind, name, torch.float64))
    orders = torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    for order in (orders[:1], orders):
        driver(pipe).method.select = lambda site, m, order=order: order
        near(run(pipe, batch=2, guidance=1.0, steps=3), want, 1e-10)


@pytest.mark.parametrize("kind", ["sd3-dual", "pixart", "flux"])
def test_faithful_toca_of_no_tokens_is_fora(kind):
    """R N < 1: all is reused."""
    fora = run(patched(kind, "fora", interval=3), steps=5)
    assert same(run(patched(kind, "toca-faithful", interval=3, ratio=0.99), steps=5), fora)
    assert not torch.equal(run(patched(kind, "toca-faithful", interval=3, ratio=0.98), steps=5), fora)


# --- what is reused, and forecast -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_fora_reuses_outputs(kind):
    """Between full steps modules return what they did, while their inputs change."""
    pipe, seen = patched(kind, "fora", interval=3), {}
    for site in driver(pipe).sites:
        if site.kind != "parallel":
            found = seen[site.name] = []
            site.module.register_forward_hook(
                lambda module, args, kwargs, out, found=found: found.append(
                    (args[0] if args else kwargs["hidden_states"], out[0] if isinstance(out, tuple) else out)
                ),
                with_kwargs=True,
            )
    run(pipe, steps=6, guidance=1.0)
    for calls in seen.values():
        inputs, outputs = zip(*calls, strict=True)
        pairs = [(i, i + 1) for i in range(5)]
        assert [torch.equal(outputs[i], outputs[j]) for i, j in pairs] == [True, True, False, True, True]
        assert not any(torch.equal(inputs[i], inputs[j]) for i, j in pairs)


class Features:
    """Stands in for modules of a denoiser: what they return for any token is a + b times the step, or the noise."""

    def __init__(self, model, modules, slope, follows):
        self.step, self.follows, self.slope = -1, follows, slope
        model.register_forward_pre_hook(self.begin, with_kwargs=True)
        draws = torch.Generator().manual_seed(0)
        for module in modules:
            a, b = torch.randn(2, 32, generator=draws, dtype=torch.float64)
            module.forward = self.stand_in(module.forward, a, b)

    def begin(self, module, args, kwargs):
        self.step += 1
        self.noise = float(kwargs["timestep"].flatten()[0]) / 1000

    def stand_in(self, forward, a, b):
        def stand(*args, **kwargs):
            now = self.step if self.follows == "step" else self.noise
            feature = a + self.slope * now * b
            out = forward(*args, **kwargs)
            if kwargs.get("temb") is None:  # a module of a block
                image = feature.repeat(*(out[0] if isinstance(out, tuple) else out).shape[:2], 1)
                return (image, *out[1:]) if isinstance(out, tuple) else image
            return out[0], kwargs["hidden_states"] + feature

        return stand


def featured(name, slope=0.0, follows="step", **more):
    """How far a patched run is from the unpatched one, where features are constant, or linear."""
    outs = []
    for is_patched in (False, True):
        pipe = cast(tiny.sd3(), torch.float64)
        blocks = pipe.transformer.transformer_blocks
        inside = CACHES[name].get("what") == "modules" or "faithful" in name or name == "clusca"
        modules = [part for block in blocks for part in (block.attn, block.ff)] if inside else [*blocks]
        Features(pipe.transformer, modules, slope, follows)
        if is_patched:
            tokred.patch(pipe, **options(name, **more))
        outs.append(run(pipe, steps=7))
    assert "full" in modes(pipe) and len(set(modes(pipe))) > 1
    return float((outs[0] - outs[1]).abs().max())


@pytest.mark.parametrize(
    "name, more",
    [
        ("fora", {}), ("fora-stack", {}), ("taylorseer", dict(order=2)), ("taylorseer-modules", dict(order=0)),
        ("taylorseer-modules", dict(order=2, basis="taylor")), ("taylorseer", dict(order=1, basis="hermite")),
        ("toca", dict(forecast=True)), ("toca", dict(forecast=False)), ("duca", {}), ("ras", {}), ("cat", {}),
        ("toca-faithful", {}), ("cat-faithful", {}), ("clusca", dict(weight=0.5)),
    ],
    ids=str,
)  # fmt: skip
def test_constant_features_are_exact(name, more):
    assert featured(name, interval=3, **more) < 1e-10


LINEAR = dict(interval=3, warmup=2)
TAYLOR, LAGRANGE = dict(order=1, basis="taylor"), dict(order=1, basis="lagrange", damping=1.0)
FORECASTS: list[tuple[str, dict[str, Any]]] = [
    ("taylorseer", TAYLOR), ("taylorseer", LAGRANGE), ("taylorseer-modules", TAYLOR), ("taylorseer-modules", LAGRANGE),
    ("toca", dict(forecast=True)),
]  # fmt: skip


@pytest.mark.parametrize("follows, other", [("step", "noise"), ("noise", "step")])
@pytest.mark.parametrize("name, more", FORECASTS, ids=str)
def test_linear_features_are_exact_in_first_order(name, more, follows, other):
    more = LINEAR | more
    assert featured(name, 1.0, follows, coordinate=follows, **more) < 1e-6
    assert featured(name, 1.0, follows, coordinate=other, **more) > 1e-3
    without = more | (dict(forecast=False) if name == "toca" else dict(order=0))
    assert featured(name, 1.0, follows, coordinate=follows, **without) > 1e-3


@pytest.mark.parametrize("what", ["stack", "modules"])
def test_a_forecast_of_order_0_reuses(what):
    fora = run(patched("flux", "fora", interval=3, what=what), steps=6)
    for more in (dict(order=0), dict(order=1, basis="lagrange", damping=0.0)):
        near(run(patched("flux", "taylorseer", interval=3, what=what, **more), steps=6), fora, 1e-5)


def test_toca_in_a_single_block_of_flux():
    """Chosen tokens, and text, get what their own MLP and the *old* attention give them; the others what they got."""
    pipe = patched("flux", "toca-faithful", torch.float64, interval=4, ratio=0.6)
    plain = cast(tiny.flux(), torch.float64).transformer.single_transformer_blocks[0]
    block, seen = pipe.transformer.single_transformer_blocks[0], []
    block.register_forward_hook(
        lambda module, args, kwargs, out: seen.append((kwargs, [part.clone() for part in out])), with_kwargs=True
    )
    run(pipe, steps=3, guidance=1.0)
    assert modes(pipe) == ["full", "reduce", "reduce"]
    attended = []
    handle = plain.attn.register_forward_hook(lambda module, args, out: attended.append(out))
    added = None
    for kwargs, (text, image) in seen:
        want_text, want = plain(**kwargs)
        if added is None:
            added = want - kwargs["hidden_states"]
            handle.remove()
            plain.attn.forward = lambda *args, **kwargs: attended[0]
        else:
            old, new = kwargs["hidden_states"] + added, want - kwargs["hidden_states"]
            fresh = (image - old).abs().amax(-1)[0] > 1e-9
            assert fresh.sum() == int(0.4 * 64)
            added = torch.where(fresh[:, None], new, added)
        near(image, kwargs["hidden_states"] + added, 1e-10)
        near(text, want_text, 1e-10)


# --- clusters -----


def test_clusca_is_its_definition():
    """A run in float64, feed-forward by feed-forward: the forecast, one token of each cluster, and what follows it."""
    weight, k = 0.25, 5  # exact in float32, as what a forecast counts is here
    pipe = patched("sd3", "clusca", torch.float64, interval=4, warmup=2, clusters=k, weight=weight, damping=1.0)
    plain = cast(tiny.sd3(), torch.float64)
    found = [site for site in driver(pipe).sites if site.kind == "feed_forward"]
    seen, chosen = {site.name: [] for site in found}, []

    def begin(model, args, kwargs):
        memory = found[0].level.memory
        chosen.append(memory.prepared.get(found[0].plan.text) if found[0].plan.mode == "forecast" else None)

    pipe.transformer.register_forward_pre_hook(begin, with_kwargs=True)
    for site in found:
        site.module.register_forward_hook(
            lambda module, args, out, calls=seen[site.name]: calls.append((args[0].clone(), out.clone()))
        )
    run(pipe, steps=8, batch=2)
    assert [prepared is None for prepared in chosen] == [True, True, False, False, False, True, False, False]
    drawn = set()
    for layer, site in enumerate(found):
        module = plain.transformer.get_submodule(site.name)
        fulls: list[tuple[int, Any]] = []
        off = torch.zeros(())
        for step, (x, out) in enumerate(seen[site.name]):
            fresh = module(x)
            if chosen[step] is None:
                fulls, off = [*fulls[-1:], (step, out)], torch.zeros(())
                near(out, fresh, 1e-10)
                continue
            _, labels, every, _ = chosen[step]
            (before, old), (last, new) = fulls
            expected = new + (new - old) * (step - last) / (last - before)
            want = expected + off
            for row in range(len(x)):
                for token in range(64):
                    one = int(every[layer, row, labels[row, token]])
                    assert labels[row, one] == labels[row, token]
                    share = 1.0 if token == one else weight
                    want[row, token] = (1 - share) * want[row, token] + share * fresh[row, one]
            near(out, want, 1e-10)
            off = out - expected
            drawn.add(tuple(every[layer].flatten().tolist()))
    assert len(drawn) == 5 * len(found)  # anew at each step, in each layer


def test_clusca_clusters_what_the_last_feed_forward_is_handed():
    pipe = patched("sd3", "clusca", torch.float64, interval=3, clusters=4, iterations=2)
    site = [site for site in driver(pipe).sites if site.kind == "feed_forward"][-1]
    inputs, labels = [], []
    site.module.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    pipe.transformer.register_forward_hook(
        lambda *args: labels.append(site.level.memory.notes.get("clusters", (None, None, None))[1:])
    )
    run(pipe, steps=6)
    centroids = None
    for full in (0, 3):
        points = inputs[full][1].tolist()  # of the conditional half
        start = centroids or [points[p] for p in spaced(64, 4)]
        want, centroids = caching.lloyd(points, start, 2)
        assert [rows.tolist() for rows, _ in labels[full + 1 : full + 3]] == [[want]] * 2


def spaced(n, k):
    """Where k-means begins."""
    return [i * n // k + (i * 40503 % 65536 * (n // k) >> 16) for i in range(k)]


# --- packed steps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("select, forecast", [("random", False), ("drift", True)])
def test_packed_is_its_definition(select, forecast):
    """A whole run in float64: the choice by drift, outputs of the stack at each step, keys and values at its end."""
    pipe = patched(
        "sd3-dual", "toca", torch.float64, select=select, age_weight=0, coordinate="step", forecast=forecast,
        ratio=0.8, warmup=2, interval=4,
    )  # fmt: skip
    (site,), blocks = driver(pipe).sites, pipe.transformer.transformer_blocks
    calls, kept = [], {}

    def begin(block, args, kwargs):
        inputs = [kwargs[key].clone() for key in ("hidden_states", "encoder_hidden_states", "temb")]
        at = site.level.memory.prepared[site.plan.text] if site.plan.mode == "reduce" else torch.arange(64)
        calls.append((inputs, at.expand(2, -1).tolist()))

    def end(block, args, kwargs, out):
        calls[-1] += (out[1].clone(),)

    def keep(model, args, out):
        kept.update({a.module: a.level.memory.slots[a.name].cache.stored for a in site.attentions})

    blocks[0].register_forward_pre_hook(begin, with_kwargs=True)
    blocks[-1].register_forward_hook(end, with_kwargs=True)
    pipe.transformer.register_forward_hook(keep)
    run(pipe, steps=6)
    assert modes(pipe) == ["full"] * 2 + ["reduce"] * 3 + ["full"]
    assert {len(at[0]) for _, at, _ in calls} == {64, 13}

    tokred.unpatch(pipe)
    halves = [packed_model.PackedStack(blocks, 64, forecast) for _ in range(2)]
    for now, (inputs, at, out) in enumerate(calls):
        if select == "drift" and len(at[0]) == 13:
            assert at[0] == at[1] == caching.top([sum(s.drift(row, now) for s in halves) for row in range(64)], 13)
        for sample, stack in enumerate(halves):
            with torch.no_grad():
                near(out[sample], stack.step(*(part[sample] for part in inputs), at[sample], now), 1e-10)
    for attention, stored in kept.items():
        for found, wanted in zip(stored, zip(*(stack.kept[attention] for stack in halves), strict=True), strict=True):
            near(found, torch.stack(wanted), 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_kept_rows_of_all_tokens_are_the_dense_ones(kind):
    """The second step's keys and values, written by a full step, and row by row."""
    found = []
    for more in (dict(warmup=2), dict(warmup=1)):
        pipe = patched(kind, "toca", torch.float64, **more)
        if more["warmup"] == 1:
            all_rows(pipe)
        (site,), kept = driver(pipe).sites, []
        tiny.denoiser(pipe).register_forward_hook(
            lambda model, args, out, site=site, kept=kept: kept.append(
                [t.clone() for a in site.attentions for t in site.level.memory.slots[a.name].cache.stored]
            )
        )
        run(pipe, guidance=1.0)
        found.append(kept)
    for full, written in zip(found[0][1], found[1][1], strict=True):
        near(written, full, 1e-10)
    assert not any(torch.equal(a, b) for a, b in zip(*found[0], strict=True))  # they change from step to step


# --- ToCa's schedules -------------------------------------------------------------------------------------------------

# Test vectors of spec/caching.md, section 17.
FULL = {
    "dit": (50, 3, [0, 4, 5, 9, 13, 17, 19, 22, 25, 28, 31, *range(33, 50, 2)]),
    "pixart": (20, 3, [0, 4, 6, 9, 12, 15, 18]),
    "flux": (50, 4, [0, 1, 2, *range(6, 50, 4)]),
}


@pytest.mark.parametrize("kind, share", [("dit", 0.07), ("pixart", 0.3), ("flux", 0.1)])
def test_toca_s_schedules(kind, share):
    """Full steps in the report, and the rows of each layer's feed-forward and cross-attention."""
    steps, interval, full = FULL[kind]
    pipe = patched(kind, "toca-faithful", interval=interval, ratio=1 - share, schedule="auto")
    rows: dict[str, list[int]] = {}
    model = tiny.denoiser(pipe)
    for i, block in enumerate(model.transformer_blocks):
        layers = {"feed_forward": block.ff.net[0].proj}
        if kind == "pixart":
            layers["cross_attention"] = block.attn2.to_q
        for module, layer in layers.items():
            found = rows[f"{i} {module}"] = []
            layer.register_forward_pre_hook(lambda m, args, found=found: found.append(args[0].shape[1]))
    run(pipe, steps=steps, guidance=1.0)
    assert [s.index for s in tokred.report(pipe).steps if s.mode == "full"] == full
    for name, found in rows.items():
        layer, module = name.split()
        depth = (18 if kind == "flux" else 27) * int(layer) / (len(model.transformer_blocks) - 1)
        shares = [caching.toca_share(kind, p, steps, depth, module, share) for p in range(steps)]
        counts = [64 if p in full else int(64 * r + 1e-9) for p, r in enumerate(shares)]
        # Where a share is 0 the module is not called; at one below a token it is, with none.
        assert [c for c in found if c] == [c for c in counts if c]
    told = tokred.explain(PIPES[kind](), driver(pipe).method.config, num_inference_steps=steps)
    assert [s.index for s in told.steps if s.mode == "full"] == full
    if kind == "pixart":  # section 17 again: shares at step 10 of the first layer and of the last
        ten = [found[10] for found in (rows[f"{i} {m}"] for m in ("feed_forward", "cross_attention") for i in (0, 2))]
        assert ten == [int(64 * r) for r in (0.768, 0.192, 0.288, 0.072)]

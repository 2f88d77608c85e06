"""Which tokens a step computes: against loops over what the denoiser returned, and over queries, keys and values."""

from __future__ import annotations

import math

import pytest
import torch

from diffusion_tokred.testing import tiny
from tests.contract.helpers import run
from tests.methods.caches import driver, modes, patched
from tests.reference import caching

N, M = 64, 16


class Watch:
    """Runs SD3 with guidance, in float64: what it returned at each step, tokens as lists, conditional half; and the
    tokens that were computed, None at full steps."""

    def __init__(self, name, steps, **more):
        self.pipe = patched("sd3", name, torch.float64, ratio=1 - M / N, **{"warmup": 2, "interval": 100} | more)
        self.outputs, self.chosen, self.values, self.labels = [], [], [], []
        model = tiny.denoiser(self.pipe)
        for block in model.transformer_blocks:
            block.attn.to_v.register_forward_hook(lambda module, args, out: self.values.append(out))
        model.register_forward_hook(self.see)
        run(self.pipe, steps=steps)

    def see(self, model, args, out):
        (site,) = driver(self.pipe).sites
        memory = site.level.memory
        rows = out[0][-1].unfold(1, 2, 2).unfold(2, 2, 2).permute(1, 2, 0, 3, 4).reshape(N, -1)  # patches of 2 x 2
        self.outputs.append(rows.tolist())
        at = memory.prepared[site.plan.text] if site.plan.mode == "reduce" else None
        self.chosen.append(None if at is None else at.expand(2, -1).tolist())
        self.labels.append(memory.notes.get("labels"))

    def reduced(self):
        """(step, tokens) of the steps that are not full. Both halves have the same."""
        for step, at in enumerate(self.chosen):
            if at is not None:
                assert at[0] == at[1] and len(set(at[0])) == M
                yield step, at[0]


@pytest.mark.parametrize("high, kappa", [(1.0, 0.1), (0.25, 0.5)])
def test_ras(high, kappa):
    """Of the last output: left out are the tokens that deviate most, or least; who was left out often, less so."""
    seen, drops = Watch("ras", 6, high=high, starvation=kappa), [0] * N
    for step, found in seen.reduced():
        spread = [caching.deviation(row) for row in seen.outputs[step - 1]]
        most = int(high * (N - M))
        falls = sorted(range(N), key=lambda i: -spread[i] * math.exp(-kappa * drops[i]))[:most]
        rises = sorted(set(range(N)) - set(falls), key=lambda i: spread[i] * math.exp(kappa * drops[i]))
        assert found == sorted(rises[N - M - most :])
        drops = [d + (i not in found) for i, d in enumerate(drops)]
    assert max(drops) > 1


def test_ras_starves_nobody():
    """With a strong weight all get their turn; without, the same ones stay out."""
    for kappa, everybody in ((2.0, True), (0.0, False)):
        seen = Watch("ras", 12, starvation=kappa)
        assert (len({i for _, at in seen.reduced() for i in at}) == N) == everybody


def test_duca():
    """After a full step: the tokens with the smallest values, over all attentions and both halves."""
    seen = Watch("duca", 6, interval=3)
    assert modes(seen.pipe) == ["full", "full", "reduce", "reuse", "full", "reduce"]
    full = [value for value in seen.values if value.shape[1] == N]
    for (_, found), values in zip(seen.reduced(), (full[3:6], full[6:9]), strict=True):
        heads = [sample.unflatten(1, (2, -1)).transpose(0, 1).tolist() for value in values for sample in value]
        scores = [math.fsum(part) for part in zip(*map(caching.small_norms, heads), strict=True)]
        assert found == caching.top(scores, M)


def test_by_age_everybody_has_a_turn():
    turns = [at for _, at in Watch("toca", 10, select="age").reduced()]
    assert len(turns) == 8
    for first in range(5):
        assert sorted(i for at in turns[first : first + 4] for i in at) == list(range(N))


def test_cat():
    """Clusters by the engine's labels (k-means has tests of its own), the rest from the outputs."""
    hot = 0.25
    seen, counts = Watch("cat", 14, warmup=3, hot=hot, clusters=5), [0.0] * N
    origin, unit = seen.outputs[1], max(int(M // 5 * hot), 1)
    for step, found in seen.reduced():
        labels = seen.labels[step][0].tolist()
        moved = [math.dist(a, b) for a, b in zip(seen.outputs[step - 1], origin, strict=True)]
        heat = caching.pool(moved, labels, 5, "max")
        if step == 3:
            heat, many, caps = caching.spread(heat, labels, 8, 8), M, (max(M // 10, 1),)
        else:
            many, caps = int(M * hot), (3 * unit, 2 * unit, unit)
        assert found == caching.cat_select(moved, labels, counts, M, heat, many, caps)
        counts = [0.5 * c + (i in found) for i, c in enumerate(counts)]
    assert step == 13


def base_score(score, found):
    """ToCa's s1 or s2, or norms, of one sample of PixArt: heads of rows by the name of the layer."""
    if score == "attention":
        return caching.received(found["attn1.to_q"], found["attn1.to_k"], 16**-0.5)
    if score == "entropy":  # the prompt's last token is masked
        asked = caching.entropies(found["attn2.to_q"], found["attn2.to_k"], 16**-0.5, [True] * 6 + [False])
        return [1 + h for h in asked]
    rows = found["attn1.to_v" if score == "value" else "attn1.to_k"]
    sizes = [math.fsum(caching.norm(head[i]) for head in rows) for i in range(N)]
    return [max(sizes) - size for size in sizes]


@pytest.mark.parametrize("score", ["value", "key", "attention", "entropy"])
def test_faithful_toca(score):
    """A layer's own choice at three steps after a full one: the score, what has waited, the best of each cell."""
    pipe = patched(
        "pixart", "toca-faithful", torch.float64, score=score, ratio=1 - M / N, interval=4, age_weight=0.02, bonus=0.4
    )
    rows, ages = {}, []
    block = pipe.transformer.transformer_blocks[1]
    for name in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q", "attn2.to_k"):
        block.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: rows.update({name: out} | rows)  # the first
        )
    memory = driver(pipe).levels[0]
    pipe.transformer.register_forward_hook(
        lambda *args: ages.append(memory.memory.slots["transformer_blocks.1.ff"].age.tolist())
    )
    run(pipe, steps=4)
    assert modes(pipe) == ["full", "reduce", "reduce", "reduce"]
    heads = {name: out.unflatten(2, (2, -1)).transpose(1, 2) for name, out in rows.items()}
    halves = [base_score(score, {name: part[i].tolist() for name, part in heads.items()}) for i in range(2)]
    mean = [(a + b) / 2 for a, b in zip(*halves, strict=True)]
    base, waited = [v / caching.norm(mean) for v in mean], [0] * N
    for age in ages[1:]:
        scores = [b + 0.02 * (w + 1) / 4 for b, w in zip(base, waited, strict=True)]
        chosen = caching.top(caching.bonus(scores, 8, 8, 4, 0.4), M)
        waited = [0 if i in chosen else w + 1 for i, w in enumerate(waited)]
        assert age == [waited, waited]
    assert len({i for age in ages[1:] for i in range(N) if age[0][i] == 0}) > M

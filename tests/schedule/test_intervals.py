"""The published schedules: against the releases' own counting, and against numbers worked out by hand."""

from __future__ import annotations

import inspect
import itertools

import pytest

from diffusion_tokred.errors import ConfigError
from diffusion_tokred.schedule import (
    cat_counts,
    cat_is_full,
    duca_kind,
    fixed_full_steps,
    intervals,
    is_full,
    ras_active,
    toca_full_steps,
    toca_share,
)
from tests.reference import caching

FAMILIES = ["dit", "dit-ddpm", "pixart", "flux", "default"]


def test_toca_full_steps_by_hand():
    dit = [0, 4, 5, 9, 13, 17, 19, 22, 25, 28, *range(31, 50, 2)]
    assert toca_full_steps("dit", 50, 3) == dit and len(dit) == 20
    assert len(toca_full_steps("dit-ddpm", 250, 4)) == 74
    assert toca_full_steps("pixart", 20, 3) == [0, 4, 6, 9, 12, 15, 18]
    flux = toca_full_steps("flux", 50, 4)
    assert flux == [0, 1, 2, *range(6, 47, 4)] and len(flux) == 14
    assert toca_full_steps("default", 11, 4) == [0, 4, 8]


@pytest.mark.parametrize("steps", [1, 2, 20, 28, 50, 250])
@pytest.mark.parametrize("n", [2, 3, 4, 7])
def test_full_steps_of_the_releases(steps, n):
    assert toca_full_steps("dit", steps, n) == toca_full_steps("dit-ddpm", steps, n) == caching.toca_dit_full(steps, n)
    assert toca_full_steps("pixart", steps, n) == caching.toca_pixart_full(steps, n)
    assert toca_full_steps("flux", steps, n) == caching.counted_full(steps, n, 3)
    for first in (1, 2, 3, 5):
        assert fixed_full_steps(steps, n, first) == caching.counted_full(steps, n, first)


def test_fixed_intervals():
    assert fixed_full_steps(10, 3) == [0, 3, 6, 9]  # FORA
    assert fixed_full_steps(20, 6, 3) == [0, 1, 2, 8, 14]  # TaylorSeer


@pytest.mark.parametrize("family", FAMILIES)
def test_an_interval_of_one_is_dense_and_the_first_step_full(family):
    assert toca_full_steps(family, 30, 1) == list(range(30))
    assert is_full(7, 30, None, 5, family), "no full step yet, wherever the run begins"


@pytest.mark.parametrize("family", FAMILIES)
def test_decisions_need_the_last_full_step_only(family):
    """Asked step by step, as a run does, by a process that remembers nothing else."""
    last, found = None, []
    for index in range(40):
        if is_full(index, 40, last, 3, family):
            last = index
            found.append(index)
    assert found == toca_full_steps(family, 40, 3)


@pytest.mark.parametrize(
    "step, shares", [(12, (0.006, 0.007, 0.008)), (25, (0.151, 0.188, 0.227)), (49, (0.42, 0.521, 0.63))]
)
def test_toca_shares_of_dit(step, shares):
    found = [toca_share("dit", step, 50, layer, 28, "feed_forward", 0.07) for layer in (0, 13, 27)]
    assert [round(r, 3) for r in found] == pytest.approx(shares, abs=0.0011)
    assert toca_share("dit", step, 50, 5, 28, "attention", 0.07) == 0


def test_toca_shares_of_pixart():
    def shares(step, module):
        return [round(toca_share("pixart", step, 20, layer, 28, module, 0.3), 3) for layer in (0, 13, 27)]

    assert shares(1, "feed_forward") == pytest.approx([1, 0.888, 0.348], abs=0.0011)
    assert shares(10, "feed_forward") == pytest.approx([0.768, 0.491, 0.192], abs=0.0011)
    assert shares(19, "feed_forward") == pytest.approx([0.146, 0.093, 0.036], abs=0.0011)
    assert shares(10, "cross_attention") == pytest.approx([0.288, 0.184, 0.072], abs=0.0011)


def test_toca_shares_of_flux():
    double = [toca_share("flux", 9, 50, layer, 19, "feed_forward", 0.1) for layer in (0, 9, 18)]
    single = [toca_share("flux", 9, 50, layer, 38, "parallel", 0.1) for layer in (0, 19, 37)]
    assert [round(r, 3) for r in double] == [0.06, 0.047, 0.033]
    assert [round(r, 3) for r in single] == [0.24, 0.127, 0.021]


@pytest.mark.parametrize("family, steps, n, mean", [("dit", 50, 3, 0.178), ("dit-ddpm", 250, 4, 0.171)])
def test_mean_share_of_dit(family, steps, n, mean):
    partial = sorted(set(range(steps)) - set(toca_full_steps(family, steps, n)))
    found = [toca_share(family, p, steps, layer, 28, "feed_forward", 0.07) for p in partial for layer in range(28)]
    assert sum(found) / len(found) == pytest.approx(mean, abs=5e-4)


@pytest.mark.parametrize("family", FAMILIES[:4])
@pytest.mark.parametrize("module", ["attention", "cross_attention", "feed_forward", "parallel"])
def test_shares_of_the_releases(family, module):
    depth = {"flux": 38 if module == "parallel" else 19}.get(family, 28)
    for base in (0, 0.07, 0.5, 1):
        for step in range(0, 40, 3):
            for layer in range(depth):
                expected = caching.toca_share(family, step, 40, layer, module, base)
                assert toca_share(family, step, 40, layer, depth, module, base) == pytest.approx(expected, abs=1e-12)


def test_shares_at_other_depths():
    """Ends of the layer's factor are those of the published depths."""
    for depth in (2, 5, 40):
        assert toca_share("flux", 0, 9, depth - 1, depth, "parallel", 0.1) == pytest.approx(0.16 * (1.5 - 37 / 27))
        assert toca_share("dit", 8, 9, depth - 1, depth, "feed_forward", 0.1) == pytest.approx(0.75 * 1.2)
    assert toca_share("pixart", 0, 9, 0, 1, "cross_attention", 0.1) == pytest.approx(0.1 * 1.9 * 1.6 * 0.6)
    assert [toca_share("default", 3, 9, 2, 4, m, 0.3) for m in ("attention", "feed_forward", "parallel")] == [
        0,
        0.3,
        0.3,
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_duca_takes_turns(family):
    last, kinds = None, []
    for index in range(30):
        kinds.append(duca_kind(index, 30, last, 5, family))
        if kinds[-1] == "full":
            last = index
    assert [i for i, kind in enumerate(kinds) if kind == "full"] == toca_full_steps(family, 30, 5)
    for before, kind in itertools.pairwise(kinds):
        assert kind in {"full": ("full", "token"), "token": ("full", "reuse"), "reuse": ("full", "token")}[before]


def test_duca_by_hand():
    """The cycle of N = 3 is full, token-wise, reuse."""
    kinds = [duca_kind(i, 9, i - i % 3 if i % 3 else (i - 3 if i else None), 3) for i in range(9)]
    assert kinds == ["full", "token", "reuse"] * 3


def test_ras_of_sd3():
    active = [ras_active(p, 28, 4096, 0.5) for p in range(28)]
    dense = {0, 1, 2, 3, 12, 20}
    assert active == [4096 if p in dense else 2048 for p in range(28)]
    assert 28 * 4096 / sum(active) == pytest.approx(1.65, abs=5e-3)
    assert ras_active(5, 28, 4096, 0.125) == 512 and ras_active(5, 28, 4096, 1) == 4096
    assert [ras_active(p, 40, 100, 0.3) for p in (29, 30, 31)] == [30, 30, 100]


def test_ras_of_lumina():
    for p in range(30):
        dense = p < 4 or p in (12, 20)
        skip = 4096 - ras_active(p, 30, 4096, 0.5, slope=256)
        assert skip == (0 if dense else 1024 + 256 * (p // 4))
    assert skip == 2816


def test_ras_counts_down_to_multiples_of_64():
    assert ras_active(8, 30, 1000, 0.5, slope=30) == 1000 - 64 * ((500 + 30 * (2 - 4)) // 64)
    with pytest.raises(ConfigError, match="leaves out 4096 of 4096 tokens at step 68 of 69: use a smaller one"):
        ras_active(68, 69, 4096, 0.5, end=99, slope=256)


def test_cat():
    c = cat_counts(4096)
    assert c == (1228, 122, 307, (183, 122, 61), 921)
    assert [p for p in range(28) if cat_is_full(p)] == list(range(8))
    assert cat_counts(16, 0.3) == (4, 1, 1, (3, 2, 1), 3) and cat_counts(4096, share_hot=0).hot == 0


def test_shares_of_a_count_give_the_count_back():
    for n in range(1, 200):
        assert all(cat_counts(n, m / n).total == ras_active(5, 9, n, m / n) == m for m in range(1, n + 1))


def test_wrong_arguments():
    with pytest.raises(ConfigError, match="unknown family 'sd3': one of dit, dit-ddpm, pixart, flux, default"):
        toca_full_steps("sd3", 20, 3)
    with pytest.raises(ConfigError, match="1 or more, found 0"):
        fixed_full_steps(20, 0)
    with pytest.raises(ConfigError, match="'dit' needs the number of steps"):
        is_full(3, None, 0, 3, "dit")
    assert is_full(3, None, 0, 3) and duca_kind(4, None, 3, 3, "flux") == "token"
    with pytest.raises(ConfigError, match="unknown module 'mlp': one of attention, cross_attention"):
        toca_share("dit", 0, 9, 0, 28, "mlp", 0.1)
    for bad in [(9, 9, 0, 28, 0.1), (-1, 9, 0, 28, 0.1), (0, 9, 28, 28, 0.1), (0, 9, 0, 28, 1.1)]:
        with pytest.raises(ConfigError, match=rf"step {bad[0]} of 9, layer {bad[2]} of 28, share {bad[4]:g}"):
            toca_share("dit", *bad[:4], "feed_forward", bad[4])
    for share in (0, 1.5):
        with pytest.raises(ConfigError, match=rf"in \(0, 1\], found {share:g}"):
            ras_active(0, 28, 4096, share)
        with pytest.raises(ConfigError, match=rf"in \(0, 1\] and share_hot in \[0, 1\], found {share:g}"):
            cat_counts(4096, share)
    with pytest.raises(ConfigError, match="leaves none of 3 tokens"):
        cat_counts(3, 0.3)


def test_nothing_but_numbers():
    assert "torch" not in inspect.getsource(intervals)

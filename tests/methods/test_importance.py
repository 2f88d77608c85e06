"""`importance=`: what matters more is kept first, by the definition in `patch`."""

import numpy as np
import pytest
import torch
from PIL import Image

import diffusion_tokred as tokred
from diffusion_tokred.methods import cat as cat_file
from diffusion_tokred.testing import tiny
from tests.contract.helpers import run, same
from tests.methods.caches import driver, options
from tests.methods.test_protect import CHOOSING

ONES = np.zeros((8, 8), dtype=np.float32)  # 12 of the 64 tokens of the tiny SD3
ONES[2:5, 1:5] = 1
TAKES = [name for name in CHOOSING if not name.startswith(("todo", "cat"))]


def states(pipe, **more):
    """The last reducing step's map, (passes, 64)."""
    run(pipe, steps=4, **more)
    report = tokred.report(pipe)
    step = max(s.index for s in report.steps if s.mode != "full")
    return report.token_map[step, :, 0].reshape(report.token_map.shape[1], -1)


@pytest.mark.parametrize("name", TAKES)
def test_a_weight_of_one_goes_before_all_of_none(name):
    """As there is room for them: they are computed, and not merged away."""
    pipe = tokred.patch(tiny.sd3(), **CHOOSING[name] | dict(ratio=0.5), importance=ONES, record="tokens")
    for part in states(pipe, batch=2):
        assert (part[ONES.flatten() == 1] == 0).all() and (part == 0).sum() == 32


def test_weights_shut_out_what_matters_less():
    """Rows of the picture in the order of their weights: the last half is what a ratio of 0.5 leaves."""
    ramp = np.repeat(np.arange(8.0)[:, None], 8, 1)
    pipe = tokred.patch(tiny.sd3(), **CHOOSING["toca"] | dict(ratio=0.5), importance=ramp, record="tokens")
    for part in states(pipe):
        assert np.flatnonzero(part == 0).tolist() == list(range(32, 64))


@pytest.mark.parametrize("name", ["tome", "random-keep", "toca", "toca-faithful", "ras", "duca"])
def test_what_matters_all_the_same_changes_nothing(name):
    want = run(tokred.patch(tiny.sd3(), **CHOOSING[name]), steps=4)
    pipe = tokred.patch(tiny.sd3(), **CHOOSING[name], importance=np.full((5, 3), 2.0))
    assert same(run(pipe, steps=4), want)


def test_cat_goes_by_weighed_change(monkeypatch):
    seen = []

    def change(*args):
        seen.append(found := real_change(*args))
        return found

    def select(delta, *args):
        seen.append(delta)
        return real_select(delta, *args)

    real_change, real_select = cat_file.change, cat_file.cat_select
    monkeypatch.setattr(cat_file, "change", change)
    monkeypatch.setattr(cat_file, "cat_select", select)
    run(tokred.patch(tiny.sd3(), **CHOOSING["cat"], importance=ONES), steps=4)
    (raw, weighed), *_ = zip(seen[::2], seen[1::2], strict=True)
    values = raw[0].tolist()
    for token, found in enumerate(weighed[0].tolist()):
        below = sum(v < values[token] for v in values)
        assert found == pytest.approx(below / 64 + ONES.flat[token])


def test_pictures_of_a_batch_have_their_own():
    both = np.stack([ONES, ONES[::-1]])
    pipe = tokred.patch(tiny.sd3().to(torch.float64), **CHOOSING["toca"], importance=both)
    found = run(pipe, steps=4, batch=2)
    for i, weights in enumerate(both):
        tokred.patch(pipe, **CHOOSING["toca"], importance=weights.copy())
        torch.testing.assert_close(run(pipe, steps=4, seed=i), found[i : i + 1], rtol=0, atol=1e-8)


def test_a_function_of_the_step():
    calls = []

    def weights(info, grid):
        calls.append((info.index, info.u, grid))
        return ONES if info.index < 2 else ONES[::-1].copy()

    pipe = tokred.patch(tiny.sd3(), **options("toca", interval=8, ratio=0.75), importance=weights, record="tokens")
    run(pipe, steps=4)
    assert [call[0] for call in calls] == [0, 1, 2, 3] and {call[2] for call in calls} == {(8, 8)}
    assert [call[1] for call in calls] == [step.u for step in tokred.report(pipe).steps]
    maps = tokred.report(pipe).token_map[:, 0, 0]
    assert (maps[1][ONES == 1] == 0).all() and (maps[3][ONES[::-1] == 1] == 0).all()


def test_8_bit_pictures_are_shares_of_white():
    pipe = tokred.patch(tiny.sd3(), method="toca", importance=Image.fromarray((ONES * 51).astype(np.uint8)))
    (found,) = driver(pipe).regions.importance
    assert torch.equal(found, torch.from_numpy(ONES) * 51 / 255)


def test_both():
    """Protected tokens first, whatever the others weigh."""
    mask = np.zeros((8, 8), dtype=bool)
    mask[-1] = True
    pipe = tokred.patch(
        tiny.sd3(), **CHOOSING["toca"] | dict(ratio=0.75), protect=mask, importance=ONES * 100, record="tokens"
    )
    for part in states(pipe):
        assert (part.reshape(8, 8)[-1] == 5).all() and (part == 0).sum() == 8


@pytest.mark.parametrize(
    "weights, text", [(np.full((2, 2), np.inf), "not finite"), ("high", "got str"), (np.ones((9, 9, 3)), "channels")]
)
def test_no_weights(weights, text):
    with pytest.raises(tokred.ConfigError, match=f"importance .*{text}"):
        tokred.patch(tiny.sd3(), method="toca", importance=weights)


def test_a_function_of_no_weights():
    pipe = tokred.patch(tiny.sd3(), method="tome", importance=lambda info, grid: None)
    with pytest.raises(tokred.ConfigError, match="importance is for 0 pictures"):
        run(pipe)

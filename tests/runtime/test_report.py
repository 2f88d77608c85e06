"""Which run `report` tells of."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import diffusion_tokred as tokred
from diffusion_tokred.testing import tiny


def test_the_last_finished_run() -> None:
    pipe = tokred.patch(tiny.sd(), method="tome")
    assert tokred.report(pipe) is None
    tiny.run(pipe, steps=3)
    found = tokred.report(pipe)
    assert found is not None and [s.index for s in found.steps] == [0, 1, 2]

    def broken(pipe, step, t, kwargs):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        tiny.run(pipe, steps=5, callback_on_step_end=broken)
    assert tokred.report(pipe) is found  # a run that was broken off is not the last finished one
    tokred.unpatch(pipe)
    assert tokred.report(pipe) is found

    assert json.loads(found.to_json())["steps"][1]["ratio"] == 0.5
    assert len(found.table().splitlines()) == 2 + 3
    assert found.tokens_saved == 0.5


@torch.no_grad()
def test_a_hand_written_loop_ends_with_its_last_step() -> None:
    pipe = tokred.patch(tiny.sd(), method="tome")
    scheduler = pipe.scheduler
    scheduler.set_timesteps(3)
    text, latents = torch.randn(1, 7, tiny.TEXT), torch.randn(1, 4, 16, 16)
    for i, t in enumerate(scheduler.timesteps):
        latents = scheduler.step(pipe.unet(latents, t, encoder_hidden_states=text).sample, t, latents).prev_sample
        assert (tokred.report(pipe) is not None) == (i == 2)
    found = tokred.report(pipe)
    assert found is not None and len(found.steps) == 3


def test_to_pandas(monkeypatch) -> None:
    pytest.importorskip("pandas")
    pipe = tokred.patch(tiny.sd(), method="tome", policy=[(0.8, 0.25), (0.5, 0.0)])
    tiny.run(pipe, steps=4)
    found = tokred.report(pipe)
    table = found.to_pandas()
    assert list(table["ratio"]) == [step.ratio for step in found.steps] and set(table["mode"]) == {"full", "reduce"}
    assert table["flops"].sum() == found.flops and list(table["u"]) == [step.u for step in found.steps]
    plan = tokred.explain(pipe, method="tome", num_inference_steps=4).to_pandas()
    assert list(plan["u"]) == pytest.approx(list(table["u"])) and set(plan["ratio"]) == {0.5}
    monkeypatch.setitem(sys.modules, "pandas", None)
    for export in (found.to_pandas, tokred.explain(pipe, method="tome", num_inference_steps=4).to_pandas):
        with pytest.raises(ImportError, match=r"to_pandas\(\) needs pandas: pip install 'diffusion-tokred\[eval\]'"):
            export()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"a plot needs matplotlib: pip install 'diffusion-tokred\[eval\]'"):
        found.plot()

"""Predicted times, worked out by hand from made-up devices."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import diffusion_tokred as tokred
from diffusion_tokred.backbones import backbone_of
from diffusion_tokred.errors import ConfigError
from diffusion_tokred.measure import roofline
from diffusion_tokred.measure.flops import Flops
from diffusion_tokred.measure.operations import Operation, operations
from diffusion_tokred.measure.roofline import Calibration, Table
from diffusion_tokred.runtime.work import Work
from diffusion_tokred.testing import tiny

FAST = 1e30  # so fast that it takes no time
N, M, d, T, C = 256, 64, 32, 7, 24  # tiny sd, level 0: tokens, a quarter of them, channels; text tokens, their channels


def device(flops: float = FAST, bandwidth: float = FAST, call: float = 0.0, **others: float) -> Calibration:
    """With the same speed at all sizes; `others`: of a kind of operation."""
    rates = dict.fromkeys(("linear", "conv", "attention", "match"), flops)
    rates |= dict.fromkeys(("norm", "gelu", "tanh"), bandwidth) | others
    tables = {kind: Table((1, 2), (1, 2), ((rate, rate), (rate, rate))) for kind, rate in rates.items()}
    return Calibration("made up", torch.__version__, "float32", 1, tables, bandwidth, call)


def test_between_the_points_of_a_table() -> None:
    table = Table((16, 256), (10, 1000), ((1e9, 4e9), (16e9, 64e9)))
    assert table.at(16, 1000) == pytest.approx(4e9) and table.at(256, 10) == pytest.approx(16e9)
    assert table.at(64, 10) == pytest.approx(4e9)  # half way, in logarithms
    assert table.at(64, 100) == pytest.approx(8e9)
    assert table.at(1, 10) == pytest.approx(1e9) and table.at(1e6, 1e6) == pytest.approx(64e9)  # as at the edge


def test_seconds_of_an_operation() -> None:
    made_up = device(linear=2e9, attention=5e8, bandwidth=1e8, call=1e-3, norm=2e7)
    assert made_up.seconds(Operation("linear", 4e9, 1e8, calls=3)) == pytest.approx(2 + 0.003)  # FLOPs take longer
    assert made_up.seconds(Operation("linear", 4e9, 3e8)) == pytest.approx(3 + 0.001)  # bytes do
    assert made_up.seconds(Operation("attention", 1e9, 0)) == pytest.approx(2 + 0.001)
    assert made_up.seconds(Operation("memory", 0, 1e7, calls=4)) == pytest.approx(0.1 + 0.004)
    assert made_up.seconds(Operation("norm", 0, 1e7)) == pytest.approx(0.5 + 0.001)


PLANS: list[tuple[str, dict[str, Any]]] = [
    ("sd", dict(method="tome", merge_ff=True, merge_cross_attn=True, num_inference_steps=3)),
    ("sdxl", dict(method="todo")),
    ("sd", dict(method="deepcache", num_inference_steps=8, min_steps=0, warmup=1)),
    ("sd3", dict(method="toca", num_inference_steps=6, min_steps=0, warmup=1, interval=3, batch_size=2)),
    ("pixart", dict(method="fora", num_inference_steps=6, min_steps=0, warmup=1)),
    ("flux", dict(method="tome", merge_ff=True)),
    ("dit", dict(method="ras", num_inference_steps=6, min_steps=0, warmup=1)),
]


@pytest.mark.parametrize("name, options", PLANS, ids=[f"{n}-{o['method']}" for n, o in PLANS])
def test_where_only_flops_take_time(name: str, options: dict[str, Any]) -> None:
    """At 1 GFLOP/s for all that has FLOPs, the seconds are the GFLOPs that `explain` counts."""
    pipe = tiny.BUILDERS[name]()
    found = tokred.explain(pipe, **options, time=device(flops=1e9))
    assert found.time is not None
    assert found.time.parts.keys() == found.flops.keys() - {"total"}
    for kind, seconds in found.time.parts.items():
        assert seconds == pytest.approx([n / 1e9 for n in found.flops[kind]], rel=1e-9, abs=1e-15)
    assert found.time.speedup == pytest.approx(found.flop_ratio)


def work_of(pipe: Any, works: dict[str, Work], batch: int = 1, itemsize: int = 4) -> dict[str, list[Operation]]:
    model = tiny.denoiser(pipe)
    backbone = backbone_of(model)
    layout = backbone.layout(model)
    grids = {level.index: grid for level, grid in zip(layout.levels, backbone.grids(model, 16, 16), strict=True)}
    flops = Flops(backbone, model, layout.sites, layout.pairs)
    return operations(flops, 16, 16, batch, T, grids, itemsize, works)


def moved(found: list[Operation], start: int, count: int) -> list[float]:
    return [operation.bytes for operation in found[start : start + count]]


@pytest.mark.parametrize("batch, itemsize", [(1, 4), (3, 2)])
def test_bytes_by_hand(batch: int, itemsize: int) -> None:
    """The first block of tiny sd: self-attention, cross-attention, and a GEGLU of 4d."""
    pipe = tiny.sd()
    context = tiny.denoiser(pipe).config.cross_attention_dim
    found = work_of(pipe, {}, batch, itemsize)
    two = (batch * 4 * N * d + 2 * d * d) * itemsize  # two layers of d x d: queries and output, or keys and values
    assert moved(found["attention"], 0, 4) == [
        two, two, batch * 4 * N * d * itemsize, batch * 6 * N * d * itemsize,
    ]  # fmt: skip
    # The four layers of cross-attention are not of one shape: a multiply-add is counted with their mean.
    ends = (4 * d + 2 * (context + d)) / (2 * d * d + 2 * context * d)
    queries, keys = 2 * d * d, 2 * context * d
    assert moved(found["cross_attention"], 0, 4) == pytest.approx([
        (batch * N * queries * ends + queries) * itemsize, (batch * T * keys * ends + keys) * itemsize,
        batch * (2 * N + 2 * T) * d * itemsize, batch * 6 * N * d * itemsize,
    ])  # fmt: skip
    weights = 12 * d * d
    assert moved(found["feed_forward"], 0, 3) == [
        (batch * 14 * N * d + weights) * itemsize, batch * 6 * N * d * itemsize, batch * 12 * N * d * itemsize,
    ]  # fmt: skip
    assert [operation.kind for operation in found["feed_forward"][:3]] == ["linear", "norm", "gelu"]
    assert work_of(tiny.sd3(), {})["feed_forward"][2].kind == "tanh"
    assert not found["method"]


def test_bytes_of_fewer_keys_and_tokens_by_hand() -> None:
    pipe = tiny.sd()
    name = next(site.name for site in backbone_of(pipe.unet).layout(pipe.unet).sites if site.kind == "attention")
    todo = work_of(pipe, {name: Work(N, M)})
    assert moved(todo["attention"], 0, 4) == [
        4 * (4 * N * d + 2 * d * d), 4 * (4 * M * d + 2 * d * d), 4 * 2 * (N + M) * d, 4 * 6 * N * d,
    ]  # fmt: skip
    assert todo["method"] == [Operation("memory", 0, 4 * 2 * M * d, calls=1)]
    pairs = 48 * 100
    tome = work_of(pipe, {name: Work(M, extra=pairs * d)})
    assert moved(tome["attention"], 0, 4) == [
        4 * (4 * M * d + 2 * d * d), 4 * (4 * M * d + 2 * d * d), 4 * 4 * M * d, 4 * 6 * N * d,  # norms are of all
    ]  # fmt: skip
    move, match = tome["method"]
    assert (move.bytes, move.calls) == (4 * 2 * (N + M) * d, 4)
    assert match == Operation("match", 2 * pairs * d, 0, (N, d))


def test_blocks_on_packed_tokens_move_what_they_compute() -> None:
    pipe = tiny.sd3()
    dense = tokred.explain(pipe, method="ras", time=device(bandwidth=1e9)).time
    options = dict(num_inference_steps=4, min_steps=0, warmup=1, interval=4)
    found = tokred.explain(pipe, method="ras", ratio=0.5, **options, time=device(bandwidth=1e9)).time
    assert dense is not None and found is not None
    assert found.dense == pytest.approx(4 * dense.dense)
    one, three = found.parts["feed_forward"][0] / 4, found.parts["feed_forward"][1] - found.parts["feed_forward"][0] / 4
    # 64 tokens of 32, and 8d: half of the rows move half of the bytes, but the weights stay.
    weights = 3 * 8 * d * d * 4 / 1e9
    assert three / 3 == pytest.approx((one - weights) / 2 + weights)


def test_operations_cost_a_start() -> None:
    found = tokred.explain(tiny.sd(), method="tome", time=device(call=1.0))
    assert found.time is not None
    blocks, merged = sum(site.kind == "attention" for site in found.sites), 3
    assert found.time.parts["attention"] == (blocks * (4 + 1 + 4),) * 2  # layers, attention, norm and residual
    assert found.time.parts["method"] == (0, merged * (4 + 1))


def test_it_says_when_it_cannot_pay() -> None:
    pipe = tiny.sd()
    slow_starts = tokred.explain(pipe, method="tome", time=device(call=1.0))
    assert slow_starts.time is not None and slow_starts.time.speedup < 1
    (told,) = (text for text in slow_starts.warnings if "made up" in text)
    assert "cannot pay on made up in float32" in told and f"{slow_starts.time.speedup:.3f}x" in told
    slow_attention = tokred.explain(pipe, method="tome", time=device(attention=1e6))
    assert slow_attention.time is not None and slow_attention.time.verdict is None
    assert not [text for text in slow_attention.warnings if "made up" in text]


def test_in_the_table_and_as_data() -> None:
    pipe, made_up = tiny.sd3(), device(flops=1e9)
    found = tokred.explain(pipe, method="tome", time=made_up)
    assert found.time is not None
    data = json.loads(json.dumps(found.to_dict()))
    assert data["time"]["dense"] == pytest.approx(found.time.dense)
    assert data["time"]["speedup"] == pytest.approx(found.time.dense / found.time.reduced)
    assert f"Predicted {found.time.speedup:.3f}x on made up" in found.table()
    plain = tokred.explain(pipe, method="tome")
    assert plain.time is None and plain.to_dict()["time"] is None and "redicted" not in plain.table()


# --- calibration ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOKRED_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_device_is_measured_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[torch.dtype] = []

    def calibrate(device: Any, dtype: torch.dtype) -> Calibration:
        measured.append(dtype)
        return _device(bandwidth=float(len(measured)))

    _device = device
    monkeypatch.setattr(roofline, "calibrate", calibrate)
    first = roofline.calibration()
    assert roofline.calibration() == first and len(measured) == 1
    assert roofline.calibration(dtype=torch.bfloat16).bandwidth == 2  # another dtype, another file
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert roofline.calibration().bandwidth == 3
    assert len(list(folder.iterdir())) == 3
    assert roofline.calibration(fresh=True).bandwidth == 4
    file = roofline.cache_file("cpu", torch.float32)
    for broken in ('{"_version": 0}', '{"_version"', "[]"):
        file.write_text(broken)
        before = len(measured)
        roofline.calibration()
        assert len(measured) == before + 1


def test_reading_a_calibration() -> None:
    made_up = device(flops=3.0)
    assert Calibration.from_dict(json.loads(json.dumps(made_up.to_dict()))) == made_up
    with pytest.raises(ConfigError, match="version 7 cannot be read"):
        Calibration.from_dict(made_up.to_dict() | {"_version": 7})
    with pytest.raises(ConfigError, match="not a calibration"):
        Calibration.from_dict({"_version": roofline.VERSION, "device": "x"})


@pytest.mark.parametrize("budget", [45.0, 0.0])
def test_measuring(budget: float, monkeypatch: pytest.MonkeyPatch) -> None:
    small = dict.fromkeys(roofline.GRIDS, ((16, 64), (8, 16)))
    monkeypatch.setattr(roofline, "GRIDS", small)
    monkeypatch.setattr(roofline, "LARGE", 2**12)
    if not budget:  # all but one point of each table are left out
        with pytest.raises(ConfigError, match="budget"):
            roofline.calibrate(budget=0.0)
        return
    found = roofline.calibrate(budget=budget)
    assert found.tables.keys() == small.keys() and found.threads == torch.get_num_threads()
    for kind, table in found.tables.items():
        assert (table.first, table.second) == small[kind]
        assert all(0 < rate < 1e15 for row in table.rates for rate in row)
    assert 1e6 < found.bandwidth < 1e15 and 0 < found.call < 1e-2 and math.isfinite(found.took)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["toy-dit", "toy-sd"])
def test_the_prediction_is_near_what_is_measured(name: str) -> None:
    """A dense step of the embedded pipelines, within a factor of 2. On a quiet machine only."""
    from diffusion_tokred.evaluation.models import defaults

    pipe, known = tokred.zoo.load(name), defaults(name)
    width, height = known["size"]
    found = tokred.explain(
        pipe, method="todo", height=height, width=width, text_tokens=known.get("text_tokens"), time=roofline.calibrate()
    )
    times: list[float] = []
    denoiser = tiny.denoiser(pipe)
    denoiser.register_forward_pre_hook(lambda *_: times.append(-time.perf_counter()))
    denoiser.register_forward_hook(lambda *_: times.append(times.pop() + time.perf_counter()))
    call = dict(num_inference_steps=8, guidance_scale=known["guidance"], height=height, width=width)
    pipe("a red circle", **call, **known.get("call", {}))
    assert found.time is not None
    assert 0.5 < found.time.dense / min(times) < 2

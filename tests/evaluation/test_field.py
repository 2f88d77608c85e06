"""The comparison of the field: times on a clock that the test moves, schedules against whole runs of tiny models."""

from __future__ import annotations

import contextlib
import io
import json
from typing import Any

import numpy as np
import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

import diffusion_tokred as tokred
from diffusion_tokred.errors import ConfigError, StateError, UnsupportedError
from diffusion_tokred.evaluation import comparison, step_kinds
from diffusion_tokred.evaluation.comparison import Settings, compare_field, field_plot
from diffusion_tokred.evaluation.field import Row, chosen_rows, default_rows, site_kinds
from diffusion_tokred.evaluation.shapes import shape, twin
from diffusion_tokred.evaluation.step_kinds import Bench, compose, count, dense_parts, measure
from diffusion_tokred.measure.shares import Parts
from diffusion_tokred.methods import CONFIGS
from scripts import benchmark

RUN = typer.Typer()
RUN.command()(benchmark.main)
CPU = torch.device("cpu")


def part(pipe: Any) -> str:
    return "unet" if hasattr(pipe, "unet") else "transformer"


@pytest.fixture(scope="module")
def benches() -> dict[str, Bench]:
    found = {}
    for name in ("tiny-sd15-64", "tiny-sd3-128"):
        where = shape(name)
        pipe = where.pipe
        dense = dense_parts(pipe, part(pipe), lambda p=pipe, w=where: p(num_inference_steps=1, **w.call), CPU)
        found[name] = Bench(pipe, where.call, part(pipe), 10, site_kinds(pipe), dense, CPU)
    return found


def test_every_method_has_a_row() -> None:
    for family in ("sd15", "sd3"):
        rows = [row for row in default_rows(family).values() if row.config is not None]
        assert {row.config.name for row in rows if row.config} == set(CONFIGS)


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("sd15-512", 859_520_964),
        ("sdxl-1024", 2_567_463_684),
        ("pixart-1024", 610_856_096),
        ("flux-1024", 11_901_408_320),
    ],
)
def test_real_widths(name: str, parameters: int) -> None:
    found = shape(name, device="meta", dtype=torch.bfloat16)
    assert sum(p.numel() for p in getattr(found.pipe, part(found.pipe)).parameters()) == parameters
    assert found.depth is None and torch.get_default_dtype() == torch.float32


def test_shapes_refuse_and_say() -> None:
    assert shape("tiny-flux-64").depth == "num_layers 2 of 19, num_single_layers 4 of 38"
    assert shape("tiny-sd3-64", guidance=True).rows == 2
    for wrong, said in (("sd9-512", "family of sd15"), ("sd15", "FAMILY-PIXELS"), ("sd15-500", "multiple of 64")):
        with pytest.raises(ConfigError, match=said):
            shape(wrong)


def test_twins_share_weights_and_nothing_else() -> None:
    pipe = shape("tiny-sd3-64").pipe
    other = twin(pipe, "transformer")
    for a, b in zip(pipe.transformer.parameters(), other.transformer.parameters(), strict=True):
        assert a is b
    tokred.patch(other, method="todo")
    assert "_tokred" not in vars(pipe.transformer) and other.scheduler is not pipe.scheduler


OURS = ("tome-reuse", "toca", "duca", "cat", "taylorseer", "firstblock")
THEIRS = {
    "tiny-sd3-128": ("diffusers-taylorseer", "diffusers-magcache", "cache-dit"), "tiny-sd15-64": ("peer-deepcache",)
}  # fmt: skip


@pytest.mark.parametrize("name", OURS)
def test_our_schedules_are_what_runs_do(benches: dict[str, Bench], name: str) -> None:
    bench = benches["tiny-sd3-128"]
    row = default_rows("sd3")[name].whole(10)
    planned = row.schedule(bench.kinds, 10)
    assert count(bench, row, 10, planned).kinds == planned  # a StateError if the modes were others
    assert len(set(planned)) > 1
    with pytest.raises(StateError, match="were planned as"):
        count(bench, row, 10, ["skip"] * 10)


@pytest.mark.parametrize(
    "text, clustered", [("cat:warmup=3,min_steps=0", {3}), ("clusca:interval=3,warmup=3", {3, 6, 9})]
)
def test_steps_that_cluster_are_told_apart(benches: dict[str, Bench], text: str, clustered: set[int]) -> None:
    """By their kernels: tens more than in the steps that go by the same clusters."""
    bench = benches["tiny-sd3-128"]
    (_, row) = chosen_rows("sd3", [text])
    found = count(bench, row, 12, row.schedule(bench.kinds, 12))
    assert {i for i, kind in enumerate(found.kinds) if kind.endswith(", plan")} == clustered
    kernels = {
        part.kernels: kind.endswith(", plan")
        for kind, part in zip(found.kinds, found.parts, strict=True)
        if kind != "full"
    }
    assert min(k for k, first in kernels.items() if first) > 50 + max(k for k, first in kernels.items() if not first)
    assert set(count(bench, *row.probe(bench.kinds, 12)).kinds) == set(found.kinds)


@pytest.mark.parametrize("where, name", [(where, name) for where, names in THEIRS.items() for name in names])
def test_their_schedules_are_what_runs_do(benches: dict[str, Bench], where: str, name: str) -> None:
    """By the FLOPs of each step."""
    pytest.importorskip({"cache-dit": "cache_dit", "peer-deepcache": "DeepCache"}.get(name, "diffusers"))
    bench = benches[where]
    row = default_rows(where.split("-")[1])[name]
    assert count(bench, row.whole(10), 10, None).kinds == row.schedule(bench.kinds, 10)
    probe, steps, names = row.probe(bench.kinds, 10)
    assert set(count(bench, probe, steps, names).kinds) == {"full", "kept"}


def test_the_todo_of_the_definition_is_ours(benches: dict[str, Bench]) -> None:
    bench, rows, found = benches["tiny-sd15-64"], default_rows("sd15"), []
    for name in ("todo", "todo-definition", "unpatched"):
        pipe = twin(bench.pipe, "unet")
        with rows[name].applied(pipe):
            draws = torch.Generator().manual_seed(0)
            found.append(pipe(num_inference_steps=2, generator=draws, **bench.call)[0])
    assert torch.allclose(found[0], found[1], atol=1e-5) and not torch.allclose(found[0], found[2], atol=1e-4)


def test_flops_agree_with_the_counted_ones(benches: dict[str, Bench]) -> None:
    """A method's own count, matching left out, and torch's: of a step without anything of its own to do."""
    bench = benches["tiny-sd3-128"]
    row, steps, names = default_rows("sd3")["todo"].probe(bench.kinds, 10)
    found = count(bench, row, steps, names)
    assert found.parts[1].flops / bench.dense.flops == pytest.approx(found.flops[1], rel=0.01)
    assert found.kept == [0.25, 0.25]


class Clock:
    def __init__(self) -> None:
        self.now, self.log = 0.0, ""

    def perf_counter(self) -> float:
        return self.now


class Model(nn.Module):
    """Takes 2 seconds a call; as `costs` say where these are given, a step at a time."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.layer, self.costs, self.clock = nn.Linear(1, 1), None, clock

    def __deepcopy__(self, memo: Any) -> Model:
        return Model(self.clock)

    def forward(self, step: int) -> None:
        self.clock.log += "a" if self.costs is None else "b"
        self.clock.now += 2 if self.costs is None else self.costs[step]


class Scheduler:
    config: dict[str, Any] = {}

    @classmethod
    def from_config(cls, config: Any) -> Scheduler:
        return cls()


class Pipe:
    def __init__(self, clock: Clock) -> None:
        self.unet, self.scheduler = Model(clock), Scheduler()

    def __call__(self, num_inference_steps: int, **more: Any) -> None:
        self.unet.clock.now += 10  # encoders and decoder
        for step in range(num_inference_steps):
            self.unet(step)


class Fake(Row):
    def schedule(self, kinds: Any, steps: int) -> list[str]:
        return ["full" if i % 4 == 0 else "reuse" for i in range(steps)]

    def probe(self, kinds: Any, steps: int) -> Any:
        return self, 2, ["full", "reuse"]

    @contextlib.contextmanager
    def applied(self, pipe: Any) -> Any:
        pipe.unet.costs = [3.0, *[0.5] * 3] * 5
        yield pipe


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> tuple[Clock, Bench]:
    clock = Clock()
    monkeypatch.setattr(step_kinds, "time", clock)
    parts = {"full": Parts({}, {"": 4.0, "x": 12.0}, 30, 100), "reuse": Parts({}, {"": 4.0, "x": 3.0}, 10, 20)}

    def counted(bench: Any, row: Any, steps: int, names: Any) -> step_kinds.Probed:
        names = names or row.schedule((), steps)
        shares = [1.0 if name == "full" else 0.2 for name in names]
        return step_kinds.Probed(names, [parts[n] for n in names], shares, [1.0 if s == 1 else 0.0 for s in shares])

    monkeypatch.setattr(step_kinds, "count", counted)
    dense = Parts({"": 0.5, "x": 1.5}, {"": 4.0, "x": 12.0}, 30, 100)
    return clock, Bench(Pipe(clock), {}, "unet", 20, (), dense, CPU)


def test_rounds_and_what_they_come_to(faked: tuple[Clock, Bench]) -> None:
    clock, bench = faked
    found = measure(bench, Fake("fake"), rounds=3)
    assert clock.log == "bb" * 2 + "aa" * 2 + ("aa" + "bb" + "bb" + "aa") * 3  # compiling, warm-up, then ABBA
    assert found["schedule"] == {"full": 5, "reuse": 15}
    assert found["ratio"]["median"] == pytest.approx(20 * 2 / (5 * 3 + 15 * 0.5))
    assert found["flop_ratio"] == pytest.approx(20 / (5 + 15 * 0.2))
    best = 20 / (5 + 15 * (0.5 + 1.5 / 4) / 2)  # the part "x" shrinks to a quarter
    assert found["ideal"] == pytest.approx(best)
    assert found["phi"] == pytest.approx((40 / 22.5 - 1) / (best - 1))
    assert found["cached_step"]["median"] == 0.25 and found["kinds"]["full"]["cost"]["median"] == 1.5
    assert found["kernels_per_step"] == (5 * 30 + 15 * 10) / 20
    assert found["noise"]["median"] == 1 and found["kept"] == 0.0
    assert found["why_null"]["graphs"] == "not compiled"


def test_long_steps_of_the_unpatched_model_are_timed_once(
    faked: tuple[Clock, Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, bench = faked
    monkeypatch.setattr(step_kinds, "LONG", 1.0)
    found = measure(bench, Fake("fake"), rounds=3)
    assert clock.log == "bb" * 2 + "aa" * 2 + ("a" + "bb" + "bb" + "a") * 3
    assert found["ratio"]["median"] == pytest.approx(20 * 2 / (5 * 3 + 15 * 0.5))


def test_whole_runs_are_held_against_what_is_composed(faked: tuple[Clock, Bench]) -> None:
    _, bench = faked
    found = measure(bench, Fake("fake", config=default_rows("sd3")["tome"].config), rounds=2, whole=2)["whole"]
    assert found["measured"]["median"] == pytest.approx((10 + 40) / (10 + 22.5)) == found["composed"]
    assert found["difference"] == pytest.approx(0)


def test_compose_takes_ratios_within_a_round() -> None:
    kinds = {"full": dict(ideal=1.0, flop_share=1.0, kernels=1), "reuse": dict(ideal=4.0, flop_share=0.1, kernels=1)}
    slow = np.array([1.0, 3.0, 9.0])  # the machine slows down from round to round
    plain = (2 * slow, 4 * slow)
    found = compose(kinds, {"full": 1, "reuse": 3}, 4, {"full": 3 * slow, "reuse": slow}, plain)  # type: ignore[arg-type]
    assert found["ratio"] == dict(median=2.0, low=2.0, high=2.0, n=3)
    assert found["ideal"] == 4 / (1 + 3 / 4) and found["phi"] == pytest.approx((2 - 1) / (16 / 7 - 1))
    with pytest.raises(StateError, match="no step of kind forecast"):
        compose(kinds, {"forecast": 4}, 4, {"full": slow}, plain)  # type: ignore[arg-type]


ROWS = ("tome", "deepcache")


def test_rows_are_written_when_done_and_not_measured_again(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file, written = tmp_path / "a.json", []
    settings = Settings(steps=10, rounds=1)
    measured: list[str] = []

    def watched(bench: Any, row: Row, *args: Any) -> dict[str, Any]:
        measured.append(row.name)
        return measure(bench, row, *args)

    monkeypatch.setattr(comparison, "measure", watched)

    def look(row: Any) -> None:
        written.append(len(json.loads(file.read_text())["rows"]))

    data = compare_field(["tiny-sd3-64"], ROWS, settings, out=file, done=look)
    assert written == [1, 2, 3] and measured == ["unpatched", *ROWS]
    assert data["schema"] == "tokred.result/1" and data["asked"]["machine"] == data["env"]["device"]
    plain, tome, deepcache = data["rows"]
    assert plain["ratio"]["n"] == 1 and plain["flop_ratio"] == 1 and plain["kinds"].keys() == {"full"}
    assert tome["kept"] == 0.5 and tome["flop_ratio"] > 1 and tome["kernels_per_step"] > plain["kernels_per_step"]
    assert tome["model"]["reduced_depth"] == "num_layers 2 of 24" and tome["model"]["weights"] == "random"
    assert "deepcache acts on deep" in deepcache["error"]
    assert comparison.cells(deepcache) == ("deepcache", deepcache["error"])
    assert len(comparison.cells(tome)) == len(comparison.HEAD)
    again = compare_field(["tiny-sd3-64"], [*ROWS, "todo:factor=4"], settings, out=file)
    assert measured[3:] == ["deepcache", "todo:factor=4"]  # what did not run is tried again
    assert again["rows"][:2] == [plain, tome] and len(again["rows"]) == 4
    with pytest.raises(ConfigError, match="made otherwise: rounds 1, and now 2"):
        compare_field(["tiny-sd3-64"], ROWS, Settings(steps=10, rounds=2), out=file)
    picture = io.BytesIO()
    field_plot(comparison.read(file), picture)
    assert picture.getvalue().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="no row has run"):
        field_plot(data | {"rows": [deepcache]}, picture)


@pytest.mark.slow
def test_compiled_graphs_are_counted(benches: dict[str, Bench]) -> None:
    from dataclasses import replace

    torch._dynamo.reset()
    bench = replace(benches["tiny-sd3-128"], backend="eager")
    found = measure(bench, default_rows("sd3")["todo"], rounds=1)
    torch._dynamo.reset()
    assert (found["graphs"], found["graph_breaks"]) == (1, 0)
    assert "graphs" not in found["why_null"]


def test_refusals(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="no method 'nothing'"):
        chosen_rows("sd3", ["nothing"])
    with pytest.raises(ConfigError, match="a mode is eager or compiled"):
        Settings(modes=("fast",))
    with pytest.raises(ConfigError, match="toy-dit, toy-sd"):
        compare_field([], ["tome"], pipelines=["toy-cat"])
    other = tmp_path / "b.json"
    other.write_text("{}")
    with pytest.raises(ConfigError, match="no result"):
        comparison.read(other)
    with (
        pytest.raises(UnsupportedError, match="attn1"),
        default_rows("sd3")["todo-definition"].applied(shape("tiny-sd3-64").pipe),
    ):
        pass


def test_the_command(tmp_path: Any) -> None:
    file = tmp_path / "new" / "a.json"
    told = CliRunner().invoke(
        RUN, ["--shape", "tiny-sd3-64", "--rows", "todo", "--rows", "deepcache", "--rounds", "1", "--out", str(file)]
    )
    assert told.exit_code == 0, told.output
    assert "tiny-sd3-64, eager" in told.output and "deepcache does not run" in told.output
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    shown = CliRunner().invoke(RUN, ["--show", str(file)])
    assert shown.exit_code == 0 and "1 reduce, plan + 19 reduce" in shown.output
    wrong = CliRunner().invoke(RUN, ["--shape", "sd9-512", "--dtype", "int8"])
    assert isinstance(wrong.exception, ConfigError) and "dtype" in str(wrong.exception)


@pytest.mark.slow
def test_whole_runs_of_an_embedded_pipeline() -> None:
    """How near what is composed is to what is measured is for a quiet machine to say; here, that both are there."""
    settings = Settings(steps=10, rounds=1, whole=1)
    plain, row = compare_field([], ["taylorseer"], settings, pipelines=["toy-dit"])["rows"]
    assert plain["model"]["weights"] == "trained" and plain["model"]["rows_a_call"] == 2 and "whole" not in plain
    whole = row["whole"]
    assert whole["schedule"] == row["schedule"] and set(row["schedule"]) == {"full", "forecast"}
    assert whole["measured"]["n"] == 1 and whole["composed"] > 1
    assert whole["difference"] == pytest.approx(whole["composed"] / whole["measured"]["median"] - 1)

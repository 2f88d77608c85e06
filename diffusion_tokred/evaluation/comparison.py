"""The comparison of the field: rows on shapes, written to a file as they are done, shown as a table and a plot."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, StateError, UnsupportedError
from ..extras import need
from ..zoo.scenes import evaluation_prompts
from . import layout
from .field import UNPATCHED, Row, chosen_rows, site_kinds
from .field_quality import Pictures
from .models import load_model
from .plots import LIGHT, Theme
from .results import environment, plain, result, to_json, version, write_text
from .shapes import Shape, shape
from .step_kinds import Bench, dense_parts, measure

KIND = "field"
EMBEDDED = {
    "toy-dit": dict(guidance_scale=3.0, max_sequence_length=20, height=128, width=128),
    "toy-sd": dict(guidance_scale=3.0, height=128, width=128),
}
PROMPT = "a big red circle above a small blue square on a plain gray background"
PEERS = ("tomesd", "DeepCache", "cache-dit")  # packages whose versions matter

Progress = Callable[[str, float], None]  # what is being done, and the share of it that is done
Done = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Settings:
    """How it is measured.

    Attributes:
        steps: of the run that is composed.
        rounds: of each row; at least 10 give an interval worth the name.
        whole: rounds in which whole runs are timed as well.
        pictures: that embedded pipelines draw with each row, to compare them with the unpatched ones.
        modes: "eager", "compiled".
        dtype, device, depth, guidance: see `shapes.shape`.
        backend: of `torch.compile`.
        keeps_memory: whether freed memory stays with the process (`measure.machine.keep_freed_memory`, which the caller
            has called): times of a CPU's small models depend on it.
    """

    steps: int = 20
    rounds: int = 10
    whole: int = 0
    pictures: int = 0
    modes: Sequence[str] = ("eager",)
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    depth: int | None = None
    guidance: bool = False
    backend: str = "inductor"
    keeps_memory: bool = False

    def __post_init__(self) -> None:
        if self.steps < 2 or self.rounds < 1:
            raise ConfigError(f"a comparison needs 2 steps and a round, got {self.steps} and {self.rounds}")
        if min(self.whole, self.pictures) < 0:
            raise ConfigError(f"whole runs and pictures are 0 or more, got {self.whole} and {self.pictures}")
        if wrong := [mode for mode in self.modes if mode not in ("eager", "compiled")]:
            raise ConfigError(f"a mode is eager or compiled, got {wrong[0]!r}")

    def to_dict(self) -> dict[str, Any]:
        """What all rows of a file have in common."""
        return plain(
            dict(
                steps=self.steps, rounds=self.rounds, whole=self.whole, pictures=self.pictures,
                dtype=str(self.dtype).removeprefix("torch."),
                device=self.device, depth=self.depth, guidance=self.guidance, backend=self.backend,
                keeps_memory=self.keeps_memory,
                threads=torch.get_num_threads(), machine=environment(self.device)["device"],
                versions={name: version(name) for name in ("diffusion-tokred", "torch", "diffusers", *PEERS)},
            )
        )  # fmt: skip


class Notebook:
    """The result file, written whole after each row; the same call again goes on from there.

    Raises:
        ConfigError: the file has another comparison's rows.
    """

    def __init__(self, path: str | Path | None, settings: Settings) -> None:
        self.path, self.asked = None if path is None else Path(path), settings.to_dict()
        self.env = environment(settings.device)
        self.rows: list[dict[str, Any]] = []
        if self.path is not None and self.path.exists():
            data = read(self.path)
            if differ := [key for key, value in self.asked.items() if data["asked"].get(key) != value]:
                raise ConfigError(
                    f"{self.path} was made otherwise: {differ[0]} {data['asked'].get(differ[0])!r}, and now "
                    f"{self.asked[differ[0]]!r}; give another file, or the same settings"
                )
            self.rows, self.env = data["rows"], data["env"]

    def done(self, shape: str, mode: str, row: Row) -> dict[str, Any] | None:
        """A row that was measured before. One that did not run is tried again."""
        for found in self.rows:
            if found.get("error") is None and _key(found) == (shape, mode, row.name):
                return found if found["config"] == plain(row.to_dict())["config"] else None
        return None

    def add(self, row: Mapping[str, Any]) -> None:
        """Write a row, in the place of an older one."""
        self.rows = [old for old in self.rows if _key(old) != _key(row)] + [plain(row)]
        if self.path is not None:
            write_text(self.path, to_json(self.result()))

    def result(self) -> dict[str, Any]:
        """A `tokred.result/1` of kind "field"."""
        models = {row["shape"]: row["model"] for row in self.rows}
        intervals = {" ".join(_key(row)): row["ratio"] for row in self.rows if row.get("error") is None}
        parts: dict[str, Any] = dict(env=self.env, pipeline=models, reduction=None, prompts=None, rows=self.rows)
        return result(KIND, **parts, intervals=intervals) | {"asked": self.asked}


def compare_field(
    shapes: Sequence[str],
    rows: Sequence[str] = (),
    settings: Settings | None = None,
    *,
    pipelines: Sequence[str] = (),
    out: str | Path | None = None,
    progress: Progress | None = None,
    done: Done | None = None,
) -> dict[str, Any]:
    """Measure rows on shapes and embedded pipelines, eager and compiled. Nothing else may run meanwhile.

    Args:
        shapes: as "sd15-512", see `shapes.shape`. `pipelines`: "toy-dit", "toy-sd".
        rows: names of `field.default_rows`, or variants as they are typed; all by default.
        out: a JSON file; rows that are in it are not measured again.
        done: called with each row when it is done.

    Returns:
        A `tokred.result/1` of kind "field"; a row that does not run has its `error`.

    Raises:
        ConfigError: an unknown shape or row; a file of another comparison.
    """
    settings, tell = settings or Settings(), progress or (lambda what, share: None)
    for name in [*shapes, *pipelines]:
        chosen_rows(_family(name), rows)  # refuse before anything is measured
    if unknown := [name for name in pipelines if name not in EMBEDDED]:
        raise ConfigError(f"no embedded pipeline {unknown[0]!r}: there is {', '.join(EMBEDDED)}")
    notes = Notebook(out, settings)
    for name in [*shapes, *pipelines]:
        where: Shape | None = None
        for mode in settings.modes:
            bench: Bench | None = None
            pictures: Pictures | None = None
            for row in chosen_rows(_family(name), rows):
                found = notes.done(name, mode, row)
                if found is None or "quality_error" in found:
                    where = where or (_embedded(name, settings) if name in EMBEDDED else _real(name, settings))
                    if bench is None:
                        tell(f"{name}, {mode}: profiling the unpatched model", 0.0)
                        bench = _bench(where, settings, mode)
                        if name in EMBEDDED and settings.pictures:
                            prompts = evaluation_prompts(settings.pictures)
                            pictures = Pictures(where.pipe, bench.part, where.call, settings.steps, prompts)
                    told = partial(_tell, tell, f"{name}, {mode}, {row.name}")
                    if found is None:
                        found = {"shape": name, "mode": mode, "model": _model(where)}
                        found |= _measured(bench, row, settings, told)
                    if found["error"] is None:
                        found = _drawn(found, row, pictures, told)
                    notes.add(found)
                if done is not None:
                    done(found)
    return notes.result()


def _measured(bench: Bench, row: Row, settings: Settings, tell: Progress) -> dict[str, Any]:
    """The row's times; or what it says where it does not run."""
    try:
        return {"error": None} | measure(bench, row, settings.rounds, settings.whole, tell)
    except (ConfigError, UnsupportedError, StateError) as error:
        return row.to_dict() | {"error": str(error)}
    except Exception as error:  # another library's, or the compiler's: the other rows go on
        return row.to_dict() | {"error": _said(error)}


def _drawn(found: Mapping[str, Any], row: Row, pictures: Pictures | None, tell: Progress) -> dict[str, Any]:
    """The row with the quality of its pictures; if drawing fails, with why: its times hold."""
    found = {key: value for key, value in found.items() if key != "quality_error"}
    if pictures is None or row.name == UNPATCHED:
        why = "unpatched" if pictures else "random weights, or no pictures asked for"
        return found | {"quality": None, "why_null": found["why_null"] | {"quality": why}}
    tell("drawing", 1.0)
    try:
        quality = pictures.quality(row)
    except Exception as error:  # another library's, or the disk's: drawn again by the same command
        why = _said(error)
        return found | {"quality": None, "quality_error": why, "why_null": found["why_null"] | {"quality": why}}
    return found | {"quality": quality, "why_null": {k: v for k, v in found["why_null"].items() if k != "quality"}}


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def _tell(tell: Progress, where: str, what: str, share: float) -> None:
    tell(f"{where}: {what}", share)


def _family(name: str) -> str:
    return {"toy-dit": "sd3", "toy-sd": "sd15"}.get(name) or name.removeprefix("tiny-").partition("-")[0]


def _real(name: str, settings: Settings) -> Shape:
    s = settings
    return shape(name, depth=s.depth, dtype=s.dtype, device=s.device, guidance=s.guidance)


def _embedded(name: str, settings: Settings) -> Shape:
    """An embedded pipeline, as it was trained: whole pictures with guidance."""
    pipe: Any = load_model(name, settings.dtype, settings.device)
    pipe.set_progress_bar_config(disable=True)
    return Shape(name, pipe, dict(prompt=PROMPT, **EMBEDDED[name]), None, 2)


def _bench(where: Shape, settings: Settings, mode: str) -> Bench:
    pipe, part, device = (
        where.pipe,
        "unet" if hasattr(where.pipe, "unet") else "transformer",
        torch.device(settings.device),
    )

    def one_step() -> None:
        pipe(num_inference_steps=1, generator=torch.Generator().manual_seed(0), **where.call)

    return Bench(
        pipe, where.call, part, settings.steps, site_kinds(pipe), dense_parts(pipe, part, one_step, device), device,
        settings.backend if mode == "compiled" else None,
    )  # fmt: skip


def _model(where: Shape) -> dict[str, Any]:
    model: Any = getattr(where.pipe, "unet", None) or where.pipe.transformer
    return {
        "class": type(model).__name__,
        "weights": "trained" if where.name in EMBEDDED else "random",
        "parameters": sum(p.numel() for p in model.parameters()),
        "reduced_depth": where.depth,
        "rows_a_call": where.rows,
    }


def _key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["shape"], row["mode"], row["name"]


def read(path: str | Path) -> dict[str, Any]:
    """A result file of a comparison.

    Raises:
        ConfigError: it is none.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read, give one that --out has written or a new name: {error}") from None
    if not isinstance(data, dict) or data.get("kind") != KIND or "asked" not in data:
        raise ConfigError(f"{path} is no result of scripts/benchmark.py")
    return data


HEAD = ("row", "kept", "steps", "FLOP ratio", "time ratio", "S*", "φ", "step between", "kernels", "graphs", "peak GB",
        "PSNR")  # fmt: skip


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the table, under `HEAD`. A row that does not run has its error in the second cell alone."""
    if row["error"] is not None:
        return row["name"], row["error"]
    ratio, between = row["ratio"], row["cached_step"]
    steps = " + ".join(f"{n} {kind}" for kind, n in row["schedule"].items())
    return (
        row["name"],
        _number(row["kept"], ".0%"),
        steps + (" (given)" if row["schedule_given"] else ""),
        _number(row["flop_ratio"], ".2f"),
        f"{ratio['median']:.2f}x ({ratio['low']:.2f}-{ratio['high']:.2f})",
        _number(row["ideal"], ".2f"),
        _number(row["phi"], ".2f"),
        "-" if between is None else f"{between['median']:.3f}",
        _number(row["kernels_per_step"], ".0f"),
        "-" if row["graphs"] is None else f"{row['graphs']} ({row['graph_breaks']} breaks)",
        "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}",
        "-" if not row.get("quality") else layout.figure(row["quality"]["psnr"]),
    )


def groups(data: Mapping[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The rows of each shape and mode, with a title."""
    for key in dict.fromkeys((row["shape"], row["mode"]) for row in data["rows"]):
        rows = [row for row in data["rows"] if (row["shape"], row["mode"]) == key]
        model = rows[0]["model"]
        less = f", {model['reduced_depth']}" if model["reduced_depth"] else ""
        yield f"{key[0]}, {key[1]}{less}: {data['asked']['dtype']}, batch {model['rows_a_call']}", rows


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def field_plot(data: Mapping[str, Any], path: str | os.PathLike[str] | io.BytesIO, theme: Theme = LIGHT) -> None:
    """Draw each row's measured ratio with its interval, beside S* and the FLOP ratio, a panel a shape and mode, as PNG.

    Raises:
        ConfigError: no row has run.
        ImportError: matplotlib is not installed (it comes with the `eval` extra).
    """
    panels = [(title, found) for title, rows in groups(data) if (found := [r for r in rows if r["error"] is None])]
    if not panels:
        raise ConfigError("no row has run: there is nothing to draw")
    tallest = max(len(rows) for _, rows in panels)
    figure = need("matplotlib.figure", "eval", "a plot").Figure(
        figsize=(6.2 * len(panels), 2.0 + 0.28 * tallest), layout="constrained", facecolor=theme.paper
    )
    for axes, (title, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        rows = rows[::-1]
        places = range(len(rows))
        middle = [row["ratio"]["median"] for row in rows]
        spread = [[m - row["ratio"]["low"] for m, row in zip(middle, rows, strict=True)],
                  [row["ratio"]["high"] - m for m, row in zip(middle, rows, strict=True)]]  # fmt: skip
        axes.barh(
            places, middle, xerr=spread, color=theme.methods[0], ecolor=theme.ink, height=0.62, label="time, measured"
        )
        axes.scatter([row["ideal"] for row in rows], places, marker="|", s=160, color=theme.ink, zorder=3,
                     label="S*: if choosing and copying were free")  # fmt: skip
        axes.scatter([row["flop_ratio"] for row in rows], places, marker="o", s=22, facecolor="none",
                     edgecolor=theme.methods[1], zorder=3, label="FLOPs (not a speed-up)")  # fmt: skip
        axes.axvline(1, color=theme.soft, linewidth=0.8)
        axes.set_yticks(places, [row["name"] for row in rows], color=theme.ink)
        axes.set_title(title, fontsize=9, color=theme.ink)
        axes.set_xlabel(f"unpatched / row, {data['asked']['steps']} steps", color=theme.ink)
        axes.set_facecolor(theme.paper)
        axes.tick_params(colors=theme.ink)
    handles, texts = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, texts, fontsize=8, loc="outside lower center", ncols=3 if len(panels) > 1 else 2, frameon=False
    )
    figure.suptitle(data["asked"]["machine"], fontsize=9, color=theme.soft)
    if isinstance(path, io.BytesIO):
        figure.savefig(path, format="png", dpi=130)
        return
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.write_bytes(buffer.getvalue())
    os.replace(temporary, target)

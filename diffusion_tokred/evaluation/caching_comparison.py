"""The caching comparison: our methods and other libraries' caches at one measured speed, on the same prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..schedule.intervals import fixed_full_steps
from . import launch, statistics
from .equal_speed import (
    TOLERANCE,
    Contender,
    Found,
    Notebook,
    Stopwatch,
    Timer,
    asked_of,
    search,
    timing_result,
)
from .evaluate import write_report
from .generation import generate
from .judges import Judges
from .layout import NONE, Table, escaped, figure, label, markdown_table, number
from .measuring import measure, read_items
from .peers import PEERS
from .prompts import PromptSet
from .results import plain, to_json, write_text
from .variants import UNPATCHED, Variant, parse_variant

Progress = Callable[[str, float, str], None]  # what is done, the share of it that is done, more words


def contenders(steps: int) -> dict[str, Contender]:
    """All that is compared, by name, for runs of so many steps: base options, and what their speed is set by.

    Where the speed is set by whole steps, each number of full steps is taken once: with the shortest interval that
    gives it, and of these with the longest warm-up.
    """

    def ours(name: str, *rows: Iterable[str], like: Sequence[str] = ()) -> Contender:
        return Contender(name, tuple(map(tuple, rows)), like=tuple(like))

    def theirs(name: str, *rows: Iterable[str]) -> Contender:
        return Contender(name, tuple(map(tuple, rows)), peer=True)

    def by_ratio(template: str, most: float = 0.99) -> tuple[str, ...]:
        return tuple(f"{template},ratio={i / 100:g}" for i in range(2, round(100 * most) + 1))

    def by_threshold(template: str) -> tuple[str, ...]:
        return tuple(f"{template}threshold={0.004 * 1.1**i:.3g}" for i in range(72))  # to 3.5

    def by_steps(template: str, full: Callable[[int, int, int], int] = full_steps) -> tuple[str, ...]:
        best: dict[int, str] = {}
        for interval in range(2, max(steps, 3)):
            for warmup in range(steps - 1, 0, -1):
                best.setdefault(full(steps, interval, warmup), f"{template}interval={interval},warmup={warmup}")
        return tuple(best[count] for count in sorted(best, reverse=True))

    alone = tuple(f"peer-deepcache:interval={interval}" for interval in range(2, max(steps, 3)))
    gates = tuple(f"peer-tgate:gate={gate}" for gate in range(steps - 1, 0, -1))
    every = [
        ours("toca", *(by_ratio(f"toca:interval={i}") for i in (2, 3, 4, 5, 6))),
        ours("duca", *(by_ratio(f"duca:interval={i}") for i in (3, 4, 5, 6))),
        ours("ras", by_ratio("ras:interval=8,warmup=4"), by_ratio("ras:interval=10,warmup=2")),
        ours("cat", *(by_ratio(f"cat:warmup={w}") for w in (8, 6, 4))),
        ours("fora", by_steps("fora:")),
        ours("taylorseer", by_steps("taylorseer:"), like=("diffusers-taylorseer", "diffusers-taylorseer-lite")),
        ours("clusca", by_steps("clusca:")),
        ours("deepcache", by_steps("deepcache:"), like=("peer-deepcache",)),
        ours("deepcache-forecast", by_steps("deepcache:order=1,")),
        ours(
            "firstblock", *(by_threshold(f"firstblock:warmup={w},") for w in (3, 2, 4, 1)),
            like=("diffusers-firstblock", "cache-dit"),
        ),
        ours("tome", by_ratio("tome:merge_ff", 0.75), by_ratio("tome:levels=0,1,2,merge_ff", 0.75), like=("tomesd",)),
        ours("todo", (f"todo:factor={i}" for i in range(2, 9)), (f"todo:levels=0,1,factor={i}" for i in range(2, 9))),
        ours("random-keep", by_ratio("random-keep:feed_forward"), by_ratio("random-keep:levels=0,1,2,feed_forward")),
        theirs("diffusers-firstblock", by_threshold("diffusers-firstblock:")),
        theirs(
            "diffusers-taylorseer",
            by_steps("diffusers-taylorseer:what=modules,dtype=float32,", full_steps_of_diffusers),
        ),
        theirs(
            "diffusers-taylorseer-lite",
            by_steps("diffusers-taylorseer:what=lite,dtype=float32,", full_steps_of_diffusers),
        ),
        theirs("cache-dit", *(by_threshold(f"cache-dit:fn=1,warmup={w},") for w in (4, 3, 2, 1))),
        theirs(
            "cache-dit-taylor",
            *(by_threshold(f"cache-dit:fn=1,warmup={w},taylor=1,no_taylor_text,") for w in (4, 3, 2)),
        ),
        theirs("peer-deepcache", alone),
        theirs("peer-tgate", gates, (f"{text},interval=1" for text in gates)),
        theirs("tomesd", by_ratio("tomesd:merge_mlp", 0.75), by_ratio("tomesd:max_downsample=4,merge_mlp", 0.75)),
        Contender("steps", (tuple(f"steps:{count}" for count in range(steps - 1, 0, -1)),)),
    ]  # fmt: skip
    return {contender.name: contender for contender in every}


def full_steps(steps: int, interval: int, warmup: int) -> int:
    """How many steps our methods compute in full."""
    return len(fixed_full_steps(steps, interval, warmup))


def full_steps_of_diffusers(steps: int, interval: int, warmup: int) -> int:
    """How many diffusers' TaylorSeer does."""
    return sum(index < warmup or (index - warmup - 1) % interval == 0 for index in range(steps))


def compare_caching(
    pipe: Any,
    prompts: PromptSet,
    out: str | Path,
    chosen: Sequence[Contender],
    *,
    steps: int,
    speed: float = 2.0,
    tolerance: float = TOLERANCE,
    call: Mapping[str, Any] | None = None,
    model: str | None = None,
    threads: int = 1,
    rounds: tuple[int, int] = (3, 10),
    judges: Judges | None = None,
    processes: launch.Processes | None = None,
    timer: Timer | None = None,
    pace: Callable[[int, int], str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Find each contender's setting of that speed, time these together, draw the prompts, measure, write the report.

    Args:
        pipe: without a patch; left without one.
        prompts, model, processes, pace: as in `evaluate.evaluate`.
        out: the folder; the same call again goes on there. `search.json` keeps each measured speed: delete it if the
            code of a method has changed since.
        chosen: of `contenders(steps)`, or others.
        steps: `num_inference_steps` of the run.
        speed: how many times as fast as the unpatched pipeline.
        tolerance: share by which a speed may be off.
        call: more keyword arguments of the pipeline.
        threads: of the CPU, for timing and for drawing.
        rounds: timed rounds to look for a speed, and to be sure of it.
        timer: what times variants; by default `equal_speed.Stopwatch`.
        progress: called now and then.

    Returns:
        What is in `comparison.json`. `comparison.md` has the table; `run/` is the folder of an evaluation, with
        pictures, `result.json`, `report.md`, `report.html` and `plot.png`.

    Raises:
        ConfigError: nothing to compare, or as `generate` and `measure`.
    """
    if not chosen or speed <= 1 or min(rounds) < 1:
        raise ConfigError(f"nothing to compare: {len(chosen)} contenders, speed {speed:g}, rounds {rounds}")
    out, tell = Path(out), progress or (lambda what, share, words: None)
    judges, processes = judges or Judges.find(), processes or launch.start(pipe._execution_device)
    call = dict(call or {}) | {"num_inference_steps": steps}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:

        def first() -> tuple[list[Variant], dict[str, Found]]:
            judges.load()
            clock = timer or Stopwatch(pipe, prompts.texts[: rounds[1]], call)
            asked = asked_of(pipe, prompts.texts[: rounds[1]], call, sorted({p.package for p in PEERS.values()}))
            found = _search(chosen, Notebook(out / "search.json", asked), clock, steps, speed, tolerance, rounds, tell)
            texts = dict.fromkeys(one.text for one in found.values() if one.usable and one.text)
            variants = [Variant(UNPATCHED), *(parse_variant(text, steps) for text in texts)]
            if len(variants) == 1:
                raise ConfigError(f"no contender gets to {speed:g}x: see {out / 'search.json'}")
            tell("timing", 0.0, "")
            _time(out / "run" / "timing.json", clock, variants, asked, rounds[1], pipe._execution_device)
            return variants, found

        variants, found = processes.share(first)
        generate(
            pipe, prompts, variants, out / "run", call=call, model=model, threads=threads, processes=processes,
            progress=lambda what, done, total: tell(f"drawing {what}", done / total, pace(done, total) if pace else ""),
        )  # fmt: skip

        def last() -> dict[str, Any]:
            timing = json.loads((out / "run" / "timing.json").read_text(encoding="utf-8"))
            result = measure(
                out / "run", judges=judges, device=pipe._execution_device, timing=timing,
                progress=lambda what, share: tell(what, share, ""),
            )  # fmt: skip
            write_report(out / "run", result)
            data = compared(result, read_items(out / "run"), chosen, found, steps, speed, tolerance)
            write_text(out / "comparison.json", to_json(data))
            write_text(out / "comparison.md", markdown(data, result))
            return data

        return processes.share(last)
    finally:
        torch.set_num_threads(before)


def _search(
    chosen: Sequence[Contender],
    book: Notebook,
    timer: Timer,
    steps: int,
    target: float,
    tolerance: float,
    rounds: tuple[int, int],
    tell: Progress,
) -> dict[str, Found]:
    found: dict[str, Found] = {}
    measured = book.speed(timer, steps)
    for place, contender in enumerate(chosen):

        def speed(text: str, count: int, share: float = place / len(chosen)) -> Any:
            tell("searching", share, text)
            return measured(text, count)

        found[contender.name] = one = search(contender, speed, target, rounds, tolerance)
        book.found[contender.name] = one.to_dict()
        book.write()
    return found


def _time(
    file: Path, timer: Timer, variants: Sequence[Variant], asked: dict[str, Any], rounds: int, device: torch.device
) -> None:
    """All that was found side by side, unless the file has that already."""
    wanted = plain(asked | {"variants": [variant.to_dict() for variant in variants], "rounds": rounds})
    wanted = json.loads(to_json(wanted))
    if file.exists() and json.loads(file.read_text(encoding="utf-8")).get("asked") == wanted:
        return
    write_text(file, to_json(timing_result(timer(variants, rounds), device) | {"asked": wanted}))


def compared(
    result: Mapping[str, Any],
    items: Sequence[Mapping[str, Any]],
    chosen: Sequence[Contender],
    found: Mapping[str, Found],
    steps: int,
    speed: float,
    tolerance: float = TOLERANCE,
) -> dict[str, Any]:
    """The comparison as plain data, the closest to the unpatched pictures first.

    The best peer is the one of highest PSNR among those whose speed is equal. A row's `ahead` is the mean difference of
    its PSNR to that peer's, prompt by prompt, with its interval.
    """
    entries = {entry["name"]: entry for entry in result["variants"]}
    size = 3 * result["pipeline"]["width"] * result["pipeline"]["height"]
    psnrs, prompts = _psnrs(items, size)
    rows, out_of_it = [], []
    for contender in chosen:
        one = found[contender.name]
        row: dict[str, Any] = {"method": contender.name, "peer": contender.peer, "like": list(contender.like)}
        row |= {"state": one.state, "setting": one.text, "why": one.why}
        if not one.usable:
            out_of_it.append(row | {"speed": None if one.speed is None else vars(one.speed)})
            continue
        assert one.text is not None
        entry = entries[parse_variant(one.text, steps).name]
        measured = entry["cost"]["speedup"]
        equal = abs(measured["median"] / speed - 1) <= tolerance
        row |= {"variant": entry["name"], "speed": measured, "equal": equal, "paired": entry["paired"]}
        rows.append(row | {"scores": entry["scores"], "change": entry["change"]})
    rows.sort(key=lambda row: -_psnr(row))
    best = next((row["variant"] for row in rows if row["peer"] and row["equal"]), None)
    for row in rows:
        gaps = None if best is None else statistics.differences(psnrs[row["variant"]], psnrs[best])
        row["ahead"] = None if gaps is None or row["variant"] == best else statistics.mean(gaps, prompts).to_dict()
    data = {"schema": "tokred.caching/1", "created": result["created"], "speed": speed, "tolerance": tolerance}
    return plain(data | {"steps": steps, "best_peer": best, "rows": rows, "others": out_of_it})


def _psnrs(items: Sequence[Mapping[str, Any]], size: int) -> tuple[dict[str, list[float | None]], list[str]]:
    """PSNRs by variant, and the prompt of each, in one order. Equal pictures, whose PSNR a file cannot hold, get the
    largest there is."""
    found: dict[str, dict[tuple[int, int], float]] = {}
    texts = {}
    for item in items:
        if "psnr" not in item["metrics"]:
            continue
        key, value = (item["index"], item["repeat"]), item["metrics"]["psnr"]
        found.setdefault(item["variant"], {})[key] = math.inf if value is None else value
        texts[key] = item["prompt"]
    keys = sorted(texts)
    psnrs = {name: statistics.capped_psnr([of[key] for key in keys], size) for name, of in found.items()}
    return psnrs, [texts[key] for key in keys]


def _psnr(row: Mapping[str, Any]) -> float:
    value = row["paired"]["psnr"].get("mean")
    return math.inf if value is None or not math.isfinite(value) else value  # all pictures are equal


def markdown(data: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """The comparison as a page: the table, what is not in it and why, and how to read it."""
    pipeline, prompts = result["pipeline"], result["prompts"]
    first = data["rows"][0] if data["rows"] else {"paired": {}, "scores": {}}
    metrics = [name for name in first["paired"] if name in ("psnr", "ssim") or "lpips" in name or "clip_dist" in name]
    facts = [name for name in first["scores"] if name in ("fact_color", "fact_shape")]
    head = ("method", "setting", "speed-up", *(label(name, first["paired"][name]["better"]) for name in metrics))
    head += (*(label(name) for name in facts), f"PSNR − {data['best_peer'] or 'best peer'}")
    rows = []
    for row in data["rows"]:
        speed = figure(row["speed"], unit="x") + ("" if row["equal"] else " (not equal)")
        cells = [row["method"], row["setting"], speed, *(figure(row["paired"][name]) for name in metrics)]
        for name in facts:
            change = figure(row["change"].get(name), sign=True)
            cells.append(f"{number(row['scores'][name]['mean'])} ({change})")
        rows.append((*cells, figure(row["ahead"], sign=True) if row["ahead"] else NONE))
    slow = [row for row in data["others"] if row["state"] == "unreachable"]
    rows += [(row["method"], "—", row["why"], *(NONE for _ in head[3:])) for row in slow]
    lines = [
        f"# Caching at {data['speed']:g}x on {pipeline['model']}",
        "",
        f"{prompts['n']} prompts, {data['steps']} steps, {pipeline['width']}x{pipeline['height']}, on"
        f" {escaped(str(result['env'].get('device')))}; {data['created']}.",
        "",
        *markdown_table(Table("", head, tuple(rows))),
        "",
    ]
    lines += [f"* {row['method']}: {escaped(row['why'])}" for row in data["others"] if row not in slow]
    lines += [
        "* Closest to the unpatched pictures first. Brackets are 95 % intervals: of the speed-up over rounds of timing,"
        " of the rest over prompts.",
        f"* Speed-ups are measured, all in the same rounds; within {data['tolerance']:.0%} of {data['speed']:g}x they"
        " count as equal. What cannot get there has a dash, and its fastest setting.",
        "* After a share of right facts, in parentheses: its change from the unpatched pictures, prompt by prompt.",
        "* The last column is the mean difference of PSNR to that of the best peer of equal speed, prompt by prompt.",
    ]
    copies = [f"{row['method']} ({', '.join(row['like'])})" for row in data["rows"] if row["like"]]
    if copies:
        lines.append(f"* These have a peer's algorithm, and do not count as ahead of it: {'; '.join(copies)}.")
    return "\n".join(lines) + "\n"

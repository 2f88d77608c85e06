"""A whole evaluation in one call: costs, pictures, figures and the report, each taken up where it was left."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from . import cost, launch
from .generation import check_run, generate
from .html import html
from .judges import Judges, check_reference
from .measuring import Claim, check_claim, measure, read_items
from .plots import quality_plot
from .prompts import PromptSet
from .report import markdown
from .results import plain, to_json, write_text
from .store import load_run
from .variants import UNPATCHED, Variant, check

PILOT = 3  # rounds that choose the number of steps that takes the same time

Progress = Callable[[str, float, str], None]  # what is done, the share of it that is done, more words


def evaluate(
    pipe: Any,
    prompts: PromptSet,
    variants: Sequence[Variant],
    out: str | Path,
    *,
    steps: int,
    call: Mapping[str, Any] | None = None,
    model: str | None = None,
    repeats: int = 1,
    base_seed: int = 0,
    batch: int = 1,
    threads: int = 1,
    rounds: int = 10,
    match_time: bool = True,
    judges: Judges | None = None,
    reference: str | Path | None = None,
    claim: Claim | None = None,
    protocol: str | None = None,
    departures: Sequence[str] = (),
    resamples: int | None = None,
    judge_batch: int = 16,
    processes: launch.Processes | None = None,
    pace: Callable[[int, int], str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Time the variants, draw their pictures, measure them, write the report. The same call again goes on.

    Args:
        pipe, prompts, variants, out, model, repeats, base_seed, batch, threads: as in `generation.generate`.
        steps: `num_inference_steps` of the run.
        call: more keyword arguments of the pipeline.
        rounds: of the timing pass, see `cost.measure_cost`; 0 leaves it out. It comes first, alone, with all of torch's
            threads, on the first prompt; a timing that is there already and was asked the same is kept.
        match_time: add runs of the unpatched pipeline with fewer steps that take as long as the methods.
        judges, reference, claim, protocol, departures, resamples: as in `measuring.measure`. A claim that is made
            after pictures were drawn is measured too, and the result says so. The judges run where the pipeline does.
        judge_batch: pictures judged together.
        processes: those of `launch.start`. The first one times and measures, all draw.
        pace: words about speed and time left, from pictures done and in all.
        progress: called now and then.

    Returns:
        The result; `result.json`, `items.jsonl`, `timing.json`, `report.md`, `plot.png` and `report.html` are in `out`.

    Raises:
        ConfigError, UnsupportedError, StateError: as the parts do; before anything is drawn where that can be known.
    """
    out, tell = Path(out), progress or (lambda what, share, words: None)
    judges = judges or Judges.find()
    check_reference(reference)
    call = dict(call or {}) | {"num_inference_steps": steps}
    processes = processes or launch.start(pipe._execution_device)
    options: dict[str, Any] = dict(repeats=repeats, base_seed=base_seed, batch=batch, call=call, model=model)
    options |= dict(threads=threads)

    def first() -> tuple[list[Variant], bool]:
        chosen = _with_those_there(out, check(variants))
        judges.load()
        check_reference(reference, judges.extractors)
        check_claim(claim, [variant.name for variant in chosen], judges, prompts.texts)
        check_run(pipe, prompts, chosen, out, **options)
        early = _claim(out, claim)
        if rounds and match_time and not any(variant.anchor == "steps" for variant in chosen):
            pilot = _timed(pipe, chosen, prompts, out / "pilot.json", call, PILOT, "pilot", tell)
            chosen += cost.same_time(pilot, chosen, steps)
        if rounds:
            _timed(pipe, chosen, prompts, out / "timing.json", call, rounds, "timing", tell)
        return chosen, early

    chosen, early = processes.share(first)
    generate(
        pipe, prompts, chosen, out, **options, processes=processes,
        progress=lambda what, done, total: tell(f"drawing {what}", done / total, pace(done, total) if pace else ""),
    )  # fmt: skip

    def last() -> dict[str, Any]:
        file = out / "timing.json"
        data = measure(
            out, judges=judges, device=pipe._execution_device, reference=reference, claim=claim, protocol=protocol,
            departures=departures, resamples=resamples, batch=judge_batch,
            timing=json.loads(file.read_text(encoding="utf-8")) if rounds else None,
            progress=lambda what, share: tell(what, share, ""),
        )  # fmt: skip
        if claim is not None:
            state(out, data, early)
        tell("report", 0.0, "")
        write_report(out, data)
        return data

    return processes.share(last)


def state(out: Path, result: dict[str, Any], early: bool) -> None:
    """Say in a result, and in its file, when its claim was made."""
    result["claim"]["stated"] = "before the pictures were drawn" if early else "after pictures were drawn"
    write_text(out / "result.json", to_json(result))


def made_before(out: Path) -> tuple[Claim | None, bool, dict[str, Any]]:
    """Of a run that was evaluated before: its claim, whether that came before the pictures, and what `measure` is to be
    told of its protocol."""
    claim, early, said = None, False, dict[str, Any]()
    if (out / "claim.json").exists():
        data = json.loads((out / "claim.json").read_text(encoding="utf-8"))
        claim, early = Claim(**data["claim"]), bool(data["early"])
    if (out / "result.json").exists():
        before = json.loads((out / "result.json").read_text(encoding="utf-8"))
        said = {"protocol": before.get("protocol"), "departures": before.get("departures") or ()}
    return claim, early, said


def write_report(out: str | Path, result: dict[str, Any]) -> None:
    """`report.md`, `report.html` and, with matplotlib, `plot.png` of a measured run, into its folder."""
    out = Path(out)
    write_text(out / "report.md", markdown(result))
    with contextlib.suppress(ConfigError):  # without matplotlib, or with nothing to plot: the report says which
        quality_plot(result, out / "plot.png")
    html(result, read_items(out), out, out / "report.html")


def _with_those_there(out: Path, variants: Sequence[Variant]) -> list[Variant]:
    """Beside those that are asked for, those that the run has already: costs and figures are measured together."""
    before = load_run(out).variants if (out / "run.json").exists() else ()
    new = {variant.name: variant for variant in variants}
    return [new.pop(variant.name, variant) for variant in before] + list(new.values())


def _timed(
    pipe: Any,
    variants: Sequence[Variant],
    prompts: PromptSet,
    file: Path,
    call: Mapping[str, Any],
    rounds: int,
    what: str,
    tell: Progress,
) -> dict[str, Any]:
    """From the file if the same was asked for, else measured and written there."""
    prompt = prompts.texts[0]
    wanted = json.loads(to_json(plain(cost.asked(pipe, variants, prompt, call, rounds))))
    if file.exists():
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{file} is damaged: {error}; delete it, and it is measured again") from error
        if data.get("asked") == wanted:
            return data
    data = cost.measure_cost(
        pipe, variants, prompt, call=call, rounds=rounds,
        progress=lambda part, share: tell(what if part == "timing" else f"{what}: {part}", share, ""),
    )  # fmt: skip
    write_text(file, to_json(data))
    return json.loads(to_json(data))


def _claim(out: Path, claim: Claim | None) -> bool:
    """Write down what is claimed. Returns whether it was written before there was a picture of a variant."""
    if claim is None:
        return False
    file, made = out / "claim.json", {"against": claim.against, "margins": dict(claim.margins)}
    drawn = any(
        next(folder.glob("*.png"), None) is not None
        for folder in (out / "images").glob("*")
        if folder.name != UNPATCHED
    )
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        if before["claim"] == made:
            return bool(before["early"])
    write_text(file, to_json({"claim": made, "early": not drawn}))
    return not drawn

"""An evaluation's result file as tables and as Markdown.

`evaluation.plots` draws the quality plot, `evaluation.html` the page with the pictures; `compare` holds two result
files against each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ..methods import CONFIGS
from .layout import ARROWS, NONE, Result, Table, check, escaped, figure, half, label, markdown_table, number
from .results import busy
from .statistics import holm
from .versus import compare

__all__ = ["compare", "facts", "failures", "markdown", "notes", "tables"]


NOTES = (
    "Brackets are 95 % intervals: of quality over the prompts (BCa bootstrap), of FID and KID ±1.96 standard errors, of"
    " the speed-up over the rounds of timing (bootstrap of the median); of seconds they are the quartiles.",
    "The speed-up is measured, in pairs of calls. FLOPs are counted; a FLOP ratio is not a speed-up.",
    "Distances say how far a picture is from the unpatched one, not which is better.",
)
TOY = "Figures called toy come from the embedded toy-CLIP. They compare variants here, and mean nothing elsewhere."
LOTTERY = (
    "FID grows as n shrinks, by an amount that depends on the model: compare it at equal n only, with the same"
    " extractor, resize and reference."
)


def tables(result: Result) -> list[Table]:
    """All that the figures say, the anchors apart from the variants."""
    check(result)
    variants = [v for v in result["variants"] if not v.get("anchor")]
    anchors = [v for v in result["variants"] if v.get("anchor")]
    found = [_quality("Distance to the unpatched pictures, and cost", variants, result)]
    if anchors:
        note = (
            "Anchors are runs of the unpatched pipeline: with another attention backend (what rounding changes), from"
            " other noise (as far apart as two pictures of one prompt are), with fewer steps (what the same time buys"
            " without a reduction).",
        )
        found.append(_quality("Anchors", anchors, result, note))
    both = [*variants, *anchors]
    found += [_worst(both), _scores(both), _changes(both), _distribution(both), _verdicts(both), _settings(both)]
    return [table for table in found if table.rows]


def facts(result: Result) -> list[tuple[str, str]]:
    """What was measured, and on what: (name, text)."""
    p, env, prompts = (result.get(key) or {} for key in ("pipeline", "env", "prompts"))
    size = f"{p['width']}x{p['height']}" if p.get("width") else None
    steps = f"{p['steps']} steps" if p.get("steps") else None
    guidance = f"guidance {p['guidance']:g}" if isinstance(p.get("guidance"), (int, float)) else None
    count = f"{prompts.get('name') or 'prompts'}: {prompts.get('n')}, {prompts.get('unique')} different"
    if prompts.get("measured"):
        count += f"; {prompts['measured']} measured, {prompts.get('repeats')} of each"
    threads = f"{env['threads']} threads" if env.get("threads") else None
    versions = [
        f"{name} {env[name]}" for name in ("diffusion_tokred", "torch", "diffusers", "transformers") if env.get(name)
    ]
    lines = [
        ("Model", _join(p.get("model") or p.get("class"), size, steps, guidance, p.get("scheduler"), p.get("dtype"))),
        ("Prompts", f"{count}, sha256 {str(prompts.get('sha256'))[:12]}"),
        ("Protocol", str(result.get("protocol") or "none: chosen by hand")),
        ("Machine", _join(env.get("device"), threads)),
        ("Versions", _join(*versions)),
        ("Made", f"{result.get('created')}, {result.get('status')}"),
    ]
    return [(name, text) for name, text in lines if text]


def failures(result: Result) -> list[str]:
    """What went wrong, a line each."""
    return [
        line if isinstance(line, str) else ", ".join(f"{k} {v}" for k, v in line.items())
        for line in result.get("failures") or []
    ]


def notes(result: Result) -> list[str]:
    """What a reader of the tables has to know."""
    found = list(NOTES)
    parts = ("paired", "scores", "distribution")
    if any(key.startswith("toy_") for v in result["variants"] for part in parts for key in v.get(part) or {}):
        found.append(TOY)
    if claim := result.get("claim"):
        margins = ", ".join(f"{label(metric)} {margin:g}" for metric, margin in claim["margins"].items())
        found.append(f"Claim: no worse than {claim['against']}; margins {margins}; stated {claim.get('stated', NONE)}.")
    for name, count in (result.get("missing") or {}).items():
        found.append(f"{name}: {count} pictures are missing; all variants are measured without their prompts.")
    if (env := (result.get("timing") or {}).get("env")) and busy(env):
        found.append(f"The machine was busy before the timing (load {env['load']:.1f}): the times mean little.")
    return [*found, *map(str, result.get("notes") or [])]


def markdown(result: Result) -> str:
    """The whole result as Markdown."""
    lines = ["# Evaluation", "", *(f"* {name}: {escaped(text)}" for name, text in facts(check(result)))]
    if failed := failures(result):
        lines += [
            "",
            f"**{len(failed)} failed**, and are in no figure:",
            "",
            *(f"* {escaped(line)}" for line in failed[:20]),
        ]
        lines += [f"* and {len(failed) - 20} more"] if len(failed) > 20 else []
    for table in tables(result):
        lines += ["", f"## {escaped(table.title)}", "", *markdown_table(table)]
        lines += [line for note in table.notes for line in ("", escaped(note))]
    return "\n".join([*lines, "", "## Notes", "", *(f"* {escaped(note)}" for note in notes(result))]) + "\n"


def _quality(title: str, variants: Sequence[Result], result: Result, notes: tuple[str, ...] = ()) -> Table:
    metrics = _keys(result["variants"], "paired")
    head = ("variant", "seconds ↓", "speed-up ↑", "FLOPs", *(label(*item) for item in metrics.items()))
    rows = []
    for v in variants:
        cost, paired = v.get("cost") or {}, v.get("paired") or {}
        costs = (figure(cost.get("seconds")), figure(cost.get("speedup"), unit="x"), _flops(cost))
        rows.append((v["name"], *costs, *(figure(paired.get(metric)) for metric in metrics)))
    return Table(title, head, tuple(rows), notes)


def _worst(variants: Sequence[Result]) -> Table:
    metrics = _keys(variants, "paired")
    rows = []
    for v in variants:
        entries = [(v.get("paired") or {}).get(metric) or {} for metric in metrics]
        if any(entries):
            rows.append((v["name"], *(number(e.get("worst5"), half(e)) for e in entries)))
    return Table("The worst 5 % of the pictures", ("variant", *(label(*m) for m in metrics.items())), tuple(rows))


def _scores(variants: Sequence[Result]) -> Table:
    metrics = _keys(variants, "scores")
    rows = [
        (v["name"], *(figure(v["scores"].get(metric)) for metric in metrics)) for v in variants if v.get("scores")
    ]  # fmt: skip
    return Table("Scores of the pictures themselves", ("variant", *(label(*m) for m in metrics.items())), tuple(rows))


def _changes(variants: Sequence[Result]) -> Table:
    found = {(v["name"], metric): entry for v in variants for metric, entry in (v.get("change") or {}).items()}
    tested = {v["name"] for v in variants if not v.get("anchor")}
    adjusted = holm({key: entry.get("p") for key, entry in found.items() if key[0] in tested})
    rows = []
    for (name, metric), entry in found.items():
        p = adjusted.get((name, metric))
        wins = "–" if entry.get("win_rate") is None else f"{entry['win_rate']:.0%}"
        rows.append((name, label(metric, entry.get("better")), figure(entry, sign=True), _p(p), wins))
    note = f"p: sign-flip permutation test, Holm-corrected over these {len(adjusted)} tests; anchors are not tested."
    return Table("Change of scores", ("variant", "metric", "change", "p", "better in"), tuple(rows), (note,))


def _distribution(variants: Sequence[Result]) -> Table:
    rows = []
    for v in variants:
        for metric, e in (v.get("distribution") or {}).items():
            shown = e.get("label") or label(metric)
            if metric.startswith("toy_") and not shown.startswith("toy"):
                shown = f"toy {shown}"
            shown += f" {ARROWS[e['better']]}" if e.get("better") in ARROWS else ""
            counts = (str(e.get("n") or NONE), str(e.get("n_reference") or NONE))
            how = (str(e.get(key) or NONE) for key in ("reference", "extractor", "resize"))
            rows.append((v["name"], shown, figure(e, sign=metric.endswith("_change")), *counts, *how))
    head = ("variant", "metric", "value", "n", "n of reference", "reference", "extractor", "resize")
    return Table("Distributions", head, tuple(rows), (LOTTERY,))


def _verdicts(variants: Sequence[Result]) -> Table:
    rows = [
        (
            v["name"],
            label(metric),
            "shown" if e["passed"] else "not shown",
            f"{e['margin']:g}",
            e["against"],
            e["statement"],
        )
        for v in variants
        for metric, e in (v.get("verdict") or {}).items()
    ]
    note = "Margins were stated beforehand. Not shown does not mean worse."
    if levels := [e["level"] for v in variants for e in (v.get("verdict") or {}).values() if e.get("level")]:
        note += f" These {len(rows)} verdicts share the 5 %: each takes the {100 * max(levels):.4g} % interval."
    head = ("variant", "metric", "no worse", "margin", "against", "statement")
    return Table("No worse than the control?", head, tuple(rows), (note,))


def _settings(variants: Sequence[Result]) -> Table:
    rows = [
        (v["name"], _reduction(v.get("reduction")), str(v.get("steps") or NONE), str(v.get("anchor") or NONE))
        for v in variants
    ]
    return Table("Settings", ("variant", "method", "steps", "anchor"), tuple(rows))


def _reduction(reduction: Mapping[str, Any] | None) -> str:
    """The method with those of its options that are not the default."""
    if not reduction:
        return "none"
    known = CONFIGS.get(reduction.get("method", ""))
    usual = {f.name: f.default for f in fields(known)} if known else {}
    config = {k: v for k, v in (reduction.get("config") or {}).items() if not k.startswith("_")}
    changed = {k: v for k, v in config.items() if usual.get(k) != (tuple(v) if isinstance(v, list) else v)}
    words = [str(reduction.get("method")), *(f"{k}={v}" for k, v in changed.items())]
    return " ".join(words) + (" by policy" if reduction.get("policy") else "")


def _keys(variants: Sequence[Result], part: str) -> dict[str, str | None]:
    """The metrics of a part, in order of appearance, with their direction."""
    return {metric: entry.get("better") for v in variants for metric, entry in (v.get(part) or {}).items()}


def _flops(cost: Mapping[str, Any]) -> str:
    flops, whole = cost.get("flops"), cost.get("flops_unpatched")
    return f"{flops / whole:.0%}" if flops is not None and whole else NONE


def _p(p: float | None) -> str:
    return NONE if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def _join(*parts: Any) -> str:
    return ", ".join(str(part) for part in parts if part)

"""A tuning as Markdown, as one page of HTML, and as a plot."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from ..evaluation.html import page, table_lines
from ..evaluation.layout import NONE, Table, escaped, figure, label, markdown_table, number

Data = Mapping[str, Any]
_ROLES = {"constant": "best constant", "random": "random search, same budget"}


def head(data: Data) -> list[str]:
    """What was asked, and what came of it, in lines."""
    goal, best = data["goal"], _entry(data, data["best"])
    pipeline, prompts = data["pipeline"], data["prompts"]
    lines = [
        f"{pipeline.get('model') or pipeline.get('class') or 'pipeline'}, {data['costs']['steps']} steps, on "
        f"{data['env'].get('device')}; {data['created']}",
        f"Asked for: {goal['target']}. Found: {best['setting']}",
    ]
    speed = best["speedup"] or {"median": best["composed"]}
    said = f"Speed-up {figure(speed, unit='x')}" + (
        "" if best["speedup"] else " (composed from the costs of its steps)"
    )
    paired = best["paired"].get(goal["metric"])
    said += f", {label(goal['metric'])} {figure(paired) if paired else number(best['train']) + ' (training prompts)'}"
    lines.append(f"{said}; {prompts['train']['n']} prompts to train, {prompts['held out']['n']} held out")
    budget = data["budget"]
    lines.append(
        f"Budget {budget['asked']}: {budget['evaluations']} evaluations, {budget['random_evaluations']} of the random "
        f"search ({budget['pictures']} and {budget['random_pictures']} pictures), {budget['seconds']:.0f} s"
    )
    edge = data["cliff"]
    if edge is not None:
        lines.append(
            f"The cliff: from {edge['before']:.2f}x to {edge['after']:.2f}x the front loses {abs(edge['lost']):.3g} of "
            f"{label(edge['metric'])}, more than anywhere else for its length"
        )
    return lines


def tables(data: Data) -> list[Table]:
    """The settings; the front; the costs; the sensitivity."""
    return [_settings(data), _front(data), _costs(data), *_sensitivity(data)]


def brief(data: Data) -> Table:
    """The settings without what they are, for a terminal."""
    whole = _settings(data)
    metric = label(data["goal"]["metric"])
    kept = [i for i, name in enumerate(whole.head) if i < 2 or name.startswith((metric, "chosen"))]
    rows = tuple(tuple(row[i] for i in kept) for row in whole.rows)
    return Table(whole.title, tuple(whole.head[i] for i in kept), rows)


def _settings(data: Data) -> Table:
    metrics = list(dict.fromkeys(metric for one in data["entries"] for metric in one["paired"]))
    against = {one["against"]: one for one in data["verdicts"]}
    rows = []
    for one in data["entries"]:
        role = _ROLES.get(one["name"], "same time with fewer steps" if one["anchor"] else one["name"])
        verdict = against.get(one["name"])
        gap = f"{figure(verdict, sign=True)}, {verdict['verdict']}" if verdict else NONE
        rows.append(
            (
                f"{role}{' (chosen)' if one['name'] == data['best'] else ''}",
                figure(one["speedup"], unit="x") if one["speedup"] else NONE,
                f"{one['composed']:.2f}x",
                *(figure(one["paired"].get(metric)) for metric in metrics),
                gap,
                one["setting"],
            )
        )
    names = [label(metric, _first(data, metric).get("better")) for metric in metrics]
    title = ("", "speed-up", "composed", *names, f"chosen better by, {label(data['goal']['metric'])}", "setting")
    note = (
        "Held-out prompts, 95 % intervals; speed-ups were timed in the same rounds. Chosen among all settings by the "
        "held-out prompts, so that its own figure is a little too good."
    )
    return Table("Settings", title, tuple(rows), (note,) if data["status"] == "complete" else ())


def _front(data: Data) -> Table:
    metric = label(data["goal"]["metric"])
    rows = [(f"{one['speed']:.2f}x", number(one["figure"]), one["setting"]) for one in data["front"]]
    rows += [
        (f"{one['speed']:.2f}x", number(one["figure"]), f"{one['steps']} steps, unpatched")
        for one in data["steps_curve"]
    ]
    note = "Composed speeds, training prompts. No setting tried beats those of the front in both; fewer steps below it."
    return Table("Front", ("speed", metric, "setting"), tuple(rows), (note,))


def _costs(data: Data) -> Table:
    costs = data["costs"]
    rows = [("unpatched", f"{costs['dense']:.4f}", NONE)]
    for name, cost in costs["forms"].items():
        between = ", ".join(f"{mode} {ratio:g}: {share:.4f}" for mode, ratio, share in cost["between"])
        rows.append((name, f"{cost['full']:.4f}", between))
    note = (
        f"Shares of an unpatched call ({costs['seconds']:.3f} s); all that is no step takes {costs['rest']:.4f}. "
        f"Medians of {costs['rounds']} rounds."
    )
    return Table("What a step costs", ("", "full step", "other steps"), tuple(rows), (note,))


def _sensitivity(data: Data) -> list[Table]:
    found, us = data["sensitivity"], data["steps"]["u"]
    units = sorted(set(us), reverse=True)
    made = []
    if found["forms"]:
        names = list(found["forms"])
        full = set(data["steps"]["full"])
        rows = [
            (str(i), f"{u:.3f}", "full" if i in full else NONE, *(number(found["forms"][name][i]) for name in names))
            for i, u in enumerate(units)
            if all(i < len(values) for values in found["forms"].values())
        ]
        title = f"What a step matters: {label(data['goal']['metric'])} when it alone is not full, first prompt"
        made.append(Table(title, ("level", "u", "found", *names), tuple(rows)))
    if found["levels"]:
        rows2 = tuple((f"level {level}", number(value)) for level, value in found["levels"].items())
        made.append(Table("What a level of attention matters", ("", label(data["goal"]["metric"])), rows2))
    if found["blocks"]:
        rows3 = tuple((f"blocks {name}", number(value)) for name, value in found["blocks"].items())
        title = "What a group of blocks matters: only these are reduced"
        made.append(Table(title, ("", label(data["goal"]["metric"])), rows3))
    return made


def markdown(data: Data, picture: str | None = None) -> str:
    """As a page."""
    lines = ["# Tuning", "", *(f"* {escaped(line)}" for line in head(data))]
    lines += [f"* {escaped(note)}" for note in data["notes"]]
    lines += ["", f"![Quality against speed]({picture})"] if picture else []
    for table in tables(data):
        lines += ["", f"## {table.title}", "", *markdown_table(table)]
        lines += ["", *(escaped(note) for note in table.notes)] if table.notes else []
    return "\n".join(lines) + "\n"


def html(data: Data, picture: Path | None = None) -> str:
    """As one page that needs nothing beside it."""
    body = ["<h1>Tuning</h1>", "<ul>", *(f"<li>{escape(line)}</li>" for line in (*head(data), *data["notes"])), "</ul>"]
    if picture is not None:
        shown = base64.b64encode(picture.read_bytes()).decode()
        body += [f'<div class="plots"><img alt="Quality against speed" src="data:image/png;base64,{shown}"></div>']
    body += [line for table in tables(data) for line in table_lines(table)]
    return page("Tuning", body)


def plot(data: Data, path: Path) -> bool:
    """Draw all settings, speed against quality, and what each step matters. False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    metric, best = data["goal"]["metric"], _entry(data, data["best"])
    page = Figure(figsize=(11, 4.6), dpi=130, layout="constrained")
    FigureCanvasAgg(page)
    left, right = page.subplots(1, 2, width_ratios=(1.4, 1))
    for search, color, name in (("random", "0.75", "random search"), ("guided", "#56b4e9", "searched")):
        some = [row for row in data["rows"] if row["search"] == search and row["figure"] is not None]
        left.plot([r["speed"] for r in some], [r["figure"] for r in some], ".", color=color, label=name)
    constant = [row for row in data["rows"] if row["source"] == "constant" and row["figure"] is not None]
    left.plot([r["speed"] for r in constant], [r["figure"] for r in constant], "x", color="#e69f00", label="constant")
    for part, style, name in (("front", "-", "front"), ("steps_curve", "s--", "fewer steps")):
        some = [row for row in data[part] if row["figure"] is not None]
        color = "#0072b2" if part == "front" else "0.4"
        left.plot([r["speed"] for r in some], [r["figure"] for r in some], style, color=color, label=name, markersize=4)
    left.plot([best["composed"]], [best["train"]], "*", color="#d55e00", markersize=14, label="chosen")
    if (edge := data["cliff"]) is not None:
        left.axvspan(edge["before"], edge["after"], color="#d55e00", alpha=0.12, linewidth=0, label="cliff")
    left.set(xlabel="speed-up, composed", ylabel=f"{label(metric)}, training prompts")
    left.legend(fontsize=8)
    left.grid(alpha=0.25)
    units = sorted(set(data["steps"]["u"]), reverse=True)
    for name, values in data["sensitivity"]["forms"].items():
        known = [(u, value) for u, value in zip(units, values, strict=False) if value is not None]
        if known:
            right.plot(*zip(*known, strict=True), "o-", markersize=3, label=name)
    for place, unit in enumerate(data["steps"]["full"]):
        right.axvline(
            units[unit], color="#d55e00", alpha=0.35, linewidth=1, label="full steps found" if not place else None
        )
    right.set(xlabel="noise level u (1 = noise)", ylabel=f"{label(metric)} when this step alone is not full")
    right.invert_xaxis()
    right.legend(fontsize=8)
    right.grid(alpha=0.25)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        page.savefig(temporary, format="png")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _entry(data: Data, name: str) -> Data:
    return next(one for one in data["entries"] if one["name"] == name)


def _first(data: Data, metric: str) -> Data:
    return next(one["paired"][metric] for one in data["entries"] if metric in one["paired"])

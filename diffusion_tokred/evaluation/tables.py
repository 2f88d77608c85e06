"""Methods and backbones as tables, made from what is registered."""

from __future__ import annotations

from dataclasses import fields

from ..backbones import BACKBONES
from ..coverage import Cell, coverage
from ..patching import methods
from .compare import Comparison
from .options import default, flag, limits


def method_rows() -> list[tuple[str, str, str, str, str]]:
    """(name, paper, sites, backbones, where its defaults were measured) of each method."""
    return [
        (
            m.name,
            m.paper,
            _words(m.sites),
            _words(m.backbones),
            _words(m.measured) if m.measured else "the method's own",
        )
        for m in methods()
    ]


def option_rows(method: str | None = None) -> list[tuple[str, str, str, str, str]]:
    """(method, option, what it accepts, default, help) of each option, of one method or all."""
    return [
        (m.name, flag(field.name), limits(field), default(field), str(field.metadata.get("help", "")))
        for m in methods()
        if method in (None, m.name)
        for field in fields(m.config)
    ]


def site_rows() -> list[tuple[str, str, str, str]]:
    """(method, acts on, works on, not on and why) of each method and kind of site."""
    rows = []
    for (method, kind), cells in _by_site().items():
        good = [cell.backbone for cell in cells if cell.works]
        refused: dict[str, list[str]] = {}  # why -> families
        for cell in cells:
            for note in [] if cell.absent else _notes(cell):
                refused.setdefault(note, []).append(cell.backbone)
        notes = "\n".join(f"{', '.join(names)}: {note}" for note, names in refused.items())
        rows.append((method, _words((kind,)), ", ".join(good), notes))
    return rows


LETTERS = {
    "attention": "a", "cross_attention": "x", "feed_forward": "f", "parallel": "p", "stack": "s", "deep": "d",
}  # fmt: skip


def methods_markdown() -> str:
    """The README's tables: the methods, and what works at which site of which family."""
    names = list(BACKBONES)
    lines = ["| Method | Paper |", "|---|---|", *(f"| `{m.name}` | {m.paper} |" for m in methods()), ""]
    lines += ["| Method | " + " | ".join(f"`{name}`" for name in names) + " |", "|---|" + "---|" * len(names)]
    notes: list[str] = []
    found: dict[str, dict[str, list[Cell]]] = {}
    for cell in coverage():
        found.setdefault(cell.method, {}).setdefault(cell.backbone, []).append(cell)
    for method, families in found.items():
        words = " | ".join(_word(families[name], notes) for name in names)
        lines.append(f"| `{method}` | {words} |")
    lines += [
        "",
        "Where it acts: **a** self-attention, **x** cross-attention, **f** feed-forward, **p** blocks with attention "
        "and MLP side by side, **s** all blocks as one, **d** the inner part of a UNet. A dot: the family has no such "
        "site.",
        "",
    ]
    lines += [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    lines += ["", "Families, and the denoisers that they know:", ""]
    lines += [f"* `{name}`: {', '.join(BACKBONES[name].models)}" for name in names]
    return "\n".join(lines) + "\n"


def _by_site() -> dict[tuple[str, str], list[Cell]]:
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in coverage():
        found.setdefault((cell.method, cell.kind), []).append(cell)
    return found


def _word(cells: list[Cell], notes: list[str]) -> str:
    """A cell of the table; what is to be said about it goes to `notes`, once."""
    there = [cell for cell in cells if not cell.absent]
    if not there:
        return "·"
    said = [note for cell in there for note in _notes(cell)]
    notes += [note for note in dict.fromkeys(said) if note not in notes]
    marks = ",".join(map(str, sorted({notes.index(note) + 1 for note in said})))
    ways = [" ".join(LETTERS[c.kind] for c in there if c.works and bool(c.only) is other) for other in (False, True)]
    return (", or ".join(filter(None, ways)) or "no") + (f"<sup>{marks}</sup>" if marks else "")


def _notes(cell: Cell) -> list[str]:
    """Why not; or, where it works, which options do not."""
    options: dict[str, list[str]] = {}
    for option, why in cell.limits:
        options.setdefault(why, []).append(option)
    refused = [f"not with {', '.join(names)}: {why}" for why, names in options.items()]
    if cell.only:
        return [f"with {cell.only}"]
    return [cell.reason, *refused] if cell.reason else refused


def comparison_rows(found: Comparison) -> list[tuple[str, str, str]]:
    """(what, unpatched, patched) of each figure; in brackets the quartiles, 25 and 75 %."""
    spreads, report = found.intervals, found.rows[0].report
    psnr = "identical" if spreads["psnr"].median == float("inf") else f"{spreads['psnr'].text(1)} dB"
    return [
        ("seconds a call", spreads["seconds_unpatched"].text(3), spreads["seconds_patched"].text(3)),
        ("speed-up, measured", "", spreads["speedup"].text(2, "x")),
        ("FLOPs of the denoiser, counted", _flops(report.flops_dense), _flops(report.flops)),
        ("tokens left out", "", f"{spreads['tokens_saved'].median:.1%}"),
        ("PSNR to unpatched", "", psnr),
        ("SSIM to unpatched", "", spreads["ssim"].text(3)),
    ]


def _flops(count: int) -> str:
    return f"{count / 1e12:.2f} T" if count >= 1e12 else f"{count / 1e9:.2f} G"


def _words(names: tuple[str, ...]) -> str:
    return ", ".join(name.replace("_", "-") for name in names)

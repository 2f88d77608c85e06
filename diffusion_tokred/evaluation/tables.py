"""Methods and backbones as tables, made from what is registered."""

from __future__ import annotations

from dataclasses import fields

from ..backbones import BACKBONES
from ..patching import methods
from .compare import Comparison
from .options import default, flag, limits


def method_rows() -> list[tuple[str, str, str, str]]:
    """(name, paper, sites, backbones) of each method."""
    return [(m.name, m.paper, _words(m.sites), _words(m.backbones)) for m in methods()]


def option_rows(method: str | None = None) -> list[tuple[str, str, str, str, str]]:
    """(method, option, what it accepts, default, help) of each option, of one method or all."""
    return [
        (m.name, flag(field.name), limits(field), default(field), str(field.metadata.get("help", "")))
        for m in methods()
        if method in (None, m.name)
        for field in fields(m.config)
    ]


def methods_markdown() -> str:
    """The README's table: methods by backbones."""
    names = list(BACKBONES)
    lines = [
        "| Method | Acts on | " + " | ".join(f"`{name}`" for name in names) + " | Paper |",
        "|---|---|" + "---|" * (len(names) + 1),
    ]
    for m in methods():
        cells = ("yes" if name in m.backbones else "-" for name in names)
        lines.append(f"| `{m.name}` | {_words(m.sites)} | {' | '.join(cells)} | {m.paper} |")
    models = "; ".join(f"`{name}`: {', '.join(BACKBONES[name].models)}" for name in names)
    return "\n".join((*lines, "", f"Backbones are families of denoisers. {models}.")) + "\n"


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

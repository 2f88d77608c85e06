"""An evaluation as one HTML page that needs nothing beside it: tables, plots, and the pairs of pictures, worst first.

Pictures are embedded, scripts are not used, and nothing is fetched: the page states so to the browser as its content
security policy. All text is escaped, as prompts come from anywhere.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from ..errors import ConfigError
from .images import INFERNO, colored, difference
from .layout import Table, check, label, number
from .plots import DARK, LIGHT, panels, quality_plot
from .report import facts, failures, notes, tables
from .results import write_text

RANKING = ("lpips_alex", "lpips_vgg", "dists", "ssim", "ms_ssim", "psnr", "toy_clip_distance", "clip_distance")
SIDE = 192  # pixels a side up to which pictures are embedded as they are; larger ones are reduced to 320
REDUCED = 320
Item = Mapping[str, Any]

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1e22; --soft: #5d6169; --line: #dcdfe4; --tint: #f4f5f7;
  --good: #00674c; --bad: #a13d00; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181d; --ink: #e8eaed; --soft: #a2a8b0; --line: #353a43;
  --tint: #1f232a; --good: #3ecfa3; --bad: #f0a35e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
  -webkit-text-size-adjust: 100%; }
main { max-width: 1120px; margin: 0 auto; padding: 20px 16px 60px; }
h1 { font-size: 1.6rem; margin: 0 0 12px; } h2 { font-size: 1.2rem; margin: 36px 0 8px; }
p, li { max-width: 76ch; } .soft, small { color: var(--soft); }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 2px 14px; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .87rem; }
th, td { padding: 6px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
tr:last-child td, tr:last-child th { border-bottom: 0; }
thead th { background: var(--tint); font-weight: 600; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); z-index: 1; }
thead th:first-child { background: var(--tint); }
.text { text-align: left; } .long { white-space: normal; min-width: 26ch; }
.yes { color: var(--good); font-weight: 600; } .no { color: var(--bad); font-weight: 600; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 12px; }
.plots img { width: 100%; height: auto; border: 1px solid var(--line); border-radius: 6px; display: block; }
details { border-top: 1px solid var(--line); padding: 10px 0; }
summary { cursor: pointer; font-size: 1.05rem; font-weight: 600; padding: 4px 0; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 18px 24px; }
figure { margin: 0; min-width: 0; } figcaption { font-size: .85rem; overflow-wrap: anywhere; margin-top: 6px; }
.three { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 4px; }
.three img, .gone { width: 100%; height: auto; display: block; border-radius: 3px; background: var(--tint); }
.gone { aspect-ratio: 1; display: grid; place-items: center; padding: 6px; font-size: .75rem; color: var(--soft);
  text-align: center; overflow-wrap: anywhere; }
.three small { display: block; font-size: .75rem; text-align: center; }
.scale { display: inline-block; vertical-align: -2px; height: 12px; width: 120px; border-radius: 2px; margin: 0 4px; }
"""


def html(
    result: Mapping[str, Any],
    items: Sequence[Item],
    folder: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    pairs: int = 12,
    order: str | None = None,
) -> None:
    """Write the page.

    Args:
        result: the result file's data.
        items: the lines of `items.jsonl`, one a picture; `file` is relative to `folder`.
        folder: of the run, where the pictures are. A picture that is not there, or outside, is named as missing.
        path: of the page, written whole or not at all. Pictures link to their files, relative to it.
        pairs: how many of each variant are shown (a third of it for an anchor), the worst first.
        order: which metric says what is worst; by default the first of `RANKING` that the items have.

    Raises:
        ConfigError: not a result of `evaluate`, or no picture has the metric `order`.
    """
    check(result)
    path, folder = Path(path), Path(folder)
    had = {name for item in items for name, value in (item.get("metrics") or {}).items() if value is not None}
    if order is not None and order not in had:
        raise ConfigError(
            f"no picture has the metric {order!r} to order by: there is {', '.join(sorted(had)) or 'none'}"
        )
    order = order or next((name for name in RANKING if name in had), None)
    body = [
        "<h1>Evaluation</h1>",
        "<dl>",
        *(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts(result)),
        "</dl>",
    ]
    if failed := failures(result):
        body += [f'<h2 class="no">{len(failed)} failed, and are in no figure</h2>', "<ul>"]
        body += [*(f"<li>{escape(line)}</li>" for line in failed[:20]), "</ul>"]
        body += [f"<p>and {len(failed) - 20} more</p>"] if len(failed) > 20 else []
    found = tables(result)
    body += [*table_lines(found[0]), *_plots(result), *(line for table in found[1:] for line in table_lines(table))]
    body += ["<h2>Notes</h2>", "<ul>", *(f"<li>{escape(note)}</li>" for note in notes(result)), "</ul>"]
    body += _pictures(result, items, folder, path, pairs, order)
    write_text(path, page("Evaluation", body))


def page(title: str, body: Sequence[str]) -> str:
    """A whole page from the lines of its body."""
    head = [
        "<!doctype html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>", f"<style>{_STYLE}</style>", "</head>", "<body>", "<main>",
    ]  # fmt: skip
    return "\n".join([*head, *body, "</main>", "</body>", "</html>"]) + "\n"


def table_lines(table: Table) -> Iterator[str]:
    """A table with its title and notes."""
    yield f"<h2>{escape(table.title)}</h2>"
    left = [' class="text"' if table.is_text(i) else "" for i in range(len(table.head))]
    head = "".join(f'<th scope="col"{side}>{escape(name)}</th>' for side, name in zip(left, table.head, strict=True))
    yield f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>'
    for first, *rest in table.rows:
        cells = "".join(_cell(text, table.is_text(i)) for i, text in enumerate(rest, 1))
        yield f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>'
    yield "</tbody></table></div>"
    yield from (f'<p class="soft">{escape(note)}</p>' for note in table.notes)


def _cell(text: str, left: bool) -> str:
    marks = ["text"] * left + ["long"] * (len(text) > 40)
    marks += {"shown": ["yes"], "not shown": ["no"]}.get(text, [])
    return f'<td class="{" ".join(marks)}">{escape(text)}</td>' if marks else f"<td>{escape(text)}</td>"


def _plots(result: Mapping[str, Any]) -> list[str]:
    """A plot a metric, in light and in dark, or why there is none."""
    lines = []
    for metric in panels(result):
        drawn = {}
        for name, theme in (("light", LIGHT), ("dark", DARK)):
            buffer = io.BytesIO()
            try:
                quality_plot(result, buffer, [metric], theme)
            except ConfigError as error:
                return [f'<p class="soft">No plot: {escape(str(error))}</p>']
            drawn[name] = _data(buffer.getvalue(), "png")
        says = escape(f"{label(metric)} and measured seconds; the figures are in the tables")
        lines.append(
            f'<picture><source media="(prefers-color-scheme: dark)" srcset="{drawn["dark"]}">'
            f'<img src="{drawn["light"]}" alt="{says}"></picture>'
        )
    return ["<h2>Quality and time</h2>", '<div class="plots">', *lines, "</div>"] if lines else []


def _pictures(
    result: Mapping[str, Any], items: Sequence[Item], folder: Path, path: Path, pairs: int, order: str | None
) -> list[str]:
    """The pairs of each variant: unpatched, variant, difference."""
    first = result["variants"][0]["name"]
    base = {_place(item): item for item in items if item.get("variant") == first}
    ranked = "worst first" if order is None else f"worst {label(order)} first"
    lines = ["<h2>Pictures</h2>", f'<p class="soft">Unpatched, variant, amplified difference; {escape(ranked)}.'
             f" Pictures of more than {SIDE} pixels a side are reduced here; each links to its file.</p>"]  # fmt: skip
    for v in result["variants"][1:]:
        mine = [item for item in items if item.get("variant") == v["name"] and _place(item) in base]
        if not mine:
            continue
        better = _better(result, order)
        mine.sort(key=lambda item: (_badness(item, order, better), _place(item)))
        shown = mine[: max(1, pairs // 3 if v.get("anchor") else pairs)]
        loaded = [(_load(folder, base[_place(item)]), _load(folder, item)) for item in shown]
        gaps = [_gap(*pair) for pair in loaded]
        top = _top([gap for gap in gaps if gap is not None])
        is_open = "" if v.get("anchor") else " open"
        kind = f"{v['name']} (anchor)" if v.get("anchor") else v["name"]
        lines += [f"<details{is_open}><summary>{escape(kind)}</summary>"]
        lines += [f'<p class="soft">{len(shown)} of {len(mine)}. Difference, mean of the channels:']
        lines += [f"0 {_bar()} {top:.2f}.</p>", '<div class="pairs">']
        for item, pair, gap in zip(shown, loaded, gaps, strict=True):
            lines += _figure(item, base[_place(item)], pair, gap, top, folder, path, v["name"])
        lines += ["</div></details>"]
    return lines


def _figure(
    item: Item, base: Item, pair: tuple[Any, Any], gap: Any, top: float, folder: Path, path: Path, name: str
) -> Iterator[str]:  # fmt: skip
    yield '<figure><div class="three">'
    for says, picture, source in (("unpatched", pair[0], base), (name, pair[1], item)):
        if isinstance(picture, str):
            shown = f'<div class="gone">{escape(picture)}</div>'
        else:
            link = escape(quote(Path(os.path.relpath(folder / str(source["file"]), path.parent)).as_posix()))
            image = f'<img loading="lazy" alt="{escape(says)}" src="{_embedded(picture)}">'
            shown = f'<a href="{link}">{image}</a>'
        yield f"<div>{shown}<small>{escape(says)}</small></div>"
    if gap is None:
        shown = '<div class="gone">not to be compared</div>'
    else:
        shown = f'<img loading="lazy" alt="difference" src="{_embedded(colored(gap, INFERNO, top))}">'
    yield f"<div>{shown}<small>difference</small></div></div>"
    why = item.get("why_null") or {}
    figures = [
        f"{label(key)} {number(value) if value is not None else why.get(key, 'none')}"
        for part in ("metrics", "scores")
        for key, value in (item.get(part) or {}).items()
    ]
    where = f"{item.get('index')}-{item.get('repeat')}, seed {item.get('seed')}"
    figures += [f"failed: {some['failure']}" for some in (base, item) if some.get("failure")]
    yield f"<figcaption><bdi>{escape(str(item.get('prompt')))}</bdi><br>"
    yield f'<span class="soft">{escape(" · ".join([where, *figures]))}</span></figcaption></figure>'


def _place(item: Item) -> tuple[Any, Any]:
    return item.get("index"), item.get("repeat")


def _better(result: Mapping[str, Any], metric: str | None) -> str:
    entries = ((v.get("paired") or {}).get(metric) for v in result["variants"])
    usual = "lower" if metric and ("lpips" in metric or "distance" in metric or metric == "dists") else "higher"
    return next((entry["better"] for entry in entries if entry and entry.get("better")), usual)


def _badness(item: Item, metric: str | None, better: str) -> float:
    """Sorts the worst first; what has no figure comes last: equal pictures have an infinite PSNR."""
    value = (item.get("metrics") or {}).get(metric) if metric else None
    return math.inf if value is None else value if better == "higher" else -value


def _load(folder: Path, item: Item) -> Image.Image | str:
    """A picture of the run's folder, or in words why there is none."""
    if not item.get("file"):
        return "no picture was made"
    file = folder / str(item["file"])
    if not file.resolve().is_relative_to(folder.resolve()):
        return "not in the run's folder"
    try:
        with Image.open(file) as picture:
            return picture.convert("RGB")
    except FileNotFoundError:
        return f"{item['file']} is missing"
    except (OSError, ValueError, Image.DecompressionBombError):
        return f"{item['file']} cannot be read"


def _gap(a: Image.Image | str, b: Image.Image | str) -> np.ndarray | None:
    """The difference of two pictures of one size."""
    return None if isinstance(a, str) or isinstance(b, str) or a.size != b.size else difference(a, b)


def _top(gaps: Sequence[np.ndarray]) -> float:
    """The brightest difference of the scale: the same for all pairs of a variant, never so low that rounding shows."""
    largest = max((float(np.quantile(gap, 0.998)) for gap in gaps), default=0.0)
    return max(0.05, math.ceil(largest * 20) / 20)


def _embedded(picture: Image.Image) -> str:
    """A picture as a data URL: small ones without loss, others reduced, as WebP."""
    buffer = io.BytesIO()
    if max(picture.size) <= SIDE:
        picture.save(buffer, "png", optimize=True)
        return _data(buffer.getvalue(), "png")
    small = picture.copy()
    small.thumbnail((REDUCED, REDUCED), Image.Resampling.LANCZOS)
    small.save(buffer, "webp", quality=88)
    return _data(buffer.getvalue(), "webp")


def _bar() -> str:
    stops = ", ".join(f"#{color}" for color in INFERNO)
    return f'<span class="scale" style="background: linear-gradient(90deg, {stops})"></span>'


def _data(raw: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}"

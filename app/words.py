"""What the app says: progress, verdict, figures. HTML without scripts; whatever a user wrote is escaped."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image

from diffusion_tokred.evaluation.metrics import Spread
from diffusion_tokred.evaluation.results import busy

from .pictures import SIDE_COLORS, STATES
from .runs import LETTERS, Drawn, Result, Tick


def state_line(state: str, text: str) -> str:
    """The model's state, with a dot."""
    return f'<div class="tk-state tk-{state}" role="status"><i></i>{html.escape(text)}</div>'


def progress(tick: Tick | None, text: str, previews: dict[int, Image.Image]) -> str:
    """A bar with the time left, and the unfinished pictures."""
    share = 0.0 if tick is None else tick.share
    left = "" if tick is None or tick.left is None else f" · {clock(tick.left)} left"
    shown = "".join(
        f'<figure><img src="{_data(previews[place])}" alt="side {LETTERS[place]}, unfinished">'
        f"<figcaption>{LETTERS[place]}</figcaption></figure>"
        for place in sorted(previews)
    )
    return (
        f'<div class="tk-progress" role="status"><div class="tk-bar"><b style="width:{share:.1%}"></b></div>'
        f"<p>{html.escape(text)}{left}</p>{f'<div class=tk-live>{shown}</div>' if shown else ''}</div>"
    )


def note(text: str, kind: str = "") -> str:
    return f'<p class="tk-note {kind}" role="status">{html.escape(text)}</p>'


def clock(seconds: float) -> str:
    """Such as "1:05"."""
    whole = max(round(seconds), 0)
    return f"{whole // 60}:{whole % 60:02d}"


def verdict(found: Result) -> str:
    """One line: how much faster, how alike."""
    parts = []
    if (speed := found.speedup) is not None:
        parts.append(f"<b>{faster(speed)}</b>")
    elif found.a.kept:
        parts.append("<b>A was kept</b>: it was not timed with B")
    elif not found.finished:
        parts.append("<b>not timed yet</b>")
    else:
        parts.append("<b>not timed</b>")
    if found.psnr == float("inf"):
        parts.append("the pictures are equal")
    else:
        parts.append(f"PSNR {found.psnr:.1f} dB · SSIM {found.ssim:.3f}")
    saved = [d.report.tokens_saved for d in found.sides if d.report is not None]
    if saved:
        parts.append(f"{max(saved):.0%} of tokens left out")
    return f'<div class="tk-verdict">{" · ".join(parts)}</div>'


def faster(speed: Spread) -> str:
    """Such as "B is 1.25x faster (1.21-1.30)"; a slow-down is said as one."""
    if f"{speed.median:.2f}" == "1.00":
        spread = f" ({speed.low:.2f}–{speed.high:.2f}×)" if speed.n > 1 else ""
        return f"B is as fast as A{spread}"
    if speed.median < 1:
        spread = f" ({1 / speed.high:.2f}–{1 / speed.low:.2f})" if speed.n > 1 else ""
        return f"B is {1 / speed.median:.2f}× slower{spread}"
    spread = f" ({speed.low:.2f}–{speed.high:.2f})" if speed.n > 1 else ""
    return f"B is {speed.median:.2f}× faster{spread}"


def figures(found: Result) -> str:
    """The table of all figures, and what to know about them."""
    speed, (a, b) = found.speedup, found.sides
    rows = [
        ("seconds a call", _seconds(a), _seconds(b)),
        ("speed-up, measured", "", _speed(found, speed)),
        ("FLOPs of the denoiser, counted", _flops(a.flops), _flops(b.flops)),
        ("tokens left out", *(f"{d.report.tokens_saved:.1%}" if d.report else "none" for d in found.sides)),
        ("kept from step to step", *(_bytes(d.cache_bytes) for d in found.sides)),
        ("PSNR to A", "", "equal" if found.psnr == float("inf") else f"{found.psnr:.1f} dB"),
        ("SSIM to A", "", f"{found.ssim:.3f}"),
        ("initial noise, sha256", *(d.noise for d in found.sides)),
    ]
    body = "".join(
        f"<tr><th scope=row>{what}</th>" + "".join(f"<td>{html.escape(v)}</td>" for v in values) + "</tr>"
        for what, *values in rows
    )
    heads = "".join(
        f'<th scope=col><span style="color:{color}">■</span> {letter}: {html.escape(d.side.name)}'
        f"{' <em>kept</em>' if d.kept else ''}</th>"
        for letter, color, d in zip(LETTERS, SIDE_COLORS, found.sides, strict=True)
    )
    notes = "".join(f"<li>{html.escape(text)}</li>" for text in _notes(found))
    return (
        f'<div class="tk-scroll"><table class="tk-table"><thead><tr><td></td>{heads}</tr></thead><tbody>{body}</tbody>'
        f'</table></div><ul class="tk-notes">{notes}</ul>'
    )


def _notes(found: Result) -> list[str]:
    env, p = found.env, found.pipeline
    same = "The initial noise of both sides is the same." if found.same_noise else "The initial noise DIFFERS."
    texts = [
        same,
        f"{p['model']}, {p['width']}×{p['height']}, {p['steps']} steps, guidance {p['guidance']:g}, {p['dtype']}; "
        f"{env['device']}, {env['threads']} thread{'s'[: env['threads'] > 1]}, torch {env['torch']}.",
        "Times are of whole calls, side by side in turns, with nothing recorded in them; brackets are quartiles.",
    ]
    if found.a.kept:
        texts.append("A was drawn by an earlier run: its time is not shown, and there is no speed-up to it.")
    if not all(d.repeatable for d in found.sides):
        texts.append("Repeated calls drew different pictures: this model is not repeatable here.")
    if busy(env):
        texts.append(f"The machine was busy (load {env['load']:.1f} on {env['cpus']} CPUs): mistrust the times.")
    return texts


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column names the rows."""
    head = "".join(f"<th scope=col>{html.escape(text)}</th>" for text in heads)
    body = "".join(
        f"<tr><th scope=row>{html.escape(row[0])}</th>{''.join(f'<td>{html.escape(v)}</td>' for v in row[1:])}</tr>"
        for row in rows
    )
    whole = f'<table class="tk-table"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="tk-scroll">{whole}</div>'


def legend(counted: Sequence[tuple[str, int]], step: str) -> str:
    """What the colours of a token map mean, with how many tokens have them."""
    colors = dict(STATES)
    total = sum(n for _, n in counted) or 1
    items = "".join(
        f'<li><i style="background:{colors[name] or "transparent"}"></i>{name} {n:,} ({n / total:.0%})</li>'
        for name, n in counted
    )
    return f'<div class="tk-legend"><b>{html.escape(step)}</b><ul>{items}</ul></div>'


def _seconds(drawn: Drawn) -> str:
    if drawn.kept:
        return "kept, not timed"
    return Spread.of(drawn.seconds).text(3).replace("-", "–") if drawn.seconds else "not timed"


def _speed(found: Result, speed: Spread | None) -> str:
    if speed is not None:
        return speed.text(2, "×").replace("-", "–")
    return "none: A was kept" if found.a.kept else "not timed"


def _flops(count: int | None) -> str:
    if count is None:
        return "not counted"
    return f"{count / 1e12:.2f} T" if count >= 1e12 else f"{count / 1e9:.2f} G"


def _bytes(count: int) -> str:
    if not count:
        return "nothing"
    return (
        f"{count / 1e9:.2f} GB"
        if count >= 1e9
        else f"{count / 1e6:.1f} MB"
        if count >= 1e5
        else f"{count / 1e3:.1f} kB"
    )


def _data(picture: Image.Image) -> str:
    """A small copy as a data URL: previews leave no files."""
    copy = picture.copy()
    copy.thumbnail((256, 256))
    buffer = io.BytesIO()
    copy.save(buffer, format="WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()

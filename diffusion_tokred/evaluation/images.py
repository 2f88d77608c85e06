"""The pictures of a comparison: difference, token map, and the panel that shows them side by side.

Colour scales are perceptually even and safe for colour-blind readers (after matplotlib's inferno and cividis).
"""

from __future__ import annotations

import os
import shutil
from dataclasses import fields
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ..errors import ConfigError
from ..methods import MethodConfig
from ..runtime.stats import TOKEN_STATES
from .compare import Comparison, Row
from .results import to_json, write_text

INFERNO = ("000004", "1b0c41", "4a0c6b", "781c6d", "a52c60", "cf4446", "ed6925", "fb9b06", "f7d13d", "fcffa4")
CIVIDIS = ("00224e", "123570", "3b496c", "575d6d", "707173", "8a8678", "a59c74", "c3b369", "e1cc55", "fee838")
INK, GRAY, PAPER = (28, 30, 34), (108, 112, 120), (255, 255, 255)
COMPUTED = (0, 5)  # of TOKEN_STATES: "computed" and "protected"
# A colour for each of TOKEN_STATES (after Okabe and Ito, for colour-blind readers), and how strongly it is laid on.
TINTS = dict(zip(TOKEN_STATES, ((255, 255, 255), (230, 159, 0), (0, 114, 178), (86, 180, 233), (213, 94, 0),
                                (0, 158, 115)), strict=True))  # fmt: skip
TINT = 0.6
SIDE = 320  # smaller pictures are enlarged by a whole factor to about this many pixels; see `_zoom`
LARGEST = 512  # larger ones are reduced to this
HEAD, FOOT, LINE = 132, 78, 32  # heights of the panel's text: above, below, and under each row of pictures
_MARGIN, _GAP = 24, 12


def difference(a: Image.Image, b: Image.Image) -> np.ndarray:
    """`(H, W)` float in [0, 1]: the mean over the channels of the absolute difference."""
    x, y = (np.asarray(p.convert("RGB"), dtype=np.float32) / 255 for p in (a, b))
    return np.abs(x - y).mean(axis=2)


def tokens_left_out(token_map: np.ndarray) -> np.ndarray:
    """`(h, w)` in [0, 1]: the share of a run's steps, passes and levels in which a token was not computed.

    Args:
        token_map: `Report.token_map`, uint8 `[step, pass, level, h, w]`.
    """
    return 1 - np.isin(token_map, COMPUTED).mean(axis=(0, 1, 2))


def colored(values: np.ndarray, scale: tuple[str, ...], top: float = 1.0) -> Image.Image:
    """Values from 0 to `top` through a colour scale."""
    anchors = np.array([[int(c[i : i + 2], 16) for i in (0, 2, 4)] for c in scale], dtype=np.float64)
    place = np.clip(values / top, 0, 1) * (len(anchors) - 1)
    channels = [np.interp(place, np.arange(len(anchors)), anchors[:, i]) for i in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def difference_map(row: Row, top: float = 1.0) -> Image.Image:
    """Heat map of `difference`, as large as the pictures; `top` is drawn brightest."""
    return colored(difference(row.unpatched, row.patched), INFERNO, top)


def token_map(row: Row) -> Image.Image:
    """Heat map of `tokens_left_out`, one block a token, as large as the pictures."""
    found = row.report.token_map
    values = np.zeros((1, 1)) if found is None else tokens_left_out(found)
    return colored(values, CIVIDIS).resize(row.patched.size, Image.Resampling.NEAREST)


def step_map(picture: Image.Image, token_map: np.ndarray, step: int, part: int = 0, level: int = 0) -> Image.Image:
    """What became of each token at one step, drawn over a picture of any size: computed tokens are clear, the others
    tinted as `legend` says.

    Args:
        picture: the run's first picture.
        token_map: `Report.token_map`, uint8 `[step, pass, level, h, w]`.
        step, part, level: which map of it; `part` is the pass, such as 0 for the unconditional one.

    Raises:
        ConfigError: there is no such step, pass or level.
    """
    for name, place, count in zip(("step", "pass", "level"), (step, part, level), token_map.shape, strict=False):
        if not 0 <= place < count:
            raise ConfigError(f"the token map has no {name} {place}: there are 0 to {count - 1}")
    states = Image.fromarray(token_map[step, part, level]).resize(picture.size, Image.Resampling.NEAREST)
    tints, shown = np.array(list(TINTS.values()), dtype=np.float64), np.asarray(states)
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float64)
    tinted = np.where((shown == 0)[..., None], pixels, (1 - TINT) * pixels + TINT * tints[shown])
    return Image.fromarray(tinted.round().astype(np.uint8))


def legend(token_map: np.ndarray | None = None) -> Image.Image:
    """The colours of `step_map` with their words: of all states, or of those that a token map has."""
    there = range(len(TINTS)) if token_map is None else np.unique(token_map).tolist()
    words = [(tint, word) for place, (word, tint) in enumerate(TINTS.items()) if place in there]
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    widths = [34 + int(ruler.textlength(word, font=_font(16))) + 20 for _, word in words]
    strip = Image.new("RGB", (sum(widths) + _GAP, 32), PAPER)
    draw, x = ImageDraw.Draw(strip), _GAP
    for (tint, word), width in zip(words, widths, strict=True):
        draw.rectangle((x, 8, x + 22, 24), fill=tint, outline=GRAY)
        _text(draw, (x + 30, 6), word, 16, width)
        x += width
    return strip


def brightest(comparison: Comparison) -> float:
    """The top of the difference scale: shared by all rows, and never so low that rounding shows."""
    largest = max(float(np.quantile(difference(row.unpatched, row.patched), 0.998)) for row in comparison.rows)
    return max(0.05, np.ceil(largest * 20) / 20)


def panel(comparison: Comparison) -> Image.Image:
    """One picture of all: unpatched, patched, difference, tokens; a row for each seed."""
    rows, top = comparison.rows, brightest(comparison)
    width, height = _zoom(rows[0].unpatched.size)
    column = max(width, 240)
    total = 2 * _MARGIN + 4 * column + 3 * _GAP
    page = Image.new("RGB", (total, HEAD + len(rows) * (height + LINE) + FOOT), PAPER)
    draw = ImageDraw.Draw(page)
    _text(draw, (_MARGIN, 20), rows[0].prompt, 24, total - 2 * _MARGIN)
    lefts = [_MARGIN + i * (column + _GAP) for i in range(4)]
    speed = comparison.speedup.median
    verdict = f"{speed:.2f}x faster" if speed >= 1 else f"{1 / speed:.2f}x slower"
    titles = (
        ("unpatched", f"{comparison.seconds_unpatched.median:.2f} s"),
        (f"patched with {comparison.reduction['method']}", f"{comparison.seconds_patched.median:.2f} s, {verdict}"),
        ("difference", None),
        ("tokens left out", None),
    )
    for left, (title, note) in zip(lefts, titles, strict=True):
        _text(draw, (left, 66), title, 20, column)
        if note:
            _text(draw, (left, 94), note, 16, column, GRAY)
    _bar(page, (lefts[2], 97), column, INFERNO, "0", f"{top:.2f}")
    _bar(page, (lefts[3], 97), column, CIVIDIS, "never", "always")
    for index, row in enumerate(rows):
        y = HEAD + index * (height + LINE)
        shown = (row.unpatched, row.patched, difference_map(row, top), token_map(row))
        for place, picture in enumerate(shown):
            filter = Image.Resampling.NEAREST if place == 3 else Image.Resampling.LANCZOS
            page.paste(picture.resize((width, height), filter) if picture.size != (width, height) else picture,
                       (lefts[place], y))  # fmt: skip
        quality = "identical" if row.psnr == float("inf") else f"PSNR {row.psnr:.1f} dB   SSIM {row.ssim:.3f}"
        _text(draw, (lefts[0], y + height + 5), f"seed {row.seed}", 15, column, GRAY)
        _text(draw, (lefts[2], y + height + 5), quality, 15, column, GRAY)
        _text(draw, (lefts[3], y + height + 5), f"{row.report.tokens_saved:.0%} of tokens left out", 15, column, GRAY)
    for place, words in enumerate(caption(comparison)):
        _text(draw, (_MARGIN, page.height - FOOT + 14 + 23 * place), words, 15, total - 2 * _MARGIN, (INK, GRAY)[place])
    return page


def caption(comparison: Comparison) -> tuple[str, str]:
    """The reduction with its figures, and what they were measured on: a line each."""
    c, p, env = comparison, comparison.pipeline, comparison.env
    report = c.rows[0].report
    guidance = "" if p["guidance"] is None else f"guidance {p['guidance']:g}, "
    return (
        f"{name_of(c)}   |   speed-up {c.speedup.text(unit='x')}, "
        f"{c.speedup.n} pair{'s'[: c.speedup.n > 1]} of calls   |   "
        f"FLOPs {report.flops / max(report.flops_dense, 1):.0%} of unpatched",
        f"{p['model'] or p['class']}, {p['width']}x{p['height']}, {p['steps']} steps, {guidance}{p['dtype']}   |   "
        f"{env['device']}, {env['threads']} thread{'s'[: env['threads'] > 1]}   |   "
        f"torch {env['torch']}, diffusers {env['diffusers']}",
    )


def name_of(comparison: Comparison) -> str:
    """The method with the options that were changed, such as "tome ratio 0.6 levels 0,1"."""
    config = MethodConfig.from_dict(comparison.reduction["config"])
    parts = [config.name]
    for f in fields(config):
        value = getattr(config, f.name)
        if value != f.default or f.name in ("ratio", "factor"):
            parts.append(f"{f.name} {','.join(map(str, value)) if isinstance(value, tuple) else value}")
    return " ".join(parts) + (" by policy" if comparison.reduction["policy"] else "")


def save(comparison: Comparison, out: str | os.PathLike[str]) -> Path:
    """Write the pictures, whole or not at all. Returns the panel's path.

    A name that ends in .png: the panel alone. Any other: a folder with `compare.png`, `result.json`, and for each seed
    `seed-0-unpatched.png`, `-patched`, `-difference`, `-tokens`. Other files in it stay.
    """
    out = Path(out)
    if out.suffix.lower() == ".png":
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(f".{out.stem}.{os.getpid()}.tmp.png")
        try:
            _png(panel(comparison), temporary, comparison)
            os.replace(temporary, out)
        finally:
            temporary.unlink(missing_ok=True)
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    top = brightest(comparison)
    try:
        temporary.mkdir()
        for row in comparison.rows:
            shown = {"unpatched": row.unpatched, "patched": row.patched}
            shown |= {"difference": difference_map(row, top), "tokens": token_map(row)}
            for name, picture in shown.items():
                _png(picture, temporary / f"seed-{row.seed}-{name}.png", comparison)
        write_text(temporary / "result.json", to_json(comparison.to_dict()))
        _png(panel(comparison), temporary / "compare.png", comparison)
        out.mkdir(exist_ok=True)
        for file in temporary.iterdir():
            os.replace(file, out / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out / "compare.png"


def check_target(out: str | os.PathLike[str]) -> None:
    """Raise ConfigError if `save` could not write there; makes nothing."""
    out = Path(out)
    is_panel = out.suffix.lower() == ".png"
    blocked = out.is_dir() if is_panel else any(folder.is_file() for folder in (out, *out.absolute().parents))
    if blocked:
        raise ConfigError(f"{out} is a {'folder' if is_panel else 'file'}: name a folder, or a file that ends in .png")
    there = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    if not os.access(there, os.W_OK):
        raise ConfigError(f"cannot write to {out}: no permission in {there}")


def _png(picture: Image.Image, path: Path, comparison: Comparison) -> None:
    info = PngInfo()
    info.add_text("Description", "\n".join(caption(comparison)))
    picture.save(path, pnginfo=info)


def _zoom(size: tuple[int, int]) -> tuple[int, int]:
    """The size at which a picture is shown: enlarged by a whole factor, or reduced to `LARGEST`."""
    factor: float = max(1, round(SIDE / max(size)))
    if max(size) > LARGEST:
        factor = LARGEST / max(size)
    return round(size[0] * factor), round(size[1] * factor)


@lru_cache
def _font(points: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(points)


def _text(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, points: int, room: int, color: tuple[int, ...] = INK
) -> None:
    """One line; smaller, then cut, where the room (in pixels) is short."""
    while points > 11 and draw.textlength(text, font=_font(points)) > room:
        points -= 1
    if draw.textlength(text, font=_font(points)) > room:
        while text and draw.textlength(text + "...", font=_font(points)) > room:
            text = text[:-1]
        text += "..."
    draw.text(at, text, font=_font(points), fill=color)


def _bar(page: Image.Image, at: tuple[int, int], room: int, scale: tuple[str, ...], low: str, high: str) -> None:
    """A colour scale with a word at both ends."""
    draw, font, (x, y) = ImageDraw.Draw(page), _font(14), at
    left, right = (int(draw.textlength(word, font=font)) + 8 for word in (low, high))
    length = min(room - left - right, 160)
    draw.text((x, y - 2), low, font=font, fill=GRAY)
    page.paste(colored(np.linspace(0, 1, length)[None], scale).resize((length, 12)), (x + left, y))
    draw.text((x + left + length + 8, y - 2), high, font=font, fill=GRAY)

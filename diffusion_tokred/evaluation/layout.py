"""How figures are written: names, numbers with the digits they deserve, tables, Markdown."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .results import SCHEMA

Result = Mapping[str, Any]

NAMES = {
    "psnr": "PSNR (dB)", "ssim": "SSIM", "ms_ssim": "MS-SSIM", "lpips_alex": "LPIPS (alex)", "lpips_vgg": "LPIPS (vgg)",
    "dists": "DISTS", "sharpness_ratio": "sharpness ratio", "clip_distance": "CLIP distance",
    "clip_score": "CLIP score", "fid": "FID", "fid_to_unpatched": "FID to unpatched", "kid": "KID",
    "kid_to_unpatched": "KID to unpatched",
    "cmmd": "CMMD", "image_reward": "ImageReward", "seconds": "seconds", "speedup": "speed-up",
}  # fmt: skip
ARROWS = {"higher": "↑", "lower": "↓"}
NONE = "–"


@dataclass(frozen=True)
class Table:
    """Text in cells, for Markdown and for HTML; the first column names the row."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = field(default=())

    def is_text(self, column: int) -> bool:
        """Whether a column is of words: then it is set to the left, numbers to the right."""
        return not any(re.match(r"[-+<]?\d", row[column]) for row in self.rows)


def check(result: Result) -> Result:
    """The result, if it is one of `evaluate`. Raises ConfigError otherwise."""
    if not isinstance(result, Mapping) or result.get("schema") != SCHEMA or result.get("kind") != "evaluate":
        found = (
            [result.get(key) for key in ("schema", "kind")] if isinstance(result, Mapping) else type(result).__name__
        )
        raise ConfigError(f"this needs a result file of schema {SCHEMA} and kind evaluate, found {found}")
    if not result.get("variants"):
        raise ConfigError("this result file has no variants")
    return result


def read(file: Path) -> Result:
    """The result of `evaluate` in a file. Raises ConfigError for a file that is none."""
    try:
        return check(json.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{file} is no result: {error}") from error


def label(metric: str, better: str | None = None) -> str:
    """A metric's name for people; the toy ones stay toys. With an arrow that points where it is better."""
    if metric.startswith("toy_"):
        text = "toy-" + NAMES.get(metric[4:], metric[4:].replace("_", " "))
    elif metric.startswith("fact_"):
        text = f"{metric[5:].replace('_', ' ')} right"
    else:
        text = NAMES.get(metric, metric.replace("_", " "))
    return f"{text} {ARROWS[better]}" if better in ARROWS else text


def number(value: float | None, width: float | None = None, *, sign: bool = False) -> str:
    """A number with the digits that its interval's width leaves meaning to: two of the width's own."""
    if value is None or not math.isfinite(value):
        return NONE
    if width is not None and 0 < width < math.inf:
        digits = min(6, max(0, 1 - math.floor(math.log10(width))))
    else:
        digits = min(6, max(0, 2 - math.floor(math.log10(abs(value))))) if value else 0
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return text if text.strip("+-0.") else text.lstrip("+-")  # no "-0.00"


def figure(entry: Mapping[str, Any] | None, *, sign: bool = False, unit: str = "") -> str:
    """Such as "24.31 [23.90, 24.70]"; how many pairs are identical where some are; a dash where there is nothing."""
    if not entry:
        return NONE
    value = middle(entry)
    if value is None and entry.get("identical"):
        return "identical"
    width = half(entry)
    text = number(value, width, sign=sign) + unit
    if width is not None and value is not None:
        text += " [" + ", ".join(number(entry[end], width, sign=sign) for end in ("low", "high")) + "]"
    return text + (f" ({entry['identical']} identical)" if entry.get("identical") else "")


def markdown_table(table: Table) -> list[str]:
    """A table's lines."""
    ruler = "|" + "".join("---|" if table.is_text(i) or not i else "---:|" for i in range(len(table.head)))
    return ["| " + " | ".join(map(escaped, row)) + " |" for row in (table.head,)] + [ruler] + [
        "| " + " | ".join(map(escaped, row)) + " |" for row in table.rows
    ]  # fmt: skip


def escaped(text: str) -> str:
    """Text as one line that means nothing to Markdown: no cells, links, emphasis, code or HTML of its own."""
    flat = " ".join(str(text).split()).replace("\\", "\\\\")
    return re.sub(r"[|*`<]|(?<=\])[(:\[]|(?<!\w)_|_(?!\w)", lambda mark: "\\" + mark[0], flat)


def middle(entry: Mapping[str, Any]) -> Any:
    """An entry's figure, whatever it is called; None where there is none."""
    return next((entry[key] for key in ("mean", "median", "value") if entry.get(key) is not None), None)


def half(entry: Mapping[str, Any]) -> float | None:
    """Half the width of an entry's interval; None where it has none."""
    low, high = entry.get("low"), entry.get("high")
    return None if low is None or high is None else (high - low) / 2

"""The prompts of an evaluation: the toy world's own, those of a file, or a data set's."""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..zoo.scenes import evaluation_prompts
from .results import prompts_of

COLUMNS = ("prompt", "caption", "text")  # tried in this order
SCENES = {"scenes": False, "scenes-held-out": True}  # name -> whether a pair was never trained
_PATIENCE = 5.0  # seconds to wait for the hub's first answer
_Row = tuple[int, dict[str, Any]]  # a line's number and what it has


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the order of their indices. A prompt may come twice: pictures are named by index, so none is lost.

    Attributes:
        name: where they come from.
        texts: the prompts, without white space around them.
        ids: names that the source gives them (column `id`), if it does; a scene's is its number.
    """

    name: str
    texts: tuple[str, ...]
    ids: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "texts", tuple(self.texts))
        if not self.texts:
            raise ConfigError(f"{self.name} has no prompts")
        for index, text in enumerate(self.texts):
            if not isinstance(text, str) or not text.strip() or "\0" in text:
                raise ConfigError(f"prompt {index} of {self.name} is no text, or empty, or has a NUL: {text!r}")
        if self.ids is not None and len(self.ids) != len(self.texts):
            raise ConfigError(f"{self.name} has {len(self.texts)} prompts and {len(self.ids)} ids")

    @property
    def n(self) -> int:
        return len(self.texts)

    @property
    def unique(self) -> int:
        """How many differ."""
        return len(set(self.texts))

    @property
    def sha256(self) -> str:
        """Of the texts joined by newlines, as in result files."""
        return self.to_dict()["sha256"]

    def to_dict(self) -> dict[str, Any]:
        """The `prompts` part of a result."""
        return {"name": self.name} | prompts_of(self.texts)

    def without_repeats(self) -> PromptSet:
        """The first of each."""
        first: dict[str, int] = {}
        for index, text in enumerate(self.texts):
            first.setdefault(text, index)
        return self._only(list(first.values()))

    def first(self, count: int) -> PromptSet:
        """The first `count`, or all if there are fewer."""
        return self._only(range(min(count, self.n)))

    def _only(self, places: Sequence[int]) -> PromptSet:
        ids = None if self.ids is None else tuple(self.ids[i] for i in places)
        return PromptSet(self.name, tuple(self.texts[i] for i in places), ids)


def sha8(prompt: str) -> str:
    """The first 8 hex digits of a prompt's sha256: part of its pictures' names."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:8]


def load(source: str, limit: int | None = None, column: str | None = None, unique: bool = False) -> PromptSet:
    """Prompts by name.

    Args:
        source: "scenes" or "scenes-held-out", the embedded pipelines' 512; a .txt file, one prompt a line; a .csv, .tsv
            or .jsonl file; or a data set of the hub, `owner/name[:split[:column]]` (needs the package `datasets`).
        limit: at most so many, from the first on.
        column: which column or key has the prompts; by default the first there is of `COLUMNS`.
        unique: drop prompts that came before.

    Raises:
        ConfigError: no such source or column, no prompts, an empty or unreadable line, with its number.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"the limit of prompts must be at least 1, got {limit}")
    suffix = Path(source).suffix.lower()
    if source in SCENES:
        if column is not None:
            raise ConfigError(f"{source} has no columns: leave {column!r} out")
        texts = evaluation_prompts(limit or 512, held_out=SCENES[source])
        found = PromptSet(source, tuple(texts), tuple(map(str, range(len(texts)))))
    elif suffix in _READERS:
        found = _from_file(Path(source).expanduser(), _READERS[suffix], column)
    elif Path(source).exists():
        what = "a folder" if Path(source).is_dir() else f"no {', '.join(_READERS)}"
        raise ConfigError(f"{source} is {what}: name a file that ends in {', '.join(_READERS)}")
    elif match := re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([^:]+))?(?::([^:]+))?", source):
        found = _from_hub(match[1], match[2], column or match[3])
    else:
        raise ConfigError(
            f"no prompts {source!r}: it is none of {', '.join(SCENES)}, no file that ends in {', '.join(_READERS)}, and"
            " no data set of the hub (owner/name, owner/name:split or owner/name:split:column)"
        )
    found = found.without_repeats() if unique else found
    return found if limit is None else found.first(limit)


def _from_file(path: Path, read: Callable[[str, str], Iterator[_Row]], column: str | None) -> PromptSet:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the prompts {path}: {error.strerror}") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise ConfigError(f"{path} is UTF-16, not UTF-8: iconv -f utf-16 -t utf-8 converts it") from error
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"line {line} of {path} is not UTF-8 (byte 0x{data[error.start]:02x}): iconv -f latin1 -t utf-8 may convert"
            " it"
        ) from error
    if read is _lines and column is not None:
        raise ConfigError(f"{path} has no columns: leave {column!r} out")
    rows = [(f"line {line} of {path}", row) for line, row in read(text, str(path))]
    if not rows:
        raise ConfigError(f"{path} has no prompts: it is empty")
    return _pick(path.name, str(path), rows, column)


def _pick(name: str, where: str, rows: Sequence[tuple[str, dict[str, Any]]], column: str | None) -> PromptSet:
    """The prompts among rows, each with the words that say where it is."""
    key = _column(list(rows[0][1]), column, where)
    texts = []
    for place, row in rows:
        value = row.get(key)
        if not isinstance(value, str):
            raise ConfigError(f"{place} has no text for {key!r}: it has {_short(value if key in row else row)}")
        if not value.strip():
            raise ConfigError(f"{place} is empty where the prompt should be: fill it in or delete the line")
        if "\0" in value:
            raise ConfigError(f"{place} has a NUL character")
        texts.append(value.strip())
    ids = [row.get("id") for _, row in rows]
    return PromptSet(name, tuple(texts), None if None in ids else tuple(map(str, ids)))


def _column(names: Sequence[str], asked: str | None, where: str) -> str:
    if asked is not None and asked in names:
        return asked
    for wanted in COLUMNS if asked is None else ():
        for name in names:
            if name.strip().lower() == wanted:
                return name
    missing = f"none of the columns {', '.join(COLUMNS)}" if asked is None else f"no column {asked!r}"
    raise ConfigError(f"{where} has {missing}: its columns are {', '.join(map(repr, names))}; name one of them")


def _lines(text: str, where: str) -> Iterator[_Row]:
    """Of a text file. Only newlines end a line: `splitlines` would also split at U+2028 and the like."""
    lines = text.rstrip().split("\n") if text.strip() else []
    for number, line in enumerate(lines, 1):
        yield number, {"prompt": line}


def _table(delimiter: str) -> Callable[[str, str], Iterator[_Row]]:
    def read(text: str, where: str) -> Iterator[_Row]:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            names = list(reader.fieldnames or ())
            for row in reader:
                if None in row or None in row.values():
                    count = len(names) + len(row.get(None) or ()) - sum(value is None for value in row.values())
                    raise ConfigError(
                        f"line {reader.line_num} of {where} has {count} fields, the first line has {len(names)}: put"
                        " text with a separator in double quotes"
                    )
                yield reader.line_num, row
        except csv.Error as error:
            raise ConfigError(f"line {reader.line_num} of {where} cannot be read: {error}") from error

    return read


def _objects(text: str, where: str) -> Iterator[_Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"line {number} of {where} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ConfigError(f'line {number} of {where} is no object such as {{"prompt": "..."}}: it is {_short(row)}')
        yield number, row


_READERS: dict[str, Callable[[str, str], Iterator[_Row]]] = {
    ".txt": _lines,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".jsonl": _objects,
}


def _from_hub(name: str, split: str | None, column: str | None) -> PromptSet:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise ConfigError(
            f"{name} is no file here; for a data set of the hub: pip install datasets (or name a file of prompts)"
        ) from None
    from huggingface_hub import HfApi, constants

    todo = f"fetch it where there is a network, with `hf download --repo-type dataset {name}`, or name a file"
    if not constants.HF_HUB_OFFLINE:
        try:
            HfApi().dataset_info(name, timeout=_PATIENCE)
        except Exception as error:
            if getattr(getattr(error, "response", None), "status_code", None) in (401, 403, 404):
                raise ConfigError(
                    f"{constants.ENDPOINT} has no data set {name}, or it is private or gated: check the spelling, or"
                    " `hf auth login`"
                ) from None
            raise ConfigError(
                f"{constants.ENDPOINT} cannot be reached for the data set {name}: HF_HUB_OFFLINE=1 takes it from the"
                f" cache if it is there; else {todo}"
            ) from None
    try:
        splits = list(datasets.get_dataset_split_names(name))
        if split is None and len(splits) == 1:
            split = splits[0]
        if split not in splits:
            raise ConfigError(f"the splits of {name} are {', '.join(splits)}: name one, as {name}:{splits[0]}")
        table = datasets.load_dataset(name, split=split)
        key = _column(list(table.column_names), column, f"{name}:{split}")
        ids = list(table["id"]) if "id" in table.column_names else [None] * len(table)
        rows = [{key: text, "id": number} for text, number in zip(table[key], ids, strict=True)]
    except ConfigError:
        raise
    except Exception as error:
        offline = f", and HF_HUB_OFFLINE is set: {todo}" if constants.HF_HUB_OFFLINE else ""
        text = " ".join(str(error).split())[:300]
        raise ConfigError(f"the data set {name} cannot be read{offline} ({type(error).__name__}: {text})") from error
    if not rows:
        raise ConfigError(f"{name}:{split} is empty")
    return _pick(f"{name}:{split}", name, [(f"row {i} of {name}", row) for i, row in enumerate(rows)], key)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else text[:77] + "..."

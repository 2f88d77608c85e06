"""The folder of a run of pictures: written so that a kill at any moment loses at most the pictures being drawn.

    run.json                                          what was asked, and all that decides a picture
    images/VARIANT/000012-0-1a2b3c4d.png              prompt's index, repeat, first digits of the prompt's sha256
    images/VARIANT/manifest-RANK.jsonl                one line a picture, by the process that wrote it
    failures.jsonl                                    pictures that are black or had values that are not finite
    .lock                                             see `locks`

A picture counts if a whole line of a manifest and the file agree. It is written under another name, renamed, and only
then listed, so what counts is whole.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import io
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..errors import ConfigError
from .prompts import PromptSet, sha8
from .results import to_json, write_text
from .settings import differences
from .variants import Variant

SCHEMA = "tokred.run/1"
AGAIN = "delete it and run the same command again: it is drawn anew"
BEFORE = ("claim.json", "pilot.json", "timing.json")  # what an evaluation writes before anything is drawn
_STRIDE = 1_000_003  # between the seeds of repeats
_Key = tuple[int, int]  # index and repeat


@dataclass(frozen=True)
class Item:
    """A picture of a run. `file` is relative to the run's folder; `failure` says what is wrong with it, if anything."""

    variant: str
    index: int
    repeat: int
    prompt: str
    seed: int
    file: str
    size: tuple[int, int]  # width, height
    sha256: str
    failure: str | None = None


@dataclass(frozen=True)
class Run:
    """What a folder has.

    Attributes:
        asked: `run.json`.
        items: the pictures that count, by variant, in the order of repeat and index.
        missing: (index, repeat) of those that are still to be drawn, by variant.
    """

    out: Path
    asked: dict[str, Any]
    prompts: PromptSet
    items: dict[str, tuple[Item, ...]]
    missing: dict[str, tuple[_Key, ...]]

    @property
    def variants(self) -> tuple[Variant, ...]:
        return tuple(map(Variant.from_dict, self.asked["variants"]))

    @property
    def complete(self) -> bool:
        return not any(self.missing.values())

    @property
    def failures(self) -> list[dict[str, Any]]:
        """What is wrong with pictures, as in `failures.jsonl`."""
        return [
            {"variant": i.variant, "index": i.index, "repeat": i.repeat, "file": i.file, "failure": i.failure}
            for items in self.items.values()
            for i in items
            if i.failure
        ]


def seed_of(base_seed: int, index: int, repeat: int) -> int:
    """Of an item's noise."""
    return base_seed + _STRIDE * repeat + index


def file_of(variant: str, index: int, repeat: int, prompt: str) -> str:
    """Where a picture is, in the run's folder."""
    return f"images/{variant}/{index:06d}-{repeat}-{sha8(prompt)}.png"


def settings_hash(asked: Mapping[str, Any], variant: Mapping[str, Any]) -> str:
    """Of all that decides the pictures of a variant, beside their prompts and seeds; it is in every picture."""
    text = json.dumps([asked["settings"], variant], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- writing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """A disk that is full, a folder without permission: one line, and what to do."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"cannot write to {error.filename or out}: {error.strerror or error}. Pictures that are listed are safe:"
            " when there is room, the same command goes on"
        ) from error


def begin(out: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Write `run.json`, or add variants and repeats to the one that is there. Returns what is in it now.

    Raises:
        ConfigError: the folder is something else's, or its pictures were made with other settings.
    """
    file = out / "run.json"
    if before := refuse_others(out, asked):
        known = [variant["name"] for variant in before["variants"]]
        new = [variant for variant in asked["variants"] if variant["name"] not in known]
        grown = {"variants": before["variants"] + new, "repeats": max(before["repeats"], asked["repeats"])}
        asked = before | grown
        if asked == before:
            return before
    else:
        asked = {"schema": SCHEMA, "created": _now()} | asked
    for rest in out.glob(".run.json.*.tmp"):  # of a killed process
        rest.unlink()
    write_text(file, to_json(asked))
    return asked


def refuse_others(out: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `run.json` says, if there are pictures that it binds. Raises as `begin`; writes nothing."""
    before = read_asked(out) if (out / "run.json").exists() else None
    if before and any(path.stat().st_size for path in out.glob("images/*/manifest-*.jsonl")):
        if found := _changes(before, asked):
            more = f"; and {len(found) - 6} more" if len(found) > 6 else ""
            raise ConfigError(
                f"{out} has pictures of another run: {'; '.join(found[:6])}{more}. Give the same settings, or name"
                " another folder"
            )
        return before
    there = sorted(p.name for p in out.iterdir()) if before is None and out.is_dir() else []
    if others := [name for name in there if name[0] != "." and name not in BEFORE]:
        raise ConfigError(f"{out} has {others[0]} and no run.json: name an empty or a new folder")
    return None


def repair(out: Path, variant: str) -> None:
    """Remove what a killed process left half-written. Only when nobody else writes."""
    folder = out / "images" / variant
    folder.mkdir(parents=True, exist_ok=True)
    for rest in folder.glob(".*.tmp"):
        rest.unlink()
    for manifest in folder.glob("manifest-*.jsonl"):
        data = manifest.read_bytes()
        whole = b"".join(line + b"\n" for line in data.split(b"\n") if _record(line) is not None)
        if data != whole:
            write_text(manifest, whole.decode())


def add(
    out: Path, rank: int, item: Item, pixels: np.ndarray, settings: str, before: Mapping[str, Any] | None = None
) -> None:
    """Write a picture and list it.

    Args:
        item: without size and sha256, which are found here.
        pixels: uint8 `(H, W, 3)`.
        settings: `settings_hash`.
        before: the record of the same picture if it counts already; it is left alone.
    """
    path = out / item.file
    data = _encode(pixels, _notes(item, settings))
    digest = hashlib.sha256(data).hexdigest()
    if before is not None:
        if digest == before["sha256"]:
            return
        again = "drawn a second time it had other bytes; the first was kept"
        record = dict(before) | {"failure": f"{before['failure']}; {again}" if before.get("failure") else again}
    else:
        if not (path.exists() and path.read_bytes() == data):
            _replace(path, data)
        record = {"index": item.index, "repeat": item.repeat, "prompt": sha8(item.prompt), "seed": item.seed}
        record |= {"file": item.file, "sha256": digest, "bytes": len(data), "size": list(pixels.shape[1::-1])}
        record |= {"failure": item.failure} if item.failure else {}
    _append(path.parent / f"manifest-{rank}.jsonl", json.dumps(record) + "\n")


def write_failures(run: Run) -> None:
    """`failures.jsonl`: empty if nothing is wrong."""
    write_text(run.out / "failures.jsonl", "".join(json.dumps(line) + "\n" for line in run.failures))


def _encode(pixels: np.ndarray, notes: Mapping[str, str]) -> bytes:
    info = PngInfo()
    for key, text in notes.items():
        info.add_text(key, text)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def _notes(item: Item, settings: str) -> dict[str, str]:
    """What a picture says of itself."""
    return {"prompt": item.prompt, "seed": str(item.seed), "variant": item.variant, "settings": settings}


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _append(path: Path, line: str) -> None:
    """A whole line, or none if the disk is full."""
    data, handle = line.encode(), os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        end = os.fstat(handle).st_size
        try:
            if os.write(handle, data) < len(data):
                os.write(handle, data)  # raises: why it stopped in the middle
                raise OSError(f"a line of {path} was cut")
        except OSError:
            os.ftruncate(handle, end)
            raise
    finally:
        os.close(handle)


# --- reading ---------------------------------------------------------------------------------------------------------


def read_asked(out: Path) -> dict[str, Any]:
    """`run.json`. Raises ConfigError if it is not there or not ours."""
    file = out / "run.json"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"no run in {out} ({file}: {error.strerror}): draw its pictures first") from error
    except ValueError as error:
        raise ConfigError(f"{file} is damaged: {error}; bring it back, or name another folder") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise ConfigError(f"{file} is not of the schema {SCHEMA!r}: it is {found!r}")
    return data


def load_run(out: str | os.PathLike[str], verify: bool = False) -> Run:
    """What a run's folder has and lacks.

    Args:
        out: the folder.
        verify: compare every file's sha256, not only its size and what it says of itself.

    Raises:
        ConfigError: there is no run in it.
    """
    out = Path(out)
    asked = read_asked(out)
    prompts = PromptSet(asked["prompts"]["name"], tuple(asked["texts"]), asked["ids"] and tuple(asked["ids"]))
    wanted = [(index, repeat) for repeat in range(asked["repeats"]) for index in range(prompts.n)]
    items, missing = {}, {}
    for variant in asked["variants"]:
        name, found = variant["name"], records(out, asked, prompts, variant, verify)
        items[name] = tuple(_item(name, found[key], prompts) for key in wanted if key in found)
        missing[name] = tuple(key for key in wanted if key not in found)
    return Run(out, asked, prompts, items, missing)


def records(
    out: Path, asked: Mapping[str, Any], prompts: PromptSet, variant: Mapping[str, Any], verify: bool = False
) -> dict[_Key, dict[str, Any]]:
    """The lines of a variant's manifests that count, by index and repeat; of equal ones, that which says most."""
    settings, lines = settings_hash(asked, variant), defaultdict[_Key, list[dict[str, Any]]](list)
    for manifest in sorted((out / "images" / variant["name"]).glob("manifest-*.jsonl")):
        for line in manifest.read_bytes().split(b"\n")[:-1]:  # what follows the last newline is not whole
            if (record := _record(line)) is not None and record["index"] < prompts.n:
                lines[record["index"], record["repeat"]].append(record)
    found = {}
    for key, several in lines.items():
        notes = _notes(_item(variant["name"], several[0], prompts), settings)
        if agreeing := [record for record in several if _agrees(out, record, notes, verify)]:
            found[key] = max(agreeing, key=lambda record: len(record.get("failure", "")))
    return found


def pictures(run: Run | str | os.PathLike[str], variant: str) -> Iterator[tuple[Item, torch.Tensor]]:
    """The pictures of a variant in order, each with its uint8 tensor `(3, H, W)`.

    Raises:
        ConfigError: no such variant, no pictures, a damaged file, or one of another size than the first; names it.
    """
    run = run if isinstance(run, Run) else load_run(run)
    if variant not in run.items:
        raise ConfigError(f"{run.out} has no variant {variant!r}: it has {', '.join(run.items)}")
    if not run.items[variant]:
        raise ConfigError(f"{run.out / 'images' / variant} has no pictures: draw them first")
    first = run.items[variant][0]
    for item in run.items[variant]:
        path = run.out / item.file
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}; run the same command again") from error
        if hashlib.sha256(data).hexdigest() != item.sha256:
            raise ConfigError(f"{path} is damaged, its bytes are not those that were written: {AGAIN}")
        if item.size != first.size:
            raise ConfigError(
                f"{path} is {item.size[0]}x{item.size[1]}, {first.file} is {first.size[0]}x{first.size[1]}: pictures"
                " of one run have one size"
            )
        with Image.open(io.BytesIO(data)) as picture:
            pixels = np.array(picture.convert("RGB"))
        yield item, torch.from_numpy(pixels).movedim(-1, 0).contiguous()


def _item(variant: str, record: Mapping[str, Any], prompts: PromptSet) -> Item:
    width, height = record["size"]
    return Item(
        variant=variant,
        index=record["index"],
        repeat=record["repeat"],
        prompt=prompts.texts[record["index"]],
        seed=record["seed"],
        file=record["file"],
        size=(width, height),
        sha256=record["sha256"],
        failure=record.get("failure"),
    )


def _record(line: bytes) -> dict[str, Any] | None:
    """A manifest's line; None if it is not whole."""
    try:
        record = json.loads(line)
        return record if {"index", "repeat", "seed", "file", "sha256", "bytes", "size"} <= record.keys() else None
    except (ValueError, AttributeError):
        return None


def _agrees(out: Path, record: Mapping[str, Any], notes: Mapping[str, str], verify: bool) -> bool:
    """Whether the file is the one that the line is about."""
    path = out / record["file"]
    try:
        if path.stat().st_size != record["bytes"]:
            return False
        with Image.open(path) as picture:
            if list(picture.size) != record["size"] or any(picture.info.get(key) != notes[key] for key in notes):
                return False
        return not verify or hashlib.sha256(path.read_bytes()).hexdigest() == record["sha256"]
    except (OSError, SyntaxError, ValueError):  # what Pillow says of damaged files
        return False


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of two runs' settings differs, in words; variants that only one has do not count."""
    names = {variant["name"] for variant in before["variants"]} & {variant["name"] for variant in now["variants"]}

    def compared(asked: Mapping[str, Any]) -> dict[str, Any]:
        return asked["settings"] | {v["name"]: v for v in asked["variants"] if v["name"] in names}

    return differences(compared(before), compared(now))


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")

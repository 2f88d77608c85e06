"""The pictures of an evaluation: every prompt, unpatched and patched, from the same noise.

What a picture is depends on its prompt and seed, its variant, the batch it is drawn in and the number of threads;
all of these are fixed before the work is dealt out, so it does not depend on how many processes there are, on which of
them draws it, or on how often the run was killed and started again.
"""

from __future__ import annotations

import datetime
import inspect
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import ConfigError, StateError, UnsupportedError
from ..patching import denoisers
from . import launch, store
from .locks import Lock
from .models import called, needs_prompt, quiet
from .prompts import PromptSet
from .settings import differences, settings_of
from .variants import Variant, check

Progress = Callable[[str, int, int], None]  # what is drawn, pictures that there are, pictures in all
SEED_SHIFT = 2_000_000_011  # of the anchor "seed"; below 2**32, torch's CPU generator takes no more of a seed
# What is ours to decide in a call of the pipeline.
_OURS = ("prompt", "generator", "output_type", "return_dict", "num_images_per_prompt", "latents")
_Batch = tuple[int, tuple[int, ...]]  # repeat, indices


@dataclass(frozen=True)
class Generated:
    """What a call of `generate` did: `drawn` pictures by all processes, beside `kept` ones that were there already."""

    run: store.Run
    drawn: int
    kept: int
    seconds: float


@torch.no_grad()
def generate(
    pipe: Any,
    prompts: PromptSet | Sequence[str],
    variants: Sequence[Variant],
    out: str | os.PathLike[str],
    *,
    repeats: int = 1,
    base_seed: int = 0,
    batch: int = 1,
    call: Mapping[str, Any] | None = None,
    model: str | None = None,
    threads: int = 1,
    processes: launch.Processes | None = None,
    progress: Progress | None = None,
) -> Generated:
    """Draw what is missing of a run. Variants and repeats may be added to a run later; nothing else may differ.

    Args:
        pipe: a text-to-image pipeline without a patch; left without one.
        prompts: what to draw.
        variants: settings, the unpatched one first.
        out: the run's folder, see `store`.
        repeats: pictures a prompt and variant.
        base_seed: the noise of a picture is that of a CPU generator with `base_seed + 1_000_003 * repeat + index`
            (the anchor "seed": plus `SEED_SHIFT`); the methods' own draws take `base_seed`.
        batch: pictures drawn together. The last batch of a repeat may be smaller.
        call: more keyword arguments of the pipeline, such as `num_inference_steps`.
        model: name for `run.json`.
        threads: of a process, on the CPU. Not the machine's number by default: rounding depends on it, and pictures
            must not. More processes are the way to use more cores.
        processes: those of `launch.start`; found out by default.
        progress: called after each batch.

    Raises:
        ConfigError: settings that cannot be right, or not those that the folder's pictures were made with; a second
            run at work in it; a full disk; a call that the pipeline refuses. Pictures that there are stay.
        UnsupportedError: not a text-to-image pipeline, or a method that cannot work on it.
        StateError: the pipeline is patched already.
    """
    out, processes = Path(out), processes or launch.start(pipe._execution_device)
    variants, prompts, call, asked = _asked(pipe, prompts, variants, repeats, base_seed, batch, call, model, threads)
    started, before_threads, lock = time.perf_counter(), torch.get_num_threads(), Lock(out)
    torch.set_num_threads(threads)
    try:
        _alike(processes.gather(asked["settings"]))
        plan = processes.share(lambda: _plan(lock, out, asked, prompts, variants, repeats, batch))
        with store.writing(out):
            lock.share()
        painter = _Painter(pipe, prompts, out, plan, call, base_seed, processes, progress)
        drawn = sum(processes.gather(painter.draw(variants)))
        run = processes.share(lambda: _finish(out, variants, repeats))
    finally:
        lock.release()
        torch.set_num_threads(before_threads)
    return Generated(run, drawn, plan.kept, time.perf_counter() - started)


def check_run(
    pipe: Any,
    prompts: PromptSet | Sequence[str],
    variants: Sequence[Variant],
    out: str | os.PathLike[str],
    *,
    repeats: int = 1,
    base_seed: int = 0,
    batch: int = 1,
    call: Mapping[str, Any] | None = None,
    model: str | None = None,
    threads: int = 1,
) -> None:
    """Raise what `generate` would raise before it draws; nothing is written."""
    *_, asked = _asked(pipe, prompts, variants, repeats, base_seed, batch, call, model, threads)
    store.refuse_others(Path(out), asked)


def _asked(
    pipe: Any,
    prompts: PromptSet | Sequence[str],
    variants: Sequence[Variant],
    repeats: int,
    base_seed: int,
    batch: int,
    call: Mapping[str, Any] | None,
    model: str | None,
    threads: int,
) -> tuple[tuple[Variant, ...], PromptSet, dict[str, Any], dict[str, Any]]:
    """Variants, prompts and the call, if they can work, and what `run.json` is to say of them."""
    variants = check(variants)
    prompts = prompts if isinstance(prompts, PromptSet) else PromptSet("list", tuple(prompts))
    for name, value in {"repeats": repeats, "batch": batch, "threads": threads, "base_seed": base_seed + 1}.items():
        if value < 1:
            raise ConfigError(
                f"{name} must be at least {int(name != 'base_seed')}, got {value - (name == 'base_seed')}"
            )
    arguments = _arguments(pipe, call or {}, variants)
    for variant in variants:  # refuse what cannot work before anything is spent
        with variant.applied(pipe):
            pass
    asked = {
        "model": model or getattr(pipe.config, "_name_or_path", None) or None,
        "prompts": prompts.to_dict(),
        "texts": list(prompts.texts),
        "ids": None if prompts.ids is None else list(prompts.ids),
        "repeats": repeats,
        "variants": [variant.to_dict() for variant in variants],
        "settings": settings_of(pipe, prompts, arguments, base_seed, batch, threads),
    }
    return variants, prompts, arguments, asked


class Pace:
    """In words, how far a run is: "12 of 512 pictures, 0.85 a second, 9:48 left"."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.first: int | None = None

    def __call__(self, done: int, total: int) -> str:
        if self.first is None:  # what was there before counts neither as drawn nor as time
            self.first, self.started = done, time.perf_counter()
        text, drawn = f"{done} of {total} pictures", done - self.first
        if not drawn:
            return text
        rate = drawn / (time.perf_counter() - self.started)
        left = datetime.timedelta(seconds=round((total - done) / rate))
        return f"{text}, {rate:.3g} a second, {left} left"


def batches(n: int, repeats: int, batch: int) -> list[_Batch]:
    """All work on a variant, cut before it is dealt out: (repeat, indices). More repeats leave the first ones alone."""
    return [
        (repeat, tuple(range(start, min(start + batch, n))))
        for repeat in range(repeats)
        for start in range(0, n, batch)
    ]


@dataclass(frozen=True)
class _Plan:
    """What is to do: (variant's name, batch), dealt out whole; and the records of pictures in these that count."""

    todo: tuple[tuple[str, _Batch], ...]
    kept: int
    total: int
    hashes: dict[str, str]
    records: dict[str, dict[tuple[int, int], dict[str, Any]]]


def _plan(
    lock: Lock,
    out: Path,
    asked: dict[str, Any],
    prompts: PromptSet,
    variants: Sequence[Variant],
    repeats: int,
    batch: int,
) -> _Plan:
    """In the first process: prepare the folder, and see what it lacks."""
    with store.writing(out):
        lock.alone()
        asked = store.begin(out, asked)
        todo, kept, hashes, records = [], 0, {}, {}
        for variant in (v.to_dict() for v in variants):
            name = variant["name"]
            store.repair(out, name)
            hashes[name] = store.settings_hash(asked, variant)
            found = store.records(out, asked, prompts, variant)
            work = [(name, some) for some in batches(prompts.n, repeats, batch)]
            partly = [piece for piece in work if any((i, piece[1][0]) not in found for i in piece[1][1])]
            kept += sum(repeat < repeats for _, repeat in found)
            todo += partly
            records[name] = {(i, r): found[i, r] for _, (r, some) in partly for i in some if (i, r) in found}
        lock.share()
    return _Plan(tuple(todo), kept, len(variants) * repeats * prompts.n, hashes, records)


def _finish(out: Path, variants: Sequence[Variant], repeats: int) -> store.Run:
    """In the first process, when all are done."""
    run = store.load_run(out)
    lost = [(v.name, *key) for v in variants for key in run.missing[v.name] if key[1] < repeats]
    if lost:
        raise ConfigError(
            f"{len(lost)} pictures that were drawn are not in {out}, the first is {lost[0]} (variant, index, repeat):"
            " do all nodes see the same folder?"
        )
    with store.writing(out):
        store.write_failures(run)
    return run


class _Painter:
    """One process' share of the work."""

    def __init__(
        self,
        pipe: Any,
        prompts: PromptSet,
        out: Path,
        plan: _Plan,
        call: dict[str, Any],
        base_seed: int,
        processes: launch.Processes,
        progress: Progress | None,
    ) -> None:
        self.pipe, self.prompts, self.out, self.plan, self.call = pipe, prompts, out, plan, call
        self.base_seed, self.processes, self.progress = base_seed, processes, progress
        self.drawn = 0

    def draw(self, variants: Sequence[Variant]) -> int:
        """Draw this process' batches; returns how many pictures are new."""
        known = {variant.name: variant for variant in variants}
        share = self.plan.todo[self.processes.rank :: self.processes.world]
        with quiet(self.pipe):
            for name, pieces in itertools.groupby(share, key=lambda piece: piece[0]):
                with known[name].applied(self.pipe, self.base_seed):
                    for _, (repeat, indices) in pieces:
                        self._batch(known[name], repeat, indices)
        return self.drawn

    def _batch(self, variant: Variant, repeat: int, indices: Sequence[int]) -> None:
        shift = SEED_SHIFT if variant.anchor == "seed" else 0
        texts = [self.prompts.texts[i] for i in indices]
        seeds = [store.seed_of(self.base_seed, i, repeat) + shift for i in indices]
        self._tell(variant.name)
        images, flagged = _images(self.pipe, texts, seeds, self.call | dict(variant.call))
        for index, text, seed, image, flag in zip(indices, texts, seeds, images, flagged, strict=True):
            pixels, failure = _pixels(image, flag)
            item = store.Item(
                variant=variant.name,
                index=index,
                repeat=repeat,
                prompt=text,
                seed=seed,
                file=store.file_of(variant.name, index, repeat, text),
                size=(pixels.shape[1], pixels.shape[0]),
                sha256="",
                failure=failure,
            )
            before = self.plan.records[variant.name].get((index, repeat))
            with store.writing(self.out):
                store.add(self.out, self.processes.rank, item, pixels, self.plan.hashes[variant.name], before)
            self.drawn += before is None
        self._tell(variant.name)

    def _tell(self, what: str) -> None:
        """The other processes are taken to be as far as this one."""
        if self.progress is not None:
            done = self.plan.kept + self.drawn * self.processes.world
            self.progress(what, min(done, self.plan.total), self.plan.total)


def _images(pipe: Any, texts: list[str], seeds: list[int], call: dict[str, Any]) -> tuple[np.ndarray, list[bool]]:
    """A batch from the pipeline: float `(B, H, W, 3)`, in [0, 1] where finite; and what its safety checker blanked."""
    known = inspect.signature(type(pipe).__call__).parameters
    arguments = call | {"prompt": texts, "generator": [torch.Generator().manual_seed(seed) for seed in seeds]}
    for name, value in call.items():
        if isinstance(value, str) and "prompt" in name:  # one text for all: pipelines want as many as prompts
            arguments[name] = [value] * len(texts)
    if "output_type" in known:
        arguments["output_type"] = "np"  # pictures before they are rounded: what is not finite still shows
    who = type(pipe).__name__
    try:
        with called(pipe):
            made = pipe(**arguments)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"out of memory with {len(texts)} pictures at once: draw fewer at once, or smaller ones, or in another"
            " dtype; each in another folder"
        ) from error
    images = getattr(made, "images", None)
    if images is None:
        raise UnsupportedError(f"{who} returns {', '.join(getattr(made, 'keys', list)())}, no images")
    if isinstance(images, list) and isinstance(images[0], Image.Image):
        images = np.stack([np.array(image.convert("RGB"), dtype=np.float32) / 255 for image in images])
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[0] != len(texts) or images.shape[3] != 3:
        raise UnsupportedError(
            f"{who} returns images of shape {images.shape} for {len(texts)} prompts, not (B, H, W, 3)"
        )
    wanted, found = (call.get("width"), call.get("height")), images.shape[2:0:-1]
    if any(w not in (None, f) for w, f in zip(wanted, found, strict=True)):
        raise ConfigError(
            f"{who} was asked for {wanted[0]}x{wanted[1]} pixels and makes {found[0]}x{found[1]}: ask for a size that"
            " it can make"
        )
    return images, list(getattr(made, "nsfw_content_detected", None) or [False] * len(texts))


def _pixels(image: np.ndarray, flagged: bool) -> tuple[np.ndarray, str | None]:
    """uint8 `(H, W, 3)`, rounded as diffusers does, and what is wrong with it, if anything."""
    strange = int((~np.isfinite(image)).sum())
    whole = np.nan_to_num(image.astype(np.float32), nan=0.0, posinf=1.0, neginf=0.0)
    pixels = (whole * 255).round().astype(np.uint8)
    if strange:
        return pixels, f"{strange} of {image.size} values are not finite; nan is saved as 0"
    if not pixels.any():
        return pixels, "black, by the pipeline's safety checker" if flagged else "black: all values are 0"
    return pixels, None


def _arguments(pipe: Any, call: Mapping[str, Any], variants: Sequence[Variant]) -> dict[str, Any]:
    """The pipeline's arguments, with its own steps and guidance where none are given."""
    needs_prompt(pipe)
    if any("_tokred" in denoiser.__dict__ for denoiser in denoisers(pipe)):
        raise StateError("the pipeline is patched already: unpatch it, a run needs it without")
    known = inspect.signature(type(pipe).__call__).parameters
    if "generator" not in known:
        raise UnsupportedError(f"{type(pipe).__name__} takes no generator: its noise cannot be fixed")
    for name in itertools.chain(call, *(variant.call for variant in variants)):
        if name in _OURS or "callback" in name:
            raise ConfigError(f"{name} is not for the call: generate decides it")
        if name not in known:
            raise UnsupportedError(f"{type(pipe).__name__} takes no {name}")
    own = {name: known[name].default for name in ("num_inference_steps", "guidance_scale") if name in known}
    arguments = own | dict(call)
    most = arguments.get("num_inference_steps")
    for variant in variants:
        count = variant.call.get("num_inference_steps")
        if variant.anchor == "steps" and isinstance(most, int) and count is not None and count >= most:
            whose = "" if "num_inference_steps" in call else ", the pipeline's own number: say how many the run has"
            raise ConfigError(f"{variant.name}: {count} steps are not fewer than the run's {most}{whose}")
    return arguments


def _alike(settings: list[dict[str, Any]]) -> None:
    """Raise if the processes would not draw the same."""
    for rank, other in enumerate(settings):
        if found := differences(settings[0], other):
            raise launch.SharedError(f"processes 0 and {rank} would not draw the same pictures: {'; '.join(found[:6])}")

"""A pipeline by name: embedded (`zoo.NAMES`), a local folder, or a hub id. A failure takes seconds, and one line."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import zoo
from ..errors import ConfigError, StateError, UnsupportedError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

DTYPES = ("float32", "bfloat16", "float16")
_PATIENCE = 5.0  # seconds to wait for the hub's first answer


def load_model(name: str, dtype: str | torch.dtype | None = None, device: str | None = None) -> DiffusionPipeline:
    """A text-to-image pipeline, ready to call.

    Args:
        name: an embedded pipeline ("toy-sd"), a folder with a `model_index.json`, or a hub id ("owner/name").
        dtype: one of `DTYPES`; by default float32 on the CPU and bfloat16 elsewhere.
        device: "cpu", "cuda", "cuda:1", ...; by default the accelerator, if there is one.

    Raises:
        ConfigError: there is no such model, or no such device; says where was looked and what to do.
        UnsupportedError: the pipeline takes no prompt.
    """
    where = pick_device(device)
    kind = pick_dtype(dtype, where)
    if name in zoo.NAMES:
        if not (zoo.path(name) / "model_index.json").is_file():
            raise ConfigError(f"the weights of {name!r} are not in this installation ({zoo.path(name)}): reinstall it")
        pipe = zoo.load(name, dtype=kind)
    elif Path(name).expanduser().exists() or name.startswith((".", "~", os.sep)):
        pipe = _from_folder(Path(name).expanduser(), kind)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        pipe = _from_hub(name, kind)
    else:
        raise ConfigError(
            f"no model {name!r}: it is none of the embedded pipelines ({', '.join(zoo.NAMES)}), no folder,"
            " and no hub id (owner/name)"
        )
    needs_prompt(pipe)
    return pipe.to(where)


def defaults(name: str) -> dict[str, Any]:
    """What suits an embedded pipeline, as it was trained: arguments of `compare`, and `text_tokens` of `explain`. Empty
    for any other pipeline."""
    if name not in zoo.NAMES:
        return {}
    found: dict[str, Any] = {"steps": 20, "guidance": 3.0, "size": (128, 128)}
    # CLIP's 20 tokens and T5's: the pipeline would pad to 256.
    return found | ({"call": {"max_sequence_length": 20}, "text_tokens": 40} if name == "toy-dit" else {})


def needs_prompt(pipe: Any) -> None:
    """Refuse a pipeline that makes no picture from a prompt alone (UnsupportedError)."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    if "prompt" not in parameters:
        takes = "class labels" if "class_labels" in parameters else ", ".join(list(parameters)[1:4])
        raise UnsupportedError(f"{type(pipe).__name__} takes {takes}, no prompt: only text-to-image pipelines for now")
    if getattr(pipe, "tokenizer", None) is None:
        raise UnsupportedError(f"this {type(pipe).__name__} has no tokenizer and text encoder: it cannot read a prompt")


def unread(pipe: Any, prompt: str) -> str | None:
    """What of a prompt the pipeline does not read, in one line; None if it reads all."""
    tokenizer = getattr(pipe, "tokenizer", None)
    unknown = getattr(tokenizer, "unk_token_id", None)
    if tokenizer is None or unknown is None:
        return None
    ids, longest = tokenizer(prompt, verbose=False).input_ids, tokenizer.model_max_length
    if len(ids) > longest:
        return f"the prompt has {len(ids)} tokens, the model reads the first {longest}"
    if unknown not in ids or unknown in (tokenizer.eos_token_id, tokenizer.pad_token_id):  # CLIP knows every letter
        return None
    words = [w for w in prompt.split() if unknown in tokenizer(w, add_special_tokens=False).input_ids]
    if not words:
        return None
    return f"the model does not know {', '.join(map(repr, words))}: it reads {tokenizer.unk_token} there"


def unread_of(pipe: Any, texts: Iterable[str]) -> str | None:
    """`unread` of many prompts, in one line: how many of the different ones, and the first."""
    different = tuple(dict.fromkeys(texts))
    notes = {text: note for text in different if (note := unread(pipe, text))}
    if not notes:
        return None
    first = next(iter(notes))
    return f"{len(notes)} of {len(different)} different prompts are not read whole, first {first!r}: {notes[first]}"


def steps_of(pipe: Any) -> int:
    """The pipeline's own number of steps. Raises ConfigError if it has none."""
    known = inspect.signature(type(pipe).__call__).parameters
    if "num_inference_steps" not in known or not isinstance(known["num_inference_steps"].default, int):
        raise ConfigError(f"{type(pipe).__name__} has no number of steps of its own: say how many")
    return known["num_inference_steps"].default


def set_scheduler(pipe: Any, name: str) -> None:
    """Put diffusers' scheduler of that name into a pipeline, with the configuration of its own.

    Raises:
        ConfigError: diffusers has no such scheduler, or this pipeline cannot use it.
    """
    import diffusers

    kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if kind is None:
        raise ConfigError(f"diffusers has no scheduler {name!r}; their names end in Scheduler, as DDIMScheduler does")
    can = [other.__name__ for other in getattr(pipe.scheduler, "compatibles", ())]
    if can and name not in can and type(pipe.scheduler).__name__ != name:
        raise ConfigError(f"{type(pipe.scheduler).__name__} cannot become {name}: there is {', '.join(sorted(can))}")
    pipe.scheduler = kind.from_config(pipe.scheduler.config)


@contextlib.contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Without the pipeline's own progress bar, which would run inside timed calls."""
    before = pipe.__dict__.get("_progress_bar_config")
    pipe.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        if before is None:
            del pipe._progress_bar_config
        else:
            pipe.set_progress_bar_config(**before)


@contextlib.contextmanager
def called(pipe: Any) -> Iterator[None]:
    """A block in which a pipeline is called: what it says of wrong arguments becomes a ConfigError, in one line."""
    try:
        yield
    except (ConfigError, UnsupportedError, StateError):
        raise
    except (ValueError, TypeError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"{type(pipe).__name__} refuses this call: {text}") from error


def pick_device(name: str | None = None) -> torch.device:
    """The device of that name, or the best one. Raises ConfigError if it is not there."""
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return best or torch.device("cpu")
    there = ["cpu"] + ([best.type] if best else [])
    try:
        device = torch.device(name)
        if device.type not in there or (device.index or 0) >= (torch.accelerator.device_count() if best else 1):
            raise RuntimeError
    except RuntimeError:
        raise ConfigError(f"no device {name!r} here: there is {', '.join(there)}") from None
    return device


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype of that name, or the device's default. Raises ConfigError for another name."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is one of {', '.join(DTYPES)}, got {dtype!r}")
    return getattr(torch, dtype)


def _from_folder(folder: Path, dtype: torch.dtype) -> DiffusionPipeline:
    if folder.is_file():
        raise ConfigError(
            f"{folder} is a file: load it with diffusers' from_single_file, save_pretrained it, and name that folder"
        )
    if not (folder / "model_index.json").is_file():
        what = "has no model_index.json: it is no diffusers pipeline" if folder.is_dir() else "does not exist"
        raise ConfigError(f"{folder} {what}; a pipeline folder is what save_pretrained or `hf download` writes")
    return _load(str(folder), dtype, str(folder), local_files_only=True)


def _from_hub(name: str, dtype: torch.dtype) -> DiffusionPipeline:
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "model_index.json"), str):
        try:
            return _load(name, dtype, name, local_files_only=True)
        except ConfigError:
            pass  # an unfinished download: ask the hub for the rest
    todo = f"fetch it where there is a network, with `hf download {name}`, or take one of {', '.join(zoo.NAMES)}"
    where = f"no folder here, not in the cache ({constants.HF_HUB_CACHE})"
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"{name} is {where}, and HF_HUB_OFFLINE is set: {todo}")
    try:
        HfApi().model_info(name, timeout=_PATIENCE)
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403, 404):
            raise ConfigError(
                f"{constants.ENDPOINT} has no {name}, or it is private or gated: check the spelling, or `hf auth login`"
            ) from None
        raise ConfigError(f"{name} is {where}, and {constants.ENDPOINT} cannot be reached: {todo}") from None
    return _load(name, dtype, name)


def _load(source: str, dtype: torch.dtype, name: str, **options: Any) -> DiffusionPipeline:
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.from_pretrained(source, torch_dtype=dtype, **options)
    except (OSError, ValueError, KeyError, AttributeError, ImportError, RuntimeError, TypeError) as error:
        text = " ".join(str(error).split())[:300]
        raise ConfigError(f"{name} cannot be loaded as a diffusers pipeline: {type(error).__name__}: {text}") from error

"""Options as text: a method's, made from its config's fields; seeds; sizes; policies. For commands and scripts."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Sequence
from dataclasses import Field, fields
from importlib import metadata
from typing import Any, NoReturn

from ..errors import ConfigError
from ..methods import CONFIGS, MethodConfig, make_config
from ..ruling import config_in, resolve
from ..schedule.policy import Policy

GROUP = "diffusion_tokred.methods"


def load_plugins() -> None:
    """Import what installed packages offer in the entry-point group `diffusion_tokred.methods`: their modules register
    methods. One that cannot be imported is a ConfigError that names it."""
    for point in metadata.entry_points(group=GROUP):
        try:
            point.load()
        except Exception as error:
            raise ConfigError(f"the method plugin {point.name} ({point.value}) cannot be imported: {error}") from error


def flag(name: str) -> str:
    """merge_ff -> --merge-ff"""
    return "--" + name.replace("_", "-")


def limits(field: Field[Any]) -> str:
    """What a field of a config accepts, in words."""
    if isinstance(field.default, bool):
        return f"nothing; {flag('no_' + field.name)} is off"
    if "choices" in field.metadata:
        return ", ".join(map(str, field.metadata["choices"]))
    kind = {int: "integer", float: "number", tuple: "integers, as 0,1"}.get(type(field.default), "text")
    low, high = field.metadata.get("low"), field.metadata.get("high")
    if low is not None and high is not None:
        return f"{kind} in [{low:g}, {high:g}]"
    return f"{kind} >= {low:g}" if low is not None else f"{kind} <= {high:g}" if high is not None else kind


def default(field: Field[Any]) -> str:
    """A field's default as one would type it."""
    value = field.default
    if isinstance(value, bool):
        return "on" if value else "off"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def config_from(method: str | None, words: Sequence[str], policy: Policy | None = None) -> MethodConfig:
    """The config of a method from command-line words such as `--ratio 0.5 --levels 0,1 --no-randomize`.

    Args:
        method: None: the one that the policy was made for, or else ToMe.
        words: options, which win over those that the policy comes with.
        policy: of the run.

    Raises:
        ConfigError: unknown method or option, or a wrong value; says what is allowed.
    """
    if method is None:
        own = config_in(policy)
        method = own.name if own is not None else "tome"
    if method not in CONFIGS:
        make_config(method)
    known = {field.name: field for field in fields(CONFIGS[method])}
    options: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"unexpected {word!r}: options are written --name value")
        name, given, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in known and name.startswith("no_") and isinstance(_field(known, name[3:]), bool):
            options[name[3:]] = False
        elif isinstance(_field(known, name), bool) and not given:
            options[name] = True
        elif name not in known:
            _unknown(method, word, known)
        elif not given and not rest:
            raise ConfigError(f"{word} needs a value: {limits(known[name])}")
        else:
            options[name] = _value(known[name], value if given else rest.pop(0))
    return resolve(None, method, options, policy)


def chosen(method: str | None, words: Sequence[str], policy: Policy | None) -> dict[str, Any]:
    """What a command was told, as `patch`'s arguments: a method by its name where nothing else was said."""
    if policy is None and not words and method is not None:
        make_config(method)  # an error if there is none of this name
        return {"method": method}
    return {"config": config_from(method, words, policy), "policy": policy}


def _field(known: dict[str, Field[Any]], name: str) -> Any:
    return known[name].default if name in known else None


def _unknown(method: str, word: str, known: dict[str, Field[Any]]) -> NoReturn:
    near = difflib.get_close_matches(word, [flag(name) for name in known], n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    options = ", ".join(map(flag, known))
    raise ConfigError(f"no option {word}{hint}; {method} has {options}; see --help for the command's own")


def _value(field: Field[Any], text: str) -> Any:
    kind: Any = type(field.default)
    try:
        if kind is bool:
            return {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}[text.lower()]
        if kind is tuple:
            return tuple(int(part) for part in text.split(",") if part)
        if kind in (int, float, str):
            return kind(text)
        return ast.literal_eval(text)
    except (ValueError, KeyError, SyntaxError):
        if kind in (bool, tuple, int, float):
            raise ConfigError(f"{flag(field.name)} takes {limits(field)}, got {text!r}") from None
        return text


def seeds(text: str) -> tuple[int, ...]:
    """Seeds from "0", "0,2" or "0-3" (both ends), in this order, without repeats."""
    found: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            stop = int(last) if dash else int(first)
            if stop < int(first):
                raise ValueError
            found += range(int(first), stop + 1)
    except ValueError:
        raise ConfigError(f"seeds are written 0 or 0,2 or 0-3, got {text!r}") from None
    return tuple(dict.fromkeys(found))


def size(text: str) -> tuple[int, int]:
    """Width and height in pixels, from "256" or "256x192" (width x height)."""
    try:
        sides = [int(side) for side in text.lower().split("x")]
        found = sides[0], sides[-1] if len(sides) < 3 else 0
    except ValueError:
        found = 0, 0
    if min(found) < 1:
        raise ConfigError(f"a size is written 256 or 256x192 (width x height, in pixels), got {text!r}")
    return found


def policy(text: str) -> Policy:
    """A policy from a number (the same ratio at every noise level) or the path of its JSON file."""
    try:
        return Policy.constant(float(text))
    except ConfigError:
        raise
    except ValueError:
        return Policy.load(text)

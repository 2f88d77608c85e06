"""What a peer is: a config with options, by name, that attaches itself."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from typing import Any, ClassVar, TypeVar

from torch import nn

from ...errors import ConfigError
from ...methods.base import MethodConfig
from ...runtime.tracker import StepInfo
from ..options import limits

# What is entered around each call of the denoiser.
Around = Callable[[StepInfo], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class PeerConfig(MethodConfig):
    """Options of another library's cache: checked and recorded as those of our methods.

    Attributes:
        package, module: its names for pip and for `import`.
    """

    package: ClassVar[str] = ""
    module: ClassVar[str] = ""

    def attach(self, pipe: Any, model: nn.Module, seed: int) -> Around:
        """Put it on, as its documentation says. `seed`: of its random draws.

        Returns:
            What its state needs around each call of the denoiser.

        Raises:
            UnsupportedError: it does not run on this model. (What its package raises becomes one.)
        """
        raise NotImplementedError


PEERS: dict[str, type[PeerConfig]] = {}
_P = TypeVar("_P", bound=type[PeerConfig])


def register(name: str, package: str, module: str) -> Callable[[_P], _P]:
    """A decorator: a peer's name as it is typed, and its package's for pip and for `import`."""

    def add(kind: _P) -> _P:
        kind.name, kind.package, kind.module = name, package, module
        PEERS[name] = kind
        return kind

    return add


def make_peer(name: str, options: Mapping[str, Any]) -> PeerConfig:
    """A peer's options by name. Raises ConfigError for an unknown one, with the nearest, or for a wrong value."""
    if name not in PEERS:
        raise ConfigError(f"no cache of another library is called {name!r}: there is {', '.join(sorted(PEERS))}")
    known = [field.name for field in fields(PEERS[name])]
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ConfigError(f"no option {key}{hint}; {name} has {', '.join(known)}")
    return PEERS[name](**options)


def parse_peer(name: str, words: Sequence[str]) -> PeerConfig:
    """A peer with options as they are typed: `threshold=0.1`, `use_rand`, `no_use_rand`. Raises as `make_peer`."""
    known = {field.name: field for field in fields(PEERS[name])}
    options: dict[str, Any] = {}
    for word in words:
        key, given, text = (part.strip() for part in word.partition("="))
        switch = key.removeprefix("no_")
        if not given and switch in known and isinstance(known[switch].default, bool):
            options[switch] = switch == key
        elif key not in known:
            options[key] = text  # an error that says what there is
        elif not given:
            raise ConfigError(f"{key} needs a value: {limits(known[key])}")
        else:
            options[key] = _value(known[key], text)
    return make_peer(name, options)


def peer_from_dict(data: Mapping[str, Any]) -> PeerConfig:
    """The inverse of a peer's `to_dict`. Raises ConfigError for what this library does not know."""
    values = {key: value for key, value in data.items() if not key.startswith("_")}
    peer = make_peer(str(data.get("_type")), values)
    if (version := data.get("_version")) != peer.to_dict()["_version"]:
        raise ConfigError(f"options of {peer.name} in version {version!r} cannot be read")
    return peer


def _value(field: Field[Any], text: str) -> Any:
    kind: Any = type(field.default)
    try:
        if kind is bool:
            return {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError):
        raise ConfigError(f"{field.name} takes {limits(field)}, got {text!r}") from None

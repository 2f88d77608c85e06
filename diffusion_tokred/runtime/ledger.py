"""The ledger: every change made to somebody's model is written down here and undone from here, last one first.

The library changes models in three ways only, all on *instances*: an attribute shadowed in `__dict__`, an attribute
replaced (a processor), and a native hook. Class swaps and diffusers' `HookRegistry` are avoided: the first breaks
`compile_repeated_blocks`, the second cannot remove a hook from the middle of a chain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Wrapper:
    """Something that stands before one module's `forward`: `module.forward` becomes the bound method of this object.

    A bound method, not a closure: `copy.deepcopy` of the module then copies and rebinds it, and Dynamo compiles one
    graph for all modules of the same shape, where closures would cost one for each.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.base: Callable[..., Any] = module.forward
        self.shadowed = "forward" in module.__dict__
        self.active = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def install(self) -> None:
        self.active = True
        self.module.__dict__["forward"] = self.forward

    def remove(self) -> bool:
        """Give `forward` back. False if another tool has wrapped it since: then we stay underneath, inert."""
        self.active = False
        if getattr(self.module.__dict__.get("forward"), "__self__", None) is not self:
            return False
        if self.shadowed:
            self.module.__dict__["forward"] = self.base
        else:
            del self.module.__dict__["forward"]
        return True

    def retire(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Inert: pass the call through, and leave for good once the tool that lay over us has gone."""
        if not torch.compiler.is_compiling():
            self.remove()
        return self.base(*args, **kwargs)


class Ledger:
    """Changes made to one denoiser. Copies with it: a `copy.deepcopy` of the denoiser can be unpatched by itself."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    def wrap(self, wrapper: Wrapper) -> None:
        """Put a wrapper before its module's `forward`."""
        wrapper.install()
        self._entries.append(_Wrap(wrapper))

    def shadow(self, owner: Any, name: str, value: Any) -> None:
        """Put `value` in `owner.__dict__[name]`, over the class's attribute or over another tool's shadow."""
        self._entries.append(_Shadow(owner, name, value))

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Set `owner.name = value` in the ordinary way: for attributes that other code replaces too."""
        self._entries.append(_Replacement(owner, name, value))

    def hook(self, handle: Any) -> None:
        """Remember the handle of a native torch hook."""
        self._entries.append(_Hook(handle))

    def revert(self) -> list[str]:
        """Undo everything, last change first.

        Returns:
            One line for each change that could not be undone, because another tool has put its own wrapper over ours
            since. What we leave there is inert, and goes when that tool goes (`unpatch` says so).
        """
        left = [text for entry in reversed(self._entries) if (text := entry.revert())]
        self._entries.clear()
        return left


class _Entry:
    def revert(self) -> str | None:
        raise NotImplementedError


class _Wrap(_Entry):
    def __init__(self, wrapper: Wrapper) -> None:
        self.wrapper = wrapper

    def revert(self) -> str | None:
        if self.wrapper.remove():
            return None
        return f"the forward of a {type(self.wrapper.module).__name__} was wrapped by another tool after patching"


class _Shadow(_Entry):
    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self.owner, self.name, self.value = owner, name, value
        had = name in owner.__dict__
        self.before = (owner.__dict__[name],) if had else ()
        owner.__dict__[name] = value

    def revert(self) -> str | None:
        if self.owner.__dict__.get(self.name) is not self.value:
            return f"{type(self.owner).__name__}.{self.name} was wrapped by another tool after patching"
        if self.before:
            self.owner.__dict__[self.name] = self.before[0]
        else:
            del self.owner.__dict__[self.name]
        return None


class _Replacement(_Entry):
    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self.owner, self.name, self.value = owner, name, value
        self.before = getattr(owner, name)
        setattr(owner, name, value)

    def revert(self) -> str | None:
        # Replaced by somebody else meanwhile (QKV fusion, slicing): theirs stays, and ours is gone already.
        if getattr(self.owner, self.name, None) is self.value:
            setattr(self.owner, self.name, self.before)
        return None


class _Hook(_Entry):
    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def revert(self) -> str | None:
        self.handle.remove()
        return None

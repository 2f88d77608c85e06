"""Optional packages."""

from __future__ import annotations

import importlib
from types import ModuleType


def need(name: str, extra: str, what: str) -> ModuleType:
    """Import an optional package.

    Args:
        name: of the module.
        extra: of this library, which brings it.
        what: needs it.

    Raises:
        ImportError: it is not installed; says how to.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(f"{what} needs {package}: pip install 'diffusion-tokred[{extra}]'") from error

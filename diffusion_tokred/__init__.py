"""diffusion_tokred: token reduction for Hugging Face diffusers. Import it as `import diffusion_tokred as tokred`.

Nothing heavy is imported until a name is used, so that `tokred --help` does not wait for torch.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import zoo
    from .backbones import register_backbone
    from .coverage import Cell, coverage
    from .errors import ConfigError, StateError, UnsupportedError
    from .explaining import Explanation, explain
    from .methods import (
        CATConfig,
        ClusCaConfig,
        DeepCacheConfig,
        DuCaConfig,
        FirstBlockConfig,
        FORAConfig,
        MethodConfig,
        RandomKeepConfig,
        RASConfig,
        TaylorSeerConfig,
        ToCaConfig,
        ToDoConfig,
        ToMeConfig,
        register_method,
    )
    from .patching import methods, patch, patched, protect, report, unpatch
    from .processors import ClusterPruneAttnProcessor, ToDoAttnProcessor, TokenCacheAttnProcessor, ToMeAttnProcessor
    from .runtime.stats import Report, StepRecord
    from .schedule.policy import Policy
    from .stepping import steps
    from .tuning import Tuned, tune

from .version import __version__ as __version__

__all__ = [
    "CATConfig",
    "Cell",
    "ClusCaConfig",
    "ClusterPruneAttnProcessor",
    "ConfigError",
    "DeepCacheConfig",
    "DuCaConfig",
    "Explanation",
    "FORAConfig",
    "FirstBlockConfig",
    "MethodConfig",
    "Policy",
    "RASConfig",
    "RandomKeepConfig",
    "Report",
    "StateError",
    "StepRecord",
    "TaylorSeerConfig",
    "ToCaConfig",
    "ToDoAttnProcessor",
    "ToDoConfig",
    "ToMeAttnProcessor",
    "ToMeConfig",
    "TokenCacheAttnProcessor",
    "Tuned",
    "UnsupportedError",
    "coverage",
    "explain",
    "methods",
    "patch",
    "patched",
    "protect",
    "register_backbone",
    "register_method",
    "report",
    "steps",
    "tune",
    "unpatch",
    "zoo",
]

# Where each public name is: the imports above, for the interpreter.
_HOMES = {
    "backbones": ("register_backbone",),
    "coverage": ("Cell", "coverage"),
    "errors": ("ConfigError", "StateError", "UnsupportedError"),
    "explaining": ("Explanation", "explain"),
    "methods": (
        "CATConfig",
        "ClusCaConfig",
        "DeepCacheConfig",
        "DuCaConfig",
        "FORAConfig",
        "FirstBlockConfig",
        "MethodConfig",
        "RASConfig",
        "RandomKeepConfig",
        "TaylorSeerConfig",
        "ToCaConfig",
        "ToDoConfig",
        "ToMeConfig",
        "register_method",
    ),
    "patching": ("methods", "patch", "patched", "protect", "report", "unpatch"),
    "processors": (
        "ClusCaConfig",
        "ClusterPruneAttnProcessor",
        "ToDoAttnProcessor",
        "ToMeAttnProcessor",
        "TokenCacheAttnProcessor",
    ),
    "runtime.stats": ("Report", "StepRecord"),
    "schedule.policy": ("Policy",),
    "stepping": ("steps",),
    "tuning": ("Tuned", "tune"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


class _Package(ModuleType):
    """The package itself (PEP 562 as a class): public names come when asked for, and stay."""

    def __getattr__(self, name: str) -> Any:
        if name == "zoo":
            return importlib.import_module(f"{__name__}.zoo")
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # `methods` is a function here and a folder: importing the folder must not put it in the function's place.
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *__all__})


sys.modules[__name__].__class__ = _Package

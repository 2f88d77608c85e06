"""Floor 3: methods. One file a method: a frozen config dataclass, and what to do at a site."""

from .base import CONFIGS, METHODS, Method, MethodConfig, MethodInfo, make_config, make_method, option, register_method
from .random_keep import RandomKeep, RandomKeepConfig
from .todo import ToDo, ToDoConfig
from .tome import ToMe, ToMeConfig

__all__ = [
    "CONFIGS",
    "METHODS",
    "Method",
    "MethodConfig",
    "MethodInfo",
    "RandomKeep",
    "RandomKeepConfig",
    "ToDo",
    "ToDoConfig",
    "ToMe",
    "ToMeConfig",
    "make_config",
    "make_method",
    "option",
    "register_method",
]

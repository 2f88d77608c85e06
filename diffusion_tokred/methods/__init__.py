"""Floor 3: methods. One file a method: a frozen config dataclass, and what to do at a site."""

from .base import CONFIGS, METHODS, Method, MethodConfig, MethodInfo, make_config, make_method, option, register_method
from .cat import CAT, CATConfig
from .clusca import ClusCa, ClusCaConfig
from .deepcache import DeepCache, DeepCacheConfig
from .duca import DuCa, DuCaConfig
from .firstblock import FirstBlock, FirstBlockConfig
from .fora import FORA, FORAConfig
from .random_keep import RandomKeep, RandomKeepConfig
from .ras import RAS, RASConfig
from .taylorseer import TaylorSeer, TaylorSeerConfig
from .toca import ToCa, ToCaConfig
from .todo import ToDo, ToDoConfig
from .tome import ToMe, ToMeConfig

__all__ = [
    "CAT",
    "FORA",
    "RAS",
    "CATConfig",
    "ClusCa",
    "ClusCaConfig",
    "DeepCache",
    "DeepCacheConfig",
    "DuCa",
    "DuCaConfig",
    "FORAConfig",
    "FirstBlock",
    "FirstBlockConfig",
    "RASConfig",
    "TaylorSeer",
    "TaylorSeerConfig",
    "ToCa",
    "ToCaConfig",
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

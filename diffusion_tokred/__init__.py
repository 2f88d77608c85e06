"""diffusion_tokred: token reduction for Hugging Face diffusers. Import it as `import diffusion_tokred as tokred`."""

from .backbones import register_backbone
from .errors import ConfigError, StateError, UnsupportedError
from .methods import MethodConfig, ToDoConfig, ToMeConfig, register_method
from .patching import methods, patch, patched, report, unpatch
from .runtime.stats import Report, StepRecord
from .schedule.policy import Policy

__version__ = "0.1.0"

__all__ = [
    "ConfigError", "MethodConfig", "Policy", "Report", "StateError", "StepRecord", "ToDoConfig", "ToMeConfig",
    "UnsupportedError", "methods", "patch", "patched", "register_backbone", "register_method", "report", "unpatch",
]

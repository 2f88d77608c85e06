"""For authors of methods and backbones: the contract as a library, and tiny offline pipelines (`testing.tiny`)."""

from . import tiny
from .contract import CHECKS, SITE_CHECKS, SLOW, Finding, assert_contract, check_backbone, check_method

__all__ = [
    "CHECKS",
    "SITE_CHECKS",
    "SLOW",
    "Finding",
    "assert_contract",
    "check_backbone",
    "check_method",
    "tiny",
]

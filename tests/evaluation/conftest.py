from pathlib import Path
from typing import Any

import pytest

from diffusion_tokred.evaluation.compare import Comparison, compare
from tests.evaluation import toys


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.save(tmp_path_factory.mktemp("models") / "tiny-sd")


@pytest.fixture
def pipe() -> Any:
    return toys.sd()


@pytest.fixture(scope="session")
def comparison() -> Comparison:
    """Two seeds, two pairs of calls each. Nobody changes it."""
    return compare(toys.sd(), prompt=toys.PROMPT, seeds=(0, 3), steps=3, size=(32, 48), guidance=3.0, repeat=2)

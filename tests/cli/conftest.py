from pathlib import Path

import pytest

from tests.evaluation import toys


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.save(tmp_path_factory.mktemp("models") / "tiny-sd")

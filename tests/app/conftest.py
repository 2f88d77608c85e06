"""The app, also from a checkout that is not installed: the wheel carries app/ as diffusion_tokred.app."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("gradio") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    try:
        importlib.import_module("diffusion_tokred.app")
    except ModuleNotFoundError:
        folder = Path(__file__).parent.parent.parent / "app"
        spec = importlib.util.spec_from_file_location(
            "diffusion_tokred.app", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec and spec.loader
        sys.modules["diffusion_tokred.app"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["diffusion_tokred.app"])


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    """A server with toy-sd."""
    from diffusion_tokred.app import serve
    from PIL import Image

    most = Image.MAX_IMAGE_PIXELS  # of the process: serving lowers it
    running = serve(("toy-sd",), block=False, queue_size=32)
    yield running
    running.close()
    Image.MAX_IMAGE_PIXELS = most


@pytest.fixture(scope="module")
def client(page: Any) -> Any:
    from gradio_client import Client

    return Client(page.local_url, verbose=False, analytics_enabled=False, httpx_kwargs={"timeout": 120})

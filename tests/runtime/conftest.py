"""Pipelines with stubs for denoisers, and a probe on each."""

import pytest

from diffusion_tokred.testing import tiny
from tests.runtime.probe import Probe


@pytest.fixture(scope="module")
def sd():
    pipe = tiny.sd()
    return pipe, tiny.img2img(pipe), Probe(pipe.unet)


@pytest.fixture(scope="module")
def sd3():
    pipe = tiny.sd3()
    return pipe, tiny.img2img(pipe), Probe(pipe.transformer)

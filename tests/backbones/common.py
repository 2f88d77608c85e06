"""What the tests of the families share: a method against its definition, and FLOPs against torch's counter."""

import copy

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import diffusion_tokred as tokred
from diffusion_tokred.testing import tiny
from tests.contract.helpers import near

OPTIONS = {
    "tome": dict(method="tome"),
    "tome-ff": dict(method="tome", merge_ff=True, ratio=0.7),
    "todo": dict(method="todo"),
    "random-keep": dict(method="random-keep", feed_forward=True),
    "dense": dict(method="todo", policy=0.0),
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def assert_defined(build, install, method, least=1e-3, **size):
    """The picture is that of `install(model, method, grid)`, which writes the method out in plain torch.

    Two samples, so that each has its own matching; 12 x 8 tokens.
    """
    pipe = build().to(torch.float64)
    other = copy.deepcopy(pipe)
    plain = tiny.run(pipe, steps=1, batch=2, **size)
    tokred.patch(pipe, method=method, **(dict(randomize=False) if method == "tome" else {}))
    ours = tiny.run(pipe, steps=1, batch=2, **size)
    install(other.transformer, method, (12, 8))
    assert (ours - plain).abs().max() > least
    near(ours, tiny.run(other, steps=1, batch=2, **size), 1e-6)


def assert_flops(build, options, **size):
    """The report of a run counts what torch counts, under maths attention. Returns the report."""
    pipe = tokred.patch(build(), **options)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        tiny.run(pipe, steps=2, **size)
    found = tokred.report(pipe)
    assert found.flops == counter.get_total_flops()
    assert (found.flops == found.flops_dense) == ("policy" in options)  # on tiny Sana, ToMe's matching costs more
    return found

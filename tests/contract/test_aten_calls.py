"""What a method adds to a block once its plan exists: at most four ATen calls. On a GPU each is a kernel launch.

Where text and image are one sequence, taking it apart and putting it together again adds up to three.
"""

import contextlib
from collections import Counter

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

import diffusion_tokred as tokred
from diffusion_tokred.testing import families, tiny
from tests.contract.helpers import PIPES, run

LIMIT = 4
METHODS = {
    "tome": dict(method="tome", reuse_every=2),
    "todo": dict(method="todo"),
    "random-keep": dict(method="random-keep"),
}


class Calls(TorchDispatchMode):
    """Counts ATen calls that compute or copy; views are free."""

    def __init__(self):
        super().__init__()
        self.seen = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if self.seen is not None and not view and func.__name__ != "_unsafe_view.default":
            self.seen[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counting(pipe):
    """A list that gets one Counter for each block that runs."""
    found, handles, calls = [], [], Calls()

    def begin(*_):
        calls.seen = Counter()

    def end(*_):
        found.append(calls.seen)
        calls.seen = None

    for module in tiny.denoiser(pipe).modules():
        if type(module).__name__.endswith("TransformerBlock"):
            handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    with calls:
        yield found
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", PIPES)
def test_calls_added_to_a_block(kind, method, batch):
    pipe = PIPES[kind]()
    with counting(pipe) as plain:
        run(pipe, batch=batch)
    tokred.patch(pipe, **METHODS[method])
    with counting(pipe) as patched:
        run(pipe, batch=batch)
    assert plain and len(plain) == len(patched)
    half = len(plain) // 2  # the second step, when the plan exists
    added = [b.total() - a.total() for a, b in zip(plain[half:], patched[half:], strict=True)]
    if method == "random-keep" and kind == "flux":  # a new plan at each step: a pass's first block derives rows from it
        blocks = half // 2
        added = [n for i, n in enumerate(added) if i % blocks]
    assert max(added) <= LIMIT, [b - a for a, b in zip(plain[half:], patched[half:], strict=True)]
    assert max(added) > 0


@pytest.mark.parametrize("method", ["tome", "todo"])
@pytest.mark.parametrize("kind", families.BUILDERS)
def test_calls_added_in_other_families(kind, method):
    if (kind, method) == ("sana", "todo"):
        pytest.skip("refused: linear attention")
    pipe = families.BUILDERS[kind]()
    with counting(pipe) as plain:
        run(pipe, batch=2)
    tokred.patch(pipe, **METHODS[method])
    with counting(pipe) as patched:
        run(pipe, batch=2)
    half = len(plain) // 2
    added = [b.total() - a.total() for a, b in zip(plain[half:], patched[half:], strict=True)]
    one_sequence = kind in ("flux2", "flux2_klein", "zimage", "lumina2", "auraflow") and method == "tome"
    assert 0 < max(added) <= LIMIT + 3 * one_sequence, added

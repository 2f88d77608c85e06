"""ToDo on whole models, against explicit pooling of keys and values. All in float64."""

import copy

import pytest
import torch

import diffusion_tokred as tokred
from diffusion_tokred.testing import tiny
from tests.contract.helpers import PIPES, near, run
from tests.contract.test_tome_definition import blocks_at
from tests.reference import todo_model

MODES = ("nearest", "nearest-exact", "area", "bilinear")


@pytest.mark.parametrize("size", [(32, 32), (24, 40)], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "kind, factor, levels", [("sd", 2, (0,)), ("sd", 3, (0,)), ("sd", 2, (0, 1)), ("sdxl", 2, (0,))]
)
def test_unet(kind, factor, levels, mode, size):
    """attn1 asks with every token, and is handed the pooled ones as if they were a text."""
    pipe = PIPES[kind]().to(torch.float64)
    other = copy.deepcopy(pipe)
    more = dict(height=size[0], width=size[1])
    plain = run(pipe, **more)
    tokred.patch(pipe, method="todo", factor=factor, levels=levels, mode=mode)
    ours = run(pipe, **more)

    shrink = {"sd": 2, "sdxl": 4}[kind]  # pixels a token, at level 0
    for level in levels:
        h, w = size[0] // shrink // 2**level, size[1] // shrink // 2**level
        found = blocks_at(other, level)
        assert found
        slices = mode == "nearest" and not (h % factor or w % factor)
        for block in found:
            _explicit(block.attn1, h, w, factor, "slices" if slices else mode)
    theirs = run(other, **more)
    assert (theirs - plain).abs().max() > 1e-3
    near(ours, theirs, 1e-10)


def _explicit(attn, h, w, factor, mode):
    forward = attn.forward
    assert mode in (*MODES, "slices")

    def pooled(hidden_states, encoder_hidden_states=None, **kwargs):
        assert encoder_hidden_states is None
        return forward(hidden_states, todo_model.pooled(hidden_states, h, w, factor, mode), **kwargs)

    attn.forward = pooled


@pytest.mark.parametrize("size", [(32, 32), (32, 48), (24, 40)], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind, factor", [("sd3", 2), ("sd3-dual", 2), ("sd3", 4)])
def test_sd3(kind, factor, mode, size):
    """The whole attention is written out anew, from the module's layers."""
    pipe = PIPES[kind]().to(torch.float64)
    other = copy.deepcopy(pipe)
    more = dict(height=size[0], width=size[1])
    plain = run(pipe, **more)
    tokred.patch(pipe, method="todo", factor=factor, mode=mode)
    ours = run(pipe, **more)
    h, w = size[0] // 4, size[1] // 4

    def pool(x):
        return todo_model.pooled(x, h, w, factor, mode)

    for block in tiny.denoiser(other).transformer_blocks:
        for attn in (block.attn, block.attn2):
            if attn is not None:
                _joint(attn, pool)
    theirs = run(other, **more)
    assert (theirs - plain).abs().max() > 1e-3
    near(ours, theirs, 1e-10)


def _joint(attn, pool):
    def forward(hidden_states, encoder_hidden_states=None, **kwargs):
        image, text = todo_model.joint_attention(attn, hidden_states, encoder_hidden_states, pool)
        return image if encoder_hidden_states is None else (image, text)

    attn.forward = forward


@pytest.mark.parametrize("kind", ["sd3", "sd3-dual"])
def test_the_definition_without_pooling_is_the_model(kind):
    """The reference is checked too: with nothing pooled it is SD3's own attention."""
    pipe = PIPES[kind]().to(torch.float64)
    plain = run(pipe)
    for block in pipe.transformer.transformer_blocks:
        for attn in (block.attn, block.attn2):
            if attn is not None:
                _joint(attn, lambda x: x)
    near(run(pipe), plain, 1e-10)

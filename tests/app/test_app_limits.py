"""What comes from outside: a setting, or a message that says why not. No server needed."""

from __future__ import annotations

import io
import json
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusion_tokred.app import batch, limits, page, tuning
from PIL import Image

import diffusion_tokred as tokred
from diffusion_tokred.zoo import scenes

GOOD: dict[str, Any] = dict(
    model="toy-sd", prompt="a  red\nstar", seed=3, steps=4, width=64, height=64.0, guidance=3, repeat=1
)


def setup(**other: Any) -> limits.Setup:
    return limits.setup_of(**(GOOD | other), models=("toy-sd",), largest=512)


def test_a_good_setup() -> None:
    assert setup() == limits.Setup("toy-sd", "a red star", 3, 4, 64, 64, 3.0, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": " \n"}, "prompt is empty"),
        ({"prompt": None}, "prompt is empty"),
        ({"prompt": "x" * 2001}, "2,001 letters"),
        ({"steps": -3}, "steps must be from 1 to 100, got -3"),
        ({"steps": 0}, "steps must be from 1"),
        ({"steps": 10**9}, "steps must be from 1 to 100"),
        ({"steps": 2.5}, "whole number"),
        ({"steps": "4"}, "whole number"),
        ({"steps": None}, "whole number"),
        ({"steps": True}, "whole number"),
        ({"width": 100_000}, "width must be from 16 to 512"),
        ({"height": -64}, "height must be from 16 to 512"),
        ({"height": math.nan}, "height must be a whole number"),
        ({"guidance": math.nan}, "guidance must be a number"),
        ({"guidance": math.inf}, "guidance must be a number"),
        ({"guidance": -1}, "guidance must be from 0 to 100"),
        ({"seed": -1}, "seed must be from 0"),
        ({"seed": 1e300}, "seed must be from 0"),
        ({"repeat": 1000}, "timed pairs must be from 0 to 10"),
        ({"model": "../../etc"}, "no model"),
        ({"model": ["toy-sd"]}, "no model"),
    ],
)
def test_a_bad_setup_is_a_message(given: dict[str, Any], message: str) -> None:
    with pytest.raises(tokred.ConfigError, match=message):
        setup(**given)


def test_sides_from_text_and_objects_agree() -> None:
    text = limits.side_of("tome:ratio=0.25,levels=0,1,merge_ff")
    data = limits.side_of({"method": "tome", "options": {"ratio": 0.25, "levels": [0, 1], "merge_ff": True, "sx": 2.0}})
    assert text == data == limits.Side(tokred.ToMeConfig(ratio=0.25, levels=(0, 1), merge_ff=True))
    assert limits.side_of("unpatched") == limits.side_of({"method": "unpatched"}) == limits.Side()
    assert limits.side_of(text.to_dict()) == text
    assert text.name == "tome ratio 0.25 levels 0,1 merge_ff on"


@pytest.mark.parametrize(
    ("side", "message"),
    [
        ("nonsense", "unknown method 'nonsense'"),
        ("tome:ratio=7", "ratio must be in"),
        ("tome:rato=0.5", "did you mean --ratio"),
        ("tome:policy=/etc/passwd", "no option --policy"),  # of the command line: reads a file
        (5, "a side is text"),
        ([], "a side is text"),
        ({}, "method is a name"),
        ({"method": "tome", "file": "/etc/passwd"}, "not file"),
        ({"method": "tome", "options": [1]}, "options are an object"),
        ({"method": "tome", "options": {"ratio": math.nan}}, "finite"),
        ({"method": "tome", "options": {"ratio": "0.5"}}, "must be float"),
        ({"method": "unpatched", "options": {"ratio": 0.5}}, "takes no options"),
        ({"method": "tome", "policy": "/etc/passwd"}, "not JSON"),
        ({"method": "tome", "policy": [[1.0, math.nan]]}, "finite"),
        ({"method": "tome", "policy": "[[1.0, NaN]]"}, "finite"),
        ({"method": "tome", "policy": [[1.0]]}, "a point is"),
        ({"method": "tome", "policy": [[0.1, 0.5], [0.9, 0.1]]}, "descending"),
        ({"method": "tome", "policy": [[1.0, 0.5, "explode"]]}, "mode is one of"),
        ({"method": "tome", "policy": {"points": [], "path": "/etc/passwd"}}, "not a policy"),
        ({"method": "tome", "policy": "[" * 60_000}, "not JSON"),
        ({"method": "tome", "policy": " " * 70_000}, "at most 64 kB"),
        ({"method": "tome", "policy": [[1.0 - i / 5000, 0.5] for i in range(2000)]}, "1,000 points"),
        ({"method": "tome", "policy": True}, "a policy is"),
    ],
)
def test_a_bad_side_is_a_message(side: Any, message: str) -> None:
    with pytest.raises(tokred.ConfigError, match=message):
        limits.side_of(side)


def test_policies() -> None:
    points = tokred.Policy(points=((1.0, 0.6, "reduce"), (0.3, 0.0, "full")))
    assert limits.policy_of("[[1.0, 0.6], [0.3, 0.0]]") == points
    assert limits.policy_of(json.dumps(points.to_dict()).encode()) == points
    assert limits.policy_of("") is limits.policy_of(None) is None
    assert limits.policy_of(0.5) == tokred.Policy.constant(0.5)
    with pytest.raises(tokred.ConfigError, match="not text"):
        limits.policy_of(b"\xff\xfe\x00")


def test_masks(tmp_path: Path) -> None:
    """What is opaque, or else what is bright, is protected; nothing painted is no mask."""
    painted = np.zeros((6, 8, 4), dtype=np.uint8)
    painted[1:3, 2:5] = (0, 0, 0, 255)
    found = limits.mask_of(Image.fromarray(painted))
    assert found is not None and found.shape == (6, 8) and found.sum() == 6 and found[1:3, 2:5].all()
    side = limits.side_of("tome", Image.fromarray(painted))
    assert np.array_equal(side.protect, found) and side.arguments()["protect"] is not None
    bright = Image.fromarray((found * 255).astype(np.uint8))
    bright.save(tmp_path / "mask.png")
    assert np.array_equal(limits.mask_of(str(tmp_path / "mask.png")), found)
    assert limits.mask_of(Image.new("RGBA", (8, 8))) is None
    assert limits.side_of("unpatched", bright) == limits.Side()
    editor = {"background": None, "layers": [Image.fromarray(painted), Image.new("RGBA", (8, 6))], "composite": None}
    assert np.array_equal(limits.mask_of(limits.painted_of(editor)), found)
    assert limits.painted_of(None) is None


def bomb(side: int) -> bytes:
    """A PNG of side x side white pixels in a few kilobytes: valid, as large as it says."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    squeezer, row = zlib.compressobj(9), b"\0" + b"\xff" * (side // 8)
    data = b"".join(squeezer.compress(row) for _ in range(side)) + squeezer.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_an_image_bomb_is_never_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bomb(8192)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # pillow's own guard, which a server sets lower
    assert len(data) < 50_000 and Image.open(io.BytesIO(data)).size == (8192, 8192)
    (tmp_path / "bomb.png").write_bytes(data)
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(tokred.ConfigError, match="8192x8192 pixels"):
        limits.mask_of(str(tmp_path / "bomb.png"))


def test_what_is_no_picture_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "mask.png").write_text("root:x:0:0")
    with pytest.raises(tokred.ConfigError, match="no picture") as caught:
        limits.mask_of(str(tmp_path / "mask.png"))
    assert "root" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "seeds", "message"),
    [
        ("", "0", "no settings"),
        ("unpatched", "0", "no settings"),
        ("tome\ntodo:policy=/etc/passwd", "0", "no option --policy"),
        ("tome", "0-999999999999", "digits"),
        ("tome", "0-9999999", "up to 16 seeds"),
        ("tome", "x", "seeds are written"),
        ("\n".join(f"tome:ratio=0.{i}" for i in range(10, 30)), "0", "up to 16 seeds, 12 settings"),
    ],
)
def test_a_bad_batch_is_a_message(settings: str, seeds: str, message: str) -> None:
    with pytest.raises(tokred.ConfigError, match=message):
        batch.settings_of(settings, seeds)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("", "0 different prompts"),
        ("a\na\n b\n", "2 different prompts"),
        ("\n".join(map(str, range(99))), "99 different"),
        ("a\nb\n" + "x" * 2001, "2,000 letters"),
    ],
)  # fmt: skip
def test_bad_prompts_of_a_search_are_a_message(prompts: str, message: str) -> None:
    with pytest.raises(tokred.ConfigError, match=message):
        tuning.prompts_of(prompts)
    assert tuning.prompts_of(" a\nb  c\n\nd\na") == ["a", "b c", "d"]


def test_a_good_batch() -> None:
    numbers, sides = batch.settings_of("tome\n\n tome:ratio=0.5 \ntodo", "0-2")
    assert numbers == (0, 1, 2)
    assert sides == [limits.Side(tokred.ToMeConfig()), limits.Side(tokred.ToDoConfig())]  # the first two are the same


def test_the_examples_speak_of_what_the_embedded_models_know() -> None:
    known = {word for prompt in scenes.evaluation_prompts() for word in prompt.split()}
    for prompt in (*tuning.PROMPTS.splitlines(), *(example[0] for example in page.EXAMPLES)):
        assert set(prompt.split()) <= known, prompt

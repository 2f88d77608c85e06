"""What is on the screen as Python, and as a policy file: both make the same pictures again, bit for bit."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from typing import Any

from PIL import Image

import diffusion_tokred as tokred
from diffusion_tokred import MethodConfig, Policy

from .limits import Side, changed
from .runs import LETTERS, Drawn, Result

_REMARKS = ("method", "model", "scheduler", "measured", "library")  # of a policy; the config says the method here


def code(found: Result) -> str:
    """A script that draws both pictures, as variables `a` and `b`, and saves them."""
    setup, p = found.setup, found.pipeline
    device = found.env["device"].partition(":")[0]
    embedded = setup.model in tokred.zoo.NAMES
    masked = any(drawn.side.mask for drawn in found.sides)
    call = {
        "prompt": setup.prompt, "num_inference_steps": setup.steps, "guidance_scale": setup.guidance,
        "width": setup.width, "height": setup.height, **found.call,
    }  # fmt: skip
    if embedded:
        load = f'tokred.zoo.load("{setup.model}", dtype=torch.{p["dtype"]}, device="{device}")'
    else:
        load = f'DiffusionPipeline.from_pretrained({setup.model!r}, torch_dtype=torch.{p["dtype"]}).to("{device}")'
    lines = [
        f'"""Made by the app of diffusion_tokred {found.env["diffusion_tokred"]}, torch {found.env["torch"]}, '
        f'diffusers {found.env["diffusers"]}."""',
        "",
        *(["import base64", "import io", ""] if masked else []),
        "import torch",
        *(["from PIL import Image"] if masked else []),
        *([] if embedded else ["from diffusers import DiffusionPipeline"]),
        "",
        "import diffusion_tokred as tokred",
        "",
        *([f"torch.set_num_threads({found.env['threads']})  # as it was drawn: sums depend on it"] * (device == "cpu")),
        f"pipe = {load}",
        "call = dict(",
        *(f"    {name}={_literal(value)}," for name, value in call.items()),
        ")",
        "",
        "",
        "def draw():",
        f"    return pipe(**call, generator=torch.Generator().manual_seed({setup.seed})).images[0]",
        "",
        "",
    ]
    for letter, drawn in zip(LETTERS, found.sides, strict=True):
        lines += _drawing(letter.lower(), drawn.side)
    lines += ['a.save("a.png")', 'b.save("b.png")']
    return "\n".join(lines) + "\n"


def _drawing(name: str, side: Side) -> list[str]:
    """Lines that draw one side into a variable."""
    if side.config is None:
        return [f"{name} = draw()  # unpatched", ""]
    lines, given = [], [_config(side.config)]
    if side.policy is not None:
        given.append(f"policy={_policy(side.policy)}")
    if side.mask is not None:
        lines += [
            f'{name}_mask = base64.b64decode("{_png(side)}")',
            f"{name}_mask = Image.open(io.BytesIO({name}_mask))  # white: computed in any case",
        ]
        given.append(f"protect={name}_mask")
    one = f"with tokred.patched(pipe, {', '.join(given)}):"
    if len(one) <= 110:
        return [*lines, one, f"    {name} = draw()", ""]
    return [
        *lines,
        "with tokred.patched(",
        "    pipe,",
        *(f"    {word}," for word in given),
        "):",
        f"    {name} = draw()",
        "",
    ]


def policy_of(found: Result, drawn: Drawn) -> Policy | None:
    """What a side does as a policy that says what it is for, and what was measured; None if unpatched."""
    if drawn.policy is None:
        return None
    speed = found.speedup
    measured: dict[str, Any] = {
        "steps": found.setup.steps, "width": found.setup.width, "height": found.setup.height,
        "psnr": None if found.psnr == float("inf") else round(found.psnr, 3), "ssim": round(found.ssim, 5),
        "flops": drawn.flops, "device": found.env["device"],
    }  # fmt: skip
    if speed is not None and drawn is found.b:
        measured["speedup"] = round(speed.median, 4)
        measured["speedup_to"] = found.a.side.name
    return replace(drawn.policy, measured=measured)


def policy_text(found: Result, drawn: Drawn) -> str | None:
    """`policy_of` as JSON, as `Policy.save` writes it."""
    policy = policy_of(found, drawn)
    return None if policy is None else policy.to_json()


def _config(config: MethodConfig) -> str:
    """A config's constructor: a method's name alone would mean what was measured for the model's family."""
    name = type(config).__name__
    if getattr(tokred, name, None) is type(config):
        return f"tokred.{name}({', '.join(f'{k}={_literal(v)}' for k, v in changed(config).items())})"
    return f"tokred.MethodConfig.from_dict({_literal(config.to_dict())})"


def _policy(policy: Policy) -> str:
    data = {key: value for key, value in policy.to_dict().items() if key not in _REMARKS}
    if set(data) == {"_type", "_version", "points"}:
        return _literal([tuple(point) for point in policy.points])
    return f"tokred.Policy.from_dict({_literal(data)})"


def _literal(value: Any) -> str:
    """As Python, strings in double quotes where that is as short."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, (list, tuple)):
        words = ", ".join(map(_literal, value))
        if isinstance(value, list):
            return f"[{words}]"
        return f"({words},)" if len(value) == 1 else f"({words})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    return repr(value)


def _png(side: Side) -> str:
    buffer = io.BytesIO()
    mask = side.protect
    assert mask is not None
    Image.fromarray(mask).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()

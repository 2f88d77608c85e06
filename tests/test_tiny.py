"""What `testing.tiny` and `testing.families` promise of their pipelines: deterministic, small, and shaped so that
mixing up passes, samples, axes or blocks shows.
"""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import torch

from diffusion_tokred.testing import families, tiny

BUILDERS = tiny.BUILDERS | families.BUILDERS
each = pytest.mark.parametrize("kind", BUILDERS)
# Length of the sequence that the first block of the main stack sees, and the batches of the denoiser's calls in a step.
TOKENS = {"sd": 256, "sana": 256, "wan": 3 * 64, "zimage": 64 + 32, "lumina2": 64 + 6}
TWO_PASSES = {"flux", "flux2_klein", "qwenimage", "lumina2", "wan"}
BLOCK = re.compile(r"(.*\b(?:\w*blocks|layers|\w+_refiner))\.\d+")


def run(pipe: Any, **more: Any) -> torch.Tensor:
    return tiny.run(pipe, **{"steps": 2} | more)


def blocks(kind: str, model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The transformer blocks, by name."""
    unet = kind in ("sd", "sdxl")
    return {n: m for n, m in model.named_modules() if BLOCK.fullmatch(n) and (not unet or "transformer_blocks" in n)}


@each
def test_deterministic(kind: str) -> None:
    """The same again, from this pipeline and from another of the same seed; the weights' seed and the run's matter."""
    pipe = BUILDERS[kind]()
    out = run(pipe)
    assert torch.isfinite(out).all() and out.dtype == torch.float32
    assert torch.equal(run(pipe), out) and torch.equal(run(BUILDERS[kind](seed=0)), out)
    assert (run(pipe, seed=1) - out).abs().max() > 0.1
    assert (run(BUILDERS[kind](seed=1)) - out).abs().max() > 0.1


@each
def test_guidance(kind: str) -> None:
    """It changes the picture; it takes two samples a step, in one call or in two; `guidance <= 1` takes one."""
    pipe = BUILDERS[kind]()
    batches: list[int] = []
    tiny.denoiser(pipe).register_forward_pre_hook(
        lambda _, args, kw: batches.append(len(args[0] if args else kw["hidden_states"])), with_kwargs=True
    )
    out = run(pipe, steps=1)
    assert batches == ([1, 1] if kind in TWO_PASSES else [1] if kind == "flux2" else [2])
    batches.clear()
    run(pipe, steps=1, guidance=1.0)
    assert batches == [1]
    assert (run(pipe, steps=1, guidance=2.0) - out).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [k for k in BUILDERS if k not in ("dit", "flux2")])
def test_embeddings_differ(kind: str) -> None:
    """Conditional from unconditional, and sample from sample, in every value."""
    call = tiny.inputs(BUILDERS[kind](), batch=2)
    names = [k for k in call if k.endswith("embeds") and not k.startswith("negative_")]
    for name in names:
        a, b = call[name], call[f"negative_{name}"]
        assert all((x != y).all() for x, y in zip(a, b, strict=True)), name
        assert (a[0] != a[1]).all() and (b[0] != b[1]).all()


@each
def test_rows(kind: str) -> None:
    """A sample comes out the same in a batch and alone; float64 leaves no doubt."""
    pipe = BUILDERS[kind]().to(torch.float64)
    both = run(pipe, batch=2)
    for i in range(2):
        torch.testing.assert_close(both[i], run(pipe, seed=i)[0], rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", [k for k in BUILDERS if k != "dit"])
def test_not_square(kind: str) -> None:
    pipe = BUILDERS[kind]()
    width = 64 if kind == "sana" else 48  # Sana's pipeline wants multiples of 32
    wide, tall = run(pipe, width=width), run(pipe, height=width)
    for out in (wide, tall):
        assert torch.isfinite(out).all() and out.numel() * 32 == run(pipe).numel() * width
    assert wide.ndim == 3 or wide.shape[-2:] == tall.shape[:-3:-1]


@each
def test_shape(kind: str) -> None:
    """At least two blocks of each kind and two heads; the sequence is as long as the docstrings say."""
    pipe = BUILDERS[kind]()
    model = tiny.denoiser(pipe)
    found = blocks(kind, model)
    if kind not in ("sd", "sdxl"):
        lists = [BLOCK.fullmatch(name)[1] for name in found]  # type: ignore[index]
        assert min(lists.count(name) for name in lists) >= 2
        heads = [m.heads if hasattr(m, "heads") else m.n_heads for m in model.modules() if hasattr(m, "to_q")]
        assert heads and min(heads) >= 2
    lengths: list[int] = []
    main = next(m for n, m in found.items() if "refiner" not in n)
    main.register_forward_pre_hook(
        lambda _, args, kw: lengths.append((args[0] if args else kw["hidden_states"]).shape[1]), with_kwargs=True
    )
    run(pipe, steps=1)
    assert lengths[0] == TOKENS.get(kind, 64)


@each
@torch.no_grad()
def test_every_block_shows(kind: str) -> None:
    """Without one block's weights the picture is another one: none starts, or ends, at nothing."""
    pipe = BUILDERS[kind]()
    model = tiny.denoiser(pipe)
    out = run(pipe, steps=1)
    for name, block in blocks(kind, model).items():
        kept = {k: p.clone() for k, p in block.named_parameters()}
        for p in block.parameters():
            p.zero_()
        assert (run(pipe, steps=1) - out).abs().max() > 1e-4, name
        for k, p in block.named_parameters():
            p.copy_(kept[k])
    assert torch.equal(run(pipe, steps=1), out)


@pytest.mark.parametrize("kind", families.BUILDERS)
def test_nothing_is_zero(kind: str) -> None:
    assert all(p.any() for p in tiny.denoiser(families.BUILDERS[kind]()).parameters())


@pytest.mark.parametrize("kind", ["qwenimage", "sana", "lumina2"])
def test_text_mask(kind: str) -> None:
    """The last token of the conditional text is there and does not count; of the unconditional one it does."""
    pipe = BUILDERS[kind]()
    out = run(pipe)
    call = tiny.inputs(pipe)
    for name, matters in (("prompt_embeds", False), ("negative_prompt_embeds", True)):
        embeds = call[name].clone()
        embeds[:, -1] += 1.0
        assert ((run(pipe, **{name: embeds}) - out).abs().max() > 1e-5) == matters


@pytest.mark.parametrize("kind", [k for k in BUILDERS if k != "dit"])
@torch.no_grad()
def test_pictures(kind: str) -> None:
    """The VAE fits: a picture (or a video) of the size asked for."""
    out = run(BUILDERS[kind](), output_type="pt")
    assert out.shape[-2:] == (32, 32) and torch.isfinite(out).all()
    assert kind != "wan" or out.shape[:2] == (1, 5)


@each
def test_fast(kind: str) -> None:
    """Built and run within a second, at the best of three tries."""

    def seconds() -> float:
        start = time.perf_counter()
        run(BUILDERS[kind]())
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 1.0


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_controlnet(kind: str) -> None:
    """It works, and it is repeatable, and the control picture matters; the process's random numbers stay where they
    were.
    """
    plain = BUILDERS[kind]()
    pipe = tiny.controlnet(plain)
    assert pipe.vae is plain.vae and tiny.denoiser(pipe) is tiny.denoiser(plain)
    state = torch.get_rng_state()
    out = run(pipe)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.isfinite(out).all() and torch.equal(run(tiny.controlnet(BUILDERS[kind]())), out)
    assert (run(plain) - out).abs().max() > 1e-3
    picture = "control_image" if kind == "sd3" else "image"
    assert (run(pipe, **{picture: torch.zeros(1, 3, 32, 32)}) - out).abs().max() > 1e-4


def test_no_controlnet() -> None:
    with pytest.raises(ValueError, match="no such variant of FluxPipeline"):
        tiny.controlnet(tiny.flux())

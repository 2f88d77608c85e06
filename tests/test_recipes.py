"""The training recipes: every stage learns, stages hand over what was learnt, and what comes out is plain diffusers."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel

from diffusion_tokred import zoo
from diffusion_tokred.zoo import scenes

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
SCENES = [scenes.sample_scene(i, relation=None if i == 1 else "above") for i in range(2)]


@pytest.fixture(scope="module")
def recipes():
    sys.path.insert(0, str(SCRIPTS))
    import recipes.text
    import recipes.toy_clip
    import recipes.toy_dit
    import recipes.toy_sd

    yield recipes
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module", params=zoo.NAMES)
def recipe(request, recipes):
    torch.manual_seed(0)
    cls = {"toy-sd": recipes.toy_sd.ToySD, "toy-dit": recipes.toy_dit.ToyDiT}[request.param]
    return cls(zoo.path(request.param), zoo.path(request.param))


def loss(recipe, what, batch=SCENES):
    return recipe.loss(batch, what, random.Random(0), torch.Generator().manual_seed(0))


def test_every_variant_learns(recipe):
    """Each can be backpropagated, trains nothing of the VAE and the T5, and alone objects are no special case."""
    reached = {}
    recipe.variant(recipe.native)
    named = list(recipe.modules.named_parameters())  # before variants put scaffolding into the model's places
    for _, variants in recipe.stages:
        for what in variants:
            for _, p in named:
                p.grad = None
            value = loss(recipe, what)
            value.backward()
            assert 0 < value.item() < 10
            reached[what] = {name for name, p in named if p.grad is not None}
    assert reached[recipe.native] and not any(name.startswith("scaffold") for name in reached[recipe.native])
    first = next(iter(recipe.stages[0][1]))
    assert any(name.startswith("scaffold") for name in reached[first])
    assert all(p.grad is None for part in (recipe.vae, recipe.t5) for p in part.parameters())
    loss(recipe, first, [scenes.sample_scene(3, relation=None)] * 2)


def test_the_native_variant_is_the_plain_model(recipe):
    """After all variants were in place, the denoiser is what diffusers makes of its configuration."""
    for _, variants in recipe.stages:
        for what in variants:
            recipe.variant(what)
    recipe.variant(recipe.native)
    torch.manual_seed(1)
    if hasattr(recipe, "unet"):
        plain = UNet2DConditionModel.from_config(recipe.unet.config)
        inputs = (torch.randn(1, 4, 32, 32), torch.tensor([500]), torch.randn(1, 20, 128))
        trained = recipe.unet
    else:
        plain = SD3Transformer2DModel.from_config(recipe.transformer.config)
        inputs = (torch.randn(1, 4, 32, 32), torch.randn(1, 40, 128), torch.randn(1, 128), torch.tensor([500.0]))
        trained = recipe.transformer
    plain.load_state_dict(trained.state_dict())
    with torch.no_grad():
        assert torch.equal(plain(*inputs).sample, trained(*inputs).sample)


def test_small_patches_begin_where_large_ones_ended(recipes):
    """On pictures whose patches are of one colour, the first layer hands on the same, and the last says the same."""
    dit = recipes.toy_dit.ToyDiT(zoo.path("toy-dit"), zoo.path("toy-dit"))
    coarse = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = coarse.repeat_interleave(4, -1).repeat_interleave(4, -2)
    dit.variant(4)
    embedded = dit.transformer.pos_embed.proj(latents)
    said = dit.transformer.proj_out(torch.ones(128)).view(4, 4, 4)
    dit.grow(4, 2)
    dit.variant(2)
    assert torch.allclose(dit.transformer.pos_embed.proj(latents)[..., ::2, ::2], embedded, atol=1e-5)
    assert torch.allclose(
        dit.transformer.proj_out(torch.ones(128)).view(2, 2, 4).mean((0, 1)), said.mean((0, 1)), atol=1e-5
    )
    dit.grow(2, 1)
    dit.variant(1)
    assert torch.allclose(dit.transformer.pos_embed.proj(latents)[..., ::4, ::4], embedded, atol=1e-5)
    assert torch.allclose(dit.transformer.proj_out(torch.ones(128)), said.mean((0, 1)), atol=1e-5)


def test_a_large_patch_weighs_as_many_small_ones(recipes):
    """Attention over keys that stand for four each equals attention over all of them."""
    q, k, v = (torch.randn(1, 1, n, 8, generator=torch.Generator().manual_seed(n)) for n in (6, 6, 6))
    every = [torch.cat((x[:, :, :4].repeat_interleave(4, 2), x[:, :, 4:]), 2) for x in (k, v)]
    wanted = torch.nn.functional.scaled_dot_product_attention(q, *every)
    with recipes.toy_dit._Proportional(4, 4):
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.allclose(found, wanted, atol=1e-6)


def test_export_and_load(recipe, tmp_path):
    """An export loads as a pipeline, and training goes on from it with the weights that were written."""
    recipe.save(tmp_path, torch.float32)
    again = type(recipe)(tmp_path, tmp_path)
    again.load(tmp_path)
    for (name, a), b in zip(recipe.modules.state_dict().items(), again.modules.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in tmp_path.rglob("*.safetensors"))
    assert not any("_name_or_path" in file.read_text() for file in tmp_path.rglob("*.json"))


def test_words_are_asked_about_what_they_speak_of(recipes):
    scene = scenes.Scene(
        (scenes.Object("red", "star", "big", 0.5, 0.26), scenes.Object("blue", "ring", "small", 0.5, 0.74)),
        "striped",
        "pink",
        "above",
    )
    words = scenes.caption(scene).split()
    told = dict(zip(words, recipes.text.facts(scene, words), strict=True))
    assert told["star"] == told["big"] == dict(color="red", shape="star", place="top", size="big")
    assert told["ring"] == told["blue"] == dict(color="blue", shape="ring", place="bottom", size="small")
    assert told["pink"] == told["on"] == dict(texture="striped", background="pink")
    assert told["above"] == {}
    short = scenes.caption(scene, sizes=False, background=False).split()
    assert "size" not in dict(zip(short, recipes.text.facts(scene, short), strict=True))["star"]


def test_wrong_captions_are_wrong(recipes):
    """The hard negatives of toy-clip: the same scene never, mostly the same words."""
    rng = random.Random(0)
    for i in range(200):
        scene = scenes.sample_scene(i)
        other = scenes.caption(recipes.toy_clip.wrong(scene, rng))
        assert other != scenes.caption(scene)
        if scene.relation is not None:
            kept = set(scenes.caption(scene).split()) ^ set(other.split())
            assert kept <= {"above", "below", "left", "right", "of"}


def test_two_processes_train_one_model(tmp_path):
    """Under torchrun: other scenes in each process, the same weights, one state on disk; a clock for both."""
    code = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import train_zoo
from pathlib import Path

class Tiny(train_zoo.Text):
    stages = ((1.0, {"captions": 4}),)
    drawn = []
    def loss(self, batch, what, rng, noise):
        self.drawn += batch
        return super().loss(batch, what, rng, noise)

run = train_zoo.start(Tiny, Path(sys.argv[2]), steps=3)
run.train()
rank = run.processes.process_index
torch.save([run.parameters, Tiny.drawn, run.busy], Path(sys.argv[2]) / f"seen-{rank}.pt")
"""
    (tmp_path / "two.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "two.py"), str(SCRIPTS), str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(SCRIPTS.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (a, scenes_a, busy_a), (b, scenes_b, busy_b) = (
        torch.load(tmp_path / f"seen-{rank}.pt", weights_only=False) for rank in (0, 1)
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert len(scenes_a) == len(scenes_b) == 12 and not set(scenes_a) & set(scenes_b)
    assert busy_a == busy_b > 0
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 3

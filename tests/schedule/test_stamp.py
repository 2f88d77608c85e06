"""What a policy was made for: model, scheduler, library."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

import diffusion_tokred as tokred
from diffusion_tokred.errors import ConfigError
from diffusion_tokred.schedule import Policy, check_model, config_hash, model_of, scheduler_of
from diffusion_tokred.testing import tiny


def test_the_hash_is_of_the_shape(tmp_path):
    model = tiny.sd().unet
    assert config_hash(model) == config_hash(tiny.sd(seed=7).unet), "a fine-tune has the same"
    assert config_hash(model) != config_hash(tiny.sdxl().unet)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(str(tmp_path))
    assert loaded.config["_name_or_path"]  # where it lies is no part of it
    assert config_hash(loaded) == config_hash(model)
    assert config_hash(torch.nn.Linear(2, 2)) == config_hash(torch.nn.Linear(3, 3)), "no config: the class is all"
    assert len(config_hash(model)) == 16 and int(config_hash(model), 16) >= 0


def test_an_option_at_its_default_is_no_part_of_it():
    """So a release of diffusers with one option more, which old models have at its default, changes no hash."""
    small = dict(sample_size=8, num_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=8)
    bare, spelt = SD3Transformer2DModel(**small), SD3Transformer2DModel(**small, qk_norm=None, patch_size=2)
    other = SD3Transformer2DModel(**small, qk_norm="rms_norm")
    assert config_hash(bare) == config_hash(spelt) != config_hash(other)


def test_schedulers():
    found = scheduler_of(EulerDiscreteScheduler(use_karras_sigmas=True, steps_offset=1))
    assert found["class"] == "EulerDiscreteScheduler" and found["use_karras_sigmas"] is True
    assert "steps_offset" not in found
    assert scheduler_of(FlowMatchEulerDiscreteScheduler(shift=3.0))["shift"] == 3.0
    assert scheduler_of(None) is None


def test_for_pipe(tmp_path):
    pipe, config = tiny.sd3(), tokred.ToCaConfig(interval=3)
    policy = Policy(points=[(1.0, 0.5)]).for_pipe(pipe, config, measured={"speedup": 1.9, "psnr": 38.0})
    assert policy.model == {"class": "SD3Transformer2DModel", "configs": [config_hash(pipe.transformer)]}
    assert policy.scheduler["class"] == "FlowMatchEulerDiscreteScheduler"
    assert policy.library == f"diffusion_tokred {tokred.__version__}"
    assert policy.method == config.to_dict() and policy.measured["psnr"] == 38.0
    assert policy.for_pipe(tiny.sd()).method == policy.method, "what is not given stays"
    assert Policy().for_pipe(pipe.transformer).model == policy.model
    policy.save(tmp_path / "policy.json")
    assert Policy.load(tmp_path / "policy.json") == policy
    assert json.loads((tmp_path / "policy.json").read_text())["_version"] == 2
    for nothing in (object(), pipe.scheduler, type(pipe)):
        with pytest.raises(ConfigError, match="neither a pipeline with a denoiser nor a denoiser"):
            Policy().for_pipe(nothing)


def test_other_models_are_refused():
    model = tiny.sd3().transformer
    check_model(model_of([model]), model)
    check_model(model_of([tiny.sd().unet, model]) | {"class": "SD3Transformer2DModel"}, model)
    for remark in (None, "toy-dit", {"name": "toy-dit"}):
        check_model(remark, model)
    with pytest.raises(
        ConfigError, match=r"made for UNet2DConditionModel of the shape .*this is SD3Transformer2DModel"
    ):
        check_model(model_of([tiny.sd().unet]), model)
    with pytest.raises(ConfigError, match=rf"of the shape {config_hash(model)}, and this .*policy.without_model\(\)"):
        check_model(model_of([model]), tiny.sd3(dual=(0,)).transformer)
    check_model({"class": "SD3Transformer2DModel"}, tiny.sd3(dual=(0,)).transformer)


@pytest.mark.parametrize("library", [3, ["a"], {}])
def test_a_library_that_is_none(library):
    with pytest.raises(ConfigError, match="library of a policy is a name and a version"):
        Policy.from_dict({"_type": "Policy", "_version": 2, "points": [], "library": library})

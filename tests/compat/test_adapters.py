"""Contract 7: LoRA, ControlNet, IP-Adapter, img2img, inpainting, beside a patch."""

import pytest
import torch
from peft import LoraConfig

import diffusion_tokred as tokred
from diffusion_tokred.testing import tiny
from tests.contract.helpers import PIPES, Snapshot, near, patch, run, same

BOTH = pytest.mark.parametrize("config", ["tome-all", "todo"])


def check(pipe, kind, config, loose="nothing", **more):
    """Patched: finite, repeatable, and not the dense picture. Unpatched: what was there before, bit by bit.

    `loose` names attributes that each run replaces, patched or not.
    """
    model = tiny.denoiser(pipe)
    plain = run(pipe, **more)
    before = Snapshot(model)
    patch(pipe, kind, config)
    out = run(pipe, **more)
    assert torch.isfinite(out).all() and (out - plain).abs().max() > 1e-4
    assert same(run(pipe, **more), out)
    assert tokred.report(pipe).tokens_saved > 0.3
    tokred.unpatch(pipe)
    assert [d for d in before.differences(model) if loose not in d] == []
    assert same(run(pipe, **more), plain)
    return out


@BOTH
@pytest.mark.parametrize("variant", [tiny.img2img, tiny.inpaint, tiny.controlnet], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
def test_variants(kind, variant, config):
    if kind == "flux" and variant is tiny.controlnet:
        pytest.skip("tiny has none; residuals are added between blocks, where all tokens are")
    pipe = variant(PIPES[kind]())
    check(pipe, kind, config, steps=3, **({} if variant is tiny.controlnet else dict(strength=0.7)))


def lora(seed=0):
    """Targets of both families; weights drawn by the caller's seed."""
    torch.manual_seed(seed)
    return LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)


@BOTH
@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "sd3-dual", "flux"])  # DiT and PixArt take no adapters
def test_lora(kind, config):
    """Added before or after patching, switched off and on, merged into the weights and back: always the same."""
    first = PIPES[kind]()
    tiny.denoiser(first).add_adapter(lora())
    want = check(first, kind, config)

    pipe = PIPES[kind]()
    model = tiny.denoiser(pipe)
    patch(pipe, kind, config)
    bare = run(pipe)
    model.add_adapter(lora())
    assert same(run(pipe), want) and not torch.equal(want, bare)
    model.disable_adapters()
    assert same(run(pipe), bare)
    model.enable_adapters()
    model.fuse_lora()
    near(run(pipe), want, 1e-3)
    model.unfuse_lora()
    near(run(pipe), want, 1e-3)
    model.delete_adapters("default")
    near(run(pipe), bare, 1e-3)
    tokred.unpatch(pipe)
    plain = PIPES[kind]()
    near(run(pipe), run(plain), 1e-3)


# --- IP-Adapter ------------------------------------------------------------------------------------------------------


def load_ip_adapter(unet, count=1):
    """As `load_ip_adapter` does, from weights drawn here: `count` adapters of 4 image tokens."""
    states = []
    for number in range(count):
        g = torch.Generator().manual_seed(number)
        dim, weights, key = unet.config.cross_attention_dim, {}, 1
        for name in unet.attn_processors:
            if name.endswith("attn2.processor"):
                module = unet.get_submodule(name.removesuffix(".processor"))
                for letter in "kv":
                    weights[f"{key}.to_{letter}_ip.weight"] = torch.randn(module.inner_dim, dim, generator=g) * 0.3
                key += 2
        image = {
            "proj.weight": torch.randn(4 * dim, 32, generator=g) * 0.2,
            "proj.bias": torch.randn(4 * dim, generator=g) * 0.2,
            "norm.weight": torch.ones(dim),
            "norm.bias": torch.zeros(dim),
        }
        states.append({"image_proj": image, "ip_adapter": weights})
    unet._load_ip_adapter_weights(states, low_cpu_mem_usage=False)


def ip_inputs(count=1, masks=False):
    embeds = [torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(50 + i)) for i in range(count)]
    more = dict(ip_adapter_image_embeds=embeds)
    if masks:
        left = torch.zeros(1, 1, 32, 32)
        left[..., :16] = 1
        more["cross_attention_kwargs"] = dict(ip_adapter_masks=[left] if count == 1 else [left, 1 - left])
    return more


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("masks", [False, True], ids=["plain", "masks"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("config", ["tome", "tome-all", "todo"])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_ip_adapter(kind, config, count, masks):
    pipe = PIPES[kind]()
    load_ip_adapter(pipe.unet, count)
    want = check(pipe, kind, config, **ip_inputs(count, masks))
    without = run(patch(PIPES[kind](), kind, config))
    assert not torch.equal(want, without)
    # Loaded after patching, and taken out again.
    late = patch(PIPES[kind](), kind, config)
    run(late)
    load_ip_adapter(late.unet, count)
    assert same(run(late, **ip_inputs(count, masks)), want)
    tokred.unpatch(late)


@pytest.mark.filterwarnings("ignore")
def test_ip_adapter_mask_acts_where_it_is():
    """A mask of zeros is the model without the picture, also with merged queries."""
    pipe = tiny.sd()
    load_ip_adapter(pipe.unet)
    patch(pipe, "sd", "tome-all")
    more = ip_inputs(masks=True)
    nothing = dict(more, cross_attention_kwargs=dict(ip_adapter_masks=[torch.zeros(1, 1, 32, 32)]))
    near(run(pipe, **nothing), run(patch(tiny.sd(), "sd", "tome-all")), 1e-4)
    assert (run(pipe, **more) - run(pipe, **nothing)).abs().max() > 1e-3


@BOTH
@pytest.mark.parametrize("batch", [1, 2])
def test_ip_adapter_of_flux(config, batch):
    """Its attention returns a third result, a row for each image token, which the block adds later."""
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    def pipe():
        made = PIPES["flux"]()
        torch.manual_seed(3)
        for block in made.transformer.transformer_blocks:
            block.attn.processor = FluxIPAdapterAttnProcessor(32, 32, num_tokens=(4,))
        made.transformer.encoder_hid_proj = torch.nn.Identity()
        return made

    image = [torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(9)).expand(batch, -1, -1)]
    more = dict(joint_attention_kwargs=dict(ip_hidden_states=image), batch=batch)
    want = check(pipe(), "flux", config, **more)
    other = dict(more, joint_attention_kwargs=dict(ip_hidden_states=[image[0] * 2]))
    assert not torch.equal(run(patch(pipe(), "flux", config), **other), want)
    plain = pipe()
    zero = dict(more, joint_attention_kwargs=dict(ip_hidden_states=[image[0] * 0]))
    for block in plain.transformer.transformer_blocks:
        for layer in (*block.attn.processor.to_k_ip, *block.attn.processor.to_v_ip):
            layer.bias.data.zero_()
    near(run(patch(plain, "flux", config), **zero), run(patch(PIPES["flux"](), "flux", config), batch=batch), 1e-4)


@BOTH
def test_ip_adapter_scale_and_removal_while_patched(config):
    pipe = tiny.sd()
    load_ip_adapter(pipe.unet)
    patch(pipe, "sd", config)
    full = run(pipe, **ip_inputs())
    pipe.set_ip_adapter_scale(0.0)
    assert not torch.equal(run(pipe, **ip_inputs()), full)
    near(run(pipe, **ip_inputs()), run(patch(tiny.sd(), "sd", config)), 1e-5)
    pipe.set_ip_adapter_scale(1.0)
    assert same(run(pipe, **ip_inputs()), full)
    pipe.unload_ip_adapter()
    assert same(run(pipe), run(patch(tiny.sd(), "sd", config)))
    tokred.unpatch(pipe)
    assert same(run(pipe), run(tiny.sd()))

"""Contract 7: what else changes attention and feed-forward: processors, fused projections, slicing, chunking, FreeU."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, JointAttnProcessor2_0

import diffusion_tokred as tokred
from diffusion_tokred.testing import tiny
from tests.compat.test_adapters import check
from tests.contract.helpers import CONFIGS, PIPES, Snapshot, dense, near, patch, reduced, run, same

EVERY = pytest.mark.parametrize("config", CONFIGS)
UNETS = pytest.mark.parametrize("kind", ["sd", "sdxl"])


@EVERY
@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "pixart", "flux"])
def test_fused_qkv(kind, config):
    pipe = PIPES[kind]()
    pipe.fuse_qkv_projections() if kind.startswith("sd") and kind != "sd3" else pipe.transformer.fuse_qkv_projections()
    near(check(pipe, kind, config), reduced(kind, config), 1e-4)


@pytest.mark.parametrize("config", ["tome-all", "todo", "todo-area"])
@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_fused_while_patched(kind, config):
    pipe = patch(PIPES[kind](), kind, config)
    owner = pipe if kind == "sd" else pipe.transformer
    assert same(run(pipe), reduced(kind, config))
    owner.fuse_qkv_projections()
    near(run(pipe), reduced(kind, config), 1e-4)
    owner.unfuse_qkv_projections()
    near(run(pipe), reduced(kind, config), 1e-4)
    tokred.unpatch(pipe)
    near(run(pipe), dense(kind), 1e-4)
    for module in tiny.denoiser(pipe).modules():  # diffusers leaves `to_qkv`, and we leave diffusers'
        assert "forward" not in vars(module)


@EVERY
@UNETS
def test_sliced(kind, config):
    pipe = PIPES[kind]()
    pipe.enable_attention_slicing(1)
    near(check(pipe, kind, config), reduced(kind, config), 1e-4)


@EVERY
def test_sliced_while_patched(config):
    pipe = patch(tiny.sd(), "sd", config)
    pipe.enable_attention_slicing(1)
    near(run(pipe), reduced("sd", config), 1e-4)
    pipe.disable_attention_slicing()
    near(run(pipe), reduced("sd", config), 1e-4)
    tokred.unpatch(pipe)
    near(run(pipe), dense("sd"), 1e-4)


@EVERY
@UNETS
def test_plain_attention(kind, config):
    pipe = PIPES[kind]()
    pipe.unet.set_attn_processor(AttnProcessor())
    near(check(pipe, kind, config), reduced(kind, config), 1e-4)
    patch(pipe, kind, config)
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    assert same(run(pipe), reduced(kind, config))
    pipe.unet.set_attn_processor(AttnProcessor())
    near(run(pipe), reduced(kind, config), 1e-4)


class Written:
    """A joint attention that calls no SDPA."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        from tests.reference.todo_model import joint_attention

        image, text = joint_attention(attn, hidden_states, encoder_hidden_states, lambda x: x)
        return image if encoder_hidden_states is None else (image, text)


class Doubled(JointAttnProcessor2_0):
    """Somebody's processor, a subclass with a call of its own that ends in the parent's."""

    def __init__(self):
        self.calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return super().__call__(*args, **kwargs)


@pytest.mark.parametrize("kind", ["sd3", "sd3-dual"])
def test_processor_without_sdpa(kind):
    """Nothing to tap: ToDo is refused, before or in the run, with the reason; ToMe needs no tap and works."""
    pipe = PIPES[kind]()
    for module in pipe.transformer.modules():
        if hasattr(module, "processor"):
            module.processor = Written()
    near(check(pipe, kind, "tome-all"), reduced(kind, "tome-all"), 1e-4)
    before = Snapshot(pipe.transformer)
    with pytest.raises(tokred.UnsupportedError, match=r"todo at transformer_blocks\.0\.attn: .*Written.*slicing"):
        patch(pipe, kind, "todo")
    assert before.differences(pipe.transformer) == []


def test_processor_without_sdpa_while_patched():
    pipe = patch(tiny.sd3(), "sd3", "todo")
    own = pipe.transformer.transformer_blocks[1].attn.processor
    pipe.transformer.transformer_blocks[1].attn.processor = Written()
    before = Snapshot(pipe.transformer)
    with pytest.raises(tokred.UnsupportedError, match="Written"):
        run(pipe)
    assert before.differences(pipe.transformer) == []
    pipe.transformer.transformer_blocks[1].attn.processor = own
    assert same(run(pipe), reduced("sd3", "todo"))


def test_processor_replaced_while_patched():
    """The tap is renewed at the next step, and the new processor is there afterwards."""
    pipe = patch(tiny.sd3(), "sd3", "todo")
    run(pipe)
    new = JointAttnProcessor2_0()
    pipe.transformer.transformer_blocks[0].attn.processor = new
    assert same(run(pipe), reduced("sd3", "todo"))
    tokred.unpatch(pipe)
    assert pipe.transformer.transformer_blocks[0].attn.processor is new
    assert same(run(pipe), dense("sd3"))


def test_processor_subclass():
    """Reduced, or refused: never silently dense."""
    pipe = tiny.sd3()
    for block in pipe.transformer.transformer_blocks:
        block.attn.processor = Doubled()
    try:
        patch(pipe, "sd3", "todo")
    except tokred.UnsupportedError as error:
        assert "Doubled" in str(error)
    else:
        near(run(pipe), reduced("sd3", "todo"), 1e-5)


def chunk(pipe, size, dim):
    for module in pipe.unet.modules():
        if hasattr(module, "set_chunk_feed_forward"):
            module.set_chunk_feed_forward(size, dim)


@pytest.mark.parametrize("config", ["tome", "todo"])
def test_chunked_feed_forward_beside_attention(config):
    """What does not touch the feed-forward does not mind that it is chunked."""
    pipe = tiny.sd()
    chunk(pipe, 2, 1)
    near(check(pipe, "sd", config), reduced("sd", config), 1e-4)


@pytest.mark.parametrize("dim", [0, 1])
def test_chunked_feed_forward_merged(dim):
    """Chunks hold some of the tokens, or some of the samples: works, or says what is in the way."""
    pipe = tiny.sd()
    chunk(pipe, 1 if dim == 0 else 2, dim)
    plain = run(pipe)
    tokred.patch(pipe, method="tome", merge_ff=True)
    with pytest.raises(tokred.StateError, match="Chunked"):
        run(pipe)
    tokred.unpatch(pipe)
    assert same(run(pipe), plain)


@pytest.mark.parametrize("config", ["tome-all", "todo"])
@UNETS
def test_freeu(kind, config):
    pipe = PIPES[kind]()
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    out = check(pipe, kind, config)
    assert not torch.equal(out, reduced(kind, config))
    late = patch(PIPES[kind](), kind, config)
    late.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert same(run(late), out)
    late.disable_freeu()
    assert same(run(late), reduced(kind, config))


SDPA_CASES = [("sd", "tome-all"), ("sd3", "todo"), ("sd3-dual", "todo-area"), ("flux", "todo")]


@pytest.mark.parametrize("backend", [torch.nn.attention.SDPBackend.MATH, torch.nn.attention.SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize("kind, config", SDPA_CASES)
def test_sdpa_backends(kind, config, backend):
    expected = reduced(kind, config)  # kept for other tests too, so not to be made under this backend
    pipe = patch(PIPES[kind](), kind, config)
    with torch.nn.attention.sdpa_kernel(backend):
        near(run(pipe), expected, 1e-4)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_callbacks(kind, config):
    """A callback that reads and changes the latents."""
    seen = []

    def halve(pipe, index, t, kwargs):
        seen.append(index)
        kwargs["latents"] = kwargs["latents"] * 0.5
        return kwargs

    pipe = PIPES[kind]()
    more = dict(callback_on_step_end=halve, callback_on_step_end_tensor_inputs=["latents"])
    check(pipe, kind, config, **more)
    assert seen == [0, 1] * 4


@pytest.mark.parametrize("config", ["tome", "todo", "todo-area"])
def test_attention_mask(config):
    """A mask over the image tokens, as `UNet2DConditionModel` takes it: what is masked has no say, reduced or not."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        mid_block_type=None, attention_head_dim=2,
    ).eval()  # fmt: skip
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32)
    mask = torch.ones(2, 64)
    mask[:, 32:] = 0
    with torch.no_grad():
        plain = unet(x, 10, text, attention_mask=mask).sample
        assert not torch.equal(plain, unet(x, 10, text).sample)
        patch(unet, "sd", config)
        try:
            out = unet(x, 10, text, attention_mask=mask).sample
        except (tokred.UnsupportedError, tokred.StateError) as error:
            assert "mask" in str(error)
        else:
            assert torch.isfinite(out).all() and not torch.equal(out, unet(x, 10, text).sample)
        tokred.unpatch(unet)
        assert same(unet(x, 10, text, attention_mask=mask).sample, plain)


@pytest.mark.parametrize("config", ["tome-all", "todo"])
def test_attention_backend_is_followed(config, monkeypatch):
    """`set_attention_backend`, before and while patched, reaches the dispatcher of a tapped processor."""
    from diffusers.models.transformers import transformer_flux

    seen = []
    dispatch = transformer_flux.dispatch_attention_fn

    def watched(*args, backend=None, **kwargs):
        seen.append(backend)
        return dispatch(*args, backend=backend, **kwargs)

    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", watched)
    pipe = patch(PIPES["flux"](), "flux", config)
    expected = run(pipe)
    assert set(seen) == {None}
    for block in pipe.transformer.transformer_blocks:
        block.attn.processor._attention_backend = "_native_math"
    seen.clear()
    near(run(pipe), expected, 1e-4)
    assert set(seen) == {None, "_native_math"} and seen.count("_native_math") == len(seen) // 2
    tokred.unpatch(pipe)
    assert pipe.transformer.transformer_blocks[0].attn.processor._attention_backend == "_native_math"

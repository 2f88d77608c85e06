"""Train the embedded pipelines from scratch on scenes that are drawn on the fly.

    python scripts/train_zoo.py vae     --out runs/vae     --minutes 10      # first: both pipelines share it
    python scripts/train_zoo.py toy-sd  --out runs/toy-sd  --minutes 120 --vae runs/vae/export
    python scripts/train_zoo.py toy-dit --out runs/toy-dit --minutes 120 --vae runs/vae/export

The same command again continues after a kill, to the step. --init-from FOLDER starts with the weights of an exported
pipeline and a fresh optimiser. --export FOLDER writes a run's averaged weights as an ordinary fp16 diffusers folder; a
finished run does so by itself. Nothing of the data is stored: batch k follows from (seed, k) alone.
"""

import copy
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import diffusers
import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, DiffusionPipeline, SD3Transformer2DModel, UNet2DConditionModel
from PIL import Image
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from diffusion_tokred.zoo import scenes

LENGTH = 20  # tokens of a caption with its padding
WORDS = ("<pad>", "</s>", "<unk>", *scenes.WORDS)
VOCABULARY = 64  # rows of the embeddings: room for words to come
SYNONYMS = {"the": "a", "an": "a", "grey": "gray", "large": "big", "under": "below", "over": "above"}


def tokenizer() -> PreTrainedTokenizerFast:
    """One id a word, `</s>` at the end, any other word `<unk>`."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tidy = [normalizers.Lowercase(), normalizers.Replace(Regex("[^a-z<>/ ]"), " ")]
    tidy += [normalizers.Replace(f"to the {side} of", f"{side} of") for side in ("left", "right")]
    tidy += [normalizers.Replace(Regex(rf"\b{old}\b"), new) for old, new in SYNONYMS.items()]
    words.normalizer = normalizers.Sequence(tidy)
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=LENGTH, **special)


def t5() -> T5EncoderModel:
    """0.5 M parameters, bidirectional: relations are learnt several times faster than with a causal CLIP."""
    shape = dict(d_model=128, d_kv=32, d_ff=256, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu")
    return T5EncoderModel(T5Config(vocab_size=VOCABULARY, dropout_rate=0.0, pad_token_id=0, eos_token_id=1, **shape))


def clip() -> CLIPTextModelWithProjection:
    """Only there because an SD3 pipeline has two: hands the word embeddings through, and a pooled vector."""
    shape = dict(hidden_size=64, intermediate_size=128, projection_dim=64, num_hidden_layers=1, num_attention_heads=2)
    ids = dict(bos_token_id=1, eos_token_id=1, pad_token_id=0, max_position_embeddings=LENGTH)
    return CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=VOCABULARY, **shape, **ids))


def captions(batch: list[scenes.Scene], rng: random.Random) -> list[str]:
    """Mostly whole captions; some shorter, some with a word from outside the world, one of ten empty (for guidance)."""
    texts = []
    for scene in batch:
        words = scenes.caption(scene, sizes=rng.random() > 0.1, background=rng.random() > 0.1).split()
        if rng.random() < 0.05:
            words.insert(rng.randint(0, len(words)), "<unk>")
        texts.append("" if rng.random() < 0.1 else " ".join(words))
    return texts


class VAE:
    """AutoencoderKL, 0.65 M parameters: 4 latent channels at a quarter of the picture's size."""

    lr = 2e-3
    stages = ((0.5, {32: 8, 64: 4}), (0.5, {64: 4, 32: 8, 128: 1}))

    def __init__(self, vae: Path | None = None) -> None:
        self.vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(16, 32, 64),
            latent_channels=4,
            norm_num_groups=1,  # small groups would take the colour out of flat pictures
            sample_size=128,
            scaling_factor=1.0,
            shift_factor=0.0,
            mid_block_add_attention=False,
        )
        self.modules = nn.ModuleDict({"vae": self.vae})

    def loss(self, batch: list[scenes.Scene], size: int, rng: random.Random, noise: torch.Generator) -> torch.Tensor:
        pixels = scenes.render(batch, size, self.vae.device) * 2 - 1
        posterior = self.vae.encode(pixels).latent_dist
        error = self.vae.decode(posterior.sample(noise)).sample - pixels
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        # Three channels lean on the small picture: colours are found at once, and latents look like what they mean.
        hint = (posterior.mean[:, :3] - 2 * F.avg_pool2d(pixels, 4)).square().mean()
        return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges + 1e-4 * kl + 0.1 * hint

    @torch.no_grad()
    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """With the latents' mean and spread folded into the 1x1 convolutions: scale 1 and shift 0 are then right."""
        vae = copy.deepcopy(self.vae).cpu()
        pixels = scenes.render([scenes.sample_scene(random.Random(f"statistics-{i}")) for i in range(512)], 64) * 2 - 1
        z = torch.cat([vae.encode(part).latent_dist.mode() for part in pixels.split(64)])
        mean, std, n = z.mean((0, 2, 3)), z.std((0, 2, 3)), z.shape[1]
        vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
        vae.post_quant_conv.weight *= std[None, :, None, None]
        vae.quant_conv.weight[:n] /= std[:, None, None, None]
        vae.quant_conv.bias[:n] = (vae.quant_conv.bias[:n] - mean) / std
        vae.quant_conv.bias[n:] -= 2 * std.log()
        vae.to(dtype).save_pretrained(folder)

    def load(self, folder: Path) -> None:
        self.vae.load_state_dict(AutoencoderKL.from_pretrained(folder).float().state_dict())

    @torch.no_grad()
    def sheet(self, size: int) -> torch.Tensor:
        """Scenes and, beside them, what comes back: `(B, 3, H, W)` in [0, 1]."""
        pixels = scenes.render(scenes.evaluation_scenes(16), size, self.vae.device)
        again = (self.vae(pixels * 2 - 1).sample / 2 + 0.5).clamp(0, 1)
        error = (again - pixels).square().mean((1, 2, 3))
        print(f"PSNR at {size} px: {-10 * error.log10().mean():.2f} dB", flush=True)
        return torch.stack((pixels, again), 1).flatten(0, 1)


class Denoiser:
    """A pipeline on latents of a frozen VAE; `modules` are those of its parts that are trained."""

    options: dict[str, Any] = dict(num_inference_steps=25, guidance_scale=3.0)  # of the sample sheets

    def assemble(self, pipeline: type[DiffusionPipeline], vae: Path, **parts: Any) -> None:
        self.vae = AutoencoderKL.from_pretrained(vae, torch_dtype=torch.float32).requires_grad_(False)
        self.modules = nn.ModuleDict({name: part for name, part in parts.items() if isinstance(part, nn.Module)})
        self.pipeline = pipeline(vae=self.vae, **parts)
        self.pipeline.set_progress_bar_config(disable=True)

    def latents(self, batch: list[scenes.Scene], size: int) -> torch.Tensor:
        """`(B, 4, size / 4, size / 4)`, of about unit variance."""
        device = next(self.modules.parameters()).device
        with torch.no_grad():
            z = self.vae.to(device).encode(scenes.render(batch, size, device) * 2 - 1).latent_dist.mode()
        return (z - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def ids(self, batch: list[scenes.Scene], rng: random.Random) -> torch.Tensor:
        text = self.pipeline.tokenizer(captions(batch, rng), padding="max_length", return_tensors="pt")
        return text.input_ids.to(next(self.modules.parameters()).device)

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        pipe = copy.deepcopy(self.pipeline).to("cpu")
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.to(dtype)
        pipe.save_pretrained(folder, max_shard_size="12MB")  # no file over 16 MiB
        for file in folder.rglob("*.json"):
            # The class has a new name in transformers 5; all versions know the old one. And no path of this machine.
            lines = file.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast").splitlines(keepends=True)
            file.write_text("".join(line for line in lines if '"_name_or_path"' not in line))
        for file in folder.rglob("*.safetensors"):
            file.chmod(0o644)

    def load(self, folder: Path) -> None:
        trained = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        for name, module in self.modules.items():
            module.load_state_dict(getattr(trained, name).state_dict())

    def sheet(self, size: int) -> torch.Tensor:
        """Eight evaluation prompts, sampled: `(B, 3, H, W)` in [0, 1]."""
        noise = [torch.Generator().manual_seed(seed) for seed in range(8)]
        options = dict(height=size, width=size, generator=noise, output_type="pt") | self.options
        return self.pipeline(scenes.evaluation_prompts(8), **options).images.float()


class ToySD(Denoiser):
    """StableDiffusionPipeline, 128 px: a UNet of 3.2 M parameters, v-prediction, a T5 encoder in the text slot."""

    lr = 1e-3
    stages = ((0.5, {64: 16}), (0.5, {128: 8}))

    def __init__(self, vae: Path) -> None:
        self.unet = UNet2DConditionModel(
            sample_size=32,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(32, 64, 128),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=128,
            attention_head_dim=2,  # diffusers' name for the number of heads
        )
        self.scheduler = diffusers.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            steps_offset=1,
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            rescale_betas_zero_snr=True,
        )
        none = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        parts = dict(unet=self.unet, text_encoder=t5(), tokenizer=tokenizer(), scheduler=self.scheduler)
        self.assemble(diffusers.StableDiffusionPipeline, vae, **parts, **none)

    def loss(self, batch: list[scenes.Scene], size: int, rng: random.Random, noise: torch.Generator) -> torch.Tensor:
        x = self.latents(batch, size)
        # Layout is decided at high noise, and more pixels need more of it: times are shifted as in flow matching.
        u, shift = torch.rand(len(x), generator=noise), 2.0 * (size / 64) ** 0.5
        steps = (1000 * shift * u / (1 + (shift - 1) * u)).long().clamp(max=999).to(x.device)
        eps = torch.randn(x.shape, generator=noise).to(x.device)
        text = self.modules["text_encoder"](self.ids(batch, rng))[0]
        velocity = self.unet(self.scheduler.add_noise(x, eps, steps), steps, text).sample
        return F.mse_loss(velocity.float(), self.scheduler.get_velocity(x, eps, steps))


class ToyDiT(Denoiser):
    """StableDiffusion3Pipeline, 256 px: an MMDiT of 7.8 M parameters, flow matching; T5 does the reading."""

    lr = 1e-3
    stages = ((0.5, {64: 16}), (0.25, {128: 8, 256: 4}), (0.25, {256: 4, 128: 8}))
    options = Denoiser.options | dict(max_sequence_length=LENGTH)

    def __init__(self, vae: Path) -> None:
        self.transformer = SD3Transformer2DModel(
            sample_size=64,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=6,
            attention_head_dim=64,
            num_attention_heads=3,
            caption_projection_dim=192,
            joint_attention_dim=128,
            pooled_projection_dim=128,
            pos_embed_max_size=64,
            qk_norm="rms_norm",
        )
        parts = dict(transformer=self.transformer, text_encoder=clip(), text_encoder_2=clip(), text_encoder_3=t5())
        words = dict(tokenizer=tokenizer(), tokenizer_2=tokenizer(), tokenizer_3=tokenizer())
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.assemble(diffusers.StableDiffusion3Pipeline, vae, scheduler=scheduler, **parts, **words)
        self.table = self.transformer.pos_embed.pos_embed.unflatten(1, (64, 64)).permute(0, 3, 1, 2).clone()

    def positions(self, size: int) -> None:
        """A small picture takes the native one's positions, pooled: what is learnt of layout carries over."""
        embed, table = self.transformer.pos_embed, self.table
        if size < 256:
            table = F.adaptive_avg_pool2d(table[:, :, 16:48, 16:48], size // 8)
        embed.pos_embed = table.flatten(2).transpose(1, 2).to(self.transformer.device)
        embed.pos_embed_max_size = table.shape[-1]

    def loss(self, batch: list[scenes.Scene], size: int, rng: random.Random, noise: torch.Generator) -> torch.Tensor:
        x = self.latents(batch, size)
        self.positions(size)
        mean = 1.0 + 0.35 * (size // 128)  # toward noise, where layout is decided; the more so the more pixels
        sigma = torch.sigmoid(torch.randn(len(x), generator=noise) + mean).to(x.device)
        eps = torch.randn(x.shape, generator=noise).to(x.device)
        ids = self.ids(batch, rng)
        # The pipeline pads T5 to 256 tokens unless told otherwise, and has no mask: the model must know both lengths.
        padding = 256 - LENGTH if rng.random() < (0.5 if size == 256 else 0.07) else 0
        clips = [self.modules[name](ids, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")]
        words = torch.cat([c.hidden_states[-2] for c in clips], -1)
        text = torch.cat((words, self.modules["text_encoder_3"](F.pad(ids, (0, padding)))[0]), 1)
        w, pooled = sigma[:, None, None, None], torch.cat([c.text_embeds for c in clips], -1)
        flow = self.transformer((1 - w) * x + w * eps, text, pooled, 1000 * sigma).sample
        return F.mse_loss(flow.float(), eps - x)

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        self.positions(256)
        super().save(folder, dtype)

    def sheet(self, size: int) -> torch.Tensor:
        self.positions(size)
        return super().sheet(size)


RECIPES = {"vae": VAE, "toy-sd": ToySD, "toy-dit": ToyDiT}


@dataclass
class Run:
    """One training run. Its state is in `out`; as data and noise follow from (seed, step), no generator is saved."""

    recipe: VAE | Denoiser
    out: Path
    minutes: float | None = None
    steps: int | None = None
    seed: int = 0
    threads: int = 1
    bf16: bool = False
    save_every: float = 2
    sheet_every: float = 10
    device: str = "cpu"

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        modules = self.recipe.modules.train().to(self.device)
        self.parameters = dict(modules.named_parameters())
        self.optimizer = torch.optim.AdamW(modules.parameters(), lr=self.recipe.lr, betas=(0.9, 0.99), fused=True)
        self.step, self.busy, self.stop = 0, 0.0, False
        self.restart_average()

    def restart_average(self) -> None:
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}

    def save(self) -> None:
        state = dict(step=self.step, busy=self.busy, seed=self.seed, ema=self.ema)
        state |= dict(modules=self.parameters, optimizer=self.optimizer.state_dict())
        torch.save(state, self.out / "state.tmp")
        os.replace(self.out / "state.tmp", self.out / "state.pt")

    def resume(self) -> bool:
        if not (self.out / "state.pt").exists():
            return False
        state = torch.load(self.out / "state.pt", map_location=self.device, weights_only=True)
        self.step, self.busy, self.seed, self.ema = (state[key] for key in ("step", "busy", "seed", "ema"))
        self.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(state["modules"][name])
        return True

    def progress(self) -> float:
        return min(1.0, self.step / self.steps if self.steps else self.busy / (60 * self.minutes))

    def sizes(self) -> dict[int, int]:
        """{picture size: batch} of the present stage; the first size leads."""
        sizes, left = {}, self.progress()
        for share, sizes in self.recipe.stages:  # noqa: B007 (the last one, when all is done)
            left -= share
            if left < 0:
                break
        return sizes

    def advance(self) -> tuple[int, float]:
        """One optimiser step: the picture size and the loss."""
        rng = random.Random(f"{self.seed}-{self.step}")
        sizes = self.sizes()
        size = rng.choices(list(sizes), [5, 1, 1][: len(sizes)])[0]
        batch = [scenes.sample_scene(rng) for _ in range(sizes[size])]
        noise = torch.Generator().manual_seed(rng.getrandbits(63))
        rate = min(1.0, (self.step + 1) / 100, max(0.03, (1 - self.progress()) / 0.35))  # warm-up, plateau, decay
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * rate
        with torch.autocast(self.device, torch.bfloat16) if self.bf16 else nullcontext():
            loss = self.recipe.loss(batch, size, rng, noise)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        # The average looks back over a tenth of the run so far, at most 2,000 steps.
        weight = max(0.0005, 10 / (self.step + 10))
        torch._foreach_lerp_(list(self.ema.values()), [p.detach() for p in self.parameters.values()], weight)
        return size, loss.item()

    @contextmanager
    def averaged(self) -> Iterator[VAE | Denoiser]:
        """The recipe with its averaged weights in place."""
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(self.ema[name])
            yield self.recipe
            for name, p in self.parameters.items():
                p.copy_(kept[name])

    def sheet(self, size: int) -> None:
        with self.averaged() as recipe:
            pictures = recipe.sheet(size)
        rows = pictures.unflatten(0, (-1, 4)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
        Image.fromarray((rows * 255).round().byte().cpu().numpy()).save(self.out / f"sheet-{self.step:07d}-{size}.png")

    def export(self, folder: Path) -> None:
        with self.averaged() as recipe:
            recipe.save(folder, torch.float16)

    def train(self) -> None:
        def finish(*_: Any) -> None:
            self.stop = True

        handlers = {number: signal.signal(number, finish) for number in (signal.SIGTERM, signal.SIGINT)}
        saved = drawn = self.busy
        losses: dict[int, float] = {}
        text = TextColumn("step {task.fields[step]} {task.percentage:.1f}% {task.fields[note]}")
        with Progress(BarColumn(), text, TimeElapsedColumn(), TimeRemainingColumn()) as bar:
            task = bar.add_task("", total=1.0, step=self.step, note="")
            while self.progress() < 1 and not self.stop:
                start = time.process_time()
                size, loss = self.advance()
                # This process's time, not the wall's: a run that is paused or shares its cores trains as much.
                self.busy += (time.process_time() - start) / self.threads
                losses[size] = losses.get(size, loss) * 0.98 + loss * 0.02
                note = " ".join(f"{side}px {value:.4f}" for side, value in sorted(losses.items()))
                bar.update(task, completed=self.progress(), step=self.step, note=note)
                if self.step % 100 == 0:
                    record = json.dumps(dict(step=self.step, minutes=round(self.busy / 60, 2), size=size, loss=losses))
                    with open(self.out / "log.jsonl", "a") as log:
                        log.write(record + "\n")
                    if not bar.console.is_terminal:
                        print(f"{self.progress():.1%} {record}", flush=True)
                if self.busy - saved > 60 * self.save_every:
                    self.save()
                    saved = self.busy
                if self.busy - drawn > 60 * self.sheet_every:
                    self.sheet(size)
                    drawn = self.busy
        self.save()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if not self.stop:
            self.sheet(next(iter(self.sizes())))
            self.export(self.out / "export")


def start(recipe: Callable[[], VAE | Denoiser], out: Path, *, init_from: Path | None = None, **options: Any) -> Run:
    """A run at its beginning, or where it was left."""
    torch.set_num_threads(options.get("threads", 1))
    torch.manual_seed(options.get("seed", 0))
    run = Run(recipe(), out, **options)
    if not run.resume() and init_from:
        run.recipe.load(init_from)
        run.restart_average()
    return run


def main(
    model: Annotated[Literal["vae", "toy-sd", "toy-dit"], typer.Argument(help="The VAE first: both others need it.")],
    out: Annotated[Path, typer.Option(help="Folder of the run: state, log, sample sheets, export.")],
    vae: Annotated[Path | None, typer.Option(help="Folder of the frozen VAE; else that of --init-from.")] = None,
    init_from: Annotated[Path | None, typer.Option(help="Exported folder to start from, new optimiser.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Length of the run: minutes of CPU time per thread.")] = None,
    steps: Annotated[int | None, typer.Option(help="Length of the run in optimiser steps instead.")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights, the scenes and the noise.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    bf16: Annotated[bool, typer.Option("--bf16", help="Autocast to bfloat16; the weights stay float32.")] = False,
    save_every: Annotated[float, typer.Option(help="Minutes between checkpoints.")] = 2,
    sheet_every: Annotated[float, typer.Option(help="Minutes between sample sheets.")] = 10,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    export: Annotated[Path | None, typer.Option(help="Only write the run's averaged weights here, and end.")] = None,
) -> None:
    if export is None and (minutes is None) == (steps is None):
        raise typer.BadParameter("give the length of the run: --minutes or --steps, one of them")
    vae = vae or (init_from and init_from / "vae")
    if model != "vae" and vae is None:
        raise typer.BadParameter("the pipelines need --vae, the export folder of a finished VAE run (or --init-from)")
    options = dict(minutes=minutes, steps=steps, seed=seed, threads=threads, bf16=bf16, device=device)
    options |= dict(save_every=save_every, sheet_every=sheet_every)
    run = start(lambda: RECIPES[model](vae), out, init_from=init_from, **options)
    run.export(export) if export else run.train()


main.__doc__ = __doc__

if __name__ == "__main__":
    typer.run(main)

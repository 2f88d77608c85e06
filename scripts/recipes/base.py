"""What a recipe is, and what those of the two pipelines share."""

import copy
import random
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from diffusion_tokred.evaluation import scenes as scorer
from diffusion_tokred.zoo import scenes
from recipes.text import captions

NATIVE = 128  # pixels a side
SCAFFOLD = "scaffold.safetensors"  # what only training needs, kept so that it can go on from an exported folder


class Recipe(Protocol):
    """A model and how it learns; `scripts/train_zoo.py` does the rest.

    Attributes:
        modules: what is trained.
        lr: learning rate of the plateau.
        stages: `(share of the run, {variant: batch size})`; a step draws one of the variants, the first most often.
    """

    modules: nn.ModuleDict
    lr: float
    stages: tuple[tuple[float, dict[Any, int]], ...]

    def loss(self, batch: list[scenes.Scene], what: Any, rng: random.Random, noise: torch.Generator) -> torch.Tensor:
        """Scalar loss of a batch in one variant."""

    def grow(self, old: Any, new: Any) -> None:
        """Called once between stages, with the leading variants of both."""

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """Write an ordinary diffusers folder."""

    def load(self, folder: Path) -> None:
        """Take the weights of such a folder."""

    def sheet(self, what: Any) -> torch.Tensor | None:
        """Pictures to look at, `(B, 3, H, W)` in [0, 1]."""


def focus(batch: list[scenes.Scene], side: int, device: torch.device) -> torch.Tensor:
    """1 around the objects, 0 elsewhere: `(B, 1, side, side)`."""
    middle = (torch.arange(side, device=device) + 0.5) / side
    near = torch.zeros(len(batch), 1, side, side, device=device)
    for layer in range(2):
        rows = [i for i, scene in enumerate(batch) if len(scene.objects) > layer]
        if not rows:
            continue
        chosen = [batch[i].objects[layer] for i in rows]
        values = torch.tensor([(o.x, o.y, scenes.SIZES[o.size]) for o in chosen], device=device)[..., None, None]
        x, y, r = values.unbind(1)
        near[rows, 0] = torch.maximum(near[rows, 0], (torch.hypot(middle - x, middle[:, None] - y) < 1.3 * r).float())
    return near


def tidy(folder: Path) -> None:
    """Makes an exported folder fit for shipping: readable by all, by all versions, without a path of this machine."""
    for file in folder.rglob("*.json"):
        # The class has a new name in transformers 5; all versions know the old one.
        lines = file.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast").splitlines(keepends=True)
        file.write_text("".join(line for line in lines if '"_name_or_path"' not in line))
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)


class Denoiser:
    """A pipeline on latents of a frozen VAE and a frozen T5; `modules` are those of its parts that are trained."""

    modules: nn.ModuleDict
    native: Any  # the variant that is exported
    options: dict[str, Any] = dict(num_inference_steps=20, guidance_scale=3.0)  # of the sample sheets
    reader = "text_encoder"  # the T5's place in the pipeline

    def assemble(self, pipeline: type[DiffusionPipeline], vae: Path, scaffold: nn.Module, **parts: Any) -> None:
        self.vae = AutoencoderKL.from_pretrained(vae / "vae", torch_dtype=torch.float32).requires_grad_(False).eval()
        self.scaffold = scaffold
        self.kept: dict[tuple[scenes.Scene, int], torch.Tensor] = {}
        self.pipeline = pipeline(vae=self.vae, **parts)
        self.pipeline.set_progress_bar_config(disable=True)
        self.t5: T5EncoderModel = getattr(self.pipeline, self.reader).requires_grad_(False).eval()
        learn = {name: part for name, part in parts.items() if isinstance(part, nn.Module) and part is not self.t5}
        self.modules = nn.ModuleDict(learn | {"scaffold": scaffold})

    @property
    def device(self) -> torch.device:
        return next(self.modules.parameters()).device

    @torch.no_grad()
    def latents(self, batch: list[scenes.Scene], size: int) -> torch.Tensor:
        """`(B, 4, size / 4, size / 4)`, of about unit variance; kept a while, as scenes come back in later steps."""
        new = [scene for scene in dict.fromkeys(batch) if (scene, size) not in self.kept]
        if new:
            pixels = scenes.render(new, size, self.device) * 2 - 1
            z = self.vae.to(self.device).encode(pixels).latent_dist.mode()
            z = (z - self.vae.config.shift_factor) * self.vae.config.scaling_factor
            self.kept |= zip(((scene, size) for scene in new), z, strict=True)
        found = torch.stack([self.kept[scene, size] for scene in batch])
        for old in list(self.kept)[: max(0, len(self.kept) - 1024)]:
            del self.kept[old]
        return found

    def ids(self, batch: list[scenes.Scene], rng: random.Random) -> torch.Tensor:
        words: PreTrainedTokenizerFast = self.pipeline.tokenizer
        return words(captions(batch, rng), padding="max_length", return_tensors="pt").input_ids.to(self.device)

    @torch.no_grad()
    def read(self, ids: torch.Tensor) -> torch.Tensor:
        return self.t5.to(self.device)(ids)[0]

    def error(
        self, got: torch.Tensor, wanted: torch.Tensor, sigma: torch.Tensor, batch: list[scenes.Scene]
    ) -> torch.Tensor:
        """Squared error; at low noise, where outlines are drawn, objects count up to three times."""
        weight = 1 + 2 * (1 - sigma.view(-1, 1, 1, 1)) * focus(batch, got.shape[-1], got.device)
        return (F.mse_loss(got.float(), wanted, reduction="none") * weight).sum() / (weight.sum() * got.shape[1])

    def variant(self, what: Any) -> None:
        """Put the denoiser into the form that a stage trains."""

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        self.variant(self.native)
        pipe = copy.deepcopy(self.pipeline).to("cpu")
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.to(dtype)
        pipe.save_pretrained(folder, max_shard_size="12MB")  # no file over 16 MiB
        save_file({key: v.to("cpu", dtype) for key, v in self.scaffold.state_dict().items()}, folder / SCAFFOLD)
        tidy(folder)

    def load(self, folder: Path) -> None:
        trained = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        for name, module in self.modules.items():
            if name != "scaffold":
                module.load_state_dict(getattr(trained, name).state_dict())
        self.scaffold.load_state_dict(load_file(folder / SCAFFOLD))

    def sheet(self, what: Any) -> torch.Tensor:
        """Sixteen evaluation prompts, sampled at the native size. Prints how many facts the pictures have right."""
        self.variant(what)
        noise = [torch.Generator().manual_seed(seed) for seed in range(16)]
        options = dict(height=NATIVE, width=NATIVE, generator=noise, output_type="pt") | self.options
        pictures = self.pipeline(scenes.evaluation_prompts(16), **options).images.float().clamp(0, 1)
        scores = scorer.score(scenes.evaluation_scenes(16), scorer.read(pictures))
        print(f"{what}: " + ", ".join(f"{name} {s.right}/{s.total}" for name, s in scores.items()), flush=True)
        return pictures

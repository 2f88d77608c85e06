"""toy-clip: a CLIPModel for the toy world, whose scores and features stand in for CLIP's where there is no network.

Hard negatives (colours swapped, the relation turned round) make it read more than a bag of words, and both towers also
learn by a linear layer to tell what is where, so that a picture's features hold all that a scene consists of.
"""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from diffusion_tokred.zoo import scenes
from recipes.base import NATIVE, tidy
from recipes.text import LENGTH, OPPOSITE, PLACES, VOCABULARY, captions, tokenizer

WHERE = tuple(PLACES.values())
# One answer a place: nothing, or which colour (shape) is there; and the background.
QUESTIONS = (len(WHERE) * (len(scenes.COLORS) + 1), len(WHERE) * (len(scenes.SHAPES) + 1))
BEHIND = (len(scenes.TEXTURES), len(scenes.BACKGROUNDS))


def answers(batch: list[scenes.Scene], fact: str) -> torch.Tensor:
    """`(B, places)`: 0 where nothing is, else 1 + the index of the object's colour or shape."""
    names = list(scenes.COLORS if fact == "color" else scenes.SHAPES)
    found = torch.zeros(len(batch), len(WHERE), dtype=torch.long)
    for i, scene in enumerate(batch):
        for o, relation in zip(scene.objects, (scene.relation, OPPOSITE.get(scene.relation or "")), strict=False):
            found[i, WHERE.index(PLACES[relation])] = 1 + names.index(getattr(o, fact))
    return found


def wrong(scene: scenes.Scene, rng: random.Random) -> scenes.Scene:
    """The same words in another order: colours or shapes swapped, the relation turned. A lone object is recoloured."""
    if scene.relation is None:
        (only,) = scene.objects
        other = rng.choice([c for c in scenes.COLORS if c != only.color])
        return replace(scene, objects=(replace(only, color=other),))
    kind, (a, b) = rng.randrange(3), scene.objects
    if kind == 0:
        return replace(scene, relation=OPPOSITE[scene.relation])
    if kind == 1 and a.shape != b.shape:
        return replace(scene, objects=(replace(a, shape=b.shape), replace(b, shape=a.shape)))
    return replace(scene, objects=(replace(a, color=b.color), replace(b, color=a.color)))


class ToyCLIP:
    """CLIPModel of 1.1 M parameters: 128 px in patches of 16, four layers of width 128."""

    lr = 1e-3
    stages: tuple[tuple[float, dict[Any, int]], ...] = ((1.0, {NATIVE: 64}),)

    def __init__(self) -> None:
        tower = dict(hidden_size=128, intermediate_size=256, num_attention_heads=4)
        ids = dict(bos_token_id=1, eos_token_id=1, pad_token_id=0, max_position_embeddings=LENGTH)
        text = dict(vocab_size=VOCABULARY, num_hidden_layers=3, **tower, **ids)
        vision = dict(image_size=NATIVE, patch_size=16, num_hidden_layers=4, **tower)
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)
        self.model, self.tokenizer = CLIPModel(config), tokenizer()
        self.heads = nn.ModuleDict({name: nn.Linear(128, sum(QUESTIONS + BEHIND)) for name in ("vision", "text")})
        self.modules = nn.ModuleDict({"model": self.model, "heads": self.heads})

    def grow(self, old: Any, new: Any) -> None:
        """There is one stage only."""

    def told(self, features: torch.Tensor, tower: str, batch: list[scenes.Scene]) -> torch.Tensor:
        """How badly a tower's features tell what is where."""
        colors, shapes, texture, tone = self.heads[tower](features).float().split(QUESTIONS + BEHIND, -1)
        device = features.device
        losses = []
        for fact, found, weight in (("color", colors, 1), ("shape", shapes, 5)):  # shapes are the last to be learnt
            by_place = found.unflatten(-1, (len(WHERE), -1)).flatten(0, 1)
            losses.append(weight * F.cross_entropy(by_place, answers(batch, fact).flatten().to(device)))
        behind = (texture, [scenes.TEXTURES.index(s.texture) for s in batch])
        losses.append(F.cross_entropy(behind[0], torch.tensor(behind[1], device=device)))
        names = list(scenes.BACKGROUNDS)
        losses.append(F.cross_entropy(tone, torch.tensor([names.index(s.background) for s in batch], device=device)))
        return torch.stack(losses).sum()

    def loss(self, batch: list[scenes.Scene], what: int, rng: random.Random, noise: torch.Generator) -> torch.Tensor:
        device = self.model.device
        # The judge knows all pairs, those too that the painters never see.
        batch = [scenes.sample_scene(rng, held_out=True) if rng.random() < 0.1 else scene for scene in batch]
        pixels = scenes.render(batch, what, device)
        grain = 0.1 * torch.rand(len(batch), 1, 1, 1, generator=noise) * torch.randn(pixels.shape, generator=noise)
        pixels = (pixels + grain.to(device)).clamp(0, 1) * 2 - 1
        texts = [scenes.caption(scene) for scene in batch]
        texts += [scenes.caption(wrong(scene, rng)) for scene in batch]
        if rng.random() < 0.2:
            texts[: len(batch)] = [text or "a" for text in captions(batch, rng)]
        ids = self.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids.to(device)
        seen = self.model.vision_model(pixels).pooler_output
        read = self.model.text_model(ids).pooler_output
        images = F.normalize(self.model.visual_projection(seen), dim=-1)
        words = F.normalize(self.model.text_projection(read), dim=-1)
        logits = self.model.logit_scale.exp().clamp(max=100) * images @ words.T
        right = torch.arange(len(batch), device=device)
        contrast = F.cross_entropy(logits.float(), right) + F.cross_entropy(logits[:, : len(batch)].T.float(), right)
        return contrast / 2 + self.told(seen, "vision", batch) + self.told(read[: len(batch)], "text", batch)

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        self.model.to(dtype).save_pretrained(folder)
        self.model.float()
        self.tokenizer.save_pretrained(folder)
        side = {"height": NATIVE, "width": NATIVE}
        options = dict(size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        CLIPImageProcessorPil(**options).save_pretrained(folder)
        tidy(folder)

    def load(self, folder: Path) -> None:
        self.model.load_state_dict(CLIPModel.from_pretrained(folder).float().state_dict())

    @torch.no_grad()
    def sheet(self, what: int) -> None:
        """Prints how well it retrieves, and how often it prefers the right caption to a hard negative."""
        batch, rng = scenes.evaluation_scenes(256), random.Random(0)
        texts = [scenes.caption(s) for s in batch] + [scenes.caption(wrong(s, rng)) for s in batch]
        ids = self.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids.to(self.model.device)
        pixels = scenes.render(batch, what, self.model.device) * 2 - 1
        images = self.model.visual_projection(self.model.vision_model(pixels).pooler_output)
        words = self.model.text_projection(self.model.text_model(ids).pooler_output)
        match = F.normalize(images, dim=-1) @ F.normalize(words, dim=-1).T
        own, other = match.diagonal(), match.diagonal(256)
        found = (match[:, :256].argmax(1) == torch.arange(256, device=match.device)).float().mean()
        print(f"retrieval {found:.3f} of 256, right before wrong {(own > other).float().mean():.3f}", flush=True)

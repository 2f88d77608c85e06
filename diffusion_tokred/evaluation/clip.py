"""CLIP: how well a picture matches its prompt, and features by which sets of pictures are compared."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from ..errors import ConfigError
from ..zoo import JUDGE, path
from .weights import sha256


class Clip(nn.Module):
    """A CLIPModel with its processor (PIL, so that torchvision is not needed).

    Called with 8-bit pictures `(B, 3, H, W)` it returns features `(B, num_features)`, those before the projection: what
    torchmetrics' FID and KID take as `feature=`. Source: Radford et al., arXiv 2103.00020.

    Attributes:
        name: how its figures are to be labelled. That of the embedded model begins with "toy": it knows the toy world
            only, and its figures compare with no other's.
    """

    def __init__(self, folder: str | Path | None = None, name: str | None = None) -> None:
        """Args:
            folder: of a saved CLIPModel with its processor; without one the embedded toy-clip.
            name: the label; that of the folder if none is given.

        Raises `FileNotFoundError` for a folder without a model, ConfigError for one that cannot be loaded.
        """
        from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

        super().__init__()
        place = path(JUDGE) if folder is None else Path(folder)
        if not (place / "config.json").exists():
            raise FileNotFoundError(f"no CLIPModel in {place}: a folder with config.json and weights is needed")
        self.name = name or place.name
        try:
            self.model = CLIPModel.from_pretrained(place, dtype=torch.float32).eval().requires_grad_(False)
            self.images = CLIPImageProcessorPil.from_pretrained(place)
            self.tokenizer = AutoTokenizer.from_pretrained(place)
        except Exception as error:  # safetensors, OSError, ValueError, ...: a file that is cut, or something else's
            text = " ".join(str(error).split())[:300]
            raise ConfigError(f"{place} cannot be loaded as a CLIPModel: {type(error).__name__}: {text}") from error
        self.num_features: int = self.model.config.vision_config.hidden_size
        self._place = place

    @property
    def prefix(self) -> str:
        """How the keys of its figures begin: "toy_clip" or "clip"."""
        return "toy_clip" if self.name.startswith("toy") or self._place == path(JUDGE) else "clip"

    @property
    def resize(self) -> str:
        """How pictures come to the model's size, as recorded beside its figures."""
        size = self.images.crop_size if self.images.do_center_crop else self.images.size
        return f"CLIP's processor to {'x'.join(str(side) for side in dict(size).values())}, PIL"

    @cached_property
    def weights_sha256(self) -> str:
        """Of the weight files."""
        return sha256(self._place)

    @torch.no_grad()
    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Features of 8-bit RGB pictures `(B, 3, H, W)`: `(B, num_features)`. Raises `ValueError` for any other."""
        if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[1] != 3:
            raise ValueError(f"pictures are {pictures.dtype} {tuple(pictures.shape)}; give uint8 (B, 3, H, W)")
        pixels = self.images(list(pictures.cpu()), return_tensors="pt", input_data_format="channels_first").pixel_values
        return self.model.vision_model(pixels.to(self.model.device)).pooler_output

    @torch.no_grad()
    def project(self, features: torch.Tensor) -> torch.Tensor:
        """Where pictures lie in the space that they share with texts, from their features `(B, num_features)`:
        `(B, projection_dim)`, of length 1."""
        return nn.functional.normalize(self.model.visual_projection(features.to(self.model.device)), dim=-1)

    @torch.no_grad()
    def score(
        self, pictures: torch.Tensor, prompts: Sequence[str], features: torch.Tensor | None = None
    ) -> torch.Tensor:
        """100 times the cosine of each picture and its prompt, `(B,)`, at most 100; Hessel et al., arXiv 2104.08718.

        Unlike torchmetrics' mean, single scores are not clipped at 0. `features`: the pictures', if they are there.
        """
        if len(pictures) != len(prompts):
            raise ValueError(f"{len(pictures)} pictures and {len(prompts)} prompts; give one prompt a picture")
        ids = self.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids
        read = self.model.text_model(ids.to(self.model.device)).pooler_output
        seen = self.project(self(pictures) if features is None else features)
        return 100 * torch.cosine_similarity(seen, self.model.text_projection(read))


def probe(train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, steps: int = 300) -> torch.Tensor:
    """What a linear probe (logistic regression, L-BFGS) predicts, fitted to features `(N, d)` and labels `(N,)`."""
    mean, spread = train.mean(0), train.std(0).clamp(min=1e-6)
    linear = nn.Linear(train.shape[1], int(labels.max()) + 1, device=train.device)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(linear((train - mean) / spread), labels)
        loss = loss + 1e-4 * linear.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        return linear((test - mean) / spread).argmax(-1)

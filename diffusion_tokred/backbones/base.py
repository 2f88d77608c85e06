"""What a backbone file provides, and the registry of them. One file an architecture family; no method is known here."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, UnsupportedError
from ..runtime.site import Level, Site


class Layout:
    """A denoiser seen as sites.

    Attributes:
        sites: all sites, in the order of execution.
        pairs: those that are pairs of calls around others: `stack`, `deep`.
        levels: one `Level` for each resolution with attention, largest first.
        images: (module, level) pairs: modules whose input image (B, C, h, w) has the level's token grid.
        notes: what the backbone remembers from call to call.
    """

    def __init__(
        self, sites: list[Site], levels: list[Level], images: list[tuple[nn.Module, Level]], pairs: Sequence[Site] = ()
    ) -> None:
        self.sites, self.levels, self.images, self.pairs = sites, levels, images, list(pairs)
        self.notes: dict[str, Any] = {}


class Backbone:
    """An architecture family. Subclass it in one file and decorate with `register_backbone`.

    Attributes:
        name: short name, as in the README's table.
        models: class names of the denoisers it knows.
        sites: the site classes it makes, which say what each kind offers.
        sample: the denoiser's argument that holds the noisy latents.
        native: side of a pipeline's pictures in pixels, where neither a config nor a default says it.
        only_native: whether its pipelines make pictures of that size alone.
    """

    name = ""
    models: tuple[str, ...] = ()
    sites: tuple[type[Site], ...] = ()
    sample = "hidden_states"
    native: int | None = None
    only_native = False

    def layout(self, denoiser: Any) -> Layout:
        """Find the sites. Reads the denoiser, changes nothing."""
        raise NotImplementedError

    def grids(self, denoiser: Any, height: int, width: int) -> list[tuple[int, int]]:
        """Token grid (h, w) of each level for a latent of `height` x `width`. Default: one level, of patches."""
        patch = denoiser.config.patch_size
        return [(height // patch, width // patch)]

    def latent(self, inputs: Mapping[str, Any]) -> Tensor:
        """The noisy latents among the denoiser's arguments: for their device and rows."""
        found = inputs[self.sample]
        return found if isinstance(found, Tensor) else found[0]

    def size(self, layout: Layout, inputs: Mapping[str, Any]) -> tuple[int, int]:
        """Height and width of the latents in a call, in the units of `grids`."""
        height, width = self.latent(inputs).shape[-2:]
        return int(height), int(width)

    def text(self, denoiser: Any, inputs: Mapping[str, Any]) -> int:
        """Rows beside the image's in a call: the text tokens of a sample."""
        text = inputs.get("encoder_hidden_states")
        return text.shape[1] if isinstance(text, Tensor) and text.ndim == 3 else 0

    def observe(self, layout: Layout, denoiser: Any, inputs: Mapping[str, Any]) -> None:
        """Set what the denoiser's arguments decide: grids, and where the image begins. (Other grids are seen at
        `layout.images`.) Default: the grids of `size`."""
        for level, grid in zip(layout.levels, self.grids(denoiser, *self.size(layout, inputs)), strict=True):
            level.grid = grid

    def tokens(self, layout: Layout, inputs: Mapping[str, Any], output: Any) -> Tensor:
        """The denoiser's output as tokens of the largest level, (B, N, F): what it predicts at each."""
        out = output[0] if isinstance(output, (tuple, list)) else output.sample
        out = out if isinstance(out, Tensor) else torch.stack(out)
        h, w = layout.levels[0].grid or (0, 0)
        if out.ndim == 3:
            return out[:, : h * w]
        batch = len(out)
        if out.ndim == 4:  # without a learnt variance
            out = out.narrow(1, 0, min(out.shape[1], self.latent(inputs).shape[1]))
        if out.ndim == 5:  # frames one below another
            out = out.transpose(1, 2).flatten(0, 1)
        size = (h * batch // len(out), w)
        patch = out.shape[-1] // w
        whole = out.shape[-2:] == (size[0] * patch, size[1] * patch)
        out = F.pixel_unshuffle(out, patch) if whole else F.adaptive_avg_pool2d(out, size)
        return out.flatten(2).transpose(1, 2).reshape(batch, h * w, -1)

    def prompt(self, denoiser: Any, pipe: Any) -> int:
        """Text tokens that a pipeline pads its prompts to; `pipe` may be a bare denoiser. Default: its own default."""
        length = default_of(pipe, "max_sequence_length")
        if length is None:
            length = getattr(getattr(pipe, "tokenizer", None), "model_max_length", 77)
        return length if length <= 4096 else 77  # transformers writes "no limit" as 10**30

    def beside(self, denoiser: Any, tokens: int, height: int, width: int) -> int:
        """What `text` says in a call with a prompt of `tokens` and latents of `height` x `width`. Default: `tokens`."""
        return tokens

    def guided(self, denoiser: Any, pipe: Any) -> bool:
        """Whether a pipeline has an unconditional row for each picture, if it is not told. Default: yes, unless the
        scale of the guidance is an input of the model."""
        return not denoiser.config.get("guidance_embeds", False)

    def sigmas(self, pipe: Any, steps: int) -> list[float] | None:
        """Noise levels that a pipeline hands to its scheduler for a run. Default: None, it leaves them to that."""
        return None

    def timesteps(self, pipe: Any, scheduler: Any, steps: int, tokens: int) -> None:
        """Set `scheduler`, a copy, as the pipeline does for a run.

        Args:
            tokens: of the picture, which flow matching's dynamic shift depends on.
        """
        arguments: dict[str, Any] = {}
        known, sigmas = scheduler.config, self.sigmas(pipe, steps)
        if known.get("use_dynamic_shifting"):
            arguments["mu"] = _shift(pipe, known, steps, tokens)
        takes = "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
        if sigmas is None or known.get("use_flow_sigmas") or not takes:
            scheduler.set_timesteps(steps, **arguments)
        else:
            scheduler.set_timesteps(sigmas=sigmas, **arguments)

    def frames(self, pipe: Any, num_frames: int | None) -> int:
        """Latent frames of a video of `num_frames` (default: the pipeline's own); 1 for pictures.

        Raises:
            ConfigError: frames asked of a model that makes pictures.
        """
        if num_frames not in (None, 1):
            raise ConfigError(f"{self.name} makes pictures: leave out num_frames")
        return 1

    def stacked(self, layout: Layout, inputs: Mapping[str, Any]) -> int:
        """How many pictures lie one below another on the grid of a call: the frames of a video. Default: 1."""
        return 1

    def rest(self, denoiser: Any, height: int, width: int, text: int) -> Iterator[tuple[nn.Module, int]]:
        """Everything outside the sites that computes: (module, rows or pixels of one sample)."""
        raise NotImplementedError


BACKBONES: dict[str, Backbone] = {}


def register_backbone(backbone: type[Backbone]) -> type[Backbone]:
    """Class decorator: make an architecture family known to `patch`."""
    BACKBONES[backbone.name] = backbone()
    return backbone


def backbone_of(denoiser: Any) -> Backbone:
    """The backbone that knows a denoiser, by the names of its class and its ancestors.

    Raises:
        UnsupportedError: none does; the message lists those that are known.
    """
    for kind in type(denoiser).__mro__:
        for backbone in BACKBONES.values():
            if kind.__name__ in backbone.models:
                return backbone
    known = ", ".join(model for backbone in BACKBONES.values() for model in backbone.models)
    raise UnsupportedError(f"{type(denoiser).__name__} is not supported; supported denoisers: {known}")


def default_of(pipe: Any, argument: str) -> Any:
    """Default of an argument of a pipeline's call; None if it has no such argument."""
    known = {} if isinstance(pipe, nn.Module) else inspect.signature(type(pipe).__call__).parameters
    return known[argument].default if argument in known else None


def helper_of(pipe: Any, name: str) -> Callable[..., Any] | None:
    """A function beside a pipeline's class, or beside one of its ancestors; None if there is none."""
    modules = [sys.modules.get(kind.__module__) for kind in type(pipe).__mro__]
    return next((getattr(module, name) for module in modules if hasattr(module, name)), None)


def even_sigmas(steps: int) -> list[float]:
    """For `Backbone.sigmas`: from 1 to 1 / steps, as most pipelines of flow matching have it."""
    return [float(sigma) for sigma in np.linspace(1.0, 1 / steps, steps)]


def _shift(pipe: Any, known: Mapping[str, Any], steps: int, tokens: int) -> float:
    """`mu` of a run, by the pipeline's own arithmetic where it has some."""
    if (empirical := helper_of(pipe, "compute_empirical_mu")) is not None:
        return float(empirical(image_seq_len=tokens, num_steps=steps))
    low, high = known.get("base_image_seq_len", 256), known.get("max_image_seq_len", 4096)
    start, end = known.get("base_shift", 0.5), known.get("max_shift", 1.15)
    if (linear := helper_of(pipe, "calculate_shift")) is not None:
        return float(linear(tokens, low, high, start, end))
    return float(start + (end - start) * (tokens - low) / (high - low))


def attention_core(attention: Any, rows: int) -> nn.Module:
    """For `Backbone.rest`: a layer that costs what each query of an attention with `rows` keys does, without the
    projections. It has no weights, and does not run."""
    return nn.Linear(2 * attention.inner_dim, rows, bias=False, device="meta")

"""Small pipelines trained by this project on drawn scenes: ordinary diffusers folders that need no network and no GPU.

`toy-sd` is a `StableDiffusionPipeline` (UNet, 128 px, 1,024 attention tokens; 4,096 at 256 px), `toy-dit` a
`StableDiffusion3Pipeline` (MMDiT, 128 px, 1,024 tokens). `scenes` draws and captions what they were trained on;
`toy-clip`, a CLIPModel (`evaluation.clip.Clip()`), knows the same world.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

NAMES = ("toy-sd", "toy-dit")
JUDGE = "toy-clip"  # a CLIPModel of the same world


def path(name: str) -> Path:
    """Folder of an embedded pipeline, or of `JUDGE`. Raises `ValueError` for any other name."""
    if name not in (*NAMES, JUDGE):
        raise ValueError(f"unknown embedded pipeline {name!r}; there are: {', '.join(NAMES)}")
    return Path(__file__).parent / name


def load(name: str, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> DiffusionPipeline:
    """An embedded pipeline, ready to call: `load("toy-sd")("a red star above a small blue ring").images[0]`.

    `dtype` is float32 unless given (the files are float16); all modules get the same.
    """
    import torch
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    if name == JUDGE:
        raise ValueError(f"{name!r} is a CLIPModel, no pipeline; diffusion_tokred.evaluation.clip.Clip() loads it")
    folder, level = path(name), logging.get_verbosity()
    logging.set_verbosity_error()  # else: "Expected types for text_encoder: CLIPTextModel, got T5EncoderModel"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch_dtype, which all supported versions know
            pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype or torch.float32, local_files_only=True)
    finally:
        logging.set_verbosity(level)
    return pipe if device is None else pipe.to(device)

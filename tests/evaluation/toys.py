"""A tiny Stable Diffusion pipeline that reads prompts, random weights, whole enough for `save_pretrained`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from diffusion_tokred.testing import tiny

WORDS = ("<pad>", "<s>", "</s>", "<unk>", "a", "red", "blue", "star", "ring")
PROMPT = "a red star a blue ring"


def sd(seed: int = 0) -> Any:
    """`tiny.sd` with a text encoder and a tokenizer of one id a word; 32x32 pixels."""
    pipe = tiny.sd(seed)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        model_max_length=8,
    )  # fmt: skip
    torch.manual_seed(seed)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(WORDS), hidden_size=tiny.TEXT, intermediate_size=32, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    ).eval()  # fmt: skip
    return tiny._quiet(type(pipe)(**pipe.components | {"text_encoder": encoder, "tokenizer": tokenizer},
                                  requires_safety_checker=False))  # fmt: skip


def save(folder: Path) -> Path:
    """The pipeline as a folder for `--model`."""
    sd().save_pretrained(folder)
    return folder

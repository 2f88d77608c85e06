"""Words: the tokenizer, the encoders, the captions, and how the T5 learns to read before anything is drawn.

A denoiser that learns reading and drawing at once spends most of its time on "which word belongs to which object". That
is a matter of grammar and is learnt in minutes: each word's encoding is trained to tell colour, shape, size and
place of the object that it speaks of. The T5 is frozen from then on, as those of the large pipelines are.
"""

import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from diffusion_tokred.zoo import scenes

LENGTH = 20  # tokens of a caption with its padding
WORDS = ("<pad>", "</s>", "<unk>", *scenes.WORDS)
VOCABULARY = 64  # rows of the embeddings: room for words to come
SYNONYMS = {"the": "a", "an": "a", "grey": "gray", "large": "big", "under": "below", "over": "above"}
PLACES = {None: "centre", "above": "top", "below": "bottom", "left of": "left", "right of": "right"}
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
# What a word's encoding has to tell about what it speaks of.
FACTS = dict(
    color=(*scenes.COLORS,),
    shape=scenes.SHAPES,
    size=(*scenes.SIZES,),
    place=(*PLACES.values(),),
    texture=scenes.TEXTURES,
    background=(*scenes.BACKGROUNDS,),
)


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


def reader(folder: Path) -> T5EncoderModel:
    """The trained encoder of an exported folder, a text run's or a pipeline's."""
    names = [name for name in ("text_encoder_3", "text_encoder") if (folder / name).is_dir()]
    return T5EncoderModel.from_pretrained(folder / names[0]).float()


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


def facts(scene: scenes.Scene, words: list[str]) -> list[dict[str, str]]:
    """For each word of the scene's caption what is to be known about the thing that it speaks of."""
    told: list[dict[str, str]] = []
    about = [
        dict(color=o.color, shape=o.shape, place=PLACES[r]) | (dict(size=o.size) if o.size in words else {})
        for o, r in zip(scene.objects, (scene.relation, OPPOSITE.get(scene.relation or "")), strict=False)
    ]
    about.append(dict(texture=scene.texture, background=scene.background))
    thing = 0
    for word in words:
        if word in ("above", "below", "left", "right", "of", "<unk>"):
            thing += word in ("above", "below", "left", "right")
            told.append({})
        else:
            thing = len(scene.objects) if word == "on" else thing
            told.append(about[thing])
    return told


class Text:
    """The T5 encoder, trained to parse: linear probes on each word's encoding name the facts of what it speaks of."""

    lr = 1e-3
    stages = ((1.0, {"captions": 64}),)

    def __init__(self) -> None:
        self.tokenizer, self.encoder = tokenizer(), t5()
        self.probes = nn.Linear(self.encoder.config.d_model, sum(len(values) for values in FACTS.values()))
        self.modules = nn.ModuleDict({"encoder": self.encoder, "probes": self.probes})

    def grow(self, old: Any, new: Any) -> None:
        """There is one stage only."""

    def answers(self, texts: list[str]) -> list[torch.Tensor]:
        ids = self.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
        encoded = self.encoder(ids.to(self.encoder.device))[0]
        return list(self.probes(encoded).split([len(values) for values in FACTS.values()], -1))

    def truth(self, batch: list[scenes.Scene], texts: list[str], fact: str) -> torch.Tensor:
        """`(B, LENGTH)`, -100 where a word tells nothing."""
        found = torch.full((len(batch), LENGTH), -100)
        for i, (scene, text) in enumerate(zip(batch, texts, strict=True)):
            for j, told in enumerate(facts(scene, text.split())):
                if fact in told:
                    found[i, j] = FACTS[fact].index(told[fact])
        return found.to(self.encoder.device)

    def loss(self, batch: list[scenes.Scene], what: str, rng: random.Random, noise: torch.Generator) -> torch.Tensor:
        texts = captions(batch, rng)
        losses = [
            F.cross_entropy(answer.float().flatten(0, 1), self.truth(batch, texts, fact).flatten())
            for fact, answer in zip(FACTS, self.answers(texts), strict=True)
        ]
        return torch.stack(losses).sum()

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        self.encoder.to(dtype).save_pretrained(folder / "text_encoder")
        self.tokenizer.save_pretrained(folder / "tokenizer")
        self.encoder.float()

    def load(self, folder: Path) -> None:
        self.encoder.load_state_dict(reader(folder).state_dict())

    @torch.no_grad()
    def sheet(self, what: str) -> None:
        """Prints how many facts are read rightly off captions of evaluation scenes."""
        batch = scenes.evaluation_scenes(256)
        texts = [scenes.caption(scene) for scene in batch]
        right = []
        for fact, answer in zip(FACTS, self.answers(texts), strict=True):
            truth = self.truth(batch, texts, fact)
            right.append(f"{fact} {(answer.argmax(-1) == truth)[truth >= 0].float().mean():.4f}")
        print("read rightly: " + ", ".join(right), flush=True)

"""AuraFlowTransformer2DModel: AuraFlow. Joint blocks, then blocks on one sequence: [register tokens, text, image].

Positions are learned and added to the tokens. The register tokens are the model's own, 8 rows in front of the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..runtime.site import Block, Level, Site
from ..runtime.stack import StackSite
from .attention import FeedForwardSite, JointAttention, StreamAttention
from .base import Backbone, Layout, default_of, register_backbone


class AuraFlowJointAttention(JointAttention):
    """`attn` of a joint block: text and image come in separately."""

    text_first = True


class AuraFlowFeedForward(FeedForwardSite):
    """`ff` of a joint block: the image's."""

    argument = "x"


class AuraFlowStreamFeedForward(AuraFlowFeedForward):
    """`ff` of a single block: the whole sequence."""

    joint = True


class AuraFlowStack(StackSite):
    """The joint blocks, then those on one sequence."""

    separate = True


@register_backbone
class AuraFlow(Backbone):
    name = "auraflow"
    models = ("AuraFlowTransformer2DModel",)
    sites = (
        AuraFlowStack, AuraFlowJointAttention, AuraFlowFeedForward, StreamAttention, AuraFlowStreamFeedForward,
    )  # fmt: skip

    def layout(self, denoiser: Any) -> Layout:
        level, sites, width = Level(0), list[Site](), denoiser.inner_dim
        for index, module in enumerate(denoiser.joint_transformer_blocks):
            block = Block(index, f"joint_transformer_blocks.{index}", module, width, level)
            sites.append(AuraFlowJointAttention(f"{block.name}.attn", module.attn, block, level))
            sites.append(AuraFlowFeedForward(f"{block.name}.ff", module.ff, block, level))
        first = len(denoiser.joint_transformer_blocks)
        for index, module in enumerate(denoiser.single_transformer_blocks):
            block = Block(first + index, f"single_transformer_blocks.{index}", module, width, level, joint=True)
            sites.append(StreamAttention(f"{block.name}.attn", module.attn, block, level))
            sites.append(AuraFlowStreamFeedForward(f"{block.name}.ff", module.ff, block, level))
        blocks = [(module, False) for module in denoiser.joint_transformer_blocks]
        blocks += [(module, True) for module in denoiser.single_transformer_blocks]
        return Layout(sites, [level], [], [AuraFlowStack("joint_transformer_blocks", blocks, level, sites)])

    def observe(self, layout: Layout, denoiser: Any, inputs: Mapping[str, Any]) -> None:
        super().observe(layout, denoiser, inputs)
        layout.levels[0].start = self.text(denoiser, inputs)

    def text(self, denoiser: Any, inputs: Mapping[str, Any]) -> int:
        """Rows beside the image's: the register tokens count with the text."""
        return _registers(denoiser) + super().text(denoiser, inputs)

    def prompt(self, denoiser: Any, pipe: Any) -> int:
        return default_of(pipe, "max_sequence_length") or 256

    def beside(self, denoiser: Any, tokens: int, height: int, width: int) -> int:
        return _registers(denoiser) + tokens

    def rest(self, denoiser: Any, height: int, width: int, text: int) -> Iterator[tuple[nn.Module, int]]:
        ((h, w),) = self.grids(denoiser, height, width)
        yield denoiser.pos_embed.proj, h * w
        yield denoiser.time_step_proj, 1
        yield denoiser.context_embedder, text - _registers(denoiser)
        for block in denoiser.joint_transformer_blocks:
            yield block.norm1, 1
            yield block.norm1_context, 1
            yield block.ff_context, text
        for block in denoiser.single_transformer_blocks:
            yield block.norm1, 1
        yield denoiser.norm_out, 1
        yield denoiser.proj_out, h * w


def _registers(denoiser: Any) -> int:
    return int(denoiser.register_tokens.shape[1])

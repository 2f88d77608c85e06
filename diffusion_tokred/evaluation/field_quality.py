"""How near a row's pictures are to the unpatched ones: of pipelines that were trained, beside what a row costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from PIL.Image import Image

from .field import Row
from .metrics import psnr
from .shapes import twin
from .statistics import paired_psnr


@dataclass(frozen=True)
class Pictures:
    """Pictures of an embedded pipeline, drawn eagerly; the i-th prompt from the noise of seed i.

    Attributes:
        pipe: unpatched; left so. `part`: name of the denoiser in it.
        call: its arguments, all but the prompt and the number of steps.
        steps: denoising steps.
    """

    pipe: Any = field(repr=False)
    part: str
    call: Mapping[str, Any]
    steps: int
    prompts: Sequence[str]

    @cached_property
    def unpatched(self) -> list[Image]:
        """Drawn once."""
        return self._draw(self.pipe)

    def quality(self, row: Row) -> dict[str, Any]:
        """PSNR in dB to the unpatched pictures: its mean with the 95 % interval over the prompts, see
        `statistics.paired_psnr`. The row runs the schedule that whole runs are timed with."""
        pipe = twin(self.pipe, self.part)
        with row.whole(self.steps).applied(pipe):
            found = self._draw(pipe)
        values = [psnr(one, other) for one, other in zip(found, self.unpatched, strict=True)]
        width, height = found[0].size
        return {"psnr": paired_psnr(values, 3 * width * height)}

    def _draw(self, pipe: Any) -> list[Image]:
        return [
            pipe(
                **(dict(self.call) | {"prompt": prompt, "num_inference_steps": self.steps}),
                generator=torch.Generator().manual_seed(seed),
            ).images[0]
            for seed, prompt in enumerate(self.prompts)
        ]

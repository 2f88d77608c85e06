"""Rows on their way in and out."""

from __future__ import annotations

import pytest
import torch

from diffusion_tokred.runtime.rows import row_by_row


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_by_row(batch: int, dtype: torch.dtype) -> None:
    image = torch.randn(batch, 7, 5, 4, dtype=dtype)
    tokens = image.flatten(2).transpose(1, 2)
    found = row_by_row(tokens)
    assert found.is_contiguous() and torch.equal(found, tokens) and found.dtype == dtype
    assert row_by_row(found) is found
    part = torch.randn(batch, 9, 6)[:, 2:7, ::2]
    assert row_by_row(part).is_contiguous() and torch.equal(row_by_row(part), part)

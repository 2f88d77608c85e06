"""Against tomesd, the reference implementation of ToMe-SD: the same tokens, up to their order inside the merge."""

import pytest
import torch

from diffusion_tokred.tokens import destinations, match, split

tomesd_merge = pytest.importorskip("tomesd.merge")


@pytest.mark.parametrize("h, w, sy, sx", [(8, 8, 2, 2), (16, 16, 2, 2), (6, 14, 2, 2), (9, 7, 2, 2), (12, 8, 4, 2)])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.74])
def test_same_merge(h, w, sy, sx, ratio):
    g = torch.Generator().manual_seed(h * w)
    n, r = h * w, int(h * w * ratio)
    x = torch.randn(2, n, 12, generator=g, dtype=torch.float64)  # continuous values: no ties
    y = torch.randn(2, n, 6, generator=g, dtype=torch.float64)
    dst = destinations(h, w, sy, sx)
    m = match(x, dst, split(dst, n), min(r, n - len(dst)))  # tomesd lowers r without a word; ours refuses
    merge, unmerge = tomesd_merge.bipartite_soft_matching_random2d(x, w, h, sx, sy, r, no_rand=True)
    ours, theirs = m.merge(y), merge(y)
    assert ours.shape == theirs.shape
    for a, b in zip(ours, theirs, strict=True):
        a, b = (t[t[:, 0].argsort()] for t in (a, b))  # as sets: all values are distinct
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    torch.testing.assert_close(m.unmerge(ours), unmerge(theirs), rtol=0, atol=1e-12)

"""The floor traces into one graph, and a new key needs no new one."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from diffusion_tokred.tokens import destinations, downsample, draw, match, mix, split
from tests.reference import merging


class Site(torch.nn.Module):
    """Keeps its Merge as an attribute, as a method's scratch does."""

    def __init__(self, h, w, r, halves=1):
        super().__init__()
        self.grid, self.r, self.halves, self.plan = (h, w), r, halves, None

    def forward(self, x, key):
        h, w = self.grid
        dst = destinations(h, w, 2, 2, draw(key, (h // 2) * (w // 2), 4))
        self.plan = match(x, dst, split(dst, h * w), self.r, self.halves)
        z = self.plan.merge(x)
        return z, self.plan.unmerge(z), self.plan.status()


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("h, w, r, halves", [(8, 8, 40, 1), (7, 9, 20, 2), (6, 6, 0, 1)])
def test_one_graph_for_all_keys(h, w, r, halves):
    counter = CompileCounter()
    site = Site(h, w, r, halves)
    compiled = torch.compile(site, fullgraph=True, backend=counter)
    x = torch.randn(2, h * w, 6, dtype=torch.float64)
    seen = set()
    for step in range(4):
        key = torch.tensor(mix(0, step))
        merged, full, status = compiled(x, key)
        at = site.plan.at
        seen.add(tuple(at.flatten().tolist()))
        for got, expected in zip((merged, full, status), Site(h, w, r, halves)(x, key), strict=True):
            assert torch.equal(got, expected)
        if halves == 1:
            dst = merging.destinations(h, w, 2, 2, draw(key, (h // 2) * (w // 2), 4).tolist())
            found = merging.match([x[1].tolist()], dst, merging.sources(h * w, dst), r)
            assert at[1].tolist() == merging.kept(h * w, found)
    assert counter.frame_count == 1
    assert len(seen) == (4 if r else 1)


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "area", "bilinear"])
@pytest.mark.parametrize("h, w", [(8, 8), (7, 9)])
def test_downsampling(mode, h, w):
    x = torch.randn(2, h * w, 4)
    compiled = torch.compile(downsample, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, h, w, 2, mode), downsample(x, h, w, 2, mode))

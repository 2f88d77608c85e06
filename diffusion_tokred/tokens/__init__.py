"""Floor 1: pure functions on tokens, shape (B, N, C), that know nothing but torch.

Hash draws (`draws`), cells of the grid (`cells`), matching (`matching`), what it decided (`merge`), and
downsampling (`downsample`). Index vectors are int64, grids are row-major, shapes depend on Python numbers only,
so everything traces into one graph, and nothing here reads or changes a random state.
"""

from .cells import compact, destinations, split
from .downsample import MODES, downsample, pooled_grid, positions
from .draws import draw, mix
from .matching import match
from .merge import Merge

__all__ = [
    "MODES",
    "Merge",
    "compact",
    "destinations",
    "downsample",
    "draw",
    "match",
    "mix",
    "pooled_grid",
    "positions",
    "split",
]

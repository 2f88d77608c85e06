"""Floor 1: pure functions on tokens, shape (B, N, C), that know nothing but torch.

Hash draws (`draws`), cells of the grid (`cells`), matching (`matching`), what it decided (`merge`), and
downsampling (`downsample`); for methods that keep features: scores (`scores`), selection (`select`), clusters
(`cluster`) and forecasts (`forecast`). Index vectors are int64, grids are row-major, shapes depend on Python numbers
only, so everything traces into one graph, and nothing here reads or changes a random state.
"""

from .cells import compact, destinations, split
from .cluster import cat_select, features, kmeans, one_of_each, pool, spread
from .downsample import MODES, downsample, pooled_grid, positions
from .draws import draw, mix
from .forecast import BASES, extrapolate, factors
from .matching import match
from .merge import Merge
from .scores import bonus, change, deviation, entropy, normalise, norms, received
from .select import rows_at, scatter_rows, tie, top, untie

__all__ = [
    "BASES",
    "MODES",
    "Merge",
    "bonus",
    "cat_select",
    "change",
    "compact",
    "destinations",
    "deviation",
    "downsample",
    "draw",
    "entropy",
    "extrapolate",
    "factors",
    "features",
    "kmeans",
    "match",
    "mix",
    "normalise",
    "norms",
    "one_of_each",
    "pool",
    "pooled_grid",
    "positions",
    "received",
    "rows_at",
    "scatter_rows",
    "split",
    "spread",
    "tie",
    "top",
    "untie",
]

"""Floor 1: pure functions on tokens, shape (B, N, C), that know nothing but torch.

Hash draws (`draws`), cells of the grid (`cells`), matching (`matching`), what it decided (`merge`), downsampling
(`downsample`), and regions of the picture (`regions`); for methods that keep features: scores (`scores`), selection
(`select`), clusters (`cluster`) and forecasts (`forecast`). Index vectors are int64, grids are row-major, shapes depend
on Python numbers only, so everything traces into one graph, and nothing here reads or changes a random state.
"""

from .cells import compact, destinations, split
from .cluster import cat_select, features, kmeans, one_of_each, pool, spread
from .downsample import MODES, downsample, pooled_grid, positions
from .draws import draw, mix
from .forecast import BASES, extrapolate, factors
from .kernels import add_rows, norm_rows, rows_at, scatter_rows
from .matching import match
from .merge import Merge
from .regions import lifted, mergeable, ranked, ratio_of, room, touched, weighed
from .scores import bonus, change, deviation, entropy, normalise, norms, received
from .select import tie, top, untie

__all__ = [
    "BASES",
    "MODES",
    "Merge",
    "add_rows",
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
    "lifted",
    "match",
    "mergeable",
    "mix",
    "normalise",
    "norm_rows",
    "norms",
    "one_of_each",
    "pool",
    "pooled_grid",
    "positions",
    "ranked",
    "ratio_of",
    "received",
    "room",
    "rows_at",
    "scatter_rows",
    "split",
    "spread",
    "tie",
    "top",
    "touched",
    "untie",
    "weighed",
]

"""Fused kernels in Triton, each beside its plain torch version, which has the same signature.

A function here is called wherever its work is to be done, and chooses by the device: the kernel on a CUDA device where
Triton can be imported, else the plain version. Kernels are custom operators with fake versions (`torch.ops.tokred`), so
a model that uses them compiles into one graph; on the CPU the operators are the plain versions.

    rows.py      take rows (with norm and modulation), write rows in place (with gate and residual)
    matching.py  which destination each source is most like, without a matrix of scores
    selection.py where the k largest scores are

`*_triton.py` hold what needs Triton, imported when first used. `TOKRED_KERNELS=0` in the environment keeps to the plain
versions everywhere.
"""

from .matching import nearest
from .operators import on
from .rows import add_rows, norm_rows, rows_at, scatter_rows
from .selection import largest

__all__ = ["add_rows", "largest", "nearest", "norm_rows", "on", "rows_at", "scatter_rows"]

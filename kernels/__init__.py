"""Pure tensor operations behind the pruners: a torch reference, a fast CPU path and Triton for each.

Everything here takes and returns tensors, knows no model, and never synchronises the host with the GPU. Triton is
imported only when a Triton backend runs.
"""

from .cosine import pairwise_cosine
from .max_min import max_min_select

__all__ = ["max_min_select", "pairwise_cosine"]

"""Pure tensor operations behind the pruners: a torch reference, a fast CPU path and Triton for each.

Everything here takes and returns tensors, knows no model, and never synchronises the host with the GPU. Triton is
imported only when a Triton backend runs.
"""

from .cosine import pairwise_cosine
from .coverage import coverage_select
from .dpp import dpp_select
from .max_min import max_min_select

__all__ = ["coverage_select", "dpp_select", "max_min_select", "pairwise_cosine"]

"""Pure tensor operations behind the pruners: a torch reference, a fast CPU path and Triton for each.

Everything here takes and returns tensors, knows no model, and never synchronises the host with the GPU. Triton is
imported only when a Triton backend runs.
"""

# With this folder on the path other libraries find it as `kernels`; registering the operations twice corrupts them.
if __name__ == "vlmprune.kernels":
    from .attention import attention_scores
    from .compact import compact
    from .cosine import gram_flops, pairwise_cosine
    from .coverage import coverage_select
    from .dpp import dpp_flops, dpp_select
    from .max_min import max_min_flops, max_min_select
    from .merge import Matching, MergePlan, bipartite_flops, bipartite_match, merge_plan, merge_tokens, nearest_target

__all__ = [
    "Matching",
    "MergePlan",
    "attention_scores",
    "bipartite_flops",
    "bipartite_match",
    "compact",
    "coverage_select",
    "dpp_flops",
    "dpp_select",
    "gram_flops",
    "max_min_flops",
    "max_min_select",
    "merge_plan",
    "merge_tokens",
    "nearest_target",
    "pairwise_cosine",
]

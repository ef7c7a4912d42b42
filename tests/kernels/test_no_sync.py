"""Nothing on the GPU path waits for the GPU."""

import importlib

import pytest
import torch

from vlmprune import kernels


def module(name):
    return importlib.import_module(f"vlmprune.kernels.{name}")


def test_references_read_no_value_back():
    """Tensors without values: reading one on the host, or a shape that depends on one, raises."""
    x, square = torch.randn(2, 9, 4, device="meta"), torch.rand(2, 9, 9, device="meta")
    mask, counts = torch.rand(2, 9, device="meta") < 0.5, torch.ones(2, dtype=torch.int64, device="meta")
    picks = torch.full((2, 3), -1, device="meta")
    tokens = module("_common").directions("x", x, mask, 1e-8)
    for stored in (True, False):
        out = module("max_min").max_min_reference(tokens, counts, 3, mask, None, False, stored)
        assert out.device.type == "meta"
    module("max_min").most_eccentric(tokens, mask)
    columns = module("coverage").stack_columns(square, None, 0.5, mask)
    assert module("coverage").coverage_reference(columns, counts, picks, mask).shape == (2, 3)
    weight = torch.rand(2, 9, device="meta")
    chosen = module("dpp").dpp_reference(square, weight, weight, counts.float(), counts, 3)
    assert module("dpp")._fill(chosen, counts, weight, mask).shape == (2, 3)
    q = x[:, None]
    module("attention").attention_reference(q, q, mask, mask, None, 1.0, False, False)
    plan = kernels.merge_plan(kernels.bipartite_match(x, 2, mask=mask, backend="torch"), 9, 7, mask=mask)
    merge = module("merge")
    merged, _ = merge._combine(x, plan.keep, plan.into, None, "target_plus_mean", merge.slot_sums_reference)
    assert merged.shape == (2, 7, 4)
    assert module("compact").compact_reference(picks, x, 1, 0.0).shape == (2, 3, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_calls_on_the_gpu_do_not_synchronise(backend):
    x, mask = torch.randn(2, 40, 32, device="cuda"), torch.ones(2, 40, dtype=torch.bool, device="cuda")
    counts, q = torch.tensor([5, 9], device="cuda"), x[:, None]

    def everything():
        picks = kernels.max_min_select(x, counts, mask=mask, max_k=9, backend=backend)
        kernels.max_min_select(x, [5, 9], mask=mask, first="eccentric", backend=backend)
        table = kernels.pairwise_cosine(x, mask=mask, backend=backend)
        kernels.coverage_select(table, counts, mask=mask, max_k=9, backend=backend)
        kernels.dpp_select(table, counts, mask=mask, max_k=9, backend=backend)
        kernels.attention_scores(q, q, mask=mask, causal=True, backend=backend)
        plan = kernels.merge_plan(kernels.bipartite_match(x, 4, mask=mask, backend=backend), 40, 36, mask=mask)
        kernels.merge_tokens(x, plan.keep, plan.into, backend=backend)
        kernels.compact(picks, [x, mask], backend=backend)

    everything()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")

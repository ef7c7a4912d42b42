"""Each operation is one registered op whose fake kernel tells the truth about shapes, dtypes and strides."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vlmprune import kernels

x, square = torch.randn(2, 7, 5), torch.rand(2, 7, 7)
mask, counts = torch.rand(2, 7) < 0.7, torch.tensor([3, 1])
keep, into = torch.tensor([[0, 3, -1], [1, 2, 6]]), torch.tensor([[0, 1, 1, 1, -1, 0, 0], [0, 0, 1, 2, 2, 2, 2]])
CASES = {
    "pairwise_cosine": [(x, None, mask, None, 1e-8, "torch"), (x, x[:, :4], None, None, 1e-8, "torch")],
    "max_min_select": [(x, counts, 3, mask, None, False, False, 1e-8, "torch")],
    "coverage_select": [(square, square[:, :2], 0.5, counts, 3, mask, "torch")],
    "dpp_select": [(square, None, counts, 3, mask, 1e-6, "torch")],
    "attention_scores": [
        (x[:, None], x[:, None], mask, None, None, 1.0, rows, per_head, "torch")
        for rows in (False, True)
        for per_head in (False, True)
    ],
    "merge_tokens": [(x.clone().requires_grad_(), keep, into, None, "mean", "torch")],
    "compact": [(keep, [x, mask, torch.randn(3, 2, 7)], [1, 1, 2], [0.0, 0.0, 1.0], "torch")],
}


@pytest.mark.parametrize(("name", "args"), [(name, args) for name, cases in CASES.items() for args in cases])
def test_registration(name, args):
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(getattr(torch.ops.vlmprune, name).default, args, test_utils=checks)


def test_found_by_the_bare_name_it_registers_nothing():
    """transformers looks for a package `kernels`, and in this folder finds ours: registered twice, operations crash."""
    folder = Path(kernels.__file__).parents[1]
    code = (
        f"import sys, vlmprune.kernels; sys.path.insert(0, {str(folder)!r}); import kernels; "
        "sys.exit(hasattr(kernels, 'max_min_select'))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

"""Triton runs natively where there is a GPU and under its interpreter elsewhere. The interpreter must be chosen before
triton is first imported; where another test imported it first, the Triton cases run in a process of their own.

Every test runs with uninitialised memory filled with NaN, and with inputs cut out of NaN-filled buffers.
"""

import os
import sys

import pytest
import torch

NATIVE = torch.cuda.is_available()
TOO_LATE = not NATIVE and "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1"

if not NATIVE and not TOO_LATE:
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    if request.param == "triton":
        if TOO_LATE:
            pytest.skip("triton was imported without its interpreter; run by test_triton_process.py")
        pytest.importorskip("triton")
    return request.param


@pytest.fixture(scope="session")
def device():
    return "cuda" if NATIVE else "cpu"


@pytest.fixture(scope="session")
def too_late():
    return TOO_LATE


@pytest.fixture(autouse=True)
def _poisoned_memory():
    fill = torch.utils.deterministic.fill_uninitialized_memory
    mode, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(mode, warn_only=warn)


@pytest.fixture(scope="session")
def strided(device):
    """Copies a tensor into the middle of a NaN-filled (or -1-filled) buffer: odd strides, deadly margins."""

    def cut(x, margin=3):
        x = x.to(device)
        poison = float("nan") if x.is_floating_point() else -1
        shape = [s + 2 * margin for s in x.shape]
        view = torch.full(shape, poison, dtype=x.dtype, device=device)[tuple(slice(margin, -margin) for _ in shape)]
        view.copy_(x)
        return view

    return cut

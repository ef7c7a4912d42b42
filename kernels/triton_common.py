"""What the Triton kernels share: packed keys that make arg-max one integer maximum, and a barrier across programs."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl


@triton.jit
def pack(value, index):
    """int64 keys whose maximum is the largest fp32 value and, among equals, the lowest index.

    Non-negative for non-negative values, so -1 is below every candidate there.
    """
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)  # -0.0 and 0.0 are equal
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return (order << 32) | (0xFFFFFFFF - index.to(tl.int64))


@triton.jit
def unpack_index(key):
    return 0xFFFFFFFF - (key & 0xFFFFFFFF)


@triton.jit
def unpack_value(key):
    """The value of a non-negative key."""
    return (key >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def barrier(arrived, expected):
    """Wait until `expected` programs have come here, over all rounds; all of them must be resident."""
    tl.debug_barrier()
    tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu")
    while tl.atomic_add(arrived, 0, sem="acquire", scope="gpu") < expected:
        pass
    tl.debug_barrier()


def cooperative_grid(device: torch.device, items: int, most: int) -> tuple[int, dict[str, bool]]:
    """Programs per item that are resident together, at most `most`, and the launch option that makes sure of it.

    One under the interpreter, which runs programs one after another and could never pass a barrier.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return 1, {}
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    programs = max(1, min(processors // max(items, 1), most))
    return programs, {"launch_cooperative_grid": True} if programs > 1 else {}

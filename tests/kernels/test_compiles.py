"""Every Triton kernel compiles for real GPUs, which needs none: the interpreter accepts more than the compiler does."""

import os
import subprocess
import sys

import pytest

SCRIPT = r"""
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vlmprune.kernels import triton_attention as attention, triton_compact as compact, triton_cosine as cosine
from vlmprune.kernels import triton_coverage as coverage, triton_dpp as dpp, triton_max_min as max_min
from vlmprune.kernels import triton_merge as merge

F32, I64, U8, HALF = "*fp32", "*i64", "*u8", "*bf16"
X = {"x": HALF, "y": HALF, "q": HALF, "k": HALF}
attend = {"mask": U8, "query_index": I64, "lse": F32, "scale": "fp32", **X}
tile = dict(HAS_MASK=True, CAUSAL=True, UPCAST=False, BM=64, BN=64, BD=128)
CASES = [
    (cosine._inverse_norm_kernel, {"mask": U8, "out": F32, "eps": "fp32", **X}, dict(HAS_MASK=True, ROWS=8, COLS=512)),
    (cosine._cosine_kernel, {"x_inverse": F32, "y_inverse": F32, "out": F32, **X},
     dict(SYMMETRIC=True, UPCAST=False, BM=128, BN=128, BK=64)),
    (max_min._nearest_kernel, {"similarity": F32, "mask": U8, "out": F32}, dict(HAS_MASK=True, BLOCK=1024)),
    (max_min._greedy_kernel, {"similarity": F32, "mask": U8, "first": I64, "counts": I64, "picks": I64},
     dict(HAS_MASK=True, TOTAL=False, BLOCK=16384)),
    (max_min._step_kernel, {"inverse": F32, "closeness": F32, "counts": I64, "picks": I64, "slots": I64, **X},
     dict(TOTAL=True, ROWS=16, COLS=256)),
    (coverage._coverage_kernel,
     {"columns": F32, "mask": U8, "counts": I64, "picks": I64, "slots": I64, "arrived": "*i32"},
     dict(PROGRAMS=132, HAS_MASK=True, OWN=32, BLOCK=4096)),
    (dpp._dpp_kernel,
     {"similarity": F32, "quality": F32, "diagonal": F32, "floor": F32, "counts": I64, "picks": I64, "factor": F32,
      "slots": I64, "arrived": "*i32"}, dict(HAS_QUALITY=True, PROGRAMS=90, OWN=32, STEPS=128)),
    (attention._lse_kernel, attend, tile),
    (attention._sum_kernel, {"query_mask": U8, "out": F32, **attend}, dict(HAS_QUERY_MASK=True, **tile)),
    (attention._rows_kernel, {"query_mask": U8, "out": F32, **attend}, dict(HAS_QUERY_MASK=True, **tile)),
    (merge._slot_sums_kernel, {"weight": F32, "members": I64, "starts": I64, "out": F32, "size": F32, **X},
     dict(BLOCK=1024)),
    (compact._compact_kernel,
     {"keep": I64, "sources": ("*i16", I64), "outs": ("*i16", I64), "sizes": (("i32",) * 2,) * 2,
      "strides": (("i32",) * 4,) * 2, "fills": ("i32", "i32")}, dict(BLOCK=1024)),
]
kernels = {id(value) for module in (attention, compact, cosine, coverage, dpp, max_min, merge)
           for name, value in vars(module).items() if name.endswith("_kernel")}
assert kernels == {id(kernel) for kernel, _, _ in CASES}, "a kernel is missing from the table"
for capability in map(int, sys.argv[1:]):
    for kernel, types, constants in CASES:
        names = kernel.arg_names
        signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
        constexprs = {(names.index(n),): value for n, value in constants.items()}
        built = triton.compile(ASTSource(kernel, signature, constexprs), target=GPUTarget("cuda", capability, 32))
        assert built.metadata.shared <= 99 * 1024, (kernel.__name__, built.metadata.shared)
        print(capability, kernel.__name__)
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile(capability):
    pytest.importorskip("triton")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(capability)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("_kernel") == 12

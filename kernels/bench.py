"""Times the selections side by side: ours, the reference, the published loop, a library peer, the plain product.

Nothing is called faster than something else unless both gave the same answer: a red check withholds the speed-up.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import attention_scores, coverage_select, dpp_select, max_min_select, pairwise_cosine

Run = Callable[[], Tensor | None]


@dataclass
class Size:
    """B items of N tokens of width D, of which K stay; `full` sizes take minutes on a CPU."""

    batch: int
    n: int
    k: int
    d: int
    full: bool = False

    def __str__(self) -> str:
        items = f"{self.batch} x " if self.batch > 1 else ""
        return f"{items}{self.n} -> {self.k}, D {self.d}"


SIZES = [
    Size(batch, n, k, d, full=n > 4096)
    for batch, n, k in ((1, 576, 58), (8, 576, 58), (64, 196, 20), (1, 2880, 288), (1, 12544, 1254))
    for d in (1024, 4096)
]


@dataclass
class Version:
    """One way to compute a case. `share` is the part of the work it did (a prefix of the picks), for extrapolation."""

    name: str
    run: Run
    judged: bool = True
    share: float = 1.0


@dataclass
class Case:
    op: str
    size: Size
    versions: list[Version]
    objective: Callable[[Tensor], float] | None
    flops: float
    bytes: float


@dataclass
class Row:
    """One line of the result, times in ms; `speedup` is that over the published loop, given only if the check held."""

    op: str
    size: str
    version: str
    ms: float
    check: str
    speedup: float | None
    flops: float
    bytes: float
    floor_ms: float
    over_floor: float
    extrapolated: bool


@dataclass
class Machine:
    device: str
    processor: str
    threads: int
    copy_gb_s: float
    matmul_gflop_s: float
    versions: dict[str, str] = field(default_factory=dict)


def tokens(size: Size, device: torch.device, seed: int = 0) -> Tensor:
    """Smooth fields with noise, a common direction and a few outliers: what projected image features look like."""
    generator = torch.Generator().manual_seed(seed)
    rank, side = 48, int(size.n**0.5) + 1
    coarse = torch.randn(size.batch, rank, 7, 7, generator=generator, device="cpu")
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=True)
    basis = torch.randn(rank, size.d, generator=generator, device="cpu") / rank**0.5
    x = smooth.flatten(2)[..., : size.n].mT @ basis
    x += 0.4 * torch.randn(x.shape, generator=generator, device="cpu") + 0.7 * torch.randn(
        size.d, generator=generator, device="cpu"
    )
    outlier = torch.rand(size.batch, size.n, 1, generator=generator, device="cpu") < 0.01
    return (x + outlier * torch.randn(x.shape, generator=generator, device="cpu")).to(device)


def published_max_min(x: Tensor, k: int, first: int | None = None) -> Tensor:
    """The loop as published: dense distances, and at every step the rows of all picks gathered again."""
    out = []
    for item in x:
        unit = item / item.norm(dim=1, keepdim=True)
        distance = 1 - unit @ unit.T
        chosen = torch.empty(k, dtype=torch.int64, device=x.device)
        for t in range(k):
            if t:
                score = distance[chosen[:t]].min(dim=0).values
            elif first is None:
                score = distance.topk(2, dim=0, largest=False).values[1]
            else:
                score = torch.arange(len(item), device="cpu") == first
            chosen[t] = score.float().argmax()
        out.append(chosen)
    return torch.stack(out)


def running_max_min(x: Tensor, k: int) -> Tensor:
    """The plain rewrite with a running minimum."""
    out = []
    for item in x:
        unit = torch.nn.functional.normalize(item, dim=1)
        distance = 1 - unit @ unit.T
        chosen = [int(distance.clone().fill_diagonal_(torch.inf).amin(1).argmax())]
        closest = distance[chosen[0]].clone()
        while len(chosen) < k:
            closest[chosen[-1]] = -torch.inf
            chosen.append(int(closest.argmax()))
            closest = torch.minimum(closest, distance[chosen[-1]])
        out.append(torch.tensor(chosen, device="cpu"))
    return torch.stack(out)


def published_coverage(table: Tensor, k: int) -> Tensor:
    """The loop as published: at every step the gain of every column over the whole table."""
    out = []
    for item in table:
        covered = item.new_zeros(len(item), 1)
        barred = item.new_zeros(item.shape[1])
        chosen = []
        for _ in range(k):
            best = ((item - covered).clamp_min(0).sum(0) + barred).argmax()
            barred[best] = -torch.inf
            covered = torch.maximum(covered, item[:, best, None])
            chosen.append(best)
        out.append(torch.stack(chosen))
    return torch.stack(out)


def published_dpp(similarity: Tensor, k: int) -> Tensor:
    """The incremental Cholesky loop as published, on the batch."""
    batch, n, _ = similarity.shape
    items = torch.arange(batch, device=similarity.device)
    factor = similarity.new_zeros(k, batch, n)
    gain = similarity.diagonal(dim1=1, dim2=2).clone()
    chosen = []
    for t in range(k):
        best = gain.argmax(1)
        known = torch.einsum("tb,tbn->bn", factor[:t, items, best], factor[:t])
        row = (similarity[items, best] - known) / gain[items, best].sqrt()[:, None]
        factor[t] = row
        gain = gain - row.square()
        gain[items, best] = -torch.inf
        chosen.append(best)
    return torch.stack(chosen, 1)


def max_min_case(size: Size, device: torch.device, backends: Sequence[str]) -> Case:
    x = tokens(size, device)
    versions = [Version("published loop", lambda: published_max_min(x, size.k))]
    versions += _ours(backends, lambda backend: max_min_select(x, size.k, backend=backend))
    versions += [
        Version("running minimum", lambda: running_max_min(x, size.k)),
        Version("x @ x.T alone", lambda: _discard(x @ x.mT), judged=False),
    ]

    return _diversity("max_min_select", x, size, versions)


def given_start_case(size: Size, device: torch.device, backends: Sequence[str]) -> Case:
    """Farthest points from token 0, which is what point-cloud libraries compute."""
    x = tokens(size, device)
    versions = [Version("published loop", lambda: published_max_min(x, size.k, first=0))]
    versions += _ours(backends, lambda backend: max_min_select(x, size.k, first=0, backend=backend))
    versions.append(Version("fpsample", lambda: _fpsample(x, size.k)))
    return _diversity("max_min_select, start given", x, size, versions)


def _diversity(op: str, x: Tensor, size: Size, versions: list[Version]) -> Case:
    def objective(picks: Tensor) -> float:
        cosine = pairwise_cosine(x.gather(1, picks[..., None].to(x.device).expand(-1, -1, size.d)))
        cosine.diagonal(0, 1, 2).fill_(-1.0)
        return float((1 - cosine.amax((1, 2))).mean())

    n, d = size.n, size.d
    return Case(
        op, size, versions, objective,
        flops=size.batch * n * n * d, bytes=size.batch * 4.0 * (n * d + n * n + size.k * n),
    )  # fmt: skip


def coverage_case(size: Size, device: torch.device, backends: Sequence[str]) -> Case:
    x = tokens(size, device)
    words = x[:, : 12 * (size.n // 12) : size.n // 12] + tokens(Size(size.batch, 12, 0, size.d), device, seed=1)
    visual = (pairwise_cosine(x) / 0.2).softmax(-1) / size.n
    text = (pairwise_cosine(words, x) / 0.02).softmax(-1) / words.shape[1]
    table = torch.cat([text, 0.5 * visual], 1)
    steps = size.k if size.n <= 4096 or device.type == "cuda" else min(size.k, 6)
    versions = [Version("published loop", lambda: published_coverage(table, steps), share=steps / size.k)]
    versions += _ours(
        backends, lambda backend: coverage_select(visual, size.k, text=text, visual_weight=0.5, backend=backend)
    )

    return _coverage("coverage_select", table, size, versions)


def symmetric_table_case(size: Size, device: torch.device, backends: Sequence[str]) -> Case:
    """A symmetric table, which is what submodular-selection libraries take."""
    table = (1 + pairwise_cosine(tokens(size, device))) / 2
    table = torch.maximum(table, table.mT)
    versions = [Version("published loop", lambda: published_coverage(table, size.k))]
    versions += _ours(backends, lambda backend: coverage_select(table, size.k, backend=backend))
    versions.append(Version("apricot, lazy", lambda: _apricot(table, size.k)))
    return _coverage("coverage_select, symmetric table", table, size, versions)


def _coverage(op: str, table: Tensor, size: Size, versions: list[Version]) -> Case:
    def objective(picks: Tensor) -> float:
        chosen = table.gather(2, picks[:, None].to(table.device).expand(-1, table.shape[1], -1))
        return float(chosen.amax(2).double().sum(1).mean())

    rows, n = table.shape[1:]
    return Case(
        op, size, versions, objective,
        flops=size.batch * 2.0 * rows * n, bytes=size.batch * 4.0 * (rows * n + size.k * rows),
    )  # fmt: skip


def dpp_case(size: Size, device: torch.device, backends: Sequence[str]) -> Case:
    similarity = pairwise_cosine(tokens(size, device))
    versions = [Version("published loop", lambda: published_dpp(similarity, size.k))]
    versions += _ours(backends, lambda backend: dpp_select(similarity, size.k, backend=backend))

    def objective(picks: Tensor) -> float:
        index = picks.to(device)
        rows = similarity.gather(1, index[..., None].expand(-1, -1, size.n))
        square = rows.gather(2, index[:, None].expand(-1, size.k, -1)).double()
        return float(torch.linalg.slogdet(square).logabsdet.mean())

    n, k = size.n, size.k
    return Case(
        "dpp_select", size, versions, objective,
        flops=size.batch * 1.0 * n * k * k, bytes=size.batch * (2.0 * n * k * k + 4.0 * n * k),
    )  # fmt: skip


def attention_case(size: Size, device: torch.device, backends: Sequence[str]) -> Case:
    """Column sums over all queries, 8 heads of 64 over 2 key heads; the whole map is what a model would return."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(size.batch, 8, size.n, 64, generator=generator, device="cpu").to(device)
    key = torch.randn(size.batch, 2, size.n, 64, generator=generator, device="cpu").to(device)

    def whole_map() -> Tensor:
        return (q @ key.repeat_interleave(4, 1).mT * 0.125).softmax(-1).mean(1).sum(1)

    versions = [Version("whole map", whole_map)]
    versions += _ours(backends, lambda backend: attention_scores(q, key, backend=backend))
    return Case(
        "attention_scores", size, versions, None,
        flops=2.0 * size.batch * 8 * size.n * size.n * 64, bytes=4.0 * size.batch * size.n * 64 * 10,
    )  # fmt: skip


CASES: dict[str, Callable[[Size, torch.device, Sequence[str]], Case]] = {
    "max_min_select": max_min_case,
    "coverage_select": coverage_case,
    "dpp_select": dpp_case,
    "attention_scores": attention_case,
}
PEERS = {"max_min_select": ("fpsample", given_start_case), "coverage_select": ("apricot", symmetric_table_case)}


def _ours(backends: Sequence[str], call: Callable[[str], Tensor]) -> list[Version]:
    return [Version(f"ours ({backend})", functools.partial(call, backend)) for backend in backends]


def _discard(_: Tensor) -> None:
    return None


def _fpsample(x: Tensor, k: int) -> Tensor:
    import fpsample  # type: ignore[import-not-found]

    unit = torch.nn.functional.normalize(x, dim=2)
    return torch.stack(
        [torch.as_tensor(fpsample.fps_sampling(i.numpy(), k, start_idx=0).astype("int64"), device="cpu") for i in unit]
    )


def _apricot(table: Tensor, k: int) -> Tensor:
    import apricot  # type: ignore[import-not-found]

    picks = []
    for item in table:
        chooser = apricot.FacilityLocationSelection(k, metric="precomputed", optimizer="lazy")
        picks.append(torch.as_tensor(chooser.fit(item.numpy()).ranking.astype("int64"), device="cpu"))
    return torch.stack(picks)


def measure(run: Run, device: torch.device, seconds: float = 1.0) -> tuple[float, Tensor | None]:
    """Median time in ms after a warm-up call, over at least one call and about `seconds`, and the answer."""

    def once() -> tuple[float, Tensor | None]:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        answer = run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start, answer

    _, answer = once()
    times = [once()[0]]
    while sum(times) < seconds and len(times) < 50:
        times.append(once()[0])
    return statistics.median(times) * 1e3, answer


def describe(device: torch.device) -> Machine:
    """The machine by what it can do: measured rates of a large copy and of a large fp32 product."""
    source = torch.rand(1 << 26, device=device)
    target = torch.empty_like(source)
    side = 2048 if device.type == "cpu" else 8192
    square = torch.rand(side, side, device=device)
    copy_ms, _ = measure(lambda: _discard(target.copy_(source)), device)
    product_ms, _ = measure(lambda: _discard(square @ square), device)
    packages = ("torch", "triton", "numpy", "fpsample", "apricot-select")
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Machine(
        device=device.type,
        processor=torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        threads=torch.get_num_threads(),
        copy_gb_s=round(2 * source.numel() * 4 / copy_ms / 1e6, 1),
        matmul_gflop_s=round(2 * side**3 / product_ms / 1e6, 1),
        versions={"python": platform.python_version(), **found},
    )


def processor_name() -> str:
    """The model of the CPU, or its architecture where the system does not tell."""
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def run_case(case: Case, machine: Machine, device: torch.device) -> list[Row]:
    """Time every version. The first one is the published loop, which the others are judged by."""
    floor = max(case.flops / machine.matmul_gflop_s, case.bytes / machine.copy_gb_s) / 1e6
    rows: list[Row] = []
    published: tuple[float, Tensor | None] | None = None
    for version in case.versions:
        ms, answer = measure(version.run, device)
        ms /= version.share
        published = (ms, answer) if published is None else published
        check = _check(case, answer, published[1]) if version.judged else "not judged"
        rows.append(
            Row(
                op=case.op,
                size=str(case.size),
                version=version.name,
                ms=round(ms, 3),
                check=check,
                speedup=round(published[0] / ms, 2) if check in ("same", "as good") and len(rows) else None,
                flops=case.flops,
                bytes=case.bytes,
                floor_ms=round(floor, 3),
                over_floor=round(ms / floor, 2),
                extrapolated=version.share < 1.0,
            )
        )
    return rows


def _check(case: Case, answer: Tensor | None, published: Tensor | None) -> str:
    """ "same", "as good" (other picks, objective not below the published loop's by more than rounding), or "RED"."""
    if answer is None or published is None:
        return "RED"
    if case.objective is None:
        return "same" if torch.allclose(answer, published, rtol=1e-3, atol=1e-4) else "RED"
    answer, published = answer.cpu(), published.cpu()
    answer = answer[:, : published.shape[1]]  # picks are nested: a prefix judges a prefix
    if torch.equal(answer, published):
        return "same"
    distinct = all(len(set(row)) == len(row) for row in answer.tolist())
    mine, theirs = case.objective(answer), case.objective(published)
    return "as good" if distinct and mine >= theirs - 1e-6 * abs(theirs) else "RED"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases, print a table, write JSON. Returns 1 if any check is red."""
    parser = argparse.ArgumentParser(prog="vlmprune bench kernels", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ops", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--full", action="store_true", help="also the sizes that take minutes on a CPU")
    parser.add_argument("--json", help="write the results to this file")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    backends = ["torch", "triton"] if device.type == "cuda" and importlib.util.find_spec("triton") else ["torch"]
    machine = describe(device)
    print(
        f"{machine.processor}, {machine.threads} threads: copy {machine.copy_gb_s} GB/s, "
        f"fp32 product {machine.matmul_gflop_s} GFLOP/s"
    )
    rows: list[Row] = []
    cases = [CASES[op] for op in options.ops]
    for op in options.ops:
        package, case = PEERS.get(op, ("", None))
        if case and device.type == "cpu" and importlib.util.find_spec(package):
            cases.append(case)
    for make in cases:
        for size in SIZES:
            if (size.full and not (options.full or device.type == "cuda")) or _skips(make, size):
                continue
            for row in run_case(make(size, device, backends), machine, device):
                rows.append(row)
                print(_line(row), flush=True)
    if options.json:
        result: dict[str, Any] = {
            "date": datetime.date.today().isoformat(),
            "machine": asdict(machine),
            "rows": [asdict(row) for row in rows],
        }
        with open(options.json, "w") as out:
            json.dump(result, out, indent=1)
            out.write("\n")
    return int(any(row.check == "RED" for row in rows))


def _skips(make: Callable[..., Case], size: Size) -> bool:
    """Width matters to the product only; the peers, and the heavier loops, are timed on one item."""
    if make is max_min_case:
        return False
    if make in (given_start_case, symmetric_table_case):
        return size.batch > 1 or size.n > 4096 or size.d != 1024
    return size.d != 1024 or (make is attention_case and size.n > 4096)


def _line(row: Row) -> str:
    speedup = "" if row.speedup is None else f"{row.speedup:8.2f} x"
    about = "~" if row.extrapolated else " "
    return (
        f"{row.op:34} {row.size:24} {row.version:20} {about}{row.ms:11.2f} ms {speedup:10} {row.check:10} "
        f"{row.flops / 1e9:8.2f} GFLOP {row.bytes / 1e6:8.1f} MB  floor {row.floor_ms:8.2f} ms  "
        f"{row.over_floor:8.2f} x floor"
    )


if __name__ == "__main__":
    raise SystemExit(main())

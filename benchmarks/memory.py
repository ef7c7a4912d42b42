"""Peak memory of every method's choice and of every attention signal, at the size of a long video.

    python benchmarks/memory.py [--tokens 12544] [--width 1024] [--keep 0.1] [--out benchmarks/results/memory-cpu.json]

`--methods` measures only these, and leaves the others in the file as they are. What takes trained weights is given
untrained ones: they choose other tokens in the same memory.

Each line runs in a process of its own: the peak of the resident set while choosing, less what was resident before. An
attention map of 12 544 x 12 544 fp32 would take 600 MiB a head.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import vlmprune
from vlmprune.contract import SIGNALS, Geometry, VisualTokens
from vlmprune.kernels.bench import processor_name
from vlmprune.registry import pruner_classes

DEPTH, TEXT, HEADS = 28, 32, 8
ATTENTION = ("last_attention", "text_attention", "visual_attention")


def fields(name: str, width: int, folder: Path) -> dict[str, Any]:
    """What a method needs besides `keep`; weights are made in `folder`."""
    from vlmprune.pruners.atp import ThresholdModules
    from vlmprune.pruners.explain import Mapper
    from vlmprune.pruners.gsearch import Schedule
    from vlmprune.pruners.hicom import HIComModules
    from vlmprune.pruners.qtsplus import TokenSelector
    from vlmprune.pruners.vqtoken import VQAttention

    if name in ("tome", "pitome"):
        return {"where": "boundary"}
    if name == "dycoke":  # every fourth frame is kept
        return {"keep": 0.3}
    if name == "gsearch":
        return {"schedule": Schedule((1.0, 0.5) + (0.25,) * (DEPTH - 2)), "keep": None}
    if name == "atp":
        ThresholdModules((4, 14), DEPTH).save(folder)
        return {"weights": folder}
    if name == "explain":
        Mapper((8, 16)).save(folder)
        return {"weights": folder}
    if name == "hicom":
        return {"weights": HIComModules(width).eval().requires_grad_(False)}
    if name == "vqtoken":
        return {"weights": VQAttention(width).eval().requires_grad_(False)}
    if name == "qtsplus":  # the heads of Qwen2.5-VL-3B, for which weights are published
        TokenSelector(width, 16, 2, DEPTH).save(folder)
        return {"weights": folder}
    return {}


def status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def peak_of(work: Any) -> dict[str, float]:
    """Peak of the resident set above what is resident now, and seconds."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before, start = status("VmRSS"), time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    return {"peak_bytes": max(0, status("VmHWM") - before), "seconds": seconds}


def made_up(name: str, tokens: int, width: int, geometry: Geometry) -> torch.Tensor:
    """A signal of the right shape."""
    pictures = len(geometry.pictures)
    shapes = {
        "cls_features": (1, pictures, width),
        "cls_keys": (1, pictures, width // HEADS),
        "instruction": (1, TEXT, width),
        "instruction_queries": (1, TEXT, HEADS, width // HEADS),
        "instruction_keys": (1, tokens, HEADS, width // HEADS),
        "text_features": (1, TEXT, width),
        "prompt_features": (1, tokens, width),
        "encoder_features": (1, tokens, width),
        "projector_inputs": (1, tokens, width),
        "encoder_keys": (1, tokens, width // HEADS),
        "next_keys": (1, tokens, width // HEADS),
    }
    if name.endswith("mask"):
        return torch.ones(1, TEXT, dtype=torch.bool)
    if name.endswith("text_attention"):
        return torch.rand(1, TEXT, tokens).softmax(-1)
    return torch.randn(shapes[name]) if name in shapes else torch.rand(1, tokens)


def choose(name: str, tokens: int, width: int, keep: float, answer: Any, warm: bool = False) -> None:
    """One method, at its first stage; once on a small input before, so that nothing is loaded while measuring."""
    if not warm:
        choose(name, 196, width, keep, _Nowhere(), warm=True)
    torch.manual_seed(0)
    try:
        with tempfile.TemporaryDirectory() as folder:
            given = fields(name, width, Path(folder) / "weights")
            pruner = vlmprune.create_pruner(name, **{"keep": keep, **given})
        layer = pruner.layers(DEPTH)[0]
        if pruner.encoder_layers(24):
            raise ValueError("acts inside the tower")
        try:
            budget = pruner.budget([tokens], layer, DEPTH)[0]
        except ValueError:  # its first layers alone exceed it: ask for the average that it was published with
            pruner = vlmprune.create_pruner(name, **given)
            budget = pruner.budget([tokens], layer, DEPTH)[0]
        side = 14
        geometry = Geometry.grid(side, side, planes=tokens // side**2, kind="video")
        signals = {}
        for need in pruner.needs:
            first = need.rstrip("?").split("|")[0]
            assert first in SIGNALS
            signals[need] = made_up(first, tokens, width, geometry)
        seen = VisualTokens(
            features=torch.randn(1, tokens, width),
            counts=(tokens,),
            index=(torch.arange(tokens),),
            shapes=(geometry,),
            layer=layer,
            depth=DEPTH,
            signal=signals.__getitem__,
            project=lambda rows: rows,
        )
        wanted = torch.tensor([tokens if budget is None else budget])
        found = peak_of(lambda: pruner.select(seen, wanted))
        answer.put({"kept": None if budget is None else budget, "keep": pruner.keep, **found})
    except Exception as error:
        answer.put({"error": str(error)})


class _Nowhere:
    def put(self, found: Any) -> None:
        pass


def score(name: str, tokens: int, width: int, keep: float, answer: Any) -> None:
    """One attention signal, on keys of `HEADS` heads."""
    from vlmprune.kernels import attention_scores

    torch.manual_seed(0)
    keys = torch.randn(1, HEADS, tokens + TEXT, width // HEADS)
    rows = {"last_attention": 1, "text_attention": TEXT, "visual_attention": tokens}[name]
    queries = torch.randn(1, HEADS, rows, width // HEADS)
    index = torch.arange(tokens + TEXT - rows, tokens + TEXT)[None]
    reduce: Any = "sum" if name == "visual_attention" else "rows"
    attention_scores(queries[:, :, :1], keys[:, :, :9])
    answer.put(peak_of(lambda: attention_scores(queries, keys, causal=True, query_index=index, reduce=reduce)))


def apart(work: Any, *arguments: Any) -> dict[str, Any]:
    """Run in a process of its own."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=work, args=(*arguments, answer))
    process.start()
    found = answer.get()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=12544)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--methods", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory-cpu.json"))
    options = parser.parse_args()
    table: dict[str, Any] = {}
    if options.methods:
        before = json.loads(options.out.read_text())
        sizes = {name: getattr(options, name) for name in ("tokens", "width", "keep")}
        if sizes != {name: before[name] for name in sizes}:
            parser.error(f"{options.out} holds figures of other sizes: give another --out or the same sizes")
        table = before["measured"]
    signals = () if options.methods else ATTENTION
    for work, names in ((score, signals), (choose, options.methods or sorted(pruner_classes()))):
        for name in names:
            found = table[name] = apart(work, name, options.tokens, options.width, options.keep)
            if "error" in found:
                print(f"{name:24} {found['error']}", flush=True)
            else:
                print(f"{name:24} {found['peak_bytes'] / 2**20:8.0f} MiB {found['seconds']:8.2f} s", flush=True)
    options.out.write_text(
        json.dumps(
            {
                "tokens": options.tokens,
                "width": options.width,
                "keep": options.keep,
                "features_bytes": options.tokens * options.width * 4,
                "square_map_bytes": options.tokens**2 * 4,
                "date": datetime.now(timezone.utc).date().isoformat(),
                "machine": f"{processor_name()}, {torch.get_num_threads()} threads",
                "versions": {name: version(name) for name in ("torch", "vlmprune")},
                "measured": table,
            },
            indent=1,
        )
        + "\n"
    )


if __name__ == "__main__":
    main()

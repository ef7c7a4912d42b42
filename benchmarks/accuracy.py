"""Accuracy of every pruner on the bundled model at several budgets: one table, one data file, one picture.

    python benchmarks/accuracy.py [--scenes 256] [--seed 20261] [--out benchmarks/results]

Scenes are drawn afresh from test digits and test photographs by `--seed`. Confidence intervals are Wilson's, 95 %.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections import defaultdict
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import vlmprune
from vlmprune import bundled
from vlmprune.scenes import digit_scenes

matplotlib.use("Agg")
import matplotlib.pyplot as plt

KEEPS = (1.0, 0.5, 0.25, 0.125, 0.0625)


def wilson(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion."""
    p, d = correct / total, 1 + z * z / total
    centre, half = p + z * z / (2 * total), z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return (centre - half) / d, (centre + half) / d


def batches(processor: Any, scenes: int, seed: int, size: int) -> list[tuple[dict[str, Any], list[str], list[str]]]:
    """Left-padded inputs, answers and kinds of all questions, `size` a batch."""
    asked = [(scene.image, question) for scene in digit_scenes("test", scenes, seed) for question in scene.questions]
    out = []
    for first in range(0, len(asked), size):
        part = asked[first : first + size]
        prompts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}],
                add_generation_prompt=True,
            )
            for _, question in part
        ]
        inputs = processor(
            images=[[image] for image, _ in part], text=prompts, return_tensors="pt", padding=True, padding_side="left"
        )
        out.append((dict(inputs), [question.answer for _, question in part], [question.kind for _, question in part]))
    return out


def reachable(model: Any, name: str, keep: float) -> bool:
    """Whether a method that starts inside the decoder can average so little over this shallow model's layers."""
    fields = {"layer": 1} if name == "fastv" else {}
    try:
        vlmprune.prune(model, name, keep=keep, **fields).close()
    except ValueError:
        return False
    return True


def evaluate(model: Any, processor: Any, data: list, name: str, keep: float, positions: str, advance: Any) -> dict:
    """Right and asked per question kind, and what the reports said."""
    right: dict[str, int] = defaultdict(int)
    asked: dict[str, int] = defaultdict(int)
    shares, full, cost, changed = set(), 0, 0, True
    for number, (inputs, answers, kinds) in enumerate(data):
        fields = {"random": {"seed": number}, "fastv": {"layer": 1}}.get(name, {})
        with vlmprune.prune(model, name, keep=keep, positions=positions, **fields) as session:
            ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        replies = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for reply, answer, kind in zip(replies, answers, kinds):
            right[kind] += reply.strip() == answer
            asked[kind] += 1
        report = session.last
        shares.add(report.average_keep)
        full, cost, changed = full + report.flops_full, cost + report.flops_pruned, changed and report.changed
        advance()
    (share,) = shares
    if changed != (keep < 1):
        raise RuntimeError(f"{name} at keep={keep} reports changed={changed}")
    total, hits = sum(asked.values()), sum(right.values())
    low, high = wilson(hits, total)
    return {
        "pruner": name,
        "keep": keep,
        "positions": positions,
        "tokens": round(share * report.items[0].tokens_before, 2),
        "accuracy": hits / total,
        "ci": [low, high],
        "questions": total,
        "flops_ratio": cost / full,
        "by_kind": {kind: [right[kind], asked[kind]] for kind in sorted(asked)},
    }


def markdown(rows: list[dict], meta: dict) -> str:
    kinds = sorted(rows[0]["by_kind"])
    lines = [
        "# Accuracy on the bundled model",
        "",
        f"{meta['questions']} questions about {meta['scenes']} fresh test scenes (seed {meta['seed']}), exact match, "
        f"95 % Wilson intervals. torch {meta['torch']}, transformers {meta['transformers']}, {meta['machine']}, "
        f"{meta['date']}. Regenerate with `make accuracy`. Tokens are the mean over decoder "
        "layers; FastV starts at layer 1 of 4 here, so that it cannot average less than a quarter.",
        "",
        "| pruner | positions | tokens of 144 | FLOPs | accuracy | " + " | ".join(kinds) + " |",
        "|---|---|---|---|---|" + "---|" * len(kinds),
    ]
    for row in rows:
        low, high = row["ci"]
        cells = [f"{100 * hit / n:.1f}" for hit, n in (row["by_kind"][kind] for kind in kinds)]
        lines.append(
            f"| {row['pruner']} | {row['positions']} | {row['tokens']:g} | {100 * row['flops_ratio']:.1f} % | "
            f"**{100 * row['accuracy']:.1f}** [{100 * low:.1f}, {100 * high:.1f}] | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines) + "\n"


def picture(rows: list[dict], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    full = rows[0]
    axes.axhline(100 * full["accuracy"], color="0.6", lw=1, ls=":", label=f"all {full['tokens']:g} tokens")
    names = list(dict.fromkeys(row["pruner"] for row in rows[1:]))
    for colour, name in enumerate(names):
        for positions, style in (("original", "-"), ("compact", "--")):
            line = [row for row in rows[1:] if row["pruner"] == name and row["positions"] == positions]
            axes.errorbar(
                [row["tokens"] for row in line],
                [100 * row["accuracy"] for row in line],
                [
                    [100 * (row["accuracy"] - row["ci"][0]) for row in line],
                    [100 * (row["ci"][1] - row["accuracy"]) for row in line],
                ],
                color=f"C{colour}",
                ls=style,
                marker="o",
                ms=4,
                capsize=2,
                label=name if positions == "original" else None,
            )
    axes.plot([], [], "k--", lw=1, label="compact positions")
    axes.set(xscale="log", xlabel="visual tokens kept of 144", ylabel="accuracy, %", title="Bundled model")
    ticks = sorted({row["tokens"] for row in rows})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=256)
    parser.add_argument("--seed", type=int, default=20261)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    model, processor = bundled.load()
    data = batches(processor, options.scenes, options.seed, options.batch)
    runs = [("uniform", 1.0, "original")] + [
        (name, keep, positions)
        for name in ("random", "uniform", "pool", *(n for n in vlmprune.list_pruners() if n not in BASELINES))
        for positions in ("original", "compact")
        for keep in KEEPS[1:]
        if reachable(model, name, keep)
    ]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    rows = []
    with Progress(*columns, console=Console(stderr=True)) as progress, torch.inference_mode():
        task = progress.add_task("", total=len(runs) * len(data))
        for name, keep, positions in runs:
            progress.update(task, description=f"{name} keep={keep:g} {positions}")
            rows.append(evaluate(model, processor, data, name, keep, positions, lambda: progress.advance(task)))
    rows[0]["pruner"] = "all tokens"
    meta = {
        "scenes": options.scenes,
        "seed": options.seed,
        "questions": rows[0]["questions"],
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "vlmprune": vlmprune.__version__,
        "machine": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "accuracy.json").write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")
    (options.out / "accuracy.md").write_text(markdown(rows, meta))
    picture(rows, options.out / "accuracy.png")
    print(markdown(rows, meta))


BASELINES = frozenset({"random", "uniform", "pool"})

if __name__ == "__main__":
    main()

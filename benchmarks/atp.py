"""ATP's trained modules against fixed schedules by the same scores, at equal average tokens, on the bundled model.

    python benchmarks/atp.py [--scenes 128] [--seed 41] [--out benchmarks/results/atp.json]

Scenes are drawn afresh from test digits and test photographs; the modules were trained on the training split. Every
fixed schedule ranks by the same scores and gets at least the tokens that the trained modules kept: the published
shape, the same number in every layer, and what the modules kept on average behind each layer. Intervals are Wilson's,
95 %; p is McNemar's exact test, two-sided, on the same questions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from paired import Benchmark, arguments, paired, score

import vlmprune
from vlmprune import bundled

AVERAGES = (40, 45, 54)
MODULES = 3


@dataclass(kw_only=True)
class Counts(vlmprune.ATPCalibrated):
    """A fixed schedule given by hand: these counts behind the modules, the best by redundancy score."""

    counts: tuple[int, ...] = ()
    grid: bool = False

    def scheduled(self, count: int, layer: int, depth: int) -> int:
        return min(count, self.counts[self.layers(depth).index(layer)])


def run(benchmark: Benchmark, pruner: vlmprune.Pruner) -> dict[str, Any]:
    """What the model answered: right or not, question by question, and the tokens behind each module."""
    found = benchmark.ask(pruner)
    counts = torch.tensor([[len(stage.kept) for stage in item.stages] for item in found.items], dtype=torch.float64)
    full, summary = found.items[-1].tokens_before, found.summary()
    of_kind = {kind: counts[[k == kind for k in found.kinds]].mean(0).tolist() for kind in summary["by_kind"]}
    return {
        "pruner": pruner.name,
        "tokens": (full + counts.sum(1).mean().item()) / (1 + MODULES),
        "behind": counts.mean(0).tolist(),
        **summary,
        "behind_by_kind": of_kind,
        "right": found.right,
    }


def tokens_of(fixed: vlmprune.ATPCalibrated) -> float:
    return (144 + sum(fixed.scheduled(144, layer, 1 + MODULES) for layer in fixed.layers(1 + MODULES))) / (1 + MODULES)


def flat(tokens: float) -> tuple[int, ...]:
    return (math.ceil((4 * tokens - 144) / MODULES),) * MODULES


def main() -> None:
    benchmark = Benchmark(arguments(__doc__, bundled.atp_weights(), "atp.json"))

    def add(row: dict[str, Any]) -> None:
        benchmark.rows.append(row)
        show(row)

    add({"setting": "all tokens", **run(benchmark, vlmprune.ATPCalibrated(keep=1.0))})
    for average in AVERAGES:
        trained = run(benchmark, vlmprune.ATP(keep=average / 144, weights=benchmark.options.weights))
        add({"average": average, "setting": "trained", **trained})
        # The first whose counts, rounded down, come to as many tokens.
        schedules = (
            vlmprune.ATPCalibrated(keep=k / 1440, grid=False) for k in range(round(10 * trained["tokens"]), 1441)
        )
        fixed = {
            "fixed schedule": next(each for each in schedules if tokens_of(each) >= trained["tokens"]),
            "fixed, as many in every layer": Counts(counts=flat(trained["tokens"])),
            "fixed, the trained modules' own averages": Counts(counts=tuple(math.ceil(c) for c in trained["behind"])),
        }
        for setting, pruner in fixed.items():
            row = run(benchmark, pruner)
            add({"average": average, "setting": setting, **row, "against": paired(trained["right"], row["right"])})
    benchmark.write()


def show(row: dict[str, Any]) -> None:
    print(
        f"{row.get('average', '')} {row['setting']}: {row['tokens']:.2f} tokens "
        f"({', '.join(f'{c:.1f}' for c in row['behind'])}), {score(row)}; "
        + " ".join(f"{kind} {hit}/{n}" for kind, (hit, n) in row["by_kind"].items()),
        flush=True,
    )


if __name__ == "__main__":
    main()

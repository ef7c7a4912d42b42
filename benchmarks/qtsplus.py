"""QTSplus's trained selector against other methods at equal tokens, on the bundled model.

    python benchmarks/qtsplus.py [--scenes 128] [--seed 41] [--out benchmarks/results/qtsplus.json]

Scenes are drawn afresh from test digits and test photographs; the selector was trained on the training split. First the
number of tokens that it predicts, question by question, and the others at the average of that, rounded up; then fixed
numbers. Intervals are Wilson's, 95 %; p is McNemar's exact test, two-sided, on the same questions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

from paired import Benchmark, arguments, paired, score

import vlmprune
from vlmprune import bundled

COUNTS = (36, 18, 9)


def run(benchmark: Benchmark, pruner: vlmprune.Pruner) -> dict[str, Any]:
    """What the model answered, question by question, and the tokens kept."""
    found = benchmark.ask(pruner)
    kept = [item.tokens_after for item in found.items]
    of_kind: dict[str, list[int]] = defaultdict(list)
    for kind, count in zip(found.kinds, kept):
        of_kind[kind].append(count)
    return {
        "tokens": sum(kept) / len(kept),
        "fewest": min(kept),
        "most": max(kept),
        **found.summary(),
        "tokens_by_kind": {kind: sum(each) / len(each) for kind, each in sorted(of_kind.items())},
        "right": found.right,
    }


def show(row: dict[str, Any]) -> None:
    print(f"{row['setting']}: {row['tokens']:.2f} tokens ({row['fewest']} to {row['most']}), {score(row)}", flush=True)


def main() -> None:
    benchmark = Benchmark(arguments(__doc__, bundled.qtsplus_weights(), "qtsplus.json"))
    weights = benchmark.options.weights

    def add(row: dict[str, Any]) -> None:
        benchmark.rows.append(row)
        show(row)

    add({"setting": "all tokens", **run(benchmark, vlmprune.Random(keep=1.0))})
    for asked in (None, *COUNTS):
        trained = run(benchmark, vlmprune.QTSplus(keep=asked, weights=weights))
        add({"asked": asked, "setting": "qtsplus", **trained})
        count = math.ceil(trained["tokens"])
        others = {
            "qtsplus, not rewritten": vlmprune.QTSplus(keep=count, weights=weights, reencode=False),
            **{
                name: vlmprune.create_pruner(name, keep=count)
                for name in ("qtsplus-training-free", "first_layer_attention", "divprune", "uniform", "random")
            },
        }
        if asked is None:
            same = vlmprune.QTSplus(keep=count, weights=weights)
            others = {"qtsplus, as many for every question": same, **others}
        for setting, pruner in others.items():
            row = run(benchmark, pruner)
            add({"asked": asked, "setting": setting, **row, "against": paired(trained["right"], row["right"])})
    benchmark.write()


if __name__ == "__main__":
    main()

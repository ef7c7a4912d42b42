"""QTSplus's trained selector against other methods at equal tokens, on the bundled model.

    python benchmarks/qtsplus.py [--scenes 128] [--seed 41] [--out benchmarks/results/qtsplus.json]

Scenes are drawn afresh from test digits and test photographs; the selector was trained on the training split. First the
number of tokens that it predicts, question by question, and the others at the average of that, rounded up; then fixed
numbers. Intervals are Wilson's, 95 %; p is McNemar's exact test, two-sided, on the same questions.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from atp import batches, paired
from scipy.stats import binomtest

import vlmprune
from vlmprune import bundled

COUNTS = (36, 18, 9)


def run(model: Any, processor: Any, data: Sequence[Any], pruner: vlmprune.Pruner) -> dict[str, Any]:
    """What the model answered, question by question, and the tokens kept."""
    right: list[bool] = []
    kept: list[int] = []
    of_kind: dict[str, list[int]] = defaultdict(list)
    by_kind: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for inputs, answers, kinds in data:
        with vlmprune.prune(model, pruner) as session:
            ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        replies = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for reply, answer, kind, item in zip(replies, answers, kinds, session.last.items):
            right.append(reply.strip() == answer)
            kept.append(item.tokens_after)
            of_kind[kind].append(item.tokens_after)
            by_kind[kind][0] += right[-1]
            by_kind[kind][1] += 1
    return {
        "tokens": sum(kept) / len(kept),
        "fewest": min(kept),
        "most": max(kept),
        "accuracy": sum(right) / len(right),
        "ci": list(binomtest(sum(right), len(right)).proportion_ci(method="wilson")),
        "by_kind": dict(sorted(by_kind.items())),
        "tokens_by_kind": {kind: sum(each) / len(each) for kind, each in sorted(of_kind.items())},
        "right": right,
    }


def show(row: dict[str, Any]) -> None:
    low, high = row["ci"]
    against = row.get("against")
    test = f", +{against['only_trained']} -{against['only_fixed']} p {against['p']:.2g}" if against else ""
    print(
        f"{row['setting']}: {row['tokens']:.2f} tokens ({row['fewest']} to {row['most']}), "
        f"{100 * row['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]{test}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=128)
    parser.add_argument("--seed", type=int, default=41)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--weights", type=Path, default=bundled.qtsplus_weights())
    parser.add_argument("--split", default="test", help="validation to look without spending the test scenes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "qtsplus.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model, processor = bundled.load()
    data = batches(processor, options.scenes, options.seed, options.batch, options.split)
    rows = [{"setting": "all tokens", **run(model, processor, data, vlmprune.Random(keep=1.0))}]
    show(rows[0])
    for asked in (None, *COUNTS):
        trained = run(model, processor, data, vlmprune.QTSplus(keep=asked, weights=options.weights))
        rows.append({"asked": asked, "setting": "qtsplus", **trained})
        show(rows[-1])
        count = math.ceil(trained["tokens"])
        others = {
            "qtsplus, not rewritten": vlmprune.QTSplus(keep=count, weights=options.weights, reencode=False),
            **{
                name: vlmprune.create_pruner(name, keep=count)
                for name in ("qtsplus-training-free", "first_layer_attention", "divprune", "uniform", "random")
            },
        }
        if asked is None:
            same = vlmprune.QTSplus(keep=count, weights=options.weights)
            others = {"qtsplus, as many for every question": same, **others}
        for setting, pruner in others.items():
            row = run(model, processor, data, pruner)
            rows.append({"asked": asked, "setting": setting, **row, "against": paired(trained["right"], row["right"])})
            show(rows[-1])
    meta = {
        "scenes": options.scenes,
        "seed": options.seed,
        "split": options.split,
        "questions": len(rows[0]["right"]),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "vlmprune": vlmprune.__version__,
        "machine": f"{platform.machine()} CPU, 1 thread",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "weights": json.loads((options.weights / "config.json").read_text(encoding="utf-8")),
    }
    for row in rows:
        del row["right"]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""ATP's trained modules against fixed schedules by the same scores, at equal average tokens, on the bundled model.

    python benchmarks/atp.py [--scenes 128] [--seed 41] [--out benchmarks/results/atp.json]

Scenes are drawn afresh from test digits and test photographs; the modules were trained on the training split. Every
fixed schedule ranks by the same scores and gets at least the tokens that the trained modules kept: the published
shape, the same number in every layer, and what the modules kept on average behind each layer. Intervals are Wilson's,
95 %; p is McNemar's exact test, two-sided, on the same questions.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest

import vlmprune
from vlmprune import bundled
from vlmprune.scenes import digit_scenes

AVERAGES = (40, 45, 54)
MODULES = 3


@dataclass(kw_only=True)
class Counts(vlmprune.ATPCalibrated):
    """A fixed schedule given by hand: these counts behind the modules, the best by redundancy score."""

    counts: tuple[int, ...] = ()
    grid: bool = False

    def scheduled(self, count: int, layer: int, depth: int) -> int:
        return min(count, self.counts[self.layers(depth).index(layer)])


def batches(processor: Any, scenes: int, seed: int, size: int, split: Any) -> list[tuple[Any, list[str], list[str]]]:
    """Left-padded inputs, answers and kinds of all questions, `size` a batch."""
    asked = [(scene.image, question) for scene in digit_scenes(split, scenes, seed) for question in scene.questions]
    out = []
    for first in range(0, len(asked), size):
        part = asked[first : first + size]
        parts = [[{"type": "image"}, {"type": "text", "text": question.text}] for _, question in part]
        prompts = processor.apply_chat_template(
            [[{"role": "user", "content": content}] for content in parts], add_generation_prompt=True
        )
        images = [[image] for image, _ in part]
        inputs = processor(images=images, text=prompts, return_tensors="pt", padding=True, padding_side="left")
        out.append((dict(inputs), [question.answer for _, question in part], [question.kind for _, question in part]))
    return out


def run(model: Any, processor: Any, data: Sequence[Any], pruner: vlmprune.Pruner) -> dict[str, Any]:
    """What the model answered: right or not, question by question, and the tokens behind each module."""
    right: list[bool] = []
    kinds: list[str] = []
    behind: list[list[int]] = []
    for inputs, answers, asked in data:
        with vlmprune.prune(model, pruner) as session:
            ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        replies = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += [reply.strip() == answer for reply, answer in zip(replies, answers)]
        kinds += asked
        behind += [[len(stage.kept) for stage in item.stages] for item in session.last.items]
        full = session.last.items[0].tokens_before
    counts = torch.tensor(behind, dtype=torch.float64)
    by_kind: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for kind, hit in zip(kinds, right):
        by_kind[kind][0] += hit
        by_kind[kind][1] += 1
    of_kind = {kind: counts[[k == kind for k in kinds]].mean(0).tolist() for kind in sorted(by_kind)}
    return {
        "pruner": pruner.name,
        "tokens": (full + counts.sum(1).mean().item()) / (1 + MODULES),
        "behind": counts.mean(0).tolist(),
        "accuracy": sum(right) / len(right),
        "ci": list(binomtest(sum(right), len(right)).proportion_ci(method="wilson")),
        "by_kind": dict(sorted(by_kind.items())),
        "behind_by_kind": of_kind,
        "right": right,
    }


def paired(trained: list[bool], fixed: list[bool]) -> dict[str, Any]:
    """Questions that only one of them answers, and the chance of so uneven a split."""
    gained = sum(a and not b for a, b in zip(trained, fixed))
    lost = sum(b and not a for a, b in zip(trained, fixed))
    p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    return {"only_trained": gained, "only_fixed": lost, "p": p}


def tokens_of(fixed: vlmprune.ATPCalibrated) -> float:
    return (144 + sum(fixed.scheduled(144, layer, 1 + MODULES) for layer in fixed.layers(1 + MODULES))) / (1 + MODULES)


def flat(tokens: float) -> tuple[int, ...]:
    return (math.ceil((4 * tokens - 144) / MODULES),) * MODULES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=128)
    parser.add_argument("--seed", type=int, default=41)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--weights", type=Path, default=bundled.atp_weights())
    parser.add_argument("--split", default="test", help="validation to look without spending the test scenes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "atp.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model, processor = bundled.load()
    data = batches(processor, options.scenes, options.seed, options.batch, options.split)
    rows = [{"setting": "all tokens", **run(model, processor, data, vlmprune.ATPCalibrated(keep=1.0))}]
    show(rows[0])
    for average in AVERAGES:
        trained = run(model, processor, data, vlmprune.ATP(keep=average / 144, weights=options.weights))
        rows.append({"average": average, "setting": "trained", **trained})
        show(rows[-1])
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
            row = run(model, processor, data, pruner)
            rows.append(
                {"average": average, "setting": setting, **row, "against": paired(trained["right"], row["right"])}
            )
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


def show(row: dict[str, Any]) -> None:
    low, high = row["ci"]
    against = row.get("against")
    test = f", +{against['only_trained']} -{against['only_fixed']} p {against['p']:.2g}" if against else ""
    print(
        f"{row.get('average', '')} {row['setting']}: {row['tokens']:.2f} tokens "
        f"({', '.join(f'{c:.1f}' for c in row['behind'])}), {100 * row['accuracy']:.1f} [{100 * low:.1f}, "
        f"{100 * high:.1f}]{test}; " + " ".join(f"{kind} {hit}/{n}" for kind, (hit, n) in row["by_kind"].items()),
        flush=True,
    )


if __name__ == "__main__":
    main()

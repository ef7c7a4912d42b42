"""What benchmarks of trained methods share: the bundled model's answers to the same questions under many settings.

Intervals are Wilson's, 95 %; p is McNemar's exact test, two-sided, on the same questions.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest

import vlmprune
from vlmprune import bundled
from vlmprune.ask import batch_inputs
from vlmprune.report import ItemReport
from vlmprune.scenes import digit_scenes


def arguments(description: str | None, weights: Path, results: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=128)
    parser.add_argument("--seed", type=int, default=41)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--weights", type=Path, default=weights)
    parser.add_argument("--split", default="test", help="validation to look without spending the test scenes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / results)
    return parser.parse_args()


@dataclass
class Answers:
    """Question by question, under one setting: its kind, whether the answer is right, what became of its image."""

    kinds: list[str] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    items: list[ItemReport] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        by_kind: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for kind, hit in zip(self.kinds, self.right):
            by_kind[kind][0] += hit
            by_kind[kind][1] += 1
        return {
            "accuracy": sum(self.right) / len(self.right),
            "ci": list(binomtest(sum(self.right), len(self.right)).proportion_ci(method="wilson")),
            "by_kind": dict(sorted(by_kind.items())),
        }


class Benchmark:
    """The questions of freshly drawn scenes, left-padded, and the rows measured so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        self.options, self.rows = options, list[dict[str, Any]]()
        self.model, self.processor = bundled.load()
        scenes = digit_scenes(options.split, options.scenes, options.seed)
        self.asked = [(scene.image, question) for scene in scenes for question in scene.questions]
        self.batches = list(self._batches(options.batch))

    def _batches(self, size: int) -> Iterator[tuple[dict[str, Any], Sequence[Any]]]:
        for first in range(0, len(self.asked), size):
            part = self.asked[first : first + size]
            inputs = batch_inputs(self.processor, [(question.text, [image], []) for image, question in part])
            yield dict(inputs), [question for _, question in part]

    def ask(self, pruner: vlmprune.Pruner) -> Answers:
        found = Answers()
        for inputs, questions in self.batches:
            with vlmprune.prune(self.model, pruner) as session:
                ids = self.model.generate(**inputs, max_new_tokens=3, do_sample=False)
            replies = self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            found.right += [reply.strip() == question.answer for reply, question in zip(replies, questions)]
            found.kinds += [question.kind for question in questions]
            found.items += session.last.items
        return found

    def write(self) -> None:
        """The rows, without the answers to single questions, and how they were measured."""
        meta = {
            "scenes": self.options.scenes,
            "seed": self.options.seed,
            "split": self.options.split,
            "questions": len(self.asked),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "vlmprune": vlmprune.__version__,
            "machine": f"{platform.machine()} CPU, 1 thread",
            "date": datetime.now(timezone.utc).date().isoformat(),
            "weights": json.loads((self.options.weights / "config.json").read_text(encoding="utf-8")),
        }
        rows = [{name: value for name, value in row.items() if name != "right"} for row in self.rows]
        self.options.out.parent.mkdir(parents=True, exist_ok=True)
        self.options.out.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def paired(trained: list[bool], fixed: list[bool]) -> dict[str, Any]:
    """Questions that only one of them answers, and the chance of so uneven a split."""
    gained = sum(a and not b for a, b in zip(trained, fixed))
    lost = sum(b and not a for a, b in zip(trained, fixed))
    p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    return {"only_trained": gained, "only_fixed": lost, "p": p}


def score(row: dict[str, Any]) -> str:
    """Accuracy, its interval, and the comparison where the row has one."""
    low, high = row["ci"]
    against = row.get("against")
    test = f", +{against['only_trained']} -{against['only_fixed']} p {against['p']:.2g}" if against else ""
    return f"{100 * row['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]{test}"

"""The main job on shipped data: ask the bundled model about held-out scenes, with all visual tokens and with few."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from vlmprune.ask import Answer, Chat, compare, device_name, encode
from vlmprune.bundled import DemoQuestion, DemoScene
from vlmprune.contract import Pruner
from vlmprune.overlay import BAD, GOOD, MUTED, TEXT, Panel, Span, atomic, item_pictures, save_image, sheet
from vlmprune.report import PruneReport


@dataclass(frozen=True)
class Row:
    """One question, answered with all visual tokens and with those the pruner kept."""

    scene: DemoScene
    question: DemoQuestion
    full: Answer
    pruned: Answer

    @property
    def report(self) -> PruneReport:
        assert self.pruned.report is not None
        return self.pruned.report

    @property
    def kept(self) -> list[int]:
        """Visual tokens left behind the last stage."""
        item = self.report.items[0]
        return (item.stages[-1].kept if item.stages else item.kept).tolist()

    def right(self, answer: Answer) -> bool:
        return answer.text.strip().lower() == self.question.answer.lower()


def pick_questions(scenes: Sequence[DemoScene], per_scene: int) -> list[tuple[DemoScene, DemoQuestion]]:
    """`per_scene` questions of every scene; scenes take turns in what they start with, so that every kind comes up."""
    return [
        (scene, scene.questions[(number * per_scene + i) % len(scene.questions)])
        for number, scene in enumerate(scenes)
        for i in range(min(per_scene, len(scene.questions)))
    ]


def run(
    chat: Chat,
    pruner: Pruner,
    questions: Sequence[tuple[DemoScene, DemoQuestion]],
    repeats: int = 3,
    advance: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Answer every question both ways; times are medians of `repeats`. `advance` is called after each question."""
    rows = []
    for number, (scene, question) in enumerate(questions):
        inputs = encode(chat, [scene.image], question.text)
        full, pruned = compare(chat, inputs, pruner, max_new_tokens=16, repeats=repeats, warm_up=number == 0)
        rows.append(Row(scene, question, full, pruned))
        advance()
    return rows


def right_answers(rows: Sequence[Row]) -> tuple[int, int]:
    """How many answers are right, (with all tokens, pruned)."""
    return sum(row.right(row.full) for row in rows), sum(row.right(row.pruned) for row in rows)


def as_json(rows: Sequence[Row], chat: Chat, pruner: Pruner) -> dict[str, Any]:
    """The content of `report.json`: what ran where, a summary, and one entry per question."""
    full, pruned = right_answers(rows)
    return {
        "model": chat.name,
        "pruner": {"name": pruner.name, **dataclasses.asdict(pruner)},
        "environment": environment(chat),
        "summary": {"questions": len(rows), "right_full": full, "right_pruned": pruned},
        "questions": [
            {
                "scene": row.scene.name,
                "kind": row.question.kind,
                "question": row.question.text,
                "truth": row.question.answer,
                "answer_full": row.full.text,
                "answer_pruned": row.pruned.text,
                "tokens_before": row.report.tokens_before,
                "tokens_after": row.report.tokens_after,
                "kept": row.kept,
                "flops_full": row.report.flops_full,
                "flops_pruned": row.report.flops_pruned,
                "kv_bytes_full": row.report.kv_bytes_full,
                "kv_bytes_pruned": row.report.kv_bytes_pruned,
                "first_token_seconds_full": row.full.first_token_seconds,
                "first_token_seconds_pruned": row.pruned.first_token_seconds,
                "total_seconds_full": row.full.total_seconds,
                "total_seconds_pruned": row.pruned.total_seconds,
                "selection_seconds": row.report.selection_seconds,
            }
            for row in rows
        ],
    }


def environment(chat: Chat) -> dict[str, Any]:
    """Versions and machine, without names or paths of this one."""
    return {
        "versions": {name: metadata.version(name) for name in ("vlmprune", "torch", "transformers")},
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device_name(chat.model.device),
        "settings": chat.settings,
    }


def write(rows: Sequence[Row], chat: Chat, pruner: Pruner, folder: Path) -> tuple[Path, Path]:
    """Write `kept_tokens.png` and `report.json`, each whole or not at all; returns (report, picture)."""
    report, picture = folder / "report.json", folder / "kept_tokens.png"
    drawn = draw(rows, chat, pruner)
    text = json.dumps(as_json(rows, chat, pruner), indent=1, ensure_ascii=False) + "\n"
    save_image(drawn, picture)
    with atomic(report) as part:
        part.write_text(text, encoding="utf-8")
    return report, picture


def draw(rows: Sequence[Row], chat: Chat, pruner: Pruner) -> Any:
    """A sheet with one card per scene and kept set: picture, kept tokens, questions with both answers."""
    panels = []
    for (_, kept), group in groupby(rows, lambda row: (row.scene.name, row.kept)):
        same = list(group)
        report = same[0].report
        ((seen, bright),) = item_pictures(report.items[0], [same[0].scene.image], width=336)
        before, after = report.tokens_before, report.tokens_after
        lines = [line for row in same for line in _lines(row, before, after)][1:]
        labels = (f"all {before} tokens", f"{len(kept)} tokens kept by {type(pruner).__name__}")
        panels.append(Panel([seen, bright], labels, lines))
    full, pruned = right_answers(rows)
    before, after = rows[0].report.tokens_before, rows[0].report.tokens_after
    score = f"{full} right with all tokens, {pruned} right with {100 * after / before:.0f} % of them"
    return sheet(
        panels,
        title=f"{type(pruner).__name__} keeps {after} of {before} visual tokens",
        lines=[[(f"{chat.name}, {len(rows)} questions about scenes it never saw: {score}", MUTED)]],
        columns=2,
    )


def _lines(row: Row, before: int, after: int) -> list[list[Span]]:
    answers: list[Span] = [("Truth: ", MUTED), (row.question.answer, TEXT)]
    for count, answer in ((before, row.full), (after, row.pruned)):
        shown = answer.text or "(nothing)"
        answers += [
            (f"    with {count}: ", MUTED),
            (shown, GOOD) if row.right(answer) else (f"{shown} (wrong)", BAD),
        ]
    return [[], [(row.question.text, TEXT)], answers]

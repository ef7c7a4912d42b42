"""One batch under one setting: replies, scores, what the reports said, and whether the logits changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature

from vlmprune.ask import Chat, quiet
from vlmprune.overlay import cells, save_image, seen_pictures
from vlmprune.report import ItemReport, PruneReport
from vlmprune.selection import counting_selection
from vlmprune.session import prune
from vlmprune.sweep.batches import Batch, Batches
from vlmprune.sweep.data import Sample
from vlmprune.sweep.frames import FrameChoice
from vlmprune.sweep.metrics import Metric
from vlmprune.sweep.plan import UNPRUNED, Setting

MARKS = ".#+"
"""How a grid of kept tokens is written: dropped, kept, standing for several tokens."""
_MAX_SIDE = 512


@dataclass
class Evaluator:
    """What stays the same for all batches and settings of a model.

    Attributes:
        examples: places in the data set of which kept tokens are noted.
        pictures: folder for the pictures of the examples.
    """

    chat: Chat
    batches: Batches
    samples: Sequence[Sample]
    metric: Metric
    max_new_tokens: int
    examples: frozenset[int] = frozenset()
    pictures: Path | None = None
    _unpruned_logits: dict[int, Any] = field(default_factory=dict)
    _choice: FrameChoice | None = None

    def __call__(self, setting: Setting, number: int) -> dict[str, Any]:
        """The record of batch `number`; samples that cannot be answered are told apart, with the reason."""
        record: dict[str, Any] = {
            "batch": number,
            "samples": [],
            "failed": [],
            "bad": [],
            "sums": {},
            "changed": [],
            "logit_difference": None,
            "selection": None,
            "kept": [],
        }
        places = self.batches.groups[number]
        try:
            batch = self._batch(setting, places, number)
            record["bad"] = [[place, why] for place, why in batch.bad]
            places = batch.samples
            if not places:
                return record
            if number == 0 and setting.method != UNPRUNED:
                self._look_closer(setting, batch, record)
            self._answer(setting, batch, number, record)
        except Exception as failure:  # a processor, a method or the memory may fail on one sample of many
            record.update(samples=[], sums={}, changed=[], kept=[])
            for place in places:
                self._answer_alone(setting, place, number, record, failure if len(places) == 1 else None)
        return record

    def _answer_alone(
        self, setting: Setting, place: int, number: int, record: dict[str, Any], error: Exception | None
    ) -> None:
        if error is None:
            try:
                batch = self._batch(setting, [place])
                if batch.samples:
                    self._answer(setting, batch, number, record)
                record["bad"] += [[place, why] for place, why in batch.bad]
                return
            except Exception as alone:
                error = alone
        why = " ".join(str(error).split()) or type(error).__name__
        record["failed"].append([place, type(error).__name__, why])

    def _batch(self, setting: Setting, places: Sequence[int], number: int = -1) -> Batch:
        if setting.selector is None:
            return self.batches.make(places) if number < 0 else self.batches[number]
        if self._choice is None or self._choice.setting != setting:
            self._choice = FrameChoice(setting, self.chat.model.device, self._choice)
        self._choice.flops, self._choice.changed = 0, False
        return self.batches.make(places, number, self._choice.counted)

    def _answer(self, setting: Setting, batch: Batch, number: int, record: dict[str, Any]) -> None:
        chat = self.chat
        inputs = placed(chat, batch.inputs)
        with prune(chat.model, setting.pruner(number)) as session:
            replies = generate(chat, inputs, self.max_new_tokens)
        report = session.last
        assert report is not None
        scored = [
            [place, reply, round(self.metric(reply, self.samples[place].answers), 6)]
            for place, reply in zip(batch.samples, replies)
        ]
        for row, place in enumerate(batch.samples):
            # Frames chosen beforehand are no part of the pictures that the report draws on.
            if place in self.examples and setting.selector is None:
                items = [item for item in report.items if item.sample == row]
                record["kept"].append([place, [grid for item in items for grid in kept_grids(item)]])
                if setting.method == UNPRUNED and self.pictures is not None:
                    self._save_pictures(batch, row, place, items)
        _add(record["sums"], report)
        changed = report.changed
        if setting.selector is not None:
            assert self._choice is not None
            record["sums"]["flops_pruned"] += self._choice.flops
            changed = self._choice.changed
        record["changed"].append(changed)
        record["samples"] += scored

    def _look_closer(self, setting: Setting, batch: Batch, record: dict[str, Any]) -> None:
        """Largest absolute change of the first new token's logits over the batch, and what choosing costs it."""
        inputs = placed(self.chat, batch.inputs)
        if batch.number not in self._unpruned_logits:
            whole = placed(self.chat, self.batches[batch.number].inputs)
            self._unpruned_logits = {batch.number: _first_logits(self.chat.model, whole)}
        with prune(self.chat.model, setting.pruner(batch.number)) as session, counting_selection() as selection:
            logits = _first_logits(self.chat.model, inputs)
        difference = float((logits - self._unpruned_logits[batch.number]).abs().max())
        record["logit_difference"] = float(f"{difference:.4g}")
        report = session.last
        assert report is not None
        if setting.selector is None:  # what choosing frames costs is part of the prefill's FLOPs
            record["selection"] = {
                "flops": selection.total / report.batch,
                "ratio": selection.total / report.flops[0].language_model,
            }

    def _save_pictures(self, batch: Batch, row: int, place: int, items: Sequence[ItemReport]) -> None:
        assert self.pictures is not None
        for number, picture in enumerate(plane_pictures(self.chat, batch, row, items)):
            picture = picture.convert("RGB")
            picture.thumbnail((_MAX_SIDE, _MAX_SIDE))
            save_image(picture, self.pictures / f"{place}-{number}.png")


def placed(chat: Chat, inputs: BatchFeature) -> BatchFeature:
    """A copy of `inputs` on the model's device and in its dtype."""
    return BatchFeature(dict(inputs)).to(chat.model.device, chat.model.dtype)


def generate(chat: Chat, inputs: Any, max_new_tokens: int) -> list[str]:
    """Greedy replies to left-padded prompts."""
    with quiet(), torch.inference_mode():
        ids = chat.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
    new = ids[:, inputs["input_ids"].shape[1] :]
    return [reply.strip() for reply in chat.processor.tokenizer.batch_decode(new, skip_special_tokens=True)]


@torch.inference_mode()
def _first_logits(model: Any, inputs: Any) -> torch.Tensor:
    return model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1].float().cpu()


def _add(sums: dict[str, Any], report: PruneReport) -> None:
    layers = report.layer_visual_tokens
    held = sums.get("tokens", [0] * len(layers))
    sums["tokens"] = [a + b for a, b in zip(held, layers)]
    for name, value in (
        ("questions", report.batch),
        ("tokens_before", report.tokens_before),
        ("flops_full", report.flops_full),
        ("flops_pruned", report.flops_pruned),
        ("kv_bytes_full", report.kv_bytes_full),
        ("kv_bytes_pruned", report.kv_bytes_pruned),
    ):
        sums[name] = sums.get(name, 0) + value


def kept_grids(item: ItemReport) -> list[list[str]]:
    """What was left behind the last stage, as rows of `MARKS`, one list per plane (picture or frame)."""
    last = item.stages[-1].kept if item.stages else item.kept
    merged = None if item.merged is None else item.merged.tolist()
    grids = cells(item.geometry, last.tolist(), merged)
    return [["".join(MARKS[state] for state in row) for row in grid.tolist()] for grid in grids]


def plane_pictures(chat: Chat, batch: Batch, row: int, items: Sequence[ItemReport]) -> list[Image.Image]:
    """A picture for each plane of the items of one row: as the tower saw it where that can be told, else as given."""
    planes = [len(item.geometry.grids) for item in items]
    given = batch.pictures[row]
    pixels = batch.inputs.get("pixel_values")
    if pixels is not None and pixels.ndim == 4 and len(pixels) == sum(map(len, batch.pictures)):
        first = sum(map(len, batch.pictures[:row]))
        if len(given) == sum(planes):
            seen = seen_pictures(pixels[first : first + len(given)], chat.processor.image_processor)
            grids = [grid for item in items for grid in item.geometry.grids]
            # A tower ignores the pixels behind the last whole patch.
            return [
                picture.crop((0, 0, picture.width // columns * columns, picture.height // rows * rows))
                for picture, (rows, columns) in zip(seen, grids, strict=True)
            ]
    images = len(items) - sum(item.geometry.kind == "video" for item in items)
    out: list[Image.Image] = []
    for place, (item, count) in enumerate(zip(items, planes)):
        if item.geometry.kind == "image":
            out += [given[place]] * count
        else:
            frames = given[images:]
            out += [frames[min(i * len(frames) // count, len(frames) - 1)] for i in range(count)]
    return out

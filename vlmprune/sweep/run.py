"""Run a sweep: every row once, whatever it was interrupted by, on one process or on many."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from transformers.utils import logging

from vlmprune import bundled
from vlmprune.ask import Chat, load_chat
from vlmprune.demo import environment
from vlmprune.session import prune
from vlmprune.sweep import store
from vlmprune.sweep.batches import Batches, line, prepare_tokenizer
from vlmprune.sweep.config import ModelConfig, SweepConfig
from vlmprune.sweep.data import Data, load_data
from vlmprune.sweep.evaluate import Evaluator
from vlmprune.sweep.metrics import METRICS, paired_difference, wilson
from vlmprune.sweep.plan import UNPRUNED, Setting, settings_of
from vlmprune.sweep.timing import Stopwatch

BUNDLED = "bundled"
_TRIED_FIRST = 8
_CLOSER = ("logit_difference", "selection")  # looked at in the first batch alone


class Watcher:
    """Told of what happens; does nothing itself."""

    def begin(self, rows: int, done: int, batches: int) -> None:
        """`rows` in all, `done` of them before; `batches` are left to answer."""

    def row(self, setting: Setting) -> None:
        """Work on a row begins."""

    def advance(self, batches: int = 1) -> None:
        """So many batches are done with."""

    def finished(self, row: dict[str, Any]) -> None:
        """A row is in the file."""

    def note(self, text: str) -> None:
        """Something the user should know."""


@dataclass
class Outcome:
    """Rows of the whole plan in order, and what could not be done: (setting, why)."""

    rows: list[dict[str, Any]]
    failed: list[tuple[Setting, str]] = field(default_factory=list)


def run(config: SweepConfig, watch: Watcher | None = None) -> Outcome:
    """Do what `config` asks for and is not yet in `config.out`.

    Files there: `sweep.json` (what was asked of what), `results.jsonl` (one row per setting, the same whenever and
    however often interrupted), `timings.jsonl` (what was measured on this machine), `predictions/` (every reply),
    `examples/` (pictures for the report).

    Raises:
        ValueError: bad data, an unsupported model, or a folder with another sweep in it.
    """
    state = PartialState(cpu=config.device == "cpu" or not torch.cuda.is_available())
    watch = watch if watch is not None and state.is_main_process else Watcher()
    data = load_data(config.data)
    for why in data.bad[:5]:
        watch.note(f"left out: {why}")
    if len(data.bad) > 5:
        watch.note(f"left out: {len(data.bad) - 5} more")
    config.out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(config.out / ".lock", timeout=0)
    try:
        if state.is_main_process:
            lock.acquire()
            _begin(config, data)
        state.wait_for_everyone()
        return _Run(config, data, state, watch).run()
    except Timeout:
        raise ValueError(f"another sweep is writing to '{config.out}': wait for it or give another --out.") from None
    finally:
        lock.release()


def _begin(config: SweepConfig, data: Data) -> None:
    """Check that the folder is this sweep's, repair what a kill left torn."""
    path = config.out / store.SWEEP
    asked: dict[str, Any] = {
        "data": config.data.model_dump(mode="json", exclude_defaults=True) | {"source": data.name},
        "questions": len(data.samples),
        "unusable": len(data.bad),
        "fingerprint": data.fingerprint,
        "metric": config.metric,
        "prompt": config.data.prompt,
        "batch_size": config.batch_size,
        "max_new_tokens": config.max_new_tokens,
        "examples": config.examples,
        "models": {model.name: model.model_dump(mode="json", exclude={"name"}) for model in config.models},
    }
    if path.exists() and not store.read(config.out / store.RESULTS):
        # No row says otherwise, so the folder is free; what another question's batches left is of no use.
        if store.read_json(path) != asked:
            store.remove(config.out / "parts")
    elif path.exists():
        held = store.read_json(path)
        for key in ("fingerprint", "metric", "prompt", "batch_size", "max_new_tokens", "examples"):
            if held.get(key) != asked[key]:
                what = "other questions" if key == "fingerprint" else f"{key}={held.get(key)!r}, now {asked[key]!r}"
                raise ValueError(f"'{config.out}' holds a sweep with {what}: give another --out.")
        for name, model in asked["models"].items():
            if held["models"].get(name, model) != model:
                raise ValueError(f"'{config.out}' holds rows of another '{name}': give the model another name.")
        asked["models"] = held["models"] | asked["models"]
    store.tidy(config.out)
    store.write_json(path, asked)
    for name in (store.RESULTS, store.TIMINGS):
        store.repair(config.out / name)


class _Run:
    def __init__(self, config: SweepConfig, data: Data, state: PartialState, watch: Watcher) -> None:
        self.config, self.data, self.state, self.watch = config, data, state, watch
        self.out = config.out
        self.failed: list[tuple[Setting, str]] = []
        self.rows = {row["id"]: row for row in store.read(self.out / store.RESULTS)}
        self.timed = {timing["id"] for timing in store.read(self.out / store.TIMINGS)}
        state.wait_for_everyone()  # nobody appends before all have read

    def run(self) -> Outcome:
        plan = settings_of(self.config)
        todo = [setting for setting in plan if self._open(setting)]
        unanswered = sum(setting.id not in self.rows for setting in todo)
        size = -(-len(self.data.samples) // self.config.batch_size)
        self.watch.begin(len(plan), len(plan) - len(todo), unanswered * size)
        for model in self.config.models:
            mine = [setting for setting in todo if setting.model == model.name]
            if mine:
                self._run_model(model, mine)
        if self.state.is_local_main_process:
            store.remove(self.out / "parts")
        return Outcome([self.rows[setting.id] for setting in plan if setting.id in self.rows], self.failed)

    def _open(self, setting: Setting) -> bool:
        row = self.rows.get(setting.id)
        untimed = bool(self.config.timing) and setting.id not in self.timed
        return row is None or (row["status"] == "ok" and untimed)

    def _run_model(self, model: ModelConfig, todo: Sequence[Setting]) -> None:
        config = self.config
        chat = load(model, config.device, self.state)
        batches = Batches(chat, self.data.samples, config.batch_size, config.data.prompt)
        self._evaluate = Evaluator(
            chat,
            batches,
            self.data.samples,
            METRICS[config.metric],
            config.max_new_tokens,
            examples=frozenset(pick_examples(self.data, config.examples)),
            pictures=self.out / "examples" / model.name,
        )
        self._bad: set[int] = set()
        stopwatch = None
        for setting in todo:
            self.watch.row(setting)
            if setting.id not in self.rows:
                self._row(setting, chat)
            row = self.rows.get(setting.id)
            if config.timing and row and row["status"] == "ok" and setting.id not in self.timed:
                if self.state.is_main_process:
                    stopwatch = stopwatch or Stopwatch(chat, batches, config.timing, config.max_new_tokens)
                    self._time(setting, stopwatch, chat)
                self.state.wait_for_everyone()

    def _row(self, setting: Setting, chat: Chat) -> None:
        try:
            if setting.selector is not None and not any(sample.video for sample in self.data.samples):
                raise ValueError(f"{setting.method} chooses frames of a video, and these questions come without one")
            prune(chat.model, setting.pruner()).close()
        except ValueError as error:
            self.watch.advance(len(self._evaluate.batches))
            self._finish(setting, chat, {"status": "not reachable", "reason": line(error)})
            return
        records = self._records(setting)
        answered = sum(len(record["samples"]) for record in records)
        if not any(record["samples"] or record["failed"] for record in records):
            store.remove(self.out / "parts")
            first = min(bad for record in records for bad in record["bad"])[1]
            raise ValueError(f"no sample of '{self.config.data.source}' can be read; the first: {first}.")
        for record in records:
            for place, why in record["bad"]:
                if place not in self._bad:
                    self._bad.add(place)
                    self.watch.note(f"left out: {why}")
        failures = sorted(failure for record in records for failure in record["failed"])
        if not answered:
            _, kind, why = failures[0]
            if kind == "ValueError":
                self._finish(setting, chat, {"status": "not reachable", "reason": why.rstrip(".")})
            else:
                self.failed.append((setting, f"{kind}: {why}"))
                self.watch.note(f"{setting.id} failed: {why}")
            return
        if failures:
            self.watch.note(f"{setting.id}: {len(failures)} questions failed, the first with: {failures[0][2]}")
        self._finish(setting, chat, {"status": "ok", **self._summary(setting, records)}, records)

    def _records(self, setting: Setting) -> list[dict[str, Any]]:
        """One record per batch, those of an interrupted run included; every process takes its share."""
        parts = self.out / "parts" / setting.id
        mine = parts / f"{self.state.process_index}.jsonl"
        parts.mkdir(parents=True, exist_ok=True)
        if self.state.is_main_process:
            for path in parts.iterdir():
                store.repair(path)
        self.state.wait_for_everyone()
        found = [record for path in sorted(parts.glob("*.jsonl")) for record in store.read(path)]
        records = {record["batch"]: record for record in gather_object(found)}
        self.watch.advance(len(records))
        first = max(self.state.num_processes, -(-_TRIED_FIRST // self.config.batch_size))
        # A setting under which nothing of the first batches can be answered is given up.
        for numbers in (range(first), range(first, len(self._evaluate.batches))):
            todo = [number for number in numbers if number < len(self._evaluate.batches) and number not in records]
            made = []
            for number in todo[self.state.process_index :: self.state.num_processes]:
                record = self._evaluate(setting, number)
                store.append(mine, record)
                made.append(record)
                self.watch.advance(min(self.state.num_processes, len(todo)))
            records.update((record["batch"], record) for record in gather_object(made))
            tried = records.values()
            if any(record["failed"] for record in tried) and not any(record["samples"] for record in tried):
                break
        return [records[number] for number in sorted(records)]

    def _summary(self, setting: Setting, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        scores = {place: score for place, _, score in _replies(records)}
        total, mean = len(scores), sum(scores.values()) / len(scores)
        kinds: dict[str, list[float]] = {}
        for place, score in scores.items():
            kinds.setdefault(self.data.samples[place].kind, []).append(score)
        sums = _total(record["sums"] for record in records)
        asked = sums["questions"]
        layers = [tokens / asked for tokens in sums["tokens"]]
        full = {name: sums[name] / asked for name in ("tokens_before", "flops_full", "kv_bytes_full")}
        if setting.selector is not None and (reference := self._unpruned(setting)):
            # The model was shown less than there was.
            full = {
                "tokens_before": reference["tokens"]["full"],
                "flops_full": reference["flops"]["full"],
                "kv_bytes_full": reference["kv_bytes"]["full"],
            }
        before = full["tokens_before"]
        return {
            "metric": self.config.metric,
            "questions": total,
            "unusable": len(self.data.bad) + sum(len(record["bad"]) for record in records),
            "failed": sum(len(record["failed"]) for record in records),
            "accuracy": mean,
            "ci": list(wilson(mean, total)),
            "vs_unpruned": self._against_unpruned(setting, scores),
            "by_kind": {kind: [sum(own), len(own)] for kind, own in sorted(kinds.items()) if kind},
            "tokens": {
                "full": before,
                "per_layer": layers,
                "average": sum(layers) / len(layers),
                "average_keep": sum(layers) / len(layers) / before if before else 1.0,
            },
            "flops": _pair(full["flops_full"], sums["flops_pruned"] / asked),
            "kv_bytes": _pair(full["kv_bytes_full"], sums["kv_bytes_pruned"] / asked),
            "changed": any(flag for record in records for flag in record["changed"]),
            **next(({key: r.get(key) for key in _CLOSER} for r in records if r["batch"] == 0), {}),
        }

    def _unpruned(self, setting: Setting) -> dict[str, Any] | None:
        """The finished row of the same model without pruning."""
        row = self.rows.get(Setting(setting.model, UNPRUNED, {}, 1.0, "original", None).id)
        return row if row is not None and row["status"] == "ok" else None

    def _against_unpruned(self, setting: Setting, scores: dict[int, float]) -> dict[str, Any] | None:
        """Paired with the unpruned run on the questions that both answered."""
        if setting.method == UNPRUNED:
            return None
        row = self._unpruned(setting)
        path = None if row is None else predictions_path(self.out, row["id"])
        if path is None or not path.exists():
            return None
        reference = {entry["place"]: entry["score"] for entry in store.read_lines(path) if "score" in entry}
        common = [place for place in scores if place in reference]
        mine, theirs = [scores[place] for place in common], [reference[place] for place in common]
        difference, interval = paired_difference(mine, theirs)
        return {
            "difference": difference,
            "ci": list(interval),
            "lost": sum(a < b for a, b in zip(mine, theirs)),
            "gained": sum(a > b for a, b in zip(mine, theirs)),
        }

    def _finish(
        self, setting: Setting, chat: Chat, result: dict[str, Any], records: Sequence[dict[str, Any]] = ()
    ) -> None:
        """The row is done: its replies first, then the line that says so."""
        used = {"id": setting.id, **setting.key, **result, "environment": _environment(chat)}
        if self.state.is_main_process:
            if records:
                store.write_lines(predictions_path(self.out, setting.id), self._predictions(records))
            store.append(self.out / store.RESULTS, used)
        self.state.wait_for_everyone()
        if self.state.is_local_main_process:
            store.remove(self.out / "parts" / setting.id)
        self.rows[setting.id] = used
        self.watch.finished(used)

    def _predictions(self, records: Sequence[dict[str, Any]]) -> Iterable[dict[str, Any]]:
        kept = dict(pair for record in records for pair in record["kept"])
        entries: dict[int, dict[str, Any]] = {}
        for place, reply, score in _replies(records):
            entries[place] = {"reply": reply, "score": score}
            if place in kept:
                entries[place]["kept"] = kept[place]
        for record in records:
            entries.update((place, {"failed": f"{kind}: {why}"}) for place, kind, why in record["failed"])
        for place in sorted(entries):
            sample = self.data.samples[place]
            about = {"place": place, "id": sample.id}
            if place in kept:
                about |= {"question": sample.question, "answers": sample.answers, "kind": sample.kind}
            yield about | entries[place]

    def _time(self, setting: Setting, stopwatch: Stopwatch, chat: Chat) -> None:
        try:
            measured = stopwatch(setting)
        except Exception as error:  # what answered in one batch may still fail in another, as memory does
            self.watch.note(f"{setting.id} could not be timed: {line(error)}")
            return
        about = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), **environment(chat)}
        about["processes"] = self.state.num_processes
        store.append(self.out / store.TIMINGS, {"id": setting.id, **measured, **about})
        self.timed.add(setting.id)


def load(model: ModelConfig, device: str | None, state: PartialState) -> Chat:
    """The model with its processor, on this process's device."""
    source, dtype = model.path, model.dtype
    if source.split("/")[0] == BUNDLED:
        name = source.partition("/")[2]
        folder = bundled.model_path().parent / name if name else bundled.model_path()
        if not (folder / "processor_config.json").is_file():
            known = ", ".join(sorted(path.parent.name for path in folder.parent.glob("*/processor_config.json")))
            raise ValueError(f"there is no bundled model '{name}': choose from {known}.")
        source = str(folder)
        dtype = dtype or "float32"
        torch.set_num_threads(1)  # for models as small as these, threads cost more than they bring
    options: dict[str, Any] = {}
    if model.attention:
        options["attn_implementation"] = model.attention
    if model.device_map:
        options["device_map"] = model.device_map
    if device is None and state.num_processes > 1:
        device = str(state.device)
    logging.disable_progress_bar()
    try:
        chat = load_chat(source, device, dtype, **options)
    finally:
        logging.enable_progress_bar()
    prepare_tokenizer(chat)
    return Chat(chat.model, chat.processor, model.name)


def predictions_path(out: Path, row: str) -> Path:
    return out / "predictions" / f"{row}.jsonl.gz"


def pick_examples(data: Data, count: int) -> list[int]:
    """Places of `count` samples, the kinds in turn."""
    kinds: dict[str, list[int]] = {}
    for place, sample in enumerate(data.samples):
        kinds.setdefault(sample.kind, []).append(place)
    turns = [places[i] for i in range(count) for places in kinds.values() if i < len(places)]
    return sorted(turns[:count])


def _environment(chat: Chat) -> dict[str, Any]:
    """Versions and kind of machine: what a result may depend on, and nothing that differs from run to run."""
    about = environment(chat)
    return {
        "versions": about["versions"],
        "python": about["python"],
        "platform": about["platform"],
        "device": torch.cuda.get_device_name() if chat.model.device.type == "cuda" else chat.model.device.type,
        "attention": chat.model.config.get_text_config()._attn_implementation,
        "dtype": str(chat.model.dtype).removeprefix("torch."),
    }


def _replies(records: Iterable[dict[str, Any]]) -> list[tuple[int, str, float]]:
    return sorted((place, reply, score) for record in records for place, reply, score in record["samples"])


def _total(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            if isinstance(value, list):
                total[key] = [a + b for a, b in zip(total.get(key, [0] * len(value)), value)]
            else:
                total[key] = total.get(key, 0) + value
    return total


def _pair(full: float, pruned: float) -> dict[str, float]:
    return {"full": full, "pruned": pruned, "ratio": pruned / full if full else 1.0}

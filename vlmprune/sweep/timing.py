"""What a setting costs in time and memory, measured apart from accuracy: nothing is shared with other settings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import BatchFeature

from vlmprune.ask import Answer, Chat, answer
from vlmprune.session import prune
from vlmprune.sweep.batches import Batch, Batches
from vlmprune.sweep.config import TimingConfig
from vlmprune.sweep.evaluate import generate, placed
from vlmprune.sweep.frames import FrameChoice
from vlmprune.sweep.plan import UNPRUNED, Setting

if TYPE_CHECKING:
    from vlmprune.video import Clip


class Stopwatch:
    """Times settings of one model on the same questions. The unpruned model runs without a session.

    Args:
        config: how many questions one at a time, how many new tokens each, how many full batches.
    """

    def __init__(self, chat: Chat, batches: Batches, config: TimingConfig, max_new_tokens: int) -> None:
        self._chat, self._config, self._max_new_tokens = chat, config, max_new_tokens
        self._choice: FrameChoice | None = None
        places = sorted(place for group in batches.groups for place in group)
        self._batches = batches
        alone = [batches.make([place]) for place in spread(places, config.questions)]
        self._alone = [batch for batch in alone if batch.samples]
        full = [batches[number] for number in spread(range(len(batches)), config.batches)]
        self._full = [batch for batch in full if batch.samples]

    def __call__(self, setting: Setting) -> dict[str, Any]:
        """Seconds to the first token and decode speed at batch 1, questions a second and peak memory at full batches.

        Medians with quartiles over the questions, after one that does not count. Decoding is timed over a fixed number
        of new tokens, the end of the reply ignored. Peak memory is the GPU's allocations, or the resident memory of the
        process on a CPU (None where the system does not tell), model included.
        """
        chat, tokens = self._chat, self._config.new_tokens
        pruner = None if setting.method == UNPRUNED else setting.pruner()
        runs: list[Answer] = []
        choosing: list[float] = []
        for batch in (self._alone[0], *self._alone):
            inputs, chosen = self._inputs(setting, batch)
            runs.append(answer(chat, placed(chat, inputs), pruner, max_new_tokens=tokens, min_new_tokens=tokens))
            choosing.append(chosen)
        del runs[0], choosing[0]
        decode = [(run.new_tokens - 1) / (run.total_seconds - run.first_token_seconds) for run in runs]
        _reset_peak(chat.model.device)
        seconds, questions = 0.0, 0
        for batch in self._full:
            inputs, chosen = self._inputs(setting, batch)
            own = placed(chat, inputs)
            started = time.perf_counter()
            if pruner is None:
                generate(chat, own, self._max_new_tokens)
            else:
                with prune(chat.model, setting.pruner(batch.number)):
                    generate(chat, own, self._max_new_tokens)
            seconds += chosen + time.perf_counter() - started
            questions += len(batch.samples)
        return {
            "first_token_seconds": quartiles([c + run.first_token_seconds for c, run in zip(choosing, runs)]),
            "decode_tokens_per_second": quartiles(decode),
            "selection_seconds": quartiles(
                [c + (run.report.selection_seconds if run.report else 0.0) for c, run in zip(choosing, runs)]
            ),
            "questions_per_second": questions / seconds,
            "peak_memory_bytes": _peak(chat.model.device),
            "timed_questions": len(runs),
            "timed_batch": max(len(batch.samples) for batch in self._full),
        }

    def _inputs(self, setting: Setting, batch: Batch) -> tuple[BatchFeature, float]:
        """Inputs of a batch, and the seconds that choosing frames took; making inputs of these is timed for nobody."""
        if setting.selector is None:
            return batch.inputs, 0.0
        if self._choice is None or self._choice.setting != setting:
            self._choice = FrameChoice(setting, self._chat.model.device, self._choice)
        choice, seconds = self._choice, 0.0

        def timed(clip: Clip, question: str) -> Clip:
            nonlocal seconds
            started = time.perf_counter()
            chosen = choice(clip, question)
            seconds += time.perf_counter() - started
            return chosen

        inputs = self._batches.make(batch.samples, batch.number, timed).inputs
        return inputs, seconds


def spread(places: Sequence[int], count: int) -> list[int]:
    """`count` of `places`, evenly spaced."""
    count = min(count, len(places))
    return [places[i * len(places) // count] for i in range(count)]


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median, first and third quartile."""
    if len(values) < 2:
        return {"median": values[0], "q1": values[0], "q3": values[0]}
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # sets Linux's high-water mark back to what is resident now


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)

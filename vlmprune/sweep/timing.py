"""What a setting costs in time and memory, measured apart from accuracy: nothing is shared with other settings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from vlmprune.ask import Answer, Chat, answer
from vlmprune.session import prune
from vlmprune.sweep.batches import Batches
from vlmprune.sweep.config import TimingConfig
from vlmprune.sweep.evaluate import generate, placed
from vlmprune.sweep.plan import UNPRUNED, Setting


class Stopwatch:
    """Times settings of one model on the same questions. The unpruned model runs without a session.

    Args:
        config: how many questions one at a time, how many new tokens each, how many full batches.
    """

    def __init__(self, chat: Chat, batches: Batches, config: TimingConfig, max_new_tokens: int) -> None:
        self._chat, self._config, self._max_new_tokens = chat, config, max_new_tokens
        places = sorted(place for group in batches.groups for place in group)
        alone = [batches.make([place]) for place in spread(places, config.questions)]
        self._alone = [batch.inputs for batch in alone if batch.samples]
        full = [batches[number] for number in spread(range(len(batches)), config.batches)]
        self._full = [(batch.number, batch.inputs, len(batch.samples)) for batch in full if batch.samples]

    def __call__(self, setting: Setting) -> dict[str, Any]:
        """Seconds to the first token and decode speed at batch 1, questions a second and peak memory at full batches.

        Medians with quartiles over the questions, after one that does not count. Decoding is timed over a fixed number
        of new tokens, the end of the reply ignored. Peak memory is the GPU's allocations, or the resident memory of the
        process on a CPU (None where the system does not tell), model included.
        """
        chat, tokens = self._chat, self._config.new_tokens
        pruner = None if setting.method == UNPRUNED else setting.pruner()
        runs: list[Answer] = []
        for inputs in (self._alone[0], *self._alone):
            own = placed(chat, inputs)
            runs.append(answer(chat, own, pruner, max_new_tokens=tokens, min_new_tokens=tokens))
        del runs[0]
        decode = [(run.new_tokens - 1) / (run.total_seconds - run.first_token_seconds) for run in runs]
        _reset_peak(chat.model.device)
        seconds, questions = 0.0, 0
        for number, inputs, rows in self._full:
            own = placed(chat, inputs)
            started = time.perf_counter()
            if pruner is None:
                generate(chat, own, self._max_new_tokens)
            else:
                with prune(chat.model, setting.pruner(number)):
                    generate(chat, own, self._max_new_tokens)
            seconds += time.perf_counter() - started
            questions += rows
        return {
            "first_token_seconds": quartiles([run.first_token_seconds for run in runs]),
            "decode_tokens_per_second": quartiles(decode),
            "selection_seconds": quartiles([run.report.selection_seconds if run.report else 0.0 for run in runs]),
            "questions_per_second": questions / seconds,
            "peak_memory_bytes": _peak(chat.model.device),
            "timed_questions": len(runs),
            "timed_batch": max(rows for _, _, rows in self._full),
        }


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

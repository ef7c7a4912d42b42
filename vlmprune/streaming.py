"""A video that goes on: frames come one by one, a bounded number of visual tokens stays, questions are asked any time.

What a stream holds is a prompt without its end: the text before the video, and of the video what is left of it, as keys
and values, with the position, the features and the frame of every token beside them. A question runs behind a copy of
that, so the stream goes on as if nobody had asked. Nothing stays attached to the model between two calls.
"""

from __future__ import annotations

import functools
import inspect
import math
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from vlmprune.adapters import Adapter, adapter_for
from vlmprune.ask import prompt_inputs, quiet
from vlmprune.cache import CACHE_ARGUMENT
from vlmprune.contract import Geometry, Pruner, VisualTokens
from vlmprune.flops import format_bytes
from vlmprune.plan import ascending
from vlmprune.pruners import PerFrame
from vlmprune.session import Session, as_pruner
from vlmprune.video import Clip

Frame: TypeAlias = "Image.Image | np.ndarray | Tensor"

_BLANK = 64  # side of the blank frames that show how a processor writes its text


def stream(
    model: nn.Module,
    processor: Any,
    pruner: Pruner | str = "divprune",
    *,
    budget: int = 512,
    evict: Pruner | str = "oldest",
    fps: float = 1.0,
    horizon: int | None = None,
    **settings: Any,
) -> Stream:
    """Watch a video that grows, with bounded memory, and ask about it at any time.

    ```python
    with vlmprune.stream(model, processor, "divprune", keep=0.25, budget=512) as watching:
        for frame in camera:
            watching.add(frame)
            if asked:
                print(watching.ask("What happens?", max_new_tokens=32))
    ```

    The prompt. Text before the video comes first and stays, then the tokens of the frames in order of time, then, only
    while a question is answered, the question: the chat template says what stands where. Families with a video mode
    (Qwen-VL, LLaVA-OneVision, LLaVA-NeXT-Video) are shown a video, the others as many images. Text that belongs to a
    frame (a time stamp, a line break between images) leaves with the last of the frame's tokens.

    Adding. A frame (where a temporal patch takes several, that many together) is encoded, `pruner` chooses which of its
    tokens enter, and they pass the language model behind what is held. Then, if more than `budget` visual tokens are
    held, some leave, and later frames and questions no longer see them. The newest frame keeps its tokens.

    Positions. A token stays where it was when it entered, and time goes on at its own pace: a gap where others left
    stays a gap, as in `positions="original"`; with `positions="compact"`, where the family allows it, what the pruner
    drops takes no position. Before positions would pass `horizon`, gaps that nothing is left of are closed up: all
    held keys are rotated to their new positions, order is kept, and M-RoPE families keep rows and columns within a
    frame and the order of frames in time. So positions are bounded however long the stream. Up to the rounding of the
    number format, answers are those of the unpruned model over all tokens that ever entered, in which those that left
    are hidden from every later query.

    Args:
        model: a loaded model of a supported family.
        processor: its processor.
        pruner: the pruner, or the name of one, that works at the boundary and does not listen to the question, as
            nobody has asked yet.
        budget: visual tokens held at most between two calls; while a frame enters, its own come on top.
        evict: who leaves. "oldest": whole frames, the oldest first. A pruner, or the name of one, that works on
            features alone, such as "divprune": it chooses anew among all that is held of earlier frames, so that some
            of the distant past may stay.
        fps: frames a second, for frames that come without a time.
        horizon: positions that the video may use; by default three quarters of the model's `max_position_embeddings`,
            which leaves the rest to question and answer.
        settings: hyper-parameters of the pruner, as in `prune()`.

    Raises:
        ValueError: a model, a pruner or an argument that cannot be served; one sentence each.
    """
    return Stream(model, processor, as_pruner(pruner, **settings), budget, evict, fps, horizon)


@dataclass(frozen=True)
class StreamReport:
    """Where a stream stands.

    Attributes:
        frames: frames added.
        seconds: time of the newest.
        pending: of these, frames that wait for the rest of their temporal patch.
        entered: visual tokens that entered so far.
        evicted: of these, visual tokens that left again.
        layer_tokens: visual tokens that each decoder layer holds.
        text_tokens: text tokens held.
        times: float64 [N], seconds of the frame that each held visual token came from, ascending.
        cells: int64 [N], which of its frame's tokens it is; `geometry` tells where that one sits.
        geometry: of one frame; None before the first.
        position: the largest position in use, -1 before the first frame.
        closed_up: how often gaps between positions were closed.
        kv_bytes: bytes of keys and values.
        feature_bytes: bytes of the features that eviction chooses by.
        other_bytes: bytes of positions, times, waiting frames and the like.
    """

    frames: int
    seconds: float
    pending: int
    entered: int
    evicted: int
    layer_tokens: list[int]
    text_tokens: int
    times: Tensor
    cells: Tensor
    geometry: Geometry | None
    position: int
    closed_up: int
    kv_bytes: int
    feature_bytes: int
    other_bytes: int

    @property
    def tokens(self) -> int:
        """Visual tokens held."""
        return len(self.times)

    @property
    def bytes(self) -> int:
        """All tensor bytes that the stream holds."""
        return self.kv_bytes + self.feature_bytes + self.other_bytes

    def __str__(self) -> str:
        moments = len(self.times.unique())
        return (
            f"{self.frames} frame{'s' * (self.frames != 1)}, {self.seconds:.1f} s: "
            f"holds {self.tokens} of {self.entered} visual tokens, "
            f"from {moments} moment{'s' * (moments != 1)}, KV cache {format_bytes(self.kv_bytes)}"
        )


class _NothingEnters(Exception):
    """A frame of which the pruner kept nothing, and that brings no text."""


def _no_ids() -> Tensor:
    return torch.empty(0, dtype=torch.int64, device="cpu")


@dataclass(frozen=True)
class _Held:
    """All that a stream holds at one moment, a column for each token. Never changed, only replaced.

    Attributes:
        keys, values: of each layer, [1, G, H, d].
        features: [H, D], what entered the language model; [H, 0] where nobody chooses by it.
        positions: int64 [C, H]; this and all that follows is on the CPU.
        ids: int64 [H], token ids.
        piece: int64 [H], ascending: number of the frame (or temporal patch) that it belongs to; -1 for the text before.
        cell: int64 [H], which of its frame's visual tokens it is; -1 for text.
        seconds: float64 [H], time of its frame.
        behind: [E, D], rows that a family puts once behind a whole video, such as a line break.
        geometry: of a frame.
        following: the next position for text.
        origin: where a video starts that moves on in time alone.
        clock: of such a video, a tick and its place in time, as a position from `origin` on.
        pieces, entered, evicted, closed_up: counts.
    """

    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()
    features: Tensor = field(default_factory=lambda: torch.empty(0, 0, device="cpu"))
    positions: Tensor = field(default_factory=lambda: torch.empty(1, 0, dtype=torch.int64, device="cpu"))
    ids: Tensor = field(default_factory=_no_ids)
    piece: Tensor = field(default_factory=_no_ids)
    cell: Tensor = field(default_factory=_no_ids)
    seconds: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64, device="cpu"))
    behind: Tensor | None = None
    geometry: Geometry | None = None
    following: int = 0
    origin: int = 0
    clock: tuple[float, int] = (0.0, 0)
    pieces: int = 0
    entered: int = 0
    evicted: int = 0
    closed_up: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    def cache(self) -> DynamicCache:
        """A cache that starts with what is held and leaves it as it is: appending makes new tensors."""
        cache = DynamicCache()
        for keys, values in zip(self.keys, self.values):
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        return cache

    def take(self, index: Tensor) -> _Held:
        """The columns `index` (int64, ascending, on the CPU)."""
        on = functools.cache(index.to)
        return replace(
            self,
            keys=tuple(each.index_select(2, on(each.device)) for each in self.keys),
            values=tuple(each.index_select(2, on(each.device)) for each in self.values),
            features=self.features[on(self.features.device)],
            positions=self.positions[:, index],
            ids=self.ids[index],
            piece=self.piece[index],
            cell=self.cell[index],
            seconds=self.seconds[index],
        )


@dataclass(frozen=True)
class _Now:
    """A stream's whole state, so that one assignment moves it on. Times count from `start`, that of the first frame."""

    held: _Held
    pending: tuple[np.ndarray, ...] = ()
    times: tuple[float, ...] = ()
    frames: int = 0
    start: float = 0.0
    seconds: float = 0.0
    size: tuple[int, ...] = ()


class Stream:
    """One growing video; made by `vlmprune.stream`. Use it as a context manager or call `close()`.

    A call that fails, or is interrupted, leaves the stream as it was before. Calls from several threads take turns.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        pruner: Pruner,
        budget: int,
        evict: Pruner | str,
        fps: float,
        horizon: int | None,
    ) -> None:
        self.model: Any = model
        self.pruner, self.budget = pruner, budget
        self._adapter = adapter = adapter_for(model)
        if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
            raise ValueError(f"budget is the number of visual tokens held, an int of at least 1, got {budget!r}.")
        if not (isinstance(fps, (int, float)) and math.isfinite(fps) and fps > 0):
            raise ValueError(f"fps must be a number above zero, got {fps!r}.")
        if horizon is not None and (isinstance(horizon, bool) or not isinstance(horizon, int) or horizon < 1):
            raise ValueError(f"horizon is a number of positions, an int of at least 1, got {horizon!r}.")
        _check_model(adapter)
        _check_pruner(adapter, pruner)
        with Session(model, pruner) as session:  # what it lacks is said now
            self._compact = session.pruner.positions == "compact"
        self._chooser = None if evict == "oldest" else _chooser(adapter, as_pruner(evict))
        self._fps = float(fps)
        self._script = _Script(adapter, processor, self._fps)
        # What stands once behind a whole video is no frame's: a frame's pruner must not choose it.
        self._entry = PerFrame(pruner) if self._script.extra else pruner
        self._clocked = adapter.clocked and self._script.kind == "video"
        most = getattr(adapter.text_config, "max_position_embeddings", None)
        self._horizon = horizon if horizon is not None or most is None else 3 * most // 4
        self._lock = threading.RLock()
        self._now: _Now | None = _Now(_Held())

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._now is None else str(self.report)
        return f"Stream({type(self.model).__name__}, {self.pruner}, budget={self.budget}: {state})"

    def close(self) -> None:
        """Let go of everything held. Calling it again does nothing."""
        self._now = None

    def _open(self) -> _Now:
        if self._now is None:
            raise ValueError("this stream is closed: open a new one with vlmprune.stream().")
        return self._now

    @torch.no_grad()
    def add(self, frame: Frame, seconds: float | None = None) -> None:
        """Show the next frame.

        Args:
            frame: a picture, or uint8 [H, W, 3], RGB, as an array or a tensor; a tensor may also be [3, H, W].
            seconds: when it was taken, on any clock that does not go back; by default 1 / fps after the one before.

        Raises:
            ValueError: a frame of another size than the first or of another dtype, a time before the last one, a frame
                that keeps more tokens than the budget or none, a closed stream, or a session open on the same model.
        """
        with self._lock:
            now = self._open()
            picture = _picture(frame)
            if now.size and picture.shape != now.size:
                raise ValueError(
                    f"this frame has {picture.shape[1]} x {picture.shape[0]} pixels, those before had {now.size[1]} x "
                    f"{now.size[0]}: scale it, or open a new stream."
                )
            if seconds is None:
                seconds = now.start + now.seconds + 1 / self._fps if now.frames else 0.0
            elif not math.isfinite(seconds):
                raise ValueError(f"seconds must be a finite number, got {seconds!r}.")
            start = now.start if now.frames else float(seconds)
            time = float(seconds) - start
            if time < now.seconds:
                raise ValueError(f"this frame is of {seconds} s, the one before of {start + now.seconds} s: sort them.")
            held, pending, times = now.held, (*now.pending, picture), (*now.times, time)
            if len(pending) == self._script.frames:
                held, pending, times = self._enter(held, pending, times), (), ()
            self._now = _Now(held, pending, times, now.frames + 1, start, time, picture.shape)

    def ask(self, question: str, max_new_tokens: int = 64, **options: Any) -> str:
        """Answer a question about what is held. The stream stays as it was, and later knows nothing of it.

        A frame that still waits for the rest of its temporal patch is seen too, repeated in place of what is missing.

        Args:
            options: further arguments of `generate()`; greedy unless they say otherwise.

        Raises:
            ValueError: no frame yet, a question that is empty or holds a placeholder, or a closed stream.
        """
        options = {"do_sample": False, **options, "return_dict_in_generate": False}
        with quiet():
            ids, length = self._generate(question, {"max_new_tokens": max_new_tokens, **options})
        return self._script.tokenizer.decode(ids[0, length:], skip_special_tokens=True).strip()

    def generate(self, question: str, **options: Any) -> Any:
        """What `ask` does, with the options and the output of the model's own `generate()`.

        Its sequences begin with the ids of what is held and of the question.
        """
        return self._generate(question, options)[0]

    @torch.no_grad()
    def _generate(self, question: str, options: dict[str, Any]) -> tuple[Any, int]:
        """The output of `generate()`, and how many ids its sequences begin with."""
        with self._lock:
            now = self._open()
            if not now.frames:
                raise ValueError("nothing has been seen yet: add() a frame before the first question.")
            tail = self._script.tail(question)
            held = self._enter(now.held, now.pending, now.times) if now.pending else now.held
            assert held.behind is not None
            extra, cache = len(held.behind), held.cache()
            ids = torch.cat([held.ids, torch.full((extra,), self._script.token, device="cpu"), tail])
            new = torch.arange(held.following, held.following + len(ids) - len(held), device="cpu")
            positions = torch.cat([held.positions, new.expand(len(held.positions), -1)], dim=1)
            inputs: dict[str, Any] = {"input_ids": ids[None], "position_ids": _wide(positions)}
            inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
            inputs |= {"attention_mask": torch.ones_like(inputs["input_ids"]), CACHE_ARGUMENT: cache}
            if extra:
                where = slice(len(held), len(held) + extra)
                self._adapter.language_model(
                    inputs_embeds=held.behind[None],
                    attention_mask=inputs["attention_mask"][:, : where.stop],
                    position_ids=inputs["position_ids"][..., where],
                    use_cache=True,
                    **{CACHE_ARGUMENT: cache},
                )
            defaults: Any = getattr(self.model, "generation_config", None)
            names = ("num_beams", "num_return_sequences")
            copies = max(options.get(name) or getattr(defaults, name, None) or 1 for name in names)
            if copies > 1:  # generate() repeats all but the cache
                cache.batch_repeat_interleave(copies)
            return self.model.generate(**inputs, **options), len(ids)

    @property
    def report(self) -> StreamReport:
        """Where the stream stands.

        Raises:
            ValueError: a closed stream.
        """
        now = self._open()
        held, visual = now.held, now.held.cell >= 0
        text = int((~visual).sum())
        behind = [] if held.behind is None else [held.behind]
        other = _bytes(held.positions, held.ids, held.piece, held.cell, held.seconds, *behind)
        return StreamReport(
            frames=now.frames,
            seconds=now.start + now.seconds,
            pending=len(now.pending),
            entered=held.entered,
            evicted=held.evicted,
            layer_tokens=[keys.shape[2] - text for keys in held.keys],
            text_tokens=text,
            times=now.start + held.seconds[visual],
            cells=held.cell[visual],
            geometry=held.geometry,
            position=max(int(held.positions.max()), held.following - 1) if len(held) else -1,
            closed_up=held.closed_up,
            kv_bytes=_bytes(*held.keys, *held.values),
            feature_bytes=_bytes(held.features),
            other_bytes=other + sum(frame.nbytes for frame in now.pending),
        )

    def _enter(self, held: _Held, frames: Sequence[np.ndarray], times: Sequence[float]) -> _Held:
        """Encode a temporal patch, prune it, append what is left, and let go of what is over the budget."""
        ids, before, call = self._script.piece(frames, times, not len(held), self.model)
        steps = self._adapter.stream_positions(call)
        count = len(ids) - before - self._script.extra
        if not held.pieces:
            self._check_room(before, steps, count)
        held, positions, following = self._place(held, before, steps, times[0])
        cache: Any = held.cache()
        seen, entering = len(held), []

        def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            entering.append((kwargs["inputs_embeds"], kwargs["position_ids"]))
            if not kwargs["inputs_embeds"].shape[1]:
                raise _NothingEnters

        with ExitStack() as stack:
            language_model = self._adapter.language_model
            for session in (False, True):  # in front of the session's own hook, and behind it
                if session:
                    report = stack.enter_context(Session(self.model, self._entry))
                hook = language_model.register_forward_pre_hook(note, with_kwargs=True)
                stack.callback(hook.remove)
            with suppress(_NothingEnters):
                self._adapter.core(
                    **call,
                    attention_mask=torch.ones(1, seen + len(ids), dtype=torch.int64, device=self.model.device),
                    position_ids=_wide(positions).to(self.model.device),
                    use_cache=True,
                    **{CACHE_ARGUMENT: cache},
                )
            last = report.last
        (whole, _), (rows, where) = entering
        assert last is not None
        columns = torch.arange(len(ids), device="cpu") if last.columns is None else last.columns[0].cpu()
        columns = columns[columns < before + count]  # what stands behind the whole video is put there with a question
        cell = (columns - before).clamp(min=-1)
        new = int((cell >= 0).sum())
        if new > self.budget:
            raise ValueError(
                f"a frame keeps {new} of its {count} visual tokens, more than the budget of {self.budget}: raise "
                "budget, or lower keep."
            )
        behind, geometry = whole[0, before + count :].clone(), last.items[0].geometry
        if not len(columns):
            return replace(held, behind=behind, geometry=geometry, pieces=held.pieces + 1)
        stop = seen + len(columns)
        piece = torch.full_like(cell, held.pieces)
        if not seen:
            piece[cell < 0] = -1
        rows = rows[0, : len(columns), : None if self._chooser else 0]
        where = (where if where.ndim == 2 else where[:, 0])[:, : len(columns)].cpu()
        held = replace(
            held,
            keys=tuple(layer.keys[:, :, :stop] for layer in cache.layers),
            values=tuple(layer.values[:, :, :stop] for layer in cache.layers),
            features=torch.cat([held.features.to(rows), rows]) if seen else rows,
            positions=torch.cat([held.positions, where], dim=1) if seen else where,
            ids=torch.cat([held.ids, ids[columns]]),
            piece=torch.cat([held.piece, piece]),
            cell=torch.cat([held.cell, cell]),
            seconds=torch.cat([held.seconds, torch.full(cell.shape, times[0], dtype=torch.float64, device="cpu")]),
            behind=behind,
            geometry=geometry,
            following=held.following + len(columns) if self._compact else following,
            pieces=held.pieces + 1,
            entered=held.entered + new,
        )
        return self._within_budget(held)

    def _check_room(self, before: int, steps: Tensor, count: int) -> None:
        """Raise ValueError where nothing would enter, or the budget, however it spreads, not fit below the horizon."""
        if list(self.pruner.budget([count], 0, len(self._adapter.decoder_layers))) == [0]:
            raise ValueError(f"keep={self.pruner.keep} of a frame's {count} visual tokens rounds to 0: raise keep.")
        between = self._script.between_length
        if self._clocked:
            need = before + max(self.budget + 1, int(steps[0, -1]) - before)
        elif len(steps) == 1:
            need = int(steps[0, -1]) + self.budget * (1 + between) + between
        else:
            need = before + (self.budget + 1) * (int(steps[0, -1]) - before + between)
        if self._horizon is not None and need > self._horizon:
            raise ValueError(
                f"a budget of {self.budget} tokens may spread over {need} positions, and the video has "
                f"{self._horizon}: lower budget, or raise horizon."
            )

    def _place(self, held: _Held, before: int, steps: Tensor, seconds: float) -> tuple[_Held, Tensor, int]:
        """The stream with room for them, positions [C, N] of N new columns, and the next one for text behind them."""
        end = math.inf if self._horizon is None else self._horizon
        if not self._clocked:
            if len(held) and held.following + int(steps[0, -1]) > end:
                held = self._closed(held)
            return held, held.following + steps[:, :-1], held.following + int(steps[0, -1]) - self._script.extra
        rate = self._adapter.stream_rate()
        tick = float(held.pieces) if rate is None else rate * seconds
        if not len(held):
            held = replace(held, origin=int(steps[0, before]), clock=(tick, 0))
            return held, steps[:, :-1], int(steps[0, -1])

        def now(held: _Held) -> int:
            # The margin is for times such as 0.1 + 0.2, which must not fall below a whole position.
            return held.origin + held.clock[1] + int(tick - held.clock[0] + 1e-4)

        if now(held) >= end:
            held = self._closed(held)
            if now(held) >= end:  # a pause longer than the horizon is shortened
                over = now(held) - int(end) + 1
                held = replace(held, clock=(held.clock[0], held.clock[1] - over))
        positions = held.origin + steps[:, :-1]
        positions[0] += now(held) - held.origin
        return held, positions, held.following

    def _closed(self, held: _Held) -> _Held:
        """The same tokens without the positions that none of them uses any more."""
        rows = 1 if self._clocked else len(held.positions)
        moving = held.positions[:rows]
        # Where a frame's tokens share no row or column of positions, they close up too; elsewhere it moves as a whole.
        groups = moving[0] if rows == 1 else held.piece
        _, number = groups.unique_consecutive(return_inverse=True)
        bounds = moving.new_zeros(int(number[-1]) + 1)
        first = bounds.scatter_reduce(0, number, moving.amin(0), "amin", include_self=False)
        last = bounds.scatter_reduce(0, number, moving.amax(0), "amax", include_self=False)
        extent = last - first + 1
        shift = (first - extent.cumsum(0) + extent)[number]
        by = torch.zeros_like(held.positions)
        by[:rows] -= shift
        positions = held.positions + by
        turn = [
            self._adapter.turned(layer, keys, _wide(by).to(keys.device))
            for layer, keys in zip(self._adapter.decoder_layers, held.keys)
        ]
        following, clock = held.following, held.clock
        if self._clocked:
            clock = (clock[0], clock[1] - int(shift[-1]))
        else:
            following = int(positions.max()) + 1
        return replace(
            held,
            keys=tuple(turn),
            positions=positions,
            following=following,
            clock=clock,
            closed_up=held.closed_up + 1,
        )

    def _within_budget(self, held: _Held) -> _Held:
        """What stays: text before the video, the newest frame, and of the others what the policy leaves."""
        visual = held.cell >= 0
        stay = held.piece < 0
        stay |= held.piece == held.pieces - 1
        old = (visual & ~stay).nonzero().flatten()
        over = int(visual.sum()) - self.budget
        if over > 0 and self._chooser is None:
            counts = held.piece[old].unique_consecutive(return_counts=True)[1].cumsum(0)
            old = old[int(counts[counts >= over][0]) :]
        elif over > 0:
            old = old[self._choose(held, old, len(old) - over)]
        stay[old] = True
        stay |= ~visual & torch.isin(held.piece, held.piece[old])  # a frame's text leaves with its last token
        if bool(stay.all()):
            return held
        lost = int((visual & ~stay).sum())
        return replace(held.take(stay.nonzero().flatten()), evicted=held.evicted + lost)

    def _choose(self, held: _Held, old: Tensor, count: int) -> Tensor:
        """Which of the columns `old` stay: int64 [count], ascending."""
        if not count:
            return torch.empty(0, dtype=torch.int64, device="cpu")
        assert self._chooser is not None
        assert held.geometry is not None
        frame, planes = held.geometry.take(held.cell[old]), len(held.geometry.grids)
        pieces, number = held.piece[old].unique_consecutive(return_inverse=True)
        rows = held.features[old.to(held.features.device)]
        tokens = VisualTokens(
            features=rows[None],
            counts=(len(old),),
            index=(torch.arange(len(old), device=rows.device),),
            shapes=(
                Geometry(
                    number * planes + frame.plane, frame.row, frame.col, held.geometry.grids * len(pieces), "video"
                ),
            ),
            depth=len(self._adapter.decoder_layers),
            signal=_no_signal,
        )
        chosen = replace(self._chooser, keep=count).select(tokens, torch.tensor([count], device="cpu"))
        return ascending(chosen, (len(old),), [count])[0].index.cpu()


class _Script:
    """How a processor writes a video that grows: what stands before, between and behind its frames.

    Attributes:
        kind: "video", or "image" where the family takes frames as images only.
        token: id of its placeholder.
        frames: that go into one temporal patch.
        extra: placeholders that stand once behind a whole video.
        between_length: tokens of text between two frames.
    """

    def __init__(self, adapter: Adapter, processor: Any, fps: float) -> None:
        self._processor, self._fps = processor, fps
        if getattr(processor, "tokenizer", None) is None:
            raise ValueError(f"processor must be the model's processor, got {type(processor).__name__}.")
        self.tokenizer = processor.tokenizer
        tool = getattr(processor, "video_processor", None)
        self.kind = "video" if "video" in adapter.modalities and tool is not None else "image"
        self.token = int(getattr(adapter.config, f"{self.kind}_token_id"))
        self.frames = getattr(tool, "temporal_patch_size", None) or 1 if self.kind == "video" else 1
        self._accepted = set(inspect.signature(adapter.core.forward).parameters) - {
            *("input_ids", "attention_mask", "position_ids", "mm_token_type_ids", "second_per_grid_ts"),
        }
        one, two = self._blank(1), self._blank(2)
        if len(one[1]) != 1 or not 1 <= len(two[1]) <= 2:
            raise ValueError(
                f"this {type(processor).__name__} does not write one run of placeholders a frame: give the model's own."
            )
        (run,), self.extra = one[1], 0
        if len(two[1]) == 1:
            self.extra = 2 * (run[1] - run[0]) - (two[1][0][1] - two[1][0][0])
        self._between = two[0][two[1][0][1] : two[1][-1][0]] if len(two[1]) == 2 else two[0][:0]
        self.between_length = len(self._between)

    def piece(
        self, frames: Sequence[np.ndarray], times: Sequence[float], first: bool, model: Any
    ) -> tuple[Tensor, int, dict[str, Any]]:
        """Ids [N] of a temporal patch with the text before it, how much of that is text, and arguments of the model."""
        inputs = self._prompt("?", frames, times)
        ids, ((start, stop),) = self._runs(inputs)
        before = ids[:start] if first else self._between
        if not first and len(before) and self.kind == "video":  # a time stamp
            text, runs = self._blank(2, times)
            before = text[runs[0][1] : runs[1][0]]
        ids = torch.cat([before, ids[start:stop]])
        inputs = inputs.to(model.device, model.dtype)
        call = {name: value for name, value in inputs.items() if name in self._accepted}
        return ids, len(before), {**call, "input_ids": ids[None].to(model.device)}

    def tail(self, question: str) -> Tensor:
        """Ids of what stands behind a video when a question is asked."""
        ids, runs = self._blank(1, question=question)
        return ids[runs[-1][1] :]

    def _blank(
        self, pieces: int, times: Sequence[float] = (), question: str = "?"
    ) -> tuple[Tensor, list[tuple[int, int]]]:
        """Ids and runs of a prompt of blank frames, the last of which are at `times`."""
        frames = pieces * self.frames
        # A patch that is filled up has fewer times than frames: so has the processor's own last one.
        early = [0.0] * (frames - self.frames) if times else [0.0] * frames
        blank = [np.zeros((_BLANK, _BLANK, 3), np.uint8)] * (len(early) + len(times))
        return self._runs(self._prompt(question, blank, [*early, *times]))

    def _prompt(self, question: str, frames: Sequence[np.ndarray], times: Sequence[float]) -> Any:
        if self.kind == "image":
            return prompt_inputs(self._processor, question, [Image.fromarray(frame) for frame in frames])
        at = np.asarray(times, dtype=np.float64)
        number = np.rint(at * self._fps).astype(np.int64)
        clip = Clip(np.stack(frames), at, number, self._fps, float(at[-1]) + 1 / self._fps, int(number[-1]) + 1)
        return prompt_inputs(self._processor, question, clips=[clip])

    def _runs(self, inputs: Any) -> tuple[Tensor, list[tuple[int, int]]]:
        """Ids of a prompt, and (start, stop) of every run of placeholders in it."""
        ids = inputs["input_ids"][0]
        columns = (ids == self.token).nonzero().flatten()
        runs = columns.tensor_split((columns.diff() > 1).nonzero().flatten() + 1) if len(columns) else ()
        return ids, [(int(run[0]), int(run[-1]) + 1) for run in runs]


def _check_model(adapter: Adapter) -> None:
    """Raise ValueError for a model that cannot be shown a stream."""
    config = adapter.text_config
    if adapter.model is adapter.core:
        raise ValueError(f"{type(adapter.model).__name__} has no head to answer with: load the model that has one.")
    types = getattr(config, "layer_types", None)
    if "sliding_attention" in (types or ()) or (types is None and getattr(config, "sliding_window", None)):
        raise ValueError("this language model has a sliding window, behind which nothing of a stream would be seen.")
    kind = getattr(adapter.language_model.rotary_emb, "rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise ValueError(f'RoPE of type "{kind}" changes with the length of the prompt, and a stream has none.')


def _check_pruner(adapter: Adapter, pruner: Pruner) -> None:
    """Raise ValueError for a method that cannot choose when a frame enters."""
    depth = len(adapter.decoder_layers)
    if pruner.query_aware:
        raise ValueError(
            f"{pruner.name} listens to the question, and frames enter before there is one: use a method that does not, "
            "such as divprune."
        )
    if tuple(pruner.layers(depth)) != (0,) or pruner.cache_layers(depth):
        raise ValueError(
            f"{pruner.name} acts inside the decoder, whose layers all hold the same of a stream: use a method that "
            "acts at the boundary, such as divprune."
        )
    if isinstance(pruner.keep, str):
        raise ValueError(f"a stream's keep is a ratio of a frame's tokens or a count of them, got {pruner.keep!r}.")


@torch.no_grad()
def _chooser(adapter: Adapter, pruner: Pruner) -> Pruner:
    """The pruner that chooses who leaves, tried on made-up tokens.

    Raises:
        ValueError: it cannot choose by features alone, or not as many as it is told to.
    """
    depth = len(adapter.decoder_layers)
    features = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0), device="cpu")
    # Two frames that have lost some of their tokens already.
    some = Geometry.grid(2, 3, planes=2, kind="video").take(torch.tensor([0, 1, 2, 4, 5, 8, 9, 11], device="cpu"))
    tokens = VisualTokens(features, (8,), (torch.arange(8, device="cpu"),), (some,), signal=_no_signal)
    try:
        if tuple(pruner.layers(depth)) != (0,) or pruner.cache_layers(depth) or pruner.encoder_layers(depth):
            raise ValueError("it acts elsewhere than at the boundary")
        three = replace(pruner, keep=3)
        if list(three.budget([8], 0, depth)) != [3]:
            raise ValueError("it does not keep as many as it is told to")
        chosen = three.select(tokens, torch.tensor([3], device="cpu"))
        ascending(chosen, (8,), [3])
        if chosen.features is not None:
            raise ValueError("it merges tokens, and what is in a KV cache cannot be merged")
    except ValueError as error:
        reason = str(error).rstrip(".")
        raise ValueError(
            f'evict="{pruner.name}" cannot choose who leaves: {reason}; take "divprune" or "oldest".'
        ) from None
    return pruner


def _no_signal(need: str) -> Any:
    """The signal of what is held: none, which methods that can do without are told."""
    if not need.endswith("?"):
        raise ValueError("it needs more than the features")


def _picture(frame: Any) -> np.ndarray:
    """A frame as uint8 [H, W, 3], a copy: cameras use their buffers again.

    Raises:
        ValueError: another type, dtype or shape.
    """
    if isinstance(frame, Image.Image):
        return np.array(frame.convert("RGB"))
    if isinstance(frame, Tensor):
        frame = frame.detach().cpu()
        frame = (frame.permute(1, 2, 0) if frame.ndim == 3 and frame.shape[0] == 3 != frame.shape[2] else frame).numpy()
    if not isinstance(frame, np.ndarray):
        raise ValueError(f"a frame is a PIL image, an array or a tensor, got {type(frame).__name__}.")
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or not frame.size:
        raise ValueError(f"a frame is RGB, uint8 [H, W, 3], got {frame.dtype} {list(frame.shape)}.")
    return np.array(frame, order="C")


def _wide(positions: Tensor) -> Tensor:
    """Positions [C, N] as models take them: [1, N], or [C, 1, N] for M-RoPE."""
    return positions if len(positions) == 1 else positions[:, None]


def _bytes(*tensors: Tensor) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)

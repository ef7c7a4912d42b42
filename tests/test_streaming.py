"""A stream says what the unpruned model says over all that ever entered, with what left hidden from then on."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import oracle
import pytest
import torch

pytest.importorskip("av")

from families import FAMILIES, SPECIAL
from PIL import Image
from test_laws import model_of, snapshot
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface
from videos import picture, processor

import vlmprune
from vlmprune import DivPrune, PerFrame
from vlmprune.ask import prompt_inputs
from vlmprune.streaming import Stream
from vlmprune.video import Clip

STEPS = 4
FPS = 4.0
SIZE = (16, 24)
VIDEO = ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe", "llava-onevision", "llava-next-video"]
EVERY = [*VIDEO, "llava-clip-llama", "internvl"]
QWEN = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe")
PATCH = dict.fromkeys(QWEN, 2)
GENERATE = {
    "max_new_tokens": STEPS,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
    "suppress_tokens": SPECIAL,
}


def frames(count: int, first: int = 0) -> list[np.ndarray]:
    return [picture(i, *SIZE) for i in range(first, first + count)]


def whole(family: str, pictures: list[np.ndarray], question: str = "what is it?") -> dict[str, Any]:
    """Inputs of one ordinary prompt with all these frames."""
    clip = Clip.of(pictures, FPS)
    if family in VIDEO:
        return dict(prompt_inputs(processor(family), question, clips=[clip]))
    return dict(prompt_inputs(processor(family), question, clip.images))


def watch(family: str, pruner: Any = "divprune", **settings: Any) -> Stream:
    settings = {"keep": 0.5, "budget": 200, "fps": FPS, **settings}
    return vlmprune.stream(model_of(FAMILIES[family]), processor(family), pruner, **settings)


def close(mine: Any, theirs: Any) -> None:
    for step, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0, msg=lambda m, s=step: f"step {s}: {m}")


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("count", [1, 5, 6])
def test_below_the_budget_it_is_an_ordinary_prompt(family: str, count: int) -> None:
    """Whatever comes between questions, and with a frame that waits for its partner."""
    with watch(family, "uniform", keep=1.0, budget=500) as watching:
        for frame in frames(count):
            watching.add(frame)
            watching.ask("and now?", max_new_tokens=2, suppress_tokens=SPECIAL)
        out = watching.generate("what is it?", **GENERATE)
        assert watching.report.pending == count % PATCH.get(family, 1)
        assert not watching.report.evicted
    plain = model_of(FAMILIES[family]).generate(**whole(family, frames(count)), **GENERATE)
    assert torch.equal(out.sequences, plain.sequences)
    close(out.logits, plain.logits)


# In OneVision, what stays of an ordinary prompt may or may not have the line break behind the last frame.
@pytest.mark.parametrize("family", [family for family in EVERY if family != "llava-onevision"])
def test_below_the_budget_it_is_an_ordinary_pruned_prompt(family: str) -> None:
    """Pruning frame by frame as they come is `PerFrame`, or, for images, what they get anyway."""
    model = model_of(FAMILIES[family])
    method = DivPrune(keep=0.5, positions="original")
    with watch(family, method) as watching:
        for frame in frames(6):
            watching.add(frame)
        out = watching.generate("what is it?", **GENERATE)
        held = watching.report.tokens
    with vlmprune.prune(model, PerFrame(method) if family in VIDEO else method) as session:
        plain = model.generate(**whole(family, frames(6)), **GENERATE)
    assert held == session.last.tokens_after
    close(out.logits, plain.logits)


class Diary:
    """Who was held when: columns of the ordinary prompt with all frames so far, found from reports alone."""

    def __init__(self, family: str) -> None:
        self.family, self.patch = family, PATCH.get(family, 1)
        self.pieces: list[set[int]] = []  # behind each piece, which (piece, cell) are held
        self.times: list[float] = []

    def note(self, report: vlmprune.StreamReport, seconds: float) -> None:
        self.times.append(seconds)
        number = {round(time, 6): piece for piece, time in enumerate(self.times)}
        pieces = [number[round(float(time), 6)] for time in report.times]
        self.pieces.append(set(zip(pieces, report.cells.tolist())))

    def places(self, inputs: dict[str, Any]) -> torch.Tensor:
        """int64 [pieces, cells]: column of every visual token."""
        config = model_of(FAMILIES[self.family]).config
        token = config.video_token_id if self.family in VIDEO else config.image_token_id
        visual = (inputs["input_ids"][0] == token).nonzero().flatten()
        count = len(visual) // len(self.pieces)  # OneVision has one line break more, at the end
        return visual[: count * len(self.pieces)].view(len(self.pieces), count)

    def columns(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """bool [1, S], columns that never entered; int64 [1, S], from which column on each is hidden."""
        ids, place = inputs["input_ids"], self.places(inputs)
        dropped = torch.zeros_like(ids, dtype=torch.bool)
        until = torch.full_like(ids, 10**6)
        for piece, row in enumerate(place.tolist()):
            for cell, column in enumerate(row):
                if (piece, cell) not in self.pieces[piece]:
                    dropped[0, column] = True
                for later in range(piece, len(self.pieces)):
                    if (piece, cell) not in self.pieces[later]:
                        until[0, column] = int(place[later, -1]) + 1
                        break
            if piece and place[piece - 1, -1] + 1 < row[0]:  # text between two frames leaves with the later one
                text = slice(int(place[piece - 1, -1]) + 1, row[0])
                until[0, text] = until[0, row].max()
        return dropped, until


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.parametrize("evict", ["oldest", "divprune"])
def test_oracle(family: str, evict: str) -> None:
    """At any time, answers equal the unpruned model's, where what left is masked for every later query."""
    model = model_of(FAMILIES[family])
    for policy in FAMILIES[family].positions:
        diary, patch = Diary(family), PATCH.get(family, 1)
        budget = 60 if family == "internvl" else 30 if family.startswith("llava-clip") else 8
        pruner = DivPrune(keep=0.5 if budget == 8 else 0.3, positions=policy)
        with watch(family, pruner, budget=budget, evict=evict) as watching:
            for number, frame in enumerate(frames(7 * patch), 1):
                watching.add(frame)
                if number % patch:
                    continue
                diary.note(watching.report, (number - patch) / FPS)
                assert watching.report.tokens <= budget
                if number not in (3 * patch, 7 * patch):
                    continue
                inputs = whole(family, frames(number))
                dropped, until = diary.columns(inputs)
                out = watching.generate("what is it?", **GENERATE)
                forced = out.sequences[:, -STEPS:]
                evicted = dict.fromkeys(range(len(model.model.language_model.layers)), until)
                _, scores = oracle.run(model, inputs, {0: dropped}, policy, STEPS - 1, forced, {}, evicted)
                close(out.logits, scores)
            report = watching.report
        assert report.evicted > 0
        assert report.entered - report.evicted == report.tokens
        assert report.layer_tokens == [report.tokens] * len(model.model.language_model.layers)


@dataclass
class Epochs:
    """The unpruned language model at full length, where positions of keys change between one query and the next.

    Attributes:
        start: columns at which an epoch begins.
        moved: of each, int64 [C, S]: how far each key has moved since it entered.
        visible: bool [S, S], which query sees which key.
    """

    start: list[int]
    moved: list[torch.Tensor]
    visible: torch.Tensor
    component: ClassVar[dict[str, list[int]]] = {
        "qwen2-vl": [0, 0, 1, 1, 2, 2],
        "qwen2.5-vl": [0, 0, 1, 1, 2, 2],
        "qwen3-vl": [0, 1, 2, 0, 1, 2],
    }

    def run(self, family: str, inputs: dict[str, Any], positions: torch.Tensor) -> torch.Tensor:
        """Logits [1, S, V] with the positions int64 [C, S] at which columns entered."""
        model = model_of(FAMILIES[family])
        language_model = model.model.language_model
        own = language_model.config._attn_implementation
        AttentionInterface.register("epochs", self.attention(self.component.get(family, [0] * 6)))
        AttentionMaskInterface.register("epochs", eager_mask)
        wide = positions if len(positions) == 1 else positions[:, None]
        hook = language_model.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "position_ids": wide}), with_kwargs=True
        )
        try:
            language_model.config._attn_implementation = "epochs"
            with torch.no_grad():
                return model(**inputs, use_cache=False).logits
        finally:
            language_model.config._attn_implementation = own
            hook.remove()
            AttentionInterface._global_mapping.pop("epochs")
            AttentionMaskInterface._global_mapping.pop("epochs")

    def attention(self, component: list[int]) -> Any:
        def forward(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **kwargs: Any) -> Any:
            half = key.shape[-1] // 2
            frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
            groups = query.shape[1] // key.shape[1]
            stops = [*self.start[1:], query.shape[2]]
            out = []
            for first, stop, moved in zip(self.start, stops, self.moved):
                turn = torch.polar(torch.ones(()), (moved[component[:half]].T * frequency).float())
                pairs = torch.complex(key[..., :half], key[..., half:]) * turn
                turned = torch.cat([pairs.real, pairs.imag], -1).repeat_interleave(groups, 1)
                scores = query[:, :, first:stop] @ turned.mT * scaling
                scores = scores.masked_fill(~self.visible[first:stop], -torch.inf)
                out.append(scores.softmax(-1) @ value.repeat_interleave(groups, 1))
            return torch.cat(out, 2).transpose(1, 2), None

        return forward


def places(held: Any) -> dict[tuple[int, int], torch.Tensor]:
    """(piece, cell), or (piece, -1), (piece, -2) ... for its text, -> positions [C] of what is held."""
    out: dict[tuple[int, int], torch.Tensor] = {}
    for piece, cell, position in zip(held.piece.tolist(), held.cell.tolist(), held.positions.T):
        while cell < 0 and (piece, cell) in out:
            cell -= 1
        out[piece, cell] = position
    return out


@pytest.mark.parametrize("family", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl", "llava-next-video", "llava-clip-llama"])
@pytest.mark.parametrize("evict", ["oldest", "divprune"])
def test_oracle_of_positions_that_close_up(family: str, evict: str, monkeypatch: Any) -> None:
    """Keys really stand where they are said to, through several closings, and order and frames stay as they were."""
    patch, count, pause = PATCH.get(family, 1), 24, 0.6
    budget, horizon = {"llava-clip-llama": (30, 100), "qwen3-vl": (8, 190)}.get(family, (8, 17))
    closings: list[tuple[int, dict[Any, torch.Tensor], dict[Any, torch.Tensor]]] = []
    plain = Stream._closed

    def noting(stream: Stream, held: Any) -> Any:
        after = plain(stream, held)
        closings.append((held.pieces, places(held), places(after)))
        return after

    monkeypatch.setattr(Stream, "_closed", noting)
    diary, entered = Diary(family), {}
    pruner = DivPrune(keep=0.3 if budget == 30 else 0.5, positions=FAMILIES[family].positions[-1])
    with watch(family, pruner, budget=budget, evict=evict, horizon=horizon, fps=1 / pause) as watching:
        for number, frame in enumerate(frames(count * patch), 1):
            watching.add(frame, (number - 1) * pause)
            if number % patch == 0:
                diary.note(watching.report, (number - patch) * pause)
                now = places(watching._now.held)
                entered |= {name: place for name, place in now.items() if name not in entered}
            assert watching.report.position < horizon
        assert watching.report.closed_up == len(closings) >= 2
        following = watching._now.held.following
        out = watching.generate("what is it?", **GENERATE)

    at = np.arange(count * patch)
    clip = Clip(np.stack(frames(count * patch)), at * pause, at, 1 / pause, len(at) * pause, len(at))
    inputs = dict(
        prompt_inputs(processor(family), "what is it?", *(([], [clip]) if family in VIDEO else (clip.images,)))
    )
    ids, length = inputs["input_ids"], inputs["input_ids"].shape[1] + STEPS
    dropped, until = diary.columns(inputs)
    visual = diary.places(inputs)
    names = {}
    for piece, row in enumerate(visual.tolist()):
        start = int(visual[piece - 1, -1]) + 1 if piece else 0
        names |= {column: (piece if piece else -1, -1 - n) for n, column in enumerate(range(start, row[0]))}
        names |= {column: (piece, cell) for cell, column in enumerate(row)}
    entry = torch.zeros(len(next(iter(entered.values()))), length, dtype=torch.int64)
    entry[:, len(names) :] = following + torch.arange(length - len(names))
    for column, name in names.items():
        entry[:, column] = entered.get(name, entry[:, column])
    moved = [torch.zeros_like(entry)]
    for _, before, after in closings:
        assert list(before) == list(after)
        if "qwen3" not in family:  # no gap is left; where frames have rows and columns of their own, none between them
            assert set(torch.stack(list(after.values()))[:, 0].unique().diff().tolist()) == {1}
        moved.append(torch.zeros_like(entry))
        for column, name in names.items():
            if name in after:
                moved[-1][:, column] = after[name] - entry[:, column]
                if len(entry) == 3:  # inside a frame nothing moves, and rows and columns never do in a clocked video
                    neighbour = next(each for each in after if each[0] == name[0])
                    step = after[name] - before[name]
                    assert torch.equal(step, after[neighbour] - before[neighbour])
                    assert "qwen3" in family or not step[1:].any()
    late = torch.nn.functional.pad(until[0], (0, STEPS), value=10**6)
    steps = torch.arange(length)
    visible = (steps <= steps[:, None]) & (steps[:, None] < late) & ~torch.nn.functional.pad(dropped[0], (0, STEPS))
    visible |= torch.eye(length, dtype=torch.bool)  # for rows that see nothing, and that nobody sees
    starts = [0, *(int(visual[pieces - 1, -1]) + 1 for pieces, _, _ in closings)]
    full = {**inputs, "input_ids": torch.cat([ids, out.sequences[:, -STEPS:]], 1)}
    full["attention_mask"] = torch.ones_like(full["input_ids"])
    if "mm_token_type_ids" in full:
        full["mm_token_type_ids"] = torch.nn.functional.pad(full["mm_token_type_ids"], (0, STEPS))
    logits = Epochs(starts, moved, visible).run(family, full, entry)
    close(out.logits, logits[:, ids.shape[1] - 1 : -1].unbind(1))


def test_the_distant_past_stays_only_where_a_pruner_chooses() -> None:
    """One frame that differs, then many alike: oldest-first forgets it, a choice by difference does not."""
    held = {}
    for evict in ("oldest", "divprune", DivPrune(), "uniform"):
        with watch("llava-next-video", "uniform", budget=6, evict=evict, keep=1.0) as watching:
            for number in range(12):
                watching.add(picture(200 if number < 1 else 3, *SIZE))
            times = watching.report.times
            assert len(times) == 6 if evict != "oldest" else 4
            assert (times == 11 / FPS).sum() == 4, "the newest frame stays whole"
            held[str(evict)] = bool((times == 0).any())
    assert held.pop("uniform") in (True, False)
    assert held.pop("oldest") is False
    assert set(held.values()) == {True}


@pytest.mark.parametrize("family", ["qwen2.5-vl", "llava-onevision", "llava-clip-llama"])
def test_memory_is_constant_over_a_thousand_frames(family: str) -> None:
    """Bytes held, live tensors and Python objects: as much behind frame 1 000 as behind frame 200."""
    single, patch = family.startswith("llava-clip"), PATCH.get(family, 1)
    settings = {"keep": 0.1 if single else 0.5, "budget": 10, "horizon": 90, "evict": "divprune"}
    rest, objects = set(), []
    with watch(family, **settings) as watching:
        for number in range(1, 1001):
            watching.add(picture(number % 251, *SIZE))
            if number % 200:
                continue
            watching.ask("what?", max_new_tokens=1, suppress_tokens=SPECIAL)
            gc.collect()
            live = [each.untyped_storage().nbytes() for each in gc.get_objects() if type(each) is torch.Tensor]
            objects.append(len(gc.get_objects()))
            report = watching.report
            rest.add((len(live), sum(live) - report.bytes))
            config, held = watching.model.config.get_text_config(), report.tokens + report.text_tokens
            width = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
            assert report.tokens == 10
            assert report.text_tokens <= 10 if single else report.text_tokens == (7 if patch == 2 else 0)
            assert report.kv_bytes == 2 * 4 * config.num_hidden_layers * held * width
            assert report.feature_bytes == 4 * held * config.hidden_size
            last = str(report)
            del report, live
        report = watching.report
        assert (report.frames, report.entered) == (1000, report.evicted + 10)
        assert report.entered == 1000 // patch * (2 if family != "qwen2.5-vl" else 3)
        assert report.closed_up > 0
        assert report.position < 90
    assert last.startswith("1000 frames")
    assert len(rest) == 1, rest
    assert objects[-1] - objects[0] < 100, objects


def test_ask_knows_a_frame_that_waits_as_if_it_came_twice() -> None:
    for evict in ("oldest", "divprune"):
        answers = []
        for again in (False, True):
            with watch("qwen2.5-vl", budget=8, evict=evict) as watching:
                for frame in frames(9):
                    watching.add(frame)
                if again:
                    watching.add(frames(9)[-1], 8 / FPS)
                report = watching.report
                answers.append(watching.generate("what is it?", **GENERATE).logits)
                assert str(watching.report) == str(report)
        close(*answers)


def test_frames_of_every_kind_are_the_same_and_are_copied() -> None:
    answers = []
    for kind in (np.asarray, Image.fromarray, torch.from_numpy, lambda x: torch.from_numpy(x).permute(2, 0, 1)):
        buffer = np.zeros((*SIZE, 3), np.uint8)
        with watch("qwen2.5-vl") as watching:
            for frame in frames(4):
                buffer[:] = frame
                watching.add(kind(buffer))
                buffer[:] = 0
            answers.append(watching.generate("what is it?", **GENERATE).logits)
    for other in answers[1:]:
        close(other, answers[0])


@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl"])
def test_time_counts_from_the_first_frame(family: str) -> None:
    """Wall-clock seconds do as well as seconds from zero, and an uneven pace moves positions unevenly."""
    times = [0.0, 0.5, 3.0, 3.5, 4.0, 9.5]
    answers = []
    for start in (0.0, 1.7e9):
        with watch(family, keep=1.0) as watching:
            for frame, seconds in zip(frames(6), times):
                watching.add(frame, start + seconds)
            answers.append(watching.generate("what is it?", **GENERATE).logits)
            assert watching.report.times.unique().tolist() == [start, start + 3, start + 4]
            held = watching._now.held
    close(*answers)
    if family == "qwen2.5-vl":
        rate = watching.model.config.vision_config.tokens_per_second
        where = held.positions[0, held.cell == 0]
        assert (where - where[0]).tolist() == [0, 3 * rate, 4 * rate]


def test_a_pause_longer_than_the_horizon_is_shortened() -> None:
    with watch("qwen2.5-vl", budget=8, horizon=26) as watching:
        for number, frame in enumerate(frames(12)):
            watching.add(frame, number * 0.25 + (number > 5) * 1e7)
        assert watching.report.position < 26
        held = watching._now.held
        time = held.positions[0, held.piece >= 0]
        assert bool((time[1:] >= time[:-1]).all())
        assert watching.ask("what?", suppress_tokens=SPECIAL, max_new_tokens=1)


@pytest.mark.parametrize("family", ["llava-onevision", "llava-clip-llama", "qwen2.5-vl"])
def test_beams_and_samples_are_those_of_an_ordinary_prompt(family: str) -> None:
    options = {**GENERATE, "num_beams": 3, "num_return_sequences": 2}
    with watch(family, "uniform", keep=1.0) as watching:
        for frame in frames(4):
            watching.add(frame)
        mine = watching.generate("what is it?", **options)
        torch.manual_seed(3)
        watching.generate("what?", max_new_tokens=3, do_sample=True, num_return_sequences=2, suppress_tokens=SPECIAL)
        once = watching.ask("what is it?", 3, suppress_tokens=SPECIAL)
        assert once == watching.ask("what is it?", 3, suppress_tokens=SPECIAL)
    plain = model_of(FAMILIES[family]).generate(**whole(family, frames(4)), **options)
    assert torch.equal(mine.sequences, plain.sequences)


class Trip:
    """Raises in the middle of the n-th call of a decoder layer."""

    def __init__(self, model: Any, error: type[BaseException]) -> None:
        self.layer, self.error = model.model.language_model.layers[1], error

    def __enter__(self) -> None:
        def fail(*_: Any) -> None:
            raise self.error("stop")

        self.hook = self.layer.register_forward_hook(fail)

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("family", ["qwen2.5-vl", "llava-onevision", "internvl"])
def test_what_fails_leaves_stream_and_model_as_they_were(family: str, error: type[BaseException]) -> None:
    model = model_of(FAMILIES[family])
    plain = model.generate(**whole(family, frames(2)), **GENERATE).logits
    before, core = snapshot(model), dict(vars(model.model))
    with watch(family, budget=70 if family == "internvl" else 8) as watching:
        for frame in frames(5):
            watching.add(frame)
        assert snapshot(model) == before
        assert vars(model.model) == core
        report, said = str(watching.report), watching.generate("what is it?", **GENERATE).logits
        with Trip(model, error):
            with pytest.raises(error):
                watching.add(frames(6)[5])
            with pytest.raises(error):
                watching.ask("what is it?")
        assert snapshot(model) == before
        assert str(watching.report) == report
        close(watching.generate("what is it?", **GENERATE).logits, said)
        for frame in frames(4, first=5):
            watching.add(frame)
        assert watching.report.frames == 9
    assert snapshot(model) == before
    assert vars(model.model) == core
    close(model.generate(**whole(family, frames(2)), **GENERATE).logits, plain)


def test_half_precision() -> None:
    model = model_of(FAMILIES["qwen2.5-vl"], dtype=torch.bfloat16)
    with vlmprune.stream(model, processor("qwen2.5-vl"), keep=0.5, budget=8, horizon=26, evict="divprune") as watching:
        for frame in frames(40):
            watching.add(frame)
        assert watching.report.closed_up > 0
        assert {keys.dtype for keys in watching._now.held.keys} == {torch.bfloat16}
        assert isinstance(watching.ask("what?", suppress_tokens=SPECIAL), str)


@dataclass(kw_only=True)
class Nothing(vlmprune.Pruner):
    """Keeps two tokens of the first frame and none of later ones, as an adaptive method may of what stands still."""

    calls: int = 0
    name: ClassVar[str] = "nothing"

    def budget(self, counts: Any, layer: int = 0, depth: int = 1) -> Any:
        return [None] * len(counts)

    def select(self, tokens: vlmprune.VisualTokens, budget: torch.Tensor) -> vlmprune.Selection:
        self.calls += 1
        return vlmprune.Selection(torch.arange(2 * (self.calls == 1))[None])


@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl", "llava-onevision", "llava-clip-llama"])
def test_frames_of_which_nothing_is_kept(family: str) -> None:
    with watch(family, Nothing(), keep=0.5) as watching:
        for frame in frames(12):
            watching.add(frame)
        report = watching.report
        assert (report.tokens, report.entered, report.frames) == (2, 2, 12)
        assert report.text_tokens < 80, "no text without its frame, but the newest's"
        watching.ask("what?", 1, suppress_tokens=SPECIAL)


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"budget": 0}, "budget is the number"),
    ({"budget": 2.0}, "budget is the number"),
    ({"budget": True}, "budget is the number"),
    ({"fps": 0}, "fps must be"),
    ({"horizon": -1}, "horizon is a number"),
    ({"pruner": "divprun"}, "did you mean 'divprune'"),
    ({"pruner": "fastv"}, "listens to the question"),
    ({"pruner": "visiondrop"}, "acts inside the decoder"),
    ({"pruner": "tome"}, "needs encoder_kept"),
    ({"pruner": 3}, "must be a name"),
    ({"keep": "flops:0.3"}, "a ratio of a frame's tokens or a count"),
    ({"evict": "newest"}, "unknown pruner 'newest'"),
    ({"evict": "mmtok"}, "needs more than the features"),
    ({"evict": "pool"}, "merges tokens"),
    ({"evict": "pyramiddrop"}, "elsewhere than at the boundary"),
    ({"evict": "token-correlation"}, "as many as it is told"),
    ({"evict": "vidcom2"}, "compares whole frames"),
]


@pytest.mark.parametrize(("settings", "sentence"), MISTAKES)
def test_mistakes_are_told_when_the_stream_is_made(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        watch("qwen2.5-vl", **settings)
    assert "\n" not in str(caught.value)


def test_models_and_processors_that_cannot_be_served() -> None:
    model, tool = model_of(FAMILIES["llava-clip-llama"]), processor("llava-clip-llama")
    windowed = model_of(FAMILIES["llava-clip-mistral-window"])
    for cannot, with_tool, sentence in (
        (windowed, tool, "sliding window"),
        (model.model, tool, "no head"),
        (torch.nn.Linear(2, 2), tool, "supported families"),
        (model, None, "must be the model's processor"),
        (model, tool.tokenizer, "must be the model's processor"),
    ):
        with pytest.raises(ValueError, match=sentence):
            vlmprune.stream(cannot, with_tool)
    with vlmprune.prune(model, "divprune"), pytest.raises(ValueError, match="already has a session"):
        vlmprune.stream(model, tool)
    own, model.config.image_token_id = model.config.image_token_id, 5
    try:
        with pytest.raises(ValueError, match="give the model's own"):
            vlmprune.stream(model, tool)
    finally:
        model.config.image_token_id = own


def test_mistakes_while_it_runs() -> None:
    family = "qwen2.5-vl"
    with watch(family, budget=8) as watching:
        with pytest.raises(ValueError, match="nothing has been seen"):
            watching.ask("what?")
        watching.add(frames(1)[0], 5.0)
        for wrong, sentence in (
            (picture(0, 24, 16), "16 x 24 pixels, those before had 24 x 16"),
            (picture(0, *SIZE).astype(np.float32), "uint8"),
            (picture(0, *SIZE)[..., 0], "uint8"),
            (np.zeros((*SIZE, 4), np.uint8), "uint8"),
            (torch.zeros(3, *SIZE), "uint8"),
            ("frame.png", "PIL image"),
        ):
            with pytest.raises(ValueError, match=sentence):
                watching.add(wrong)
        with pytest.raises(ValueError, match="sort them"):
            watching.add(frames(1)[0], 4.9)
        with pytest.raises(ValueError, match="finite"):
            watching.add(frames(1)[0], float("nan"))
        with pytest.raises(ValueError, match="is empty"):
            watching.ask(" ")
        with pytest.raises(ValueError, match="must not hold"):
            watching.ask("what is <|video_pad|>?")
        assert watching.report.frames == 1
        watching.add(frames(1)[0])
        assert watching.report.seconds == 5.0 + 1 / FPS
        with vlmprune.prune(watching.model, "divprune"):
            watching.add(frames(1)[0])  # waits for its partner
            with pytest.raises(ValueError, match="already has a session"):
                watching.add(frames(1)[0])
        assert "holds 3 of 3 visual tokens" in repr(watching)
    for call in (lambda: watching.add(frames(1)[0]), lambda: watching.ask("what?"), lambda: watching.report):
        with pytest.raises(ValueError, match="stream is closed"):
            call()
    assert "closed" in repr(watching)
    watching.close()
    for settings, sentence in (
        ({"budget": 2}, "keeps 3 of its 6 visual tokens, more than the budget of 2"),
        ({"keep": 0.05}, "rounds to 0"),
        ({"budget": 200, "horizon": 100}, "may spread over"),
    ):
        with watch(family, **settings) as watching:
            watching.add(frames(1)[0])
            with pytest.raises(ValueError, match=sentence):
                watching.add(frames(1)[0])
            assert watching.report.frames == 1

"""Digit clips: 8 to 16 frames in which handwritten digits move, appear and vanish, and questions about them.

Digits, colours, backgrounds and their split into train, validation and test are those of `vlmprune.scenes`. Every clip
is a pure function of `(split, seed, index, options)`.

A clip is 96 x 96 pixels, its background stands still. One to four actors (a digit in a colour, 16 to 20 pixels tall)
move in straight lines and bounce off the borders. The digits of a clip differ; two actors may share a colour, but are
then never visible together. Whatever is visible in the first frame appears there. Any two appearances start at least
two frames apart, and an actor that returns was away for three frames or more, so that a model which looks at pairs of
frames can tell them apart too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from vlmprune.scenes import COLOURS, SIZE, SPLITS, Split, _background, _sprite

VideoKind = Literal["first", "last", "when", "often", "count", "order", "moment"]

VIDEO_KINDS: tuple[VideoKind, ...] = get_args(VideoKind)
FPS = 24.0
PARTS = ("early", "middle", "late")
MOMENTS = ("start", "middle", "end")
_SIZES = (16, 20)
_SPEED = 3.0
_GAP = 20


@dataclass(frozen=True)
class Appearance:
    """A stretch in which an actor is visible: frames `start` to `stop`, exclusive, with its (left, top) in each."""

    start: int
    stop: int
    corners: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Actor:
    """A digit of one colour. `ink` is its opacity, float32 `[size, size]` in [0, 1]; `source` is its row in
    `load_digits`; `appearances` come in order of time."""

    digit: int
    colour: str
    source: int
    appearances: tuple[Appearance, ...]
    ink: np.ndarray = field(repr=False, compare=False)
    paint: np.ndarray = field(repr=False, compare=False)

    @property
    def frames(self) -> tuple[int, ...]:
        """The frames in which it is visible."""
        return tuple(frame for part in self.appearances for frame in range(part.start, part.stop))


@dataclass(frozen=True)
class VideoQuestion:
    """A question with its one right answer.

    `frames` are those that show what the answer depends on, ascending: of a question about one moment the frames of
    that moment, of one about an actor those of the appearance meant, otherwise all in which somebody asked about is
    visible. `actors` are the indices in `Clip.actors`; `key` is the word in the text that names the actor, or None.
    """

    kind: VideoKind
    text: str
    answer: str
    frames: tuple[int, ...]
    actors: tuple[int, ...]
    key: str | None = None


@dataclass(frozen=True)
class Clip:
    """A clip, uint8 `[frames, 96, 96, 3]` to be played at `fps`, who is in it, and questions; `background` names the
    photograph or pattern."""

    frames: np.ndarray
    actors: tuple[Actor, ...]
    questions: tuple[VideoQuestion, ...]
    background: str
    fps: float = FPS

    def __len__(self) -> int:
        return len(self.frames)

    def coverage(self, patch: int = 16) -> np.ndarray:
        """Mean ink of each actor in each patch, float32 `[actors, frames, SIZE / patch, SIZE / patch]`."""
        side = SIZE // patch
        out = np.zeros((len(self.actors), len(self.frames), SIZE, SIZE), dtype=np.float32)
        for canvas, actor in zip(out, self.actors, strict=True):
            size = len(actor.ink)
            for part in actor.appearances:
                for frame, (left, top) in enumerate(part.corners, part.start):
                    canvas[frame, top : top + size, left : left + size] = actor.ink
        return out.reshape(*out.shape[:2], side, patch, side, patch).mean(axis=(3, 5))


def digit_clips(
    split: Split = "test",
    count: int = 512,
    seed: int = 0,
    *,
    frames: tuple[int, int] = (8, 16),
    actors: tuple[int, int] = (1, 4),
    per_kind: int = 1,
    kinds: Sequence[VideoKind] = VIDEO_KINDS,
    photo_share: float = 0.6,
) -> Iterator[Clip]:
    """Yield `count` clips of a split.

    Each has a uniform number of frames and of actors between the two bounds (inclusive; at least 8 frames, at most 4
    actors) and, of every kind, up to `per_kind` different questions: fewer where the clip allows no more unambiguous
    ones. `photo_share` of the backgrounds are photographs, the others plain, gradient or noise.

    Raises:
        ValueError: unknown split or kind, or an impossible range of frames or actors.
        ImportError: scikit-learn or scikit-image is missing.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if unknown := set(kinds) - set(VIDEO_KINDS):
        raise ValueError(f"unknown question kinds {sorted(unknown)}; choose from {', '.join(VIDEO_KINDS)}")
    if not 8 <= frames[0] <= frames[1]:
        raise ValueError(f"frames must be a range that starts at 8 or above, got {frames}")
    if not 1 <= actors[0] <= actors[1] <= 4:
        raise ValueError(f"actors must be a range within 1 and 4, got {actors}")
    for index in range(count):
        rng = np.random.default_rng([seed, SPLITS.index(split), index])
        yield digit_clip(
            rng, split, frames=frames, actors=actors, per_kind=per_kind, kinds=kinds, photo_share=photo_share
        )


def digit_clip(
    rng: np.random.Generator,
    split: Split,
    *,
    frames: tuple[int, int] = (8, 16),
    actors: tuple[int, int] = (1, 4),
    per_kind: int = 1,
    kinds: Sequence[VideoKind] = VIDEO_KINDS,
    photo_share: float = 0.6,
) -> Clip:
    """One clip as `digit_clips` yields it, drawn from `rng`."""
    length = int(rng.integers(frames[0], frames[1] + 1))
    number = int(rng.integers(actors[0], actors[1] + 1))
    digits = rng.permutation(10)[:number].tolist()
    colours = rng.permutation(list(COLOURS))[:number].tolist()
    if number > 1 and rng.random() < 0.5:
        colours[1] = colours[0]
    sizes = rng.integers(_SIZES[0], _SIZES[1] + 1, number).tolist()
    times = _schedule(rng, length, colours)
    paths = _paths(rng, times, sizes)
    pixels, background = _background(rng, split, photo_share)
    cast = []
    for digit, colour, size, spans, tracks in zip(digits, colours, sizes, times, paths, strict=True):
        ink, paint, source = _sprite(rng, split, digit, colour, size)
        parts = tuple(Appearance(*span, track) for span, track in zip(spans, tracks, strict=True))
        cast.append(Actor(digit, colour, source, parts, ink, paint))
    everyone = tuple(cast)
    questions = questions_about(rng, everyone, length, per_kind=per_kind, kinds=kinds)
    return Clip(_film(pixels, everyone, length), everyone, questions, background)


def questions_about(
    rng: np.random.Generator,
    actors: tuple[Actor, ...],
    length: int,
    *,
    per_kind: int = 1,
    kinds: Sequence[VideoKind] = VIDEO_KINDS,
) -> tuple[VideoQuestion, ...]:
    """Up to `per_kind` different questions of every kind about the actors of a clip of `length` frames."""
    asked: list[VideoQuestion] = []
    for kind in kinds:
        questions = _ASKERS[kind](rng, actors, length)
        order = range(len(questions)) if kind == "moment" else rng.permutation(len(questions))
        asked += [questions[i] for i in order[:per_kind]]
    return tuple(asked)


def dense_clip(
    rng: np.random.Generator,
    split: Split,
    *,
    frames: int = 2,
    digits: tuple[int, int] = (6, 12),
    max_offset: int = 6,
    photo_share: float = 0.6,
) -> Clip:
    """A crowded clip without questions, for teaching a vision tower to read patches.

    Digits lie on a 24 pixel grid, each moved by up to `max_offset` pixels, and drift; digits and colours repeat.
    """
    number = int(rng.integers(digits[0], digits[1] + 1))
    cells = rng.permutation(16)[:number]
    pixels, background = _background(rng, split, photo_share)
    cast = []
    for cell in cells.tolist():
        digit, colour = int(rng.integers(10)), str(rng.choice(list(COLOURS)))
        size = int(rng.integers(_SIZES[0], _SIZES[1] + 1))
        offset = rng.integers(-max_offset, max_offset + 1, 2)
        corner = np.clip(np.array([cell % 4, cell // 4]) * 24 + offset, 0, SIZE - size)
        track = _track(corner, rng.uniform(-_SPEED, _SPEED, 2) * min(1.0, max_offset / 4), frames, size)
        ink, paint, source = _sprite(rng, split, digit, colour, size)
        cast.append(Actor(digit, colour, source, (Appearance(0, frames, track),), ink, paint))
    return Clip(_film(pixels, tuple(cast), frames), tuple(cast), (), background)


def _film(background: np.ndarray, actors: tuple[Actor, ...], length: int) -> np.ndarray:
    out = np.repeat(background[None], length, axis=0)
    for actor in actors:
        size = len(actor.ink)
        for part in actor.appearances:
            for frame, (left, top) in enumerate(part.corners, part.start):
                area = out[frame, top : top + size, left : left + size]
                area += (actor.paint - area) * actor.ink[..., None]
    return np.clip(out, 0, 255).astype(np.uint8)


def _schedule(rng: np.random.Generator, length: int, colours: list[str]) -> list[list[tuple[int, int]]]:
    """When each actor is visible: (start, stop) pairs, ascending. One actor may come back once or twice."""
    actors = len(colours)
    shared = actors > 1 and colours[0] == colours[1]
    rounds = [1] * actors
    if rng.random() < 0.5:
        rounds[int(rng.integers(actors))] += 1 if length < 12 else int(rng.integers(1, 3))
    # One colour at the first frame and at the last: only the time tells its digits apart.
    apart = shared and rng.random() < 0.6
    attempts = 0
    while True:
        attempts += 1
        if attempts > 50 or sum(rounds) > length // 2:
            rounds, apart = [1] * actors, False
        times = _draw(rng, length, rounds, apart)
        if _fits(times, colours):
            if shared and rng.random() < 0.5:
                times[:2] = times[1::-1]
            return times


def _draw(rng: np.random.Generator, length: int, rounds: list[int], apart: bool) -> list[list[tuple[int, int]]]:
    """Starts at least two frames apart, dealt to the actors at random; each stays for 2 frames to 60 % of the clip."""
    total = sum(rounds)
    starts = np.sort(rng.permutation(length - total)[:total]) + np.arange(total)
    deal = rng.permutation(np.repeat(np.arange(len(rounds)), rounds))
    if apart and rounds[0] == rounds[1] == 1:
        for actor, place in ((0, 0), (1, total - 1)):
            other = int(np.flatnonzero(deal == actor)[0])
            deal[[other, place]] = deal[[place, other]]
        starts[0] = 0
    times: list[list[tuple[int, int]]] = [[] for _ in rounds]
    for start, actor in zip(starts.tolist(), deal.tolist(), strict=True):
        longest = max(4, round(0.6 * length / rounds[actor]))
        times[actor].append((start, min(length, start + int(rng.integers(2, longest + 1)))))
    if apart and rounds[0] == rounds[1] == 1:
        times[1] = [(times[1][0][0], length)]
    return times


def _fits(times: list[list[tuple[int, int]]], colours: list[str]) -> bool:
    """Whether three are visible at most, actors of one colour never together, and who returns was away for three."""
    visible = np.zeros((len(times), 1 + max(stop for spans in times for _, stop in spans)), dtype=int)
    for row, spans in zip(visible, times, strict=True):
        for start, stop in spans:
            if row[max(0, start - 3) : stop].any():
                return False
            row[start:stop] = 1
    if visible.sum(axis=0).max() > 3:
        return False
    return len(colours) < 2 or colours[0] != colours[1] or not (visible[0] & visible[1]).any()


def _track(corner: np.ndarray, velocity: np.ndarray, frames: int, size: int) -> tuple[tuple[int, int], ...]:
    """(left, top) in each frame of a square that bounces off the borders."""
    room = SIZE - size
    places = np.abs((corner + velocity * np.arange(frames)[:, None]) % (2 * room))
    places = np.round(np.where(places > room, 2 * room - places, places)).astype(int)
    return tuple((int(left), int(top)) for left, top in places)


def _paths(
    rng: np.random.Generator, times: list[list[tuple[int, int]]], sizes: list[int]
) -> list[list[tuple[tuple[int, int], ...]]]:
    """A track per appearance; centres of actors visible together are at least `_GAP` pixels apart in x or y."""
    centres: dict[int, list[np.ndarray]] = {}
    paths: list[list[tuple[tuple[int, int], ...]]] = []
    for size, spans in zip(sizes, times, strict=True):
        paths.append([])
        for start, stop in spans:
            while True:
                corner = rng.integers(0, SIZE - size + 1, 2)
                track = _track(corner, rng.uniform(-_SPEED, _SPEED, 2), stop - start, size)
                middles = [np.array(place) + size / 2 for place in track]
                taken = (
                    np.abs(mine - other).max() < _GAP
                    for frame, mine in enumerate(middles, start)
                    for other in centres.get(frame, [])
                )
                if not any(taken):
                    break
            for frame, middle in enumerate(middles, start):
                centres.setdefault(frame, []).append(middle)
            paths[-1].append(track)
    return paths


def part_of(start: int, length: int) -> str | None:
    """The third of `length` frames that holds frame `start`, one of `PARTS`; None within half a frame of a border."""
    for number, name in enumerate(PARTS):
        first, last = number * length / 3, (number + 1) * length / 3
        if (number == 0 or start >= first + 0.5) and (number == 2 or start <= last - 0.5) and first <= start < last:
            return name
    return None


def moment_frames(moment: str, length: int) -> tuple[int, int]:
    """The two frames of `length` that count as the start, the middle or the end."""
    first = {"start": 0, "middle": length // 2 - 1, "end": length - 2}[moment]
    return first, first + 1


def _span(part: Appearance) -> tuple[int, ...]:
    return tuple(range(part.start, part.stop))


def _union(actors: tuple[Actor, ...]) -> tuple[int, ...]:
    return tuple(sorted({frame for actor in actors for frame in actor.frames}))


def _named(actors: tuple[Actor, ...], index: int) -> list[str]:
    """Words that name one actor only: its digit and, unless shared, its colour."""
    actor = actors[index]
    shared = sum(other.colour == actor.colour for other in actors) > 1
    return [str(actor.digit)] if shared else [str(actor.digit), actor.colour]


def _phrase(word: str) -> str:
    return f"the {word}" if word.isdigit() else f"the {word} digit"


def _ask_first(rng: np.random.Generator, actors: tuple[Actor, ...], length: int) -> list[VideoQuestion]:
    index = min(range(len(actors)), key=lambda i: actors[i].appearances[0].start)
    return _ask_end("first", actors, index)


def _ask_last(rng: np.random.Generator, actors: tuple[Actor, ...], length: int) -> list[VideoQuestion]:
    index = max(range(len(actors)), key=lambda i: actors[i].appearances[-1].start)
    # Who comes back last has appeared before: "appears last" would be ambiguous.
    return _ask_end("last", actors, index) if len(actors[index].appearances) == 1 else []


def _ask_end(kind: Literal["first", "last"], actors: tuple[Actor, ...], index: int) -> list[VideoQuestion]:
    frames = _span(actors[index].appearances[0])
    return [
        VideoQuestion(kind, f"Which digit appears {kind}?", str(actors[index].digit), frames, (index,)),
        VideoQuestion(kind, f"What colour appears {kind}?", actors[index].colour, frames, (index,)),
    ]


def _ask_when(rng: np.random.Generator, actors: tuple[Actor, ...], length: int) -> list[VideoQuestion]:
    questions = []
    for index, actor in enumerate(actors):
        answer = part_of(actor.appearances[0].start, length)
        if len(actor.appearances) == 1 and answer:
            frames = _span(actor.appearances[0])
            for word in _named(actors, index):
                text = f"When does {_phrase(word)} appear?"
                questions.append(VideoQuestion("when", text, answer, frames, (index,), word))
    return questions


def _ask_often(rng: np.random.Generator, actors: tuple[Actor, ...], length: int) -> list[VideoQuestion]:
    questions = []
    for index, actor in enumerate(actors):
        for word in _named(actors, index):
            text = f"How often does {_phrase(word)} appear?"
            answer = str(len(actor.appearances))
            questions.append(VideoQuestion("often", text, answer, actor.frames, (index,), word))
    returning = [q for q in questions if q.answer != "1"]
    # Otherwise most answers would be 1.
    return returning or questions


def _ask_count(rng: np.random.Generator, actors: tuple[Actor, ...], length: int) -> list[VideoQuestion]:
    everyone = tuple(range(len(actors)))
    return [VideoQuestion("count", "How many digits are there?", str(len(actors)), _union(actors), everyone)]


def _ask_order(rng: np.random.Generator, actors: tuple[Actor, ...], length: int) -> list[VideoQuestion]:
    colours = [actor.colour for actor in actors]
    if len(actors) < 2 or len(set(colours)) < len(colours) or any(len(actor.appearances) > 1 for actor in actors):
        return []
    order = sorted(range(len(actors)), key=lambda i: actors[i].appearances[0].start)
    answer = " ".join(colours[i] for i in order)
    text = "In which order do the colours appear?"
    return [VideoQuestion("order", text, answer, _union(actors), tuple(order))]


def _ask_moment(rng: np.random.Generator, actors: tuple[Actor, ...], length: int) -> list[VideoQuestion]:
    """What has a colour at one moment; colours that change their digit come first."""
    hard: list[VideoQuestion] = []
    easy: list[VideoQuestion] = []
    for moment in rng.permutation(MOMENTS).tolist():
        frames = moment_frames(moment, length)
        for index in rng.permutation(len(actors)).tolist():
            actor = actors[index]
            rivals = [other for other in actors if other is not actor and other.colour == actor.colour]
            if not set(frames) <= set(actor.frames) or any(set(frames) & set(other.frames) for other in rivals):
                continue
            text = f"Which digit is {actor.colour} at the {moment}?"
            question = VideoQuestion("moment", text, str(actor.digit), frames, (index,), actor.colour)
            (hard if rivals else easy).append(question)
    return hard + easy


_ASKERS = {
    "first": _ask_first,
    "last": _ask_last,
    "when": _ask_when,
    "often": _ask_often,
    "count": _ask_count,
    "order": _ask_order,
    "moment": _ask_moment,
}

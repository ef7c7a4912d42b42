from collections import Counter
from itertools import combinations, pairwise

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from vlmprune.scenes import COLOURS, PHOTOS, SIZE, SPLITS
from vlmprune.video_scenes import MOMENTS, PARTS, VIDEO_KINDS, Clip, dense_clip, digit_clips, moment_frames, part_of


@pytest.fixture(scope="module")
def clips() -> dict[str, list[Clip]]:
    return {split: list(digit_clips(split, 120, seed=3, per_kind=2)) for split in SPLITS}


def everything(clips):
    return [clip for split in SPLITS for clip in clips[split]]


def test_clips_are_a_function_of_split_seed_and_index():
    once, again = list(digit_clips("test", 4, 7)), list(digit_clips("test", 8, 7))
    assert all(np.array_equal(a.frames, b.frames) and a.questions == b.questions for a, b in zip(once, again))
    for other in (once[1], next(digit_clips("test", 1, 8)), next(digit_clips("train", 1, 7))):
        assert once[0].frames.shape != other.frames.shape or not np.array_equal(once[0].frames, other.frames)


def test_splits_share_neither_digits_nor_photographs(clips):
    used = {split: {actor.source for clip in clips[split] for actor in clip.actors} for split in SPLITS}
    for one, other in combinations(SPLITS, 2):
        assert not used[one] & used[other]
    for split in SPLITS:
        assert {clip.background for clip in clips[split]} - {"plain", "gradient", "noise"} == set(PHOTOS[split])


def test_frames_counts_and_actors(clips):
    for clip in everything(clips):
        assert clip.frames.dtype == np.uint8
        assert clip.frames.shape == (len(clip), SIZE, SIZE, 3)
        assert 8 <= len(clip) <= 16
        assert 1 <= len(clip.actors) <= 4
        assert len({actor.digit for actor in clip.actors}) == len(clip.actors)
    assert {len(clip) for clip in everything(clips)} == set(range(8, 17))
    assert {len(clip.actors) for clip in everything(clips)} == {1, 2, 3, 4}
    assert all(len(clip) == 9 for clip in digit_clips("test", 5, frames=(9, 9)))


def test_appearances_are_far_enough_apart_in_time(clips):
    for clip in everything(clips):
        starts = sorted(part.start for actor in clip.actors for part in actor.appearances)
        assert all(later - earlier >= 2 for earlier, later in pairwise(starts))
        for actor in clip.actors:
            assert all(2 <= part.stop - part.start == len(part.corners) for part in actor.appearances)
            assert all(b.start - a.stop >= 3 for a, b in pairwise(actor.appearances))
            assert 0 <= actor.frames[0] <= actor.frames[-1] < len(clip)
        for one, other in combinations(clip.actors, 2):
            assert one.colour != other.colour or not set(one.frames) & set(other.frames)


def test_visible_actors_move_keep_inside_and_do_not_touch(clips):
    moved = 0
    for clip in everything(clips):
        boxes: dict[int, list[tuple[int, int, int]]] = {}
        for actor in clip.actors:
            for part in actor.appearances:
                steps = np.abs(np.diff(np.array(part.corners), axis=0))
                assert steps.max(initial=0) <= 4
                moved += bool(steps.sum())
                for frame, (left, top) in enumerate(part.corners, part.start):
                    assert 0 <= min(left, top) <= max(left, top) + len(actor.ink) <= SIZE
                    boxes.setdefault(frame, []).append((left, top, len(actor.ink)))
        for frame in boxes.values():
            for (ax, ay, a), (bx, by, b) in combinations(frame, 2):
                assert max(abs(ax + a / 2 - bx - b / 2), abs(ay + a / 2 - by - b / 2)) >= 20
    assert moved > 300


def test_a_frame_shows_its_actors_in_their_colours_and_nothing_else_changes(clips):
    for clip in clips["train"][:40]:
        cover = clip.coverage(SIZE)[..., 0, 0] > 0
        for actor, row in zip(clip.actors, cover):
            assert tuple(np.flatnonzero(row)) == actor.frames
            part = actor.appearances[0]
            (left, top), size = part.corners[0], len(actor.ink)
            strong = clip.frames[part.start, top : top + size, left : left + size][actor.ink > 0.75].mean(axis=0)
            assert min(COLOURS, key=lambda name: np.abs(strong - COLOURS[name]).sum()) == actor.colour
        empty = np.flatnonzero(~cover.any(axis=0))
        assert all(np.array_equal(clip.frames[empty[0]], clip.frames[frame]) for frame in empty[1:])


def test_coverage_says_where_an_actor_is(clips):
    for clip in clips["test"][:20]:
        cover = clip.coverage(16)
        assert cover.shape == (len(clip.actors), len(clip), 6, 6)
        for area, actor in zip(cover, clip.actors):
            for part in actor.appearances:
                for frame, (left, top) in enumerate(part.corners, part.start):
                    rows, columns = np.nonzero(area[frame])
                    assert left // 16 <= columns.min() <= columns.max() <= (left + len(actor.ink) - 1) // 16
                    assert top // 16 <= rows.min() <= rows.max() <= (top + len(actor.ink) - 1) // 16


def seen(clip: Clip, word: str, frame: int) -> bool:
    """Whether something of that digit or colour is visible."""
    return any(word in (str(actor.digit), actor.colour) and frame in actor.frames for actor in clip.actors)


def debuts(clip: Clip, word: str) -> list[int]:
    """The frames in which something of that digit or colour turns up after an empty frame."""
    return [f for f in range(len(clip)) if seen(clip, word, f) and (f == 0 or not seen(clip, word, f - 1))]


def test_answers_follow_from_what_is_visible_frame_by_frame(clips):
    for clip in everything(clips):
        everyone = [str(actor.digit) for actor in clip.actors]
        for question in clip.questions:
            key, answer = question.key, question.answer
            assert key is None or key in question.text.replace("?", "").split()
            if question.kind in ("first", "last"):
                words = [a.colour for a in clip.actors] if "colour" in question.text else everyone
                (mine,) = (clip.actors[i] for i in question.actors)
                assert answer in (mine.colour if "colour" in question.text else str(mine.digit), None)
                times = [debuts(clip, digit) for digit in everyone]
                pick = min(times) if question.kind == "first" else max(times)
                assert pick == debuts(clip, str(mine.digit))
                assert question.kind == "first" or max(max(t) for t in times) == pick[0]
                assert answer in words
            elif question.kind == "when":
                (start,) = debuts(clip, key)
                assert PARTS.index(answer) == int(3 * start / len(clip))
            elif question.kind == "often":
                assert answer == str(len(debuts(clip, key)))
            elif question.kind == "count":
                assert answer == str(len(everyone))
            elif question.kind == "order":
                colours = answer.split()
                assert sorted(colours) == sorted(actor.colour for actor in clip.actors)
                assert colours == sorted(colours, key=lambda colour: debuts(clip, colour))
                assert all(len(debuts(clip, colour)) == 1 for colour in colours)
            else:
                moment = question.text.rstrip("?").split()[-1]
                frames = moment_frames(moment, len(clip))
                assert question.frames == frames
                for frame in frames:
                    visible = [a for a in clip.actors if a.colour == key and frame in a.frames]
                    assert [str(actor.digit) for actor in visible] == [answer]


def test_the_frames_of_a_question_show_its_actors(clips):
    for clip in everything(clips):
        for question in clip.questions:
            assert list(question.frames) == sorted(set(question.frames))
            assert all(any(f in clip.actors[i].frames for i in question.actors) for f in question.frames)
            assert all(set(question.frames) & set(clip.actors[i].frames) for i in question.actors)


def test_moments_and_parts():
    assert [moment_frames(moment, 9) for moment in MOMENTS] == [(0, 1), (3, 4), (7, 8)]
    assert [part_of(start, 9) for start in range(9)] == [
        *["early"] * 3,
        *[None, "middle", "middle"],
        *[None, "late", "late"],
    ]


def test_questions_differ_and_all_kinds_and_answers_occur(clips):
    answers = {kind: Counter() for kind in VIDEO_KINDS}
    for clip in everything(clips):
        assert len({question.text for question in clip.questions}) == len(clip.questions)
        for question in clip.questions:
            answers[question.kind][question.answer] += 1
    assert set(answers["when"]) == set(PARTS)
    assert set(answers["often"]) == set("123")
    assert set(answers["count"]) == set("1234")
    assert {len(answer.split()) for answer in answers["order"]} == {2, 3, 4}
    for kind in ("first", "last"):
        assert set(answers[kind]) == {*COLOURS, *map(str, range(10))}
    assert set(answers["moment"]) == set(map(str, range(10)))
    assert max(answers["when"].values()) / answers["when"].total() < 0.6


def test_a_colour_often_changes_its_digit_between_the_moments(clips):
    """Otherwise a question about a moment could be answered without looking at the time."""
    hard = total = 0
    for clip in everything(clips):
        for question in clip.questions:
            if question.kind == "moment":
                total += 1
                hard += sum(actor.colour == question.key for actor in clip.actors) > 1
    assert hard > 0.25 * total > 50


def test_dense_clips_are_crowded():
    clip = dense_clip(np.random.default_rng(0), "train")
    assert len(clip) == 2
    assert 6 <= len(clip.actors) <= 12
    assert all(actor.frames == (0, 1) for actor in clip.actors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "split must be one of train"),
        ({"kinds": ["colour"]}, "unknown question kinds"),
        ({"frames": (4, 16)}, "starts at 8"),
        ({"actors": (0, 3)}, "range within 1 and 4"),
    ],
)
def test_wrong_arguments_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        next(digit_clips(**options))

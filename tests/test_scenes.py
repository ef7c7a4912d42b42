from collections import Counter
from itertools import combinations

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from vlmprune.scenes import COLOURS, CORNERS, KINDS, PHOTOS, SIZE, SPLITS, Scene, dense_scene, digit_scenes


@pytest.fixture(scope="module")
def scenes() -> dict[str, list[Scene]]:
    return {split: list(digit_scenes(split, 150, seed=3, per_kind=2)) for split in SPLITS}


def test_scenes_are_a_function_of_split_seed_and_index():
    def pixels(split, count, seed):
        return [np.asarray(scene.image) for scene in digit_scenes(split, count, seed)]

    once, again = pixels("test", 4, 7), pixels("test", 8, 7)
    assert all(np.array_equal(a, b) for a, b in zip(once, again))
    assert not np.array_equal(once[0], pixels("test", 1, 8)[0])
    assert not np.array_equal(once[0], pixels("train", 1, 7)[0])
    assert not np.array_equal(once[0], once[1])
    first, second = ([scene.questions for scene in digit_scenes("test", 4, 7)] for _ in range(2))
    assert first == second


def test_splits_share_neither_digits_nor_photographs(scenes):
    for one, other in combinations(SPLITS, 2):
        assert not set(PHOTOS[one]) & set(PHOTOS[other])
        used = [{thing.source for scene in scenes[split] for thing in scene.objects} for split in (one, other)]
        assert not used[0] & used[1]
    for split in SPLITS:
        seen = {scene.background for scene in scenes[split]} - {"plain", "gradient", "noise"}
        assert seen == set(PHOTOS[split])


def test_images_and_boxes(scenes):
    for scene in scenes["test"]:
        assert scene.image.size == (SIZE, SIZE)
        assert scene.image.mode == "RGB"
        assert 1 <= len(scene.objects) <= 4
        for thing in scene.objects:
            left, top, right, bottom = thing.box
            assert 0 <= left < right <= SIZE
            assert 0 <= top < bottom <= SIZE
            assert 14 <= right - left <= 17
            assert thing.ink.shape == (bottom - top, right - left)
            assert 0 <= thing.ink.min() < 0.1 < 0.7 < thing.ink.max() <= 1
        for one, other in combinations(scene.objects, 2):
            assert max(abs(a - b) for a, b in zip(one.centre, other.centre)) >= 17
        assert len({thing.digit for thing in scene.objects}) == len(scene.objects)
        assert len({thing.colour for thing in scene.objects}) == len(scene.objects)


def test_ink_has_the_colour_of_its_object(scenes):
    for scene in scenes["train"][:40]:
        pixels = np.asarray(scene.image, dtype=float)
        for thing in scene.objects:
            left, top, right, bottom = thing.box
            strong = pixels[top:bottom, left:right][thing.ink > 0.75].mean(axis=0)
            nearest = min(COLOURS, key=lambda name: np.abs(strong - COLOURS[name]).sum())
            assert nearest == thing.colour


def test_coverage_says_which_patches_hold_an_object(scenes):
    for scene in scenes["test"][:40]:
        cover = scene.coverage(8)
        assert cover.shape == (len(scene.objects), 12, 12)
        for area, thing in zip(cover, scene.objects):
            rows, columns = np.nonzero(area)
            left, top, right, bottom = thing.box
            assert columns.min() >= left // 8
            assert columns.max() <= (right - 1) // 8
            assert rows.min() >= top // 8
            assert rows.max() <= (bottom - 1) // 8
            assert area.max() > 0.12


def _corner(thing) -> str:
    x, y = thing.centre
    return ("top" if y < 48 else "bottom") + ("-left" if x < 48 else "-right")


def test_answers_follow_from_the_objects(scenes):
    for scene in (scene for split in SPLITS for scene in scenes[split]):
        digits = {str(thing.digit): thing for thing in scene.objects}
        colours = {thing.colour: thing for thing in scene.objects}
        for question in scene.questions:
            named = [scene.objects[index] for index in question.objects]
            assert question.key is None or question.key in question.text
            if question.kind == "count":
                assert question.answer == str(len(scene.objects))
                assert len(named) == len(scene.objects)
            elif question.kind == "presence":
                assert question.answer == ("yes" if question.key in {**digits, **colours} else "no")
                assert len(named) == (question.answer == "yes")
            elif question.kind == "digit_of_colour":
                assert named == [colours[question.key]]
                assert question.answer == str(named[0].digit)
            elif question.kind == "colour_of_digit":
                assert named == [digits[question.key]]
                assert question.answer == named[0].colour
            elif question.kind == "where":
                assert named == [digits[question.key]]
                assert question.answer == _corner(named[0])
                assert min(abs(c - 48) for c in named[0].centre) >= 6
            else:
                assert [thing for thing in scene.objects if _corner(thing) == question.key] == named
                assert question.answer == f"{named[0].colour} {named[0].digit}"


def test_questions_of_a_scene_differ_and_all_kinds_and_answers_occur(scenes):
    answers = {kind: Counter() for kind in KINDS}
    for scene in (scene for split in SPLITS for scene in scenes[split]):
        assert len({question.text for question in scene.questions}) == len(scene.questions)
        for question in scene.questions:
            answers[question.kind][question.answer] += 1
    assert set(answers["where"]) == set(CORNERS)
    assert set(answers["colour_of_digit"]) == set(COLOURS)
    assert set(answers["digit_of_colour"]) == set(map(str, range(10)))
    assert set(answers["count"]) == set("1234")
    share = answers["presence"]["yes"] / answers["presence"].total()
    assert 0.45 < share < 0.55
    assert answers["at_corner"].total() > 300


def test_presence_is_balanced_for_digits_and_for_colours():
    for words in (COLOURS, [str(digit) for digit in range(10)]):
        answers = Counter(
            question.answer
            for scene in digit_scenes("test", 400, seed=4, kinds=["presence"], photo_share=0)
            for question in scene.questions
            if question.key in words
        )
        assert 0.4 < answers["yes"] / answers.total() < 0.6


def test_dense_scenes_sit_on_the_patch_grid_without_an_offset():
    scene = dense_scene(np.random.default_rng(0), "train", max_offset=0)
    assert 8 <= len(scene.objects) <= 16
    assert all(thing.box[0] % 16 == thing.box[1] % 16 == 0 for thing in scene.objects)


def test_wrong_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match="split must be one of train"):
        next(digit_scenes("dev"))
    with pytest.raises(ValueError, match="unknown question kinds"):
        next(digit_scenes(kinds=["colour"]))
    with pytest.raises(ValueError, match="range within 1 and 6"):
        next(digit_scenes(digits=(0, 7)))


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    from vlmprune import scenes

    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    scenes._digits.cache_clear()
    with pytest.raises(ImportError, match=r'pip install "vlmprune\[scenes\]"'):
        next(digit_scenes("test", 1, photo_share=0))

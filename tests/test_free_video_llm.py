"""Free Video-LLM: golden vectors of the official functions, properties, and skill on clips of digits."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmprune.pruners.free_video_llm import (
    FreeVideoLLM,
    crop_tokens,
    loader_frames,
    matching_frames,
    pixel_boxes,
    pool_pairs,
    region,
    relevant_cells,
    streams,
)
from vlmprune.video import Clip


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "golden" / "freevideollm_frames_roi.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def pieces(golden) -> tuple[torch.Tensor, ...]:
    """Features, frame scores, projected patches and the text of the official run."""
    tensors = {name: torch.from_numpy(golden[name]) for name in golden if golden[name].dtype.kind == "f"}
    score = F.cosine_similarity(tensors["image_pooled"], tensors["text_pooled"], dim=-1)
    patches = tensors["clip_fine"][:, 1:] @ tensors["proj_weight"].T
    return tensors["features"], score, patches, tensors["text_pooled"][0]


def test_golden_loader(golden):
    for (total, count), expected in zip(golden["seq_args"].tolist(), golden["seq_out"]):
        assert loader_frames(total, count).tolist() == expected[expected >= 0].tolist()


@pytest.mark.parametrize("count", [1, 3, 5, 10])
def test_golden_frames(golden, pieces, count):
    assert matching_frames(pieces[1], count).tolist() == golden[f"frames_top{count}"].tolist()


def test_golden_regions(golden):
    for (rows, cols, ratio), cells, (left, right, top, bottom) in zip(
        golden["roi_args"].tolist(), golden["roi_points"], golden["roi_out_lrtb"].tolist()
    ):
        box = region(torch.from_numpy(cells[cells >= 0]), (int(rows), int(cols)), ratio)
        assert box.tolist() == [left, top, right, bottom]


def test_golden_streams(golden, pieces):
    """slow_3frms..._roi6-middle_4frms...-fast_6frms_2x2, with the official code's reading of the pooled grid."""
    features, score, *_ = pieces
    slow = matching_frames(score, 3)
    assert np.array_equal(pool_pairs(features[slow]).flatten(0, 1), golden["slow_pooled"])
    out = streams(*pieces, slow=3, middle=4, fast=6, fast_grid=(2, 2), roi=0.6, official_roi_grid=True)
    assert out.numpy() == pytest.approx(golden["visual_tokens"], abs=1e-6)
    assert out[:54].numpy() == pytest.approx(golden["slow_cropped"], abs=1e-6)


def test_the_published_number_of_tokens():
    """3 x 231 + 5 x 231 + 50 x 16, on the grid as it is and as the official code reads it."""
    features, patches = torch.randn(50, 576, 4), torch.randn(50, 576, 6)
    for official in (False, True):
        out = streams(features, torch.randn(50), patches, torch.randn(6), official_roi_grid=official)
        assert out.shape == (2648, 4)


def test_the_right_grid_crops_a_rectangle_of_the_picture():
    """Row and column of every token as its features: those that stay form one contiguous box."""
    side = 8
    row, col = torch.arange(side * side) // side, torch.arange(side * side) % side
    features = torch.stack([row, col], -1).float().expand(4, -1, -1)
    patches = torch.zeros(4, side * side, 2)
    patches[..., 0] = ((row > 4) & (col < 3)).float()
    patches[..., 1] = 0.1
    text = torch.tensor([1.0, 0.0])
    out = streams(features, torch.arange(4.0), patches, text, slow=1, middle=1, fast=0, roi=0.25)[:8]
    rows, cols = out[:, 0].unique().tolist(), out[:, 1].unique().tolist()
    assert len(out) == len(rows) * len(cols)
    assert rows == list(range(int(rows[0]), int(rows[0]) + 4))
    assert len(cols) == 2


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=30), st.integers(1, 40))
def test_frames_are_unique_ascending_and_the_best(score, count):
    scores = torch.tensor(score)
    chosen = matching_frames(scores, count).tolist()
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(count, len(score))
    rest = [at for at in range(len(score)) if at not in chosen]
    for out in rest:
        for kept in chosen:
            assert score[kept] > score[out] or (score[kept] == score[out] and kept < out)


@settings(max_examples=200)
@given(st.data())
def test_a_region_lies_in_the_grid_and_has_its_size(data):
    rows, cols = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 30))
    ratio = data.draw(st.floats(0.01, 1))
    cells = torch.tensor(data.draw(st.lists(st.integers(0, rows * cols - 1), min_size=1, max_size=50)))
    left, top, right, bottom = region(cells, (rows, cols), ratio).tolist()
    assert 0 <= left < right <= cols
    assert 0 <= top < bottom <= rows
    assert right - left == max(1, round(cols * math.sqrt(ratio)))
    assert bottom - top == max(1, round(rows * math.sqrt(ratio)))
    spot = region(cells[:1], (rows, cols), ratio).tolist()
    row, col = divmod(cells[0].item(), cols)
    assert spot[0] <= col < spot[2]
    assert spot[1] <= row < spot[3]
    assert region(cells, (rows, cols), 1.0).tolist() == [0, 0, cols, rows]
    boxes = pixel_boxes(torch.tensor([[left, top, right, bottom]] * 2), (rows, cols), (0, 0, 1, 1), 97, 31)
    assert 0 <= boxes[0][0] < boxes[0][2] <= 97
    assert 0 <= boxes[0][1] < boxes[0][3] <= 31


def test_pixels_of_a_middle_square_and_of_corners():
    grid, seen = (4, 4), (0.25, 0.0, 0.75, 1.0)  # the middle of a picture twice as wide as high
    (box,) = pixel_boxes(torch.tensor([[1, 1, 3, 3]]), grid, seen, 200, 100)
    assert box == [50, 25, 150, 75]
    left, right = pixel_boxes(torch.tensor([[0, 0, 2, 2], [2, 2, 4, 4]]), grid, seen, 200, 100)
    assert left == [25, 0, 125, 50]
    assert right == [75, 50, 175, 100]


def test_cells_of_a_crop_are_those_of_the_box():
    rows = torch.arange(24.0).view(1, 24, 1).repeat(2, 1, 1)
    out = crop_tokens(rows, torch.tensor([[1, 0, 3, 2], [4, 2, 6, 4]]), (4, 6))
    assert out[0, :, 0].tolist() == [1, 2, 7, 8]
    assert out[1, :, 0].tolist() == [16, 17, 22, 23]
    assert relevant_cells(torch.tensor([0.1, 0.9, 0.9, 0.2]), 0.5).tolist() == [1, 2]


class Brightness:
    """A scorer that likes bright pixels, with a grid of 2 x 2."""

    def frames(self, frames, text):
        return torch.tensor(np.asarray(frames, dtype=np.float32).mean((1, 2, 3)))

    def patches(self, images, text):
        count, height, width, _ = images.shape
        cells = images.reshape(count, 2, height // 2, 2, width // 2, 3).mean((2, 4, 5))
        return torch.tensor(cells.reshape(count, 4)), (2, 2)

    def seen(self, width, height):
        return 0, 0, 1, 1


def spots() -> Clip:
    """Six frames with a bright corner each, brighter in frames 1 and 4."""
    frames = np.zeros((6, 8, 12, 3), np.uint8)
    for at in range(6):
        frames[at, 4 * (at % 2) : 4 * (at % 2) + 4, 6:] = 200 if at in (1, 4) else 50
    return Clip.of(frames, 2.0)


def test_frames_are_chosen_and_cropped():
    chosen = FreeVideoLLM(keep=2, roi=0.25).frames(spots(), "bright?", Brightness())
    assert chosen.indices.tolist() == [1, 4]
    assert chosen.timestamps.tolist() == [0.5, 2.0]
    assert chosen.frames.shape == (2, 4, 6, 3)
    assert chosen.frames.min() == 200


@pytest.mark.parametrize(("keep", "left"), [(1, 1), (2, 2), (99, 6), (0.5, 3), (0.01, 1), (1.0, 6)])
def test_keep_counts_frames(keep, left):
    assert len(FreeVideoLLM(keep=keep, roi=1.0).frames(spots(), "bright?", Brightness())) == left


def test_everything_kept_is_the_clip_itself():
    clip = spots()
    assert FreeVideoLLM(keep=1.0, roi=1.0).frames(clip, "bright?", Brightness()) is clip


@pytest.mark.parametrize("wrong", [{"keep": 0}, {"keep": 1.5}, {"roi": 0}, {"roi": 1.1}, {"roi": "all"}])
def test_wrong_settings(wrong):
    with pytest.raises(ValueError, match=r"keep must be|roi must be"):
        FreeVideoLLM(**wrong)


def test_it_keeps_the_frames_that_show_what_the_question_names():
    """Clips in which the digit asked about is visible in a part of the frames; chance is that part."""
    pytest.importorskip("open_clip")
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    from vlmprune.clip import ClipScorer
    from vlmprune.video_scenes import digit_clips

    scorer, right, chance, inside = ClipScorer(), [], [], []
    for film in digit_clips("test", 8, seed=3, actors=(2, 3), kinds=[]):
        clip = Clip.of(film.frames, film.fps)
        for number, actor in enumerate(film.actors):
            if len(actor.frames) > len(clip) - 3:
                continue
            question = f"when does the {actor.digit} appear ?"
            kept = FreeVideoLLM(keep=2, roi=1.0).frames(clip, question, scorer)
            right += [frame in actor.frames for frame in kept.indices.tolist()]
            chance.append(len(actor.frames) / len(clip))
            frames = clip.take(list(actor.frames))
            score, grid = scorer.patches(frames.frames, question)
            boxes = pixel_boxes(region(relevant_cells(score, 0.1), grid, 0.5), grid, (0, 0, 1, 1), 96, 96)
            ink = film.coverage(8)[number, list(actor.frames)]
            for spot, (left, top, stop, bottom) in zip(ink, boxes):
                where = spot[top // 8 : -(-bottom // 8), left // 8 : -(-stop // 8)]
                inside.append(where.sum() > 0.5 * spot.sum())
    assert len(right) >= 20
    assert np.mean(right) > 0.5 + np.mean(chance) / 2
    assert np.mean(inside) > 0.7

"""HICom: its windows, pooling by the question, and the stand-in without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_weights
import torch
import trainers
from cases import BATCHES
from fakes import rows, tokens_of
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_laws import Recorded, generate, model_of

import vlmprune
from vlmprune import Geometry
from vlmprune.ask import prompt_inputs
from vlmprune.pruners import hicom
from vlmprune.pruners._windows import Windows, axis_windows

GOLDEN = np.load(Path(__file__).parent / "golden" / "hicom_local.npz")
sides = st.integers(1, 9)


def video(frames: int, height: int, width: int, **fields: Any) -> Geometry:
    return Geometry.grid(height, width, planes=frames, kind="video", **fields)


def asked(*features: torch.Tensor, shapes: list[Geometry], guide: torch.Tensor | None = None) -> vlmprune.VisualTokens:
    words = rows(len(features), 3, features[0].shape[1], seed=9)
    mask = torch.ones(len(features), 3, dtype=torch.bool)
    if guide is not None:
        words, mask = guide.expand(len(features), 1, -1), mask[:, :1]
    return tokens_of(*features, shapes=shapes, instruction=words, instruction_mask=mask)


@pytest.mark.parametrize("case", range(3))
def test_golden(case: int) -> None:
    frames, height, width, time, side, image = map(int, GOLDEN[f"c{case}_args"])
    shape = Geometry.grid(height, width, planes=frames, kind="image" if image else "video")
    windows = Windows.of_kernel(shape, time, side)
    assert np.array_equal(windows.members, GOLDEN[f"c{case}_window_index"])
    features, embed = (torch.from_numpy(GOLDEN[f"c{case}_{name}"]).flatten(0, 2) for name in ("features", "embed"))
    guide = torch.from_numpy(GOLDEN[f"c{case}_guide"])
    for name, logits in (
        ("scaled_dot", hicom.scaled_dot(embed, guide)),
        ("cliplogit_2p3_m4", hicom.cosine_logits(embed, guide, 2.3)),
    ):
        wanted = GOLDEN[f"c{case}_out_{name}"]
        found = hicom.pool(features, logits, windows.members)
        np.testing.assert_allclose(found.view(wanted.shape), wanted, atol=1e-5)


@given(st.integers(1, 40), st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_windows_of_a_kernel_cover_the_axis(length: int, kernel: int) -> None:
    starts, size = axis_windows(length, kernel)
    assert len(starts) == -(-length // kernel)
    assert size == min(kernel, length)
    assert starts[0] == 0
    assert starts[-1] + size == length
    assert (starts.diff() > 0).all()
    assert (starts.diff() <= size).all()


@given(st.integers(1, 40), st.data())
@settings(max_examples=100, deadline=None)
def test_windows_of_a_count_cover_the_axis(length: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, length))
    starts, size = axis_windows(length, count=count)
    assert len(starts) == count
    assert starts[-1] + size == length
    assert (starts.diff() > 0).all()
    assert (starts.diff() >= size - 1).all()  # at most one shared: HICom's rule holds for every count


@pytest.mark.parametrize(
    ("length", "expected"), [(5, [0, 1]), (6, [0, 2]), (9, [0, 2, 5]), (2, [0]), (3, [0]), (7, [0, 3]), (8, [0, 4])]
)
def test_lengths_at_which_the_official_split_fails(length: int, expected: list[int]) -> None:
    assert axis_windows(length, 4)[0].tolist() == expected


@given(sides, sides, sides, st.data())
@settings(max_examples=60, deadline=None)
def test_as_many_windows_as_asked_for(frames: int, height: int, width: int, data: st.DataObject) -> None:
    total = frames * height * width
    count = data.draw(st.integers(1, total))
    windows = Windows.of_count(video(frames, height, width), count)
    assert len(windows) == count
    assert len(set(windows.middle.tolist())) == count
    assert (windows.members == windows.middle[:, None]).any(1).all()
    assert windows.members[windows.members >= 0].unique().tolist() == list(range(total))
    for members in windows.members:
        there = members[members >= 0].tolist()
        assert there == sorted(set(there))


def test_the_default_gives_the_published_windows_and_so_does_the_preset() -> None:
    for frames, side in ((32, 27), (8, 9), (4, 3)):
        shape = video(frames, side, side)
        published = Windows.of_kernel(shape, 4, 3)
        assert len(published) == (frames // 4) * (side // 3) ** 2
        count = vlmprune.HIComLocal().budget([len(shape)])[0]
        found = Windows.of_count(shape, count)
        assert torch.equal(found.members, published.members)
        assert torch.equal(found.middle, published.middle)
    preset = vlmprune.HIComLocal.preset("local43")
    assert isinstance(preset, vlmprune.HIComLocal)
    assert preset.kernel == (4, 3)
    assert len(Windows.of_kernel(video(32, 27, 27), 4, 3)) == 648


@given(sides, sides, sides, st.integers(1, 5), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_the_count_follows_from_the_grid(frames: int, height: int, width: int, time: int, side: int) -> None:
    windows = Windows.of_kernel(video(frames, height, width), time, side)
    assert len(windows) == -(-frames // time) * -(-height // side) * -(-width // side)
    image = Windows.of_kernel(Geometry.grid(height, width, planes=frames), time, side)
    assert len(image) == frames * -(-height // side) * -(-width // side), "an image's pictures are not frames"


@given(st.integers(0, 2**16), st.integers(1, 30))
@settings(max_examples=30, deadline=None)
def test_rows_lie_among_their_window_s(seed: int, count: int) -> None:
    shape = video(3, 4, 5)
    features, logits = rows(60, 7, seed=seed), 3 * rows(60, seed=seed + 1)
    members = Windows.of_count(shape, count).members
    found = hicom.pool(features, logits, members)
    for row, window in zip(found, members):
        inside = features[window[window >= 0]]
        assert (row <= inside.amax(0) + 1e-5).all()
        assert (row >= inside.amin(0) - 1e-5).all()
        weights = logits[window[window >= 0]].softmax(0)
        torch.testing.assert_close(row, (weights[:, None] * inside).sum(0), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
    constant = hicom.pool(torch.full((60, 7), 2.5), logits, members)
    torch.testing.assert_close(constant, torch.full_like(constant, 2.5))
    means = hicom.pool(features, torch.zeros(60), members)
    torch.testing.assert_close(means[0], features[members[0][members[0] >= 0]].mean(0), atol=1e-5, rtol=1e-5)
    order = torch.randperm(members.shape[1], generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(hicom.pool(features, logits, members[:, order]), found, atol=1e-5, rtol=1e-5)


def test_windows_in_blocks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    features, logits, members = rows(60, 7), rows(60, seed=1), Windows.of_count(video(3, 4, 5), 11).members
    whole = hicom.pool(features, logits, members)
    monkeypatch.setattr(hicom, "BLOCK", 100)
    torch.testing.assert_close(hicom.pool(features, logits, members), whole)


def test_no_question_is_the_mean_and_a_loud_one_its_token() -> None:
    shape, features = Geometry.grid(4, 4), rows(16, 6)
    pruner, budget = vlmprune.HIComLocal(keep=4), torch.tensor([4])
    quiet = pruner.select(asked(features, shapes=[shape], guide=torch.zeros(6)), budget)
    block = features.view(2, 2, 2, 2, 6).mean((1, 3)).view(4, 6)
    torch.testing.assert_close(quiet.features[0], block)
    assert quiet.index.tolist() == [[0, 2, 8, 10]]
    loud = pruner.select(asked(features, shapes=[shape], guide=1e4 * features[5]), budget)
    torch.testing.assert_close(loud.features[0, 0], features[5])
    assert not torch.equal(loud.features, quiet.features)


def test_line_breaks_stay_only_where_there_is_room() -> None:
    shape = Geometry.grid(2, 3, suffix=2)
    features = rows(8, 5)
    for keep, breaks in ((4, 0), (6, 0), (7, 1), (3, 0)):
        found = vlmprune.HIComLocal(keep=keep).select(asked(features, shapes=[shape]), torch.tensor([keep]))
        assert int((found.index >= 6).sum()) == breaks
        assert len(set(found.index[0].tolist())) == keep
        assert torch.equal(found.features[found.index >= 6], features[6 : 6 + breaks])
        assert not found.merged[found.index >= 6].any()


def test_given_relevance_takes_the_place_of_the_question() -> None:
    shapes, features = [Geometry.grid(4, 4), video(2, 3, 3)], [rows(16, 6), rows(18, 6, seed=1)]
    guide = rows(6, seed=4)
    padded = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)
    cosines = torch.nn.functional.cosine_similarity(padded, guide, dim=-1)
    budget, tokens = torch.tensor([4, 4]), tokens_of(*features, shapes=shapes)
    found = vlmprune.HIComLocal(keep=4, scale=3.0, relevance=cosines).select(tokens, budget)
    plain = vlmprune.HIComLocal(keep=4, scale=3.0).select(asked(*features, shapes=shapes, guide=guide), budget)
    torch.testing.assert_close(found.features, plain.features)
    assert vlmprune.HIComLocal(scale=3.0, relevance=cosines).needs == frozenset()
    with pytest.raises(ValueError, match=r"hicom_local's relevance must be \[2, 18\]"):
        vlmprune.HIComLocal(keep=4, scale=3.0, relevance=cosines[:, 1:]).select(tokens, budget)


def test_the_question_changes_what_the_model_sees() -> None:
    family = FAMILIES["llava-onevision"]
    model = model_of(family)
    seen, given_rows = [], []
    for question in ([3, 4, 5], [6, 7, 8]):
        inputs = family.inputs([[1, 2, ("video", 0), *question]])
        pruner = vlmprune.HIComLocal(kernel=(2, 2))
        with vlmprune.prune(model, pruner) as session, Recorded(pruner) as calls:
            generate(model, inputs, max_new_tokens=2)
        (item,) = session.last.items
        seen.append((item.kept.tolist(), item.tokens_after))
        given_rows.append(calls[0][1].features)
    assert (given_rows[0] - given_rows[1]).abs().max() > 1e-3
    shape = item.geometry
    frames, (height, width) = len(shape.grids), shape.grids[0]
    assert seen[0] == seen[1], "the windows do not depend on the question"
    assert seen[0][1] == -(-frames // 2) * -(-height // 2) * -(-width // 2)


def test_batches_with_tiles_in_scope_and_out() -> None:
    family = FAMILIES["llava-next"]
    model, inputs = model_of(family), family.inputs(BATCHES["three"])
    for pruner in (
        vlmprune.HIComLocal(keep=5),
        vlmprune.PerTile(vlmprune.HIComLocal(keep=5)),
        vlmprune.HIComLocal.preset("local43"),
    ):
        with vlmprune.prune(model, pruner) as session:
            generate(model, inputs, max_new_tokens=2)
        assert session.last.changed
        if not isinstance(pruner, vlmprune.HIComLocal) or pruner.kernel is None:
            assert {item.tokens_after for item in session.last.items} == {5}


def test_places_are_the_published_table() -> None:
    wanted = GOLDEN["pos3d_4_3_5_12"]
    frame, row, col = (each.flatten() for each in torch.meshgrid(*map(torch.arange, (4, 3, 5)), indexing="ij"))
    found = hicom.places_3d(frame, row, col, 12).view(wanted.shape)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.fixture
def modules() -> hicom.HIComModules:
    torch.manual_seed(0)
    return hicom.HIComModules(6, width=8, queries=5, heads=2).eval().requires_grad_(False)


def test_the_guide_reads_words_and_nothing_behind_them(modules: hicom.HIComModules) -> None:
    words, real = rows(3, 4, 6), torch.tensor([[True] * 4, [True, True, False, False], [False] * 4])
    guide = modules.read(words, real)
    assert guide[2].eq(0).all(), "without words no guide"
    torch.testing.assert_close(modules.read(words[1:2, :2], real[1:2, :2])[0], guide[1])
    changed = words.clone()
    changed[1, 2:] += 5
    torch.testing.assert_close(modules.read(changed, real)[1], guide[1])
    swapped = modules.read(words[:1].flip(1), real[:1])[0]
    assert (swapped - guide[0]).abs().max() > 1e-3, "words have an order"
    assert modules.read(words[:, :0], real[:, :0]).shape == (3, 8)


def test_global_tokens_differ_and_listen(modules: hicom.HIComModules) -> None:
    """The official builder makes them all alike, blind to the question."""
    features, places = rows(12, 6), hicom.places_3d(*torch.zeros(3, 12, dtype=torch.int64), 8)
    first, second = (modules.summary(features, places, rows(8, seed=seed), 5) for seed in (1, 2))
    gaps = (first[:, None] - first).abs().amax(2) + torch.eye(5)
    assert gaps.min() > 1e-3
    assert (first - second).abs().amax(1).min() > 1e-3
    moved = modules.summary(features, hicom.places_3d(*torch.arange(36).view(3, 12), 8), rows(8, seed=1), 5)
    assert (moved - first).abs().max() > 1e-3, "places have a say"


def test_untrained_windows_are_pooled_by_the_learned_logits(modules: hicom.HIComModules) -> None:
    shape, features = Geometry.grid(4, 6), rows(24, 6)
    tokens = asked(features, shapes=[shape])
    pruner = vlmprune.HICom(keep=12, weights=modules)
    found = pruner.select(tokens, torch.tensor([12]))
    guide = modules.read(tokens.signal("instruction"), tokens.signal("instruction_mask"))
    logits = hicom.scaled_dot(modules.embeddings(features), guide[0])
    windows = Windows.of_count(shape, 9)
    torch.testing.assert_close(found.features[0, :9], hicom.pool(features, logits, windows.members))
    assert found.index[0, :9].tolist() == windows.middle.tolist()
    last = found.index[0, 9:].tolist()
    assert last == [each for each in range(24) if each not in windows.middle.tolist()][-3:]
    assert found.merged[0, 9:].all()


def test_how_many_are_global(modules: hicom.HIComModules) -> None:
    shape, features = Geometry.grid(6, 6), rows(36, 6)
    for keep, wanted in ((1, 0), (3, 0), (4, 1), (19, 4), (20, 5), (35, 5)):
        found = vlmprune.HICom(keep=keep, weights=modules).select(asked(features, shapes=[shape]), torch.tensor([keep]))
        assert len(set(found.index[0].tolist())) == keep
        windows = Windows.of_count(shape, keep - wanted)
        assert found.index[0, : keep - wanted].tolist() == windows.middle.tolist()
    kernel = vlmprune.HICom(kernel=(4, 3), weights=modules)
    found = kernel.select(asked(features, shapes=[shape]), torch.tensor([36]))
    assert found.index.shape == (1, 4 + 5)
    tight = vlmprune.HICom(kernel=(1, 1), weights=modules).select(asked(features, shapes=[shape]), torch.tensor([36]))
    assert sorted(tight.index[0].tolist()) == list(range(36)), "no room for global ones"


def test_gradients_reach_every_module() -> None:
    torch.manual_seed(0)
    modules = hicom.HIComModules(6, width=8, queries=2, heads=2)
    torch.nn.init.normal_(modules.local[2].weight)
    tokens = asked(rows(16, 6), shapes=[Geometry.grid(4, 4)])
    found = vlmprune.HICom(keep=8, weights=modules).select(tokens, torch.tensor([8]))
    found.features.square().sum().backward()
    assert not [name for name, each in modules.named_parameters() if each.grad is None or not each.grad.any()]


def test_save_and_load(modules: hicom.HIComModules, tmp_path: Path) -> None:
    modules.save(tmp_path, model={"model_type": "llava"})
    again = hicom.HIComModules.load(tmp_path)
    assert (again.hidden, again.width, again.queries, again.heads) == (6, 8, 5, 2)
    for name, value in modules.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, atol=1e-3, rtol=1e-3)
    tokens, budget = asked(rows(24, 6), shapes=[Geometry.grid(4, 6)]), torch.tensor([9])
    found, read = (vlmprune.HICom(keep=9, weights=each).select(tokens, budget) for each in (modules, tmp_path))
    torch.testing.assert_close(found.features, read.features, atol=1e-2, rtol=1e-2)


@pytest.fixture(scope="module")
def training() -> Any:
    return trainers.trainer("condense")


def test_the_answer_is_no_part_of_the_question() -> None:
    """In training the prompt goes on with the answer: were it read, the modules would learn to pass it on."""
    family = FAMILIES["llava-clip-llama"]
    model = model_of(family)
    prompts = [[1, ("image", 0), 2, 3, 4], [5, ("image", 1), 7, 8, 9, 9]]
    answer = torch.tensor([[11, 12], [13, 14]])
    inputs = family.inputs(prompts)
    full = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], answer], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(answer)], 1),
        "labels": torch.cat([torch.full_like(inputs["input_ids"], -100), answer], 1),
    }
    pruner, given_rows = vlmprune.HIComLocal(keep=6, scale=3.0), []
    for call in (inputs, full, {**full, "labels": torch.full_like(full["labels"], -100)}):
        with torch.no_grad(), vlmprune.prune(model, pruner), Recorded(pruner) as calls:
            model(**call)
        given_rows.append(calls[0][1].features)
    torch.testing.assert_close(given_rows[1], given_rows[0])
    assert (given_rows[2] - given_rows[0]).abs().max() > 1e-4


@pytest.mark.parametrize("method", ["hicom", "vqtoken"])
def test_training_learns(training: Any, method: str, tmp_path: Path) -> None:
    """The loss on one batch falls, what is saved is what was trained, and only the modules changed."""
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    run = training.Settings(
        method=method, out=tmp_path, scenes=(2, 1), steps=2, batch=6, shares=(0.25,), width=16, rate=1e-2
    )
    torch.manual_seed(1)
    model, processor = trainers.trainer("questions").load(None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = training.MODULES[method](128, width=16)
    pruner = vlmprune.create_pruner(method, keep=0.25, weights=modules)
    inputs = trainers.batch(processor, 6, seed=3)
    condensed = training.Condensed(model.requires_grad_(False), modules)
    optimizer = torch.optim.Adam(modules.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        parts = condensed(inputs, pruner)
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
        losses.append(parts["loss"].item())
    assert losses[-1] < 0.7 * losses[0]
    assert parts["right"].shape == (6,)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    finished = training.train(run)
    again = training.MODULES[method].load(tmp_path)
    for name, value in finished.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, atol=1e-2, rtol=1e-2)
    with pytest.raises(ValueError, match=r"method must be one of hicom, vqtoken"):
        training.train(training.Settings(method="fastv"))


@pytest.mark.parametrize(("data", "keep"), [(None, 9), ("digit-clips", 0.2)])
def test_the_trainer_counts_what_generate_says(training: Any, data: str | None, keep: float) -> None:
    """Right by teacher forcing is right by greedy decoding, for scenes and for clips."""
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    asking = trainers.trainer("questions")
    model, processor = asking.load(None, data)
    questions = asking.Questions(data, "validation", 2, 5)
    samples = [questions[i] for i in range(8)]
    pruner = vlmprune.create_pruner("uniform", keep=keep)
    with torch.no_grad():
        right = training.Condensed(model, None)(asking.collate(processor, samples), pruner)["right"]
    said = []
    for picture, question, answer in samples:
        shown = ([], [picture]) if data else ([picture], [])
        inputs = prompt_inputs(processor, question, *shown)
        with vlmprune.prune(model, pruner):
            ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        reply = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        said.append(reply.strip() == answer)
    assert right.tolist() == said
    assert 0 < sum(said) < len(said), "a setting that tells both cases apart"


def test_a_file_of_pictures_and_clips_to_train_on(tmp_path: Path) -> None:
    pytest.importorskip("av")
    from videos import picture, write

    asking = trainers.trainer("questions")
    Image.fromarray(picture(3)).save(tmp_path / "a.png")
    write(tmp_path / "b.mp4", frames=20)
    rows = [
        {"image": "a.png", "question": "What?", "answer": "3"},
        {"video": "b.mp4", "question": "Who?", "answer": "4"},
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in [*rows] * 6))
    data = asking.Questions(str(tmp_path / "data.jsonl"))
    held = asking.Questions(str(tmp_path / "data.jsonl"), "validation")
    assert (len(data), len(held)) == (10, 2)
    (clip, *asked), (image, *_) = data[0], data[1]
    assert asked == ["Who?", "4"]
    assert (len(clip), image.size) == (16, (128, 96))


def test_errors_of_the_trained_form() -> None:
    with pytest.raises(ValueError, match=r"hicom needs kernel=\(frames, rows and columns\)"):
        vlmprune.create_pruner("hicom", weights=random_weights.hicom(), kernel=(0, 1))
    tokens = asked(rows(16, 6), shapes=[Geometry.grid(4, 4)])
    with pytest.raises(ValueError, match="for a language model of width 48, this one has 6"):
        vlmprune.create_pruner("hicom", weights=random_weights.hicom()).select(tokens, torch.tensor([4]))


def test_errors() -> None:
    for kernel in ((0, 3), (4,), 3, (4.0, 3), "43"):
        with pytest.raises(ValueError, match=r"hicom_local needs kernel=\(frames, rows and columns\)"):
            vlmprune.HIComLocal(kernel=kernel)
    with pytest.raises(ValueError, match="set scale= as well"):
        vlmprune.HIComLocal(relevance=torch.ones(1, 4))
    with pytest.raises(ValueError, match="hicom_local publishes 'local43' with 648"):
        vlmprune.HIComLocal.preset("local44")
    holes = Geometry.grid(3, 3).take(torch.tensor([0, 2, 3, 4, 5, 6, 7, 8]))
    with pytest.raises(ValueError, match="before methods that cut them"):
        Windows.of_count(holes, 2)

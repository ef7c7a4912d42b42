"""Explainability-guided compression: relevance, labels, the mapper, and both selectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trainers
from fakes import picks, rows, tokens_of
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from test_laws import model_of

import vlmprune
from vlmprune import Geometry
from vlmprune.pruners import explain


def maps(layers: int, batch: int = 2, heads: int = 3, length: int = 9, seed: int = 0) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    attention = [torch.rand(batch, heads, length, length, generator=generator).tril() for _ in range(layers)]
    return [a / a.sum(-1, keepdim=True) for a in attention], [
        torch.randn(batch, heads, length, length, generator=generator) for _ in range(layers)
    ]


@given(st.integers(0, 2**16), st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_the_row_is_a_row_of_the_whole_relevance_map(seed: int, layers: int) -> None:
    attention, gradients = maps(layers, seed=seed)
    whole = torch.eye(9).expand(2, -1, -1)
    for a, d in zip(attention, gradients):
        whole = whole + (a * d).relu().mean(1) @ whole
    row = torch.tensor([8, 5])
    found = explain.relevance_row(attention, gradients, row)
    torch.testing.assert_close(found, whole[torch.arange(2), row], atol=1e-5, rtol=1e-5)
    assert (found >= 0).all()


def test_one_layer_and_no_gradient() -> None:
    attention, gradients = maps(1)
    row = torch.tensor([8, 8])
    found = explain.relevance_row(attention, gradients, row)
    once = (attention[0] * gradients[0]).relu().mean(1)[:, 8]
    torch.testing.assert_close(found[:, :8], once[:, :8])
    nothing = explain.relevance_row(attention, [torch.zeros_like(gradients[0])], row)
    assert torch.equal(nothing, torch.nn.functional.one_hot(row, 9).float())


@given(st.integers(0, 2**16), st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_labels(seed: int, count: int) -> None:
    relevance = torch.rand(2, 9, generator=torch.Generator().manual_seed(seed))
    valid = torch.arange(9) < torch.tensor([[9], [count]])
    label = explain.labels(relevance * valid, valid)
    torch.testing.assert_close(label.sum(1), torch.ones(2))
    assert (label[~valid] == 0).all()
    for row, n in zip(label, (9, count)):
        assert int((row > 0).sum()) <= (n + 1) // 2
    cut = relevance[0][label[0] == 0].max() if n > 1 else 0
    assert (relevance[0][label[0] > 0] >= cut).all()
    alone = explain.labels(torch.zeros(1, 4), torch.tensor([[True, True, True, False]]))
    torch.testing.assert_close(alone, torch.tensor([[1, 1, 1, 0]]) / 3)


def test_divergence_is_zero_only_between_equals() -> None:
    valid = torch.arange(9) < torch.tensor([[9], [5]])
    logits = rows(2, 9)
    label = logits.masked_fill(~valid, -torch.inf).softmax(1)
    assert explain.divergence(label, logits, valid).abs() < 1e-6
    assert explain.divergence(label, logits + 3, valid).abs() < 1e-6
    assert explain.divergence(label, 2 * logits, valid) > 1e-3
    assert explain.divergence(explain.labels(label, valid), logits, valid) > 1e-3


@pytest.mark.parametrize("counts", [(1,), (5, 9), (144, 37, 2)])
def test_the_mapper_takes_any_number_of_tokens_and_each_item_alone(counts: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    mapper = explain.Mapper((4, 6)).eval()
    attention = torch.rand(len(counts), max(counts))
    valid = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    both = mapper(attention, valid)
    torch.testing.assert_close(mapper(7 * attention, valid), both)  # scale-free
    for row, count in enumerate(counts):
        alone = mapper(attention[row : row + 1, :count], valid[row : row + 1, :count])
        torch.testing.assert_close(alone[0], both[row, :count])
        assert (both[row, count:] == 0).all()


def test_published_mapper() -> None:
    mapper = explain.Mapper()
    assert len(mapper.deep) == 5
    assert [each.out_channels for each in mapper.point] == [32, 64, 128, 256, 512]
    assert all(deep.groups == deep.in_channels for deep in mapper.deep)


def items(counts: tuple[int, ...] = (25, 9), words: int = 4, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    sides = {25: (5, 5), 9: (3, 3)}
    text = torch.rand(len(counts), words, max(counts), generator=generator)
    mask = torch.ones(len(counts), words, dtype=torch.bool)
    mask[-1, 2:] = False
    return tokens_of(
        *(rows(count, 8, seed=seed) for count in counts),
        shapes=[Geometry.grid(*sides[count]) for count in counts],
        next_text_attention=text,
        text_mask=mask,
        next_last_attention=torch.rand(len(counts), max(counts), generator=generator),
    )


def test_first_layer_attention_is_the_mean_over_the_text() -> None:
    tokens = items()
    text = tokens.signal("next_text_attention")
    kept = picks(vlmprune.FirstLayerAttention().select(tokens, torch.tensor([7, 4])))
    assert kept[0] == sorted(text[0].mean(0).topk(7).indices.tolist())
    assert kept[1] == sorted(text[1, :2, :9].mean(0).topk(4).indices.tolist())
    smooth = picks(vlmprune.FirstLayerAttention(smooth=5).select(tokens, torch.tensor([7, 4])))
    row = text[1, :2, :9].mean(0)
    means = torch.stack([row[max(0, j - 2) : j + 3].mean() for j in range(9)])
    assert smooth[1] == sorted(means.topk(4).indices.tolist())


def test_without_text_behind_the_image_the_last_row_speaks() -> None:
    tokens = items()
    tokens.signal("text_mask")[:] = False
    kept = picks(vlmprune.FirstLayerAttention().select(tokens, torch.tensor([7, 4])))
    last = tokens.signal("next_last_attention")
    assert kept == [sorted(last[0].topk(7).indices.tolist()), sorted(last[1, :9].topk(4).indices.tolist())]


def test_equal_attention_keeps_the_first() -> None:
    tokens = items()
    tokens.signal("next_text_attention")[:] = 0.01
    assert picks(vlmprune.FirstLayerAttention().select(tokens, torch.tensor([3, 2]))) == [[0, 1, 2], [0, 1]]


def test_budget_rounds_half_up_and_keeps_one() -> None:
    for cls, fields in ((vlmprune.FirstLayerAttention, {}),):
        assert cls(keep=0.5, **fields).budget([25, 9, 1, 144]) == [13, 5, 1, 72]
        assert cls(keep=0.001, **fields).budget([25]) == [1]
        assert cls(keep=1.0, **fields).budget([25, 9]) == [25, 9]
        assert cls(keep=12, **fields).budget([25, 9]) == [12, 9]


def test_save_load_and_select(tmp_path: Path) -> None:
    torch.manual_seed(1)
    mapper = explain.Mapper((4, 6)).eval()
    mapper.save(tmp_path, model={"model_type": "llava"})
    again = explain.Mapper.load(tmp_path)
    for name, value in mapper.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, atol=1e-3, rtol=1e-3)
    tokens, pruner = items(), vlmprune.Explain(weights=tmp_path)
    kept = picks(pruner.select(tokens, torch.tensor([7, 4])))
    text = tokens.signal("next_text_attention")[0].mean(0, keepdim=True)
    logits = again(text, torch.ones(1, 25, dtype=torch.bool))[0]
    assert kept[0] == sorted(logits.topk(7).indices.tolist())
    assert len(kept[1]) == 4
    assert max(kept[1]) < 9


def test_errors() -> None:
    for smooth in (0, 2, True, 1.5):
        with pytest.raises(ValueError, match="smooth must be an odd"):
            vlmprune.create_pruner("first_layer_attention", smooth=smooth)


@pytest.fixture(scope="module")
def training() -> Any:
    return trainers.trainer("explain")


def test_what_the_trainer_reads_is_what_the_session_reads(training: Any, tmp_path: Path) -> None:
    """The mapper's input in training, from a whole first-layer map, ranks tokens as the boundary does."""
    family = FAMILIES["llava-clip-llama"]
    model = model_of(family, "eager")
    inputs = family.inputs([[1, ("image", 0), 2, 3, 4], [5, 6, ("image", 1), 7, 8, 9, 9]])
    answer = torch.tensor([[11, 12], [13, -100]])
    full = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], answer.clamp(min=0)], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], (answer >= 0).long()], 1),
        "labels": torch.cat([torch.full_like(inputs["input_ids"], -100), answer], 1),
    }
    kept = training.Maps(model)
    found, seen, _ = training.relevance(model, kept, full)
    kept.remove()
    assert (found >= 0).all()
    with torch.no_grad(), vlmprune.prune(model, "first_layer_attention", keep=6) as session:
        model(**inputs)
    for item in session.last.items:
        row = seen[item.sample, item.start : item.start + item.tokens_before]
        assert item.kept.tolist() == sorted(row.topk(6).indices.tolist())
    assert found[:, full["labels"].shape[1] - 1].max() == 0  # the last column predicts nothing


def test_training_learns(training: Any, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    run = training.Settings(out=tmp_path, scenes=(4, 2), label_batch=12, epochs=2, batch=8, channels=(4, 4))
    mapper = training.train(run)
    again = explain.Mapper.load(tmp_path)
    assert again.channels == mapper.channels == (4, 4)

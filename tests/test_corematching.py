"""CoreMatching's token half against its official vectors, and the properties that its specification asks for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cases import BATCHES
from fakes import picks, rows, tokens_of
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from test_laws import model_of

import vlmprune
from vlmprune.pruners.corematching import co_activation, elbow_indices, elbow_value

shapes = st.tuples(st.integers(1, 30), st.integers(1, 24), st.integers(0, 2**16))


def test_golden() -> None:
    data = np.load(Path(__file__).parent / "golden" / "corematching_elbow.npz")
    activations = torch.from_numpy(data["activations"])
    visual = activations[int(data["lo"]) : int(data["hi"])]
    scores = co_activation(visual, activations[int(data["query_row"])])
    assert scores.tolist() == data["scores"].tolist()
    index, value = elbow_value(scores)
    assert int(index) == int(data["elbow_index"])
    assert float(value) == float(data["elbow_value"])
    assert elbow_indices(scores).sort().values.tolist() == data["kept"].tolist()
    pruner = vlmprune.CoreMatching(elbow=True)
    tokens = tokens_of(visual.float(), layer=9, depth=32, activation_overlap=scores[None])
    assert pruner.budget([40], 9, 32) == [None]
    assert picks(pruner.select(tokens, torch.tensor([40]))) == [data["kept"].tolist()]


@settings(max_examples=50, deadline=None)
@given(shapes)
def test_co_activation(shape) -> None:
    count, neurons, seed = shape
    x, query = rows(count, neurons, seed=seed), rows(neurons, seed=seed + 1)
    score = co_activation(x, query)
    own = float((query > 0).sum())
    assert score.tolist() == [float(((row > 0) & (query > 0)).sum()) for row in x]
    assert (score <= own).all()
    assert co_activation(torch.cat([x, query[None]]), query)[-1] == own
    silent = torch.nn.functional.pad(x, (0, 3), value=-1.0), torch.nn.functional.pad(query, (0, 3), value=1.0)
    assert torch.equal(co_activation(*silent), score)
    gate, up = rows(count, neurons, seed=seed + 2), rows(count, neurons, seed=seed + 3)
    assert torch.equal(co_activation(gate * up, query), co_activation(-gate * -up, query))


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ([9.0, 1.0, 9.0, 1.0, 1.0, 1.0, 1.0, 9.0], [0, 2, 7]),  # two levels: exactly the upper one
        ([5.0, 4.0, 3.0, 2.0, 1.0], [0]),  # a straight line: nothing lies above its first point
        ([2.0] * 40, [0, 1]),  # all equal: 5 %
        ([7.0], [0]),
    ],
)
def test_elbow(scores: list[float], kept: list[int]) -> None:
    assert elbow_indices(torch.tensor(scores)).sort().values.tolist() == kept


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=2, max_size=60))
def test_elbow_is_the_farthest_from_the_chord(scores: list[int]) -> None:
    y = sorted(scores, reverse=True)
    chord = np.array([len(y) - 1, y[-1] - y[0]], float)
    far = [abs(i * chord[1] - (v - y[0]) * chord[0]) / np.linalg.norm(chord) for i, v in enumerate(y)]
    index, value = elbow_value(torch.tensor(scores, dtype=torch.float32))
    assert far[int(index)] == pytest.approx(max(far))
    assert float(value) == y[int(index)]


def test_budgets_and_items_apart() -> None:
    pruner = vlmprune.CoreMatching()
    assert pruner.layers(32) == (9,)
    assert pruner.budget([576], 9, 32) == [230]
    assert pruner.layers(28) == (8,)
    assert vlmprune.CoreMatching(elbow=True, keep=1.0).budget([576], 9, 32) == [576]
    assert vlmprune.CoreMatching(elbow=True, keep=1).budget([576, 1], 9, 32) == [None, 1]
    overlap = [torch.tensor([3.0, 9.0, 9.0, 3.0, 3.0]), torch.tensor([1.0, 1.0, 8.0])]
    tokens = tokens_of(rows(5, 4), rows(3, 4), layer=1, activation_overlap=overlap)
    assert picks(pruner.select(tokens, torch.tensor([3, 1]))) == [[0, 1, 2], [2]]
    assert picks(vlmprune.CoreMatching(elbow=True).select(tokens, torch.tensor([5, 3]))) == [[1, 2], [2]]
    core = tokens_of(rows(5, 4), layer=1, core_overlap=[torch.tensor([1.0, 5.0, 2.0, 4.0, 3.0])])
    assert picks(vlmprune.CoreMatching(match="core").select(core, torch.tensor([2]))) == [[1, 3]]
    with pytest.raises(ValueError, match=r'match is "word" or "core"'):
        vlmprune.CoreMatching(match="all")


@pytest.mark.parametrize("name", ["llava-clip-llama", "qwen2.5-vl"])
def test_on_a_model(name: str) -> None:
    """The tokens kept are those whose activations in the plain model overlap the last word's most."""
    family = FAMILIES[name]
    model, inputs = model_of(family), family.inputs(BATCHES["one"])
    seen: list[torch.Tensor] = []
    hook = model.model.language_model.layers[0].mlp.down_proj.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    with torch.no_grad():
        model(**inputs)
        hook.remove()
        with vlmprune.prune(model, "corematching", keep=0.6) as session:
            model(**inputs)
        with vlmprune.prune(model, "corematching", elbow=True) as adaptive:
            model(**inputs)
    (item,) = session.last.items
    score = co_activation(seen[0][0, item.start : item.start + item.tokens_before], seen[0][0, -1])
    best = score.sort(descending=True, stable=True).indices[: len(item.stages[0].kept)]
    assert best.sort().values.tolist() == item.stages[0].kept.tolist()
    assert adaptive.last.items[0].stages[0].kept.tolist() == elbow_indices(score).sort().values.tolist()

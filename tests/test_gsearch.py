"""G-Search and P-Sigmoid: the schedules, the searches, and the pruners that follow them."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from cases import BATCHES
from fakes import picks, rows, tokens_of
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from test_laws import model_of

import vlmprune
from vlmprune import bundled
from vlmprune.pruners.gsearch import Schedule, sigmoid_ratios
from vlmprune.search import KLQuality, calibrate, greedy_search, tune_sigmoid

LLAVA = FAMILIES["llava-clip-llama"]


@settings(max_examples=80, deadline=None)
@given(st.integers(3, 48), st.floats(0.1, 1.0), st.floats(2, 200), st.floats(0, 0.5))
def test_sigmoid(depth: int, keep: float, kappa: float, floor: float) -> None:
    if keep * depth < 2:
        with pytest.raises(ValueError, match="first 2 of"):
            sigmoid_ratios(depth, keep, kappa=kappa, floor=floor)
        return
    ratios = sigmoid_ratios(depth, keep, kappa=kappa, floor=floor)
    assert ratios[:2] == (1, 1)
    assert all(1 >= a >= b >= 0 for a, b in itertools.pairwise(ratios))
    assert sum(ratios) / depth == pytest.approx(keep, abs=1e-6)
    # A lower budget never gives a layer more.
    lower = max(keep - 0.1, 2 / depth)
    less = sigmoid_ratios(depth, lower, kappa=kappa, floor=floor)
    assert all(a <= b + 1e-9 for a, b in zip(less, ratios))


def test_sigmoid_between_a_step_and_a_constant() -> None:
    steep = sigmoid_ratios(32, 0.5, kappa=1e4, floor=0.0)
    assert sum(0.01 < ratio < 0.99 for ratio in steep) <= 1
    flat = sigmoid_ratios(32, 0.5, kappa=1e-6, floor=0.0)
    assert max(flat[2:]) - min(flat[2:]) < 1e-4
    assert sigmoid_ratios(4, 0.5) == (1, 1, 0, 0)
    assert sigmoid_ratios(32, 1.0) == (1,) * 32


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 600), st.floats(0.15, 1.0))
def test_realised_average(count: int, keep: float) -> None:
    pruner = vlmprune.PSigmoid(keep=keep)
    left = [pruner.budget([count], layer, 32)[0] for layer in range(32)]
    assert all(a >= b >= 1 for a, b in itertools.pairwise(left))
    assert abs(sum(left) / 32 - keep * count) < 1
    assert vlmprune.PSigmoid(keep=1.0).budget([count], 31, 32) == [count]
    assert vlmprune.PSigmoid(keep=count).budget([count], 31, 32) == [count]


def test_bad_values() -> None:
    for wrong in ({"kappa": 0.0}, {"kappa": math.nan}, {"floor": 2.0}, {"start": 0}):
        with pytest.raises(ValueError, match="psigmoid needs kappa > 0"):
            vlmprune.PSigmoid(**wrong)
    with pytest.raises(ValueError, match='query is "text" or "last"'):
        vlmprune.PSigmoid(query="all")
    with pytest.raises(ValueError, match="gsearch needs a schedule"):
        vlmprune.create_pruner("gsearch", keep=0.5)
    for ratios in ((), (0.5, 0.4), (1.0, 0.4, 0.5), (1.0, -0.1), (1.0, math.nan)):
        with pytest.raises(ValueError, match="one ratio for each decoder layer"):
            Schedule(ratios)
    with pytest.raises(ValueError, match="for a language model of 4 layers, this one has 3"):
        vlmprune.prune(model_of(LLAVA), vlmprune.GSearch(schedule=Schedule((1, 1, 0.5, 0.5))))


def test_schedule_file(tmp_path: Path) -> None:
    schedule = Schedule((1, 1, 0.5, 0.25), {"model": "digit-llava", "seed": 0})
    schedule.save(tmp_path / "schedule.json")
    assert Schedule.load(tmp_path / "schedule.json") == schedule
    pruner = vlmprune.create_pruner("gsearch", schedule=str(tmp_path / "schedule.json"))
    assert pruner.keep == schedule.average == 0.6875
    assert pruner.layers(4) == (2, 3)
    assert [pruner.budget([9], layer, 4) for layer in (2, 3)] == [[4], [2]]
    assert [pruner.budget([1], layer, 4) for layer in (2, 3)] == [[1], [1]]
    zero = Schedule((1, 1, 0.5, 0.0))
    assert vlmprune.GSearch(schedule=zero).budget([8], 3, 4) == [1]
    assert vlmprune.GSearch(schedule=zero, allow_zero=True).budget([8], 3, 4) == [0]
    # Another average: the ratios to a common power.
    other = vlmprune.GSearch(schedule=schedule, keep=0.55)
    left = [other.budget([400], layer, 4)[0] for layer in (2, 3)]
    assert (800 + sum(left)) / 4 == pytest.approx(220, abs=1)
    assert left[1] < left[0] < 200
    for text in ("", "[1, 2]", '{"ratios": [0.5]}', '{"meta": {}}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="holds no schedule"):
            Schedule.load(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="holds no schedule"):
        vlmprune.GSearch(schedule=tmp_path / "missing.json")


def test_ranks_by_the_text_or_the_last_token() -> None:
    attention = torch.tensor(
        [[[0.1, 0.4, 0.2, 0.1], [0.1, 0.1, 0.4, 0.3]], [[0.3, 0.1, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]]
    )
    tokens = tokens_of(
        rows(4, 3), rows(2, 3), layer=2, text_attention=attention, last_attention=attention[:, 1] + attention[:, 0] / 9
    )
    budget = torch.tensor([2, 1])
    assert picks(vlmprune.PSigmoid().select(tokens, budget)) == [[1, 2], [0]]
    assert picks(vlmprune.PSigmoid(query="last").select(tokens, budget)) == [[2, 3], [0]]


def test_a_step_schedule_is_fastv() -> None:
    inputs = LLAVA.inputs(BATCHES["unequal"])
    kept = []
    for pruner in (
        vlmprune.FastV(keep=0.8, layer=2),
        vlmprune.GSearch(schedule=Schedule((1, 1, 0.4)), query="last"),
        vlmprune.PSigmoid(keep=0.8, query="last"),
    ):
        with torch.no_grad(), vlmprune.prune(model_of(LLAVA), pruner) as session:
            model_of(LLAVA)(**inputs)
        kept.append([item.stages[-1].kept.tolist() for item in session.last.items])
    assert kept[0] == kept[1] == kept[2]
    assert all(kept[0])


def test_ones_change_nothing() -> None:
    inputs = LLAVA.inputs(BATCHES["unequal"])
    with torch.no_grad():
        full = model_of(LLAVA)(**inputs).logits
        with vlmprune.prune(model_of(LLAVA), vlmprune.GSearch(schedule=Schedule((1, 1, 1)))):
            assert torch.equal(model_of(LLAVA)(**inputs).logits, full)


# The searches.


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=3, max_size=8), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2]))
def test_greedy_search_finds_what_each_layer_needs(least, group: int, start: int) -> None:
    least = sorted(least, reverse=True)
    calls = []

    def quality(ratios):
        calls.append(ratios)
        return 0.0 if all(a >= b for a, b in zip(ratios, least)) else -1.0

    def capped(ratios):  # layers before `start` need nothing
        return quality((*[1.0] * start, *ratios[start:]))

    found = greedy_search(capped, len(least), step=1 / 16, start=start, group=group)
    for layer in range(start, len(least)):
        first = start + (layer - start) // group * group
        assert found[layer] == max(1 / 16, math.ceil(least[first] * 16) / 16)
    assert found[:start] == (1.0,) * start
    assert len(calls) <= 1 + 4 * math.ceil((len(least) - start) / group) + 1
    assert all(sorted(ratios, reverse=True) == list(ratios) for ratios in calls)


def test_greedy_search_at_its_ends() -> None:
    assert greedy_search(sum, 6, tolerance=math.inf) == (1, 1, *[1 / 64] * 4)
    assert greedy_search(sum, 6, tolerance=math.inf, allow_zero=True) == (1, 1, 0, 0, 0, 0)
    assert greedy_search(sum, 6, tolerance=0.0) == (1,) * 6
    with pytest.raises(ValueError, match="multiple of step"):
        greedy_search(sum, 6, step=0.3)
    with pytest.raises(ValueError, match="from 1 to 5"):
        greedy_search(sum, 6, start=6)


def test_tuning_finds_the_better_sigmoid() -> None:
    target = sigmoid_ratios(16, 0.4, kappa=30.0, floor=0.1)

    def quality(ratios):
        return -sum((a - b) ** 2 for a, b in zip(ratios, target))

    shares, made = tune_sigmoid(quality, 16, 0.4, evaluations=12, seed=3)
    assert made["quality"] == quality(shares) > quality(sigmoid_ratios(16, 0.4))
    assert shares == sigmoid_ratios(16, 0.4, kappa=made["kappa"], floor=made["floor"])
    assert sum(shares) / 16 == pytest.approx(0.4, abs=1e-6)
    assert tune_sigmoid(quality, 16, 0.4, evaluations=6, seed=3) == tune_sigmoid(
        quality, 16, 0.4, evaluations=6, seed=3
    )


def test_tuning_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.gaussian_process", None)
    shares, _ = tune_sigmoid(lambda ratios: -ratios[5], 8, 0.5, evaluations=7)
    assert sum(shares) / 8 == pytest.approx(0.5, abs=1e-6)


def test_quality_and_search_on_a_model() -> None:
    model = LLAVA.model()
    quality = KLQuality(model, [LLAVA.inputs(BATCHES["one"]), LLAVA.inputs(BATCHES["unequal"])], max_new_tokens=3)
    assert quality((1, 1, 1)) == pytest.approx(0.0, abs=1e-6)
    some, few = quality((1, 0.7, 0.5)), quality((1, 0.1, 0.1))
    assert few < some < -1e-6
    found = greedy_search(quality, 3, tolerance=-(some + few) / 2, step=1 / 4, start=1, group=1)
    assert quality.evaluations <= 3 + 1 + 2 * 2
    assert quality(found) >= (some + few) / 2
    assert found[-1] < 1
    with pytest.raises(ValueError, match="at least one prompt"):
        KLQuality(model, [])


def test_calibrate_levels() -> None:
    level = calibrate(lambda level: 1 / (1 + level), 0.2, low=0.01, high=100.0, evaluations=20)
    assert level == pytest.approx(4.0, rel=1e-3)
    with pytest.raises(ValueError, match="0 < low < high"):
        calibrate(lambda level: level, 0.2, low=0.0, high=1.0)
    model, inputs = model_of(LLAVA), LLAVA.inputs(BATCHES["one"])

    def average(level: float) -> float:
        pruner = vlmprune.MustDrop(level=level, key_rate=0.0, global_threshold=1 / 25, individual_threshold=0.04)
        with torch.no_grad(), vlmprune.prune(model, pruner) as session:
            model(**inputs)
        return session.last.average_keep

    assert average(calibrate(average, 0.6, low=0.1, high=10.0, evaluations=8)) == pytest.approx(0.6, abs=0.1)


def test_the_bundled_schedule_fits_the_bundled_model() -> None:
    model, processor = bundled.load()
    pruner = vlmprune.GSearch(schedule=bundled.gsearch_schedule())
    depth = model.config.text_config.num_hidden_layers
    assert len(pruner.schedule.ratios) == depth
    assert pruner.keep == pruner.schedule.average < 1
    scene = bundled.demo_scenes()[0]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": scene.questions[0].text}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    with vlmprune.prune(model, pruner) as session:
        model.generate(**processor(images=scene.image, text=prompt, return_tensors="pt"), max_new_tokens=1)
    assert session.last.average_keep == pytest.approx(pruner.keep, abs=0.01)

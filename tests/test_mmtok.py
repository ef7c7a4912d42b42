"""The properties that MMTok's specification asks for (golden vectors: tests/kernels/test_methods.py)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from fakes import picks, rows, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmprune
from vlmprune.pruners.mmtok import coverage_tables, mmtok_select, question_words

shapes = st.tuples(st.integers(2, 12), st.integers(0, 4), st.integers(0, 2**16))


def item(shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """V [1, n, 8], V' [1, n, 6], T [1, m, 8]."""
    n, m, seed = shape
    return rows(1, n, 8, seed=seed), rows(1, n, 6, seed=seed + 1), rows(1, m, 8, seed=seed + 2)


def order_of(data: tuple[torch.Tensor, ...], k: int, **options: object) -> list[int]:
    features, encoder, text = data
    order = mmtok_select(features, encoder, torch.tensor([k]), text=text, **options)[0]  # type: ignore[arg-type]
    return order[order >= 0].tolist()


def table_of(data: tuple[torch.Tensor, ...], alpha: float = 0.5) -> torch.Tensor:
    """C = [P ; alpha Q] in fp64, from the definition."""
    v, pre, text = (torch.nn.functional.normalize(each[0].double(), dim=1) for each in data)
    words = (text @ v.T / 0.02).softmax(1) / max(len(text), 1)
    return torch.cat([words, alpha * (pre @ pre.T / 0.2).softmax(1) / len(pre)])


def coverage(table: torch.Tensor, chosen: list[int]) -> float:
    return float(table[:, chosen].amax(1).sum()) if chosen else 0.0


@settings(max_examples=30, deadline=None)
@given(shapes)
def test_greedy_by_its_definition(shape) -> None:
    """Counts, nesting, first pick, falling gains that sum to f, and the 1 - 1/e bound."""
    data, n = item(shape), shape[0]
    table, order = table_of(data), order_of(data, n)
    assert sorted(order) == list(range(n))
    assert table.sum(0)[order[0]] >= table.sum(0).max() * (1 - 1e-5)
    values = [coverage(table, order[:step]) for step in range(n + 1)]
    gains = [after - before for before, after in itertools.pairwise(values)]
    assert min(gains) >= 0
    assert all(after <= before + 1e-6 for before, after in itertools.pairwise(gains))
    k = (n + 1) // 2
    assert order_of(data, k) == order[:k]
    best = max(coverage(table, list(chosen)) for chosen in itertools.combinations(range(n), k))
    assert values[k] >= (1 - 1 / math.e) * best


@settings(max_examples=30, deadline=None)
@given(shapes)
def test_scaling_rows_and_repeating_words_change_nothing(shape) -> None:
    data, k = item(shape), max(1, shape[0] // 2)
    factor = torch.rand(1, shape[0], 1, generator=torch.Generator().manual_seed(shape[2])).add(0.2)
    v, pre, text = data
    for other in ((v * factor, pre * factor * 3, text * 5), (v, pre, torch.cat([text, text], 1))):
        mine, its = (coverage(table_of(data), order_of(each, k)) for each in (data, other))
        assert mine == pytest.approx(its, rel=1e-5)


def test_tables() -> None:
    """Rows of P sum to 1/m, of Q to 1/n; padding of words and tokens is zero and changes nothing."""
    v, pre, text = item((7, 3, 1))
    pad = torch.nn.functional.pad
    words, valid = torch.arange(5)[None] < 3, torch.arange(9)[None] < 7
    padded = (pad(v, (0, 0, 0, 2), value=9.0), pad(pre, (0, 0, 0, 2), value=9.0), pad(text, (0, 0, 0, 2), value=9.0))
    p, q = coverage_tables(*padded, words, valid, 0.02, 0.2)
    torch.testing.assert_close(p[0, :3].sum(1), torch.full((3,), 1 / 3))
    torch.testing.assert_close(q[0, :7].sum(1), torch.full((7,), 1 / 7))
    assert not p[0, 3:].any()
    assert not p[..., 7:].any()
    assert not q[0, 7:].any()
    assert not q[..., 7:].any()
    torch.testing.assert_close(torch.cat([p[0, :3, :7], 0.5 * q[0, :7, :7]]).double(), table_of((v, pre, text)))


def test_excluded_tokens_are_never_picked_and_still_count() -> None:
    data = item((10, 3, 5))
    exclude = torch.zeros(1, 10, dtype=torch.bool)
    exclude[0, [0, 3, 7]] = True
    order = order_of(data, 10, exclude=exclude)
    assert sorted(order) == [1, 2, 4, 5, 6, 8, 9], "as many as there are, none twice"
    table = table_of(data)
    allowed = table.sum(0).masked_fill(exclude[0], -1)
    assert order[0] == int(allowed.argmax())


def test_one_word_alone_takes_the_nearest_token_and_many_go_on_by_index() -> None:
    data = item((9, 1, 8))
    nearest = int(torch.cosine_similarity(data[0][0], data[2][0]).argmax())
    order = order_of(data, 9, alpha=0.0)
    assert order[0] == nearest
    assert order[1:] == [i for i in range(9) if i != nearest]


def test_flat_tables_and_zero_rows_still_give_different_tokens() -> None:
    v, pre, _ = item((12, 0, 3))
    none = torch.zeros(1, 0, 8)
    assert len(set(order_of((v, pre, none), 7, visual_temperature=1e8))) == 7
    for dtype in (torch.float16, torch.bfloat16):
        zero = torch.zeros(1, 12, 8, dtype=dtype)
        assert len(set(order_of((zero, zero, zero), 7))) == 7


def test_the_question_matters_unless_the_tokens_outweigh_it() -> None:
    v, pre, _ = item((60, 0, 4))
    one, other = rows(1, 3, 8, seed=50), rows(1, 3, 8, seed=51)
    assert order_of((v, pre, one), 8) != order_of((v, pre, other), 8)
    assert order_of((v, pre, one), 8, alpha=1e6) == order_of((v, pre, other), 8, alpha=1e6)


def test_permuting_tokens_permutes_the_choice() -> None:
    v, pre, text = item((40, 3, 9))
    shuffle = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    back = [int(shuffle[i]) for i in order_of((v[:, shuffle], pre[:, shuffle], text), 12)]
    assert back == order_of((v, pre, text), 12)


def test_pruner_on_a_ragged_batch_equals_each_item_alone() -> None:
    features, encoder = [rows(14, 8), rows(9, 8, seed=1)], [rows(14, 6, seed=2), rows(9, 6, seed=3)]
    words, mask = rows(2, 4, 8, seed=4), torch.tensor([[True] * 4, [True, True, False, False]])
    pruner = vlmprune.MMTok(keep=5)
    both = pruner.select(
        tokens_of(*features, encoder_features=encoder, instruction=words, instruction_mask=mask), torch.tensor([5, 3])
    )
    for i, keep in enumerate((5, 3)):
        alone = tokens_of(
            features[i], encoder_features=[encoder[i]], instruction=words[i : i + 1], instruction_mask=mask[i : i + 1]
        )
        assert picks(both)[i] == picks(pruner.select(alone, torch.tensor([keep])))[0]
    given = vlmprune.MMTok(keep=5, text=words[0])
    assert given.needs == {"encoder_features"}
    assert (
        picks(given.select(tokens_of(features[0], encoder_features=[encoder[0]]), torch.tensor([5])))[0]
        == picks(both)[0]
    )


def test_line_breaks_stay_only_when_all_else_does() -> None:
    shape = vlmprune.Geometry.grid(2, 4, suffix=2)
    tokens = tokens_of(
        rows(10, 8),
        shapes=[shape],
        encoder_features=[rows(10, 6)],
        instruction=rows(1, 2, 8),
        instruction_mask=torch.ones(1, 2, dtype=torch.bool),
    )
    pruner = vlmprune.MMTok()
    assert max(picks(pruner.select(tokens, torch.tensor([7])))[0]) < 8
    assert picks(pruner.select(tokens, torch.tensor([9])))[0] == [*range(9)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "What is the color of the dog on the left?\nAnswer the question using a single word or phrase.",
            "color of dog on left",
        ),
        ("<image>\nWhat is the color of the dog on the left?", "color of dog on left"),
        ("<image><image>\nIs it the one?", "one"),
        ("Is it the one?", "one"),
        ("What do you see in this image?", "see in this image"),
        ("Is it?", "Is it?"),
        ("Which is left?\nA. cat\nAnswer with the option's letter from the given choices directly.", "left cat"),
    ],
)
def test_question_words(text: str, words: str) -> None:
    assert question_words(text) == words


def test_presets_and_bad_fields() -> None:
    assert vlmprune.MMTok.preset("qwen2.5-vl").text_temperature == 0.01
    crops = vlmprune.MMTok.preset("llava-next", average_tokens=320)
    assert isinstance(crops, vlmprune.PerTile)
    assert crops.keep == crops.pruner.keep == 320 / 2880
    with pytest.raises(ValueError, match=r"'llava-1\.5' with 64, 128, 192; 'llava-next'"):
        vlmprune.MMTok.preset("gpt")
    for fields in ({"alpha": -1.0}, {"text_temperature": 0.0}, {"text": torch.ones(3)}):
        with pytest.raises(ValueError, match="mmtok"):
            vlmprune.MMTok(**fields)
    tokens = tokens_of(rows(6, 8), encoder_features=[rows(6, 4)])
    with pytest.raises(ValueError, match="get_input_embeddings"):
        vlmprune.MMTok(text=torch.ones(2, 5)).select(tokens, torch.tensor([3]))

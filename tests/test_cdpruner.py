"""The properties that CDPruner's specification asks for (golden vectors: tests/kernels/test_methods.py)."""

from __future__ import annotations

import itertools

import pytest
import torch
from fakes import picks, rows, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmprune
from vlmprune.kernels import dpp_select, pairwise_cosine
from vlmprune.pruners.cdpruner import cdpruner_select, instruction_relevance, normalise, patch_relevance

shapes = st.tuples(st.integers(2, 14), st.integers(0, 2**16))


def order_of(features: torch.Tensor, relevance: torch.Tensor, k: int) -> list[int]:
    order = cdpruner_select(features[None], relevance[None], torch.tensor([k]))[0]
    return order[order >= 0].tolist()


def kernel_of(features: torch.Tensor, relevance: torch.Tensor) -> torch.Tensor:
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    return relevance.double()[:, None] * (unit @ unit.T) * relevance.double()


@settings(max_examples=40, deadline=None)
@given(shapes)
def test_greedy_by_its_definition(shape) -> None:
    """Counts, first pick, and gains that are Schur complements, best at every step, and fall."""
    n, seed = shape
    features = rows(n, 16, seed=seed)
    relevance = normalise(rows(1, n, seed=seed + 1))[0]
    order, kernel = order_of(features, relevance, n), kernel_of(features, relevance)
    assert sorted(order) == list(range(n))
    assert relevance[order[0]] == relevance.max()

    def determinant(chosen: list[int]) -> float:
        return float(torch.linalg.det(kernel[chosen][:, chosen])) if chosen else 1.0

    gains = []
    # Behind the least relevant token (r about 1e-6) fp64 determinants say nothing any more.
    for step in range(n - 1):
        before = determinant(order[:step])
        left = [j for j in range(n) if j not in order[:step]]
        best = max(determinant([*order[:step], j]) for j in left)
        gain = determinant(order[: step + 1])
        assert gain >= best * (1 - 1e-3)
        gains.append(gain / before)
    assert all(after <= before * (1 + 1e-3) for before, after in itertools.pairwise(gains))


@pytest.mark.parametrize("features", [torch.ones(20, 8), torch.zeros(20, 8), rows(5, 8).repeat(4, 1)])
def test_as_many_as_asked_of_anything(features: torch.Tensor) -> None:
    relevance = normalise(rows(1, 20, seed=3))[0]
    for k in (1, 9, 20):
        assert len(set(order_of(features, relevance, k))) == k
    spanned = len(torch.unique(features[features.norm(dim=1) > 0], dim=0))
    rest = order_of(features, relevance, 20)[spanned:]
    assert rest == sorted(rest, key=lambda j: -float(relevance[j])), "beyond the rank by relevance"


def test_more_picks_than_dimensions() -> None:
    assert len(set(order_of(rows(64, 8), normalise(rows(1, 64))[0], 32))) == 32


def test_relevance() -> None:
    embeds, text = rows(2, 9, 6), rows(2, 3, 6, seed=1)
    raw = instruction_relevance(embeds, text)
    expected = torch.cosine_similarity(embeds[:, :, None], text[:, None], dim=-1).mean(2)
    torch.testing.assert_close(raw, expected)
    torch.testing.assert_close(instruction_relevance(embeds * 3, text * 0.1), raw)
    torch.testing.assert_close(instruction_relevance(embeds, -text), -raw)


def test_normalise() -> None:
    raw = rows(2, 6)
    out = normalise(raw)
    spread = raw.amax(1, keepdim=True) - raw.amin(1, keepdim=True)
    torch.testing.assert_close(out, (raw - raw.amin(1, keepdim=True) + 1e-6) / spread)
    assert torch.equal(normalise(raw[1:])[0], out[1]), "the batch has no say"
    assert torch.equal(normalise(torch.full((1, 5), 0.3)), torch.ones(1, 5))
    assert torch.equal(normalise(raw, theta=0.0), torch.ones(2, 6)), "the plain DPP"
    torch.testing.assert_close(normalise(raw, theta=0.8), (out * 2).exp())
    mask = torch.arange(6)[None] < torch.tensor([[6], [4]])
    masked = normalise(raw, mask)
    torch.testing.assert_close(masked[1, :4], normalise(raw[1:, :4])[0])
    assert not masked[1, 4:].any()
    groups = torch.tensor([[0, 0, 0, 1, 1, 1]]).expand(2, -1)
    torch.testing.assert_close(
        normalise(raw, groups=groups), torch.cat([normalise(raw[:, :3]), normalise(raw[:, 3:])], 1)
    )


def test_constant_relevance_is_the_plain_dpp() -> None:
    features = rows(30, 16)
    plain = dpp_select(pairwise_cosine(features[None]), 10)[0].tolist()
    assert order_of(features, normalise(torch.full((1, 30), 0.2))[0], 10) == plain


def test_permuting_tokens_permutes_the_choice() -> None:
    features, relevance = rows(40, 16), normalise(rows(1, 40, seed=1))[0]
    shuffle = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    back = [int(shuffle[i]) for i in order_of(features[shuffle], relevance[shuffle], 12)]
    assert back == order_of(features, relevance, 12)


def test_pruner_on_a_ragged_batch_equals_each_item_alone() -> None:
    features = [rows(14, 8), rows(9, 8, seed=1)]
    words, mask = rows(2, 4, 8, seed=4), torch.tensor([[True] * 4, [True, True, False, False]])
    for pruner in (vlmprune.CDPruner(), vlmprune.CDPruner(theta=0.5), vlmprune.CDPruner(sign=-1)):
        both = pruner.select(
            tokens_of(*features, instruction=words * mask[..., None], instruction_mask=mask), torch.tensor([5, 3])
        )
        for i, keep in enumerate((5, 3)):
            text = words[i, mask[i]].mean(0)
            raw = torch.cosine_similarity(features[i], text[None])
            relevance = normalise(pruner.sign * raw[None], theta=pruner.theta)[0]
            assert picks(both)[i] == sorted(order_of(features[i], relevance, keep))


def test_relevance_from_elsewhere() -> None:
    """Given as a tensor or a function; the sign turns it; minimum and maximum per crop on request."""
    features, scores = rows(12, 8), rows(1, 12, seed=7)
    shape = vlmprune.Geometry.grid(2, 3, planes=2)
    tokens = tokens_of(features, shapes=[shape])

    def kept(**fields: object) -> list[int]:
        pruner = vlmprune.CDPruner(**fields)  # type: ignore[arg-type]
        assert not pruner.needs
        return picks(pruner.select(tokens, torch.tensor([4])))[0]

    assert kept(relevance=scores) == sorted(order_of(features, normalise(scores)[0], 4))
    assert kept(relevance=lambda given: scores.expand(len(given.counts), -1)) == kept(relevance=scores)
    assert kept(relevance=scores, sign=-1) == kept(relevance=-scores) != kept(relevance=scores)
    scaled = torch.cat([normalise(scores[:, :6]), normalise(scores[:, 6:])], 1)[0]
    assert kept(relevance=scores, relevance_norm="per_crop") == sorted(order_of(features, scaled, 4))
    with pytest.raises(ValueError, match=r"must be \[1, 12\]"):
        kept(relevance=scores[:, :5])


def test_relevance_inside_a_scope_is_of_the_whole_item() -> None:
    features, scores = rows(12, 8), rows(1, 12, seed=7)
    tokens = tokens_of(features, shapes=[vlmprune.Geometry.grid(2, 3, planes=2)])
    (kept,) = picks(vlmprune.PerTile(vlmprune.CDPruner(relevance=scores)).select(tokens, torch.tensor([4])))
    halves = [order_of(features[at], normalise(scores[:, at])[0], 2) for at in (slice(0, 6), slice(6, 12))]
    assert kept == sorted(halves[0]) + sorted(6 + i for i in halves[1])


def test_relevance_from_patches() -> None:
    """A map on the tokens' own grid comes out as it is, on a finer one interpolated; one for each image and frame."""
    image = vlmprune.Geometry.grid(2, 3, suffix=1)
    video = vlmprune.Geometry.grid(2, 2, planes=2, kind="video")
    both = tokens_of(rows(7, 4), rows(8, 4), shapes=[image, video])
    same = rows(1, 6)
    table = patch_relevance(same, (2, 3))(tokens_of(rows(7, 4), shapes=[image]))
    torch.testing.assert_close(table, torch.cat([same, torch.zeros(1, 1)], 1))
    ramp = torch.arange(8.0).repeat(4)  # 4 x 8 patches, score = column
    table = patch_relevance(torch.stack([ramp, ramp, -ramp]), (4, 8))(both)
    torch.testing.assert_close(table[0, :3], torch.tensor([5 / 6, 3.5, 37 / 6]))  # middles of thirds of 8, less 1/2
    torch.testing.assert_close(table[1], torch.tensor([1.5, 5.5, 1.5, 5.5, -1.5, -5.5, -1.5, -5.5]))
    with pytest.raises(ValueError, match=r"of 2 pictures.*3 images and frames"):
        patch_relevance(torch.stack([ramp, ramp]), (4, 8))(both)
    with pytest.raises(ValueError, match=r"\[J, 32\]"):
        patch_relevance(ramp, (4, 8))


def test_presets_and_bad_fields() -> None:
    assert vlmprune.CDPruner.preset("qwen2.5-vl", keep=128).keep == 128
    assert isinstance(vlmprune.CDPruner.preset("llava-video"), vlmprune.PerFrame)
    crops = vlmprune.CDPruner.preset("llava-next", relevance=rows(1, 2880))
    assert isinstance(crops, vlmprune.PerTile)
    with pytest.raises(ValueError, match="image-text similarity of CLIP"):
        vlmprune.CDPruner.preset("llava-1.5")
    with pytest.raises(ValueError, match="publishes"):
        vlmprune.CDPruner.preset("llava")
    for fields in ({"theta": 1.0}, {"sign": 0}, {"relevance_norm": "per_batch"}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            vlmprune.CDPruner(**fields)

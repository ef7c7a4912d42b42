"""VisionDrop against its official vectors and its published schedule, and the properties of its specification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import BATCHES
from families import FAMILIES, FamilyCase
from hypothesis import given, settings
from hypothesis import strategies as st
from test_laws import model_of

import vlmprune
from vlmprune.contract import Geometry, VisualTokens
from vlmprune.kernels import attention_scores
from vlmprune.pruners.visiondrop import VisionDrop

GOLDEN = Path(__file__).parent / "golden"


def tokens_of(count: int, signals: dict[str, Any], features: torch.Tensor, layer: int) -> VisualTokens:
    return VisualTokens(
        features=features,
        counts=(count,) * len(features),
        index=(torch.arange(count),) * len(features),
        shapes=(Geometry.grid(1, count),) * len(features),
        layer=layer,
        depth=32,
        signal=lambda need: signals.get(need.rstrip("?").split("|")[0]),
        project=lambda rows: rows,
    )


def kept_by(pruner: VisionDrop, tokens: VisualTokens, keep: int) -> tuple[list[int], torch.Tensor, list[bool]]:
    """Of a single item: kept tokens, ascending; their rows; which were made."""
    selection = pruner.select(tokens, torch.tensor([keep]))
    assert selection.features is not None
    assert selection.merged is not None
    order = selection.index[0].argsort()
    return selection.index[0, order].tolist(), selection.features[0, order], selection.merged[0, order].tolist()


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("visiondrop_encoder_*.npz")), ids=lambda path: path.stem)
def test_golden_encoder(path: Path) -> None:
    data = np.load(path)
    hidden, keys = torch.from_numpy(data["hidden"]), torch.from_numpy(data["key_mean"])
    count, dominant, contextual = len(hidden) - 1, int(data["dominant"]), int(data["contextual"])
    signals = {
        "projector_inputs": hidden[None, 1:],
        "encoder_keys": keys[None, 1:],
        "cls_attention": torch.from_numpy(data["cls_attn"])[None, :, 1:].mean(1),
        "cls_features": hidden[None, :1],
    }
    keep = dominant + contextual
    pruner = VisionDrop(contextual=(contextual / keep, 0))
    index, rows, made = kept_by(pruner, tokens_of(count, signals, hidden[None, 1:], 0), keep)
    patches, targets = sorted(data["dominant_rows"][1:] - 1), (data["target_rows"] - 1).tolist()
    cls = min(set(range(count)) - {*patches, *targets})
    assert index == sorted([*patches, *targets, cls])
    assert [i for i, new in zip(index, made) if new] == sorted([*targets, cls])
    order = [index.index(i) for i in [cls, *patches, *targets]]
    torch.testing.assert_close(rows[order], torch.from_numpy(data["tokens_out"]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("visiondrop_llm_*.npz")), ids=lambda path: path.stem)
def test_golden_decoder(path: Path) -> None:
    data = np.load(path)
    start, count = int(data["image_index"]), int(data["num_image"])
    dominant, contextual = int(data["dominant"]), int(data["contextual"])
    here = slice(start, start + count)
    q, k = torch.from_numpy(data["q_rope"])[None], torch.from_numpy(data["k_rope"])[None]
    places = torch.arange(start, start + count)[None]
    received = attention_scores(q[:, :, here], k, causal=True, query_index=places)[0, here]
    torch.testing.assert_close(received / count, torch.from_numpy(data["scores"]), atol=1e-6, rtol=1e-4)
    features = torch.from_numpy(data["features"])
    signals = {"next_visual_attention": received[None], "next_keys": k[:, :, here].mean(1)}
    keep = dominant + contextual
    pruner = VisionDrop(contextual=(0, contextual / keep))
    index, rows, made = kept_by(pruner, tokens_of(count, signals, features[None, here], 8), keep)
    targets = data["target_idx"].tolist()
    assert index == sorted([*data["dominant_idx"], *targets])
    assert [i for i, new in zip(index, made) if new] == targets
    order = [index.index(i) for i in [*data["dominant_idx"], *targets]]
    theirs = torch.from_numpy(data["features_out"])[start : start + keep]
    torch.testing.assert_close(rows[order], theirs, atol=1e-4, rtol=0)


def test_the_published_schedule() -> None:
    published = [(0, 42, 6), (8, 30, 5), (16, 22, 4), (24, 16, 3)]
    for pruner in (VisionDrop.preset("llava-1.5", average_tokens=32), VisionDrop()):
        assert pruner.schedule(576) == published
        assert pruner.layers(32) == (0, 8, 16, 24)
        assert [pruner.budget([576], layer, 32) for layer in pruner.layers(32)] == [[48], [35], [26], [19]]
        assert pruner.positions == "compact"
    assert VisionDrop(keep=32).layers(40) == (0, 10, 20, 30)
    assert VisionDrop(stages=()).layers(32) == (0,)
    assert "next_keys" not in VisionDrop(stages=()).needs
    with pytest.raises(ValueError, match=r"publishes 'llava-1\.5' with 32: for others use keep="):
        VisionDrop.preset("llava-1.5", average_tokens=64)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 3000),
    st.one_of(st.floats(0.001, 1.0), st.integers(1, 400)),
    st.sampled_from([1, 2, 3, 4, 28, 32, 40]),
    st.sampled_from([0.25, 0.73, 1.0]),
)
def test_keep_is_the_average_over_layers(count, keep, depth, ratio) -> None:
    pruner = VisionDrop(keep=keep, ratio=ratio)
    layers = pruner.layers(depth)
    sizes = [pruner.budget([count], layer, depth)[0] for layer in layers]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] >= 0
    assert sizes[0] <= count
    target = min(keep, count) if isinstance(keep, int) else keep * count
    lengths = np.diff([*layers, depth])
    assert abs(float(lengths @ sizes) / depth - target) <= 0.5
    if target == count:
        assert sizes == [count] * len(layers)
    for stage, kept in zip(pruner.schedule(count, depth), sizes):
        assert stage.dominant + stage.contextual == kept
        assert stage.dominant > 0 or kept == 0


def random_stage(n: int, seed: int, items: int = 1) -> tuple[dict[str, Any], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    signals = {
        "next_visual_attention": torch.rand(items, n, generator=generator),
        "next_keys": torch.randn(items, n, 4, generator=generator),
    }
    return signals, torch.randn(items, n, 5, generator=generator)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n - 1), st.integers(0, 2**16))))
def test_decoder_stage(case) -> None:
    n, keep, seed = case
    signals, x = random_stage(n, seed)
    pruner = VisionDrop()
    index, rows, made = kept_by(pruner, tokens_of(n, signals, x, 8), keep)
    contextual = pruner._contextual(keep, 8)
    assert len(set(index)) == keep
    assert sum(made) == contextual
    made = torch.tensor(made)
    copies = torch.tensor(index)[~made]
    assert torch.equal(rows[~made], x[0, copies])
    score = signals["next_visual_attention"][0]
    others = [i for i in range(n) if i not in copies.tolist()]
    assert score[copies].min() >= score[others].max()
    if contextual:
        targets = torch.tensor(index)[made]
        unit = torch.nn.functional.normalize(signals["next_keys"][0], dim=1)
        joined = (unit @ unit[targets].T).argmax(1)
        sizes = torch.zeros(len(targets))
        dropped = [i for i in others if i not in targets.tolist()]
        for i in dropped:
            sizes[joined[i]] += 1
        moved = sizes[:, None] * (rows[made] - x[0, targets])
        torch.testing.assert_close(moved.sum(0), x[0, dropped].sum(0), atol=1e-4, rtol=1e-4)
        assert torch.allclose(rows[made][sizes == 0], x[0, targets][sizes == 0])


def test_equal_keys_all_join_the_first_target_and_average_divides() -> None:
    signals, x = random_stage(20, 3)
    signals["next_keys"] = torch.ones(1, 20, 4)
    for merge in ("sum", "average"):
        index, rows, made = kept_by(VisionDrop(merge=merge), tokens_of(20, signals, x, 8), 13)
        targets = [i for i, new in zip(index, made) if new]
        rest = [i for i in range(20) if i not in index]
        mean = x[0, rest].mean(0)
        first = x[0, targets[0]] + mean if merge == "sum" else x[0, [targets[0], *rest]].mean(0)
        torch.testing.assert_close(rows[index.index(targets[0])], first)
        for target in targets[1:]:
            torch.testing.assert_close(rows[index.index(target)], x[0, target])


def test_scaled_keys_join_the_same_and_no_contextual_tokens_are_fine() -> None:
    signals, x = random_stage(30, 4)
    scaled = {**signals, "next_keys": signals["next_keys"] * torch.rand(1, 30, 1).add(0.1)}
    mine = kept_by(VisionDrop(), tokens_of(30, signals, x, 8), 12)
    its = kept_by(VisionDrop(), tokens_of(30, scaled, x, 8), 12)
    assert mine[0] == its[0]
    torch.testing.assert_close(mine[1], its[1])
    index, rows, made = kept_by(VisionDrop(contextual=(0, 0)), tokens_of(30, signals, x, 8), 12)
    assert not any(made)
    assert torch.equal(rows, x[0, index])
    best = signals["next_visual_attention"][0].argsort(descending=True)[:12]
    assert index == best.sort().values.tolist()


def test_ragged_batch_equals_singles() -> None:
    signals, x = random_stage(20, 5, items=3)
    counts, keeps = (20, 9, 14), (8, 7, 1)
    tokens = VisualTokens(
        features=x,
        counts=counts,
        index=tuple(map(torch.arange, counts)),
        shapes=tuple(Geometry.grid(1, count) for count in counts),
        layer=8,
        depth=32,
        signal=signals.__getitem__,
    )
    together = VisionDrop().select(tokens, torch.tensor(keeps))
    for item, (count, keep) in enumerate(zip(counts, keeps)):
        alone = {name: signal[item : item + 1, :count] for name, signal in signals.items()}
        index, rows, made = kept_by(VisionDrop(), tokens_of(count, alone, x[item : item + 1, :count], 8), keep)
        order = together.index[item, :keep].argsort()
        assert together.index[item, order].tolist() == index
        assert (together.index[item, keep:] == -1).all()
        torch.testing.assert_close(together.features[item, order], rows)
        assert together.merged[item, order].tolist() == made


def test_choices() -> None:
    assert VisionDrop(query="all", keep_cls=False).needs >= {"received_attention"}
    for fields in (
        {"query": "text"},
        {"merge": "mean"},
        {"ratio": 0},
        {"ratio": 1.1},
        {"stages": (8, 8)},
        {"stages": (32,)},
        {"contextual": (0.1,)},
        {"contextual": (0.1, 1)},
    ):
        with pytest.raises(ValueError, match=next(iter(fields))):
            vlmprune.create_pruner("visiondrop", **fields)


# The mixture's deepstack reaches behind layer 1; of a sliding window the signal knows nothing.
STAGED = [case for name, case in FAMILIES.items() if name not in ("qwen3-vl-moe", "llava-clip-mistral-window")]


@pytest.mark.parametrize("family", STAGED, ids=str)
def test_on_a_model_it_ranks_by_the_full_attention_map(family: FamilyCase) -> None:
    """With all tokens kept at the boundary, the first decoder stage sees what an unpruned run does."""
    model, inputs = model_of(family, "eager"), family.inputs(BATCHES["unequal"])
    pruner = VisionDrop(keep=0.9)
    with torch.no_grad(), vlmprune.prune(model, pruner) as session:
        model(**inputs)
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True, use_cache=False).attentions[1].mean(1)
    for item in session.last.items:
        boundary, first, _ = item.stages
        count = item.tokens_before
        assert len(boundary.kept) == count
        here = item.start + torch.arange(count)
        score = maps[item.sample][here][:, here].sum(0)
        _, stage, _ = pruner.schedule(count, 3)
        dominant = score.argsort(descending=True, stable=True)[: stage.dominant].tolist()
        rest = [i for i in range(count) if i not in dominant]
        targets = rest[:: max(1, len(rest) // stage.contextual)][: stage.contextual]
        assert first.kept.tolist() == sorted([*dominant, *targets])

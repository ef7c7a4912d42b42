"""MustDrop against its official vectors, and the properties that its specification asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from cases import BATCHES
from fakes import picks, rows, tokens_of
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from test_laws import STEPS, Recorded, columns_of, dropped_of, generate, merged_rows, model_of

import vlmprune
from vlmprune.pruners.mustdrop import (
    dual_filter,
    filter_strength,
    key_tokens,
    merge_windows,
    window_similarity,
    windows_for,
)

GOLDEN = Path(__file__).parent / "golden"
KEYS = "cls_attention_last"
shapes = st.tuples(st.integers(1, 6), st.integers(1, 30), st.integers(0, 2**16))


def load(path: Path) -> dict[str, Any]:
    return {key: torch.from_numpy(value) if value.ndim else value.item() for key, value in np.load(path).items()}


def maps(shape: tuple[int, int, int]) -> torch.Tensor:
    text, count, seed = shape
    return rows(1, text, count, seed=seed).softmax(2)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("mustdrop_dual_*.npz")), ids=lambda path: path.stem)
def test_golden_filter(path: Path) -> None:
    data = load(path)
    attention, cls = data["attn_text_image"].mean(0)[None], data["cls_attn"].mean(0)[None]
    count = attention.shape[2]
    passed = dual_filter(attention, data["global_thr"], data["individual_thr"])[0]
    assert passed.nonzero().flatten().tolist() == data["important"].tolist()
    keys = key_tokens(cls, [count], data["keep_rate"])[0]
    assert keys.nonzero().flatten().tolist() == data["key_set"].sort().values.tolist()
    pruner = vlmprune.MustDrop(
        global_threshold=data["global_thr"],
        individual_threshold=data["individual_thr"],
        key_rate=data["keep_rate"],
        level=1.0,
    )
    tokens = tokens_of(rows(count, 4), layer=3, depth=32, text_attention=attention, cls_attention_last=cls)
    assert pruner.budget([count], 3, 32) == [None]
    (kept,) = picks(pruner.select(tokens, torch.tensor([count])))
    assert kept == data["kept_visual"].tolist()
    assert [kept[i] for i in data["new_key_set"].tolist()] == data["key_set"].sort().values.tolist()
    # Among survivors, all of them key at the next stage again.
    again = key_tokens(cls[:, kept], [count], data["keep_rate"])[0]
    assert sorted(data["new_key_set"].tolist()) == again.nonzero().flatten().tolist()
    # By count, as many as the filter lets through are the same.
    by_count = vlmprune.MustDrop(
        global_threshold=data["global_thr"], individual_threshold=data["individual_thr"], key_rate=data["keep_rate"]
    )
    assert picks(by_count.select(tokens, torch.tensor([len(kept)]))) == [kept]


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("mustdrop_merge_*.npz")), ids=lambda path: path.stem)
def test_golden_merge(path: Path) -> None:
    data = load(path)
    side = int((data["x"].shape[1] - 1) ** 0.5)
    similarity = window_similarity(data["x"][:, 1:], (side, side), data["window"])
    torch.testing.assert_close(similarity, data["window_sim"], atol=1e-6, rtol=1e-4)
    merged = int((similarity >= data["threshold"]).sum(1).min())
    assert merged == data["r"]
    out, size, keep, into = merge_windows(data["x"], similarity, merged, (side, side))
    torch.testing.assert_close(out, data["out"], atol=1e-5, rtol=1e-4)
    assert torch.equal(size, data["size"][..., 0])
    assert torch.equal(into, data["assign"].long())
    assert windows_for(side**2, out.shape[1] - 1) == merged
    # In raster order, the same rows.
    raster, _, places, where = merge_windows(data["x"], similarity, merged, (side, side), order="raster")
    assert (places[:, 1:] > places[:, :-1]).all()
    assert torch.equal(places, keep.sort(1).values)
    torch.testing.assert_close(raster.gather(1, where[..., None].expand_as(data["x"])),
                               out.gather(1, into[..., None].expand_as(data["x"])))  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 3), st.integers(0, 2**16), st.floats(0, 1))
def test_merge(high: int, wide: int, window: int, seed: int, share: float) -> None:
    grid = (high * window, wide * window)
    x = rows(2, 1 + grid[0] * grid[1], 5, seed=seed)
    similarity = window_similarity(x[:, 1:], grid, window)
    torch.testing.assert_close(window_similarity(3.5 * x[:, 1:], grid, window), similarity, atol=1e-5, rtol=1e-4)
    merged = round(share * high * wide)
    out, size, keep, into = merge_windows(x, similarity, merged, grid, window=window)
    assert out.shape[1] == x.shape[1] - merged * (window**2 - 1)
    assert size.sum(1).tolist() == [x.shape[1]] * 2
    for picture in range(2):
        for row in range(out.shape[1]):
            members = (into[picture] == row).nonzero().flatten()
            assert keep[picture, row] in members
            if len(members) == 1:
                assert torch.equal(out[picture, row], x[picture, members[0]])
            else:
                assert len(members) == window**2
                torch.testing.assert_close(out[picture, row], x[picture, members].mean(0), atol=1e-6, rtol=1e-5)
                place = members - 1
                assert len({(int(p) // grid[1] // window, int(p) % grid[1] // window) for p in place}) == 1


@pytest.mark.parametrize("retained", [1, 17, 64, 127, 128, 143, 144, 200])
@pytest.mark.parametrize("window", [2, 3])
def test_a_fixed_number_is_met_but_for_less_than_a_window(retained: int, window: int) -> None:
    left = 144 - windows_for(144, retained, window) * (window**2 - 1)
    assert 0 <= left - min(retained, 144) <= window**2 - 2


def test_windows_of_equal_patches_and_grids_that_do_not_fit() -> None:
    x = rows(1, 4, 6).repeat_interleave(9, dim=1).reshape(1, 2, 2, 3, 3, 6).transpose(2, 3).reshape(1, 36, 6)
    torch.testing.assert_close(window_similarity(x, (6, 6)), torch.ones(1, 4))
    with pytest.raises(ValueError, match="do not tile a 8 x 9 grid"):
        window_similarity(rows(1, 72, 4), (8, 9))


@settings(max_examples=60, deadline=None)
@given(shapes, st.floats(0, 0.2), st.floats(0, 0.2), st.floats(1, 3))
def test_filter(shape, share, peak, more) -> None:
    attention = maps(shape)
    passed = dual_filter(attention, share, peak)
    total, largest = attention.sum(1), attention.amax(1)
    dropped = (total < share * total.sum(1, keepdim=True)) & (largest < peak)
    assert torch.equal(passed, ~dropped)
    assert not (dual_filter(attention, share * more, peak) & ~passed).any()
    assert not (dual_filter(attention, share, peak * more) & ~passed).any()
    assert dual_filter(attention, 0.0, peak).all()
    assert dual_filter(attention, share, 0.0).all()


@settings(max_examples=60, deadline=None)
@given(shapes, st.floats(0.001, 0.2), st.floats(0.001, 0.2), st.floats(0.1, 10))
def test_strength_is_the_level_up_to_which_a_token_passes(shape, share, peak, level) -> None:
    attention = maps(shape)
    strength = filter_strength(attention, share, peak)
    clear = (strength / level - 1).abs() > 1e-4
    passed = dual_filter(attention, level * share, level * peak)
    assert torch.equal(passed[clear], (strength >= level)[clear])


def test_keys_always_stay() -> None:
    attention = torch.zeros(2, 3, 10)
    attention[:, :, 4] = 0.5
    saliency = torch.arange(10.0).expand(2, 10).clone()
    tokens = tokens_of(
        rows(10, 4), rows(8, 4), layer=3, depth=32, text_attention=attention, cls_attention_last=saliency
    )
    adaptive = vlmprune.MustDrop(level=1.0, key_rate=0.2)
    assert picks(adaptive.select(tokens, torch.tensor([10, 8]))) == [[4, 8, 9], [4, 6, 7]]
    by_count = vlmprune.MustDrop(key_rate=0.2)
    assert picks(by_count.select(tokens, torch.tensor([4, 1]))) == [[0, 4, 8, 9], [6]]
    everything = vlmprune.MustDrop(level=1.0, key_rate=1.0)
    assert picks(everything.select(tokens, torch.tensor([10, 8]))) == [list(range(10)), list(range(8))]
    unmarked = tokens_of(rows(10, 4), layer=3, text_attention=attention[:1], cls_attention_last=None)
    assert picks(adaptive.select(unmarked, torch.tensor([10]))) == [[4]]


def test_budgets_presets_and_cache_layers() -> None:
    pruner = vlmprune.MustDrop(keep=0.2363281)  # what the ratios average
    assert [pruner.budget([576], layer, 32)[0] for layer in (3, 7, 11, 15)] == [288, 144, 72, 36]
    assert pruner.cache_layers(32) == tuple(range(2, 15))
    assert vlmprune.MustDrop(output_aware_cache=False).cache_layers(32) == ()
    text = vlmprune.MustDrop.preset("textvqa", 64, level=2.0)
    assert (text.global_threshold, text.individual_threshold, text.level) == (0.011, 0.01, 2.0)
    assert text.budget([576], 3, 32) == [None]
    assert text.budget([576], 0, 32) == [576]
    assert vlmprune.MustDrop(level=1.0, keep=1.0).budget([576], 3, 32) == [576]
    with pytest.raises(ValueError, match="'textvqa' with 192, 128, 64"):
        vlmprune.MustDrop.preset("gqa", 64)
    for wrong in ({"global_threshold": 0.0}, {"individual_threshold": -1.0, "level": 1.0}):
        with pytest.raises(ValueError, match="thresholds must be positive"):
            vlmprune.MustDrop(**wrong)
    with pytest.raises(ValueError, match="key_rate"):
        vlmprune.MustDrop(key_rate=2.0)
    with pytest.raises(ValueError, match="level must be at least 0"):
        vlmprune.MustDrop(level=-1.0)


@pytest.mark.parametrize("name", ["llava-clip-llama", "qwen2.5-vl"])
def test_on_a_model(name: str) -> None:
    """The published filter, worked out from the full attention map of the unpruned model."""
    family = FAMILIES[name]
    model, inputs = model_of(family, "eager"), family.inputs(BATCHES["one"])
    with torch.no_grad():
        attention = model(**inputs, output_attentions=True, use_cache=False).attentions[0].mean(1)
        ((_, start, count),) = family.spans(BATCHES["one"])
        visual = slice(start, start + count)
        attention = attention[:, visual.stop :, visual]
        total, peak = attention.sum(1)[0], attention.amax(1)[0]
        share, peak = float(total.quantile(0.6) / total.sum()), float(peak.quantile(0.7))
        pruner = vlmprune.MustDrop(level=1.0, global_threshold=share, individual_threshold=peak, key_rate=0.1)
        with vlmprune.prune(model, pruner) as session:
            model(**inputs)
    (item,) = session.last.items
    passed = dual_filter(attention, share, peak)[0].nonzero().flatten().tolist()
    kept = item.stages[0].kept.tolist()
    assert set(passed) <= set(kept)
    assert len(kept) <= len(passed) + -(-item.tokens_before // 10)
    assert len(kept) < item.tokens_before


@pytest.mark.parametrize("policy", ["original", "compact"])
@pytest.mark.parametrize("level", [None, 100.0])
def test_output_aware_cache(policy: str, level: float | None) -> None:
    """Decoded tokens see, in every layer from the first stage's on, only the visual tokens that reached the last."""
    family = FAMILIES["llava-clip-llama"]
    model, inputs = model_of(family), family.inputs(BATCHES["unequal"])
    pruner = vlmprune.MustDrop(
        keep=0.7, level=level, layer_list=(1, 2), ratios=(0.7, 0.3), model_depth=3, positions=policy
    )
    assert pruner.cache_layers(3) == (0, 1)
    with vlmprune.prune(model, pruner) as session:
        out = generate(model, inputs)
    report, length = session.last, inputs["input_ids"].shape[1]
    until = torch.full((report.batch, report.length), 10**6)
    for item in report.items:
        final = item.stages[-1].kept
        lost = ~torch.isin(torch.arange(item.tokens_before), final)
        until[item.sample, columns_of(item)[lost]] = length
        assert [held.tolist() for held in item.cached.values()] == [final.tolist()] * 2
    forced, evicted = out.sequences[:, length:], {0: until, 1: until}
    _, scores = oracle.run(model, inputs, dropped_of(report, inputs), policy, STEPS - 1, forced, {}, evicted)
    for mine, theirs in zip(out.logits, scores):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
    lengths = [layer.keys.shape[-2] for layer in out.past_key_values.layers]
    assert lengths[0] < report.layer_tokens[0] + STEPS - 1
    assert vlmprune.MustDrop(keep=1.0).cache_layers(32) == ()


def test_three_stages_on_a_model() -> None:
    """Windows merge in the tower, the filter cuts the decoder, decoding is that of the merged model."""
    family = FAMILIES["llava-siglip-qwen2"]  # 6 x 6 patches
    model, inputs = model_of(family), family.inputs(BATCHES["unequal"])
    pruner = vlmprune.MustDrop(
        keep=0.4, tower_keep=20, layer_list=(1, 2), ratios=(0.5, 0.2), model_depth=3, output_aware_cache=False
    )
    with vlmprune.prune(model, pruner) as session, Recorded(pruner) as calls:
        out = generate(model, inputs)
    report = session.last
    for item in report.items:
        tower, first, second = (len(stage.kept) for stage in item.stages)
        assert tower == 36 - 2 * 8 == 20, "two windows of 3 x 3 became one row each"
        assert tower > first > second
        boundary = item.stages[0].kept
        corners = [place for place in boundary.tolist() if place // 6 % 3 == 2 and place % 6 % 3 == 2]
        assert len(corners) == 4
    merged = merged_rows(report, pruner, calls)
    forced = out.sequences[:, inputs["input_ids"].shape[1] :]
    _, scores = oracle.run(model, inputs, dropped_of(report, inputs), pruner.positions, STEPS - 1, forced, merged)
    for mine, theirs in zip(out.logits, scores):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="tile"), vlmprune.prune(model_of(FAMILIES["llava-clip-llama"]), pruner):
        generate(model_of(FAMILIES["llava-clip-llama"]), FAMILIES["llava-clip-llama"].inputs(BATCHES["one"]))
    with pytest.raises(ValueError, match="encoder_kept"):
        vlmprune.prune(model_of(FAMILIES["qwen2.5-vl"]), pruner)

"""TransPrune against its official vectors, and the properties that its specification asks for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
from vlmprune.kernels import attention_scores
from vlmprune.pruners.transprune import token_transition, transition_score
from vlmprune.signals import Signals

GOLDEN = Path(__file__).parent / "golden"


def load(path: Path) -> dict[str, Any]:
    return {key: torch.from_numpy(value) if value.ndim else value.item() for key, value in np.load(path).items()}


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("transprune_ttv_*.npz")), ids=lambda path: path.stem)
def test_golden_transition(path: Path) -> None:
    data = load(path)
    attention, mlp = (token_transition(data[f"{block}_in"], data[f"{block}_out"]) for block in ("attn", "ffn"))
    torch.testing.assert_close(attention, data["ttv_attn"], atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(mlp, data["ttv_ffn"], atol=1e-7, rtol=1e-4)
    torch.testing.assert_close(attention + mlp, data["ttv"], atol=1e-7, rtol=1e-4)
    # What the runtime sums on its way through the layers is the same.
    shown = torch.ones(attention.shape, dtype=torch.bool)
    runtime: Any = Signals.__new__(Signals)
    runtime.course, runtime._changes = SimpleNamespace(host_shown=lambda: shown), {}
    runtime.wanted, runtime.replies = frozenset({"transition"}), None
    for block in ("attn", "ffn"):
        Signals._after_block(runtime, torch.nn.Identity(), (data[f"{block}_in"],), {}, data[f"{block}_out"])
    torch.testing.assert_close(runtime._changes["transition"], data["ttv"], atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("transprune_rank_*.npz")), ids=lambda path: path.stem)
def test_golden_ranking(path: Path) -> None:
    data = load(path)
    start, count = data["image_start"], data["n_image"]
    visual = slice(start, start + count)
    text = attention_scores(data["q_text"][None], data["k_rope"][None], reduce="rows", causal=True)[..., visual]
    torch.testing.assert_close(text[0].mean(0), data["iga_raw"], atol=1e-6, rtol=1e-4)
    transition = data["ttv_layers"].sum(0)[None, visual]
    score = transition_score(transition, text)
    torch.testing.assert_close(2 * score[0], data["score"], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(transition_score(transition, text, 1.0)[0], data["ttv_norm"], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(transition_score(transition, text, 0.0)[0], data["iga"], atol=1e-6, rtol=1e-4)
    pruner = vlmprune.TransPrune()
    stage = int(path.stem.split("stage")[1][0])
    (keep,) = pruner.budget([data["n_image_orig"]], pruner.layer_list[stage], 32)
    assert keep == data["n_keep"]
    tokens = tokens_of(data["hidden"][visual], transition=transition, next_text_attention=text)
    kept = torch.tensor(picks(pruner.select(tokens, torch.tensor([keep])))[0]) + start
    assert kept.tolist() == data["keep_idx"].tolist()
    columns = torch.cat([torch.arange(start), kept, torch.arange(start + count, len(data["hidden"]))])
    torch.testing.assert_close(data["ttv_layers"][:, columns], data["ttv_layers_pruned"])
    torch.testing.assert_close(data["hidden"][columns].sum(1), data["out_hidden_sum"])


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 30), st.integers(1, 12), st.integers(0, 2**16), st.floats(0.1, 10))
def test_transition(length, width, seed, factor) -> None:
    x, y = rows(length, width, seed=seed), rows(length, width, seed=seed + 1)
    value = token_transition(x, y)
    assert (value >= 0).all()
    torch.testing.assert_close(token_transition(x, factor * y), factor * value, atol=1e-6, rtol=1e-3)
    # An unchanged direction: everyone weighs the same.
    torch.testing.assert_close(token_transition(x, x), torch.full((length,), 1 / length), atol=1e-5, rtol=1e-4)
    # Further tokens change all by one factor.
    more = token_transition(torch.cat([x, y]), torch.cat([y, x]))[:length]
    torch.testing.assert_close(more / more.sum(), value / value.sum(), atol=1e-5, rtol=1e-3)


def test_a_turn_backwards_counts_more_than_one_sideways() -> None:
    x = torch.tensor([[1.0, 0.0]] * 3)
    y = torch.tensor([[-1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    back, side, same = token_transition(x, y).tolist()
    assert back > side > same


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(0, 5), st.integers(0, 2**16), st.sampled_from([0.0, 0.3, 1.0]))
def test_scores_are_shares(count, text, seed, alpha) -> None:
    generator = torch.Generator().manual_seed(seed)
    transition = torch.rand(2, count, generator=generator) + 0.1
    attention = torch.rand(2, text, count, generator=generator) + 0.1
    score = transition_score(transition, attention, alpha)
    assert (score >= 0).all()
    torch.testing.assert_close(score.sum(1), torch.full((2,), 1.0 if text else alpha), atol=1e-5, rtol=1e-5)
    if alpha == 1:
        assert torch.equal(score, transition_score(transition, attention.flip(1) * 2, alpha))


def test_layers_and_presets() -> None:
    pruner = vlmprune.TransPrune()
    assert pruner.accumulate(32) == (6, 7, 8, 9, 10, 11)  # 7 to 12 as the paper counts
    assert [pruner.budget([576], layer, 32) for layer in (7, 9, 12)] == [[504], [360], [72]]
    assert pruner.layers(3) == (1,)
    assert pruner.accumulate(3) == (0,)
    assert pruner.layers(4) == (1, 2)
    assert pruner.accumulate(4) == (0, 1)
    low = vlmprune.TransPrune.preset("low", alpha=0.4)
    assert [low.budget([576], layer, 32) for layer in (7, 9, 12)] == [[288], [144], [36]]
    assert low.alpha == 0.4
    assert vlmprune.TransPrune.preset("high") == pruner
    with pytest.raises(ValueError, match=r"'high' with 236\.25; 'low' with 180"):
        vlmprune.TransPrune.preset("medium")
    with pytest.raises(ValueError, match="alpha must be between"):
        vlmprune.TransPrune(alpha=1.5)
    with pytest.raises(ValueError, match=r'formula is "code" or "paper"'):
        vlmprune.TransPrune(formula="both")


def test_the_papers_formula_adds_the_signals_as_they_are() -> None:
    """And, of mirrored cosines, it cannot tell one from the other, while the code ranks the backward turn first."""
    transition, attention = torch.rand(1, 6), torch.rand(1, 3, 6)
    tables = {
        "transition_strict": transition,
        "next_text_attention": attention,
        "text_mask": torch.ones(1, 3, dtype=torch.bool),
    }
    tokens = tokens_of(torch.randn(6, 4), layer=7, depth=32, **tables)
    index = vlmprune.TransPrune(formula="paper", alpha=0.3).select(tokens, torch.tensor([2])).index[0]
    wanted = (0.3 * transition + 0.7 * attention.mean(1))[0].topk(2).indices
    assert sorted(index.tolist()) == sorted(wanted.tolist())


@pytest.mark.parametrize("name", ["llava-clip-llama", "qwen2.5-vl"])
def test_scores_on_a_model_are_those_of_full_maps(name: str) -> None:
    """Hooks and attention maps of the plain model, put together by hand, choose the same tokens."""
    family = FAMILIES[name]
    model, inputs = model_of(family, "eager"), family.inputs(BATCHES["one"])
    seen: list[torch.Tensor] = []
    first = model.model.language_model.layers[0]
    hooks = [
        block.register_forward_hook(
            lambda module, args, kwargs, out: seen.append(
                token_transition(
                    args[0] if args else kwargs["hidden_states"], out[0] if isinstance(out, tuple) else out
                )
            ),
            with_kwargs=True,
        )
        for block in (first.self_attn, first.mlp)
    ]
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True, use_cache=False).attentions[1].mean(1)
        for hook in hooks:
            hook.remove()
        with vlmprune.prune(model, "transprune", keep=0.6) as session:
            model(**inputs)
    (item,) = session.last.items
    visual = slice(item.start, item.start + item.tokens_before)
    score = transition_score((seen[0] + seen[1])[:, visual], maps[:, visual.stop :, visual])[0]
    kept = item.stages[0].kept
    assert 0 < len(kept) < item.tokens_before
    best = score.sort(descending=True, stable=True).indices[: len(kept)]
    assert best.sort().values.tolist() == kept.tolist()

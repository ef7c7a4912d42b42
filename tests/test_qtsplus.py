"""QTSplus: golden vectors of the official functions, the properties of its specification, weights of both layouts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_weights
import torch
import trainers
from cases import BATCHES
from fakes import picks, rows, tokens_of
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_laws import model_of
from torch import Tensor

import vlmprune
from vlmprune import bundled
from vlmprune.adapters import adapter_for
from vlmprune.pruners import qtsplus
from vlmprune.pruners.qtsplus import PREFIX, TokenSelector

TAGS = ("a", "b", "c")


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    with np.load(Path(__file__).parent / "golden" / "qtsplus_select.npz") as file:
        return {name: torch.from_numpy(file[name]) if file[name].ndim else file[name].item() for name in file}


def official(golden: dict[str, Any], tag: str) -> TokenSelector:
    """The selector of the vectors, with the settings of a tag."""
    selector = TokenSelector(
        32,
        golden["n_heads"],
        golden["n_kv_heads"],
        4,
        reencode=golden["n_reencode"],
        most=golden[f"{tag}_nmax"],
        share=(golden[f"{tag}_rho_min"], golden[f"{tag}_rho_max"]),
    )
    selector.load_state_dict({name: golden[f"w:{name}"] for name in selector.state_dict()})
    return selector.eval().requires_grad_(False)


def everything(table: Tensor) -> Tensor:
    return torch.ones(table.shape[:2], dtype=torch.bool)


def close(mine: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tag", TAGS)
def test_golden(golden: dict[str, Any], tag: str) -> None:
    selector, visual, question = official(golden, tag), golden["Xv"], golden["Qt"]
    words, valid = everything(question), everything(visual)
    scores = selector.scores(question, visual, words, valid)
    close(scores, golden[f"{tag}_r"])
    close(qtsplus.entropy(scores), golden[f"{tag}_H"])
    shares = selector.shares(question, scores, words, valid)
    close(shares, golden[f"{tag}_rho"])
    counts = selector.counts(shares, valid)
    assert counts.tolist() == golden[f"{tag}_n"].tolist()
    index = qtsplus.best(scores, counts, valid)
    assert torch.equal(index, golden[f"{tag}_indices"])
    there = index >= 0
    kept = torch.cat([visual[row, index[row][there[row]]] for row in range(3)])
    assert torch.equal(kept, golden[f"{tag}_Z_selected"])
    # As official code batches: the last token repeated up to the longest, and seen.
    padded = torch.where(there, index, index.amax(1, keepdim=True))
    rewritten = selector.rewrite(torch.stack([visual[row, padded[row]] for row in range(3)]), None)
    close(rewritten[there], golden[f"{tag}_Z_reencoded"])


@pytest.mark.parametrize("reencode", [True, False])
@pytest.mark.parametrize("tag", TAGS)
def test_golden_through_the_pruner(golden: dict[str, Any], tag: str, reencode: bool, tmp_path: Path) -> None:
    """From a folder laid out as published ones are, each sample's rows rewritten as if it were alone."""
    published(golden, tmp_path, tag)
    pruner = vlmprune.QTSplus(weights=tmp_path, reencode=reencode)
    tokens = tokens_of(*golden["Xv"], instruction=golden["Qt"], instruction_mask=everything(golden["Qt"]))
    selection = pruner.select(tokens, torch.tensor([90] * 3))
    assert torch.equal(selection.index, golden[f"{tag}_indices"])
    if not reencode:
        assert selection.features is None
        return
    mine = selection.features[selection.index >= 0]
    if tag == "a":
        close(mine, golden["a_Z_reencoded_unpadded"])
        assert (mine - golden["a_Z_reencoded"]).abs().max() > 0.1, "the padding of official code shows"
    elif tag == "b":  # as many each: no padding
        close(mine, golden["b_Z_reencoded"])


def test_the_threshold_of_training(golden: dict[str, Any]) -> None:
    """t as Newton's method finds it in official code, on untempered scores."""
    for tag in TAGS:
        wanted = golden[f"{tag}_rho"] * 90
        for temperature, name in ((0.1, "newton10"), (0.5, "newton10_tau05")):
            found = qtsplus.threshold(golden[f"{tag}_r"], wanted, everything(golden["Xv"]), temperature)
            torch.testing.assert_close(found, golden[f"{tag}_t_{name}"], atol=1e-5, rtol=0)


@given(st.integers(0, 2**16), st.sampled_from([0.1, 0.5, 2.0]))
@settings(max_examples=20, deadline=None)
def test_the_threshold_keeps_what_is_wanted_and_has_the_right_gradient(seed: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 12, generator=generator, dtype=torch.float64).requires_grad_()
    valid = torch.arange(12) < torch.tensor([[12], [5]])
    wanted = torch.tensor([3.5, 2.0], dtype=torch.float64, requires_grad=True)

    def solve(logits: Tensor, wanted: Tensor) -> Tensor:
        return qtsplus.threshold(logits, wanted, valid, temperature)

    t = solve(logits, wanted)
    kept = (((logits - t[:, None]) / temperature).sigmoid() * valid).sum(1)
    torch.testing.assert_close(kept, wanted)
    assert torch.autograd.gradcheck(solve, (logits, wanted), eps=1e-5, atol=1e-4)


@pytest.fixture(scope="module")
def selector() -> TokenSelector:
    torch.manual_seed(0)
    made = TokenSelector(24, 4, 2, 3, scoring=2, reencode=2, most=9)
    for parameter in made.parameters():
        parameter.data.mul_(3)
    return made.eval().requires_grad_(False)


counts_of_items = st.lists(st.integers(1, 40), min_size=1, max_size=3)


@given(counts_of_items, st.integers(1, 6), st.integers(0, 2**16))
@settings(max_examples=30, deadline=None)
def test_properties(selector: TokenSelector, counts: list[int], length: int, seed: int) -> None:
    """Bounds of everything, and each sample as if it were alone."""
    visual, question = rows(len(counts), max(counts), 24, seed=seed), rows(len(counts), length, 24, seed=seed + 1)
    valid = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    words = torch.arange(length) < torch.arange(1, len(counts) + 1)[:, None].clamp(max=length)
    visual, question = visual * valid[..., None], question * words[..., None]
    scores = selector.scores(question, visual, words, valid)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert (scores[~valid] == 0).all()
    assert (scores.sum(1) >= 1 - 1e-5).all(), "at least one row of weights, which sums to 1"
    shares = selector.shares(question, scores, words, valid)
    assert ((shares >= 0.05) & (shares <= 0.5)).all()
    kept = selector.counts(shares, valid)
    assert ((kept >= 1) & (kept <= 9) & (kept <= torch.tensor(counts))).all()
    index = qtsplus.best(scores, kept, valid)
    there = index >= 0
    rewritten = selector.rewrite(visual.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, 24)), there)
    for number, count in enumerate(counts):
        own = index[number][there[number]]
        assert len(own) == kept[number]
        assert (own.diff() > 0).all()
        assert (own >= 0).all()
        assert (own < count).all()
        floor = scores[number, own].min()
        assert (scores[number, :count] > floor).sum() < len(own)
        v, w = visual[number : number + 1, :count], words[number].sum()
        q = question[number : number + 1, :w]
        alone = selector.scores(q, v, everything(q), everything(v))
        torch.testing.assert_close(alone[0], scores[number, :count], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(selector.shares(q, alone, everything(q), everything(v))[0], shares[number])
        mine = selector.rewrite(v[:, own], None)[0]
        torch.testing.assert_close(mine, rewritten[number, : len(own)], atol=1e-4, rtol=1e-4)


def test_one_row_of_weights_sums_to_one() -> None:
    """With one head and one question token the scores are a softmax."""
    queries, keys = rows(1, 1, 1, 8), rows(1, 11, 1, 8, seed=1)
    scores = qtsplus.relevance(queries, keys, torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 11, dtype=torch.bool))
    torch.testing.assert_close(scores.sum(), torch.tensor(1.0))
    torch.testing.assert_close(scores[0], (keys[0, :, 0] @ queries[0, 0, 0] / math.sqrt(8)).softmax(0))


def test_key_heads_serve_query_heads_in_order() -> None:
    """Against a plain computation with the key heads repeated."""
    queries, keys = 2 * rows(1, 3, 6, 8), rows(1, 7, 2, 8, seed=1)
    repeated = keys.repeat_interleave(3, 2)
    weights = torch.einsum("imhd,inhd->ihmn", queries, repeated).div(math.sqrt(8)).softmax(-1)
    words, valid = torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 7, dtype=torch.bool)
    torch.testing.assert_close(qtsplus.relevance(queries, keys, words, valid)[0], weights[0].flatten(0, 1).amax(0))


@given(st.integers(0, 2**16))
@settings(max_examples=15, deadline=None)
def test_what_changes_nothing(selector: TokenSelector, seed: int) -> None:
    visual, question = rows(1, 30, 24, seed=seed), rows(1, 5, 24, seed=seed + 1)
    words, valid = everything(question), everything(visual)
    scores = selector.scores(question, visual, words, valid)
    share = selector.shares(question, scores, words, valid)
    twice = torch.cat([question, question], 1)
    same = selector.scores(twice, visual, everything(twice), valid)
    torch.testing.assert_close(same, scores)
    torch.testing.assert_close(selector.shares(twice, same, everything(twice), valid), share)
    one = TokenSelector(24, 4, 2, 3).requires_grad_(False)
    plain = one.scores(question, visual, words, valid)
    scaled = visual * torch.linspace(0.5, 4, 30)[:, None]
    torch.testing.assert_close(one.scores(question, scaled, words, valid), plain, atol=1e-5, rtol=1e-4)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(one.scores(question, visual[:, order], words, valid), plain[:, order])


def test_without_a_question_the_first_tokens_stay(tmp_path: Path) -> None:
    TokenSelector(8, 2, 1, 4).save(tmp_path)
    for length in (0, 3):
        tokens = tokens_of(
            rows(20, 8),
            instruction=torch.zeros(1, length, 8),
            instruction_mask=torch.zeros(1, length, dtype=torch.bool),
        )
        kept = picks(vlmprune.QTSplus(weights=tmp_path, keep=5).select(tokens, torch.tensor([5])))
        assert kept == [[0, 1, 2, 3, 4]]


def test_budgets(tmp_path: Path) -> None:
    TokenSelector(8, 2, 1, 4, most=7).save(tmp_path)
    assert vlmprune.QTSplus(weights=tmp_path).budget([90, 1]) == [None, None]
    assert vlmprune.QTSplus(weights=tmp_path, keep=0.25).budget([90, 1, 0]) == [23, 1, 0]
    assert vlmprune.QTSplus(weights=tmp_path, keep=0.07).budget([100]) == [7]
    assert vlmprune.QTSplus(weights=tmp_path, keep=1.0).budget([90]) == [90]
    assert vlmprune.QTSplus(weights=tmp_path, keep=12).budget([90, 5]) == [12, 5]
    assert vlmprune.QTSplusTrainingFree().budget([576, 3]) == [64, 1]
    with pytest.raises(ValueError, match="only a run can tell"):
        vlmprune.estimate_flops(
            model_of(FAMILIES["llava-clip-llama"]),
            text_tokens=4,
            visual_tokens=25,
            pruner=vlmprune.QTSplus(weights=three_layers(tmp_path)),
        )


def three_layers(folder: Path, **fields: Any) -> Path:
    """Weights for the models of `families.py`."""
    torch.manual_seed(0)
    TokenSelector(48, 4, 2, 3, **fields).save(folder)
    return folder


def test_save_and_load(tmp_path: Path) -> None:
    made = TokenSelector(8, 2, 1, 4, scoring=2, reencode=0, most=7, share=(0.1, 0.3))
    made.save(tmp_path, minutes=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    again = TokenSelector.load(tmp_path)
    assert (again.width, again.heads, again.kv_heads, again.depth) == (8, 2, 1, 4)
    assert (again.most, again.share, len(again.reencode_layers)) == (7, (0.1, 0.3), 0)
    assert again.state_dict().keys() == made.state_dict().keys()
    for name, value in made.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, atol=1e-3, rtol=1e-3)
    pruner = vlmprune.QTSplus(weights=tmp_path, keep=3)
    tokens = tokens_of(rows(20, 8), instruction=rows(1, 3, 8), instruction_mask=torch.ones(1, 3, dtype=torch.bool))
    assert pruner.select(tokens, torch.tensor([3])).features is None
    # Written anew, read anew.
    TokenSelector(8, 2, 1, 4, most=2).save(tmp_path)
    assert vlmprune.QTSplus(weights=tmp_path)._selector.most == 2


def published(golden: dict[str, Any], folder: Path, tag: str = "a", shards: int = 1, **changes: Any) -> dict[str, Any]:
    """A folder as transformers saves the official model: its selector, the dead weights too, and other tensors."""
    config = {
        "architectures": ["QTSplusForCausalLM"],
        "hidden_size": 32,
        "vision_embed_size": 32,
        "num_attention_heads": golden["n_heads"],
        "num_key_value_heads": golden["n_kv_heads"],
        "num_hidden_layers": 4,
        "qts_plus_n_heads": 8,
        "qts_plus_nmax": golden[f"{tag}_nmax"],
        "qts_plus_rho_min": golden[f"{tag}_rho_min"],
        "qts_plus_rho_max": golden[f"{tag}_rho_max"],
        "qts_plus_scoring_layers": 1,
        "qts_plus_reencode_layers": golden["n_reencode"],
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {PREFIX + name[2:]: golden[name] for name in golden if name.startswith("w:")}
    tensors |= {"model.layers.0.mlp.up_proj.weight": torch.ones(4, 4), "lm_head.weight": torch.ones(2, 2)}
    write(folder, tensors, shards)
    return tensors


def write(folder: Path, tensors: dict[str, Tensor], shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    files = [f"model-{number + 1:05}-of-{shards:05}.safetensors" for number in range(shards)]
    weight_map = {name: files[number % shards] for number, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({name: value for name, value in tensors.items() if weight_map[name] == file}, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_published_checkpoint(golden: dict[str, Any], tmp_path: Path, shards: int, dtype: torch.dtype) -> None:
    tensors = published(golden, tmp_path, "c", shards)
    write(tmp_path, {name: value.to(dtype) for name, value in tensors.items()}, shards)
    selector = TokenSelector.load(tmp_path)
    assert (selector.depth, selector.most, selector.share) == (4, 2560, (0.25, 1.0))
    assert not selector.training
    for name, value in selector.state_dict().items():
        assert value.dtype == (torch.float32 if "budget" in name else dtype)
        assert torch.equal(value, tensors[PREFIX + name].to(dtype).to(value.dtype))
    if shards > 1:  # a shard with nothing of the selector need not be there
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        index["weight_map"]["lm_head.weight"] = "model-00009-of-00009.safetensors"
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        TokenSelector.load(tmp_path)


def test_published_settings(golden: dict[str, Any], tmp_path: Path) -> None:
    published(golden, tmp_path, qts_plus_reencode=False, qts_plus_nmax=512)
    selector = TokenSelector.load(tmp_path)
    assert len(selector.reencode_layers) == 0
    assert selector.most == 512
    nested = {"text_config": {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}}
    (tmp_path / "config.json").write_text(json.dumps({**nested, "num_hidden_layers": 4, "qts_plus_nmax": 512}))
    assert TokenSelector.load(tmp_path).kv_heads == 2


Q_PROJ = f"{PREFIX}scoring_layers.0.q_proj.weight"


def test_checkpoints_that_do_not_fit(golden: dict[str, Any], tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            vlmprune.create_pruner("qtsplus", weights=tmp_path)
        assert "\n" not in str(caught.value)

    for shards in (1, 3):
        tensors = published(golden, tmp_path, shards=shards)
        write(tmp_path, {name: value for name, value in tensors.items() if name != Q_PROJ}, shards)
        refused(rf"lacks '{Q_PROJ}'$")
        write(tmp_path, {name: value for name, value in tensors.items() if "budget" not in name}, shards)
        refused(rf"lacks '{PREFIX}budget.mlp.0.bias' and 3 more")
        write(tmp_path, {**tensors, Q_PROJ: torch.ones(32, 16)}, shards)
        refused(rf"'{Q_PROJ}' of shape \[32, 16\], where its config.json asks for \[32, 32\]")
        write(tmp_path, tensors, shards)
        TokenSelector.load(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    refused("cannot be read")
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    refused("cannot be read")
    published(golden, tmp_path, vision_embed_size=48)
    refused("scores rows 48 wide")
    published(golden, tmp_path, num_attention_heads=5)
    refused("do not divide")
    published(golden, tmp_path, qts_plus_rho_max=1.5)
    refused(r"shares in \(0, 1\]")
    (tmp_path / "config.json").write_text('{"qts_plus_nmax": 512}')
    refused("describes no QTSplus selector: it lacks 'hidden_size'")


def test_errors(tmp_path: Path) -> None:
    model = model_of(FAMILIES["llava-clip-llama"])
    TokenSelector(48, 4, 2, 28).save(tmp_path)
    with pytest.raises(ValueError, match="for a language model of 28 layers, this one has 3"):
        vlmprune.prune(model, "qtsplus", weights=tmp_path)
    TokenSelector(32, 4, 2, 3).save(tmp_path)
    inputs = FAMILIES["llava-clip-llama"].inputs(BATCHES["one"])
    with (
        vlmprune.prune(model, "qtsplus", weights=tmp_path),
        pytest.raises(ValueError, match="of width 32, this one has 48"),
    ):
        model(**inputs)
    with pytest.raises(ValueError, match="positions"):
        vlmprune.create_pruner("qtsplus", weights=tmp_path, positions="renumber")


def test_positions(tmp_path: Path) -> None:
    """Renumbered as published, except where a family's positions have several axes."""
    three_layers(tmp_path)
    for name, policy in (("llava-clip-llama", "compact"), ("qwen2.5-vl", "original")):
        family = next(case for key, case in FAMILIES.items() if key.startswith(name))
        with vlmprune.prune(model_of(family), "qtsplus", weights=tmp_path) as session:
            assert session.pruner.positions == policy
        with vlmprune.prune(model_of(family), "qtsplus-training-free") as session:
            assert session.pruner.positions == "original"


def test_predicted_budgets_differ_and_keep_overrides_them() -> None:
    family = FAMILIES["llava-clip-llama"]
    model, inputs, folder = model_of(family), family.inputs(BATCHES["unequal"]), random_weights.qtsplus()
    with torch.no_grad(), vlmprune.prune(model, "qtsplus", weights=folder) as session:
        model(**inputs)
        counts = {item.tokens_after for item in session.last.items}
    assert len(counts) > 2
    assert max(counts) <= 13
    assert not any(item.merged.any() for item in session.last.items), "rewritten, but each for itself"
    with torch.no_grad(), vlmprune.prune(model, "qtsplus", weights=folder, keep=20) as session:
        model(**inputs)
    assert {item.tokens_after for item in session.last.items} == {20}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    """As precise as the features, and of those nothing is left behind for the next model."""
    pruner = vlmprune.QTSplus(weights=three_layers(tmp_path), keep=0.3)
    words = torch.ones(1, 4, dtype=torch.bool)

    def select(dtype: torch.dtype) -> vlmprune.Selection:
        tokens = tokens_of(rows(40, 48).to(dtype), instruction=rows(1, 4, 48).to(dtype), instruction_mask=words)
        return pruner.select(tokens, torch.tensor([12]))

    before = select(torch.float32)
    low = select(dtype)
    assert low.features.dtype == dtype
    assert low.features.isfinite().all()
    assert len(set(picks(low)[0]) & set(picks(before)[0])) >= 10
    after = select(torch.float32)
    assert torch.equal(before.features, after.features)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_training_free_scores_are_the_last_layers(family: Any) -> None:
    """The signals against the last layer's own modules; the choice against a plain computation."""
    model, inputs = model_of(family), family.inputs(BATCHES["unequal"])
    adapter = adapter_for(model)
    layer = adapter.decoder_layers[-1]
    seen: list[Any] = []

    class Spy(vlmprune.QTSplusTrainingFree):
        needs = vlmprune.QTSplusTrainingFree.needs | {"instruction"}

        def select(self, tokens: vlmprune.VisualTokens, budget: Tensor) -> vlmprune.Selection:
            selection = super().select(tokens, budget)
            seen.append((tokens, {name: tokens.signal(name) for name in self.needs}, selection))
            return selection

    with torch.no_grad(), vlmprune.prune(model, Spy(keep=6)):
        model(**inputs)
    ((tokens, signals, selection),) = seen
    attention = layer.self_attn

    def heads(rows: Tensor, projection: Any, norm: str) -> Tensor:
        with torch.no_grad():
            out = projection(layer.input_layernorm(rows)).unflatten(-1, (-1, attention.head_dim))
            return getattr(attention, norm)(out) if hasattr(attention, norm) else out

    for number, (count, length) in enumerate(zip(tokens.counts, signals["instruction_mask"].sum(1).tolist())):
        queries = heads(signals["instruction"][number, :length], attention.q_proj, "q_norm")
        keys = heads(tokens.features[number, :count], attention.k_proj, "k_norm")
        torch.testing.assert_close(signals["instruction_queries"][number, :length], queries)
        torch.testing.assert_close(signals["instruction_keys"][number, :count], keys)
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
        weights = torch.einsum("mhd,nhd->hmn", queries, keys).mul(attention.head_dim**-0.5).softmax(-1)
        scores = weights.flatten(0, 1).amax(0)
        mine = picks(selection)[number]
        assert len(mine) == 6
        torch.testing.assert_close(scores[mine].sort(descending=True).values, scores.topk(6).values)


@pytest.fixture(scope="module")
def training() -> Any:
    return trainers.trainer("qtsplus")


@pytest.mark.parametrize("wanted", [None, 6])
@pytest.mark.parametrize("name", ["llava-clip-llama", "llava-next", "qwen2.5-vl", "qwen3-vl", "internvl"])
def test_the_hard_choice_of_the_training_is_the_sessions(training: Any, name: str, wanted: int | None) -> None:
    """What training masks out, rewrites and renumbers, and with answers behind the prompts, is what a session drops."""
    family = next(case for key, case in FAMILIES.items() if key.startswith(name))
    model, inputs, folder = model_of(family), family.inputs(BATCHES["unequal"]), random_weights.qtsplus()
    answers = torch.tensor([[11, 12]]).expand(len(inputs["input_ids"]), -1)
    longer = {name: torch.cat([inputs[name], extra], 1) for name, extra in (("input_ids", answers),)}
    longer["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(answers)], 1)
    if "mm_token_type_ids" in inputs:
        longer["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(answers)], 1)
    selection = training.Selection(model, TokenSelector.load(folder))
    selection.wanted, selection.prompt = wanted, inputs["input_ids"].shape[1]
    selection.shown = longer["attention_mask"].bool()
    with torch.no_grad():
        masked = model(**{**inputs, **longer}, use_cache=False).logits[:, -3]
    selection.remove()
    with torch.no_grad(), vlmprune.prune(model, "qtsplus", keep=wanted, weights=folder) as session:
        pruned = model(**inputs).logits[:, -1]
    assert session.last.changed
    for number, item in enumerate(session.last.items):
        assert item.kept.tolist() == selection.kept[number].nonzero().flatten().tolist()
    ends_in_text = (0, 1, 3)  # that of row 2 ends in an image, whose last token may be gone
    torch.testing.assert_close(pruned[list(ends_in_text)], masked[list(ends_in_text)], atol=1e-4, rtol=0)


def test_a_new_selector_scores_as_the_training_free_form(training: Any) -> None:
    family = FAMILIES["llava-clip-llama"]
    model, inputs = model_of(family), family.inputs(BATCHES["unequal"])
    selection = training.Selection(model, training.selector_for(model, training.Settings()))
    selection.wanted, selection.prompt = 6, inputs["input_ids"].shape[1]
    selection.shown = inputs["attention_mask"].bool()
    with torch.no_grad():
        model(**inputs, use_cache=False)
    selection.remove()
    with torch.no_grad(), vlmprune.prune(model, "qtsplus-training-free", keep=6) as session:
        model(**inputs)
    for number, item in enumerate(session.last.items):
        assert item.kept.tolist() == selection.kept[number].nonzero().flatten().tolist()


def test_gradients_reach_the_whole_selector_and_nothing_else(training: Any) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    model, processor = trainers.trainer("questions").load(None)
    model.set_attn_implementation("sdpa")
    settings = training.Settings(scoring=2, lambda_t=0.0, lambda_m=0.0, lambda_s=0.0)
    selector = training.selector_for(model, settings)
    run = training.Training(model.requires_grad_(False), selector, settings)
    answer = run(trainers.batch(processor, 6), None, settings.temperature)["loss"]
    answer.backward()
    for name, parameter in selector.named_parameters():
        still = "ffn.net.0" in name or "ffn_norm" in name  # behind a matrix that begins at 0
        assert (parameter.grad.abs().sum() > 0) != still, name
    assert all(parameter.grad is None for parameter in model.parameters())
    run.selection.remove()


def test_budget_terms_pull_the_share_down(training: Any) -> None:
    """lambda_t (rho N)^2 / nmax^2 + lambda_m rho N / nmax + lambda_s (rho - mean)^2, and their gradient."""
    family = FAMILIES["llava-clip-llama"]
    model, inputs = model_of(family), family.inputs([[1, ("image", 0), 2, 3, 4], [5, ("image", 1), 7, 8, 9]])
    inputs["labels"] = torch.where(torch.arange(inputs["input_ids"].shape[1]) == 28, inputs["input_ids"], -100)
    settings = training.Settings(most=20, lambda_t=0.3, lambda_m=0.2, lambda_s=0.1)
    selector = training.selector_for(model, settings)
    run = training.Training(model, selector, settings)
    parts = run(inputs, None, 0.5)
    tokens = parts["share"] * 25 / 20
    spread = (parts["share"] - parts["share"].mean()).square()
    torch.testing.assert_close(
        parts["loss"], parts["answer"] + (0.3 * tokens.square() + 0.2 * tokens + 0.1 * spread).mean()
    )
    (parts["loss"] - parts["answer"]).backward()
    assert selector.budget.mlp[2].bias.grad.item() > 0
    run.selection.remove()


def test_the_mean_share_is_that_of_all_processes(training: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["llava-clip-llama"]
    model, inputs = model_of(family), family.inputs([[1, ("image", 0), 2, 3, 4], [5, ("image", 1), 7, 8, 9]])
    inputs["labels"] = torch.where(torch.arange(inputs["input_ids"].shape[1]) == 28, inputs["input_ids"], -100)
    run = training.Training(model, training.selector_for(model, training.Settings()), training.Settings())

    def with_another(mean: Tensor, how: str) -> Tensor:
        assert how == "mean"
        return (mean + 0.4) / 2

    monkeypatch.setattr(training, "reduce", with_another)
    share = run(inputs, None, 0.5)["share"].mean().item()
    assert run.usual.item() == pytest.approx((share + 0.4) / 2)
    run.selection.remove()


def test_training_moves_the_selector_and_saves(training: Any, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    run = training.Settings(out=tmp_path, scenes=(6, 1), steps=3, batch=6, counts=(9,))
    training.train(run)
    again = TokenSelector.load(tmp_path)
    assert (again.width, again.depth, again.most) == (128, 4, 72)
    model, _ = trainers.trainer("questions").load(None)
    torch.manual_seed(run.seed)
    fresh = training.selector_for(model, run)
    moved = [name for name, value in fresh.state_dict().items() if not torch.allclose(value, again.state_dict()[name])]
    assert {name.split(".")[0] for name in moved} == {"scoring_layers", "budget", "reencode_layers"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert [row["asked"] for row in config["held_out"]] == ["predicted", 9]
    with pytest.raises(ValueError, match="for another language model"):
        training.selector_for(model, training.Settings(start=str(random_weights.qtsplus())))


def test_drawn_counts_cover_the_range(training: Any) -> None:
    settings = training.Settings(drawn=0.5)
    counts = [training.drawn(settings, step, 144) for step in range(200)]
    given = [count for count in counts if count is not None]
    assert len(given) == 100
    assert min(given) <= 8
    assert max(given) >= 68
    assert training.drawn(training.Settings(drawn=0.0), 5, 144) is None


def test_bundled_weights_fit_the_bundled_model() -> None:
    """On demo questions: budgets that differ and stay near the trained ones, and answers that are still right."""
    model, processor = bundled.load()
    asked = [(scene.image, question) for scene in bundled.demo_scenes() for question in scene.questions]
    chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q.text}]}] for _, q in asked]
    prompts = processor.apply_chat_template(chats, add_generation_prompt=True)
    inputs = processor(
        images=[[image] for image, _ in asked], text=prompts, padding=True, padding_side="left", return_tensors="pt"
    )

    def right(pruner: vlmprune.Pruner) -> tuple[int, list[int]]:
        with vlmprune.prune(model, pruner) as session:
            ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        replies = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        counts = [item.tokens_after for item in session.last.items]
        return sum(reply.strip() == question.answer for reply, (_, question) in zip(replies, asked)), counts

    mine, counts = right(vlmprune.QTSplus(weights=bundled.qtsplus_weights()))
    assert len(set(counts)) > 1
    assert 8 <= min(counts) <= max(counts) <= 40
    assert mine >= 0.8 * len(asked)
    assert mine > right(vlmprune.Random(keep=16))[0]

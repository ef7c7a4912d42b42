"""The cache stage: decoded tokens see only what the cache still holds, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import oracle
import pytest
import torch
from cases import BATCHES, Staged
from families import FAMILIES, FamilyCase
from test_laws import STEPS, columns_of, dropped_of, generate, model_of
from transformers.cache_utils import DynamicCache, StaticCache

import vlmprune


@dataclass(kw_only=True)
class Evict(vlmprune.Pruner):
    """Drops the least attended half of what each of its layers holds, behind the prefill and behind later steps."""

    keep: vlmprune.Keep = 0.5
    cut: tuple[int, ...] = (0, 2)
    due: tuple[int, ...] = (0, 3)
    before: Staged | None = None
    log: list[Any] = field(default_factory=list)

    name: ClassVar[str] = "evict"
    needs: ClassVar[frozenset[str]] = frozenset({"cache_attention", "cache_keys", "cache_alive"})

    def layers(self, depth: int) -> tuple[int, ...]:
        return self.before.layers(depth) if self.before else (0,)

    def budget(self, counts: Sequence[int], layer: int = 0, depth: int = 1) -> Sequence[int | None]:
        return self.before.budget(counts, layer, depth) if self.before else counts

    def select(self, tokens: vlmprune.VisualTokens, budget: torch.Tensor) -> vlmprune.Selection:
        assert self.before
        return self.before.select(tokens, budget)

    def cache_layers(self, depth: int) -> tuple[int, ...]:
        return () if self.keep == 1.0 else self.cut

    def cache_due(self, step: int) -> bool:
        return step in self.due

    def select_cache(self, tokens: vlmprune.VisualTokens) -> vlmprune.Selection:
        score = tokens.signal("cache_attention").masked_fill(~tokens.valid, -1)
        keep = torch.tensor([(count + 1) // 2 for count in tokens.counts])
        index = score.sort(dim=1, descending=True, stable=True).indices
        index = index.masked_fill(torch.arange(index.shape[1]) >= keep[:, None], -1)
        self.log.append((tokens.layer, tokens.index, index, tokens.signal("cache_alive")))
        return vlmprune.Selection(index)


def evicted_of(report: Any, pruner: Evict, length: int) -> oracle.Evicted:
    """When each visual token left which layer, from what the pruner was shown and chose, call by call."""
    until = {layer: torch.full((report.batch, report.length), 10**6) for layer in pruner.cut}
    per_step = len(pruner.log) // len(pruner.due)
    items = [item for item in report.items if item.tokens_before]
    for number, (layer, index, chosen, _) in enumerate(pruner.log):
        # Behind step t the queries of later columns no longer see it.
        first = length + pruner.due[number // per_step]
        for item, tokens, kept in zip(items, index, chosen):
            lost = torch.ones(len(tokens), dtype=torch.bool)
            lost[kept[kept >= 0]] = False
            until[layer][item.sample, columns_of(item)[tokens[lost]]] = first
    return until


@pytest.mark.parametrize("name", ["llava-clip-llama", "llava-next", "qwen2.5-vl", "qwen3-vl", "internvl"])
@pytest.mark.parametrize("staged", [False, True], ids=["alone", "staged"])
@pytest.mark.parametrize("policy", ["original", "compact"])
def test_oracle(name: str, staged: bool, policy: str) -> None:
    """Prefill and decode equal the unpruned model in which evicted columns are masked for later queries."""
    family = FAMILIES[name]
    if policy not in family.positions:
        pytest.skip("one position policy")
    model, inputs = model_of(family), family.inputs(BATCHES["unequal"])
    before = Staged(schedule=((0, 0.6), (2, 0.3)) if name == "qwen3-vl" else ((1, 0.6), (2, 0.3))) if staged else None
    pruner = Evict(before=before, positions=policy)
    with vlmprune.prune(model, pruner) as session:
        out = generate(model, inputs)
    report, length = session.last, inputs["input_ids"].shape[1]
    dropped = dropped_of(report, inputs)
    evicted = evicted_of(report, pruner, length)
    forced = out.sequences[:, length:]
    _, scores = oracle.run(model, inputs, dropped, policy, STEPS - 1, forced, {}, evicted)
    for step, (mine, theirs) in enumerate(zip(out.logits, scores)):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0, msg=lambda m, s=step: f"step {s}: {m}")
    for item in report.items:
        assert sorted(item.cached) == sorted(pruner.cut)
        for layer, held in item.cached.items():
            assert (evicted[layer][item.sample, columns_of(item)[held]] == 10**6).all()
    lengths = [layer.keys.shape[-2] for layer in out.past_key_values.layers]
    assert lengths[0] < report.layer_tokens[0] + STEPS - 1
    assert lengths[2] < report.layer_tokens[2] + STEPS - 1
    assert lengths[1] == report.layer_tokens[1] + STEPS - 1
    assert all(layer.get_seq_length() == length + STEPS - 1 for layer in out.past_key_values.layers)


def test_alive_tells_who_survived_the_stages() -> None:
    family = FAMILIES["llava-clip-llama"]
    pruner = Evict(before=Staged(schedule=((2, 0.3),)), cut=(0,), due=(0,))
    with vlmprune.prune(model_of(family), pruner) as session:
        generate(model_of(family), family.inputs(BATCHES["one"]))
    ((_, index, _, alive),) = pruner.log
    assert torch.equal(index[0][alive[0]], session.last.items[0].stages[-1].kept)


def test_merged_values_are_held() -> None:
    """Rows given in exchange become the cache's values; keys stay."""

    @dataclass(kw_only=True)
    class Mean(Evict):
        def select_cache(self, tokens: vlmprune.VisualTokens) -> vlmprune.Selection:
            self.log.append((tokens.features, tokens.signal("cache_keys")))
            mean = tokens.features.mean(1, keepdim=True)
            return vlmprune.Selection(torch.zeros(len(tokens.counts), 1, dtype=torch.int64), mean)

    family = FAMILIES["llava-clip-llama"]
    pruner = Mean(cut=(1,), due=(0,))
    with vlmprune.prune(model_of(family), pruner):
        out = generate(model_of(family), family.inputs(BATCHES["one"]))
    values, keys = pruner.log[0]
    layer = out.past_key_values.layers[1]
    torch.testing.assert_close(layer.values[0, :, 2].flatten(), values[0].mean(0))
    assert torch.equal(layer.keys[0, :, 2].flatten(), keys[0, 0])


def test_beams_and_a_second_turn() -> None:
    """Beam search reorders what is left; text behind goes on at the same positions."""
    family = FAMILIES["llava-clip-llama"]
    model, inputs = model_of(family), family.inputs(BATCHES["one"])
    pruner = Evict(due=(0,))
    with vlmprune.prune(model, pruner) as session:
        out = generate(model, inputs, num_beams=3)
        assert out.sequences.shape[0] == 1
        pruner.log.clear()
        first = generate(model, inputs)
        cache, report = first.past_key_values, session.last
        # The last generated token is not in the cache yet.
        ids = torch.cat([first.sequences, torch.tensor([[7, 8]])], 1)
        second = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=3,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    evicted = evicted_of(report, pruner, inputs["input_ids"].shape[1])
    whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    forced = second.sequences[:, ids.shape[1] :]
    _, scores = oracle.run(model, whole, oracle.everything_visible(whole), "original", 2, forced, {}, evicted)
    for mine, theirs in zip(second.logits, scores):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)


def test_static_cache_is_refused() -> None:
    family = FAMILIES["llava-clip-llama"]
    model = model_of(family)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=128)
    with pytest.raises(ValueError, match="DynamicCache"), vlmprune.prune(model, Evict()):
        generate(model, family.inputs(BATCHES["one"]), past_key_values=cache)


def test_all_kept_is_the_same_model() -> None:
    family = FAMILIES["llava-clip-llama"]
    model, inputs = model_of(family), family.inputs(BATCHES["unequal"])
    plain = generate(model, inputs)
    with vlmprune.prune(model, Evict(keep=1.0)):
        same = generate(model, inputs)
    for mine, theirs in zip(same.logits, plain.logits):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_reported_bytes_are_those_held(family: FamilyCase) -> None:
    """Layer by layer, behind a prefill whose cache was cut; and what all of it would have taken."""
    model, inputs = model_of(family), family.inputs(BATCHES["unequal"])
    heads = model.config.get_text_config().num_key_value_heads
    with torch.no_grad(), vlmprune.prune(model, Evict(before=Staged(schedule=((0, 0.6),)), cut=(1,))) as session:
        cache = DynamicCache(config=model.config)
        model(**inputs, past_key_values=cache)
    report, batch = session.last, len(inputs["input_ids"])
    held = [layer.keys.shape[-2] for layer in cache.layers]
    assert held[1] < held[0] == held[2] == report.layer_tokens[0]
    per_position = 2 * batch * heads * cache.layers[0].keys.shape[-1] * 4
    assert report.kv_bytes == [per_position * count for count in held]
    window = getattr(model.config.get_text_config(), "sliding_window", None)  # of which a cache holds one less
    whole = inputs["input_ids"].shape[1] if window is None else min(inputs["input_ids"].shape[1], window - 1)
    assert report.kv_bytes_full == 3 * per_position * whole
    for item in report.items:
        assert [stage.layer for stage in item.stages] == [0]
        assert sorted(item.cached) == [1]
        assert len(item.cached[1]) == (len(item.kept) + 1) // 2


def test_a_static_cache_saves_no_bytes() -> None:
    family = FAMILIES["llava-clip-llama"]
    model, inputs = model_of(family), family.inputs(BATCHES["one"])
    with vlmprune.prune(model, "divprune", keep=0.3) as session:
        generate(model, inputs, cache_implementation="static", disable_compile=True)
    assert session.last.kv_bytes_pruned == session.last.kv_bytes_full

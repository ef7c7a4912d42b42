"""The laws every method obeys on every family, in every batch (design part 4)."""

from __future__ import annotations

import warnings
from typing import Any

import oracle
import pytest
import torch
from cases import BATCHES, CENTRAL, KINDS, PRUNERS, batches_of, central, pruners_of, settings_of, widest
from families import FAMILIES, PLACEHOLDERS, SPECIAL, FamilyCase
from transformers.cache_utils import DynamicSlidingWindowLayer

import vlmprune

STEPS = 9  # the prefill's token and eight decode steps
_models: dict[Any, Any] = {}


def model_of(family: FamilyCase, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    key = (family.name, attention, dtype)
    if key not in _models:
        model = _models[key] = family.model(attention, dtype)
        # transformers puts hooks of its own on at the first call.
        generate(model, family.inputs(BATCHES[widest(family)], dtype=dtype), max_new_tokens=1)
    return _models[key]


def generate(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Any:
    options = {
        "max_new_tokens": STEPS,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
        "suppress_tokens": SPECIAL,  # a generated placeholder would ask for a further image
        **kwargs,
    }
    return model.generate(**inputs, **options)


def columns_of(item: Any) -> torch.Tensor:
    """Column of every visual token of an item of a report."""
    return item.start + torch.arange(item.tokens_before) if item.columns is None else item.columns


def dropped_of(report: Any, inputs: dict[str, Any]) -> dict[int, torch.Tensor]:
    """Layer -> bool [B, S]: the columns that the report says are gone from that layer on."""
    dropped = oracle.everything_visible(inputs)
    for layer in sorted({stage.layer for item in report.items for stage in item.stages}):
        gone = torch.zeros_like(dropped[0])
        for item in report.items:
            (kept,) = (stage.kept for stage in item.stages if stage.layer == layer)
            lost = ~torch.isin(torch.arange(item.tokens_before), kept)
            gone[item.sample, columns_of(item)[lost]] = True
        dropped[layer] = gone
    return dropped


class Recorded:
    """What a pruner chose, call by call, while the block runs."""

    def __init__(self, pruner: vlmprune.Pruner) -> None:
        self.cls, self.calls = type(pruner), []

    def __enter__(self) -> list[tuple[int, vlmprune.Selection]]:
        plain = self.cls.select

        def select(pruner: Any, tokens: vlmprune.VisualTokens, budget: torch.Tensor) -> vlmprune.Selection:
            selection = plain(pruner, tokens, budget)
            self.calls.append((tokens.layer, selection))
            return selection

        self.own, self.cls.select = vars(self.cls).get("select"), select
        return self.calls

    def __exit__(self, *exception: object) -> None:
        if self.own is None:
            del self.cls.select
        else:
            self.cls.select = self.own


def merged_rows(report: Any, pruner: vlmprune.Pruner, calls: list[tuple[int, vlmprune.Selection]]) -> oracle.Merged:
    """The rows that the pruner gave in exchange, at the layers and columns where they belong."""
    merged: oracle.Merged = {}
    depth = len(report.layer_tokens)
    left = [torch.arange(item.tokens_before) for item in report.items]
    selections = dict(calls)
    assert len(selections) == len(calls)
    for layer in sorted({stage.layer for item in report.items for stage in item.stages}):
        budgets = pruner.budget([item.tokens_before for item in report.items], layer, depth)
        chosen = [
            number
            for number, keep in enumerate(budgets)
            if len(left[number]) and (keep is None or 0 < keep < len(left[number]))
        ]
        selection = selections.get(layer)
        if selection is not None and selection.features is not None:
            assert len(chosen) == len(selection.index)
            for number, index, rows in zip(chosen, selection.index, selection.features):
                item, columns = report.items[number], columns_of(report.items[number])
                for token, row in zip(index[index >= 0].tolist(), rows):
                    merged.setdefault(layer, []).append((item.sample, int(columns[left[number][token]]), row))
        for number, item in enumerate(report.items):
            (left[number],) = (stage.kept for stage in item.stages if stage.layer == layer)
    return merged


def method_of(family: FamilyCase, name: str) -> vlmprune.Pruner:
    return PRUNERS[name].make(settings_of(family, name)[0])


def prefill(model: Any, pruner: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
    # Where generate() puts the columns: positions shifted by padding differ in the last bits, and near ties with them.
    placed = {}
    if "mm_token_type_ids" not in inputs:
        placed["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), vlmprune.prune(model, pruner) as session:
        return model(**inputs, **placed).logits, session.last


every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
every_pruner = pytest.mark.parametrize("pruner", PRUNERS)
central_pair = pytest.mark.parametrize(
    ("family", "pruner"),
    [
        pytest.param(case, name, id=f"{case.name}-{name}")
        for case in FAMILIES.values()
        for name in pruners_of(case)
        if central(case, name)
    ],
)


def oracle_cases() -> Any:
    """(family, batch, pruner, hard, policy, attention): all for each kind of stage, each pruner on one batch."""
    for family in FAMILIES.values():
        for pruner in pruners_of(family):
            first, *others = settings_of(family, pruner)
            every = family.name == CENTRAL
            for batch in batches_of(family) if central(family, pruner) else (widest(family),):
                whole = pruner in KINDS or (every and batch == widest(family))
                for attention in ("eager", "sdpa") if whole else ("sdpa",):
                    for hard in (first, *others) if every and batch == widest(family) else (first,):
                        for policy in family.positions if every or batch == widest(family) else ("original",):
                            name = f"{family.name}-{batch}-{pruner}{'-hard' * hard}-{policy}-{attention}"
                            yield pytest.param(family, batch, pruner, hard, policy, attention, id=name)


@every_family
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_identity(family: FamilyCase, attention: str, dtype: torch.dtype) -> None:
    """Law 1: with keep=1.0 logits and ids are bit for bit the untouched model's."""
    model = model_of(family, attention, dtype)
    for batch, prompts in batches_of(family).items():
        inputs = family.inputs(prompts, dtype=dtype)
        with torch.no_grad():
            logits = model(**inputs).logits
        ids = generate(model, inputs, max_new_tokens=3).sequences
        for name in pruners_of(family):
            if batch != widest(family) and not (name in KINDS or (central(family, name) and batch == "text")):
                continue
            pruner = PRUNERS[name].make(settings_of(family, name)[0], keep=1.0)
            with torch.no_grad(), vlmprune.prune(model, pruner) as session:
                assert torch.equal(model(**inputs).logits, logits), name
                assert torch.equal(generate(model, inputs, max_new_tokens=3).sequences, ids), name
            assert not session.last.changed
            assert session.last.tokens_after == session.last.tokens_before


def stages_of(report: Any) -> list[list[list[int]]]:
    return [[stage.kept.tolist() for stage in item.stages] for item in report.items]


def check_report(
    family: FamilyCase, batch: str, method: vlmprune.Pruner, report: Any, cache: Any, inputs: dict[str, Any], steps: int
) -> None:
    """Laws 5 and 6 of a report, against the cache that `steps` tokens of generate() left."""
    spans = [(item.sample, item.start, item.tokens_before) for item in report.items]
    assert spans == family.spans(BATCHES[batch])
    for item in report.items:
        assert torch.isin(inputs["input_ids"][item.sample, columns_of(item)], torch.tensor(PLACEHOLDERS)).all()
        assert len(item.geometry) == item.tokens_before
        assert [stage.layer for stage in item.stages] == list(method.layers(3))
        for stage in item.stages:
            budget = method.budget([item.tokens_before], stage.layer, 3)[0]
            wanted = len(stage.kept) if budget is None else budget
            assert len(stage.kept) == wanted <= item.tokens_before
            assert stage.kept.dtype == torch.int64
            assert (stage.kept[1:] > stage.kept[:-1]).all()
            assert ((stage.kept >= 0) & (stage.kept < item.tokens_before)).all()
        assert item.tokens_after == wanted
        # An adaptive method may have nothing to judge an image by that no text follows.
        assert wanted < item.tokens_before or budget is None
        assert len(item.kept) == (len(item.stages[0].kept) if item.stages[0].layer == 0 else item.tokens_before)
    if not report.changed:
        assert batch == "text"
        assert not report.items
        return
    dropped, real = dropped_of(report, inputs), inputs["attention_mask"].bool()
    left = real & ~dropped[max(dropped)]
    for row, columns in enumerate(report.columns):
        assert torch.equal(columns[columns >= 0], left[row].nonzero().flatten())
    for number, layer in enumerate(cache.layers):
        gone = dropped[max(stage for stage in dropped if stage <= number)]
        longest = int((real & ~gone).sum(1).max())
        assert report.layer_tokens[number] == longest
        assert layer.get_seq_length() == real.shape[1] + steps - 1
        if isinstance(layer, DynamicSlidingWindowLayer):  # not pruned: transformers' own, which forgets
            continue
        assert layer.keys.shape[-2] == longest + steps - 1
        per_token = 2 * layer.keys.shape[1] * layer.keys.shape[3] * 4
        assert report.kv_bytes[number] == len(real) * longest * per_token
    assert report.flops_pruned < report.flops_full
    window = getattr(report.config.get_text_config(), "sliding_window", None)
    held = real.shape[1] if window is None else min(real.shape[1], window - 1)
    assert report.kv_bytes_full == len(report.kv_bytes) * len(real) * held * per_token
    # What was kept is held whole, where an unpruned cache forgets what its window has passed.
    assert window is not None or report.kv_bytes_pruned < report.kv_bytes_full


@pytest.mark.parametrize(("family", "batch", "pruner", "hard", "policy", "attention"), oracle_cases())
def test_oracle(family: FamilyCase, batch: str, pruner: str, hard: bool, policy: str, attention: str) -> None:
    """Law 2: prefill and 8 decode steps equal the unpruned model with the dropped tokens masked.

    Laws 4 to 7 hold in every one of these cells too: no trace, a true report, the same choice twice.
    """
    model, inputs = model_of(family, attention), family.inputs(BATCHES[batch])
    method = PRUNERS[pruner].make(hard, positions=policy)
    before = snapshot(model)
    logits, report = prefill(model, method, inputs)
    steps = STEPS if central(family, pruner) else 3
    with vlmprune.prune(model, method) as session, Recorded(method) as calls:
        out = generate(model, inputs, max_new_tokens=steps)
    assert snapshot(model) == before
    assert stages_of(report) == stages_of(session.last)
    if central(family, pruner):
        check_report(family, batch, method, session.last, out.past_key_values, inputs, steps)
    dropped = dropped_of(session.last, inputs)
    assert bool(dropped[max(dropped)].any()) == (batch != "text") == session.last.changed
    merged = merged_rows(session.last, method, calls)
    forced = out.sequences[:, inputs["input_ids"].shape[1] :]
    full, scores = oracle.run(model, inputs, dropped, policy, steps - 1, forced, merged)
    for step, (mine, theirs) in enumerate(zip(out.logits, scores)):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0, msg=lambda m, s=step: f"step {s}: {m}")
    columns = report.columns if report.changed else torch.arange(full.shape[1]).expand(len(full), -1)
    real = (columns >= 0) & inputs["attention_mask"].bool().gather(1, columns.clamp(min=0))
    theirs = full.gather(1, columns.clamp(min=0)[..., None].expand(-1, -1, full.shape[-1]))
    torch.testing.assert_close(logits[real], theirs[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "pruner", "attention"),
    [
        pytest.param(case, name, attention, id=f"{case.name}-{name}-{attention}")
        for case in FAMILIES.values()
        for name in pruners_of(case)
        for attention in (("eager", "sdpa") if name in KINDS else ("sdpa",))
    ],
)
def test_alone_or_together(family: FamilyCase, pruner: str, attention: str) -> None:
    """Law 3: a prompt in a padded batch of unequal ones keeps the same tokens and says the same as alone."""
    model, prompts = model_of(family, attention), BATCHES[widest(family)]
    whole = central(family, pruner)
    steps = STEPS if whole else 1
    for hard in settings_of(family, pruner) if whole else settings_of(family, pruner)[:1]:
        with vlmprune.prune(model, PRUNERS[pruner].make(hard)) as session:
            together = generate(model, family.inputs(prompts), max_new_tokens=steps)
            report = session.last
            for row, prompt in enumerate(prompts):
                alone = generate(model, family.inputs([prompt]), max_new_tokens=steps)
                items = [item for item in report.items if item.sample == row]
                assert len(items) == len(session.last.items)
                for mine, its in zip(items, session.last.items):
                    assert [stage.kept.tolist() for stage in mine.stages] == [s.kept.tolist() for s in its.stages]
                for step in range(steps):
                    torch.testing.assert_close(together.logits[step][row], alone.logits[step][0], atol=1e-4, rtol=0)


def snapshot(model: Any) -> dict[str, Any]:
    return {
        name: (type(module), set(vars(module)), len(module._forward_pre_hooks), len(module._forward_hooks))
        for name, module in model.named_modules()
    }


@central_pair
def test_no_trace(family: FamilyCase, pruner: str) -> None:
    """Law 4: hooks, attributes, classes and outputs are as before, after exceptions too."""
    model, inputs = model_of(family), family.inputs(BATCHES["unequal"])
    logits = generate(model, inputs).logits
    before = snapshot(model)
    session = vlmprune.prune(model, method_of(family, pruner))
    with pytest.raises(ValueError, match="close"):
        vlmprune.prune(model, method_of(family, pruner))
    generate(model, inputs)
    session.close()
    session.close()
    assert snapshot(model) == before

    def fail_inside() -> None:
        with vlmprune.prune(model, method_of(family, pruner)):
            generate(model, inputs)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert snapshot(model) == before
    ids = inputs["input_ids"]
    broken = {**inputs, "input_ids": ids.masked_fill(torch.isin(ids, torch.tensor(PLACEHOLDERS)), 5)}
    with pytest.raises(ValueError, match="placeholders"), vlmprune.prune(model, method_of(family, pruner)) as session:
        generate(model, broken)
    assert snapshot(model) == before
    for mine, its in zip(generate(model, inputs).logits, logits):
        assert torch.equal(mine, its)


@pytest.mark.parametrize(
    ("family", "pruner", "batch"),
    [
        pytest.param(case, name, batch, id=f"{case.name}-{name}-{batch}")
        for case in FAMILIES.values()
        for name in pruners_of(case)
        if central(case, name) and len(settings_of(case, name)) > 1
        for batch in batches_of(case)
    ],
)
def test_truth(family: FamilyCase, pruner: str, batch: str) -> None:
    """Laws 5 and 6 for the hard settings: the report is what the model saw; text stays; indices are in order."""
    model, inputs = model_of(family), family.inputs(BATCHES[batch])
    method = PRUNERS[pruner].make(hard=True)
    with vlmprune.prune(model, method) as session:
        out = generate(model, inputs)
    check_report(family, batch, method, session.last, out.past_key_values, inputs, STEPS)


@central_pair
def test_divergence(family: FamilyCase, pruner: str) -> None:
    """Law 5: below keep=1 the logits really change."""
    model, inputs = model_of(family), family.inputs(BATCHES["one"])
    with torch.no_grad():
        full = model(**inputs).logits[:, -1]
    logits, report = prefill(model, method_of(family, pruner), inputs)
    assert report.changed
    assert (logits[:, -1] - full).abs().max() > 1e-3


@central_pair
def test_determinism(family: FamilyCase, pruner: str) -> None:
    """Law 7: the same input keeps the same tokens, call after call."""
    model, inputs = model_of(family), family.inputs(BATCHES["unequal"])
    kept = []
    for _ in range(3):
        _, report = prefill(model, method_of(family, pruner), inputs)
        kept.append([item.kept.tolist() for item in report.items])
    assert kept[0] == kept[1] == kept[2]


@every_pruner
def test_attention_choice_is_kept(pruner: str) -> None:
    """Law 8: the user's attention implementation is never changed."""
    family = FAMILIES["llava-clip-llama"]
    for attention in ("eager", "sdpa"):
        model = model_of(family, attention)
        with vlmprune.prune(model, method_of(family, pruner)):
            generate(model, family.inputs(BATCHES["one"]))
            assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {
                attention
            }


def test_warnings_are_not_raised_by_ordinary_use() -> None:
    family = FAMILIES["llava-clip-llama"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with vlmprune.prune(model_of(family), "divprune", keep=0.3):
            generate(model_of(family), family.inputs(BATCHES["unequal"]))

"""Signals against the weights that eager attention really used, on every family."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from cases import BATCHES, batches_of
from families import FAMILIES, FamilyCase
from test_laws import model_of

import vlmprune
from vlmprune.adapters import adapter_for
from vlmprune.contract import CORE

STAGES = (0, 1, 2)
TRANSITIONS, OVERLAPS = {"transition", "transition_strict"}, {"activation_overlap", "core_overlap"}
LATER = {"last_attention", "text_attention", "visual_attention", "all_attention", *TRANSITIONS, *OVERLAPS}


@dataclass(kw_only=True)
class Probe(vlmprune.Pruner):
    """Reads every signal of its `needs` at every stage, and keeps all tokens or drops `drop` of them at the first."""

    drop: int = 0
    stages: tuple[int, ...] = STAGES
    wanted: frozenset[str] = frozenset()
    seen: dict[int, Any] = field(default_factory=dict)

    name: ClassVar[str] = "probe"

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.wanted

    def layers(self, depth: int) -> tuple[int, ...]:
        return self.stages

    def accumulate(self, depth: int) -> tuple[int, ...]:
        return (0, 1)

    def budget(self, counts: Any, layer: int = 0, depth: int = 1) -> list[None]:
        return [None] * len(counts)

    def select(self, tokens: vlmprune.VisualTokens, budget: torch.Tensor) -> vlmprune.Selection:
        signals = {}
        for name in self.wanted:
            if tokens.layer or name not in LATER:
                signals[name] = tokens.signal(name)
        self.seen[tokens.layer] = (tokens, signals, tokens.project)
        index = torch.arange(tokens.features.shape[1]).expand(len(tokens.counts), -1)
        gone = (index % 2 == 0) & (index < 2 * self.drop) & (tokens.layer == self.stages[0])
        return vlmprune.Selection(index.masked_fill(~tokens.valid | gone, -1))


def record(model: Any, module_of: Any, inputs: dict[str, Any]) -> dict[Any, torch.Tensor]:
    """Attention weights [B, H, Q, S] of every attention module of an eager model, by module (packed towers: a list)."""
    weights: dict[Any, list[torch.Tensor]] = {}
    names = {type(module).__module__ for module in model.modules()}
    patched = []
    for name in names:
        module = sys.modules[name]
        plain = vars(module).get("eager_attention_forward")
        if plain is not None:

            def spy(attention: Any, *args: Any, plain: Any = plain, **kwargs: Any) -> Any:
                out = plain(attention, *args, **kwargs)
                weights.setdefault(attention, []).append(out[1])
                return out

            patched.append((module, plain))
            module.eager_attention_forward = spy
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for module, plain in patched:
            module.eager_attention_forward = plain
    return weights


def probe(family: FamilyCase, wanted: Any, prompts: Any, **fields: Any) -> tuple[Any, Any, Probe, Any]:
    model, inputs = model_of(family, "eager"), family.inputs(prompts)
    stages = tuple(stage for stage in STAGES if stage == 0 or stage >= adapter_for(model).earliest_stage)
    pruner = Probe(wanted=frozenset(wanted), **{"stages": stages, **fields})
    with torch.no_grad(), vlmprune.prune(model, pruner) as session:
        model(**inputs)
    return model, inputs, pruner, session.last


def close(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(mine, theirs.to(mine.dtype), atol=2e-5, rtol=1e-4)


def columns_of(item: Any) -> torch.Tensor:
    return item.start + torch.arange(item.tokens_before) if item.columns is None else item.columns


every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
DECODER = ("last_attention", "text_attention", "visual_attention")


@every_family
def test_attention_of_decoder_layers(family: FamilyCase) -> None:
    """Rows and sums equal the weights of eager attention, in batches with padding, images, videos."""
    prompts = BATCHES["mixed" if family.video_tokens else "unequal"]
    more = ["all_attention", "next_inner_attention", "next_keys", "next_plain_keys", "text_mask"]
    wanted = [*DECODER, *(f"next_{name}" for name in DECODER), *more]
    model, inputs, pruner, report = probe(family, wanted, prompts)
    layers = adapter_for(model).decoder_layers
    keys: dict[Any, torch.Tensor] = {}
    hooks = [
        getattr(layer.self_attn, "k_norm", layer.self_attn.k_proj).register_forward_hook(
            lambda module, args, output, layer=layer: keys.update({layer.self_attn: output})
        )
        for layer in layers
    ]
    weights = record(model, None, inputs)
    for hook in hooks:
        hook.remove()
    real = inputs["attention_mask"].bool()
    visual = [torch.zeros(real.shape[1], dtype=torch.bool) for _ in real]
    for item in report.items:
        first, last = columns_of(item)[[0, -1]].tolist()
        visual[item.sample][first : last + 1] = True
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    for stage in pruner.stages:
        _, signals, _ = pruner.seen[stage]
        for prefix, layer in (("", stage - 1), ("next_", stage)):
            if layer < 0:
                continue
            mean = weights[layers[layer].self_attn][0].float().mean(1)
            for number, item in enumerate(report.items):
                columns, count = columns_of(item), item.tokens_before
                rows = mean[item.sample]
                end = int(real[item.sample].nonzero()[-1])
                close(signals[prefix + "last_attention"][number, :count], rows[end, columns])
                if window is not None:  # rows before the last are given the last one's window
                    continue
                text = real[item.sample] & ~visual[item.sample]
                text[: columns[-1] + 1] = False
                wanted_rows = rows[text][:, columns]
                assert signals["text_mask"][number].sum() == len(wanted_rows)
                close(signals[prefix + "text_attention"][number, : len(wanted_rows), :count], wanted_rows)
                close(signals[prefix + "visual_attention"][number, :count], rows[columns][:, columns].sum(0))
                if prefix:
                    heads = weights[layers[layer].self_attn][0][item.sample].float()[:, columns][:, :, columns]
                    inner = (heads / heads.sum(-1, keepdim=True)).mean(0).sum(0)
                    close(signals["next_inner_attention"][number, :count], inner)
                    plain = keys[layers[layer].self_attn][item.sample, columns].float()
                    plain = plain.view(count, -1, layers[layer].self_attn.head_dim).mean(1)
                    close(signals["next_plain_keys"][number, :count], plain)
                else:
                    shown = real[item.sample]
                    seen_by = shown.flip(0).cumsum(0).flip(0)
                    close(signals["all_attention"][number, :count], (rows[shown].sum(0) / seen_by)[columns])


@every_family
def test_signals_follow_the_tokens_that_are_left(family: FamilyCase) -> None:
    """Behind a stage that dropped tokens, attention is that of the shorter sequence, aligned with what is left."""
    earliest = adapter_for(model_of(family, "eager")).earliest_stage
    stages = (0, max(1, earliest)) if earliest < 3 else (0,)
    wanted = ["next_last_attention", "encoder_features", "projector_inputs", "prompt_features"]
    _, _, pruner, _ = probe(family, wanted, BATCHES["unequal"], drop=3, stages=stages)
    for stage in stages[1:]:
        tokens, signals, _ = pruner.seen[stage]
        _, whole, _ = pruner.seen[0]
        for number, (count, index) in enumerate(zip(tokens.counts, tokens.index)):
            assert count == len(index) < len(tokens.shapes[number])
            if "window" not in family.name:
                assert (signals["next_last_attention"][number, :count] > 0).all()
            assert (signals["next_last_attention"][number, count:] == 0).all()
            for name in ("encoder_features", "projector_inputs"):
                assert torch.equal(signals[name][number, :count], whole[name][number, index])
            assert torch.equal(signals["prompt_features"][number], whole["prompt_features"][number])


@every_family
def test_projector_takes_its_inputs_to_the_features(family: FamilyCase) -> None:
    """Each visual token is the projection of its own row: the rows are aligned with the tokens."""
    for prompts in batches_of(family).values():
        _, _, pruner, _ = probe(family, ["projector_inputs", "encoder_features"], prompts)
        if 0 not in pruner.seen:
            continue
        tokens, signals, project = pruner.seen[0]
        with torch.no_grad():
            projected = project(signals["projector_inputs"])
        for number, (count, geometry) in enumerate(zip(tokens.counts, tokens.geometry)):
            if family.name == "llava-onevision":  # interpolates behind the projector where it pools
                side = geometry.pictures[0][0]
                if geometry.kind == "video" or any(max(grid) != side for grid in geometry.grids[1:]):
                    continue
            placed = ~geometry.placeless
            close(projected[number, :count][placed], tokens.features[number, :count][placed])
            features = signals["encoder_features"][number, :count]
            assert (features[placed].norm(dim=-1) > 0).all()
            assert (features[~placed] == 0).all()


@every_family
def test_attention_of_the_tower(family: FamilyCase) -> None:
    """CLS rows and attention received equal eager attention's, token by token."""
    model = model_of(family, "eager")
    adapter = adapter_for(model)
    tower = adapter.tower
    wanted = {"cls_attention", "cls_attention_last", "received_attention", "received_attention_last", "encoder_keys"}
    wanted = (wanted | {"received_logits", "given_logits"}) & adapter.signals
    assert ("cls_attention" in wanted) == bool(tower.prefix)
    _, inputs, pruner, _ = probe(family, wanted, BATCHES["three"], stages=(0,))
    tokens, signals, _ = pruner.seen[0]
    weights = record(model, None, inputs)
    last = len(tower.attentions) - 1
    before = 0
    for number, (count, geometry) in enumerate(zip(tokens.counts, tokens.geometry)):
        for name, layer in (("received_attention", tower.feature_layer), ("received_attention_last", last)):
            parts = weights[tower.attentions[layer]]
            if tower.prefix or (len(parts) == 1 and len(parts[0]) > 1):
                mean = torch.cat([part.float().mean(1) for part in parts])
                received = mean[:, tower.prefix :, tower.prefix :].mean(1).flatten()
                if tower.prefix:
                    cls = mean[:, 0, 1:].flatten()
                    signal = name.replace("received", "cls")
                    close(signals[signal][number, :count], averaged(cls, geometry, before))
            else:  # packed; tokens lie in the order of the windows
                received = torch.cat([part[0].float().mean(0).mean(0) for part in parts])
                left = {"grid": inputs["image_grid_thw"]}
                received = tower._restored(received.view(-1, tower.merge**2), left).flatten()
            close(signals[name][number, :count], averaged(received, geometry, before))
        before += sum(rows * cols for rows, cols in geometry.pictures)


def averaged(table: torch.Tensor, geometry: Any, before: int) -> torch.Tensor:
    values = table[geometry.sources.clamp(min=0) + before].mean(1)
    return values.masked_fill(geometry.placeless, 0)


@every_family
def test_transition_and_overlap(family: FamilyCase) -> None:
    """TTV and FFN overlap from what the blocks took and gave."""
    model = model_of(family, "eager")
    adapter = adapter_for(model)
    wanted = (TRANSITIONS | OVERLAPS) & adapter.signals
    model.generation_config.eos_token_id = [95]
    _, inputs, pruner, report = probe(family, wanted, BATCHES["unequal"])
    model.generation_config.eos_token_id = None
    taken: dict[Any, Any] = {}

    def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        taken[module] = (
            args[0] if args else kwargs["hidden_states"],
            output[0] if isinstance(output, tuple) else output,
        )

    layers = adapter.decoder_layers
    blocks = [block for layer in layers[:2] for block in (layer.self_attn, layer.mlp)]
    hooks = [block.register_forward_hook(keep, with_kwargs=True) for block in blocks]
    if "activation_overlap" in wanted:
        hooks += [layer.mlp.down_proj.register_forward_hook(keep, with_kwargs=True) for layer in layers]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    real = inputs["attention_mask"].bool()
    for stage in pruner.stages[1:]:
        _, signals, _ = pruner.seen[stage]
        for number, item in enumerate(report.items):
            columns, total, strict = columns_of(item), torch.zeros(real.shape[1]), 0.0
            for block in blocks[: 2 * stage]:
                x, y = (part[item.sample][real[item.sample]].float() for part in taken[block])
                cosine = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
                weight = (1 - cosine).exp()
                total[real[item.sample]] += y.norm(dim=-1) / x.norm(dim=-1) * weight / weight.sum()
                x, y = (part[item.sample][columns].float() for part in taken[block])
                turn = 1 - torch.cosine_similarity(x, y, dim=-1).abs()
                strict = strict + y.norm(dim=-1) / x.norm(dim=-1) * turn.softmax(0)
            close(signals["transition"][number, : len(columns)], total[columns])
            close(signals["transition_strict"][number, : len(columns)], strict)
            if "activation_overlap" in wanted:
                active = taken[layers[stage - 1].mlp.down_proj][0][item.sample] > 0
                others = [columns_of(other) for other in report.items if other.sample == item.sample]
                text = real[item.sample].clone()
                text[torch.cat(others)] = False
                last = int(text.nonzero()[-1])
                together = (active & active[last]).sum(-1)
                close(signals["activation_overlap"][number, : len(columns)], together[columns])
                core = core_by_definition(taken[layers[stage - 1].mlp.down_proj][0][item.sample][real[item.sample]])
                close(signals["core_overlap"][number, : len(columns)], active[columns][:, core].sum(-1))


def core_by_definition(activations: torch.Tensor) -> list[int]:
    """CoreMatching's core neurons of a prompt [S, F], counted one by one."""
    often = [0] * activations.shape[1]
    for row in activations.tolist():
        positive = sorted((value, number) for number, value in enumerate(row) if value > 0)[::-1]
        for _, number in positive[: math.ceil(CORE * len(positive))]:
            often[number] += 1
    ranked = sorted(range(len(often)), key=lambda number: (-often[number], number))
    return ranked[: math.ceil(CORE * len(often))]


@every_family
def test_mean_logits_of_the_tower(family: FamilyCase) -> None:
    """Column and row means of the logits between patches, from the whole map of queries and keys."""
    model, wanted = model_of(family, "eager"), {"received_logits", "given_logits"}
    tower, inputs = adapter_for(model).tower, family.inputs(BATCHES["three"])
    pruner = Probe(wanted=frozenset(wanted), stages=(0,))
    made: list[Any] = []
    plain = tower.queries_and_keys

    def spy(*args: Any) -> Any:
        made.append(plain(*args))
        return made[-1]

    with torch.no_grad(), vlmprune.prune(model, pruner) as session:
        session.adapter.tower.queries_and_keys = spy
        try:
            model(**inputs)
        finally:
            del session.adapter.tower.queries_and_keys
    tokens, signals, _ = pruner.seen[0]
    q, k, mask = made[0]
    logits = (q.float() @ k.float().mT).mean(1)[:, tower.prefix :, tower.prefix :] * q.shape[-1] ** -0.5
    real = torch.ones(logits.shape[:2], dtype=torch.bool) if mask is None else mask
    count = real.sum(1, keepdim=True)
    tables = {
        "received_logits": ((logits * real[..., None]).sum(1) / count)[real],
        "given_logits": ((logits * real[:, None]).sum(2) / count)[real],
    }
    if hasattr(tower, "merge"):
        left = {"grid": inputs["image_grid_thw"]}
        tables = {
            name: tower._restored(table.view(-1, tower.merge**2), left).flatten() for name, table in tables.items()
        }
    before = 0
    for number, (size, geometry) in enumerate(zip(tokens.counts, tokens.geometry)):
        for name, table in tables.items():
            close(signals[name][number, :size], averaged(table, geometry, before))
        before += sum(rows * cols for rows, cols in geometry.pictures)


def test_instruction_is_the_last_turn_of_the_user() -> None:
    """Turns end with the end-of-sequence token; without one, the text behind the last image is the question."""
    family = FAMILIES["llava-clip-llama"]
    model = model_of(family, "eager")
    end = 90
    prompts = [
        [7, 8, ("image", 0), 3, 4, 5],
        [("image", 1), 11, end, 12, 13, end, 14],
        [21, 22, ("image", 0)],
        [31, ("image", 0), 32, ("image", 1), 33, end, 34],
        [41, ("image", 0), 42, 43, end, 44, 45, 46, 47, 48, 49],
        [51, end, 52, ("image", 0), end, 53],
    ]
    model.generation_config.eos_token_id = [end]
    try:
        _, _, pruner, report = probe(family, ["instruction", "instruction_mask"], prompts, stages=(0,))
    finally:
        model.generation_config.eos_token_id = None
    _, signals, _ = pruner.seen[0]
    table = model.get_input_embeddings().weight
    for number, item in enumerate(report.items):
        words = [[3, 4, 5], [12, 13], [21, 22], [33], [44, 45, 46, 47, 48, 49], [52]][item.sample]
        assert signals["instruction_mask"][number].sum() == len(words)
        assert torch.equal(signals["instruction"][number, : len(words)], table[words])
        assert (signals["instruction"][number, len(words) :] == 0).all()


OF_THE_PROMPT = frozenset(
    {"text_mask", "text_features", "text_attention", "next_text_attention", "last_attention", "next_last_attention"}
    | {"all_attention", "visual_attention", "instruction", *TRANSITIONS, *OVERLAPS}
)


def test_no_signal_reads_the_answers_of_training() -> None:
    """With labels, prompts that go on with their answers give what the prompts alone give, at every stage."""
    family = FAMILIES["llava-clip-llama"]
    model = model_of(family)
    inputs = family.inputs([[1, ("image", 0), 2, 3, 4], [5, ("image", 1), 7, 8, ("image", 0), 9, 9]])
    answer = torch.tensor([[11, 12], [13, -100]])
    ids = torch.cat([inputs["input_ids"], answer.clamp(min=0)], 1)
    full = {
        **inputs,
        "input_ids": ids,
        "attention_mask": torch.cat([inputs["attention_mask"], (answer >= 0).long()], 1),
    }
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), answer], 1)
    seen = []
    for call in (inputs, {**full, "labels": labels}, full, {**full, "labels": ids}):
        probe = Probe(wanted=OF_THE_PROMPT, drop=3)
        with torch.no_grad(), vlmprune.prune(model, probe):
            model(**call)
        seen.append({layer: signals for layer, (_, signals, _) in probe.seen.items()})
    alone, trained, plain, throughout = seen
    assert alone.keys() == set(STAGES)
    for layer, signals in alone.items():
        assert signals.keys() == (OF_THE_PROMPT if layer else OF_THE_PROMPT - LATER)
        for name, value in signals.items():
            torch.testing.assert_close(trained[layer][name], value, msg=lambda why, name=name: f"{name}: {why}")
            torch.testing.assert_close(throughout[layer][name], plain[layer][name])
    differ = {name for name, value in alone[2].items() if not _alike(value, plain[2][name])}
    assert differ >= {"text_mask", "text_attention", "last_attention", "all_attention", "transition", "core_overlap"}


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one.float(), other.float(), atol=1e-6)


def test_optional_and_alternative_signals() -> None:
    for name, cls in (("llava-clip-llama", True), ("llava-siglip-qwen2", False)):
        wanted = ["cls_features?", "cls_attention|received_attention", "received_attention"]
        _, _, pruner, _ = probe(FAMILIES[name], wanted, BATCHES["one"], stages=(0,))
        _, signals, _ = pruner.seen[0]
        assert (signals["cls_features?"] is not None) == cls
        same = torch.equal(signals["cls_attention|received_attention"], signals["received_attention"])
        assert same != cls


def test_unasked_signal_is_refused() -> None:
    class Curious(vlmprune.Random):
        def select(self, tokens: vlmprune.VisualTokens, budget: torch.Tensor) -> vlmprune.Selection:
            tokens.signal("cls_attention")
            return super().select(tokens, budget)

    family = FAMILIES["llava-clip-llama"]
    model = model_of(family)
    with pytest.raises(KeyError, match="needs"), vlmprune.prune(model, Curious(keep=0.5)):
        model(**family.inputs(BATCHES["one"]))

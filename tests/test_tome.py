"""ToMe and PiToMe inside the tower, against a tower walked layer by layer with merging written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BATCHES
from families import FAMILIES
from test_laws import Recorded, model_of

import vlmprune


def slow_pairs(metric: torch.Tensor, candidates: list[int], accept: list[int], pairs: int) -> list[tuple[int, int]]:
    """The best `pairs`, each candidate with its most similar counterpart."""
    unit = metric / metric.norm(dim=-1, keepdim=True)
    best = []
    for source in candidates:
        cosine = unit[accept] @ unit[source]
        best.append((float(cosine.max()), source, accept[int(cosine.argmax())]))
    best.sort(key=lambda found: -found[0])
    return [(source, target) for _, source, target in best[:pairs]]


def slow_tower(model: Any, pixels: torch.Tensor, method: Any) -> tuple[torch.Tensor, list[list[int]]]:
    """Projected rows of one picture in raster order of their representatives, and the members of each row."""
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    prefix = int(model.config.vision_config.model_type == "clip_vision_model")
    hidden = tower.embeddings(pixels)
    hidden = tower.pre_layrnorm(hidden) if prefix else hidden
    hidden = hidden[0]
    size, members = torch.ones(len(hidden)), [[number] for number in range(len(hidden))]
    layers = tower.encoder.layers
    last = len(layers) + model.config.vision_feature_layer
    count = len(hidden) - prefix
    keep = round(method.keep * count)
    for number in range(last + 1):
        layer = layers[number]
        entering = layer.layer_norm1(hidden)
        keys = layer.self_attn.k_proj(entering).unflatten(-1, (layer.self_attn.num_heads, -1)).mean(1)
        proportional = method.proportional and number > 0
        hidden = layer(hidden[None], size.log()[None, None, None] if proportional else None)
        hidden = (hidden[0] if isinstance(hidden, tuple) else hidden)[0]
        metric = keys if method.name == "tome" else hidden
        goal = prefix + method.goal(count, keep, number, last + 1)
        while len(hidden) > goal:
            pairs = min(len(hidden) - goal, (len(hidden) - prefix) // 2)
            places = list(range(len(hidden)))
            if method.name == "tome" or number / (last + 1) < 0.5:
                sources, targets = [p for p in places[0::2] if p >= prefix], [p for p in places[1::2] if p >= prefix]
            else:
                unit = metric[prefix:] / metric[prefix:].norm(dim=-1, keepdim=True)
                excess = unit @ unit.T - method.margin * (1 - number / (last + 1))
                energy = torch.where(excess > 0, excess, method.alpha * (excess.exp() - 1)).mean(1)
                order = (energy.sort(descending=True, stable=True).indices[: 2 * pairs] + prefix).tolist()
                sources, targets = order[0::2], order[1::2]
            joined = dict(slow_pairs(metric, sources, targets, pairs))
            rows, metrics, sizes, groups = [], [], [], []
            for place in places:
                if place in joined:
                    continue
                group = [place, *(source for source, target in joined.items() if target == place)]
                weight = size[group] / size[group].sum()
                rows.append((hidden[group] * weight[:, None]).sum(0))
                metrics.append((metric[group] * weight[:, None]).sum(0))
                sizes.append(size[group].sum())
                groups.append([member for each in group for member in members[each]])
            hidden, metric, size, members = torch.stack(rows), torch.stack(metrics), torch.stack(sizes), groups
    rows = model.model.multi_modal_projector(hidden[prefix:])
    return rows, [[member - prefix for member in group] for group in members[prefix:]]


@pytest.mark.parametrize("family", ["llava-clip-llama", "llava-siglip-qwen2"])
@pytest.mark.parametrize("name", ["tome", "pitome"])
@pytest.mark.parametrize("keep", [0.75, 0.3])
def test_tower_walked_by_hand(family: str, name: str, keep: float) -> None:
    case = FAMILIES[family]
    model, inputs = model_of(case, "eager"), case.inputs(BATCHES["three"])
    method = vlmprune.create_pruner(name, keep=keep)
    with torch.no_grad(), vlmprune.prune(model, method) as session, Recorded(method) as calls:
        model(**inputs)
        ((_, selection),) = calls
    for number, (item, pixels) in enumerate(zip(session.last.items, inputs["pixel_values"])):
        with torch.no_grad():
            rows, members = slow_tower(model, pixels[None], method)
        assert len(rows) == len(item.kept) == round(keep * item.tokens_before)
        assert [group[0] for group in members] == item.kept.tolist()
        assert item.merged.tolist() == [len(group) > 1 for group in members]
        assert sorted(member for group in members for member in group) == list(range(item.tokens_before))
        torch.testing.assert_close(selection.features[number, : len(rows)], rows, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["tome", "pitome"])
def test_identical_patches_merge_and_isolated_ones_do_not(name: str) -> None:
    """Once behind the projector: duplicates become one token, sums weighted by size are conserved."""
    torch.manual_seed(0)
    base = torch.eye(8)
    rows = torch.cat([base[:1].expand(6, -1), base[1:4]])[None]
    method = vlmprune.create_pruner(name, keep=6, where="boundary")
    shape = vlmprune.Geometry.grid(3, 3)
    tokens = vlmprune.VisualTokens(rows, (9,), (torch.arange(9),), (shape,))
    selection = method.select(tokens, torch.tensor([6]))
    kept = selection.features[0]
    assert {6, 7, 8} <= set(selection.index[0].tolist())
    torch.testing.assert_close(kept[selection.index[0] < 6], base[:1].expand(3, -1))
    alone = ~selection.merged[0]
    assert torch.equal(kept[alone], rows[0][selection.index[0][alone]])


def test_cluster_energy_is_highest_where_patches_repeat() -> None:
    from vlmprune.pruners.pitome import cluster_energy

    torch.manual_seed(1)
    rows = torch.cat([torch.randn(1, 1, 16).expand(1, 10, 16), torch.randn(1, 6, 16)], 1)
    energy = cluster_energy(rows, 0.9, 1.0)[0]
    assert energy[:10].min() > energy[10:].max()


def test_families_without_a_tower_to_reduce_are_told_so() -> None:
    with pytest.raises(ValueError, match=r'encoder_kept.*Qwen2-VL.*where="boundary"'):
        vlmprune.prune(model_of(FAMILIES["qwen2.5-vl"]), "tome", keep=0.5)

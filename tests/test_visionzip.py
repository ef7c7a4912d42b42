"""VisionZip against its official vectors, and the properties that its specification asks for."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from test_laws import model_of

import vlmprune
from vlmprune.contract import Geometry, Selection, VisualTokens
from vlmprune.pruners._contextual import choose, join
from vlmprune.pruners.visionzip import VisionZip

GOLDEN = sorted((Path(__file__).parent / "golden").glob("visionzip_*.npz"))


def tokens_of(shapes: list[Geometry], signals: dict[str, torch.Tensor | None], **fields: Any) -> VisualTokens:
    """Items whose projector is the identity: what goes into it is what the language model sees."""
    counts = tuple(map(len, shapes))
    return VisualTokens(
        features=signals["projector_inputs"],
        counts=counts,
        index=tuple(map(torch.arange, counts)),
        shapes=tuple(shapes),
        signal=lambda need: signals.get(need.rstrip("?").split("|")[0]),
        project=lambda rows: rows,
        **fields,
    )


def random_signals(items: int, n: int, pictures: int = 1, cls: bool = True, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "projector_inputs": torch.randn(items, n, 6, generator=generator),
        "encoder_keys": torch.randn(items, n, 5, generator=generator),
        "cls_attention": torch.rand(items, n, generator=generator),
        "received_attention": torch.rand(items, n, generator=generator),
        "cls_features": torch.randn(items, pictures, 6, generator=generator) if cls else None,
    }


def run(pruner: vlmprune.Pruner, tokens: VisualTokens) -> list[tuple[list[int], torch.Tensor, list[bool]]]:
    """Of each item: kept tokens, ascending; their rows; which were made."""
    budget = torch.tensor(pruner.budget(tokens.counts))
    selection = pruner.select(tokens, budget)
    if selection.features is None:
        rows = tokens.features.gather(1, selection.index.clamp(min=0)[..., None].expand(-1, -1, 6))
        selection = Selection(selection.index, rows, torch.zeros_like(selection.index, dtype=torch.bool))
    assert selection.merged is not None
    kept = []
    for item, keep in enumerate(budget.tolist()):
        assert (selection.index[item, :keep] >= 0).all()
        assert (selection.index[item, keep:] == -1).all()
        order = selection.index[item, :keep].argsort()
        index = selection.index[item, :keep][order].tolist()
        assert len(set(index)) == keep
        kept.append((index, selection.features[item, :keep][order], selection.merged[item, :keep][order].tolist()))
    return kept


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    data = np.load(path)
    hidden, keys = torch.from_numpy(data["hidden"]), torch.from_numpy(data["key_metric"])
    dominant, contextual = int(data["dominant"]), int(data["contextual"])
    signals = {
        "projector_inputs": hidden[:, 1:],
        "encoder_keys": keys[:, 1:],
        "cls_attention": torch.from_numpy(data["cls_attn"])[..., 1:].mean(1),
        "cls_features": hidden[:, :1],
    }
    side = int((hidden.shape[1] - 1) ** 0.5)
    pruner = VisionZip(keep=dominant + contextual, contextual=contextual / (dominant + contextual))
    kept = run(pruner, tokens_of([Geometry.grid(side, side)] * len(hidden), signals))
    for number, (index, rows, made) in enumerate(kept):
        patches = (torch.from_numpy(data["dominant_sorted"])[number, 1:] - 1).tolist()
        rest = [i for i in range(side * side) if i not in patches]
        targets = [rest[i] for i in data["target_pos_in_rest"]]
        cls = min(set(rest) - set(targets))
        assert index == sorted([*patches, *targets, cls])
        assert [i for i, new in zip(index, made) if new] == sorted([*targets, cls])
        order = [index.index(i) for i in [cls, *patches, *targets]]
        torch.testing.assert_close(rows[order], torch.from_numpy(data["out"])[number], atol=1e-4, rtol=0)


def test_published_splits() -> None:
    for tokens, contextual in ((192, 30), (128, 20), (64, 10)):
        pruner = VisionZip.preset("llava-1.5", average_tokens=tokens)
        assert pruner.budget([576]) == [tokens]
        assert pruner._contextual(tokens) == contextual
    for tokens, contextual in ((640, 20), (320, 10), (160, 5)):
        pruner = VisionZip.preset("llava-next", average_tokens=tokens)
        assert pruner.budget([2880]) == [tokens]
        assert pruner._contextual(tokens // 5) == contextual
    assert VisionZip().budget([576]) == [64]
    with pytest.raises(ValueError, match=r"publishes 'llava-1\.5' with 64, 128, 192; 'llava-next' with 160"):
        VisionZip.preset("llava-1.5", average_tokens=100)


cases = st.tuples(st.integers(2, 40), st.integers(0, 2**16), st.booleans()).flatmap(
    lambda case: st.tuples(st.just(case), st.integers(1, case[0] - 1))
)


@settings(max_examples=60, deadline=None)
@given(cases)
def test_dominant_are_copies_and_every_other_token_goes_somewhere_once(case) -> None:
    (n, seed, has_cls), keep = case
    signals = random_signals(1, n, cls=has_cls, seed=seed)
    x, score = signals["projector_inputs"][0], signals["cls_attention"][0]
    ((index, rows, made),) = run(VisionZip(keep=keep), tokens_of([Geometry.grid(1, n)], signals))
    contextual = min(max(int(keep / 6.4), 1), keep - 1)
    dominant = keep - contextual - has_cls
    assert made.count(True) == keep - dominant
    copies = [i for i, new in zip(index, made) if not new]
    assert copies == sorted(score.sort(descending=True, stable=True).indices[:dominant].tolist())
    assert torch.equal(rows[~torch.tensor(made)], x[copies])
    if has_cls:
        free = [i for i, new in zip(index, made) if new]
        is_cls = [torch.equal(rows[index.index(i)], signals["cls_features"][0, 0]) for i in free]
        assert is_cls.count(True) == 1
        assert free[is_cls.index(True)] == min(set(range(n)) - (set(index) - {free[is_cls.index(True)]}))


@settings(max_examples=60, deadline=None)
@given(cases)
def test_merged_rows_hold_every_dropped_token_once(case) -> None:
    (n, seed, _), kept = case
    signals = random_signals(1, n, seed=seed)
    x, keys = signals["projector_inputs"], signals["encoder_keys"]
    mask, sizes = torch.ones(1, n, dtype=torch.bool), torch.tensor([n])
    contextual = max(1, (n - kept) // 3)
    top, targets, into = choose(
        signals["cls_attention"], keys, mask, sizes, torch.tensor([kept]), torch.tensor([contextual])
    )
    rest = [i for i in range(n) if i not in top[0].tolist()]
    assert targets[0].tolist() == rest[:: max(1, len(rest) // contextual)][:contextual]
    joiners = [[i for i in rest if into[0, i] == slot and i != target] for slot, target in enumerate(targets[0])]
    assert sorted([*itertools.chain(*joiners), *targets[0].tolist()]) == rest
    merged = join(x, targets, into, "sum")[0] - x[0, targets[0]]
    for slot, members in enumerate(joiners):
        mean = x[0, members].mean(0) if members else torch.zeros(6)
        torch.testing.assert_close(merged[slot], mean)
        unit = torch.nn.functional.normalize(keys[0].double(), dim=1)
        for member in members:
            nearest = unit[member] @ unit[targets[0]].T
            assert nearest[slot] >= nearest.max() - 1e-6
    sizes_ = torch.tensor([len(members) for members in joiners]).float()
    dropped = [i for i in rest if i not in targets[0].tolist()]
    torch.testing.assert_close((sizes_[:, None] * merged).sum(0), x[0, dropped].sum(0), atol=1e-4, rtol=1e-4)
    average = join(x, targets, into, "average")[0]
    for slot, (target, members) in enumerate(zip(targets[0].tolist(), joiners)):
        torch.testing.assert_close(average[slot], x[0, [target, *members]].mean(0))


def test_scales() -> None:
    signals = random_signals(1, 36)
    ((index, rows, _),) = run(VisionZip(keep=12), tokens_of([Geometry.grid(6, 6)], signals))
    scaled = {
        **signals,
        "encoder_keys": signals["encoder_keys"] * (0.1 + torch.rand(1, 36, 1)),
        "projector_inputs": 3 * signals["projector_inputs"],
        "cls_features": 3 * signals["cls_features"],
    }
    ((same, tripled, _),) = run(VisionZip(keep=12), tokens_of([Geometry.grid(6, 6)], scaled))
    assert index == same
    torch.testing.assert_close(tripled, 3 * rows)


def test_pictures_are_reduced_alone_and_line_breaks_go_first() -> None:
    """A thumbnail of 4 tokens, two tiles of 6 and 3 with a line break behind each of three rows."""
    tile = torch.tensor([1, 1, 2, -1] * 3)
    shape = Geometry(
        plane=torch.tensor([0] * 4 + [1] * 12),
        row=torch.tensor([0, 0, 1, 1, 0, 0, 0, -1, 1, 1, 1, -1, 2, 2, 2, -1]),
        col=torch.tensor([0, 1, 0, 1] + [0, 1, 2, -1] * 3),
        grids=((2, 2), (3, 3)),
        pictures=((2, 2), (3, 2), (3, 1)),
        tile=torch.cat([torch.zeros(4, dtype=torch.int64), tile]),
    )
    signals = random_signals(1, 16, pictures=3)
    tokens = tokens_of([shape], signals)
    ((index, rows, made),) = run(VisionZip(keep=9), tokens)
    picture = shape.tile[index]
    assert [int((picture == number).sum()) for number in (-1, 0, 1, 2)] == [0, 3, 4, 2]
    for number, inside in ((0, [0, 1, 2, 3]), (1, [4, 5, 8, 9, 12, 13]), (2, [6, 10, 14])):
        alone = {name: signal[:, inside] for name, signal in signals.items() if name != "cls_features"}
        alone["cls_features"] = signals["cls_features"][:, number : number + 1]
        keep = int((picture == number).sum())
        ((its, its_rows, its_made),) = run(VisionZip(keep=keep), tokens_of([Geometry.grid(1, len(inside))], alone))
        assert [inside[i] for i in its] == [i for i, p in zip(index, picture) if p == number]
        torch.testing.assert_close(its_rows, rows[picture == number])
        assert its_made == [new for new, p in zip(made, picture) if p == number]
    # With room for all that show a place, these stay as they are, and line breaks fill the rest.
    selection = VisionZip(keep=15).select(tokens, torch.tensor([15]))
    assert sorted(selection.index[0].tolist()) == [i for i in range(16) if i != 15]
    assert selection.merged is None or not selection.merged.any()


@pytest.mark.parametrize("cls", [True, False])
def test_batch_equals_singles(cls: bool) -> None:
    shapes = [Geometry.grid(3, 4), Geometry.grid(2, 3, planes=3, suffix=1, kind="video"), Geometry.grid(5, 4)]
    signals = random_signals(3, 20, pictures=3, cls=cls)
    together = run(VisionZip(keep=0.4), tokens_of(shapes, signals))
    for item, shape in enumerate(shapes):
        single = {
            name: None
            if signal is None
            else signal[item : item + 1, : len(shape.pictures) if "cls_f" in name else len(shape)]
            for name, signal in signals.items()
        }
        ((index, rows, made),) = run(VisionZip(keep=0.4), tokens_of([shape], single))
        assert index == together[item][0]
        assert made == together[item][2]
        torch.testing.assert_close(rows, together[item][1])


def test_choices() -> None:
    signals = random_signals(1, 30)
    by_all = {**signals, "cls_attention": signals["received_attention"]}
    shape = [Geometry.grid(5, 6)]
    assert VisionZip().needs == {
        "cls_attention|received_attention",
        "projector_inputs",
        "encoder_keys",
        "cls_features?",
    }
    assert VisionZip(query="cls", keep_cls=False).needs == {"cls_attention", "projector_inputs", "encoder_keys"}
    mine = run(VisionZip(keep=10, query="all"), tokens_of(shape, signals))
    assert mine[0][0] == run(VisionZip(keep=10), tokens_of(shape, by_all))[0][0]
    without = run(VisionZip(keep=10, keep_cls=False), tokens_of(shape, signals))
    blind = run(VisionZip(keep=10), tokens_of(shape, {**signals, "cls_features": None}))
    assert without[0][0] == blind[0][0]
    assert torch.equal(without[0][1], blind[0][1])
    only = VisionZip(keep=5, contextual=0, keep_cls=False).select(tokens_of(shape, signals), torch.tensor([5]))
    assert only.features is None
    assert only.index[0].tolist() == signals["cls_attention"][0].argsort(descending=True)[:5].tolist()
    for fields in ({"query": "text"}, {"merge": "mean"}, {"contextual": 1.0}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            VisionZip(**fields)


def test_bfloat16_stays() -> None:
    signals = random_signals(1, 16)
    for name in ("projector_inputs", "cls_features"):
        signals[name] = signals[name].bfloat16()
    ((_, rows, _),) = run(VisionZip(keep=6), tokens_of([Geometry.grid(4, 4)], signals))
    assert rows.dtype == torch.bfloat16


def test_on_a_model_it_equals_the_reduction_before_the_projector() -> None:
    """The rows that the language model gets, against the tower's own attention maps and plain loops."""
    family = FAMILIES["llava-clip-llama"]
    model, inputs = model_of(family, "eager"), family.inputs([[1, ("image", 0), 2], [3, ("image", 1), 4]])
    seen = []
    with torch.no_grad(), vlmprune.prune(model, "visionzip", keep=10, contextual=0.3) as session:
        hook = model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        model(**inputs)
        hook.remove()
    tower, keys = model.model.vision_tower, []
    layers = next(
        module for name, module in tower.named_modules() if name.endswith("encoder.layers") or name == "encoder.layers"
    )
    hook = layers[-2].self_attn.k_proj.register_forward_hook(lambda module, args, out: keys.append(out))
    with torch.no_grad():
        out = tower(inputs["pixel_values"], output_hidden_states=True, output_attentions=True)
    hook.remove()
    heads = model.config.vision_config.num_attention_heads
    for number, item in enumerate(session.last.items):
        hidden, attention = out.hidden_states[-2][number], out.attentions[-2][number].mean(0)[0, 1:]
        key = torch.nn.functional.normalize(keys[0][number].unflatten(-1, (heads, -1)).mean(1), dim=-1)
        dominant = sorted(attention.argsort(descending=True)[:6].tolist())  # 7 with CLS
        rest = [i for i in range(25) if i not in dominant]
        targets = rest[:: len(rest) // 3][:3]
        rows = {i: hidden[i + 1] for i in dominant}
        joined = {target: [] for target in targets}
        for i in set(rest) - set(targets):
            joined[max(targets, key=lambda target, i=i: float(key[i + 1] @ key[target + 1]))].append(hidden[i + 1])
        for target, others in joined.items():
            rows[target] = hidden[target + 1] + (sum(others) / len(others) if others else 0)
        rows[min(set(rest) - set(targets))] = hidden[0]
        assert item.kept.tolist() == sorted(rows)
        with torch.no_grad():
            theirs = model.model.multi_modal_projector(torch.stack([rows[i] for i in sorted(rows)]))
        torch.testing.assert_close(seen[0][number, 1:11], theirs, atol=1e-4, rtol=1e-4)

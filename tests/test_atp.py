"""ATP: the properties of its specification, on plain tensors; its training masks against the session that prunes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trainers
from cases import BATCHES
from fakes import picks, rows, tokens_of
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from test_laws import model_of
from torch import Tensor

import vlmprune
from vlmprune import Geometry, bundled
from vlmprune.pruners import atp


def items(counts: tuple[int, ...] = (25, 9), words: int = 4, layer: int = 1, seed: int = 0, **fields: Any) -> Any:
    """Visual tokens before a decoder layer, with random attention."""
    generator = torch.Generator().manual_seed(seed)
    sides = {25: (5, 5), 9: (3, 3), 16: (4, 4), 144: (12, 12)}
    return tokens_of(
        *(rows(count, 8, seed=seed) for count in counts),
        shapes=[Geometry.grid(*sides[count]) for count in counts],
        layer=layer,
        visual_attention=[torch.rand(count, generator=generator) for count in counts],
        text_attention=torch.stack(
            [
                torch.nn.functional.pad(
                    torch.rand(words, count, generator=generator).softmax(1), (0, max(counts) - count)
                )
                for count in counts
            ]
        ),
        text_mask=torch.ones(len(counts), words, dtype=torch.bool),
        **fields,
    )


def modules(depth: int = 4, layers: tuple[int, ...] = (1, 2, 3), seed: int = 0, **fields: Any) -> atp.ThresholdModules:
    torch.manual_seed(seed)
    return atp.ThresholdModules(layers, depth, **fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("atp")
    modules().save(path)
    return path


def random_scores(seed: int, shape: tuple[int, int] = (3, 25)) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    redundancy, spatial = torch.rand(shape, generator=generator), atp.spatial_scores(Geometry.grid(5, 5)).expand(shape)
    return redundancy, spatial, tuple(torch.rand(2, shape[0], generator=generator))  # type: ignore[return-value]


def test_self_score_is_a_mean_over_the_tokens_that_can_see() -> None:
    maps = torch.rand(6, 6, generator=torch.Generator().manual_seed(0)).tril()
    wanted = torch.stack([maps[j:, j].mean() for j in range(6)])
    torch.testing.assert_close(atp.self_scores(maps.sum(0)[None], torch.ones(1, 6))[0], wanted)
    # Tokens that are gone neither score nor count.
    alive = torch.tensor([[1.0, 0, 1, 1, 0, 1]])
    there = alive[0].bool()
    received = (maps * alive[0][:, None]).sum(0)[None]
    part = maps[there][:, there]
    torch.testing.assert_close(
        atp.self_scores(received, alive)[0, there], torch.stack([part[j:, j].mean() for j in range(4)])
    )


@given(st.integers(0, 2**16), st.sampled_from([0.5, 1.0, 7.0]))
@settings(max_examples=25, deadline=None)
def test_normalised_scores(seed: int, value: float) -> None:
    scores = torch.randn(2, 12, generator=torch.Generator().manual_seed(seed))
    alive = (torch.rand(2, 12, generator=torch.Generator().manual_seed(seed + 1)) < 0.7).float()
    alive[:, 3], alive[:, 5] = 1, 1
    scaled = atp.normalise(scores, alive)
    assert ((scaled >= 0) & (scaled <= 1)).all()
    for row, here in zip(scaled, alive.bool()):
        assert row[here].min() == 0
        assert row[here].max() == 1
        assert (row[~here] == 0).all()
    same = atp.normalise(torch.full((1, 4), value), torch.tensor([[1.0, 1, 1, 0]]))
    assert same.tolist() == [[0.5, 0.5, 0.5, 0]]


def test_spatial_scores_by_original_coordinates_on_nested_grids() -> None:
    geometry = Geometry.grid(12, 12, planes=2, suffix=1)
    scores = atp.spatial_scores(geometry)
    assert scores[-1] == -1
    plane = scores[:144].view(12, 12)
    assert torch.equal(plane, scores[144:288].view(12, 12))
    assert [int((plane >= 1 - 3 / s**2).sum()) for s in (2, 4, 8)] == [36, 9, 4]
    assert plane[8, 8] == plane[0, 0] == 1 - 3 / 64
    assert plane[4, 8] == 1 - 3 / 16
    assert plane[2, 8] == 0.25
    assert plane[1, 0] == plane[0, 3] == -1
    left = torch.tensor([0, 5, 26, 287])
    assert torch.equal(atp.spatial_scores(geometry.take(left)), scores[left])


@given(st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_masks(seed: int) -> None:
    """In (0, 1); hard is soft above a half, and its limit; the union of both criteria; monotone in the thresholds."""
    redundancy, spatial, thresholds = random_scores(seed)
    alive = torch.ones_like(redundancy)
    soft = atp.soft_mask(redundancy, spatial, thresholds, 10)
    assert ((soft > 0) & (soft < 1)).all()
    above = (redundancy > thresholds[0][:, None]) | (spatial > thresholds[1][:, None])
    assert torch.equal(soft > 0.5, above)
    hard = atp.hard_mask(redundancy, spatial, thresholds, alive)
    assert torch.equal(hard[above.any(1)], above[above.any(1)])
    clear = ((redundancy - thresholds[0][:, None]).abs() > 1e-3) & ((spatial - thresholds[1][:, None]).abs() > 1e-3)
    sharp = atp.soft_mask(redundancy, spatial, thresholds, 1e6)
    torch.testing.assert_close(sharp[clear], above[clear].float())
    for which in range(2):
        raised = list(thresholds)
        raised[which] = raised[which] + 0.1
        fewer = atp.hard_mask(redundancy, spatial, tuple(raised), alive)  # type: ignore[arg-type]
        added = fewer & ~hard
        assert (added.sum(1) <= (fewer.sum(1) == 1)).all()  # at most the one that stays when none is above
        passed = (redundancy > raised[0][:, None]) | (spatial > raised[1][:, None])
        assert not (added & passed).any()


def test_extreme_thresholds() -> None:
    redundancy, spatial, _ = random_scores(1)
    alive = torch.ones_like(redundancy)
    alive[0, 10:] = 0
    one, below = torch.ones(3), redundancy.min() - torch.ones(3)
    alone = atp.hard_mask(redundancy, spatial, (one, one), alive)
    best = redundancy.masked_fill(alive == 0, -1).argmax(1)
    assert torch.equal(alone, torch.nn.functional.one_hot(best, 25).bool())
    assert torch.equal(atp.hard_mask(redundancy, spatial, (below, one), alive), alive.bool())


def test_both_heads_learn_and_the_budget_loss_points_at_its_target() -> None:
    tokens = items()
    head = modules().heads[0]
    with torch.no_grad():
        head.spatial.bias.fill_(1.0)
    for target, sign in ((0.0, 1), (1.0, -1)):
        head.zero_grad()
        alive = tokens.valid.float()
        own = atp.self_scores(tokens.signal("visual_attention"), alive)
        cross = atp.cross_scores(tokens.signal("text_attention"), tokens.signal("text_mask"))
        thresholds = head(atp.statistics(own, cross, alive, alive.sum(1), torch.tensor([0.3, 0.3])))
        assert all(((each > 0) & (each < 1)).all() for each in thresholds)
        redundancy = (atp.normalise(own, alive) + atp.normalise(cross, alive)) / 2
        spatial = torch.nn.utils.rnn.pad_sequence([atp.spatial_scores(s) for s in tokens.shapes], True, -1.0)
        mask = alive * atp.soft_mask(redundancy, spatial, thresholds, 10)
        (mask.sum() / alive.sum() - target).abs().backward()
        for gradient in (head.redundancy.bias.grad, head.spatial.bias.grad):
            assert -gradient.sign().item() == sign  # too many tokens raise the thresholds, too few lower them


def test_a_module_sees_an_item_alone(folder: Path) -> None:
    pruner = vlmprune.ATP(keep=0.5, weights=folder)
    both = picks(pruner.select(items(), torch.tensor([25, 9])))
    own = items()
    for number, count in enumerate((25, 9)):
        alone = tokens_of(
            own.features[number, :count],
            shapes=[own.shapes[number]],
            layer=1,
            visual_attention=own.signal("visual_attention")[number : number + 1, :count],
            text_attention=own.signal("text_attention")[number : number + 1, :, :count],
            text_mask=own.signal("text_mask")[number : number + 1],
        )
        assert picks(pruner.select(alone, torch.tensor([count]))) == [both[number]]
    assert all(both)


def test_items_keep_different_counts(folder: Path) -> None:
    pruner = vlmprune.ATP(keep=0.5, weights=folder)
    kept = {len(picks(pruner.select(items((144,), seed=seed), torch.tensor([144])))[0]) for seed in range(8)}
    assert len(kept) > 1


def test_save_and_load(tmp_path: Path) -> None:
    made = modules(reached=[(0.3, 0.31), (0.4, 0.43), (0.6, 0.5)])
    made.save(tmp_path, model={"model_type": "llama"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    again = atp.ThresholdModules.load(tmp_path)
    assert (again.layers, again.depth, again.reached) == (made.layers, made.depth, made.reached)
    for name, value in made.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert again.ask(0.31) == pytest.approx(0.3)
    assert again.ask(0.43) == pytest.approx(0.4)
    assert again.ask(0.465) == pytest.approx(0.5)
    pruner = vlmprune.ATP(keep=0.4, weights=tmp_path)
    assert pruner.layers(4) == (1, 2, 3)
    assert pruner.budget([144, 7], 1, 4) == [None, None]
    assert vlmprune.ATP(keep=1.0, weights=tmp_path).budget([144], 1, 4) == [144]
    assert vlmprune.ATP(keep=60, weights=tmp_path).budget([144, 60], 1, 4) == [None, 60]


def test_errors(tmp_path: Path, folder: Path) -> None:
    model = model_of(FAMILIES["llava-clip-llama"])
    with pytest.raises(ValueError, match="for a language model of 4 layers, this one has 3"):
        vlmprune.prune(model, "atp", weights=folder)
    with pytest.raises(ValueError, match=r"atp-calibrated has 2 stages.*thresholds for 1"):
        vlmprune.prune(model, "atp-calibrated", keep=0.5, thresholds=(0.1,))
    with pytest.raises(ValueError, match="larger keep"):
        vlmprune.prune(model, "atp-calibrated", keep=0.2)
    with pytest.raises(ValueError, match="nothing was measured"):
        atp.calibrate(vlmprune.ATPCalibrated(), lambda pruner: None, 3)
    modules(reached=[(0.3, 0.31), (0.6, 0.5)]).save(tmp_path)
    for keep in (0.3, 0.51):
        with pytest.raises(ValueError, match=r"trained for keep between 0.310 and 0.500"):
            vlmprune.ATP(keep=keep, weights=tmp_path).budget([144], 1, 4)


def test_published_schedule() -> None:
    pruner = vlmprune.ATPCalibrated()
    assert pruner.layers(32) == (5, 15, 25)
    assert [pruner.scheduled(576, layer, 32) for layer in (5, 15, 25)] == [288, 115, 28]
    assert pruner.budget([576], 5, 32) == [288]
    assert vlmprune.ATPCalibrated(keep=1.0).budget([576, 3], 5, 32) == [576, 3]


def test_fixed_schedule_keeps_the_grid_that_fits_and_the_best_of_the_rest() -> None:
    tokens = items((144,), layer=2)
    alive = tokens.valid.float()
    own = atp.self_scores(tokens.signal("visual_attention"), alive)
    cross = atp.cross_scores(tokens.signal("text_attention"), tokens.signal("text_mask"))
    redundancy = ((atp.normalise(own, alive) + atp.normalise(cross, alive)) / 2)[0]
    pruner = vlmprune.ATPCalibrated(keep=0.4375)  # (72, 29, 7) of 144 in four layers
    assert [pruner.scheduled(144, layer, 4) for layer in (1, 2, 3)] == [72, 28, 7]
    (kept,) = picks(pruner.select(tokens, torch.tensor([28])))
    grid = {r * 12 + c for r in (0, 4, 8) for c in (0, 4, 8)}
    others = [j for j in redundancy.sort(descending=True, stable=True).indices.tolist() if j not in grid]
    assert set(kept) == grid | set(others[:19])
    (plain,) = picks(vlmprune.ATPCalibrated(keep=0.4375, grid=False).select(tokens, torch.tensor([28])))
    assert set(plain) == set(redundancy.sort(descending=True, stable=True).indices[:28].tolist())


@pytest.mark.parametrize("grid", [True, False])
def test_calibration_meets_the_target(grid: bool) -> None:
    """Within one token on the calibration set, stage by stage, while items differ."""
    model, family = model_of(FAMILIES["llava-clip-llama"]), FAMILIES["llava-clip-llama"]
    batches = [family.inputs(BATCHES["unequal"], seed=seed) for seed in range(4)]
    items_seen: list[Any] = []

    def run(pruner: vlmprune.Pruner) -> None:
        items_seen.clear()
        with torch.no_grad(), vlmprune.prune(model, pruner) as session:
            for inputs in batches:
                model(**inputs)
                items_seen.extend(session.last.items)

    fixed = vlmprune.ATPCalibrated(keep=0.6, grid=grid)
    done = atp.calibrate(fixed, run, 2)
    assert len(done.thresholds) == 2
    run(done)
    for stage in range(2):
        kept = [len(item.stages[stage].kept) for item in items_seen]
        wanted = [fixed.scheduled(item.tokens_before, stage + 1, 3) for item in items_seen]
        assert abs(sum(kept) - sum(wanted)) <= len(kept)
    counts = [[len(stage.kept) for stage in item.stages] for item in items_seen]
    assert counts != [[fixed.scheduled(item.tokens_before, s, 3) for s in (1, 2)] for item in items_seen]


@pytest.fixture(scope="module")
def training() -> Any:
    return trainers.trainer("atp")


@pytest.mark.parametrize("name", ["llava-clip-llama", "llava-next", "qwen2.5-vl", "internvl"])
def test_hard_masks_of_the_training_keep_what_the_session_keeps(training: Any, name: str, tmp_path: Path) -> None:
    """The scores of the training, from whole attention maps over masked tokens, are those of the pruned run."""
    family = next(case for key, case in FAMILIES.items() if key.startswith(name))
    model, inputs = model_of(family, "eager"), family.inputs(BATCHES["unequal"])
    made = modules(3, (1, 2))
    with torch.no_grad():
        for head in made.heads:
            head.redundancy.bias.fill_(0.0)
    made.save(tmp_path)
    pruning = training.SoftPruning(model, made)
    pruning.wanted, pruning.temperature, pruning.prompt = made.share(0.5), 0.0, inputs["attention_mask"].bool()
    with torch.no_grad():
        masked = model(**inputs, use_cache=False).logits[:, -1]
    pruning.remove()
    with torch.no_grad(), vlmprune.prune(model, "atp", keep=0.5, weights=tmp_path) as session:
        pruned = model(**inputs).logits[:, -1]
    for number, item in enumerate(session.last.items):
        for stage, mask in zip(item.stages, pruning.left):
            assert stage.kept.tolist() == mask[number].nonzero().flatten().tolist()
            assert 0 < len(stage.kept) < item.tokens_before
    image_last = 2  # that prompt ends in an image, whose last token may be gone
    for row in (0, 1, 3):
        assert row != image_last
        torch.testing.assert_close(pruned[row], masked[row], atol=1e-4, rtol=0)


def test_training_moves_the_modules_and_saves(training: Any, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    settings = training.Settings(out=tmp_path, scenes=(8, 2), steps=3, batch=8, wanted=(0.1, 0.4))
    modules = training.train(settings)
    again = atp.ThresholdModules.load(tmp_path)
    assert again.layers == (1, 2, 3)
    assert again.depth == 4
    assert modules.reached == again.reached
    fresh = atp.ThresholdModules((1, 2, 3), 4)
    assert any(not torch.equal(a, b) for a, b in zip(again.state_dict().values(), fresh.state_dict().values()))


def test_deeper_tokens_cost_more_and_gradients_reach_every_head(training: Any) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    model, processor = trainers.trainer("questions").load(None)
    made = modules()
    with torch.no_grad():
        for head in made.heads:
            head.spatial.bias.fill_(1.0)
    run = training.Training(model.requires_grad_(False), made, training.Settings())
    parts = run(trainers.batch(processor, 6), 0.2, 10.0)
    depth = sum(share * layer for share, layer in zip(parts["shares"].tolist(), (1, 2, 3)))
    assert parts["depth"].item() == pytest.approx(depth)
    assert parts["loss"].item() == pytest.approx(
        (parts["answer"] + 0.02 * parts["depth"] + 0.05 * parts["target"]).item(), rel=1e-5
    )
    parts["loss"].backward()
    for parameter in made.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.parameters())
    run.pruning.remove()


def test_bundled_weights_fit_the_bundled_model() -> None:
    model, processor = bundled.load()
    scene = bundled.demo_scenes()[0]
    pairs = [(scene.image, question.text) for scene in bundled.demo_scenes() for question in scene.questions]
    chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for _, text in pairs]
    prompts = processor.apply_chat_template(chats, add_generation_prompt=True)
    inputs = processor(images=[[image] for image, _ in pairs], text=prompts, padding=True, return_tensors="pt")
    with torch.no_grad(), vlmprune.prune(model, "atp", keep=0.35, weights=bundled.atp_weights()) as session:
        model(**inputs)
    assert scene.image.size == (96, 96)
    counts = [len(item.stages[0].kept) for item in session.last.items]
    assert len(set(counts)) > 3
    assert 0.27 < session.last.average_keep < 0.45

"""VQToken: K-means, the bend of its distortion, and the stand-in without training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import picks, rows, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

import vlmprune
from vlmprune import Geometry
from vlmprune.pruners import vqtoken

GOLDEN = np.load(Path(__file__).parent / "golden" / "vqtoken_kmeans.npz")


def run(x: torch.Tensor, start: torch.Tensor, **fields: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One item, all rows and centres real."""
    every = [torch.ones(1, len(each), dtype=torch.bool) for each in (x, start)]
    into, centres = vqtoken.kmeans(x[None], start[None], *every, **fields)
    return into[0], centres[0]


def blobs(count: int, each: int, width: int = 16, seed: int = 0) -> torch.Tensor:
    """Groups of rows around directions that are far apart."""
    middles = torch.linalg.qr(rows(width, width, seed=seed)).Q[:count]
    return (middles[:, None] + 0.02 * rows(count, each, width, seed=seed + 1)).flatten(0, 1)


def test_golden_clusters() -> None:
    unit = normalize(torch.from_numpy(GOLDEN["x"]), dim=-1)
    into, centres = run(unit, torch.from_numpy(GOLDEN["init"]))
    assert np.array_equal(into, GOLDEN["labels"])
    np.testing.assert_allclose(centres, GOLDEN["centroids"], atol=1e-5)
    means = torch.stack([unit[into == number].mean(0) for number in range(len(centres))])
    np.testing.assert_allclose(means, GOLDEN["cluster_means"], atol=1e-5)


def test_golden_elbow() -> None:
    for curve, wanted in zip(GOLDEN["elbow_in"], GOLDEN["elbow_raw"]):
        assert vqtoken.elbow(torch.from_numpy(curve[~np.isnan(curve)])) == wanted


@given(st.integers(0, 2**16), st.integers(1, 40), st.data())
@settings(max_examples=40, deadline=None)
def test_every_token_has_a_cluster_and_every_cluster_a_token(seed: int, count: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, count))
    x = rows(count, 6, seed=seed)
    found = vlmprune.KMeansTokens(keep=keep).select(tokens_of(x), torch.tensor([keep]))
    assert len(set(found.index[0].tolist())) == keep
    again = vlmprune.KMeansTokens(keep=keep).select(tokens_of(x), torch.tensor([keep]))
    assert torch.equal(found.index, again.index)
    assert torch.equal(found.features, again.features)
    total = torch.zeros(6)
    sizes = []
    pruner = vlmprune.KMeansTokens(keep=keep)
    into, medoid = pruner._clusters(
        tokens_of(x), normalize(x, dim=-1)[None], torch.ones(1, count, dtype=torch.bool), torch.tensor([keep])
    )
    assert int(into.min()) >= 0
    assert into[0].unique().tolist() == list(range(keep))
    for number, (at, row) in enumerate(zip(medoid[0].tolist(), found.features[0])):
        members = into[0] == number
        assert members[at]
        torch.testing.assert_close(row, x[members].mean(0), atol=1e-5, rtol=1e-5)
        assert bool(found.merged[0, number]) == (int(members.sum()) > 1)
        total += row * members.sum()
        sizes.append(int(members.sum()))
    assert sum(sizes) == count
    torch.testing.assert_close(total, x.sum(0), atol=1e-4, rtol=1e-4)


def test_permuted_tokens_permute_their_clusters() -> None:
    x = normalize(rows(50, 8), dim=-1)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(5))
    into, centres = run(x, x[:6])
    moved, same = run(x[order], x[:6])
    assert torch.equal(moved, into[order])
    torch.testing.assert_close(same, centres)


def test_groups_far_apart_are_found() -> None:
    x = blobs(5, 8)
    found = vlmprune.KMeansTokens(keep=5).select(tokens_of(x), torch.tensor([5]))
    assert sorted(index // 8 for index in found.index[0].tolist()) == [0, 1, 2, 3, 4]
    for index, row in zip(found.index[0].tolist(), found.features[0]):
        torch.testing.assert_close(row, x.view(5, 8, -1)[index // 8].mean(0))
    unit = normalize(x, dim=-1)
    start = unit[[0, 1, 16, 24, 32]]  # two in one group
    first = vqtoken.nearest(unit[None], start[None], torch.ones(1, 5, dtype=torch.bool))
    before = vqtoken.distortion(unit[None], first, start[None])
    into, centres = run(unit, start)
    assert vqtoken.distortion(unit[None], into[None], centres[None]) <= before


def test_as_many_centres_as_points_leave_nothing_over() -> None:
    points = normalize(rows(6, 5), dim=-1)
    x = points.repeat_interleave(3, 0)
    for keep in (6, 9):
        found = vlmprune.KMeansTokens(keep=keep).select(tokens_of(x), torch.tensor([keep]))
        assert len(set(found.index[0].tolist())) == keep, "duplicates: clusters without a token take one over"
        torch.testing.assert_close(found.features[0], x[found.index[0]])
    into, centres = run(x, points)
    assert vqtoken.distortion(x[None], into[None], centres[None]) < 1e-9
    every = vlmprune.KMeansTokens(keep=7).select(tokens_of(rows(7, 5)), torch.tensor([7]))
    assert picks(every) == [list(range(7))]
    assert not every.merged.any()
    torch.testing.assert_close(every.features[0], rows(7, 5)[every.index[0]])


def test_scale_is_kept_and_does_not_matter_for_the_clusters() -> None:
    x = blobs(4, 6)
    scaled = x * torch.arange(1.0, 25.0)[:, None]
    plain, wide = (vlmprune.KMeansTokens(keep=4).select(tokens_of(each), torch.tensor([4])) for each in (x, scaled))
    assert picks(plain) == picks(wide)
    assert wide.features.norm(dim=-1).max() > 5 * plain.features.norm(dim=-1).max()


def test_together_as_alone() -> None:
    x = [rows(30, 6), rows(9, 6, seed=1), rows(17, 6, seed=2)]
    keep = torch.tensor([7, 9, 2])
    both = vlmprune.KMeansTokens().select(tokens_of(*x), keep)
    for number, each in enumerate(x):
        alone = vlmprune.KMeansTokens().select(tokens_of(each), keep[number : number + 1])
        assert both.index[number][both.index[number] >= 0].tolist() == alone.index[0].tolist()
        torch.testing.assert_close(both.features[number, : int(keep[number])], alone.features[0])


def test_line_breaks_join_nothing() -> None:
    shape, x = Geometry.grid(2, 3, suffix=2), rows(8, 5)
    for keep, breaks in ((3, 0), (6, 0), (7, 1)):
        found = vlmprune.KMeansTokens(keep=keep).select(tokens_of(x, shapes=[shape]), torch.tensor([keep]))
        assert int((found.index >= 6).sum()) == breaks
        assert len(set(found.index[0].tolist())) == keep
        assert torch.equal(found.features[found.index >= 6], x[6 : 6 + breaks])
    into, medoid = vlmprune.KMeansTokens()._clusters(
        tokens_of(x, shapes=[shape]), normalize(x, dim=-1)[None], torch.arange(8)[None] < 6, torch.tensor([3])
    )
    assert into[0, 6:].tolist() == [-1, -1]
    assert int(medoid.max()) < 6


@pytest.mark.parametrize("groups", [4, 6, 8])
def test_the_bend_is_at_the_number_of_groups(groups: int) -> None:
    x = [blobs(groups, 7, seed=3), rows(2, 16)]
    pruner = vlmprune.KMeansTokens(elbow=True, least=2, most=12, keep=1)
    assert pruner.budget([7 * groups, 2, 1]) == [None, 2, 1]
    assert vlmprune.KMeansTokens(elbow=True, keep=1.0).budget([99]) == [99]
    found = pruner.select(tokens_of(x[0]), torch.tensor([7 * groups]))
    assert int((found.index >= 0).sum()) == groups


def test_cells_and_maps() -> None:
    shape = Geometry.grid(4, 6, planes=2, kind="video", suffix=1)
    cell = vqtoken.cells(shape, (2, 2, 3))
    assert cell[-1] == -1
    assert cell[:24].view(4, 6)[::2, ::2].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert torch.equal(cell[24:48], cell[:24] + 6)
    into = torch.randint(0, 5, (1, 49), generator=torch.Generator().manual_seed(0))
    into[0, 3] = into[0, -1] = -1
    maps = vqtoken.occupancy(into, cell[None], 6, 12)
    assert maps.shape == (1, 6, 12)
    torch.testing.assert_close(maps.sum(2), torch.tensor([[1.0] * 5 + [0.0]]))
    for number in range(5):
        members = cell[into[0] == number]
        wanted = torch.bincount(members[members >= 0], minlength=12) / len(members)
        torch.testing.assert_close(maps[0, number], wanted)


def test_an_untrained_module_leaves_the_means_and_a_trained_one_tells_places_apart() -> None:
    torch.manual_seed(0)
    module = vqtoken.VQAttention(16, width=8, heads=2, grid=(1, 4, 4)).eval().requires_grad_(False)
    shape, x = Geometry.grid(4, 6), blobs(4, 6)
    tokens, budget = tokens_of(x, shapes=[shape]), torch.tensor([4])
    plain = vlmprune.KMeansTokens(keep=4).select(tokens, budget)
    found = vlmprune.VQToken(keep=4, weights=module).select(tokens, budget)
    assert torch.equal(found.index, plain.index)
    torch.testing.assert_close(found.features, plain.features)
    torch.nn.init.normal_(module.out.weight)
    # The same clusters elsewhere in the picture: other rows, by their map alone.
    moved = vlmprune.VQToken(keep=4, weights=module).select(tokens, budget)
    turned = tokens_of(x.flip(0), shapes=[shape])
    back = vlmprune.VQToken(keep=4, weights=module).select(turned, budget)
    groups = [(index[0] // 6).argsort() for index in (moved.index, 23 - back.index)]
    torch.testing.assert_close(
        *(vlmprune.KMeansTokens(keep=4).select(t, budget).features[0][g] for t, g in zip((tokens, turned), groups)),
        atol=1e-5,
        rtol=1e-5,
    )
    assert (moved.features[0][groups[0]] - back.features[0][groups[1]]).abs().max() > 1e-3


def test_no_cluster_sees_those_that_are_not_there() -> None:
    torch.manual_seed(0)
    module = vqtoken.VQAttention(16, width=8, heads=2, grid=(1, 2, 2)).eval().requires_grad_(False)
    torch.nn.init.normal_(module.out.weight)
    codes, maps = rows(1, 5, 16), rows(1, 5, 4).softmax(2)
    there = torch.tensor([[True, True, True, False, False]])
    few = module(codes[:, :3], maps[:, :3], there[:, :3])
    torch.testing.assert_close(module(codes, maps, there)[:, :3], few)


def test_gradients_reach_every_module() -> None:
    torch.manual_seed(0)
    module = vqtoken.VQAttention(6, width=8, heads=2, grid=(1, 2, 2))
    torch.nn.init.normal_(module.out.weight)
    torch.nn.init.normal_(module.mix[3].weight)
    tokens = tokens_of(rows(16, 6), shapes=[Geometry.grid(4, 4)])
    found = vlmprune.VQToken(keep=5, weights=module).select(tokens, torch.tensor([5]))
    found.features.square().sum().backward()
    assert not [name for name, each in module.named_parameters() if each.grad is None or not each.grad.any()]


def test_save_load_and_errors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = vqtoken.VQAttention(16, width=8, heads=2, grid=(2, 3, 3))
    module.save(tmp_path)
    again = vqtoken.VQAttention.load(tmp_path)
    assert (again.hidden, again.width, again.heads, again.grid) == (16, 8, 2, (2, 3, 3))
    for name, value in module.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="for a language model of width 16, this one has 6"):
        vlmprune.VQToken(weights=tmp_path).select(tokens_of(rows(9, 6)), torch.tensor([4]))


def test_errors() -> None:
    with pytest.raises(ValueError, match="most >= least"):
        vlmprune.KMeansTokens(least=12, most=13)
    with pytest.raises(ValueError, match="at least one iteration"):
        vlmprune.KMeansTokens(iterations=0)
    with pytest.raises(ValueError, match="three points"):
        vqtoken.elbow(torch.ones(2))

"""What choosing costs: the estimates against the products that a real choice was seen to do."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import CENTRAL, PRUNERS, Staged, settings_of
from families import FAMILIES

import vlmprune
from vlmprune.contract import choosing
from vlmprune.flops import estimate_flops
from vlmprune.kernels import (
    bipartite_flops,
    bipartite_match,
    dpp_flops,
    dpp_select,
    gram_flops,
    max_min_flops,
    max_min_select,
    pairwise_cosine,
)
from vlmprune.selection import counting_selection

ROWS = [[("image", 0), ("image", 0), 3, 4, 5, 6, 7]] * 2
"""All text stands behind the images, as estimates take it."""

UNDECLARED = {"staged", "compose"}
CLUSTERS = {"kmeans_tokens", "vqtoken"}
ADAPTIVE = {
    *((name, hard) for name in ("todre", "atp", "framefusion") for hard in (False, True)),
    *((name, True) for name in ("sparsevlm", "atp-calibrated", "qtsplus", "mustdrop", "corematching")),
}
"""Methods and settings of which only a run can tell how many tokens each layer sees."""


def run(family: str, pruner: vlmprune.Pruner, rows: list = ROWS) -> tuple[vlmprune.PruneReport, int]:
    case = FAMILIES[family]
    model = case.model()
    with torch.inference_mode(), vlmprune.prune(model, pruner) as session, counting_selection() as counted:
        model(**case.inputs(rows), use_cache=True)
    return session.last, counted.total


def estimated(family: str, pruner: vlmprune.Pruner, report: vlmprune.PruneReport) -> int | None:
    items = [item for item in report.items if item.sample == 0]
    visual = [item.tokens_before for item in items]
    grids = [grid for item in items for grid in item.geometry.pictures]
    video = items[0].geometry.kind == "video"
    estimate = estimate_flops(
        FAMILIES[family].model(),
        text_tokens=report.length - sum(visual),
        visual_tokens=visual,
        pruner=pruner,
        images=None if video else grids,
        frames=grids if video else 0,
        batch=report.batch,
    )
    assert ("not counted" in str(estimate)) == (estimate.selection is None)
    return estimate.selection


@pytest.mark.parametrize("hard", [False, True], ids=["easy", "hard"])
@pytest.mark.parametrize("name", PRUNERS)
def test_estimate_equals_what_ran(name, hard):
    if hard not in settings_of(FAMILIES[CENTRAL], name):
        pytest.skip("not on this family")
    pruner = PRUNERS[name].make(hard)
    if name in CLUSTERS:
        pruner = dataclasses.replace(pruner, iterations=1, elbow=False)
    report, counted = run(CENTRAL, pruner)
    if (name, hard) in ADAPTIVE:
        with pytest.raises(ValueError, match="only a run can tell"):
            estimated(CENTRAL, pruner, report)
    else:
        assert estimated(CENTRAL, pruner, report) == (None if name in UNDECLARED else counted)


@pytest.mark.parametrize("hard", [False, True], ids=["easy", "hard"])
@pytest.mark.parametrize("name", sorted(CLUSTERS))
def test_rounds_that_depend_on_the_picture_are_bounded(name, hard):
    pruner = PRUNERS[name].make(hard)
    report, counted = run(CENTRAL, pruner)
    ours = estimated(CENTRAL, pruner, report)
    assert counted < ours <= 100 * counted


@pytest.mark.parametrize("family", ["llava-siglip-qwen2", "llava-next", "qwen2.5-vl", "internvl"])
def test_other_towers(family):
    """Without CLS, in several pictures, packed; with text in front of the images, which is taken to stand behind."""
    for name in ("divprune", "mmtok", "cdpruner", "visionzip", "visiondrop", "globalcom2", "fastv", "pyramiddrop"):
        pruner = PRUNERS[name].make()
        report, counted = run(family, pruner)
        ours = estimated(family, pruner, report)
        assert counted <= ours < 1.25 * counted, name
        if family == "llava-siglip-qwen2":
            assert ours == counted, name


@pytest.mark.parametrize("family", ["video-llava", "qwen2.5-vl"])
@pytest.mark.parametrize("name", ["evs", "vidcom2", "fastvid", "flashvid", "holitom"])
def test_videos(family, name):
    """Distances between few and between many tokens; scenes are taken to be as long as can be."""
    pruner = PRUNERS[name].make()
    report, counted = run(family, pruner, [[("video", 0), 3, 4, 5]])
    ours = estimated(family, pruner, report)
    assert counted <= ours <= 1.3 * counted


@pytest.mark.parametrize("n", [100, 192, 193, 700, 1700])
def test_kernels(n):
    """Where half of a table of cosines is mirrored, that half counts."""
    x, width, k = torch.randn(1, n, 8), 8, 5

    def counted(function, *args, **kwargs) -> int:
        with counting_selection() as counter, choosing():
            function(*args, **kwargs)
        return counter.total

    cosines = pairwise_cosine(x)
    assert counted(pairwise_cosine, x) == gram_flops(n, width)
    assert counted(max_min_select, x, k) == max_min_flops(n, k, width)
    assert counted(max_min_select, x, k, first="eccentric") == max_min_flops(n, k, width) + 4 * n * width
    assert counted(dpp_select, cosines, k) == dpp_flops(n, k)
    assert counted(bipartite_match, x, k) == bipartite_flops(n, width)


def test_only_choosing_is_counted():
    """Not the model, and nothing at keep 1; a choice without products costs nothing, its signals do."""
    for pruner in (vlmprune.Uniform(keep=0.5), vlmprune.DivPrune(keep=1.0), Staged()):
        assert run(CENTRAL, pruner)[1] == 0
    assert run(CENTRAL, vlmprune.FastV(keep=0.5, layer=1))[1] > 0


def test_counting_changes_nothing():
    case = FAMILIES[CENTRAL]
    model, inputs = case.model(), case.inputs(ROWS)
    with torch.inference_mode(), vlmprune.prune(model, "mmtok", keep=5) as session:
        plain, kept = model(**inputs).logits, session.last.items[0].kept
        with counting_selection():
            again = model(**inputs).logits
    assert torch.equal(plain, again)
    assert torch.equal(kept, session.last.items[0].kept)

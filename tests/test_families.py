"""What only one family has: geometry by hand, deepstack, videos with text inside, features encoded beforehand."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from cases import BATCHES, Staged, batches_of
from families import FAMILIES, FamilyCase
from test_laws import generate, model_of, prefill

import vlmprune

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
PRE_ENCODED = "mm_encoder_outputs" in inspect.signature(type(model_of(FAMILIES["llava-next"])).forward).parameters


def geometry_of(name: str, *parts: tuple[str, int]) -> Any:
    """Geometry of the first item of a prompt of these parts."""
    family = FAMILIES[name]
    return prefill(model_of(family), "uniform", family.inputs([[1, *parts, 2]]))[1].items[0].geometry


@every_family
def test_geometry_has_a_place_for_every_cell(family: FamilyCase) -> None:
    for batch in batches_of(family).values():
        for item in prefill(model_of(family), vlmprune.Uniform(keep=0.5), family.inputs(batch))[1].items:
            shape = item.geometry
            cells = [(p, r, c) for p, (rows, cols) in enumerate(shape.grids) for r in range(rows) for c in range(cols)]
            placed = ~shape.placeless
            found = zip(shape.plane[placed].tolist(), shape.row[placed].tolist(), shape.col[placed].tolist())
            assert list(found) == cells
            assert ((shape.row < 0) == (shape.col < 0)).all()
            tiles = shape.plane if shape.tile is None else shape.tile
            assert len(shape.pictures) > int(tiles.max())


def test_llava_next_tiles_and_line_breaks() -> None:
    # 30 x 18 pixels in 32 x 32: 2 x 2 tiles of 4 x 4 patches, of whose 8 columns the middle four show the image.
    shape = geometry_of("llava-next", ("image", 1))
    assert shape.grids == ((4, 4), (8, 4))
    assert shape.pictures == ((4, 4),) * 5
    big = shape.take(torch.arange(16, 56))
    assert (big.plane == 1).all()
    for row in range(8):
        assert big.row[5 * row : 5 * row + 5].tolist() == [row] * 4 + [-1]
        assert big.col[5 * row : 5 * row + 5].tolist() == [0, 1, 2, 3, -1]
        left = 1 + 2 * (row // 4)
        assert big.tile[5 * row : 5 * row + 5].tolist() == [left, left, left + 1, left + 1, -1]
    assert (shape.tile[:16] == 0).all()


def test_llava_onevision_shrinks_large_images_and_does_not_tile_several() -> None:
    shape = geometry_of("llava-onevision", ("image", 1))
    assert shape.grids == ((4, 4), (5, 5))
    # The middles of 5 columns over 8: 0.8, 2.4, 4.0 (on the seam: the tile behind it), 5.6, 7.2.
    assert shape.tile[16:22].tolist() == [1, 1, 2, 2, 2, -1]
    assert shape.tile[-6:].tolist() == [3, 3, 4, 4, 4, -1]
    alone = geometry_of("llava-onevision", ("image", 1), 3, ("image", 0))
    assert alone.grids == ((4, 4),)
    assert alone.placeless.tolist() == [False] * 16 + [True]
    video = geometry_of("llava-onevision", ("video", 0))
    assert (video.kind, video.grids, video.pictures) == ("video", ((2, 2),) * 3, ((4, 4),) * 3)
    assert video.placeless.tolist() == [False] * 12 + [True]


def test_internvl_takes_a_run_for_an_image() -> None:
    shape = geometry_of("internvl", ("image", 0))
    assert (shape.grids, shape.pictures) == (((3, 3),) * 3, ((6, 6),) * 3)
    assert shape.plane.tolist() == [0] * 9 + [1] * 9 + [2] * 9


def test_qwen3_video_is_one_item_around_its_time_stamps() -> None:
    family = FAMILIES["qwen3-vl"]
    inputs = family.inputs([[1, ("video", 0), 2]])
    with vlmprune.prune(model_of(family), Staged(schedule=((0, 0.5), (2, 0.25)))) as session:
        out = generate(model_of(family), inputs)
    (item,) = session.last.items
    assert item.columns.tolist() == [3, 4, 5, 6, 10, 11, 12, 13, 17, 18, 19, 20]
    assert item.geometry.plane.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    gone = set(range(12)) - set(item.stages[-1].kept.tolist())
    left = sorted(set(range(inputs["input_ids"].shape[1])) - {int(item.columns[token]) for token in gone})
    assert session.last.columns[0].tolist() == left
    assert [layer.keys.shape[-2] - 8 for layer in out.past_key_values.layers] == [17, 17, 14]


def test_deepstack_refuses_early_stages() -> None:
    model = model_of(FAMILIES["qwen3-vl-moe"])  # features for layers 0 and 1
    with pytest.raises(ValueError, match="layers from 2 on"):
        vlmprune.prune(model, Staged())
    with vlmprune.prune(model, Staged(schedule=((0, 0.5), (2, 0.25)))):
        pass


def test_mrope_keeps_original_positions() -> None:
    model = model_of(FAMILIES["qwen2.5-vl"])
    with vlmprune.prune(model, "divprune", keep=0.3) as session:
        assert session.pruner.positions == "original"
    with pytest.raises(ValueError, match="cannot renumber"):
        vlmprune.prune(model, "uniform", keep=0.3, positions="compact")


@every_family
def test_embeddings_instead_of_ids(family: FamilyCase) -> None:
    """Placeholders are found in `inputs_embeds` as well."""
    model, inputs = model_of(family), family.inputs(BATCHES["unequal"])
    _, report = prefill(model, vlmprune.Uniform(keep=0.5), inputs)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    given = {key: value for key, value in inputs.items() if key not in ("input_ids", "mm_token_type_ids")}
    _, again = prefill(model, vlmprune.Uniform(keep=0.5), {**given, "inputs_embeds": embeds})
    assert [(i.sample, i.start, i.kept.tolist()) for i in again.items] == [
        (i.sample, i.start, i.kept.tolist()) for i in report.items
    ]


@every_family
@pytest.mark.skipif(not PRE_ENCODED, reason="this transformers encodes in forward()")
def test_features_encoded_beforehand(family: FamilyCase) -> None:
    """Known if encoded inside the session, whatever became of their list; refused if not."""
    model, inputs = model_of(family), family.inputs(BATCHES["unequal"])
    rest = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    pixels = {key: value for key, value in inputs.items() if key not in rest and key != "mm_token_type_ids"}
    with torch.no_grad():
        early = model.model.get_image_features(**pixels, return_dict=True)
        with vlmprune.prune(model, "uniform", keep=0.5) as session:
            with pytest.raises(ValueError, match="inside the session"):
                model(**rest, mm_encoder_outputs={"image": early})
            inside = model.model.get_image_features(**pixels, return_dict=True)
            model(**rest, mm_encoder_outputs={"image": inside})
            assert [(i.sample, i.start, i.tokens_before) for i in session.last.items] == family.spans(
                BATCHES["unequal"]
            )
            with pytest.raises(ValueError, match="prefill_chunk_size"):
                generate(model, inputs, prefill_chunk_size=20)

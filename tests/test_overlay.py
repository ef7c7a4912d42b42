from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from vlmprune import overlay
from vlmprune.contract import Geometry
from vlmprune.overlay import DROPPED, KEPT, MERGED, TEXT, Panel
from vlmprune.report import ItemReport, StageReport


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(60, 256, (height, width, 3), dtype=np.uint8))


def item(geometry: Geometry, kept: list[int], merged: list[bool] | None = None) -> ItemReport:
    flags = None if merged is None else torch.tensor(merged)
    return ItemReport(0, 0, len(geometry), geometry, [StageReport(0, torch.tensor(kept))], flags)


def test_cells_follow_the_geometry():
    (grid,) = overlay.cells(Geometry.grid(2, 3), [0, 5], [False, True])
    assert grid.tolist() == [[KEPT, DROPPED, DROPPED], [DROPPED, DROPPED, MERGED]]


def test_tokens_without_a_place_are_not_drawn():
    (grid,) = overlay.cells(Geometry.grid(2, 2, prefix=1), [0, 1])
    assert grid.tolist() == [[KEPT, DROPPED], [DROPPED, DROPPED]]


def test_every_plane_gets_its_own_grid():
    two = Geometry(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 0]), torch.tensor([0, 0, 1]), ((1, 1), (1, 2)))
    first, second = overlay.cells(two, [2])
    assert first.tolist() == [[DROPPED]]
    assert second.tolist() == [[DROPPED, KEPT]]


def test_kept_cells_show_the_picture_and_dropped_ones_are_dark_grey():
    grid = np.array([[KEPT, DROPPED], [DROPPED, MERGED]])
    picture = noise(96, 96)
    bright = np.asarray(overlay.enlarge(picture, 192))
    drawn = np.asarray(overlay.draw_kept(picture, grid, 192))
    inside = slice(8, 88), slice(104, 184)  # clear of the outlines
    for r, c in ((0, 0), (1, 1)):
        assert (drawn[inside[r], inside[c]] == bright[inside[r], inside[c]]).all()
    for r, c in ((0, 1), (1, 0)):
        cell = drawn[inside[r], inside[c]].astype(int)
        assert (cell[..., 0] == cell[..., 1]).all()
        assert (cell[..., 1] == cell[..., 2]).all()
        assert cell.mean() < 0.5 * bright[inside[r], inside[c]].mean()
    assert tuple(drawn[0, 10]) != tuple(drawn[191, 180]), "merged cells have another outline"


def test_nothing_dropped_leaves_the_picture_alone_and_all_dropped_works():
    picture = noise(30, 60)
    whole = overlay.draw_kept(picture, np.full((3, 6), KEPT), 120)
    assert (np.asarray(whole) == np.asarray(overlay.enlarge(picture, 120))).all()
    assert overlay.draw_kept(picture, np.full((3, 6), DROPPED), 120).size == (120, 60)


def test_pixels_behind_the_last_whole_patch_are_cut_off():
    ((seen, drawn),) = overlay.item_pictures(item(Geometry.grid(2, 2), [0, 3]), [noise(29, 29)], width=280)
    assert seen.size == drawn.size == (280, 280)
    expected = overlay.enlarge(noise(29, 29).crop((0, 0, 28, 28)), 280)
    assert (np.asarray(seen) == np.asarray(expected)).all()


def test_an_item_without_stages_keeps_everything():
    geometry = Geometry.grid(2, 2)
    ((seen, drawn),) = overlay.item_pictures(ItemReport(0, 0, 4, geometry), [noise(28, 28)], width=56)
    assert (np.asarray(seen) == np.asarray(drawn)).all()


def test_seen_pictures_undo_the_normalisation():
    class Processor:
        image_mean, image_std, rescale_factor = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), 1 / 255
        do_normalize = do_rescale = True

    picture = np.asarray(noise(12, 20))
    values = (picture / 255 - Processor.image_mean) / Processor.image_std
    pixel_values = torch.tensor(values, dtype=torch.float32).permute(2, 0, 1)[None]
    (back,) = overlay.seen_pictures(pixel_values, Processor)
    assert (np.asarray(back) == picture).all()
    with pytest.raises(ValueError, match="shape"):
        overlay.seen_pictures(pixel_values.flatten(1), Processor)


@pytest.mark.parametrize(
    "text", ["word " * 60, "x" * 500, "naïve Größe", "\x00\n\ttab", "中文 問題", "", " ", "a\u0301\U0001f600"]
)
def test_text_of_any_kind_stays_inside_its_card(text):
    lines = overlay._wrap([(text, TEXT), ("end", TEXT)], 19, 300)
    assert len(lines) <= 12
    for line in lines:
        shown = "".join(span for span, _ in line).rstrip()
        assert sum(overlay._font(span, 19).getlength(span.rstrip()) for span, _ in line) <= 300 or len(shown) <= 1
    page = overlay.sheet([Panel([noise(40, 300)], ["label"], [[], [(text, TEXT)]])], title=text, lines=[[(text, TEXT)]])
    assert page.width == 300 + 2 * 14 + 2 * 28


def test_letters_fall_back_to_ascii_without_a_system_font(monkeypatch):
    monkeypatch.setattr(overlay, "_system_font", lambda: None)
    assert overlay._printable("Größe é 中\n") == "Gro?e e ? "
    overlay.sheet([Panel([noise(40, 300)], (), [[("中文", TEXT)]])])


def test_cards_are_laid_out_in_columns():
    panels = [Panel([noise(50, 100), noise(50, 100)]) for _ in range(3)]
    one, two = overlay.sheet(panels, columns=1), overlay.sheet(panels, columns=2)
    assert two.width > one.width
    assert two.height < one.height


def test_files_appear_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "er" / "picture.png"
    overlay.save_image(noise(4, 4), path)
    assert Image.open(path).size == (4, 4)
    before = path.read_bytes()

    class Broken:
        def save(self, target, format):
            target.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        overlay.save_image(Broken(), path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]


@pytest.mark.parametrize("suffix", overlay.SUFFIXES)
def test_every_offered_format_can_be_written(tmp_path, suffix):
    path = overlay.check_image_path(tmp_path / "new" / f"x{suffix}")
    overlay.save_image(noise(8, 8), path)
    assert Image.open(path).size == (8, 8)


def test_unusable_targets_are_named_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for name, reason in (("x.txt", "must end in"), ("folder.png", "is a folder"), ("file/x.png", "cannot be made")):
        with pytest.raises(ValueError, match=reason):
            overlay.check_image_path(tmp_path / name)

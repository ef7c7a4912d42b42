"""Pictures of what a pruner kept: kept patches bright and outlined, dropped ones grey and dark. Needs Pillow only."""

from __future__ import annotations

import os
import tempfile
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from vlmprune.contract import Geometry
    from vlmprune.report import ItemReport

DROPPED, KEPT, MERGED = 0, 1, 2
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

Colour = tuple[int, int, int]
Span = tuple[str, Colour]
TEXT: Colour = (232, 236, 241)
MUTED: Colour = (146, 155, 168)
GOOD: Colour = (98, 214, 140)
BAD: Colour = (255, 122, 112)
_PAGE: Colour = (15, 18, 24)
_CARD: Colour = (27, 32, 41)
_OUTLINE: dict[int, Colour] = {KEPT: (255, 255, 255), MERGED: (255, 184, 77)}
_MARGIN, _GAP, _FONT = 28, 14, 19


@dataclass
class Panel:
    """One card of a sheet: pictures side by side, each with a label above, and lines of coloured text below.

    A line without text is a small gap.
    """

    pictures: Sequence[Image.Image]
    labels: Sequence[str] = ()
    lines: list[list[Span]] = field(default_factory=list)


def cells(geometry: Geometry, kept: Iterable[int], merged: Iterable[bool] | None = None) -> list[np.ndarray]:
    """State of every grid cell, one int array [rows, cols] of DROPPED, KEPT or MERGED per plane (tile or frame).

    Args:
        geometry: where the item's tokens sit.
        kept: kept tokens of the item; those without a place in the picture are left out.
        merged: which of them stand for several tokens.
    """
    planes = [np.full(grid, DROPPED) for grid in geometry.grids]
    plane, row, col = geometry.plane.tolist(), geometry.row.tolist(), geometry.col.tolist()
    chosen = [int(token) for token in kept]
    states = [KEPT] * len(chosen) if merged is None else [MERGED if flag else KEPT for flag in merged]
    for token, state in zip(chosen, states, strict=True):
        if row[token] >= 0:
            planes[plane[token]][row[token], col[token]] = state
    return planes


def kept_last(item: ItemReport) -> tuple[list[int], list[bool] | None]:
    """The item's tokens that are left at the end, and which of them stand for several: arguments of `cells`."""
    last = item.stages[-1].kept if item.stages else item.kept
    return last.tolist(), None if item.merged is None else item.merged.tolist()


def draw_kept(picture: Image.Image, grid: np.ndarray, width: int = 384) -> Image.Image:
    """`picture`, scaled to `width`, with the cells of `grid` [rows, cols] (see `cells`) kept bright or dimmed.

    The grid must cover the whole picture.
    """
    bright = enlarge(picture, width)
    grey = bright.convert("L").point(lambda value: value * 0.32 + 6).convert("RGB")
    rows, cols = grid.shape
    xs = [round(i * bright.width / cols) for i in range(cols + 1)]
    ys = [round(i * bright.height / rows) for i in range(rows + 1)]
    mask = Image.new("L", bright.size, 0)
    paint = ImageDraw.Draw(mask)
    for r, c in np.argwhere(grid != DROPPED):
        paint.rectangle((xs[c], ys[r], xs[c + 1] - 1, ys[r + 1] - 1), fill=255)
    out = Image.composite(bright, grey, mask)
    if (grid == KEPT).all():
        return out
    edge = ImageDraw.Draw(out)
    thick = 2 if bright.width / cols >= 12 else 1
    padded = np.pad(grid, 1, constant_values=DROPPED)
    for r, c in np.argwhere(grid != DROPPED):
        state, (left, top, right, bottom) = int(grid[r, c]), (xs[c], ys[r], xs[c + 1] - 1, ys[r + 1] - 1)
        colour, inner = _OUTLINE[state], thick - 1
        if padded[r, c + 1] != state:
            edge.rectangle((left, top, right, top + inner), fill=colour)
        if padded[r + 2, c + 1] != state:
            edge.rectangle((left, bottom - inner, right, bottom), fill=colour)
        if padded[r + 1, c] != state:
            edge.rectangle((left, top, left + inner, bottom), fill=colour)
        if padded[r + 1, c + 2] != state:
            edge.rectangle((right - inner, top, right, bottom), fill=colour)
    return out


def enlarge(picture: Image.Image, width: int) -> Image.Image:
    """`picture` in RGB at `width` pixels, aspect kept."""
    height = max(1, round(picture.height * width / picture.width))
    return picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)


def seen_pictures(pixel_values: Any, image_processor: Any) -> list[Image.Image]:
    """The pictures that entered the vision tower, resized and cropped as they were.

    Args:
        pixel_values: float tensor [pictures, 3, height, width].
        image_processor: the one that made it; its normalisation is undone.

    Raises:
        ValueError: `pixel_values` has another layout.
    """
    if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
        raise ValueError(f"cannot draw pixel values of shape {list(pixel_values.shape)}, only [pictures, 3, h, w].")
    pixels = pixel_values.detach().float().cpu().numpy().transpose(0, 2, 3, 1)
    if getattr(image_processor, "do_normalize", True):
        pixels = pixels * np.array(image_processor.image_std) + np.array(image_processor.image_mean)
    if getattr(image_processor, "do_rescale", True):
        pixels = pixels / image_processor.rescale_factor
    return [Image.fromarray(frame) for frame in np.clip(np.rint(pixels), 0, 255).astype(np.uint8)]


def item_pictures(
    item: ItemReport, pictures: Sequence[Image.Image], width: int = 384
) -> Iterator[tuple[Image.Image, Image.Image]]:
    """(the picture alone, the picture with kept tokens) of each plane of an item; one picture per plane."""
    grids = cells(item.geometry, *kept_last(item))
    for picture, grid in zip(pictures, grids, strict=True):
        # A tower ignores the pixels behind the last whole patch.
        covered = tuple(side // count * count for side, count in zip(picture.size, grid.shape[::-1], strict=True))
        seen = picture.crop((0, 0, *covered))
        yield enlarge(seen, width), draw_kept(seen, grid, width)


def strip(
    grids: Sequence[np.ndarray],
    pictures: Sequence[Image.Image],
    labels: Sequence[str],
    columns: int = 4,
    width: int = 230,
) -> list[Panel]:
    """A film strip: `columns` pictures to a panel, each with the cells of its grid (see `cells`) bright or dimmed.

    Args:
        grids: one a frame, int [rows, cols]; each covers the whole of its picture.
        pictures: as many.
        labels: as many.
    """
    drawn = [draw_kept(picture, grid, width) for picture, grid in zip(pictures, grids, strict=True)]
    return [
        Panel(drawn[first : first + columns], labels[first : first + columns])
        for first in range(0, len(drawn), columns)
    ]


def sheet(
    panels: Sequence[Panel], title: str = "", lines: Sequence[Sequence[Span]] = (), columns: int = 1
) -> Image.Image:
    """All panels on one page, `columns` to a row, under a title and lines of coloured text."""
    cards = [_card(panel) for panel in panels]
    columns = max(1, min(columns, len(cards)))
    wide = max((card.width for card in cards), default=400)
    rows = [cards[i : i + columns] for i in range(0, len(cards), columns)]
    width = columns * wide + (columns - 1) * _MARGIN + 2 * _MARGIN
    heads = [([(title, TEXT)], _FONT + 11)] if title else []
    heads += [(list(line), _FONT) for line in lines]
    wrapped = [(line, size) for spans, size in heads for line in _wrap(spans, size, width - 2 * _MARGIN)]
    top = _MARGIN + sum(_leading(size) for _, size in wrapped) + (_GAP if wrapped else 0)
    height = top + sum(max(card.height for card in row) + _MARGIN for row in rows)
    page = Image.new("RGB", (width, height), _PAGE)
    draw, y = ImageDraw.Draw(page), _MARGIN
    for line, size in wrapped:
        _write(draw, _MARGIN, y, line, size)
        y += _leading(size)
    y = top
    for row in rows:
        tall = max(card.height for card in row)
        for i, card in enumerate(row):
            x = _MARGIN + i * (wide + _MARGIN)
            draw.rounded_rectangle((x, y, x + wide - 1, y + tall - 1), 12, fill=_CARD)
            page.paste(card, (x, y), _rounded(card.size))
        y += tall + _MARGIN
    return page


def _card(panel: Panel) -> Image.Image:
    inner = sum(picture.width for picture in panel.pictures) + _GAP * (len(panel.pictures) - 1)
    text = [line for spans in panel.lines for line in _wrap(spans, _FONT, inner)]
    head = _leading(_FONT - 3) if panel.labels else 0
    tall = max(picture.height for picture in panel.pictures)
    size = inner + 2 * _GAP, 2 * _GAP + head + tall + (_GAP + sum(map(_height, text)) if text else 0)
    card = Image.new("RGB", size, _CARD)
    draw, x = ImageDraw.Draw(card), _GAP
    for i, picture in enumerate(panel.pictures):
        if i < len(panel.labels):
            _write(draw, x, _GAP, [(panel.labels[i], MUTED)], _FONT - 3)
        card.paste(picture, (x, _GAP + head))
        x += picture.width + _GAP
    y = 2 * _GAP + head + tall
    for line in text:
        _write(draw, _GAP, y, line, _FONT)
        y += _height(line)
    return card


def _height(line: Sequence[Span]) -> int:
    return _leading(_FONT) if line else _GAP // 2


def _rounded(size: tuple[int, int]) -> Image.Image:
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, size[0] - 1, size[1] - 1), 12, fill=255)
    return mask


def _wrap(spans: Sequence[Span], size: int, width: int, limit: int = 12) -> list[list[Span]]:
    """Break a line at spaces, and words that are too long anywhere; at most `limit` lines."""
    words = [(word, colour) for text, colour in spans for word in _pieces(_printable(text), size, width)]
    lines: list[list[Span]] = [[]]
    used = 0.0
    for word, colour in words:
        length = _font(word, size).getlength(word)
        if used and used + _font(word, size).getlength(word.rstrip()) > width:
            lines.append([])
            used = 0.0
        lines[-1].append((word, colour))
        used += length
    if len(lines) > limit:
        lines = [*lines[: limit - 1], [("...", MUTED)]]
    return lines


def _pieces(text: str, size: int, width: int) -> Iterator[str]:
    """Words with the space behind them; those wider than `width` in parts that fit."""
    for word in text.split(" "):
        while (font := _font(word, size)).getlength(word) > width and len(word) > 1:
            ends = range(1, len(word))
            cut = max(1, bisect_right(ends, width, key=lambda end: font.getlength(word[:end])))
            yield word[:cut]
            word = word[cut:]
        yield word + " "


def _write(draw: ImageDraw.ImageDraw, x: float, y: float, spans: Sequence[Span], size: int) -> None:
    for text, colour in spans:
        font = _font(text, size)
        draw.text((x, y), text, fill=colour, font=font)
        x += font.getlength(text)


def _leading(size: int) -> int:
    return round(size * 1.45)


def _printable(text: str) -> str:
    """`text` without control characters, in letters that some font has."""
    text = "".join(c if c.isprintable() else " " for c in text)
    if text.isascii() or _system_font() is not None:
        return text
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return plain.encode("ascii", "replace").decode()


@lru_cache(maxsize=256)
def _sized(system: bool, size: int) -> Any:
    path = _system_font() if system else None
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


def _font(text: str, size: int) -> Any:
    """Pillow's own font, which has ASCII only, or a system font for other letters."""
    return _sized(not text.isascii(), size)


@lru_cache
def _system_font() -> str | None:
    for name in (
        "DejaVuSans.ttf",
        "NotoSans-Regular.ttf",
        "LiberationSans-Regular.ttf",
        "Arial Unicode.ttf",
        "arial.ttf",
    ):
        try:
            ImageFont.truetype(name, 12)
        except OSError:
            continue
        return name
    return None


def check_image_path(path: Path) -> Path:
    """`path` if a picture can be written there; missing parent folders are made.

    Raises:
        ValueError: its suffix is no picture format, it is a folder, or its folder cannot be made or written.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"cannot write '{path}': the name must end in {', '.join(SUFFIXES)}.")
    if path.is_dir():
        raise ValueError(f"cannot write '{path}': it is a folder.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write '{path}': its folder cannot be made ({error.strerror}).") from None
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"cannot write '{path}': no permission to write in its folder.")
    return path


def save_image(picture: Image.Image, path: Path) -> None:
    """Write a picture in the format of its suffix; the file appears whole or not at all."""
    with atomic(path) as part:
        picture.save(part, format={"jpg": "jpeg"}.get(suffix := path.suffix.lower()[1:], suffix))


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends well and removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        yield part
        part.chmod(0o666 & ~_umask())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

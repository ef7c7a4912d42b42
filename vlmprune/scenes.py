"""Digit scenes: small images with handwritten digits on photographs, and questions about them.

Everything comes from files that scikit-learn and scikit-image install (`pip install "vlmprune[scenes]"`); nothing is
downloaded. Digit images and photographs are split, so that a test scene shares neither with a training scene, and every
scene is a pure function of `(split, seed, index, options)`.

A scene is 96 x 96 pixels and holds one to four digits of 14 to 17 pixels. Digits and colours are distinct within a
scene, hence every question has one answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from typing import Literal, get_args

import numpy as np
from PIL import Image

Split = Literal["train", "validation", "test"]
Kind = Literal["digit_of_colour", "colour_of_digit", "presence", "count", "at_corner", "where"]

SIZE = 96
SPLITS: tuple[Split, ...] = get_args(Split)
KINDS: tuple[Kind, ...] = get_args(Kind)
CORNERS = ("top-left", "top-right", "bottom-left", "bottom-right")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (245, 45, 40),
    "green": (50, 215, 60),
    "blue": (70, 110, 255),
    "yellow": (250, 225, 50),
    "cyan": (60, 220, 230),
    "pink": (255, 90, 210),
}
PHOTOS: dict[Split, tuple[str, ...]] = {
    "train": (
        "sklearn.datasets.images/china.jpg",
        "sklearn.datasets.images/flower.jpg",
        "skimage.data/astronaut.png",
        "skimage.data/motorcycle_left.png",
        "skimage.data/hubble_deep_field.jpg",
        "skimage.data/ihc.png",
        "skimage.data/grass.png",
        "skimage.data/clock_motion.png",
    ),
    "validation": ("skimage.data/camera.png", "skimage.data/coins.png"),
    "test": (
        "skimage.data/chelsea.png",
        "skimage.data/coffee.png",
        "skimage.data/rocket.jpg",
        "skimage.data/retina.jpg",
        "skimage.data/brick.png",
        "skimage.data/gravel.png",
    ),
}
_DIGIT_SHARES = {"train": (0.0, 0.7), "validation": (0.7, 0.8), "test": (0.8, 1.0)}
_CORNER_MARGIN = 6


@dataclass(frozen=True)
class SceneObject:
    """One digit. `box` is (left, top, right, bottom) in pixels, right and bottom exclusive; `ink` is the opacity
    inside the box, float32 `[height, width]` in [0, 1]; `source` is the digit's row in `load_digits`."""

    digit: int
    colour: str
    box: tuple[int, int, int, int]
    source: int
    ink: np.ndarray = field(repr=False, compare=False)

    @property
    def centre(self) -> tuple[float, float]:
        """Centre of the box, (x, y) in pixels."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2

    @property
    def corner(self) -> str:
        """The quarter of the image which holds the centre, one of `CORNERS`."""
        x, y = self.centre
        return f"{'top' if y < SIZE / 2 else 'bottom'}-{'left' if x < SIZE / 2 else 'right'}"


@dataclass(frozen=True)
class Question:
    """A question with its one right answer.

    `objects` are the indices, in `Scene.objects`, of what the answer depends on (empty for an absent thing, all of them
    when counting); `key` is the word in the text that names the object, or None.
    """

    kind: Kind
    text: str
    answer: str
    objects: tuple[int, ...]
    key: str | None = None


@dataclass(frozen=True)
class Scene:
    """An RGB image of 96 x 96 pixels, what is in it, and questions; `background` names the photograph or pattern."""

    image: Image.Image
    objects: tuple[SceneObject, ...]
    questions: tuple[Question, ...]
    background: str

    def coverage(self, patch: int = 8) -> np.ndarray:
        """Mean ink of each object in each patch, float32 `[objects, SIZE / patch, SIZE / patch]`."""
        side = SIZE // patch
        out = np.zeros((len(self.objects), SIZE, SIZE), dtype=np.float32)
        for canvas, thing in zip(out, self.objects, strict=True):
            left, top, right, bottom = thing.box
            canvas[top:bottom, left:right] = thing.ink
        return out.reshape(-1, side, patch, side, patch).mean(axis=(2, 4))


def digit_scenes(
    split: Split = "test",
    count: int = 512,
    seed: int = 0,
    *,
    digits: tuple[int, int] = (1, 4),
    per_kind: int = 1,
    kinds: Sequence[Kind] = KINDS,
    photo_share: float = 0.6,
) -> Iterator[Scene]:
    """Yield `count` scenes of a split.

    Each scene has a uniform number of digits between the two `digits` (inclusive, at most 6) and, of every kind, up to
    `per_kind` different questions: fewer where the scene allows no more unambiguous ones. `photo_share` of the
    backgrounds are photographs, the others plain, gradient or noise.

    Raises:
        ValueError: unknown split or kind, or an impossible range of digits.
        ImportError: scikit-learn or scikit-image is missing.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"unknown question kinds {sorted(unknown)}; choose from {', '.join(KINDS)}")
    if not 1 <= digits[0] <= digits[1] <= len(COLOURS):
        raise ValueError(f"digits must be a range within 1 and {len(COLOURS)}, got {digits}")
    for index in range(count):
        rng = np.random.default_rng([seed, SPLITS.index(split), index])
        yield sparse_scene(rng, split, digits=digits, per_kind=per_kind, kinds=kinds, photo_share=photo_share)


def sparse_scene(
    rng: np.random.Generator,
    split: Split,
    *,
    digits: tuple[int, int] = (1, 4),
    per_kind: int = 1,
    kinds: Sequence[Kind] = KINDS,
    photo_share: float = 0.6,
) -> Scene:
    """One scene as `digit_scenes` yields it, drawn from `rng`."""
    number = int(rng.integers(digits[0], digits[1] + 1))
    values = rng.permutation(10)[:number]
    colours = rng.permutation(list(COLOURS))[:number]
    sizes = rng.integers(14, 18, size=number)
    corners = _spread(rng, sizes)
    image, objects, background = _compose(rng, split, values, colours, sizes, corners, photo_share)
    questions = tuple(q for kind in kinds for q in _ask(rng, objects, kind, per_kind))
    return Scene(image, objects, questions, background)


def dense_scene(
    rng: np.random.Generator,
    split: Split,
    *,
    digits: tuple[int, int] = (8, 16),
    max_offset: int = 4,
    photo_share: float = 0.6,
) -> Scene:
    """A crowded scene without questions, for teaching a vision tower to read patches.

    Digits lie on a 16 pixel grid, each moved by up to `max_offset` pixels; digits and colours repeat.
    """
    number = int(rng.integers(digits[0], digits[1] + 1))
    values = rng.integers(10, size=number)
    colours = rng.choice(list(COLOURS), size=number)
    sizes = rng.integers(14, 18, size=number)
    cells = rng.permutation(36)[:number]
    corners = np.stack([cells % 6, cells // 6], axis=1) * 16 + rng.integers(-max_offset, max_offset + 1, (number, 2))
    corners = np.clip(corners, 0, SIZE - sizes[:, None])
    return Scene(*_compose(rng, split, values, colours, sizes, corners, photo_share)[:2], (), "dense")


def _need(package: str) -> ImportError:
    return ImportError(f'digit scenes need {package}: pip install "vlmprune[scenes]"')


@lru_cache
def _digits(split: Split) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Digit -> (uint8 images `[n, 8, 8]`, rows in `load_digits` `[n]`) of a split."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise _need("scikit-learn") from error
    data = load_digits()
    images = np.minimum(data.images * 16, 255).astype(np.uint8)
    first, last = _DIGIT_SHARES[split]
    out = {}
    for digit in range(10):
        rows = np.random.default_rng(digit).permutation(np.flatnonzero(data.target == digit))
        rows = rows[int(first * len(rows)) : int(last * len(rows))]
        out[digit] = images[rows], rows
    return out


@lru_cache
def _photo(name: str) -> Image.Image:
    """A shipped photograph as RGB, its shorter side 320 pixels at most."""
    package, file = name.split("/")
    try:
        path = resources.files(package) / file
    except ImportError as error:
        raise _need("scikit-learn" if package.startswith("sklearn") else "scikit-image") from error
    with path.open("rb") as stream:
        image = Image.open(stream).convert("RGB")
    scale = min(1.0, 320 / min(image.size))
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def _background(rng: np.random.Generator, split: Split, photo_share: float) -> tuple[np.ndarray, str]:
    """A background, float32 `[SIZE, SIZE, 3]` in 0..255 and dark enough for the digits, with its name."""
    if rng.random() < photo_share:
        name = PHOTOS[split][rng.integers(len(PHOTOS[split]))]
        photo = _photo(name)
        side = int(rng.integers(SIZE, min(photo.size) + 1))
        left, top = (int(rng.integers(0, extent - side + 1)) for extent in photo.size)
        crop = photo.resize((SIZE, SIZE), Image.Resampling.BOX, box=(left, top, left + side, top + side))
        pixels = np.asarray(crop, dtype=np.float32)
        if rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        return pixels * np.float32(rng.uniform(0.25, 0.75)), name
    pattern = ("plain", "gradient", "noise")[rng.integers(3)]
    if pattern == "noise":
        cells = int(rng.integers(4, 33))
        grid = Image.fromarray(rng.integers(0, 140, (cells, cells, 3), dtype=np.uint8))
        return np.asarray(grid.resize((SIZE, SIZE), Image.Resampling.BILINEAR), dtype=np.float32), pattern
    start, end = rng.uniform(0, 120, (2, 3)).astype(np.float32)
    if pattern == "plain":
        return np.broadcast_to(start, (SIZE, SIZE, 3)).copy(), pattern
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:SIZE, 0:SIZE] / (SIZE - 1) - 0.5
    ramp = np.clip(0.5 + x * np.cos(angle) + y * np.sin(angle), 0, 1)[..., None].astype(np.float32)
    return start + (end - start) * ramp, pattern


def _glyph(rng: np.random.Generator, image: np.ndarray, size: int) -> np.ndarray:
    """A digit image `[8, 8]` slightly rotated and sheared, as opacity float32 `[size, size]`."""
    angle, shear = rng.uniform(-0.2, 0.2), rng.uniform(-0.2, 0.2)
    scale = 8.4 / size
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    a, b, d, e = cos, -sin + shear * cos, sin, cos + shear * sin
    half = size / 2
    matrix = (a, b, 4 - a * half - b * half, d, e, 4 - d * half - e * half)
    warped = Image.fromarray(image).transform(
        (size, size), Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC
    )
    ink = np.asarray(warped, dtype=np.float32) * (1.25 / 255)
    return np.minimum(ink, 1.0)


def _sprite(
    rng: np.random.Generator, split: Split, digit: int, colour: str, size: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Opacity float32 `[size, size]` and paint float32 `[3]` in 0..255 of a digit, and its row in `load_digits`."""
    images, rows = _digits(split)[digit]
    pick = rng.integers(len(rows))
    ink = _glyph(rng, images[pick], size) * np.float32(rng.uniform(0.8, 1.0))
    paint = np.clip(np.array(COLOURS[colour]) + rng.uniform(-20, 20, 3), 0, 255).astype(np.float32)
    return ink, paint, int(rows[pick])


def _spread(rng: np.random.Generator, sizes: np.ndarray) -> np.ndarray:
    """Top-left corners int `[n, 2]` (x, y): squares inside the image, centres at least 17 pixels apart in x or y."""
    while True:
        corners = rng.integers(0, SIZE - sizes[:, None] + 1, (len(sizes), 2))
        centres = corners + sizes[:, None] / 2
        gaps = np.abs(centres[:, None] - centres[None]).max(axis=-1) + 1000 * np.eye(len(sizes))
        if gaps.min() >= 17:
            return corners


def _compose(
    rng: np.random.Generator,
    split: Split,
    values: np.ndarray,
    colours: np.ndarray,
    sizes: np.ndarray,
    corners: np.ndarray,
    photo_share: float,
) -> tuple[Image.Image, tuple[SceneObject, ...], str]:
    pixels, background = _background(rng, split, photo_share)
    objects = []
    for value, colour, size, (left, top) in zip(values, colours, sizes, corners, strict=True):
        ink, paint, source = _sprite(rng, split, int(value), str(colour), int(size))
        area = pixels[top : top + size, left : left + size]
        area += (paint - area) * ink[..., None]
        box = (int(left), int(top), int(left + size), int(top + size))
        objects.append(SceneObject(int(value), str(colour), box, source, ink))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), tuple(objects), background


def _ask(rng: np.random.Generator, objects: tuple[SceneObject, ...], kind: Kind, limit: int) -> list[Question]:
    """Up to `limit` different questions of one kind; presence is yes or no with equal odds."""
    order = rng.permutation(len(objects)).tolist()
    if kind == "count":
        return [Question(kind, "How many digits are there?", str(len(objects)), tuple(range(len(objects))))]
    if kind == "presence":
        return _ask_presence(rng, objects, limit)
    questions = []
    for index in order:
        thing = objects[index]
        if kind == "digit_of_colour":
            text, answer, key = f"Which digit is {thing.colour}?", str(thing.digit), thing.colour
        elif kind == "colour_of_digit":
            text, answer, key = f"What colour is the {thing.digit}?", thing.colour, str(thing.digit)
        elif not _clear_of_middle(thing):
            continue
        elif kind == "where":
            text, answer, key = f"Where is the {thing.digit}?", thing.corner, str(thing.digit)
        elif any(other is not thing and _near_corner(other, thing.corner) for other in objects):
            continue
        else:
            text, answer, key = f"What is at the {thing.corner}?", f"{thing.colour} {thing.digit}", thing.corner
        questions.append(Question(kind, text, answer, (index,), key))
    return questions[:limit]


def _ask_presence(rng: np.random.Generator, objects: tuple[SceneObject, ...], limit: int) -> list[Question]:
    by_digit = {str(thing.digit): index for index, thing in enumerate(objects)}
    by_colour = {thing.colour: index for index, thing in enumerate(objects)}
    questions: list[Question] = []
    flip = int(rng.integers(2))
    for number in range(limit):
        if (number + flip) % 2:
            pool, present, text = [str(d) for d in range(10)], by_digit, "Is there a digit {}?"
        else:
            pool, present, text = list(COLOURS), by_colour, "Is there a {} digit?"
        wanted = bool(rng.integers(2))
        asked = {q.key for q in questions}
        words = [word for word in pool if (word in present) == wanted and word not in asked]
        if not words:
            continue
        word = words[rng.integers(len(words))]
        found = (present[word],) if wanted else ()
        questions.append(Question("presence", text.format(word), "yes" if wanted else "no", found, word))
    return questions


def _clear_of_middle(thing: SceneObject) -> bool:
    return min(abs(c - SIZE / 2) for c in thing.centre) >= _CORNER_MARGIN


def _near_corner(thing: SceneObject, corner: str) -> bool:
    """Whether the centre lies in the corner's quarter or within the margin around it."""
    vertical, horizontal = corner.split("-")
    x, y = (c - SIZE / 2 for c in thing.centre)
    return (x if horizontal == "left" else -x) < _CORNER_MARGIN and (y if vertical == "top" else -y) < _CORNER_MARGIN

"""Questions about pictures, from wherever they come, as one list of `Sample`; what cannot be used is told apart."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from vlmprune.ask import load_image
from vlmprune.sweep.config import FIELDS, DataConfig

if TYPE_CHECKING:
    from vlmprune.video import Clip

LoadImage = Callable[[], Image.Image]
LoadVideo = Callable[[], "Clip"]


@dataclass(frozen=True)
class Sample:
    """One question. Pictures are loaded when a batch needs them.

    Attributes:
        id: unique in the data set.
        answers: what is accepted, at least one.
        kind: question type for the breakdown, "" if the data names none.
        frames: of the video, if that can be told without opening it, else -1; 0 without a video. Batches hold samples
            alike in it, as most processors stack videos.
        images, video: shown before the question; loading raises ValueError or OSError for a damaged file.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    kind: str = ""
    images: tuple[LoadImage, ...] = ()
    video: LoadVideo | None = None
    frames: int = 0


@dataclass(frozen=True)
class Data:
    """A data set as loaded.

    Attributes:
        bad: one sentence for each sample that cannot be used.
        name: for tables.
        fingerprint: of everything but the pixels: the same one, the same questions in the same order.
    """

    samples: list[Sample]
    bad: list[str]
    name: str

    @property
    def fingerprint(self) -> str:
        content = [[s.id, s.question, s.answers, s.kind, len(s.images), s.video is not None] for s in self.samples]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def load_data(config: DataConfig) -> Data:
    """Read the data set that `config` names.

    Raises:
        ValueError: no such source, an empty one, or one without a single sample that can be used.
        ImportError: the source needs a package that is not installed.
    """
    source, path = config.source, Path(config.source).expanduser()
    if source in BUNDLED:
        entries: Iterable[Sample | str] = BUNDLED[source](config)
    elif path.suffix.lower() in READERS and path.is_file():
        entries = _local(path, config)
    elif path.is_file():
        raise ValueError(f"'{source}' is no data file: give {', '.join(READERS)}, a folder or the name of a data set.")
    elif not path.is_dir() and (path.suffix.lower() in READERS or source.startswith((".", "/", "~"))):
        raise ValueError(f"no such data file: '{source}'.")
    else:
        entries = _table(_open_dataset(config), config, Path(config.images or path))
    samples: list[Sample] = []
    bad: list[str] = []
    ids: set[str] = set()
    for entry in entries:
        if isinstance(entry, str):
            bad.append(entry)
        elif entry.id in ids:
            bad.append(f"id '{entry.id}' is there twice")
        else:
            ids.add(entry.id)
            samples.append(entry)
        if config.limit is not None and len(samples) == config.limit:
            break
    if not samples and not bad:
        raise ValueError(f"'{source}' holds no samples.")
    if not samples:
        raise ValueError(f"'{source}' has no sample that can be used, {len(bad)} that cannot; the first: {bad[0]}.")
    return Data(samples, bad, path.stem if path.suffix.lower() in READERS else source)


def _digits(config: DataConfig) -> Iterator[Sample]:
    from vlmprune.scenes import digit_scenes

    for number, scene in enumerate(digit_scenes("test", config.scenes, config.seed)):
        for place, question in enumerate(scene.questions):
            yield Sample(
                id=f"scene{number}-{place}",
                question=question.text,
                answers=(question.answer,),
                kind=question.kind,
                images=(partial(_given, scene.image),),
            )


def _digit_clips(config: DataConfig) -> Iterator[Sample]:
    from vlmprune.video import Clip
    from vlmprune.video_scenes import digit_clips

    for number, clip in enumerate(digit_clips("test", config.scenes, config.seed)):
        film = Clip.of(clip.frames, clip.fps)
        if config.frames is not None and len(film) > config.frames:
            film = film.take([i * len(film) // config.frames for i in range(config.frames)])
        for place, question in enumerate(clip.questions):
            yield Sample(
                id=f"clip{number}-{place}",
                question=question.text,
                answers=(question.answer,),
                kind=question.kind,
                video=partial(_given, film),
                frames=len(film),
            )


BUNDLED: dict[str, Callable[[DataConfig], Iterable[Sample]]] = {"digits": _digits, "digit-clips": _digit_clips}
"""Data sets that come with the package, by the name that `source` takes."""


def _given(picture: Any) -> Any:
    return picture


class _Unreadable(str):
    """Why a line is no record."""


def _read_jsonl(path: Path) -> Iterator[tuple[Any, str]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line), f"line {number}"
                except json.JSONDecodeError as error:
                    yield _Unreadable(f"is no JSON ({error.msg})"), f"line {number}"


def _read_csv(path: Path) -> Iterator[tuple[Any, str]]:
    """Rows of text; a cell of `answers`, `images` or `choices` that looks like a JSON list is one."""
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        for row in reader:
            record: dict[str, Any] = {key: value for key, value in row.items() if key and value}
            for key in ("answers", "images", "choices"):
                if str(record.get(key, "")).startswith("["):
                    with suppress(json.JSONDecodeError):
                        record[key] = json.loads(record[key])
            yield record, f"line {reader.line_num}"


READERS = (".jsonl", ".csv", ".tsv", ".parquet")


def _local(path: Path, config: DataConfig) -> Iterator[Sample | str]:
    """Samples of a file; relative paths in it start from its folder."""
    root = config.images or path.parent
    if path.suffix.lower() == ".parquet":
        yield from _table(_read_parquet(path), config, root)
        return
    records = _read_jsonl(path) if path.suffix.lower() == ".jsonl" else _read_csv(path)
    try:
        for record, place in records:
            yield from _sample(record, place, config, root, None)
    except UnicodeDecodeError:
        raise ValueError(f"'{path}' cannot be read: it is not UTF-8 text.") from None


def _read_parquet(path: Path) -> Any:
    """A `datasets.Dataset` of a Parquet file.

    Raises:
        ValueError: it is none.
    """
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(max(0, path.stat().st_size - 4))
        whole = start == file.read() == b"PAR1"  # looked at here: the library would also log its own sentence
    try:
        if not whole:
            raise ValueError("it does not begin and end as one")
        return _datasets().Dataset.from_parquet(str(path))
    except ImportError:
        raise
    except Exception as error:  # whatever the format raises
        raise ValueError(f"'{path}' cannot be read as Parquet: {' '.join(str(error).split()).rstrip('.')}.") from None


def _open_dataset(config: DataConfig) -> Any:
    """A `datasets.Dataset` from its folder or its name on the hub."""
    datasets, path = _datasets(), Path(config.source).expanduser()
    try:
        if path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file()):
            table = datasets.load_from_disk(str(path))
        else:
            table = datasets.load_dataset(config.source, config.subset)
    except Exception as error:  # whatever the formats and the network raise
        raise ValueError(f"'{config.source}' cannot be loaded as a data set: {' '.join(str(error).split())}") from None
    if not isinstance(table, dict):
        return table
    if config.split is None and len(table) == 1:
        return next(iter(table.values()))
    if config.split not in table:
        given = f"no split '{config.split}'" if config.split else "several splits"
        raise ValueError(f"'{config.source}' has {given}: set split to one of {', '.join(table)}.")
    return table[config.split]


def _table(table: Any, config: DataConfig, root: Path) -> Iterator[Sample | str]:
    """Samples of a `datasets.Dataset`, whose pictures stay undecoded and on the disk until they are wanted."""
    feature = _datasets().Image
    for name, kind in table.features.items():
        if isinstance(kind, feature):
            table = table.cast_column(name, feature(decode=False))
    for number, record in enumerate(table):
        yield from _sample(record, f"row {number}", config, root, partial(_cell, table, number))


def _cell(table: Any, row: int, column: str) -> Any:
    return table[row][column]


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError('this data set needs the datasets library: pip install "vlmprune[eval]"') from error
    return datasets


def _sample(
    record: Any, place: str, config: DataConfig, root: Path, again: Callable[[str], Any] | None
) -> Iterator[Sample | str]:
    """The sample of one record, or the sentence that says why there is none; `again` rereads a cell of it."""
    try:
        if isinstance(record, _Unreadable):
            raise ValueError(record)
        if not isinstance(record, Mapping):
            raise ValueError(f"is no record of named fields but {_kind(record)}")
        yield _checked_sample(record, place, config, root, again)
    except ValueError as error:
        yield f"{place}: {error}"


def _checked_sample(
    record: Mapping[str, Any], place: str, config: DataConfig, root: Path, again: Callable[[str], Any] | None
) -> Sample:
    column = {name: config.columns.get(name, name) for name in FIELDS}
    cell = {name: record[key] for name, key in column.items() if record.get(key) is not None}
    question = cell.get("question")
    if not isinstance(question, str) or not question.strip():
        got = f"is {_kind(question)}" if "question" in cell else "is missing"
        raise ValueError(f"{column['question']} {got}: it must be text")
    name = "answers" if "answers" in cell else "answer"
    answers = _answers(cell.get(name), column[name])
    choices = cell.get("choices", [])
    if choices:
        if not (isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)):
            raise ValueError(f"{column['choices']} must be a list of texts, got {_kind(choices)}")
        question = "\n".join([question, *(f"{chr(65 + i)}. {choice}" for i, choice in enumerate(choices))])
        letters = [chr(65 + choices.index(answer)) for answer in answers if answer in choices]
        # Where options are letters themselves, a reply of one letter means the option's place.
        answers = (*letters, *(answer for answer in answers if not (letters and len(answer) == 1)))

    def picture(name: str, at: int | None) -> LoadImage:
        if again is None:
            return _picture(cell[name] if at is None else cell[name][at], root)
        _picture(cell[name] if at is None else cell[name][at], root)  # a wrong type is told now

        def load() -> Image.Image:
            value = again(column[name])
            return _picture(value if at is None else value[at], root)()

        return load

    images: tuple[LoadImage, ...] = (picture("image", None),) if "image" in cell else ()
    if "images" in cell:
        if not isinstance(cell["images"], list):
            raise ValueError(f"{column['images']} must be a list, got {_kind(cell['images'])}")
        images += tuple(picture("images", at) for at in range(len(cell["images"])))
    return Sample(
        id=str(cell.get("id", place.rpartition(" ")[2])),
        question=question,
        answers=answers,
        kind=str(cell.get("kind", "")),
        images=images,
        video=_video(cell["video"], root, config.frames) if "video" in cell else None,
        frames=len(cell["video"]) if isinstance(cell.get("video"), list) else -int("video" in cell),
    )


def _answers(value: Any, name: str) -> tuple[str, ...]:
    listed = value if isinstance(value, list) else [value]
    # VQA's annotations are {"answer": ..., "answer_confidence": ...}.
    listed = [entry["answer"] if isinstance(entry, Mapping) and "answer" in entry else entry for entry in listed]
    if value is None or not listed:
        raise ValueError(f"{name} is missing: it must be text, a number or a list of these")
    for entry in listed:
        if isinstance(entry, bool) or not isinstance(entry, (str, int, float)):
            raise ValueError(f"{name} must be text, a number or a list of these, got {_kind(entry)}")
    return tuple(str(entry) for entry in listed)


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", bool: "true/false", str: "text", int: "a number", float: "a number"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def _picture(value: Any, root: Path) -> LoadImage:
    """What loads the picture that a cell holds: a path, an encoded picture, a decoded one, or `datasets`' mapping."""
    if isinstance(value, Mapping) and value.get("bytes"):
        value = value["bytes"]
    elif isinstance(value, Mapping):
        value = value.get("path")
    if isinstance(value, bytes):
        return lambda: load_image(io.BytesIO(value))
    if isinstance(value, Image.Image):
        return partial(_given, value)
    if isinstance(value, str) and value:
        path = root / Path(value).expanduser()
        if not path.is_file():
            raise ValueError(f"no such image: '{value}'")
        return partial(load_image, path)
    raise ValueError(f"an image must be a path or an encoded picture, got {_kind(value)}")


def _video(value: Any, root: Path, frames: int | None) -> LoadVideo:
    """What loads `frames` frames, evenly spaced, of a video file; or a list of pictures, as one a second."""
    if isinstance(value, list):
        loads = [_picture(entry, root) for entry in value]

        def film() -> Clip:
            from vlmprune.video import Clip

            return Clip.of([load() for load in loads], fps=1)

        return film
    if not isinstance(value, str) or not value:
        raise ValueError(f"a video must be a path or a list of pictures, got {_kind(value)}")
    path = root / Path(value).expanduser()
    if not path.is_file():
        raise ValueError(f"no such video: '{value}'")

    def load() -> Clip:
        from vlmprune.video import read_video

        return read_video(path, frames)

    return load

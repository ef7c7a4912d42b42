"""What a sweep is to do, as a user writes it in YAML or flags. Checked before anything is loaded."""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    ValidationError,
    model_validator,
)

from vlmprune.sweep.metrics import METRICS

BASELINES = ("random", "uniform", "pool")
SWEPT = {"keep": "keeps", "positions": "positions", "seed": "seeds"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


def _as_mapping(key: str) -> BeforeValidator:
    """`key: value` for an entry written as plain text."""
    return BeforeValidator(lambda entry: {key: entry} if isinstance(entry, (str, Path)) else entry)


class ModelConfig(_Strict):
    """`path` is "bundled", a folder or a hub id; `name` stands in tables, the path's last part by default.

    `attention` and `device_map` are `attn_implementation` and `device_map` of `from_pretrained`.
    """

    path: str
    name: str = ""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    attention: str | None = None
    device_map: str | dict[str, int | str] | None = None

    @model_validator(mode="after")
    def _named(self) -> ModelConfig:
        self.name = self.name or Path(self.path).name or self.path
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(f"name must be made of letters, digits, '.', '_' and '-', got {self.name!r}")
        return self


class MethodConfig(BaseModel):
    """A method's name, and its own settings beside it: `{name: fastv, layer: 1}`."""

    model_config = ConfigDict(extra="allow")
    name: str

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def parse_method(entry: Any) -> Any:
    """`"fastv:layer=1,head=2"` as a mapping; anything else as it is."""
    if not isinstance(entry, str):
        return entry
    name, _, settings = entry.partition(":")
    fields: dict[str, Any] = {"name": name.strip()}
    for setting in filter(None, settings.split(",")):
        key, equals, value = (part.strip() for part in setting.partition("="))
        if not (key and equals and value):
            raise ValueError(f"a method is a name or name:setting=value,..., such as fastv:layer=1, got {entry!r}")
        try:
            fields[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            fields[key] = value
    return fields


FIELDS = ("id", "question", "answer", "answers", "choices", "image", "images", "video", "kind")
"""What a record of a data set may hold."""


class DataConfig(_Strict):
    """Where the questions come from; docs/sweep.md describes every source and its fields."""

    source: str = "digits"
    split: str | None = None
    subset: str | None = None
    limit: Annotated[int, Field(ge=1)] | None = None
    images: Path | None = None
    columns: dict[str, str] = {}
    prompt: str = "{question}"
    frames: Annotated[int, Field(ge=1)] | None = None
    scenes: Annotated[int, Field(ge=1)] = 256
    seed: int = 20261

    @model_validator(mode="after")
    def _checked(self) -> DataConfig:
        if "{question}" not in self.prompt:
            raise ValueError("prompt must hold {question}")
        for name in self.columns.keys() - set(FIELDS):
            raise ValueError(f"unknown field '{name}' in columns, which are field: column: {_nearest(name, FIELDS)}")
        return self


class TimingConfig(_Strict):
    """Timed apart from accuracy: `questions` one at a time with `new_tokens` forced, then `batches` full ones."""

    questions: Annotated[int, Field(ge=1)] = 8
    new_tokens: Annotated[int, Field(ge=2)] = 16
    batches: Annotated[int, Field(ge=1)] = 2


def _nearest(name: str, known: Iterable[str]) -> str:
    """What an unknown name may have been meant for."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"known are {', '.join(known)}."


def _known_metric(name: str) -> str:
    if name not in METRICS:
        raise ValueError(f"unknown metric '{name}': {_nearest(name, METRICS)}")
    return name


Keep = StrictInt | StrictFloat | str


class SweepConfig(_Strict):
    """Everything that decides what a sweep's rows are."""

    models: list[Annotated[ModelConfig, _as_mapping("path")]] = Field(
        default_factory=lambda: [ModelConfig(path="bundled")], min_length=1
    )
    methods: list[Annotated[MethodConfig, BeforeValidator(parse_method)]] = [MethodConfig(name="divprune")]
    keeps: Annotated[list[Keep], Field(min_length=1)] = [0.5, 0.25, 0.125]
    positions: Annotated[list[Literal["own", "original", "compact"]], Field(min_length=1)] = ["own"]
    seeds: Annotated[list[int], Field(min_length=1)] = [0]
    data: Annotated[DataConfig, _as_mapping("source")] = DataConfig()
    metric: Annotated[str, AfterValidator(_known_metric)] = "exact_match"
    batch_size: Annotated[int, Field(ge=1)] = 32
    max_new_tokens: Annotated[int, Field(ge=1)] = 16
    examples: Annotated[int, Field(ge=0)] = 48
    timing: TimingConfig | Literal[False] = TimingConfig()
    device: str | None = None
    out: Path = Path("results")

    @model_validator(mode="after")
    def _checked(self) -> SweepConfig:
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError(f"models need different names, got {', '.join(names)}: add name to one of them")
        return self


def load_config(path: Path | None, overrides: dict[str, Any]) -> SweepConfig:
    """The sweep that a YAML file describes, `overrides` (top-level keys; nested for "data") put over it.

    Raises:
        ValueError: no such file, no YAML, an unknown key (with the nearest one), a bad value, an unknown method or
            setting.
    """
    content: Any = {}
    if path is not None:
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"'{path}' is no YAML: {' '.join(str(error).split())}.") from None
        except UnicodeDecodeError:
            raise ValueError(f"'{path}' is no YAML: it is not text.") from None
        if not isinstance(content, dict):
            raise ValueError(f"'{path}' must be a mapping such as 'methods: [divprune]', got {type(content).__name__}.")
    for key, value in overrides.items():
        if key == "data" and isinstance(value, dict):
            held = content.get("data", {})
            value = {**({"source": held} if isinstance(held, str) else held), **value}
        content = {**content, key: value}
    try:
        config = SweepConfig.model_validate(content)
    except ValidationError as error:
        raise ValueError(_sentence(error, f"'{path}'" if path else "sweep")) from None
    config.methods = _complete(config.methods)
    for keep in config.keeps:
        _check_keep(keep)
    return config


def _check_keep(keep: Any) -> None:
    from vlmprune.ask import parse_keep
    from vlmprune.contract import check_keep

    parse_keep(keep) if isinstance(keep, str) else check_keep(keep)


def _sentence(error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    # pydantic also names the types of a union that it tried.
    loc = tuple(part for part in first["loc"] if isinstance(part, int) or part.islower())
    if first["type"] == "extra_forbidden":
        level = ".".join(str(part) for part in loc[:-1])
        hint = _nearest(str(loc[-1]), _level(SweepConfig, loc[:-1]).model_fields)
        return f"{where}: unknown key '{loc[-1]}'{f' in {level}' if level else ''}: {hint}"
    name = ".".join(str(part) for part in loc)
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    given = first["input"]
    got = f", got {given!r}" if first["type"] != "missing" and isinstance(given, (str, int, float, bool)) else ""
    message = message[0].lower() + message[1:] + (got if repr(given) not in message else "")
    return f"{where}: {f'{name}: ' if name else ''}{message}{'' if message.endswith('?') else '.'}"


def _level(model: type[BaseModel], loc: tuple[int | str, ...]) -> type[BaseModel]:
    """The nested model that the path `loc` leads to."""
    inner: dict[str, type[BaseModel]] = {"models": ModelConfig, "data": DataConfig, "timing": TimingConfig}
    return inner.get(str(loc[0]), model) if loc else model


def _complete(methods: list[MethodConfig]) -> list[MethodConfig]:
    """`methods` checked against the registry, "all" spelt out, the baselines first."""
    from vlmprune.registry import create_frame_selector, create_pruner, frame_selectors, list_pruners

    listed = [method for method in methods if method.name != "all"]
    everything = len(listed) < len(methods)
    for method in listed:
        for key in SWEPT.keys() & method.settings:
            raise ValueError(f"method '{method.name}': {key} is set for all methods, by '{SWEPT[key]}'.")
        if method.name in frame_selectors():
            create_frame_selector(method.name, **{key: own for key, own in method.settings.items() if key != "clip"})
        else:
            create_pruner(method.name, **method.settings)
    named = {method.name for method in listed}
    names = [*BASELINES, *([*list_pruners(), *frame_selectors()] if everything else ())]
    added = [MethodConfig(name=name) for name in dict.fromkeys(names) if name not in named]
    order = {name: place for place, name in enumerate(BASELINES)}
    return sorted([*added, *listed], key=lambda method: order.get(method.name, len(order)))

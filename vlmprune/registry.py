"""Pruners by name: the built-in ones, those registered in code, and those of installed packages."""

from __future__ import annotations

import dataclasses
import difflib
import re
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import TYPE_CHECKING, Any, TypeVar

from vlmprune.contract import Pruner

if TYPE_CHECKING:
    from vlmprune.pruners._before_tower import FrameSelector

ENTRY_POINT_GROUP = "vlmprune.pruners"

_registered: dict[str, type[Pruner]] = {}
P = TypeVar("P", bound=type[Pruner])


def register_pruner(cls: P) -> P:
    """Class decorator: make a pruner available under its `name` (the lower-case class name if it has none).

    Raises:
        TypeError: not a subclass of `Pruner`.
        ValueError: the name belongs to another class.
    """
    if not (isinstance(cls, type) and issubclass(cls, Pruner)):
        raise TypeError(f"register_pruner takes a subclass of vlmprune.Pruner, got {cls!r}")
    if not cls.name:
        cls.name = cls.__name__.lower()
    holder = _registered.get(cls.name)
    if holder is not None and (holder.__module__, holder.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"the pruner name {cls.name!r} is taken by {holder.__module__}.{holder.__qualname__}")
    _registered[cls.name] = cls
    return cls


def pruner_classes() -> dict[str, type[Pruner]]:
    """Every known pruner class by name. A plug-in that fails to load is reported as a warning and left out."""
    import vlmprune.pruners  # noqa: F401  registers the built-in ones

    for entry in metadata.entry_points(group=ENTRY_POINT_GROUP):
        if entry.name not in _registered:
            try:
                cls = entry.load()
                cls.name = cls.name or entry.name
                register_pruner(cls)
            except Exception as error:
                warnings.warn(f"pruner plug-in {entry.name!r} could not be loaded: {error}", stacklevel=2)
    return dict(sorted(_registered.items()))


def list_pruners() -> list[str]:
    """Names of all pruners, sorted."""
    return list(pruner_classes())


def frame_selectors() -> dict[str, type[FrameSelector]]:
    """The methods that choose frames before the model sees any, by name. No session takes them: see `FrameSelector`."""
    import vlmprune.pruners
    from vlmprune.pruners._before_tower import FrameSelector

    public = (getattr(vlmprune.pruners, name) for name in vlmprune.pruners.__all__)
    return {cls.name: cls for cls in public if issubclass(cls, FrameSelector)}


def create_frame_selector(name: str, **fields: Any) -> FrameSelector:
    """Build a frame selector from its name and hyper-parameters.

    Raises:
        ValueError: unknown field, or a bad value.
    """
    cls = frame_selectors()[name]
    _check_fields(name, cls, fields)
    return cls(**fields)


def create_pruner(name: str, **fields: Any) -> Pruner:
    """Build a pruner from its name and hyper-parameters.

    "merge(divprune)" is `Merge` around the method in brackets, whose hyper-parameters are meant; likewise
    "per_tile(...)" and "per_frame(...)".

    Raises:
        ValueError: unknown name (the message gives the nearest ones), unknown field, or a bad value.
    """
    wrapper, inner = _split(name)
    if wrapper is not None:
        return wrapper(create_pruner(inner, **fields))
    cls = pruner_class(name)
    _check_fields(name, cls, fields)
    return cls(**fields)


def pruner_class(name: str) -> type[Pruner]:
    """The class of a method, in brackets of wrappers or not.

    Raises:
        ValueError: unknown name (the message gives the nearest ones).
    """
    import vlmprune.pruners  # noqa: F401  registers the built-in ones

    wrapper, inner = _split(name)
    if wrapper is not None:
        return pruner_class(inner)
    # Looking through the installed packages takes a while: only for what is not known yet.
    classes = _registered if name in _registered else pruner_classes()
    if name in frame_selectors():
        raise ValueError(
            f"{name!r} chooses frames before the model sees any: call its frames(clip, question, scorer), "
            "use --frame-keep of `vlmprune ask`, or name it in a sweep."
        )
    if name not in classes:
        near = difflib.get_close_matches(str(name).lower(), classes, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known are {', '.join(classes)}."
        raise ValueError(f"unknown pruner {name!r}: {hint}")
    return classes[name]


def _split(name: str) -> tuple[Callable[[Pruner], Pruner] | None, str]:
    """A wrapper and what stands in its brackets; None for a method's own name."""
    from vlmprune.pruners import Merge, PerFrame, PerTile

    match = re.fullmatch(r"(\w+)\((.*)\)", str(name))
    if match is None:
        return None, name
    wrappers: dict[str, Callable[[Pruner], Pruner]] = {cls.name: cls for cls in (Merge, PerTile, PerFrame)}
    if match[1] not in wrappers:
        raise ValueError(f"unknown wrapper {match[1]!r}: known are {', '.join(wrappers)}, as in 'merge(divprune)'")
    return wrappers[match[1]], match[2]


def _check_fields(name: str, cls: Any, fields: dict[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(cls) if field.init]
    for key in fields:
        if key not in known:
            raise ValueError(f"pruner {name!r} has no field {key!r}: it takes {', '.join(known)}.")

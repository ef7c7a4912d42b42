"""Rows of a sweep as points, lines and a Pareto front: what table and curves are made of."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from vlmprune.sweep import store
from vlmprune.sweep.config import BASELINES
from vlmprune.sweep.metrics import wilson
from vlmprune.sweep.plan import UNPRUNED, Setting

Row = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One method at one budget: the mean over its seeds.

    Attributes:
        rows: of `results.jsonl`, one per seed.
        timing: of `timings.jsonl`, of the first seed; None if it was not timed.
        short: a shorter name than its setting's.
        interval: Wilson's for the mean accuracy over one pass through the questions.
    """

    rows: tuple[Row, ...]
    timing: Row | None
    short: str = ""

    @property
    def name(self) -> str:
        """For people: the method with its own settings."""
        return self.short or self.setting.label

    @property
    def setting(self) -> Setting:
        return setting_of(self.rows[0])

    @property
    def accuracy(self) -> float:
        return fmean(row["accuracy"] for row in self.rows)

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.accuracy, min(row["questions"] for row in self.rows))

    @property
    def changed(self) -> bool:
        return self.setting.method == UNPRUNED or all(row["changed"] for row in self.rows)

    @property
    def asked(self) -> float | None:
        """Tokens that its budget asks for; None where that is a share of the cost."""
        keep = self.setting.keep
        if self.setting.method == UNPRUNED or isinstance(keep, str):
            return None
        full = self.mean("tokens", "full")
        return min(keep, full) if isinstance(keep, int) else keep * full

    @property
    def missed(self) -> bool:
        """Whether it kept another share than it was asked for, by more than a tenth and more than a token."""
        asked = self.asked
        return asked is not None and abs(self.mean("tokens", "average") - asked) > max(0.1 * asked, 1)

    @property
    def exceeded(self) -> bool:
        """Whether that was more."""
        return self.missed and self.mean("tokens", "average") > (self.asked or 0)

    def mean(self, *keys: str) -> float:
        """Mean over seeds of a nested number, such as `mean("flops", "ratio")`."""
        values = []
        for row in self.rows:
            value: Any = row
            for key in keys:
                value = value[key]
            values.append(value)
        return fmean(values)

    @property
    def selection(self) -> dict[str, float] | None:
        """FLOPs a question that choosing costs, and their share of the language model's unpruned prefill."""
        counted = [row["selection"] for row in self.rows if row.get("selection")]
        return {key: fmean(each[key] for each in counted) for key in ("flops", "ratio")} if counted else None

    @property
    def first_token_ms(self) -> dict[str, float] | None:
        """Median and quartiles of the time to the first token."""
        if self.timing is None:
            return None
        return {key: 1e3 * value for key, value in self.timing["first_token_seconds"].items()}


@dataclass(frozen=True)
class Sweep:
    """A folder of `vlmprune sweep` as read.

    Attributes:
        timings: by row id, those that compare.
        machines: on what timings were taken, and how many on each.
    """

    about: dict[str, Any]
    rows: list[Row]
    timings: dict[str, Row]
    machines: Counter[str]

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(row["model"] for row in self.rows))

    def points(self, model: str) -> list[Point]:
        """One point per method, settings, positions and keep, in the order of the sweep."""
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            if row["model"] == model and row["status"] == "ok":
                groups.setdefault(store.dump({**setting_of(row).key, "seed": None}), []).append(row)
        points = [Point(tuple(rows), self.timings.get(rows[0]["id"])) for rows in groups.values()]
        names = short_names({point.setting.label for point in points})
        return [replace(point, short=names[point.setting.label]) for point in points]

    def unreachable(self, model: str) -> list[Row]:
        return [row for row in self.rows if row["model"] == model and row["status"] != "ok"]


def short_names(labels: Collection[str]) -> dict[str, str]:
    """Labels without the folders of the paths in them, but for those that would then be the same."""
    short = {label: re.sub(r"[^\s=,()]*/", "", label) for label in labels}
    often = Counter(short.values())
    return {label: name if often[name] == 1 else label for label, name in short.items()}


def read_sweep(folder: Path) -> Sweep:
    """Read what a sweep wrote, finished or not.

    Timings are those of one machine and configuration, the most frequent, as others do not compare.

    Raises:
        ValueError: no sweep there, or none with a finished row.
    """
    if not (folder / store.SWEEP).is_file():
        raise ValueError(f"'{folder}' holds no sweep: give the folder that `vlmprune sweep --out` wrote.")
    rows = store.read(folder / store.RESULTS)
    if not any(row["status"] == "ok" for row in rows):
        raise ValueError(f"'{folder}' holds no finished row yet: let `vlmprune sweep` go on first.")
    timings = store.read(folder / store.TIMINGS)
    machines = Counter(map(machine_of, timings))
    usual = machines.most_common(1)[0][0] if machines else ""
    kept = {timing["id"]: timing for timing in timings if machine_of(timing) == usual}
    return Sweep(store.read_json(folder / store.SWEEP), rows, kept, machines)


def machine_of(timing: Row) -> str:
    return f"{timing['settings']}, {timing['platform']}, torch {timing['versions']['torch']}"


def setting_of(row: Row) -> Setting:
    return Setting(**{key: row[key] for key in Setting.__dataclass_fields__})


def lines(points: Iterable[Point]) -> dict[tuple[str, str], list[Point]]:
    """(method with settings, positions) -> its points from few tokens to many; the unpruned run left out."""
    out: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        if point.setting.method != UNPRUNED:
            out.setdefault((point.name, point.setting.positions), []).append(point)
    return {key: sorted(own, key=lambda point: point.mean("tokens", "average")) for key, own in out.items()}


def standing(points: Sequence[Point]) -> dict[str, float]:
    """Name -> mean accuracy over all budgets of the sweep; one that a method cannot keep to counts as random's."""
    pruned = [point for point in points if point.setting.method != UNPRUNED]
    chance = {point.setting.keep: point.accuracy for point in pruned if point.setting.method == "random"}
    out = {}
    for name in dict.fromkeys(point.name for point in pruned):
        own: dict[Any, list[float]] = {}
        for point in pruned:
            if point.name == name and not point.exceeded:
                own.setdefault(point.setting.keep, []).append(point.accuracy)
        reached = {keep: fmean(values) for keep, values in own.items()}
        out[name] = fmean({**chance, **reached}.values())
    return out


def pareto(points: Sequence[Point], cost: Callable[[Point], float | None]) -> list[Point]:
    """Points to which no other is both cheaper (or as cheap) and better, from cheap to dear."""
    front: list[Point] = []
    priced = [(price, point) for point in points if (price := cost(point)) is not None]
    for _, point in sorted(priced, key=lambda pair: (pair[0], -pair[1].accuracy)):
        if not front or point.accuracy > front[-1].accuracy:
            front.append(point)
    return front


def is_baseline(method: str) -> bool:
    return method in BASELINES

"""The curves of a sweep as matplotlib figures."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from vlmprune.sweep.plan import UNPRUNED
from vlmprune.sweep.series import Point, is_baseline, lines, pareto, standing

_COLOURS = (
    "#0b6fb8",
    "#d1495b",
    "#2a9d5c",
    "#b5651d",
    "#7b4fa3",
    "#0f8b8d",
    "#c77800",
    "#c0399f",
    "#5b6b00",
    "#444f9e",
)
_BASELINES = {"random": ("x", ":"), "uniform": ("+", "-."), "pool": ("1", (0, (5, 1, 1, 1, 1, 1)))}
_MARKERS = "osD^v<>pPh"
_COLOURED = len(_COLOURS)

_NEAR = 15  # points of accuracy below the best that the second panel shows

Cost = Callable[[Point], float | None]
Lines = dict[tuple[str, str], list[Point]]
Style = tuple[str, str, Any, bool]
"""Colour, marker, dash, and whether a line stands in front."""


def flops_cost(point: Point) -> float:
    return 100 * point.mean("flops", "ratio")


def latency_cost(point: Point) -> float | None:
    return None if point.first_token_ms is None else point.first_token_ms["median"]


def curve(points: Sequence[Point], cost: Cost, axis: str, title: str, metric: str) -> Any:
    """Accuracy over cost, a line per method and position policy, error bars on both, and the Pareto front.

    With more than ten methods the ten best on average are coloured and the others light grey. Where accuracies spread
    widely, a second panel shows the best of them larger.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawn = {key: [p for p in own if cost(p) is not None] for key, own in lines(points).items()}
    drawn = {key: own for key, own in drawn.items() if own}
    style = _styles(drawn, standing(points))
    near = _near([point for own in drawn.values() for point in own], points, cost)
    figure, panes = plt.subplots(
        1, 1 + (near is not None), figsize=(13, 5.6) if near else (9, 5.6), layout="constrained", squeeze=False
    )
    for axes in panes.flat:
        _draw(axes, points, drawn, style, cost)
        axes.set_xlabel(axis)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panes.flat[0].set(ylabel=f"{metric.replace('_', ' ')}, %", title=title, **_limits(points, cost))
    if near is not None:
        panes.flat[1].set(xlim=near[0], ylim=near[1], title="the best, larger")
    _legend(panes.flat[-1], style, {positions for _, positions in drawn})
    return figure


def _limits(points: Sequence[Point], cost: Cost) -> dict[str, tuple[float, float]]:
    """Limits that show every point with its error bar: matplotlib loses sight of shifted ones."""
    shown = [point for point in points if cost(point) is not None]
    ends = [end for point in shown for end in _percent(point)]
    costs = [_number(cost(point)) for point in shown]
    if cost is latency_cost:
        costs = [end for point in shown for end in _spread(point)]
    out = {}
    for name, values in (("xlim", costs), ("ylim", ends)):
        margin = 0.05 * (max(values) - min(values)) or 1
        out[name] = (min(values) - margin, max(values) + margin)
    return out


def _near(
    drawn: Sequence[Point], points: Sequence[Point], cost: Cost
) -> tuple[tuple[float, float], tuple[float, float]] | None:
    """Limits of cost and of accuracy around the best points, if the others are far below."""
    best = 100 * max(point.accuracy for point in points)
    low = best - _NEAR
    close = [_number(cost(point)) for point in drawn if 100 * point.accuracy >= low]
    if len(close) < 2 or best - 100 * min(point.accuracy for point in drawn) < 2 * _NEAR:
        return None
    margin = 0.06 * (max(close) - min(close)) or 1
    return (min(close) - margin, max(close) + margin), (low, min(best + 2, 101))


def _draw(axes: Any, points: Sequence[Point], drawn: Lines, style: dict[str, Style], cost: Cost) -> None:
    from matplotlib.transforms import ScaledTranslation

    ahead = [label for label, (_, _, _, front) in style.items() if front]
    for (label, positions), own in drawn.items():
        colour, marker, dash, front = style[label]
        # Methods of equal cost stand side by side, so that their error bars can be told apart.
        aside = 0.9 * (ahead.index(label) - (len(ahead) - 1) / 2) if front and cost is flops_cost else 0.0
        axes.errorbar(
            [_number(cost(p)) for p in own],
            [100 * p.accuracy for p in own],
            yerr=_bars([_percent(p) for p in own]),
            xerr=_bars([_spread(p) for p in own]) if cost is latency_cost else None,
            color=colour,
            ls="--" if positions == "compact" and dash == "-" else dash,
            marker=marker,
            ms=5 if front else 3.5,
            lw=1.4 if front else 0.9,
            elinewidth=0.8,
            capsize=2 if front else 0,
            zorder=3 if front else 1,
            transform=axes.transData + ScaledTranslation(aside / 72, 0, axes.figure.dpi_scale_trans),
        )
    front_line = pareto(points, cost)
    axes.step(
        [_number(cost(p)) for p in front_line],
        [100 * p.accuracy for p in front_line],
        where="post",
        color="0.15",
        lw=5,
        alpha=0.13,
        zorder=0,
        solid_joinstyle="round",
    )
    for point in points:
        if point.setting.method == UNPRUNED and cost(point) is not None:
            axes.axhline(100 * point.accuracy, color="0.55", lw=0.8, ls=(0, (1, 3)), zorder=0)
            axes.plot(_number(cost(point)), 100 * point.accuracy, "*", color="0.1", ms=13, zorder=4)


def panels(points: Sequence[Point], title: str, metric: str) -> Any:
    """One small accuracy-FLOPs panel per method, with `random` behind it for comparison."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawn = lines(points)
    labels = list(dict.fromkeys(label for label, _ in drawn if label != "random"))
    columns = min(5, len(labels))
    rows = -(-len(labels) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(2.5 * columns, 2.1 * rows + 0.4), sharey=True, layout="constrained",
        squeeze=False,
    )  # fmt: skip
    chance = next((own for (label, _), own in drawn.items() if label == "random"), [])
    unpruned = [point for point in points if point.setting.method == UNPRUNED]
    least = min(map(flops_cost, points))
    margin = 0.06 * (100 - least) or 1
    for axes, label in zip(grid.flat, labels):
        axes.plot([flops_cost(p) for p in chance], [100 * p.accuracy for p in chance], ":", color="0.6", lw=1)
        for (name, positions), own in drawn.items():
            if name == label:
                axes.errorbar(
                    [flops_cost(p) for p in own],
                    [100 * p.accuracy for p in own],
                    yerr=_bars([_percent(p) for p in own]),
                    color=_COLOURS[0],
                    ls="--" if positions == "compact" else "-",
                    marker="o",
                    ms=3,
                    lw=1.2,
                    elinewidth=0.7,
                )
        for point in unpruned:
            axes.plot(flops_cost(point), 100 * point.accuracy, "*", color="0.1", ms=8)
        # A method that costs more than the unpruned model has an axis of its own.
        costs = [flops_cost(p) for (name, _), own in drawn.items() if name == label for p in own]
        axes.set_xlim(least - margin, max(100.0, *costs) + margin)
        axes.set_title("\n".join(textwrap.wrap(label, 26)), fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid.flat)[len(labels) :]:
        axes.set_axis_off()
    figure.suptitle(title, fontsize=11)
    figure.supxlabel("prefill FLOPs, % of unpruned", fontsize=9)
    figure.supylabel(f"{metric.replace('_', ' ')}, %", fontsize=9)
    return figure


def _styles(drawn: Lines, rank: dict[str, float]) -> dict[str, Style]:
    methods = {label: own[0].setting.method for (label, _), own in drawn.items()}
    ranked = sorted((label for label, method in methods.items() if not is_baseline(method)), key=lambda x: -rank[x])
    style: dict[str, Style] = {}
    for place, label in enumerate(ranked):
        coloured = place < _COLOURED
        style[label] = (_COLOURS[place] if coloured else "0.8", _MARKERS[place] if coloured else ".", "-", coloured)
    for label, method in methods.items():
        if is_baseline(method):
            marker, dash = _BASELINES[method]
            style[label] = ("0.35", marker, dash, True)
    return style


def _legend(axes: Any, style: dict[str, Style], positions: set[str]) -> None:
    from matplotlib.lines import Line2D

    entries = [Line2D([], [], color="0.1", marker="*", ls="", ms=11, label="unpruned")]
    for label, (colour, marker, dash, front) in style.items():
        if front:
            entries.append(Line2D([], [], color=colour, marker=marker, ls=dash, ms=5, label=label))
    if grey := [label for label, (_, _, _, front) in style.items() if not front]:
        entries.append(Line2D([], [], color="0.8", marker=".", ls="-", label=f"{len(grey)} others"))
    if "compact" in positions:
        entries.append(Line2D([], [], color="0.5", ls="--", label="compact positions"))
    if "original" in positions:
        entries.append(Line2D([], [], color="0.5", ls="-", label="original positions"))
    entries.append(Line2D([], [], color="0.15", lw=5, alpha=0.13, label="Pareto front"))
    axes.legend(handles=entries, frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _bars(values: Sequence[tuple[float, float, float]]) -> list[list[float]]:
    """matplotlib's error bars of (middle, low, high)."""
    return [[max(0.0, mid - low) for mid, low, _ in values], [max(0.0, high - mid) for mid, _, high in values]]


def _spread(point: Point) -> tuple[float, float, float]:
    times = point.first_token_ms
    assert times is not None
    return times["median"], times["q1"], times["q3"]


def _percent(point: Point) -> tuple[float, float, float]:
    low, high = point.interval
    return 100 * point.accuracy, 100 * low, 100 * high


def _number(value: float | None) -> float:
    assert value is not None
    return value

"""`vlmprune report`: one page and its pictures from the files of a sweep. No model is loaded, nothing is run again."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmprune.flops import format_bytes, format_flops
from vlmprune.overlay import DROPPED, KEPT, MERGED, atomic, draw_kept
from vlmprune.sweep import store
from vlmprune.sweep.metrics import wilson
from vlmprune.sweep.plan import UNPRUNED
from vlmprune.sweep.series import Point, Sweep, is_baseline, lines, pareto, read_sweep, standing

EXAMPLES, PER_SIDE, PICTURE_WIDTH, MAX_PLANES = 8, 3, 176, 4
_STATES = {".": DROPPED, "#": KEPT, "+": MERGED}


def write_report(folder: Path, out: Path) -> list[Path]:
    """Write `index.html`, `accuracy.md` and the curves as PNG from the sweep in `folder`; returns what was written.

    Raises:
        ValueError: no sweep in `folder`, or no finished row in it.
        ImportError: matplotlib or jinja2 is missing.
    """
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f'the report needs {error.name}: pip install "vlmprune[plots]"') from error
    sweep = read_sweep(folder)
    out.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    models = [_model(sweep, name, folder, out, written) for name in sweep.models]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vlmprune.sweep", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("page.html.j2").render(about=_about(sweep), models=models)
    for name, text in (("index.html", page), ("accuracy.md", _markdown(sweep, models))):
        with atomic(out / name) as part:
            part.write_text(text, encoding="utf-8")
    return [out / "index.html", out / "accuracy.md", *written]


@dataclass(frozen=True)
class _Figure:
    """A curve: its file, the same as a data URI, and what it shows."""

    path: Path
    uri: str
    text: str


def _model(sweep: Sweep, name: str, folder: Path, out: Path, written: list[Path]) -> dict[str, Any]:
    from vlmprune.sweep import plots

    points = sweep.points(name)
    metric = sweep.about["metric"]
    where = f"{name} on {sweep.about['data']['source']}"
    flops_axis = "prefill FLOPs, % of unpruned (vision tower included)"
    wanted = [("flops", plots.curve(points, plots.flops_cost, flops_axis, where, metric))]
    if any(point.timing for point in points):
        axis = "time to first token, ms (batch 1, median and quartiles)"
        wanted.append(("latency", plots.curve(points, plots.latency_cost, axis, where, metric)))
    if len(lines(points)) > 1:
        wanted.append(("methods", plots.panels(points, where, metric)))
    texts = {
        "flops": "Accuracy against prefill FLOPs, with 95 % Wilson intervals; methods of equal cost side by side.",
        "latency": "Accuracy against the time to the first token, measured apart at batch 1.",
        "methods": "One panel a method; dotted, random.",
    }
    figures = {}
    for kind, figure in wanted:
        path = out / f"{name}-{kind}.png"
        figures[kind] = _Figure(path, _save(figure, path), texts[kind])
        written.append(path)
    front = {id(point) for point in pareto(points, plots.flops_cost)}
    return {
        "name": name,
        "figures": figures,
        "unpruned": next((p for p in points if p.setting.method == UNPRUNED), None),
        "matrix": _matrix(points),
        "rows": [_row(point, id(point) in front) for point in points],
        "timed": any(point.timing for point in points),
        "silent": [point for point in points if not point.changed],
        "unreachable": sweep.unreachable(name),
        "kinds": _kinds(points),
        "examples": _examples(points, folder, name),
    }


def _save(figure: Any, path: Path) -> str:
    from matplotlib import pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, format="png")
    plt.close(figure)
    with atomic(path) as part:
        part.write_bytes(buffer.getvalue())
    return _uri(buffer.getvalue(), "png")


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _about(sweep: Sweep) -> dict[str, Any]:
    about, first = sweep.about, next(row for row in sweep.rows if row["status"] == "ok")
    environments = {store.dump(row["environment"]) for row in sweep.rows}
    return {
        **about,
        "environment": first["environment"],
        "mixed": len(environments) > 1,
        "machines": sweep.machines,
        "dates": sorted({timing["date"][:10] for timing in sweep.timings.values()}),
        "timing": next(iter(sweep.timings.values()), None),
        "changed_names": sorted({row["method"] for row in sweep.rows}),
    }


def _matrix(points: Sequence[Point]) -> dict[str, Any]:
    """Methods x budgets: the accuracy of each, best methods (`standing`) first, baselines last."""
    keeps = list(dict.fromkeys(p.setting.keep for p in points if p.setting.method != UNPRUNED))
    table = []
    for (label, positions), own in lines(points).items():
        cells = {point.setting.keep: point for point in own}
        table.append((label, positions, [cells.get(keep) for keep in keeps]))
    columns = zip(*(cells for _, _, cells in table))
    mean = standing(points)

    def rank(row: tuple[str, str, list[Point | None]]) -> tuple[bool, float]:
        return is_baseline(next(point for point in row[2] if point).setting.method), -mean[row[0]]

    best = [max((p.accuracy for p in column if p and not p.exceeded), default=None) for column in columns]
    return {"keeps": keeps, "rows": sorted(table, key=rank), "best": best}


def _row(point: Point, front: bool) -> dict[str, Any]:
    """One line of the table, as (text, number to sort by) where they differ."""
    setting, timing = point.setting, point.timing
    low, high = point.interval
    gaps = [row["vs_unpruned"] for row in point.rows if row["vs_unpruned"]]
    one = gaps[0] if len(gaps) == 1 else None
    gap = sum(entry["difference"] for entry in gaps) / len(gaps) if gaps else None
    times = point.first_token_ms
    unpruned, chosen = setting.method == UNPRUNED, point.selection
    return {
        "point": point,
        "method": point.name,
        "keep": "" if unpruned else setting.keep,
        "positions": "" if unpruned else setting.positions,
        "seeds": len(point.rows),
        "front": front,
        "tokens": point.mean("tokens", "average"),
        "per_layer": ", ".join(f"{tokens:.1f}" for tokens in point.rows[0]["tokens"]["per_layer"]),
        "flops": format_flops(point.mean("flops", "pruned")),
        "flops_ratio": 100 * point.mean("flops", "ratio"),
        "choosing": "" if unpruned else "in FLOPs" if setting.selector is not None else _choosing(chosen),
        "choosing_ratio": None if chosen is None else chosen["ratio"],
        "choosing_flops": "" if chosen is None else format_flops(chosen["flops"]),
        "kv": format_bytes(point.mean("kv_bytes", "pruned")),
        "kv_ratio": 100 * point.mean("kv_bytes", "ratio"),
        "accuracy": 100 * point.accuracy,
        "interval": f"{100 * low:.1f} – {100 * high:.1f}",
        "gap": None if gap is None else 100 * gap,
        "gap_interval": "" if one is None else "{:+.1f} … {:+.1f}".format(*(100 * end for end in one["ci"])),
        "lost": "" if one is None else f"−{one['lost']} +{one['gained']}",
        "first_token": times,
        "decode": timing and timing["decode_tokens_per_second"]["median"],
        "throughput": timing and timing["questions_per_second"],
        "memory": timing and timing["peak_memory_bytes"] and format_bytes(timing["peak_memory_bytes"]),
        "memory_bytes": timing and timing["peak_memory_bytes"],
        "selection": timing and 1e3 * timing["selection_seconds"]["median"],
        "changed": point.changed,
        "difference": point.rows[0]["logit_difference"],
        "failed": sum(row["failed"] for row in point.rows),
    }


def _choosing(chosen: dict[str, float] | None) -> str:
    """Share of the language model's prefill, in %; rows of earlier versions do not have it."""
    return "not counted" if chosen is None else f"{100 * chosen['ratio']:.2f}"


def _kinds(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Per budget: methods x question types, the unpruned model on top of each."""
    kinds = sorted({kind for point in points for row in point.rows for kind in row["by_kind"]})
    if not kinds:
        return []
    unpruned = [point for point in points if point.setting.method == UNPRUNED]
    tables = []
    for keep in dict.fromkeys(p.setting.keep for p in points if p.setting.method != UNPRUNED):
        own = [point for point in points if point.setting.keep == keep and point.setting.method != UNPRUNED]
        own.sort(key=lambda point: (is_baseline(point.setting.method), -point.accuracy))
        asked = [(kind, max(row["by_kind"].get(kind, (0, 0))[1] for p in points for row in p.rows)) for kind in kinds]
        tables.append({"keep": keep, "kinds": asked, "rows": [(p, _by_kind(p, kinds)) for p in [*unpruned, *own]]})
    return tables


def _by_kind(point: Point, kinds: Sequence[str]) -> list[tuple[float | None, str]]:
    """Accuracy in % over the seeds, and its interval over one pass through the questions."""
    cells: list[tuple[float | None, str]] = []
    for kind in kinds:
        parts = [row["by_kind"][kind] for row in point.rows if kind in row["by_kind"]]
        asked = sum(total for _, total in parts)
        share = sum(right for right, _ in parts) / asked if asked else None
        low, high = wilson(share, min(total for _, total in parts)) if share is not None else (0.0, 1.0)
        cells.append((None if share is None else 100 * share, f"{100 * low:.1f} – {100 * high:.1f}"))
    return cells


def _examples(points: Sequence[Point], folder: Path, model: str) -> list[dict[str, Any]]:
    """Questions that some methods answer and others do not at the same budget, with what each of them kept."""
    answers: dict[tuple[Any, int], list[tuple[Point, dict[str, Any]]]] = {}
    unpruned: dict[int, dict[str, Any]] = {}
    for point in points:
        path = folder / "predictions" / f"{point.rows[0]['id']}.jsonl.gz"
        for entry in store.read_lines(path) if path.exists() else []:
            if "kept" not in entry or not (folder / "examples" / model / f"{entry['place']}-0.png").exists():
                continue
            if point.setting.method == UNPRUNED:
                unpruned[entry["place"]] = entry
            else:
                answers.setdefault((point.setting.keep, entry["place"]), []).append((point, entry))
    found = []
    for (keep, place), given in answers.items():
        # One answer a method: position policies and settings of the same one would fill the card.
        first = list({point.setting.method: (point, entry) for point, entry in reversed(given)}.values())[::-1]
        right = [pair for pair in first if pair[1]["score"] >= 0.5]
        wrong = [pair for pair in first if pair[1]["score"] < 0.5]
        if right and wrong and unpruned.get(place, {}).get("score", 0) >= 0.5:
            found.append((keep, place, right, wrong))
    cards = []
    for keep, place, right, wrong in _varied(found, unpruned):
        about = unpruned[place]
        pictures = _pictures(folder / "examples" / model, place)
        cards.append(
            {
                "question": about["question"],
                "answers": about["answers"],
                "kind": about["kind"],
                "keep": keep,
                "whole": [_jpeg(picture.resize(_fit(picture))) for picture in pictures],
                "unpruned": about["reply"],
                "answered": [
                    {
                        "method": point.name,
                        "tokens": sum(row.count("#") + row.count("+") for grid in entry["kept"] for row in grid),
                        "narrows": len(set(point.rows[0]["tokens"]["per_layer"])) > 1,
                        "reply": entry["reply"],
                        "right": entry["score"] >= 0.5,
                        "pictures": [
                            _jpeg(draw_kept(picture, _grid(rows), PICTURE_WIDTH))
                            for picture, rows in zip(pictures, entry["kept"])
                        ],
                    }
                    for point, entry in [*_few(right), *_few(wrong)]
                ],
            }
        )
    return cards


def _varied(found: list[tuple[Any, int, list, list]], unpruned: dict[int, dict[str, Any]]) -> list[Any]:
    """The most divided cases, every question once, types and budgets in turn."""
    found = sorted(found, key=lambda case: (-min(len(case[2]), len(case[3])), case[1]))
    chosen: list[Any] = []
    seen: dict[Any, int] = {}
    while found and len(chosen) < EXAMPLES:

        def worn(case: Any) -> int:
            return seen.get(("kind", unpruned[case[1]]["kind"]), 0) + seen.get(("keep", case[0]), 0)

        case = min(found, key=worn)  # the first among equals: the most divided
        chosen.append(case)
        for key in (("kind", unpruned[case[1]]["kind"]), ("keep", case[0])):
            seen[key] = seen.get(key, 0) + 1
        found = [other for other in found if other[1] != case[1]]
    return chosen


def _few(pairs: list[tuple[Point, dict[str, Any]]]) -> list[tuple[Point, dict[str, Any]]]:
    """Real methods before baselines, good ones before others."""
    return sorted(pairs, key=lambda pair: (is_baseline(pair[0].setting.method), -pair[0].accuracy))[:PER_SIDE]


def _pictures(folder: Path, place: int) -> list[Image.Image]:
    pictures: list[Image.Image] = []
    while len(pictures) < MAX_PLANES and (path := folder / f"{place}-{len(pictures)}.png").exists():
        with Image.open(path) as picture:
            pictures.append(picture.convert("RGB"))
    return pictures


def _grid(rows: Sequence[str]) -> np.ndarray:
    return np.array([[_STATES[mark] for mark in row] for row in rows])


def _fit(picture: Image.Image) -> tuple[int, int]:
    return PICTURE_WIDTH, max(1, round(picture.height * PICTURE_WIDTH / picture.width))


def _jpeg(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="jpeg", quality=88)
    return _uri(buffer.getvalue(), "jpeg")


def _markdown(sweep: Sweep, models: Sequence[dict[str, Any]]) -> str:
    """The table for people who read the repository and not the page."""
    about = _about(sweep)
    versions = ", ".join(f"{name} {version}" for name, version in about["environment"]["versions"].items())
    out = [
        "# Accuracy against cost",
        "",
        f"{about['questions']} questions of {about['data']['source']}, {about['metric'].replace('_', ' ')}, 95 % "
        f"Wilson intervals. {versions}, {about['environment']['device']}. Tokens are the mean over decoder layers, "
        "FLOPs those of the prefill with the vision tower, selection (the matrix products done for choosing alone) a "
        "share of the language model's unpruned prefill."
        + (" Some rows were made with other versions: results.jsonl says which." if about["mixed"] else ""),
    ]
    for model in models:
        columns = ("method", "keep", "positions", "tokens", "FLOPs", "selection", "KV cache", "accuracy")
        out += ["", f"## {model['name']}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for row in model["rows"]:
            out.append(
                f"| {row['method']} | {row['keep']} | {row['positions']} | {row['tokens']:.1f} | "
                f"{row['flops_ratio']:.1f} % | {row['choosing']}{'' if row['choosing_ratio'] is None else ' %'} | "
                f"{row['kv_ratio']:.1f} % | "
                f"**{row['accuracy']:.1f}** [{row['interval']}] |"
            )
        if model["unreachable"]:
            out += ["", "Not reachable:", ""]
            out += [
                f"- {row['method']}, keep {row['keep']}, {row['positions']}: {row['reason']}."
                for row in model["unreachable"]
            ]
    return "\n".join(out) + "\n"

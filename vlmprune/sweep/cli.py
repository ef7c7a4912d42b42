"""`vlmprune sweep` on a terminal: progress with the time left, a table at the end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from vlmprune.sweep.config import load_config
from vlmprune.sweep.plan import UNPRUNED, Setting
from vlmprune.sweep.series import short_names


def run_sweep(
    path: Path | None,
    flags: dict[str, Any],
    data: dict[str, Any],
    shared: dict[str, Any],
    consoles: tuple[Console, Console],
) -> None:
    """Run the sweep of a YAML file with `flags` put over it.

    Args:
        flags, data: keys of the file and of its `data`; None is left to the file.
        shared: model options that also hold for the models of the file.
        consoles: for the table, and for progress and notes.
    """
    out, err = consoles
    main = int(os.environ.get("RANK", "0")) == 0
    err.quiet = out.quiet = not main
    overrides = {key: value for key, value in flags.items() if value is not None}
    if given := {key: value for key, value in data.items() if value is not None}:
        overrides["data"] = given
    config = load_config(path, overrides)
    for name, value in shared.items():
        for model in config.models:
            setattr(model, name, value if value is not None else getattr(model, name))
    with err.status("loading"):
        from vlmprune.sweep.run import run
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        watch = _watcher(progress, err)
        try:
            outcome = run(config, watch)
        except KeyboardInterrupt:
            progress.stop()
            err.print(
                f"[yellow]interrupted:[/] {watch.done} of {watch.total} rows are finished in "
                f"'{escape(str(config.out))}'; the same command goes on from there.",
                highlight=False,
                soft_wrap=True,
            )
            raise typer.Exit(130) from None
    out.print(_table(outcome.rows))
    name = escape(str(config.out))
    out.print(f"wrote [bold]{name}[/]; `vlmprune report {name}` draws it.", highlight=False, soft_wrap=True)
    for setting, why in outcome.failed:
        text = escape(f"{setting.id} failed and is tried again by the same command: {why}")
        err.print(f"[bold red]error:[/] {text}", highlight=False, soft_wrap=True)
    if outcome.failed:
        raise typer.Exit(1)


def _watcher(progress: Progress, err: Console) -> Any:
    from vlmprune.sweep.run import Watcher

    class Bar(Watcher):
        total = done = 0

        def begin(self, rows: int, done: int, batches: int) -> None:
            self.total, self.done = rows, done
            self.task = progress.add_task("", total=batches)

        def row(self, setting: Setting) -> None:
            at = f"keep={setting.keep} {setting.positions}" if setting.method != UNPRUNED else ""
            progress.update(self.task, description=escape(f"row {self.done + 1}/{self.total} {setting.label} {at}"))

        def advance(self, batches: int = 1) -> None:
            progress.advance(self.task, batches)

        def finished(self, row: dict[str, Any]) -> None:
            self.done += 1
            if not err.is_terminal:
                err.print(
                    escape(f"{self.done}/{self.total} {row['id']}: {_result(row)}"), highlight=False, soft_wrap=True
                )

        def note(self, text: str) -> None:
            err.print(f"[yellow]note:[/] {escape(text.rstrip('.'))}.", highlight=False, soft_wrap=True)

    return Bar()


def _result(row: dict[str, Any]) -> str:
    if row["status"] != "ok":
        return f"{row['status']}, {row['reason']}"
    low, high = row["ci"]
    return f"{100 * row['accuracy']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _table(rows: list[dict[str, Any]]) -> Table:
    """One line a row; names take what room the figures leave."""
    settings = [Setting(**{key: row[key] for key in Setting.__dataclass_fields__}) for row in rows]
    models, methods = short_names({each.model for each in settings}), short_names({each.label for each in settings})
    several = len(models) > 1
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.caption = "FLOPs of the prefill and KV cache in % of unpruned, accuracy in %, change in points"
    table.caption_justify = "left"
    for name in ("model", "method") if several else ("method",):
        table.add_column(name, overflow="fold", min_width=8)
    for name in ("keep", "positions"):
        table.add_column(name, no_wrap=True)
    for name in ("tokens", "FLOPs", "KV", "accuracy [95 %]", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    for row, setting in zip(rows, settings):
        first = [models[setting.model]] * several
        first += [methods[setting.label], str(setting.keep), setting.positions]
        if row["status"] != "ok":
            table.add_row(*map(escape, first), "", "", "", f"[dim]{row['status']}[/]", "")
            continue
        gap = row["vs_unpruned"]
        low, high = row["ci"]
        silent = " [yellow]pruned nothing[/]" if setting.method != UNPRUNED and not row["changed"] else ""
        table.add_row(
            *map(escape, first),
            f"{row['tokens']['average']:.1f}",
            f"{100 * row['flops']['ratio']:.1f}",
            f"{100 * row['kv_bytes']['ratio']:.1f}",
            f"{100 * row['accuracy']:.1f} \\[{100 * low:.1f}, {100 * high:.1f}]{silent}",
            "" if gap is None else f"{100 * gap['difference']:+.1f}",
        )
    return table

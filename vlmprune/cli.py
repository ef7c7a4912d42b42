"""The `vlmprune` command. Models and torch are imported inside the verbs: `--help` does not wait for them."""

from __future__ import annotations

import ast
import os
import sys
import warnings
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from typer.core import TyperGroup

import vlmprune

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

    from vlmprune.ask import Answer, Chat
    from vlmprune.contract import Pruner
    from vlmprune.demo import Row
    from vlmprune.overlay import Panel
    from vlmprune.report import ItemReport
    from vlmprune.streaming import Stream
    from vlmprune.video import Clip


class _Group(TyperGroup):
    """Turns what a user can cause into one sentence: exit code 2, or 130 after Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except KeyboardInterrupt:
            _err().print("[yellow]interrupted[/]")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            raise
        except (ValueError, OSError, ImportError) as error:
            if ctx.params.get("traceback"):
                raise
            _err().print(f"[bold red]error:[/] {escape(_sentence(error))}", soft_wrap=True, highlight=False)
            raise typer.Exit(2) from None
        except RuntimeError as error:
            if ctx.params.get("traceback") or type(error).__name__ != "OutOfMemoryError":
                raise
            _err().print("[bold red]error:[/] the device ran out of memory: use a smaller model, image or --dtype.")
            raise typer.Exit(2) from None


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _err().print(f"[yellow]warning:[/] {escape(str(message))}", soft_wrap=True, highlight=False)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: '{error.filename}'." if error.filename else f"{error.strerror}."
    return " ".join(str(error).split()) or type(error).__name__


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class PositionPolicy(str, Enum):
    original = "original"
    compact = "compact"


bench = typer.Typer(help="Time what the package does on this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")

PrunerName = Annotated[str, typer.Option("--pruner", help="Method; `vlmprune methods` lists them.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="A method's own setting, name=value; repeat for several.", show_default=False),
]
Positions = Annotated[
    PositionPolicy | None, typer.Option(help="Position ids after pruning.", show_default="the method's own")
]
Device = Annotated[str | None, typer.Option(help="Where to run.", show_default="cuda if there is one, else cpu")]
Repeats = Annotated[int, typer.Option(min=1, help="Timed runs of each kind; times are medians.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        _out().print(f"vlmprune {vlmprune.__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", hidden=True)] = False,
) -> None:
    """Prune visual tokens of Hugging Face vision-language models."""


@app.command()
def demo(
    pruner: PrunerName = "divprune",
    keep: Annotated[str, typer.Option(help="Ratio such as 0.25, or count per image such as 64.")] = "0.25",
    positions: Positions = None,
    setting: Settings = None,
    questions: Annotated[int, typer.Option(min=1, help="Questions per scene.")] = 3,
    repeats: Repeats = 3,
    device: Device = None,
    out: Annotated[Path, typer.Option(help="Folder for report.json and kept_tokens.png.")] = Path("out/demo"),
) -> None:
    """Ask the bundled model about held-out scenes, with all visual tokens and pruned."""
    with _err().status("loading the bundled model"):
        from vlmprune import bundled
        from vlmprune import demo as job
        from vlmprune.overlay import check_image_path

        method = _method(pruner, keep, positions, setting)
        check_image_path(out / "kept_tokens.png")
        chat = _chat(None, device)
        todo = job.pick_questions(bundled.demo_scenes(), questions)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_err(), transient=True) as bar:
        task = bar.add_task("asking", total=len(todo))
        rows = job.run(chat, method, todo, repeats, lambda: bar.advance(task))
    console = _out()
    console.print(_demo_table(rows, console.width))
    console.print(_demo_summary(rows, chat, repeats), highlight=False)
    for path in job.write(rows, chat, method, out):
        _wrote(console, path)


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What to ask.", show_default=False)],
    image: Annotated[
        list[Path] | None, typer.Option(help="Image file; repeat for several.", show_default=False)
    ] = None,
    video: Annotated[
        list[Path] | None, typer.Option(help="Video file; repeat for several.", show_default=False)
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Frames read of a video.", show_default="16")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames read a second, instead.", show_default=False)] = None,
    frame_keep: Annotated[
        str | None,
        typer.Option(
            help="Frames of them shown to the model, those that fit the question best by CLIP (Free Video-LLM); "
            "ratio or count.",
            show_default="all",
        ),
    ] = None,
    roi: Annotated[
        float | None,
        typer.Option(help="Area of the region that each frame is cropped to, by the question.", show_default=False),
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(help="CLIP for these: a folder, or name:weights of open_clip.", show_default="the bundled one"),
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Watch the video frame by frame, with bounded memory; all frames or --fps.")
    ] = False,
    budget: Annotated[
        int | None, typer.Option(help="Visual tokens that a stream holds.", show_default="512, with --stream")
    ] = None,
    evict: Annotated[
        str | None,
        typer.Option(help='Who leaves a full stream: "oldest", or a method.', show_default="oldest, with --stream"),
    ] = None,
    every: Annotated[
        float | None, typer.Option(help="Ask again every so many seconds of a stream.", show_default="at its end")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder of a checkpoint.", show_default="a bundled one")
    ] = None,
    pruner: PrunerName = "divprune",
    keep: Annotated[
        str | None,
        typer.Option(
            help="Ratio such as 0.1, count per image such as 64, or share of the cost such as flops:0.3 or kv:0.2.",
            show_default="the method's own",
        ),
    ] = None,
    positions: Positions = None,
    setting: Settings = None,
    compare: Annotated[bool, typer.Option("--compare", help="Run unpruned as well and show both.")] = False,
    overlay: Annotated[
        Path | None, typer.Option(help="Write a picture of the kept tokens.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of the answer.")] = 64,
    repeats: Repeats = 3,
    device: Device = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Number format.", show_default="the checkpoint's own")] = None,
) -> None:
    """Ask a model about images and videos with pruned visual tokens.

    The answer goes to standard output, what pruning did to standard error.
    """
    if not image and not video:
        raise ValueError("no image: give at least one with --image FILE, or a video with --video FILE.")
    if not video and (frames, fps, frame_keep, roi, clip) != (None,) * 5:
        raise ValueError(
            "--frames, --fps, --frame-keep, --roi and --clip are about videos: give one with --video FILE."
        )
    if not stream and (budget, evict, every) != (None,) * 3:
        raise ValueError("--budget, --evict and --every are about a stream: add --stream.")
    if stream:
        if not video or len(video) > 1 or image or compare or overlay or (frames, frame_keep, roi, clip) != (None,) * 4:
            raise ValueError("--stream watches one --video; of the options for videos it knows --fps alone.")
        if every is not None and not every > 0:
            raise ValueError(f"--every takes a number of seconds above zero, got {every}.")
        with _err().status("loading the model"):
            from vlmprune.ask import prompt_inputs

            method = _method(pruner, keep, positions, setting)
            chat = _chat(model, device, dtype, video=True)
            prompt_inputs(chat.processor, question)  # a question that cannot be asked is told before the film is over
            watching = vlmprune.stream(
                chat.model,
                chat.processor,
                method,
                budget=512 if budget is None else budget,
                evict=evict or "oldest",
                fps=fps or 24.0,
            )
        _watch(watching, video[0], question, fps, every, max_new_tokens)
        return
    with _err().status("loading the model"):
        from vlmprune import ask as job
        from vlmprune.overlay import check_image_path

        pictures = [job.load_image(path) for path in image or []]
        method = _method(pruner, keep, positions, setting)
        if overlay is not None:
            check_image_path(overlay)
        clips = _clips(video or [], question, frames, fps, frame_keep, roi, clip)
        chat = _chat(model, device, dtype, video=bool(clips))
        inputs = job.encode(chat, pictures, question, clips)
    with _err().status("answering"):
        if compare:
            full, pruned = job.compare(chat, inputs, method, max_new_tokens, repeats)
        else:
            full, pruned = None, job.answer(chat, inputs, method, max_new_tokens)
    report = pruned.report
    assert report is not None
    console, notes = _out(), _err()
    for path, part in zip(video or [], clips):
        _note(_watched(path, part))
    if clips and getattr(chat.processor, "video_processor", None) is None:
        _note(f"{chat.name} takes no videos: it sees their frames as images.")
    if full is not None:
        console.print(_compare_table(full, pruned, method))
        console.print(f"[dim]median of {repeats} after a warm-up; {escape(chat.settings)}[/]", highlight=False)
    else:
        console.print(pruned.text, markup=False, highlight=False, soft_wrap=True)
        _note(f"{method.name}: {report}")
    if not report.changed and keep is None:
        notes.print(f"[yellow]{method.name} keeps all tokens unless told otherwise: add --keep.[/]", highlight=False)
    if overlay is not None:
        _write_overlay(overlay, chat, inputs, question, full, pruned, method, clips)
        _wrote(notes, overlay)


@app.command()
def sweep(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file; flags go before what it says.", show_default=False)
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help='"bundled", a hub id or a folder; repeat for several.', show_default=False)
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help='Method, as in fastv:layer=1, or "all"; repeat for several.', show_default=False),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Ratio, count, or share of the cost such as flops:0.3; repeat.", show_default=False),
    ] = None,
    positions: Annotated[
        list[str] | None, typer.Option(help="original, compact or own (the method's); repeat.", show_default=False)
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="For methods that draw; repeat.", show_default=False)] = None,
    data: Annotated[
        str | None, typer.Option(help='"digits", a .jsonl, .csv or .parquet, a data set.', show_default=False)
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of a data set that has several.", show_default=False)] = None,
    prompt: Annotated[
        str | None, typer.Option(help='What is asked, such as "{question} Answer with one word."', show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use the first so many samples.", show_default=False)] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="exact_match, vqa_accuracy, anls, multiple_choice or relaxed_numeric.", show_default=False),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Questions a batch.", show_default=False)] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Length limit of a reply.", show_default=False)] = None,
    device: Device = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Number format.", show_default="the checkpoint's own")] = None,
    device_map: Annotated[
        str | None, typer.Option(help='Handed to from_pretrained, such as "auto".', show_default=False)
    ] = None,
    timing: Annotated[bool, typer.Option("--timing/--no-timing", help="Measure time and memory as well.")] = True,
    out: Annotated[Path | None, typer.Option(help="Folder for the results.", show_default="results")] = None,
) -> None:
    """Accuracy against cost: models x methods x budgets on a data set.

    The same command goes on where it was stopped.
    """
    from vlmprune.sweep.cli import run_sweep

    shared = {"dtype": dtype.value if dtype else None, "device_map": device_map}
    run_sweep(
        config,
        {
            "models": [{"path": path, **shared} for path in model] if model else None,
            "methods": method,
            "keeps": keep,
            "positions": positions,
            "seeds": seed,
            "metric": metric,
            "batch_size": batch_size,
            "max_new_tokens": max_new_tokens,
            "device": device,
            "timing": None if timing else False,
            "out": out,
        },
        {"source": data, "split": split, "prompt": prompt, "limit": limit},
        shared,
        (_out(), _err()),
    )


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="Folder that `vlmprune sweep` wrote.")] = Path("results"),
    out: Annotated[
        Path | None, typer.Option(help="Folder for index.html and pictures.", show_default="the same")
    ] = None,
) -> None:
    """Draw a sweep: curves, table, question types and examples on one page that needs no server."""
    with _err().status("drawing"):
        from vlmprune.sweep.report import write_report

        paths = write_report(results, out or results)
    for path in paths:
        _wrote(_out(), path)


@bench.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def kernels(context: typer.Context) -> None:
    """Time every kernel against its reference, the published loop and library peers; `--help` lists the options."""
    from vlmprune.kernels.bench import main

    raise typer.Exit(main(context.args))


@bench.command()
def e2e(
    model: Annotated[
        list[str] | None,
        typer.Option(help="Model shape; repeat for several.", show_default="llava-1.5-7b, on a GPU all four"),
    ] = None,
    pruner: Annotated[list[str] | None, typer.Option(help="Method; repeat.", show_default="divprune, uniform")] = None,
    keep: Annotated[str, typer.Option(help="Ratio such as 0.1, or count per image such as 64.")] = "0.1",
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Batch size; repeat.", show_default="1, 8")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded behind the first.")] = 32,
    text_tokens: Annotated[int, typer.Option(min=3, help="Text tokens of a prompt.")] = 40,
    rounds: Annotated[int, typer.Option(min=1, help="Timed runs of each side.")] = 15,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads, on a CPU.", show_default="torch's")] = None,
    twins: Annotated[
        bool | None,
        typer.Option("--twins/--full", help="Scaled-down models or real ones.", show_default="twins on a CPU"),
    ] = None,
    device: Device = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Number format.", show_default="bfloat16, on a CPU float32")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the result as JSON.", show_default=False)] = None,
) -> None:
    """Time models of random weights unpruned, pruned, and as an ideal run that is given just the kept tokens."""
    with _err().status("loading") as status:
        import torch

        from vlmprune import bench_e2e
        from vlmprune.ask import parse_keep

        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            result = bench_e2e.run(
                model or (["llava-1.5-7b"] if place.type == "cpu" else list(bench_e2e.SHAPES)),
                [vlmprune.create_pruner(name, keep=parse_keep(keep)) for name in pruner or ("divprune", "uniform")],
                batches=batch or (1, 8),
                device=place,
                dtype=getattr(torch, dtype.value) if dtype else None,
                twins=twins,
                text_tokens=text_tokens,
                new_tokens=new_tokens,
                rounds=rounds,
                threads=threads,
                progress=lambda line: status.update(escape(line)),
            )
        except bench_e2e.CheckFailed as error:
            _err().print(f"[bold red]error:[/] {escape(str(error))}; no speed is reported.", highlight=False)
            raise typer.Exit(1) from None
    _out().print(_e2e_table(result))
    if out is not None:
        bench_e2e.write(result, out)
        _wrote(_out(), out)


def _e2e_table(result: dict[str, Any]) -> Table:
    from vlmprune.flops import format_bytes

    machine = result["machine"]
    about = f"{machine['processor']}, {machine['threads']} threads, {result['dtype']}; medians, best in brackets"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=escape(about), caption_justify="left")
    for name in ("model", "side", "batch", "tokens"):
        table.add_column(name, no_wrap=True)
    for name in ("TTFT, ms", "over ideal", "floor, ms", "decode tok/s", "requests/s", "peak"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result["rows"]:
        over = row["over_ideal"]
        table.add_row(
            escape(row["model"]),
            escape(row["side"]),
            str(row["batch"]),
            str(row["prompt_tokens"]),
            f"{row['ttft_ms']:.1f} ({row['ttft_best_ms']:.1f})",
            "" if over is None else f"{over:.3f} ({row['over_ideal_best']:.3f})",
            f"{row['floor']['prefill_ms']:.1f}",
            f"{row['decode_tokens_per_second']:.1f}",
            f"{row['requests_per_second']:.2f}",
            format_bytes(row["peak_bytes"]),
        )
    return table


@app.command()
def methods() -> None:
    """List the pruning methods with their published settings."""
    from vlmprune import methods_table

    console = _out()

    def show(text: str, indent: int = 0) -> None:
        # A pipe gets whole lines, which tools can search.
        padded = Padding(text, (0, 0, 0, indent)) if console.is_terminal else " " * indent + text
        console.print(padded, highlight=False, soft_wrap=not console.is_terminal)

    for method in methods_table.methods():
        traits = (
            method.stage,
            "query-aware" if method.query_aware else "blind to the question",
            "trained" if method.trained else "training-free",
        )
        show(f"[bold]{escape(method.name)}[/]  [dim]{escape('; '.join(traits))}[/]")
        show(escape(method.summary), 4)
        show(f"[cyan]{escape(' '.join(method.settings))}[/]", 4)
        show(f"[dim]families: {escape(method.where)}; {escape(method.paper)}[/]", 4)
        console.print()
    for name, paper, why in methods_table.LEFT_OUT:
        show(f"[dim]left out: {escape(f'{name} ({paper}): {why}.')}[/]")


def _watch(
    watching: Stream, path: Path, question: str, fps: float | None, every: float | None, max_new_tokens: int
) -> None:
    """Show a stream a file frame by frame; ask as time passes, and at the end."""
    from vlmprune.video import iter_video

    console, notes, due = _out(), _err(), every
    with watching, notes.status("watching") as status:
        for seconds, frame in iter_video(path, fps=fps):
            while every is not None and due is not None and seconds >= due:
                if watching.report.frames:
                    line = f"{due:g} s: {watching.ask(question, max_new_tokens)}"
                    console.print(line, markup=False, highlight=False, soft_wrap=True)
                due += every
            watching.add(frame, seconds)
            status.update(escape(str(watching.report)))
        console.print(watching.ask(question, max_new_tokens), markup=False, highlight=False, soft_wrap=True)
        _note(f"{watching.pruner.name}: {watching.report}")


def _clips(
    paths: Sequence[Path],
    question: str,
    frames: int | None,
    fps: float | None,
    keep: str | None,
    roi: float | None,
    model: str | None,
) -> list[Clip]:
    """The videos, and of them what the question is about where that is asked for."""
    from vlmprune.ask import parse_keep
    from vlmprune.video import read_video

    if model is not None and keep is None and roi is None:
        raise ValueError("--clip chooses frames or regions: add --frame-keep or --roi.")
    clips = [read_video(path, frames, fps=fps) for path in paths]
    if not clips or (keep is None and roi is None):
        return clips
    from vlmprune.clip import ClipScorer
    from vlmprune.pruners import FreeVideoLLM

    chooser = FreeVideoLLM(keep=1.0 if keep is None else parse_keep(keep), roi=1.0 if roi is None else roi)
    scorer = ClipScorer.named(model)
    return [chooser.frames(clip, question, scorer) for clip in clips]


def _watched(path: Path, clip: Clip) -> str:
    times = [f"{seconds:.2f}" for seconds in clip.timestamps]
    shown = ", ".join(times if len(times) <= 16 else [*times[:8], "...", *times[-2:]])
    return f"{path.name}: {len(clip)} of {clip.total} frames, at {shown} s"


def _chat(model: str | None, device: str | None, dtype: Dtype | None = None, video: bool = False) -> Chat:
    import torch

    from vlmprune import bundled
    from vlmprune.ask import load_chat

    if model is None:
        torch.set_num_threads(1)  # for models as small as the bundled ones, threads cost more than they bring
        if video:
            model, dtype = str(bundled.video_model_path()), dtype or Dtype.float32
    return load_chat(model, device, dtype.value if dtype else None)


def _method(name: str, keep: str | None, positions: PositionPolicy | None, settings: list[str] | None) -> Pruner:
    from vlmprune.ask import parse_keep

    fields: dict[str, Any] = {} if keep is None else {"keep": parse_keep(keep)}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not (key and equals and value):
            raise ValueError(f"--set takes name=value, such as --set layer=2, got {setting!r}")
        try:
            fields[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            fields[key] = value
    if positions is not None:
        fields["positions"] = positions.value
    return vlmprune.create_pruner(name, **fields)


def _demo_table(rows: Sequence[Row], width: int) -> Table:
    report = rows[0].report
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("question", "truth", f"with all {report.tokens_before}", f"with {report.tokens_after}"):
        table.add_column(name, overflow="fold")
    shown = slice(0, 4) if width >= 120 else slice(0, 3) if width >= 90 else slice(1, 3)  # what a terminal has room for
    for name in ("visual\ntokens", "prefill\nMFLOPs", "first token\nms", "total\nms")[shown]:
        table.add_column(name, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        pairs: list[tuple[float, float]] = [
            (row.report.tokens_before, row.report.tokens_after),
            (row.report.flops_full / 1e6, row.report.flops_pruned / 1e6),
            (row.full.first_token_seconds * 1e3, row.pruned.first_token_seconds * 1e3),
            (row.full.total_seconds * 1e3, row.pruned.total_seconds * 1e3),
        ]
        table.add_row(
            escape(row.question.text),
            escape(row.question.answer),
            _mark(row.full.text, row.right(row.full)),
            _mark(row.pruned.text, row.right(row.pruned)),
            *(f"{before:.0f} → {after:.0f}" for before, after in pairs[shown]),
            end_section=i + 1 == len(rows) or rows[i + 1].scene is not row.scene,
        )
    return table


def _mark(answer: str, right: bool) -> str:
    return f"[green]✓\u00a0{escape(answer)}[/]" if right else f"[red]✗\u00a0{escape(answer or '(nothing)')}[/]"


def _demo_summary(rows: Sequence[Row], chat: Chat, repeats: int) -> str:
    from statistics import median

    from vlmprune.demo import right_answers

    full, pruned = right_answers(rows)
    reports = [row.report for row in rows]
    whole = [_share(report.flops_full, report.flops_pruned) for report in reports]
    decoder = [_share(*(flops.language_model for flops in report.flops)) for report in reports]
    cache = [_share(report.kv_bytes_full, report.kv_bytes_pruned) for report in reports]
    first = [median(getattr(row, side).first_token_seconds for row in rows) * 1e3 for side in ("full", "pruned")]
    slow = (
        " A model this small gains little time: fixed costs outweigh arithmetic." if first[1] > 0.9 * first[0] else ""
    )
    return (
        f"[bold]{full} of {len(rows)}[/] right with all visual tokens, [bold]{pruned} of {len(rows)}[/] with "
        f"{reports[0].tokens_after} of {reports[0].tokens_before}.\n"
        f"Prefill FLOPs {median(whole):.0f} % (decoder layers {median(decoder):.0f} %), "
        f"KV cache {median(cache):.0f} %, first token {first[0]:.1f} → {first[1]:.1f} ms.\n"
        f"[dim]{escape(chat.name)}, median of {repeats}; {escape(chat.settings)}.{slow}[/]"
    )


def _share(full: int, pruned: int) -> float:
    return 100 * pruned / full if full else 100.0


def _compare_table(full: Answer, pruned: Answer, method: Pruner) -> Table:
    from vlmprune.flops import format_bytes, format_flops

    report = pruned.report
    assert report is not None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", style="dim", no_wrap=True)
    table.add_column("all tokens", overflow="fold")
    table.add_column(f"{method.name}, keep={method.keep}", overflow="fold")
    table.add_column("", justify="right", no_wrap=True)
    same = full.text == pruned.text
    table.add_row(
        "answer",
        escape(full.text),
        escape(pruned.text),
        "[green]same[/]" if same else "[yellow]differs[/]",
        end_section=True,
    )

    def numbers(label: str, before: float, after: float, show: Any, faster: bool = False) -> None:
        change = f"{before / after:.2f}x" if faster else f"{100 * after / before:.1f} %" if before else ""
        table.add_row(label, show(before), show(after), change)

    def seconds(value: float) -> str:
        return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms"

    numbers("visual tokens", report.tokens_before, report.tokens_after, str)
    numbers("prefill", report.flops_full, report.flops_pruned, format_flops)
    numbers("KV cache", report.kv_bytes_full, report.kv_bytes_pruned, format_bytes)
    numbers("first token", full.first_token_seconds, pruned.first_token_seconds, seconds, faster=True)
    tokens = f"{full.new_tokens}" if full.new_tokens == pruned.new_tokens else f"{full.new_tokens}/{pruned.new_tokens}"
    numbers(f"total, {tokens} tokens", full.total_seconds, pruned.total_seconds, seconds, faster=True)
    table.add_row("  of it selection", "", seconds(report.selection_seconds), "")
    return table


def _write_overlay(
    path: Path,
    chat: Chat,
    inputs: Any,
    question: str,
    full: Answer | None,
    pruned: Answer,
    method: Pruner,
    clips: Sequence[Clip] = (),
) -> None:
    from vlmprune.overlay import MUTED, TEXT, Panel, Span, item_pictures, save_image, seen_pictures, sheet

    report = pruned.report
    assert report is not None
    items, panels = list(report.items), []
    for clip in clips:
        panels += _film(clip, items, chat)
    if items:
        seen = seen_pictures(inputs["pixel_values"], chat.processor.image_processor)
        seen = seen[len(seen) - sum(len(item.geometry.grids) for item in items) :]  # a model may put frames before
    for item in items:
        planes = len(item.geometry.grids)
        pictures, seen = seen[:planes], seen[planes:]
        note = ", amber: merged" if item.merged is not None and item.merged.any() else ""
        labels = (f"all {item.tokens_before} tokens", f"{item.tokens_after} tokens kept by {method.name}{note}")
        panels += [Panel(pair, labels) for pair in item_pictures(item, pictures, width=480)]
    lines: list[list[Span]] = [[("With all tokens: ", MUTED), (full.text, TEXT)]] if full is not None else []
    lines.append([(f"With {report.tokens_after} of {report.tokens_before} tokens: ", MUTED), (pruned.text, TEXT)])
    lines.append([(f"{chat.name}, {method.name}, keep={method.keep}, positions={method.positions}", MUTED)])
    save_image(sheet(panels, question, lines, columns=1 if len(panels) < 3 or clips else 2), path)


def _film(clip: Clip, items: list[ItemReport], chat: Chat) -> list[Panel]:
    """Strips of a clip's frames with their kept tokens; takes the clip's items off the front of `items`."""
    from vlmprune.overlay import cells, kept_last, strip

    known = getattr(chat.processor, "video_processor", None)
    own = [items.pop(0) for _ in range(1 if known is not None else len(clip))]
    grids = [grid for item in own for grid in cells(item.geometry, *kept_last(item))]
    tool = known or chat.processor.image_processor
    # Several frames may share a grid: shown is the first of them.
    each = -(-len(clip) // len(grids))
    first = [min(plane * each, len(clip) - 1) for plane in range(len(grids))]
    pictures = [_cropped(clip.images[at], tool) for at in first]
    labels = [f"{clip.timestamps[at]:.2f} s: {(grid > 0).sum()} of {grid.size}" for at, grid in zip(first, grids)]
    return strip(grids, pictures, labels)


def _cropped(picture: Image, tool: Any) -> Image:
    """What of a frame the model sees: its middle square where the processor crops."""
    if not getattr(tool, "do_center_crop", False):
        return picture
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def _wrote(console: Console, path: Path) -> None:
    console.print(f"wrote [bold]{escape(str(path))}[/]", highlight=False, soft_wrap=True)


def _note(text: str) -> None:
    """An aside, on standard error."""
    _err().print(f"[dim]{escape(text)}[/]", highlight=False, soft_wrap=True)


def _out() -> Console:
    return _console(sys.stdout)


def _err() -> Console:
    return _console(sys.stderr)


def _console(stream: Any) -> Console:
    # Tables in a log file or a pipe are not squeezed into the 80 columns that such a stream claims to have.
    wide = None if stream.isatty() or "COLUMNS" in os.environ else 132
    return Console(file=stream, width=wide)

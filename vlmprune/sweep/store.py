"""Files of a sweep: appended line by line, readable and right whatever moment the process is killed at."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlmprune.overlay import atomic

RESULTS, TIMINGS, SWEEP = "results.jsonl", "timings.jsonl", "sweep.json"


def dump(record: Any) -> str:
    return json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def append(path: Path, record: Any) -> None:
    """Add one line and wait until the disk has it."""
    new = not path.exists()
    with path.open("ab") as file:
        file.write(dump(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    if new:
        _sync_folder(path.parent)


def read(path: Path) -> list[Any]:
    """All whole lines of a file that `append` wrote; none if it does not exist.

    Raises:
        ValueError: a line in its midst is damaged.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what stands behind the last line's end is torn
    try:
        return [json.loads(line) for line in lines]
    except ValueError:
        raise ValueError(f"'{path}' is damaged: a line in it is no JSON; take it away or use another folder.") from None


def repair(path: Path) -> None:
    """Cut off the line that a killed process left torn."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
            file.flush()
            os.fsync(file.fileno())


def tidy(folder: Path) -> None:
    """Remove the half-written files that a killed process left behind."""
    for path in folder.rglob(".*.part"):
        path.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """A JSON file that is there whole or not at all."""
    with atomic(path) as part:
        _write(part, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"'{path}' is damaged: it is no JSON; take it away or use another folder.") from None


def write_lines(path: Path, records: Iterable[Any]) -> None:
    """A gzipped JSONL file, there whole or not at all, with the same bytes for the same records."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", fileobj=buffer, mode="wb", mtime=0) as file:
        for record in records:
            file.write(dump(record).encode() + b"\n")
    with atomic(path) as part:
        _write(part, buffer.getvalue())


def read_lines(path: Path) -> list[Any]:
    """What `write_lines` wrote."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Sixteen frames from a ten-minute clip against decoding all of it, with every backend.

    python benchmarks/video.py [--minutes 10] [--repeats 5] [--out benchmarks/results/video-cpu.json]

The clip is synthetic: 192 x 108 pixels, 25 frames a second, H.264 with a key frame every 250 frames or less. Sixteen
frames at equal distances are read by `read_video` (opening and listing the packets included), and all of them. Every
backend must give the same pictures first; otherwise nothing is timed. CPU seconds are those of this process and of the
child that runs decord; on a machine with other work they say more than wall seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import av
import numpy as np
from rich.console import Console
from rich.table import Table

from vlmprune import video
from vlmprune.kernels.bench import processor_name
from vlmprune.video import available, read_video

HEIGHT, WIDTH, FPS, WANTED = 108, 192, 25, 16


def film(path: Path, seconds: float) -> None:
    """A texture that drifts, with a cut every 23 seconds."""
    random = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"preset": "veryfast", "crf": "23", "threads": "1"}
        texture = np.zeros(0)
        for number in range(round(seconds * FPS)):
            if number % (23 * FPS) == 0:
                coarse = random.integers(0, 256, (HEIGHT // 6, WIDTH // 6, 3), np.uint8)
                texture = np.kron(coarse, np.ones((6, 6, 1), np.uint8))
            frame = av.VideoFrame.from_ndarray(np.roll(texture, number, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def least(path: Path) -> int:
    """Frames that have to be decoded for the sixteen: each from the key frame before it."""
    track = video._Track.of(path, time.monotonic() + 600)
    wanted = (np.arange(WANTED) * len(track.times) // WANTED).tolist()
    needed: set[int] = set()
    for number in wanted:
        needed |= set(range(track.key(number), number + 1))
    return len(needed)


def child_cpu() -> float:
    """CPU seconds so far of the child that runs decord."""
    child = video._DECORD._process
    stat = Path(f"/proc/{child.pid}/stat") if child else None
    if stat is None or not stat.exists():
        return 0.0
    fields = stat.read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def timed(job: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median wall and CPU seconds after an untimed run."""
    job()
    wall, cpu = [], []
    for _ in range(repeats):
        clock, used = time.perf_counter(), time.process_time() + child_cpu()
        job()
        wall.append(time.perf_counter() - clock)
        cpu.append(time.process_time() + child_cpu() - used)
    return round(statistics.median(wall), 4), round(statistics.median(cpu), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "video-cpu.json")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        film(path, 60 * arguments.minutes)
        total, must, size = round(60 * arguments.minutes * FPS), least(path), path.stat().st_size
        reference = read_video(path, WANTED, backend="pyav")
        for backend in available():
            try:
                clip = read_video(path, WANTED, backend=backend)
            except ImportError as error:
                print(error)
                continue
            off = int(np.abs(clip.frames.astype(int) - reference.frames).max())
            if off > 3:
                raise SystemExit(f"{backend} gives other pictures (off by {off}): nothing is timed.")
            few = timed(lambda name=backend: read_video(path, WANTED, backend=name), arguments.repeats)
            every = timed(lambda name=backend: read_video(path, total, backend=name, timeout=1200), 1)
            rows.append(
                {
                    "backend": backend,
                    "decoded": clip.decoded,
                    "few_wall_s": few[0],
                    "few_cpu_s": few[1],
                    "all_wall_s": every[0],
                    "all_cpu_s": every[1],
                }
            )
        listing = timed(lambda: video._Track.of(path, time.monotonic() + 600), arguments.repeats)
    packages = {"pyav": "av", "decord": "decord", "torchcodec": "torchcodec"}
    result = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": {
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "load_average": round(os.getloadavg()[0], 1),
            "versions": {row["backend"]: version(packages[row["backend"]]) for row in rows},
        },
        "clip": {"frames": total, "width": WIDTH, "height": HEIGHT, "fps": FPS, "codec": "h264", "bytes": size},
        "wanted": WANTED,
        "must_decode": must,
        "listing_packets_wall_s": listing[0],
        "listing_packets_cpu_s": listing[1],
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    table = Table("backend", "decoded", f"{WANTED} frames, CPU s", f"all {total}, CPU s", "ratio")
    for row in rows:
        ratio = row["all_cpu_s"] / row["few_cpu_s"]
        table.add_row(
            row["backend"],
            str(row["decoded"] or ""),
            *(str(row[k]) for k in ("few_cpu_s", "all_cpu_s")),
            f"{ratio:.0f}x",
        )
    Console().print(table, f"at least {must} of {total} frames have to be decoded", sep="\n")


if __name__ == "__main__":
    main()

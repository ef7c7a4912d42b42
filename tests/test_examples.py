"""The examples run as printed."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from vlmprune import bundled, registry
from vlmprune.pruners.gsearch import Schedule

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_ask_image(monkeypatch, capsys, tmp_path) -> None:
    scene = bundled.demo_scenes()[0]
    scene.image.save(tmp_path / "scene.png")
    question = next(q for q in scene.questions if q.kind == "count")
    monkeypatch.setattr(sys, "argv", ["ask_image.py", str(tmp_path / "scene.png"), question.text, "--keep", "0.5"])
    runpy.run_path(str(EXAMPLES / "ask_image.py"), run_name="__main__")
    answer, report = capsys.readouterr().out.splitlines()
    assert answer == question.answer
    assert report.startswith("144 -> 72 visual tokens")


def test_ask_video(monkeypatch, capsys, tmp_path) -> None:
    pytest.importorskip("av")
    pytest.importorskip("open_clip")
    from videos import write

    film = write(tmp_path / "film.mp4", frames=12, fps=4)
    arguments = ["ask_video.py", str(film), "How many digits are there?", "--frames", "6", "--frame-keep", "4"]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(EXAMPLES / "ask_video.py"), run_name="__main__")
    times, answer, report = capsys.readouterr().out.splitlines()
    assert times.startswith("frames at ")
    assert times.count(",") == 3
    assert answer
    assert "visual tokens" in report


def test_stream_video(monkeypatch, capsys, tmp_path) -> None:
    pytest.importorskip("av")
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    from videos import write

    film = write(tmp_path / "film.mp4", frames=12, fps=4)
    for given in ([], [str(film), "How many digits are there?", "--fps", "2", "--every", "2"]):
        monkeypatch.setattr(sys, "argv", ["stream_video.py", *given])
        runpy.run_path(str(EXAMPLES / "stream_video.py"), run_name="__main__")
        *answers, report = capsys.readouterr().out.splitlines()
        assert [line.split(" s: ")[0] for line in answers] == (["0.50", "1.50", "2.50"] if given else ["0.29", "0.62"])
        assert all(line.split(": ")[1] for line in answers)
        assert ("6 frames" if given else "16 frames") in report
        assert ("holds 45 of 45" if given else "holds 72 of 144") in report


def test_own_method(capsys) -> None:
    try:
        runpy.run_path(str(EXAMPLES / "own_method.py"), run_name="__main__")
    finally:
        registry._registered.pop("outliers", None)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(bundled.demo_scenes()[0].questions)
    assert all("144 -> 36 visual tokens" in line for line in lines)


def test_search_schedule(monkeypatch, capsys, tmp_path) -> None:
    out = tmp_path / "schedule.json"
    arguments = ["search_schedule.py", "--scenes", "1", "--step", "0.5", "--tolerance", "0.2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(EXAMPLES / "search_schedule.py"), run_name="__main__")
    evaluations, _, report = capsys.readouterr().out.splitlines()
    assert int(evaluations.split()[0]) <= 4
    ratios = Schedule.load(out).ratios
    assert len(ratios) == 4
    assert ratios[0] == 1 > ratios[-1]
    assert report.startswith("144 -> 72 visual tokens")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_every_example_is_run_here(path: Path) -> None:
    tests = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    assert any(f"def test_{path.stem}(" in each or f'"{path.name}"' in each for each in tests)

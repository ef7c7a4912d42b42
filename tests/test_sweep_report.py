"""`vlmprune report`: the files it writes, and the page as a real browser shows it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vlmprune.cli import app
from vlmprune.sweep import plots, store
from vlmprune.sweep.plan import UNPRUNED
from vlmprune.sweep.series import Point, pareto, read_sweep, short_names, standing

pytest.importorskip("matplotlib")

SWEEP = """
data: {source: digits, scenes: 5, seed: 3}
methods: [divprune, {name: fastv, layer: 1}]
keeps: [0.25, 0.1]
seeds: [0, 1]
batch_size: 32
timing: {questions: 3, new_tokens: 4, batches: 1}
"""


def call(*args: object):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    (folder / "sweep.yaml").write_text(SWEEP)
    result = call("sweep", folder / "sweep.yaml", "--out", folder / "results")
    assert result.exit_code == 0, result.output
    return folder / "results"


@pytest.fixture(scope="module")
def page(results) -> Path:
    result = call("report", results)
    assert result.exit_code == 0, result.output
    return results / "index.html"


def test_files(page):
    folder = page.parent
    for name in ("bundled-flops.png", "bundled-latency.png", "bundled-methods.png"):
        picture = np.asarray(Image.open(folder / name).convert("RGB"))
        assert (picture != 255).any(axis=-1).mean() > 0.01
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    text = page.read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:|#|[\w.-]+\.png\")", text)  # nothing from elsewhere
    assert "@import" not in text
    assert str(folder) not in text  # nor where it was made
    table = (folder / "accuracy.md").read_text()
    assert table.count("| divprune |") == 2
    assert "- fastv, keep 0.1, original: fastv cannot keep 0.1" in table


def test_numbers_are_those_of_the_rows(results, page):
    rows = {(row["method"], row["keep"]): row for row in store.read(results / store.RESULTS)}
    row = rows["divprune", 0.25]
    low, high = (100 * end for end in row["ci"])
    line = next(line for line in (results / "accuracy.md").read_text().splitlines() if "| divprune | 0.25 |" in line)
    assert f"**{100 * row['accuracy']:.1f}** [{low:.1f} – {high:.1f}]" in line
    assert f"{100 * row['flops']['ratio']:.1f} %" in line
    assert row["selection"]["ratio"] > 0
    assert f"| {100 * row['selection']['ratio']:.2f} % |" in line


def test_rows_of_before_selection_was_counted(results, tmp_path):
    """They say so, and are not taken to cost nothing."""
    shutil.copytree(results, tmp_path / "old")
    old = [
        {key: value for key, value in row.items() if key != "selection"} for row in store.read(results / store.RESULTS)
    ]
    (tmp_path / "old" / store.RESULTS).write_text("".join(store.dump(row) + "\n" for row in old))
    assert call("report", tmp_path / "old").exit_code == 0
    table = (tmp_path / "old" / "accuracy.md").read_text()
    assert table.count("| not counted |") == sum(row["status"] == "ok" for row in old) - 1 - 2  # unpruned; two seeds


def test_seeds_are_averaged(results):
    sweep = read_sweep(results)
    draws = [row for row in sweep.rows if row["method"] == "random" and row["keep"] == 0.1]
    (point,) = [p for p in sweep.points("bundled") if p.setting.method == "random" and p.setting.keep == 0.1]
    assert [row["seed"] for row in draws] == [0, 1]
    assert point.accuracy == pytest.approx(sum(row["accuracy"] for row in draws) / 2)


def test_pareto_front():
    def point(cost: float, accuracy: float) -> Point:
        return Point(({"accuracy": accuracy, "cost": cost},), None)

    points = [point(3, 0.9), point(1, 0.5), point(2, 0.4), point(2, 0.8), point(4, 0.9), point(1, 0.6)]
    front = pareto(points, lambda p: p.mean("cost"))
    assert [(p.mean("cost"), p.accuracy) for p in front] == [(1, 0.6), (2, 0.8), (3, 0.9)]
    assert pareto(points, lambda p: None) == []


def made(method: str, keep, accuracy: float, kept: float = 36.0, full: float = 144.0) -> Point:
    share = 0.45 + 0.55 * kept / full
    setting = {"model": "m", "method": method, "settings": {}, "keep": keep, "positions": "original", "seed": None}
    tokens = {"full": full, "average": kept}
    return Point(
        ({**setting, "accuracy": accuracy, "questions": 200, "tokens": tokens, "flops": {"ratio": share}},), None
    )


@pytest.mark.parametrize(
    ("keep", "kept", "missed"),
    [
        (0.25, 36.0, False),
        (0.125, 36.0, True),
        (0.25, 24.5, True),
        (0.01, 1.9, False),
        (36, 36.0, False),
        (9, 36.0, True),
        (500, 144.0, False),
        ("flops:0.3", 36.0, False),
    ],
)
def test_a_budget_that_was_not_met_is_told(keep, kept, missed):
    assert made("yopo", keep, 0.8, kept).missed == missed


def test_a_budget_that_cannot_be_kept_to_is_no_merit():
    """Of a method that reaches only what is easy, or keeps more than it should, random's accuracy counts."""
    points = [made("random", 0.5, 0.6, 72.0), made("random", 0.1, 0.2, 14.4), made(UNPRUNED, 1.0, 1.0, 144.0)]
    points += [made("divprune", 0.5, 0.9, 72.0), made("divprune", 0.1, 0.8, 14.4), made("fastv", 0.5, 0.95, 72.0)]
    points += [made("yopo", 0.5, 0.7, 72.0), made("yopo", 0.1, 0.7, 72.0), made("pool", 0.5, 0.5, 72.0)]
    points += [made("pool", 0.1, 0.3, 4.0)]  # with less than it might
    rank = standing(points)
    assert rank == pytest.approx({"random": 0.4, "divprune": 0.85, "fastv": 0.575, "yopo": 0.45, "pool": 0.4})


def test_names_are_short_unless_they_would_be_the_same():
    labels = [
        "atp (weights=runs/a/best)",
        "atp (weights=runs/b/best, keep=2)",
        "q (weights=x/y/best)",
        "q (weights=z/best)",
    ]
    short = short_names(labels)
    assert list(short.values()) == ["atp (weights=best)", "atp (weights=best, keep=2)", *labels[2:]]


def test_the_best_are_drawn_larger():
    far = [made(UNPRUNED, 1.0, 0.98, 144.0)]
    for method, accuracies in (("divprune", (0.93, 0.97)), ("mmtok", (0.90, 0.97)), ("random", (0.3, 0.6))):
        far += [made(method, keep, got, 144 * keep) for keep, got in zip((0.1, 0.5), accuracies)]
    whole, near = plots.curve(far, plots.flops_cost, "cost", "title", "exact_match").axes
    for point in far:
        low, high = (100 * end for end in point.interval)
        assert whole.get_ylim()[0] < low < high < whole.get_ylim()[1]
        assert whole.get_xlim()[0] < plots.flops_cost(point) < whole.get_xlim()[1]
    assert near.get_ylim()[0] == pytest.approx(98 - 15)
    assert near.get_xlim()[1] < 100  # the unpruned model is not in it
    close = [point for point in far if point.setting.method != "random"]
    assert len(plots.curve(close, plots.flops_cost, "cost", "title", "exact_match").axes) == 1


def test_a_sweep_on_its_way_has_a_report(results, tmp_path):
    """Two rows, no timings, a torn line: as a kill leaves it."""
    lines = (results / store.RESULTS).read_bytes().splitlines(keepends=True)
    shutil.copy(results / store.SWEEP, tmp_path)
    (tmp_path / store.RESULTS).write_bytes(b"".join(lines[:2]) + lines[2][:30])
    result = call("report", tmp_path)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "bundled-flops.png").exists()
    assert not (tmp_path / "bundled-latency.png").exists()


def test_timings_of_another_machine_are_not_mixed_in(results, tmp_path):
    folder = shutil.copytree(results, tmp_path / "results")
    timings = store.read(folder / store.TIMINGS)
    other = {**timings[0], "settings": "eager, float32, cpu (64 threads)"}
    (folder / store.TIMINGS).write_text("".join(store.dump(t) + "\n" for t in [other, *timings[1:]]))
    sweep = read_sweep(folder)
    assert timings[0]["id"] not in sweep.timings
    assert len(sweep.timings) == len(timings) - 1
    assert call("report", folder).exit_code == 0
    assert "Timings of 2 machines or settings do not compare" in (folder / "index.html").read_text()


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda folder: None, "holds no sweep"),
        (lambda folder: (folder / store.SWEEP).write_text("{}"), "holds no finished row yet"),
        (lambda folder: (folder / store.SWEEP).write_text("{") and _one_row(folder), "is damaged"),
    ],
)
def test_no_sweep_is_one_sentence(tmp_path, prepare, said):
    prepare(tmp_path)
    result = call("report", tmp_path)
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def _one_row(folder: Path) -> None:
    store.append(folder / store.RESULTS, {"status": "ok"})


# In a browser

CHROME = os.environ.get("CHROME") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
PROBE = """
<script>
const errors = [];
addEventListener("error", event => errors.push(event.message));
addEventListener("load", () => {
  const look = image => {
    const canvas = document.createElement("canvas"), colours = new Set();
    canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
    let ink = 0;
    for (let i = 0; i < pixels.length; i += 4) {
      ink += pixels[i] < 250 || pixels[i + 1] < 250 || pixels[i + 2] < 250;
      colours.add(pixels[i] << 16 | pixels[i + 1] << 8 | pixels[i + 2]);
    }
    const box = image.getBoundingClientRect();
    return {id: image.id, alt: image.alt, ink: ink / (pixels.length / 4), colours: colours.size,
            box: [box.x, box.y + scrollY, box.width, box.height]};
  };
  const table = document.getElementById("bundled-table");
  const column = [...table.tHead.rows[0].cells].findIndex(cell => cell.textContent.trim() === "accuracy");
  const order = () => [...table.tBodies[0].rows].map(row => row.cells[column].textContent);
  const button = table.tHead.rows[0].cells[column].querySelector("button");
  button.click(); const down = order();
  button.click(); const up = order();
  const found = {images: [...document.images].map(look), down, up, errors,
                 wide: document.documentElement.scrollWidth - document.documentElement.clientWidth};
  const out = document.createElement("pre");
  out.id = "probe"; out.textContent = JSON.stringify(found);
  out.style.display = "none";
  document.body.append(out);
});
</script>
"""


def browse(page: Path, tmp_path: Path, *options: str) -> str:
    command = [str(CHROME), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-extensions"]
    command += ["--disable-background-networking", "--disable-sync", "--no-first-run"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout


@pytest.mark.skipif(CHROME is None, reason="no browser: install chromium, or set CHROME to one")
@pytest.mark.parametrize("width", [1280, 520])
def test_in_a_browser(page, tmp_path, width):
    probed = tmp_path / "index.html"
    probed.write_text(page.read_text().replace("<head>", "<head>" + PROBE))
    dom = browse(probed, tmp_path, f"--window-size={width},900", "--dump-dom")
    found = json.loads(re.search(r'<pre id="probe"[^>]*>(.*?)</pre>', dom, re.S).group(1).replace("&amp;", "&"))
    assert found["errors"] == []
    assert found["wide"] <= 0  # no sideways scrolling of the page, at any width
    curves = {image["id"]: image for image in found["images"] if image["id"]}
    assert set(curves) == {"bundled-flops", "bundled-latency", "bundled-methods"}
    for image in curves.values():
        assert image["ink"] > 0.01
        assert image["colours"] > 50
        assert image["box"][2] > 0.7 * width
    overlays = [image for image in found["images"] if image["alt"].startswith("what ")]
    assert len(overlays) >= 2
    assert min(image["colours"] for image in overlays) > 10  # even over a plain background
    accuracies = sorted(map(float, found["up"]))
    assert list(map(float, found["up"])) == accuracies
    assert list(map(float, found["down"])) == accuracies[::-1]


@pytest.mark.skipif(CHROME is None, reason="no browser: install chromium, or set CHROME to one")
def test_the_curve_is_on_the_screen(page, tmp_path):
    """Pixels of a screenshot: the first curve shows its lines in colour where the page puts it."""
    shot = tmp_path / "shot.png"
    browse(page, tmp_path, "--window-size=1280,900", f"--screenshot={shot}")
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)[220:860, 60:1220]
    colourful = pixels.max(axis=-1) - pixels.min(axis=-1) > 60
    dark = pixels.max(axis=-1) < 90
    assert colourful.mean() > 0.0005
    assert dark.mean() > 0.002

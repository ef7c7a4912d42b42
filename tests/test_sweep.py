"""`vlmprune sweep` as its user meets it: in process, killed, interrupted and spread over processes."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import vlmprune
from vlmprune import bundled, registry
from vlmprune.ask import load_chat, prompt_inputs
from vlmprune.cli import app
from vlmprune.clip import ClipScorer
from vlmprune.contract import Pruner, Selection
from vlmprune.sweep import metrics, store
from vlmprune.sweep import run as job
from vlmprune.sweep.config import DataConfig, load_config
from vlmprune.sweep.data import load_data
from vlmprune.sweep.evaluate import generate
from vlmprune.sweep.plan import UNPRUNED, settings_of

QUICK = ("--keep", "0.25", "--limit", "20", "--batch-size", "8", "--no-timing")


def call(*args: object):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def rows(folder: Path) -> dict[str, dict]:
    return {row["method"]: row for row in store.read(folder / store.RESULTS)}


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """The demo's scenes as a JSONL file with their pictures beside it."""
    folder = tmp_path_factory.mktemp("digits")
    with (folder / "digits.jsonl").open("w") as file:
        for number, scene in enumerate(bundled.demo_scenes()):
            scene.image.save(folder / f"{number}.png")
            for question in scene.questions:
                record = {"image": f"{number}.png", "question": question.text, "answer": question.answer}
                file.write(json.dumps({**record, "kind": question.kind}) + "\n")
    return folder / "digits.jsonl"


@pytest.fixture(scope="module")
def done(digits, tmp_path_factory) -> Path:
    """The folder of an undisturbed sweep."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    result = call("sweep", "--data", digits, *QUICK, "--out", out)
    assert result.exit_code == 0, result.output
    return out


def same_files(one: Path, other: Path) -> None:
    """Results, replies and pictures are the same, byte for byte."""
    paths = [sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file()) for folder in (one, other)]
    assert paths[0] == paths[1]
    for path in paths[0]:
        assert (one / path).read_bytes() == (other / path).read_bytes(), path


# Metrics


@pytest.mark.parametrize(
    ("metric", "reply", "answers", "score"),
    [
        ("exact_match", " Top-Left. ", ["top-left"], 1),
        ("exact_match", "the top-left", ["top-left"], 0),
        ("exact_match", "b", ["a", "B"], 1),
        # Ten annotators: min(n / 3, 1) over the ten ways to leave one out.
        ("vqa_accuracy", "two", ["2"] * 10, 1),
        ("vqa_accuracy", "a red car", ["red car"] * 3 + ["car"] * 7, (3 * 2 / 3 + 7) / 10),
        ("vqa_accuracy", "Red car!", ["red car"] * 2 + ["car"] * 8, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ("vqa_accuracy", "car", ["red car"] + ["blue"] * 9, 0),
        ("vqa_accuracy", "1,000.", ["1000"], 1),
        ("vqa_accuracy", "2.5", ["25"], 0),
        ("anls", "Hello World", ["hello  world"], 1),
        ("anls", "hella world", ["hello world", "x"], 1 - 1 / 11),
        ("anls", "abcd", ["abxy"], 0),  # half of it is wrong: at the threshold
        ("anls", "", ["a"], 0),
        ("multiple_choice", "B", ["B"], 1),
        ("multiple_choice", "(b)", ["B"], 1),
        ("multiple_choice", "B. a dog", ["B"], 1),
        ("multiple_choice", "The answer is C.", ["C"], 1),
        ("multiple_choice", "A dog is in the picture, so (D)", ["D"], 1),
        ("multiple_choice", "A dog", ["A"], 0),
        ("multiple_choice", "a dog", ["C", "A dog"], 1),
        ("multiple_choice", "I do not know", ["I"], 0),
        ("multiple_choice", "Because of that: D", ["B"], 0),
        ("relaxed_numeric", "105", ["100"], 1),
        ("relaxed_numeric", "105.1", ["100"], 0),
        ("relaxed_numeric", "12 %", ["12.4%"], 1),
        ("relaxed_numeric", "1,030", ["1000"], 1),
        ("relaxed_numeric", "0.001", ["0"], 0),
        ("relaxed_numeric", "Yes", ["yes"], 1),
        ("relaxed_numeric", "nan", ["nan"], 1),
    ],
)
def test_metrics(metric, reply, answers, score):
    assert metrics.METRICS[metric](reply, answers) == pytest.approx(score)


def test_vqa_accuracy_is_the_mean_over_subsets():
    answers = ["red"] * 4 + ["blue"] * 2 + ["green"] * 4
    for reply in ("red", "blue", "green", "black"):
        subsets = [answers[:i] + answers[i + 1 :] for i in range(len(answers))]
        expected = sum(min(subset.count(reply) / 3, 1) for subset in subsets) / len(subsets)
        assert metrics.vqa_accuracy(reply, answers) == pytest.approx(expected)


def test_intervals():
    # Wilson (1927) as in Newcombe (1998), table I: 81 of 263, and 0 of 20.
    assert metrics.wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert metrics.wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    mean, (low, high) = metrics.paired_difference([1, 1, 0, 0], [1, 0, 0, 0])
    assert mean == 0.25
    assert (low, high) == pytest.approx((0.25 - 1.96 * 0.25, 0.25 + 1.96 * 0.25), abs=1e-4)


# What a user writes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("metods: [divprune]", "unknown key 'metods': did you mean 'methods'?"),
        ("data: {sorce: digits}", "unknown key 'sorce' in data: did you mean 'source'?"),
        ("models: [{path: bundled, atention: eager}]", "unknown key 'atention' in models.0: did you mean 'attention'?"),
        ("timing: {question: 3}", "unknown key 'question' in timing: did you mean 'questions'?"),
        ("metric: exact_mach", "metric: unknown metric 'exact_mach': did you mean 'exact_match'?"),
        ("data: {columns: {qestion: q}}", "unknown field 'qestion' in columns, which are field: column: did you mean"),
        ("batch_size: 0", "batch_size: input should be greater than or equal to 1, got 0."),
        ("batch_size: many", "batch_size: input should be a valid integer"),
        ("keeps: [1.5]", "keep must be a float in (0, 1]"),
        ("keeps: [half]", "'half'"),
        ("keeps: []", "keeps: list should have at least 1 item"),
        ("methods: [divprun]", "unknown pruner 'divprun': did you mean 'divprune'"),
        ("methods: [{name: fastv, layr: 1}]", "pruner 'fastv' has no field 'layr'"),
        ("methods: [{name: fastv, keep: 0.1}]", "keep is set for all methods, by 'keeps'"),
        ("methods: ['fastv:layer']", "fastv:layer=1"),
        ("data: {prompt: Answer.}", "prompt must hold {question}"),
        ("models: [bundled, bundled]", "models need different names"),
        ("- a list", "must be a mapping"),
        ("a: [", "is no YAML"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, text, said):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    result = call("sweep", path, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_flags_go_before_the_file(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text("keeps: [0.5, 64]\ndata: {source: digits, scenes: 3}\nmethods: [fastv]\n")
    config = load_config(path, {"data": {"limit": 2}, "methods": ["fastv:layer=1", "divprune"]})
    assert config.data.scenes == 3
    assert config.data.limit == 2
    assert config.keeps == [0.5, 64]
    plan = settings_of(config)
    assert [s.method for s in plan[:3]] == [UNPRUNED, "random", "random"]
    assert {s.method for s in plan} == {UNPRUNED, "random", "uniform", "pool", "fastv", "divprune"}
    assert {s.settings.get("layer") for s in plan if s.method == "fastv"} == {1}
    assert len({s.id for s in plan}) == len(plan)


def test_all_methods_and_seeds(tmp_path):
    config = load_config(None, {"methods": ["all", "fastv:layer=1"], "seeds": [0, 1], "positions": ["own", "original"]})
    plan = settings_of(config)
    assert {s.method for s in plan} == {UNPRUNED, *vlmprune.list_pruners(), *registry.frame_selectors()}
    assert {s.seed for s in plan if s.method == "random"} == {0, 1}
    assert {s.seed for s in plan if s.method == "uniform"} == {None}
    assert {s.positions for s in plan if s.method == "divprune"} == {"compact", "original"}
    draws = [s.pruner(batch).seed for s in plan if s.method == "random" for batch in (0, 1)]
    assert len(set(draws)) == 4


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such data file: "),
        ("", "holds no samples"),
        ('{"image": "0.png", "question": "q?", "answer": {"a": 1}}', "line 1: answer must be text, a number or a list"),
        ('{"image": "0.png", "question": "q?", "answer": true}', "got true/false"),
        ('{"image": "0.png", "question": "q?"}', "line 1: answer is missing"),
        ('{"image": "0.png", "question": 3, "answer": "a"}', "line 1: question is a number: it must be text"),
        ('{"image": "x.png", "question": "q?", "answer": "a"}', "line 1: no such image: 'x.png'"),
        ('{"image": 3, "question": "q?", "answer": "a"}', "an image must be a path or an encoded picture"),
        ('{"video": "x.mp4", "question": "q?", "answer": "a"}', "no such video: 'x.mp4'"),
        ('["q"]', "line 1: is no record of named fields but a list"),
        ("{", "line 1: is no JSON"),
        ('{"image": "torn.png", "question": "q?", "answer": "a"}', "torn.png' cannot be read as an image"),
    ],
)
def test_bad_data_is_one_sentence(tmp_path, digits, content, said):
    shutil.copy(digits.parent / "0.png", tmp_path)
    (tmp_path / "torn.png").write_bytes((tmp_path / "0.png").read_bytes()[:300])
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_text(content)
    result = call("sweep", "--data", path, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("model", ["nowhere/at/all", "."])
def test_a_bad_model_is_one_sentence(tmp_path, digits, model):
    result = call("sweep", "--model", model, "--data", digits, *QUICK, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "error:" in result.stderr
    assert "Traceback" not in result.stderr


def test_data_may_be_mended_before_the_first_row(digits, tmp_path):
    """A folder without a row belongs to no sweep yet; unreadable samples at the head of a data set are not the end."""
    shutil.copy(digits.parent / "0.png", tmp_path)
    (tmp_path / "torn.png").write_bytes((tmp_path / "0.png").read_bytes()[:300])
    path, first = tmp_path / "data.jsonl", json.loads(digits.read_text().splitlines()[0])
    torn = [json.dumps({**first, "image": "torn.png", "id": str(number)}) for number in range(9)]
    path.write_text("\n".join(torn))
    assert call("sweep", "--data", path, *QUICK, "--out", tmp_path / "out").exit_code == 2
    path.write_text("\n".join([*torn, json.dumps({**first, "id": "good"})]))
    result = call("sweep", "--data", path, *QUICK, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert {(row["questions"], row["unusable"]) for row in rows(tmp_path / "out").values()} == {(1, 9)}


def test_garbage_is_no_parquet(tmp_path):
    (tmp_path / "data.parquet").write_text("PAR1 but nothing else")
    result = call("sweep", "--data", tmp_path / "data.parquet", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "data.parquet' cannot be read as Parquet" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


# Data


def test_every_source_gives_the_same_samples(tmp_path, digits):
    datasets = pytest.importorskip("datasets")
    records = [json.loads(line) for line in digits.read_text().splitlines()]
    for record in records:
        shutil.copy(digits.parent / record["image"], tmp_path)
    with (tmp_path / "digits.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, records[0])
        table.writeheader()
        table.writerows(records)
    pictures = [str(digits.parent / record["image"]) for record in records]
    table = datasets.Dataset.from_list(records).remove_columns("image").add_column("image", pictures)
    table = table.cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "digits.parquet")
    datasets.DatasetDict(test=table).save_to_disk(tmp_path / "saved")
    wanted = load_data(DataConfig(source=str(digits)))
    for name in ("digits.csv", "digits.parquet", "saved"):
        found = load_data(DataConfig(source=str(tmp_path / name)))
        assert not found.bad
        for mine, theirs in zip(found.samples, wanted.samples, strict=True):
            assert (mine.question, mine.answers, mine.kind) == (theirs.question, theirs.answers, theirs.kind)
            assert mine.images[0]().tobytes() == theirs.images[0]().tobytes()


def test_columns_choices_and_lists(tmp_path, digits):
    shutil.copy(digits.parent / "0.png", tmp_path)
    path = tmp_path / "data.jsonl"
    path.write_text(
        json.dumps({"q": "Which?", "image": "0.png", "choices": ["a cat", "a dog"], "answer": "a dog"})
        + "\n\n"
        + json.dumps({"q": "How many?", "images": ["0.png", "0.png"], "answers": [3, "three"], "id": "second"})
    )
    first, second = load_data(DataConfig(source=str(path), columns={"question": "q"})).samples
    assert first.question == "Which?\nA. a cat\nB. a dog"
    assert first.answers == ("B", "a dog")
    assert (second.id, second.answers, len(second.images)) == ("second", ("3", "three"), 2)


def test_videos(tmp_path, digits):
    shutil.copy(digits.parent / "0.png", tmp_path)
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"question": "When?", "video": ["0.png"] * 3, "answer": "now"}))
    (sample,) = load_data(DataConfig(source=str(path))).samples
    assert sample.frames == 3
    assert sample.video().frames.shape == (3, 96, 96, 3)
    clips = load_data(DataConfig(source="digit-clips", scenes=2, frames=8)).samples
    assert {sample.frames for sample in clips} == {8}
    assert len(clips[0].video()) == 8


# A run


def test_rows_say_what_the_model_did(done, digits):
    """One row against a loop that shares no code with the sweep, one question at a time."""
    row = rows(done)["divprune"]
    model, processor = bundled.load()
    records = [json.loads(line) for line in digits.read_text().splitlines()][:20]
    right = 0
    for record in records:
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": record["question"]}]}]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(images=Image.open(digits.parent / record["image"]), text=prompt, return_tensors="pt")
        with vlmprune.prune(model, "divprune", keep=0.25) as session:
            ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        reply = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += reply.strip() == record["answer"]
    assert row["accuracy"] == right / 20
    assert row["questions"] == 20
    assert sum(total for _, total in row["by_kind"].values()) == 20
    report = session.last
    assert row["tokens"]["per_layer"] == report.layer_visual_tokens
    assert row["tokens"]["average_keep"] == report.average_keep
    assert row["flops"]["ratio"] == pytest.approx(report.flops_pruned / report.flops_full, rel=0.01)
    assert row["kv_bytes"]["ratio"] == pytest.approx(report.kv_bytes_pruned / report.kv_bytes_full, rel=0.02)
    assert row["changed"]
    assert row["logit_difference"] > 0.01
    count, width = report.tokens_before, model.config.text_config.hidden_size
    assert row["selection"]["flops"] == 2 * count * count * width  # one table of cosines
    assert row["selection"]["ratio"] == pytest.approx(
        2 * count * count * width / report.flops[0].language_model, rel=0.05
    )


def test_baselines_and_the_unpruned_model_are_always_in(done):
    found = rows(done)
    assert list(found) == [UNPRUNED, "random", "uniform", "pool", "divprune"]
    full = found[UNPRUNED]
    assert not full["changed"]
    assert full["flops"]["ratio"] == full["kv_bytes"]["ratio"] == full["tokens"]["average_keep"] == 1
    pool = found["pool"]
    gap = pool["vs_unpruned"]
    assert gap["difference"] == pytest.approx(pool["accuracy"] - full["accuracy"])
    assert gap["lost"] - gap["gained"] == round(20 * (full["accuracy"] - pool["accuracy"]))
    assert pool["environment"]["versions"]["torch"] == torch.__version__.split("+")[0]


def test_a_second_run_is_the_same(done, digits, tmp_path):
    out = tmp_path / "out"
    assert call("sweep", "--data", digits, *QUICK, "--out", out).exit_code == 0
    same_files(out, done)


def test_a_finished_row_is_not_computed_again(done, digits, tmp_path, monkeypatch):
    out = shutil.copytree(done, tmp_path / "out")
    monkeypatch.setattr(job, "load", lambda *_: pytest.fail("nothing is left to do"))
    result = call("sweep", "--data", digits, *QUICK, "--out", out)
    assert result.exit_code == 0
    assert "divprune" in result.stdout
    same_files(out, done)


def test_torn_files_are_mended(done, digits, tmp_path):
    """Every kind of moment at which a kill can leave the files."""
    out = shutil.copytree(done, tmp_path / "out")
    lines = (done / store.RESULTS).read_bytes().splitlines(keepends=True)
    (out / store.RESULTS).write_bytes(b"".join(lines[:3]) + lines[3][:40])  # the row's line, half written
    parts = out / "parts" / json.loads(lines[3])["id"]
    parts.mkdir(parents=True)
    (parts / "0.jsonl").write_bytes(b'{"batch":0,"sam')  # a batch's line, half written
    (out / "predictions" / f"{json.loads(lines[4])['id']}.jsonl.gz").unlink()  # not there yet
    assert call("sweep", "--data", digits, *QUICK, "--out", out).exit_code == 0
    same_files(out, done)


def start(*args: object, launcher: tuple[str, ...] = ("-m",)) -> subprocess.Popen:
    command = [sys.executable, *launcher, "vlmprune", "sweep", *map(str, args)]
    # The sweep gets a group of its own, as in a shell: Ctrl-C reaches all of it.
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Also where the tests run in the background, which ignores it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        cwd=Path(vlmprune.__file__).parents[1] / "tests",
        env={**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
    )


def wait_for(process: subprocess.Popen, condition, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_started_again(done, digits, tmp_path, how):
    out = tmp_path / "out"
    process = start("--data", digits, *QUICK, "--out", out)
    # In the midst of the third row: two are finished, and a batch of another is.
    wait_for(process, lambda: len(store.read(out / store.RESULTS)) >= 2 and any(out.glob("parts/*/*.jsonl")))
    os.killpg(process.pid, how)
    _, errors = process.communicate(timeout=60)
    finished = (out / store.RESULTS).read_bytes()
    assert finished.count(b"\n") < 5
    if how is signal.SIGINT:
        assert process.returncode == 130
        assert "of 5 rows are finished" in errors
        assert "Traceback" not in errors
    assert call("sweep", "--data", digits, *QUICK, "--out", out).exit_code == 0
    assert (out / store.RESULTS).read_bytes().startswith(finished[: finished.rfind(b"\n") + 1])
    same_files(out, done)


KILLER = """
import os, signal, sys
from pathlib import Path
from vlmprune.sweep import run, store
from vlmprune.sweep.config import load_config

data, out = sys.argv[1:]
config = load_config(None, {"data": {"source": data, "limit": 9}, "keeps": [0.25], "batch_size": 4, "timing": False,
                            "examples": 3, "device": "cpu", "out": out})

def die_at(last):
    # Half of the last write reaches the file, or the last rename never happens.
    left, plain, rename = [last], Path.open, Path.replace

    def due():
        left[0] -= 1
        return left[0] == 0

    class Torn:
        def __init__(self, file):
            self.file = file
        def __enter__(self):
            return self
        def __exit__(self, *exception):
            self.file.close()
        def __getattr__(self, name):
            return getattr(self.file, name)
        def write(self, content):
            if due():
                self.file.write(content[: len(content) // 2])
                self.file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return self.file.write(content)

    def opened(self, mode="r", *args, **kwargs):
        file = plain(self, mode, *args, **kwargs)
        return Torn(file) if mode in ("ab", "wb") else file

    def renamed(self, target):
        if due():
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)

    Path.open, Path.replace = opened, renamed

killed, status = 0, -1
while status:
    child = os.fork()
    if not child:
        die_at(3 + killed % 4)
        run.run(config)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    killed += status != 0
print(killed)
"""


def test_killed_in_the_midst_of_its_writes(digits, tmp_path):
    """One run after another dies at its third to sixth write, which is half done, until one gets through."""
    outs = tmp_path / "killed", tmp_path / "undisturbed"
    command = [sys.executable, "-c", KILLER, str(digits), str(outs[0])]
    killer = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert killer.returncode == 0, killer.stderr[-2000:]
    assert int(killer.stdout) >= 5
    (tmp_path / "sweep.yaml").write_text("keeps: [0.25]\nbatch_size: 4\nexamples: 3\n")
    flags = ("--data", digits, "--limit", 9, "--no-timing", "--device", "cpu")
    assert call("sweep", tmp_path / "sweep.yaml", *flags, "--out", outs[1]).exit_code == 0
    same_files(*outs)


def test_two_processes_give_the_rows_of_one(done, digits, tmp_path):
    out = tmp_path / "out"
    # `accelerate launch --cpu` starts one process, whatever number it is given.
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    process = start("--data", digits, *QUICK, "--out", out, launcher=launcher)
    shared = False
    while process.poll() is None:
        shared |= any(out.glob("parts/*/1.jsonl"))
        time.sleep(0.01)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert shared  # the second process wrote its part
    assert stdout.count("unpruned") <= 2  # the table once, not from every process
    same_files(out, done)


def test_another_sweep_is_not_mixed_in(done, digits, tmp_path):
    out = shutil.copytree(done, tmp_path / "out")
    for flags, said in (
        (("--metric", "anls"), "metric='exact_match', now 'anls'"),
        (("--limit", "19"), "other questions"),
        (("--dtype", "bfloat16"), "another 'bundled'"),
    ):
        result = call("sweep", "--data", digits, *QUICK, *flags, "--out", out)
        assert result.exit_code == 2
        assert said in result.stderr
    same_files(out, done)


def test_two_sweeps_in_one_folder(done, digits, tmp_path):
    from filelock import FileLock

    out = shutil.copytree(done, tmp_path / "out")
    with FileLock(out / ".lock"):
        result = call("sweep", "--data", digits, *QUICK, "--out", out)
    assert result.exit_code == 2
    assert "another sweep is writing" in result.stderr


def test_more_rows_later(done, digits, tmp_path):
    """A budget is added, what is there stays; a keep that cannot be reached is a row and not the end."""
    out = shutil.copytree(done, tmp_path / "out")
    result = call("sweep", "--data", digits, *QUICK, "--method", "fastv:layer=2", "--keep", "0.6", "--out", out)
    assert result.exit_code == 0, result.output
    assert (out / store.RESULTS).read_bytes().startswith((done / store.RESULTS).read_bytes())
    added = {(row["method"], row["keep"]): row for row in store.read(out / store.RESULTS)[5:]}
    assert added["fastv", 0.6]["status"] == "ok"
    assert added["fastv", 0.6]["tokens"]["per_layer"][1:3] == [144, 29]
    assert added["fastv", 0.25]["status"] == "not reachable"
    assert "fastv cannot keep 0.25 on average" in added["fastv", 0.25]["reason"]


def test_bad_samples_are_counted(digits, tmp_path):
    records = digits.read_text().splitlines()[:10]
    (tmp_path / "broken.png").write_bytes((digits.parent / "0.png").read_bytes()[:300])
    for path in digits.parent.glob("*.png"):
        shutil.copy(path, tmp_path)
    first = json.loads(records[0])
    records[3:3] = [json.dumps({**first, "image": "broken.png"}), json.dumps({**first, "image": "gone.png"})]
    records[6:6] = [json.dumps({**first, "question": "Is <image> here?"}), "no JSON"]
    (tmp_path / "data.jsonl").write_text("\n".join(records))
    result = call("sweep", "--data", tmp_path / "data.jsonl", *QUICK, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    for said in ("no such image: 'gone.png'", "line 8: is no JSON", "broken.png", "must not hold '<image>'"):
        assert result.stderr.count(said) == 1, said
    for row in store.read(tmp_path / "out" / store.RESULTS):
        assert (row["questions"], row["unusable"], row["failed"]) == (10, 4, 0)


@dataclass(kw_only=True)
class Fickle(Pruner):
    """Fails on batches of which one item has a certain feature, or on all of them."""

    always: bool = False
    name: ClassVar[str] = "fickle"

    def select(self, tokens, budget):
        if self.always or (tokens.features[:, 0, 0] > tokens.features.new_tensor(THRESHOLD)).any():
            raise RuntimeError("out of luck")
        return Selection(torch.arange(int(budget.max())).expand(len(tokens.counts), -1))


THRESHOLD = 0.0


@torch.no_grad()
def test_a_method_that_fails_on_one_sample(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_registered", {**registry._registered, "fickle": Fickle})
    model, processor = bundled.load()
    pictures = [scene.image for scene in bundled.demo_scenes()]
    pixels = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    values = torch.stack(list(model.model.get_image_features(pixel_values=pixels).pooler_output))[:, 0, 0]
    monkeypatch.setattr(sys.modules[__name__], "THRESHOLD", float(values.sort().values[-2:].mean()))
    unlucky = int(values.argmax())
    asked = [json.loads(line)["image"] == f"{unlucky}.png" for line in digits.read_text().splitlines()]
    assert any(asked)
    both = ("--method", "fickle", "--method", "fickle:always=True")
    result = call("sweep", "--data", digits, "--keep", "0.25", "--no-timing", *both, "--out", tmp_path / "out")
    assert result.exit_code == 1  # one of the two settings answers nothing
    row = rows(tmp_path / "out")["fickle"]
    assert (row["questions"], row["failed"]) == (asked.count(False), asked.count(True))
    assert row["settings"] == {}
    assert f"{asked.count(True)} questions failed, the first with: out of luck" in result.stderr
    assert "is tried again by the same command: RuntimeError: out of luck" in result.stderr


def test_timings(digits, done, tmp_path):
    """Taken in a second go, without touching the results."""
    out = shutil.copytree(done, tmp_path / "out")
    config = tmp_path / "sweep.yaml"
    config.write_text("batch_size: 8\nkeeps: [0.25]\ntiming: {questions: 2, new_tokens: 4, batches: 1}\n")
    result = call("sweep", config, "--data", digits, "--limit", 20, "--out", out)
    assert result.exit_code == 0, result.output
    assert (out / store.RESULTS).read_bytes() == (done / store.RESULTS).read_bytes()
    timings = {timing["id"]: timing for timing in store.read(out / store.TIMINGS)}
    assert set(timings) == {row["id"] for row in rows(done).values()}
    for name, row in rows(done).items():
        timing = timings[row["id"]]
        first = timing["first_token_seconds"]
        assert 0 < first["q1"] <= first["median"] <= first["q3"]
        assert timing["decode_tokens_per_second"]["median"] > 0
        assert timing["questions_per_second"] > 0
        assert timing["peak_memory_bytes"] is None or timing["peak_memory_bytes"] > 10**7
        assert (timing["selection_seconds"]["median"] > 0) == (name != UNPRUNED)
        assert timing["timed_batch"] == 8
        assert timing["date"]
        assert timing["threads"] == torch.get_num_threads()


def test_frames_chosen_beforehand(tmp_path, digits):
    """A frame selector's rows: what the model was shown, against all there was, its scorer's work included."""
    out = tmp_path / "out"
    flags = ("--method", "free_video_llm:roi=1.0", "--keep", "0.5", "--batch-size", "4")
    video = ("--model", "bundled/digit-qwen-vl", "--data", "digit-clips", "--limit", "7")
    result = call("sweep", *video, *flags, "--out", out)
    assert result.exit_code == 0, result.output
    table = rows(out)
    row, whole = table["free_video_llm"], table[UNPRUNED]
    assert row["tokens"]["full"] == whole["tokens"]["full"]
    assert row["flops"]["full"] == whole["flops"]["full"]
    assert 0.4 < row["tokens"]["average_keep"] < 0.7  # whole pairs of frames
    assert row["changed"]
    assert row["logit_difference"] > 0
    timing = next(t for t in store.read(out / store.TIMINGS) if t["id"] == row["id"])
    assert 0 < timing["selection_seconds"]["median"] < timing["first_token_seconds"]["median"]

    data = load_data(DataConfig(source="digit-clips", limit=7))
    chat = load_chat(str(bundled.video_model_path()), "cpu", "float32")
    scorer, chooser = ClipScorer(), vlmprune.FreeVideoLLM(keep=0.5, roi=1.0)
    replies = {entry["place"]: entry["reply"] for entry in store.read_lines(job.predictions_path(out, row["id"]))}
    shown = []
    for place, sample in enumerate(data.samples):
        clip = chooser.frames(sample.video(), sample.question, scorer)
        inputs = prompt_inputs(chat.processor, sample.question, clips=[clip])
        shown.append(int((inputs["input_ids"] == chat.model.config.video_token_id).sum()))
        assert generate(chat, inputs, 16) == [replies[place]]
    assert row["tokens"]["average"] == pytest.approx(sum(shown) / len(shown))
    scoring = row["flops"]["pruned"] - row["tokens"]["average"] / whole["tokens"]["full"] * whole["flops"]["full"]
    assert scoring > 0

    still = call("sweep", "--data", digits, *QUICK, *flags[:2], "--out", tmp_path / "still")
    assert still.exit_code == 0, still.output
    assert "without one" in rows(tmp_path / "still")["free_video_llm"]["reason"]


def test_the_table_fits_a_terminal() -> None:
    """80 columns hold every figure of the committed rows; long names are folded."""
    from vlmprune.sweep.cli import _table

    rows = store.read(Path(__file__).parents[1] / "benchmarks" / "results" / "accuracy" / "results.jsonl")
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(_table(rows))
    text = console.export_text()
    assert "…" not in text
    for row in rows:
        if row["status"] == "ok":
            low, high = row["ci"]
            assert f"{100 * row['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]" in text
    assert f"{100 * rows[1]['vs_unpruned']['difference']:+.1f}" in text

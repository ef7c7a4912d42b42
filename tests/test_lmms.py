"""lmms-eval end to end, offline: its printed accuracy is the sweep's on the same samples."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vlmprune.sweep.config import load_config
from vlmprune.sweep.data import load_data
from vlmprune.sweep.metrics import exact_match

ROOT = Path(__file__).resolve().parents[1]
SECTION = (ROOT / "pyproject.toml").read_text().split('[project.entry-points."lmms_eval.models"]')[1].split("\n[")[0]
ENTRY = dict(re.findall(r'^(\w+) = "(.+)"$', SECTION, re.MULTILINE))
needs_lmms_eval = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None,
    reason="lmms-eval is not installed: pip install 'vlmprune[lmms-eval]'",
)


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    """The digit task of the example, 17 questions or so."""
    folder = tmp_path_factory.mktemp("lmms") / "digits"
    script = ROOT / "examples" / "lmms_eval_digits.py"
    subprocess.run([sys.executable, str(script), str(folder), "--scenes", "3"], check=True, env=environment())
    return folder


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **extra}


def sweep_accuracy(task: Path, out: Path) -> float:
    from vlmprune.sweep.run import run

    settings = {
        "methods": ["divprune"],
        "keeps": [0.25],
        "data": str(task / "digits.jsonl"),
        "timing": False,
        "examples": 0,
        "device": "cpu",
        "out": str(out),
    }
    (row,) = [row for row in run(load_config(None, settings)).rows if row["method"] == "divprune"]
    return row["accuracy"]


def test_the_task_reads_and_scores_as_the_sweep_does(task):
    data = load_data(load_config(None, {"data": str(task / "digits.jsonl")}).data)
    assert not data.bad
    spec = importlib.util.spec_from_file_location("digits", task / "digits.py")
    functions = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(functions)
    records = [json.loads(line) for line in (task / "digits.jsonl").read_text().splitlines()]
    assert len(records) == len(data.samples) > 10
    for record, sample in zip(records, data.samples):
        assert functions.question(record) == sample.question
        assert [picture.tobytes() for picture in functions.pictures(record)] == [
            load().tobytes() for load in sample.images
        ]
        for reply in (record["answer"], f" {record['answer'].upper()}. ", "nothing of the kind"):
            assert functions.score(record, [reply]) == {"exact_match": exact_match(reply, sample.answers)}


@needs_lmms_eval
def test_lmms_eval_prints_the_accuracy_of_the_sweep(task, tmp_path):
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-m", "lmms_eval", "--model", "vlmprune_llava"]
    command += ["--model_args", "pruner=divprune,keep=0.25", "--tasks", "vlmprune_digits", "--batch_size", "8"]
    command += ["--include_path", str(task), "--output_path", str(tmp_path / "out"), "--device", "cpu"]
    # Registered as an installed package would be, whatever this environment has installed.
    registered = tmp_path / "site" / "vlmprune_entry-0.dist-info"
    registered.mkdir(parents=True)
    (registered / "METADATA").write_text("Metadata-Version: 2.1\nName: vlmprune-entry\nVersion: 0\n")
    lines = [f"{name} = {target}" for name, target in ENTRY.items()]
    (registered / "entry_points.txt").write_text("\n".join(["[lmms_eval.models]", *lines]) + "\n")
    run = subprocess.run(
        command, env=environment(**offline, PYTHONPATH=str(registered.parent)), capture_output=True, text=True
    )
    written = list((tmp_path / "out").rglob("*results.json"))
    assert (run.returncode, len(written)) == (0, 1), run.stderr[-3000:]  # it ends with 0 after an error, too
    (path,) = written
    accuracy = json.loads(path.read_text())["results"]["vlmprune_digits"]["exact_match,none"]
    assert accuracy == pytest.approx(sweep_accuracy(task, tmp_path / "sweep"), abs=1e-9)
    assert f"{accuracy:.4g}" in run.stdout


@needs_lmms_eval
def test_conversations_settings_and_refusals(task):
    from lmms_eval.models.registry_v2 import ModelRegistryV2
    from PIL import Image

    module, name = ENTRY["vlmprune"].split(":")
    registry = ModelRegistryV2()
    registry.register_manifest(getattr(importlib.import_module(module), name)())
    for alias in ("vlmprune", "vlmprune_llava", "vlmprune_qwen_vl", "vlmprune_internvl"):
        assert registry.get_model_class(alias).__name__ == "VlmPrune"
    make = registry.get_model_class("vlmprune").create_from_arg_string
    model = make("pruner=fastv,keep=0.75,layer=1", {"batch_size": "2", "device": "cpu"})
    assert (model.pruner.layer, model.pruner.keep, model.batch_size) == (1, 0.75, 2)
    picture = Image.new("RGB", (96, 96))
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "first"}, {"type": "image", "url": picture}]},
        {"role": "assistant", "content": [{"type": "text", "text": "seen"}]},
        {
            "role": "user",
            "content": [{"type": "image", "url": str(task / "scene0.png")}, {"type": "text", "text": "b"}],
        },
    ]
    text, images, clips = model._write(turns)
    assert text.index("first") < text.index("<image>") < text.index("seen") < text.rindex("<image>")
    assert (len(images), clips) == (2, [])
    assert make("pruner=none", {"device": "cpu"}).pruner is None
    for arguments, said in (
        ("pruner=divprun", "did you mean"),
        ("keep=1.5", "keep must be"),
        ("pruner=divprune,layers=2", "no field 'layers'"),
        ("pretrained=/nowhere", "not a folder"),
    ):
        with pytest.raises(ValueError, match=said):
            make(arguments, {"device": "cpu"})
    with pytest.raises(ValueError, match="batch_size"):
        make("", {"batch_size": "auto", "device": "cpu"})
    with pytest.raises(NotImplementedError, match="generate_until"):
        model.loglikelihood([])

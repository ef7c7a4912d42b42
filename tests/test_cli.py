"""The command as a user types it, in process, on the bundled model."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import vlmprune
from vlmprune import ask, bundled, demo, methods_table
from vlmprune.cli import app
from vlmprune.contract import Pruner

SCENE = bundled.demo_scenes()[2]
QUESTION = SCENE.questions[0]


def call(*args: object):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def chat() -> ask.Chat:
    return ask.load_chat()


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "scene.png"
    SCENE.image.save(path)
    return path


@pytest.fixture
def shared(monkeypatch, chat):
    """The model is loaded once for all tests that are not about loading."""
    monkeypatch.setattr(ask, "load_chat", lambda model, device, dtype: chat)


def test_help_does_not_import_torch():
    code = (
        "import sys, vlmprune.cli; from typer.testing import CliRunner;"
        "assert CliRunner().invoke(vlmprune.cli.app, ['--help']).exit_code == 0;"
        "print([name for name in ('torch', 'transformers', 'numpy', 'PIL') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_version():
    assert call("--version").stdout.strip() == f"vlmprune {vlmprune.__version__}"


def test_methods_lists_every_pruner():
    shown = call("methods")
    assert shown.exit_code == 0
    for name in vlmprune.list_pruners():
        assert name in shown.stdout
    assert "keep=0.098" in shown.stdout
    assert "2503.02175" in shown.stdout
    assert "    Keep the visual tokens that lie farthest apart: greedy max-min diversity under cosine distance.\n" in (
        shown.stdout
    )


@pytest.mark.parametrize("width", [80, 100, 160])
def test_methods_wraps_between_words_on_a_terminal(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = re.sub(r"\x1b\[[0-9;]*m", "", call("methods").stdout)
    assert max(map(len, shown.splitlines())) <= width
    words = " ".join(shown.split())
    for method in methods_table.methods():
        assert f"{method.name} {method.stage}; " in words
        assert " ".join(method.summary.split()) in words
        assert " ".join(method.settings) in words
        assert f"families: {method.where}; {method.paper}" in words


def direct(chat: ask.Chat, keep: float | None) -> str:
    """The answer to `QUESTION`, without the command line."""
    pruner = None if keep is None else vlmprune.create_pruner("divprune", keep=keep)
    return ask.answer(chat, ask.encode(chat, [SCENE.image], QUESTION.text), pruner).text


def test_answer_on_standard_output_numbers_on_standard_error(picture, chat, shared):
    result = call("ask", "--image", picture, "--keep", "0.5", QUESTION.text)
    assert result.exit_code == 0
    assert result.stdout == f"{direct(chat, 0.5)}\n"
    assert "144 -> 72 visual tokens" in result.stderr
    assert "KV cache" in result.stderr


def test_keep_is_a_count_or_a_ratio_and_defaults_to_the_method(picture, shared):
    def after(*args):
        return call("ask", "--image", picture, *args, "How many digits are there?").stderr

    assert "144 -> 9 " in after("--keep", "9")
    assert "144 -> 9 " in after("--keep", "0.0625")
    assert "144 -> 14 " in after()
    assert "add --keep" in after("--pruner", "random")
    assert "144 -> 0 " in after("--keep", "0.001")


def test_compare_shows_both_runs(picture, chat, shared):
    result = call("ask", "--image", picture, "--keep", "36", "--compare", "--repeats", "1", QUESTION.text)
    assert result.exit_code == 0
    rows = {line[:20].strip(): line[20:].split() for line in result.stdout.splitlines()}
    assert rows["visual tokens"] == ["144", "36", "25.0", "%"]
    assert rows["answer"][:2] == [direct(chat, None), direct(chat, 36)]
    assert rows["prefill"][1] == rows["prefill"][3] == "MFLOPs"
    assert float(rows["prefill"][2]) < float(rows["prefill"][0])
    assert {"KV cache", "first token", "of it selection"} <= set(rows)
    assert any(row.startswith("total") for row in rows)
    assert "sdpa, float32, cpu" in result.stdout


@pytest.mark.parametrize("pruner", ["divprune", "pool"])
def test_overlay_of_several_images_in_a_new_folder(tmp_path, picture, shared, pruner):
    wide = tmp_path / "wide.png"
    Image.new("RGB", (300, 100), "navy").save(wide)
    out = tmp_path / "new" / "kept.png"
    asked = ("--pruner", pruner, "--keep", "0.25", "What colour is the 9? Größe?")
    one = call("ask", "--image", picture, "--overlay", out, *asked)
    single = Image.open(out).size
    two = call("ask", "--image", picture, "--image", wide, "--compare", "--repeats", "1", "--overlay", out, *asked)
    assert one.exit_code == two.exit_code == 0
    assert Image.open(out).height > single[1]
    assert [file.name for file in out.parent.iterdir()] == ["kept.png"]


def test_a_checkpoint_folder_answers_like_the_bundled_model(picture, chat):
    arguments = ("ask", "--image", picture, "--keep", "36", QUESTION.text)
    with_folder = call(*arguments[:-1], "--model", bundled.model_path(), "--dtype", "float32", QUESTION.text)
    assert with_folder.exit_code == 0, with_folder.stderr
    assert with_folder.stdout == call(*arguments).stdout == f"{direct(chat, 36)}\n"


def test_without_chat_template_the_prompt_is_plain(chat, monkeypatch):
    monkeypatch.setattr(chat.processor, "chat_template", None)
    monkeypatch.setattr(chat.processor.tokenizer, "chat_template", None)
    inputs = ask.encode(chat, [SCENE.image, SCENE.image], "How many digits are there?")
    assert (inputs["input_ids"] == chat.model.config.image_token_id).sum() == 288
    assert ask.answer(chat, inputs, max_new_tokens=3).new_tokens <= 3


def test_a_template_that_writes_bos_gets_no_second_one(chat, monkeypatch):
    bos = chat.processor.tokenizer.bos_token
    plain = ask.encode(chat, [SCENE.image], QUESTION.text)["input_ids"]
    monkeypatch.setattr(chat.processor, "chat_template", f"{bos}<image>hello")
    ids = ask.encode(chat, [SCENE.image], QUESTION.text)["input_ids"]
    assert (ids == chat.processor.tokenizer.bos_token_id).sum() <= 1
    assert (plain == chat.processor.tokenizer.bos_token_id).sum() <= 1


def test_compare_takes_turns_and_times_both(chat, monkeypatch):
    order = []
    real = ask._generate

    def spy(*args):
        order.append(bool(chat.model.model.language_model._forward_pre_hooks))
        return real(*args)

    monkeypatch.setattr(ask, "_generate", spy)
    inputs = ask.encode(chat, [SCENE.image], QUESTION.text)
    full, pruned = ask.compare(chat, inputs, vlmprune.create_pruner("divprune", keep=9), 4, repeats=2)
    assert order == [False, True] * 3
    assert full.report is None
    assert pruned.report.tokens_after == 9
    for run in (full, pruned):
        assert 0 < run.first_token_seconds <= run.total_seconds
        assert 1 <= run.new_tokens <= 4


def test_demo_writes_report_and_picture(tmp_path):
    out = tmp_path / "out" / "demo"
    result = call("demo", "--questions", "2", "--repeats", "1", "--out", out)
    assert result.exit_code == 0, result.stderr
    assert sorted(file.name for file in out.iterdir()) == ["kept_tokens.png", "report.json"]

    text = (out / "report.json").read_text()
    report = json.loads(text)
    assert len(report["questions"]) >= 8
    assert len({entry["scene"] for entry in report["questions"]}) >= 4
    for entry in report["questions"]:
        assert (entry["tokens_before"], entry["tokens_after"], len(entry["kept"])) == (144, 36, 36)
        assert 0 < entry["flops_pruned"] < entry["flops_full"]
        assert {"question", "truth", "answer_full", "answer_pruned"} <= set(entry)
        assert entry["question"] in result.stdout
    right = sum(entry["answer_full"] == entry["truth"] for entry in report["questions"])
    assert right == report["summary"]["right_full"]
    assert right >= 0.75 * len(report["questions"]), "the bundled model reads its own scenes"
    assert str(Path.home()) not in text
    assert str(tmp_path) not in text
    assert socket.gethostname() not in text

    sheet = np.asarray(Image.open(out / "kept_tokens.png"))
    assert sheet.shape[0] > 1000
    assert sheet.std() > 20


def test_demo_of_a_method_inside_the_decoder_shows_what_is_left_at_the_end(tmp_path):
    method = ("--pruner", "fastv", "--set", "layer=1", "--keep", "0.296875")  # all 144 in one of four layers, then 9
    assert call("demo", *method, "--questions", "1", "--repeats", "1", "--out", tmp_path).exit_code == 0
    for entry in json.loads((tmp_path / "report.json").read_text())["questions"]:
        assert (entry["tokens_before"], entry["tokens_after"], len(entry["kept"])) == (144, 9, 9)


def test_demo_questions_rotate_through_all_kinds():
    scenes = bundled.demo_scenes()
    picked = demo.pick_questions(scenes, 2)
    assert len(picked) == 2 * len(scenes)
    assert {question.kind for _, question in picked} == {q.kind for scene in scenes for q in scene.questions}
    assert len(demo.pick_questions(scenes, 99)) == sum(len(scene.questions) for scene in scenes)


def test_ctrl_c_leaves_with_130_and_nothing_written(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    for step in ("compare", "as_json"):
        monkeypatch.setattr(demo, step, interrupted)
        result = call("demo", "--questions", "1", "--repeats", "1", "--out", out)
        monkeypatch.undo()
        assert result.exit_code == 130
        assert "Traceback" not in result.output
        assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["q"], "no image.*--image"),
        (["--image", "{tmp}/nope.png", "q"], "no such image"),
        (["--image", "{tmp}", "q"], "is a folder"),
        (["--image", "{tmp}/text.png", "q"], "not an image"),
        (["--image", "{tmp}/cut.png", "q"], "cannot be read.*truncated"),
        (["--image", "{tmp}/thin.png", "q"], "crop it"),
        (["--image", "{image}", " "], "question is empty"),
        (["--image", "{image}", "an <image>?"], "must not hold '<image>'"),
        (["--image", "{image}", "--pruner", "divprun", "q"], "did you mean 'divprune'"),
        *((["--image", "{image}", "--keep", k, "q"], r"\(0, 1\]") for k in ("0", "-1", "1.5", "nan", "x", "True", "")),
        (["--image", "{image}", "--overlay", "{tmp}/x.txt", "q"], "must end in"),
        (["--image", "{image}", "--overlay", "{tmp}/text.png/x.png", "q"], "cannot be made"),
        (["--image", "{image}", "--device", "tpu", "q"], "no device 'tpu'"),
        (["--image", "{image}", "--model", "{tmp}/missing", "q"], "not a folder"),
        (["--image", "{image}", "--model", "{tmp}", "q"], "config.json is missing"),
        (["--image", "{image}", "--model", "{tmp}/broken", "q"], "not a model config"),
        (["--image", "{image}", "--model", "{tmp}/gpt2", "q"], r"'gpt2' model.*LLaVA-1\.5"),
        (["--image", "{image}", "--model", "{tmp}/damaged", "q"], "cannot be loaded"),
    ],
)
def test_mistakes_get_one_sentence(tmp_path, picture, args, sentence):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:2000])
    Image.new("RGB", (1, 500)).save(tmp_path / "thin.png")
    for name, config in (("broken", "["), ("gpt2", '{"model_type": "gpt2"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
    damaged = shutil.copytree(bundled.model_path(), tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"0" * 100)

    result = call("ask", *(arg.format(tmp=tmp_path, image=picture) for arg in args))
    assert result.exit_code == 2
    assert result.stdout == ""
    message = result.stderr.strip()
    assert message.startswith("error: ")
    assert "\n" not in message
    assert re.search(sentence, message), message


def test_a_hub_that_does_not_answer(picture, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("We couldn't connect to the hub. Check your connection.\nMore lines.")

    monkeypatch.setattr(ask.PreTrainedConfig, "get_config_dict", offline)
    result = call("ask", "--image", picture, "--model", "some/model", "q")
    assert result.exit_code == 2
    assert result.stderr.strip() == "error: 'some/model' cannot be loaded: We couldn't connect to the hub."


def test_out_of_memory_is_told_and_a_bug_is_not_hidden(picture, shared, monkeypatch):
    def fail(error):
        def run(*args):
            raise error

        monkeypatch.setattr(ask, "answer", run)
        return call("ask", "--image", picture, "q")

    result = fail(torch.OutOfMemoryError("CUDA out of memory"))
    assert result.exit_code == 2
    assert "ran out of memory" in result.stderr
    assert isinstance(fail(RuntimeError("a bug")).exception, RuntimeError)


def test_traceback_on_request():
    assert isinstance(call("--traceback", "ask", "q").exception, ValueError)


def image_file(folder: Path, name: str) -> Path:
    """A 6 x 4 picture of the left half black, the right half white (or clear), in an unusual format."""
    pixels = np.zeros((4, 6), dtype=np.uint8)
    pixels[:, 3:] = 255
    grey = Image.fromarray(pixels)
    path = folder / name
    if name == "rgba.png":
        Image.merge("RGBA", (Image.new("L", (6, 4)),) * 3 + (Image.fromarray(255 - pixels),)).save(path)
    elif name == "palette.gif":
        grey.convert("P").save(path)
    elif name == "clear.gif":
        grey.convert("P").save(path, transparency=255)
    elif name == "sixteen.png":
        Image.fromarray(pixels.astype(np.uint16) * 257).save(path)
    elif name == "float.tif":
        Image.fromarray(pixels.astype(np.float32) * 1e-3 - 7).save(path)
    elif name == "one-bit.png":
        grey.convert("1").save(path)
    elif name == "alpha.png":
        grey.convert("LA").save(path)
    elif name == "cmyk.tif":
        grey.convert("RGB").convert("CMYK").save(path)
    elif name == "rotated.png":
        exif = Image.Exif()
        exif[0x0112] = 6
        grey.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    else:
        grey.save(path)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "grey.png",
        "rgba.png",
        "palette.gif",
        "clear.gif",
        "sixteen.png",
        "float.tif",
        "one-bit.png",
        "alpha.png",
        "cmyk.tif",
        "rotated.png",
    ],
)
def test_every_kind_of_picture_is_read_upright_as_rgb(tmp_path, name):
    image = ask.load_image(image_file(tmp_path, name))
    assert (image.mode, image.size) == ("RGB", (6, 4))
    pixels = np.asarray(image)
    assert pixels[:, :3].max() <= 2
    assert pixels[:, 3:].min() >= 253


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 3), (640, 11)])
def test_odd_sizes_are_answered(tmp_path, shared, size):
    path = tmp_path / "odd.png"
    Image.new("RGB", size, "green").save(path)
    assert call("ask", "--image", path, "--keep", "0.25", "How many digits are there?").exit_code == 0


def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = tmp_path / "huge.png"
    Image.new("1", (20000, 9000)).save(path)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"180 megapixels|larger than 178"):
        ask.load_image(path)


def test_keep_keeps_its_kind():
    assert isinstance(ask.parse_keep("1"), int)
    assert isinstance(ask.parse_keep("1.0"), float)
    assert ask.parse_keep("1e-1") == 0.1


def test_every_method_can_be_asked(chat):
    inputs = ask.encode(chat, [SCENE.image], QUESTION.text)
    for name, cls in vlmprune.registry.pruner_classes().items():
        assert issubclass(cls, Pruner)
        if not cls.needs and not cls.trained:
            keep = 0.25 if name == "yopo" else 36  # it keeps a share of the layers
            report = ask.answer(chat, inputs, vlmprune.create_pruner(name, keep=keep), 2).report
            assert round(report.average_keep * 144) == 36, name


def test_a_methods_own_settings(picture, shared):
    def ask_fastv(*more: str):
        return call("ask", "--image", picture, "--pruner", "fastv", "--keep", "0.5", *more, "Which digit is red?")

    assert "144 -> 48" in ask_fastv("--set", "layer=1").stderr
    for wrong, said in (("layr=1", "no field 'layr'"), ("layer", "name=value"), ("layer=zero", "layer must be an int")):
        refused = ask_fastv("--set", wrong)
        assert refused.exit_code == 2
        assert said in refused.stderr


def test_bench_kernels_passes_its_options_on(monkeypatch):
    from vlmprune.kernels import bench

    seen = []
    monkeypatch.setattr(bench, "main", lambda argv: seen.append(list(argv)) or 3)
    assert call("bench", "kernels", "--ops", "max_min", "--json", "x.json").exit_code == 3
    assert seen == [["--ops", "max_min", "--json", "x.json"]]
    assert "kernels" in call("bench", "--help").stdout

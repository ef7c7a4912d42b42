"""`vlmprune ask --video` as a user types it, on the bundled models."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av")

from families import FAMILIES
from PIL import Image
from test_cli import call
from videos import picture, processor, write

from vlmprune import ask, bundled
from vlmprune.video import Clip


@pytest.fixture(scope="module")
def chat() -> ask.Chat:
    return ask.load_chat()


@pytest.fixture
def shared(monkeypatch, chat):
    monkeypatch.setattr(ask, "load_chat", lambda model, device, dtype: chat)


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("film") / "film.mp4", frames=12, fps=4)


def test_a_video_is_asked_about_and_its_strip_drawn(film, shared, tmp_path):
    strip = tmp_path / "strip.png"
    result = call(
        "ask", "--video", film, "--frames", 3, "--keep", 0.25, "--overlay", strip, "How many digits are there?"
    )
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip()
    assert "film.mp4: 3 of 12 frames, at 0.00, 1.00, 2.00 s" in result.stderr
    assert "432 -> 108 visual tokens" in result.stderr
    assert "sees their frames as images" in result.stderr
    page = Image.open(strip)
    assert page.width > 3 * 230
    assert np.asarray(page.convert("L")).std() > 20


def test_the_bundled_video_model_answers_by_default(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    import av

    from vlmprune.video_scenes import digit_clips

    film = next(digit_clips("test", 1, seed=7, frames=(8, 8), kinds=["count"]))
    path, strip = tmp_path / "digits.mp4", tmp_path / "strip.png"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width = stream.height = 96
        stream.pix_fmt, stream.options = "yuv444p", {"crf": "4"}
        for frame in film.frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    result = call("ask", "--video", path, "--keep", 1.0, "--overlay", strip, film.questions[0].text)
    assert result.exit_code == 0, result.stderr
    model, tool = bundled.load_video()
    raw = ask.prompt_inputs(tool, film.questions[0].text, clips=[Clip.of(film.frames, 24)])
    ids = model.generate(**raw, max_new_tokens=8, do_sample=False)[0, raw["input_ids"].shape[1] :]
    assert result.stdout.strip() == tool.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert "sees their frames as images" not in result.stderr
    assert strip.exists()


def test_frames_and_region_by_the_question(tmp_path, shared):
    """The only frame that shows the digit asked about is found, and the answer read off it."""
    pytest.importorskip("open_clip")
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    import av

    from vlmprune.scenes import digit_scenes

    scenes = list(digit_scenes("test", 8, seed=13, digits=(1, 1), kinds=["digit_of_colour"]))
    number, question = next(
        (i, scene.questions[0])
        for i, scene in enumerate(scenes)
        if [other.objects[0].colour for other in scenes].count(scene.objects[0].colour) == 1
    )
    path = tmp_path / "scenes.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=2)
        stream.width = stream.height = 96
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "8"}
        for scene in scenes:
            container.mux(stream.encode(av.VideoFrame.from_image(scene.image)))
        container.mux(stream.encode())
    result = call("ask", "--video", path, "--frame-keep", 1, "--keep", 1.0, question.text)
    assert result.exit_code == 0, result.stderr
    assert f"1 of 8 frames, at {number / 2:.2f} s" in result.stderr
    assert result.stdout.strip() == question.answer
    cropped = call("ask", "--video", path, "--frame-keep", 2, "--roi", 0.5, question.text)
    assert cropped.exit_code == 0, cropped.stderr


@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl", "internvl", "llava-onevision", "llava-next-video"])
@pytest.mark.parametrize("frames", [1, 5])
def test_every_video_family_is_drawn(film, monkeypatch, tmp_path, family, frames):
    model = FAMILIES[family].model()
    chat = ask.Chat(model, processor(family), family)
    monkeypatch.setattr(ask, "load_chat", lambda *args: chat)
    strip = tmp_path / "strip.png"
    arguments = ("--pruner", "uniform", "--keep", 0.5, "--max-new-tokens", 1, "--overlay", strip)
    result = call("ask", "--video", film, "--frames", frames, *arguments, "what?")
    assert result.exit_code == 0, result.stderr
    assert strip.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--video", "{tmp}/missing.mp4", "q"], "no such video"),
        (["--video", "{tmp}/text.mp4", "q"], "not a video"),
        (["--video", "{tmp}", "q"], "is a folder"),
        (["--video", "{film}", "--frames", "0", "q"], "frames must be"),
        (["--video", "{film}", "--fps", "0", "q"], "fps must be"),
        (["--video", "{film}", "--frames", "3", "--fps", "1", "q"], "one of frames, fps"),
        (["--video", "{film}", "--frame-keep", "1.5", "q"], "keep must be"),
        (["--video", "{film}", "--roi", "2", "q"], "roi must be"),
        (["--video", "{film}", "--clip", "x", "q"], "add --frame-keep or --roi"),
        (["--video", "{film}", "--clip", "nothing", "--roi", "0.5", "q"], "knows no model 'nothing'"),
        (["--video", "{film}", "--clip", "ViT-B-32", "--roi", "0.5", "q"], "give the weights"),
        (["--image", "{film}", "--frames", "3", "q"], "about videos"),
        (["q"], "no image.*--video"),
        (["--video", "{film}", "--budget", "5", "q"], "add --stream"),
        (["--video", "{film}", "--video", "{film}", "--stream", "q"], "watches one --video"),
        (["--video", "{film}", "--stream", "--frames", "3", "q"], "watches one --video"),
        (["--video", "{film}", "--stream", "--every", "0", "q"], "--every takes"),
        (["--video", "{film}", "--stream", "--budget", "0", "q"], "budget is the number"),
        (["--video", "{film}", "--stream", "--fps", "-1", "q"], "fps must be"),
        (["--video", "{film}", "--stream", "--pruner", "fastv", "q"], "listens to the question"),
        (["--video", "{tmp}/text.mp4", "--stream", "q"], "not a video"),
        (["--video", "{film}", "--stream", " "], "question is empty"),
    ],
)
def test_mistakes_get_one_sentence(tmp_path, film, shared, arguments, sentence):
    (tmp_path / "text.mp4").write_text("no video")
    result = call("ask", *(argument.format(tmp=tmp_path, film=film) for argument in arguments))
    assert result.exit_code == 2
    assert result.stdout == ""
    message = result.stderr.strip()
    assert message.startswith("error: ")
    assert "\n" not in message
    assert re.search(sentence, message), message


def test_pictures_behind_a_video(film, shared, tmp_path):
    Image.fromarray(picture(3)).save(tmp_path / "extra.png")
    strip = tmp_path / "strip.png"
    result = call("ask", "--video", film, "--frames", 2, "--image", tmp_path / "extra.png", "--overlay", strip, "what?")
    assert result.exit_code == 0, result.stderr
    assert strip.exists()


def test_a_video_is_watched_as_a_stream(film):
    arguments = ("--keep", 0.5, "--budget", 40, "--evict", "divprune", "How many digits are there?")
    result = call("ask", "--video", film, "--stream", "--every", 1, *arguments)
    assert result.exit_code == 0, result.stderr
    first, second, last = result.stdout.splitlines()
    assert first.startswith("1 s: ")
    assert second.startswith("2 s: ")
    assert last
    assert "12 frames, 2.8 s: holds 40 of 90 visual tokens" in result.stderr
    result = call("ask", "--video", film, "--stream", "--fps", 2, *arguments)
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1
    assert "6 frames, 2.5 s: holds 40 of 45 visual tokens" in result.stderr

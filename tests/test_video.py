"""Reading video: the right frames at the right times from every backend, no more decoding than needed, clear errors."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av")

from PIL import Image
from videos import number, picture, write, write_sound

from vlmprune import video
from vlmprune.video import BACKENDS, Clip, available, iter_video, read_video

TIMES = np.cumsum(np.random.default_rng(0).uniform(0.02, 0.4, 60))
SOME = [0, 5, 13, 14, 40, 59]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    return {
        "mp4": write(folder / "a.mp4"),
        "webm": write(folder / "a.webm", "libvpx-vp9", deadline="realtime"),
        "variable": write(folder / "variable.mp4", times=TIMES),
        "mkv": write(folder / "a.mkv"),
        "open gop": write(folder / "open.mp4", **{"x264-params": "open-gop=1:keyint=24:bframes=3"}),
        "one key frame": write(folder / "long.mp4", frames=120, gop="1000", **{"x264-params": "scenecut=0"}),
        "ts": write(folder / "a.ts"),
        "avi": write(folder / "a.avi", "mpeg4"),
        "hevc": write(folder / "hevc.mp4", "libx265", **{"x265-params": "log-level=0"}),
        "raw": write(folder / "a.h264"),
        "turned": write(folder / "turned.mp4", rotate=90, frames=12),
    }


def read(path: Path, backend: str, **choice) -> Clip:
    try:
        return read_video(path, backend=backend, **choice)
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("name", ["mp4", "webm", "variable", "mkv", "open gop", "one key frame"])
def test_every_backend_gives_the_frames_that_were_asked_for(files, backend, name):
    clip = read(files[name], backend, indices=SOME)
    assert [number(frame) for frame in clip.frames] == SOME
    assert clip.frames.shape == (6, 96, 128, 3)
    assert clip.frames.dtype == np.uint8
    reference = np.stack([picture(i) for i in SOME])
    assert np.abs(clip.frames.astype(int) - reference).mean() < 6
    first = read_video(files[name], indices=SOME, backend="pyav")
    assert np.abs(clip.frames.astype(int) - first.frames).max() <= 3
    assert np.array_equal(clip.timestamps, first.timestamps)


@pytest.mark.parametrize("name", ["ts", "avi", "hevc", "raw"])
def test_formats_that_need_care(files, name):
    """decord and torchcodec give other frames of some of these, without a word: they are not used, or found out."""
    clip = read_video(files[name], indices=SOME)
    assert [number(frame) for frame in clip.frames] == SOME
    assert clip.backend == "pyav"
    if "decord" in available():
        with pytest.raises(ValueError, match="decord gives wrong frames"):
            read_video(files[name], indices=SOME, backend="decord")


@pytest.mark.parametrize("name", ["ts", "avi", "hevc", "raw"])
def test_torchcodec_is_right_or_refuses(files, name):
    try:
        clip = read(files[name], "torchcodec", indices=SOME)
    except ValueError:
        assert name in ("ts", "raw")  # which it cannot seek in
        return
    assert [number(frame) for frame in clip.frames] == SOME


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_clip_filmed_upright_comes_upright(files, backend):
    clip = read(files["turned"], backend, indices=[7])
    assert clip.frames.shape == (1, 128, 96, 3)
    upright = np.rot90(clip.frames[0], -1)
    assert number(upright) == 7
    assert clip.metadata().height == 128


def test_times_at_a_constant_rate(files):
    clip = read_video(files["mp4"], 6)
    assert (clip.total, len(clip)) == (60, 6)
    assert clip.fps == pytest.approx(10)
    assert clip.duration == pytest.approx(6)
    assert clip.indices.tolist() == [0, 10, 20, 30, 40, 50]
    assert clip.timestamps == pytest.approx(clip.indices / 10)


def test_times_at_a_varying_rate(files):
    clip = read_video(files["variable"], indices=range(60), backend="pyav")
    assert clip.timestamps == pytest.approx(TIMES - TIMES[0], abs=1e-3)
    assert clip.duration >= TIMES[-1] - TIMES[0]


def test_even_sampling_is_that_of_transformers(files):
    for count in (1, 2, 7, 16, 33, 59, 60):
        expected = np.arange(0, 60, 60 / count).astype(int)[:count]
        assert read_video(files["mp4"], count, backend="pyav").indices.tolist() == expected.tolist()
    assert len(read_video(files["mp4"])) == 16


def test_sampling_by_time_takes_what_is_on_screen(files):
    assert read_video(files["mp4"], fps=2).indices.tolist() == list(range(0, 60, 5))
    assert len(read_video(files["mp4"], fps=1000)) == 60
    assert read_video(files["mp4"], fps=0.01).indices.tolist() == [0]
    shown = TIMES - TIMES[0]
    clip = read_video(files["variable"], fps=3)
    expected = sorted({int(np.searchsorted(shown, t + 2e-3, side="right")) - 1 for t in np.arange(0, shown[-1], 1 / 3)})
    assert set(clip.indices.tolist()) ^ set(expected) <= {59}


def test_indices_keep_their_order_and_repeat(files):
    clip = read_video(files["mp4"], indices=[30, 2, 2, -1])
    assert [number(frame) for frame in clip.frames] == [30, 2, 2, 59]
    assert clip.indices.tolist() == [30, 2, 2, 59]
    assert clip.timestamps == pytest.approx([3, 0.2, 0.2, 5.9])


def test_more_frames_than_there_are(files):
    assert len(read_video(files["mp4"], 10**9)) == 60


def test_odd_sizes_and_a_single_frame(tmp_path):
    clip = read_video(write(tmp_path / "odd.mp4", size=(98, 130), frames=1), 16)
    assert clip.frames.shape == (1, 98, 130, 3)
    assert clip.duration == pytest.approx(0.1, abs=0.05)
    assert clip.metadata().total_num_frames == 1


def test_only_what_is_needed_is_decoded(files):
    """From the key frame before each wanted frame; a tenth on top for frames that decoding threads hold back."""
    clip = read_video(files["mp4"], indices=[36, 40], backend="pyav")
    assert clip.decoded is not None
    assert clip.decoded <= 24
    every = read_video(files["one key frame"], indices=[100, 101], backend="pyav")
    assert every.decoded is not None
    assert 102 <= every.decoded <= 120


def broken(folder: Path, name: str, files: dict[str, Path]) -> Path:
    path = folder / name
    whole = files["mp4"].read_bytes()
    if name == "text.mp4":
        path.write_text("no video\n" * 100)
    elif name == "empty.mp4":
        path.touch()
    elif name == "sound.mp4":
        return write_sound(path)
    elif name == "no index.mp4":
        path.write_bytes(whole[: len(whole) // 2])
    elif name == "strange.mp4":
        path.write_bytes(whole.replace(b"avc1", b"zzzz"))
    elif name == "cut.mp4":
        early = write(path, movflags="faststart").read_bytes()
        path.write_bytes(early[: len(early) * 2 // 3])
    elif name == "cut.webm":
        part = files["webm"].read_bytes()
        path.write_bytes(part[: len(part) // 2])
    elif name == "noise.mp4":
        path.write_bytes(np.random.default_rng(0).bytes(50_000))
    elif name == "flipped.mp4":
        data, random = bytearray(whole), np.random.default_rng(1)
        for at in random.integers(300, len(data) - 3000, 500):
            data[at] = random.integers(256)
        path.write_bytes(data)
    elif name == "picture.mp4":
        Image.new("RGB", (8, 8)).save(path, "png")
    elif name == "playlist.mp4":
        path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{files['mp4']}\n#EXT-X-ENDLIST\n")
    elif name == "list.mp4":
        path.write_text(f"ffconcat version 1.0\nfile '{files['mp4']}'\n")
    elif name == "folder.mp4":
        path.mkdir()
    elif name == "pipe.mp4":
        os.mkfifo(path)
    return path


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("missing.mp4", "no such video"),
        ("folder.mp4", "is a folder"),
        ("pipe.mp4", "no ordinary file"),
        ("empty.mp4", "is empty"),
        ("text.mp4", "not a video"),
        ("noise.mp4", "not a video"),
        ("picture.mp4", "not a video"),
        ("playlist.mp4", "not a video"),
        ("list.mp4", "not a video"),
        ("sound.mp4", "only sound"),
        ("no index.mp4", "not a video that can be read, or it is damaged"),
        ("strange.mp4", "no known codec"),
        ("cut.mp4", "cut short: of 60 frames"),
        ("cut.webm", "cut short: of 6 seconds"),
        ("flipped.mp4", "damaged|cannot read"),
    ],
)
def test_files_that_are_no_good_get_one_sentence(tmp_path, files, name, sentence, backend):
    if backend not in ("auto", *available()):
        pytest.skip(f"{backend} is not installed")
    path = broken(tmp_path, name, files)
    with pytest.raises((ValueError, ImportError), match=f"{sentence}|FFmpeg libraries") as caught:
        read_video(path, indices=[0, 20, 45] if name == "flipped.mp4" else None, backend=backend)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ({"frames": 0}, "at least 1"),
        ({"frames": True}, "at least 1"),
        ({"frames": 2.5}, "at least 1"),
        ({"fps": 0}, "above zero"),
        ({"fps": float("nan")}, "above zero"),
        ({"indices": []}, "at least one int"),
        ({"indices": [0.5]}, "at least one int"),
        ({"indices": [60]}, "60 frames, numbered from 0: there is no frame 60"),
        ({"indices": [-61]}, "no frame -61"),
        ({"frames": 3, "fps": 1}, "one of frames, fps and indices"),
        ({"backend": "opencv"}, "backend must be one of"),
    ],
)
def test_impossible_choices_get_one_sentence(files, choice, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_video(files["mp4"], **choice)


def test_what_does_not_fit_into_memory_is_refused_before_decoding(files, monkeypatch):
    monkeypatch.setattr(video, "_decode", lambda *args: pytest.fail("decoded"))
    monkeypatch.setattr(video, "MAX_BYTES", 96 * 128 * 3 * 10)
    with pytest.raises(ValueError, match="ask for fewer than 11"):
        read_video(files["mp4"], 11)
    monkeypatch.setattr(video, "MAX_PIXELS", 96 * 128 - 1)
    with pytest.raises(ValueError, match="128 x 96 pixels: scale it down"):
        read_video(files["mp4"], 1)


def test_reading_is_given_up_in_time(files):
    with pytest.raises(TimeoutError, match="took too long"):
        read_video(files["mp4"], backend="pyav", timeout=0)


@pytest.mark.skipif("decord" not in available(), reason="decord is not installed")
@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("import time; time.sleep(60)", "it hung"),
        ("import os; os.kill(os.getpid(), 11)", "it crashed"),
        ("import sys; sys.stdin.readline(); print('no json', flush=True)", "it crashed"),
        ("import sys; sys.stdin.readline(); print('{\"shape\": [9, 9, 9, 3]}')", "it crashed"),
        (
            r"""import sys
for line in sys.stdin:
    print('{"error": "[1:2:3] /a/b.cc:4: Broken."}', flush=True)""",
            "Broken",
        ),
    ],
)
def test_a_decord_that_hangs_or_crashes_is_survived(tmp_path, files, monkeypatch, script, said):
    child = tmp_path / "child.py"
    child.write_text(script)
    monkeypatch.setattr(video, "_DECORD", video._Decord(child))
    clip = read_video(files["mp4"], indices=SOME, timeout=2)
    assert clip.backend == "pyav"
    assert [number(frame) for frame in clip.frames] == SOME
    with pytest.raises(ValueError, match=f"decord cannot read .*: {said}"):
        read_video(files["mp4"], backend="decord", timeout=1)


@pytest.mark.skipif("decord" not in available(), reason="decord is not installed")
def test_decord_runs_in_one_child_and_not_here(files):
    for _ in range(2):
        assert read_video(files["mp4"], 3).backend == "decord"
    child = video._DECORD._process
    assert read_video(files["webm"], 3).backend == "decord"
    assert video._DECORD._process is child
    assert "decord" not in sys.modules


@pytest.mark.skipif("decord" not in available() or os.name == "nt", reason="decord is not installed")
def test_ctrl_c_leaves_no_child_behind(tmp_path, files):
    child = tmp_path / "child.py"
    child.write_text(f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)")
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from vlmprune import video\n"
            "video._DECORD = video._Decord(Path(sys.argv[1]))\nvideo.read_video(sys.argv[2])",
            str(child),
            str(files["mp4"]),
        ],
        stderr=subprocess.PIPE,
        # Also where the tests run in the background, which ignores it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for _ in range(200):
        if (tmp_path / "pid").exists() and (tmp_path / "pid").read_text():
            break
        time.sleep(0.05)
    parent.send_signal(signal.SIGINT)
    assert b"KeyboardInterrupt" in parent.communicate(timeout=20)[1]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_clips_of_frames_at_hand():
    clip = Clip.of([Image.fromarray(picture(i)) for i in range(8)], fps=4)
    assert (len(clip), clip.duration, clip.total) == (8, 2, 8)
    part = clip.take([6, 2])
    assert part.timestamps.tolist() == [1.5, 0.5]
    assert [number(frame) for frame in part.frames] == [6, 2]
    assert clip.crop((10, 20, 50, 44)).frames.shape == (8, 24, 40, 3)
    moving = clip.crop([(i, 0, i + 2, 96) for i in range(8)])
    assert np.array_equal(moving.frames[5], picture(5)[:, 5:7])
    for boxes in ((0, 0, 0, 9), (-1, 0, 5, 5), (0, 0, 129, 9), [(0, 0, i + 1, 9) for i in range(8)]):
        with pytest.raises(ValueError, match="crop boxes"):
            clip.crop(boxes)
    assert np.array_equal(np.asarray(clip.images[3]), picture(3))
    for bad in ([], [picture(0), picture(0, 90)], np.zeros((2, 3, 4), np.uint8), np.zeros((2, 4, 4, 3))):
        with pytest.raises(ValueError, match="a clip"):
            Clip.of(bad, fps=1)
    with pytest.raises(ValueError, match="above zero"):
        Clip.of([picture(0)], fps=0)


def test_metadata_of_the_whole_file_is_the_files_own(files):
    metadata = read_video(files["mp4"], 7).metadata()
    assert (metadata.total_num_frames, metadata.fps) == (60, pytest.approx(10))
    assert metadata.sampled_fps == pytest.approx(7 / 6)
    assert metadata.timestamps == pytest.approx([i / 10 for i in (0, 8, 17, 25, 34, 42, 51)])


def test_metadata_of_a_part_tells_its_own_pace(files):
    metadata = read_video(files["mp4"], indices=range(20, 40, 4)).metadata()
    assert metadata.sampled_fps == pytest.approx(2.5)
    assert metadata.timestamps == pytest.approx([2, 2.4, 2.8, 3.2, 3.6])


def test_metadata_at_a_varying_rate_tells_the_real_times(files):
    clip = read_video(files["variable"], 6)
    metadata = clip.metadata()
    assert metadata.timestamps == pytest.approx(clip.timestamps, abs=1e-5)
    assert 1 / metadata.sampled_fps == pytest.approx(clip.duration / 6, rel=0.2)


@pytest.mark.parametrize("name", ["mp4", "webm", "variable"])
def test_frames_come_one_by_one_as_from_a_camera(files, name):
    whole = read_video(files[name], 60, backend="pyav")
    times, shown = zip(*iter_video(files[name]))
    assert np.array_equal(np.stack(shown), whole.frames)
    assert np.array_equal(times, whole.timestamps)
    some = read_video(files[name], fps=2.0, backend="pyav")
    times, shown = zip(*iter_video(files[name], fps=2.0))
    assert np.array_equal(np.stack(shown), some.frames)
    assert np.array_equal(times, some.timestamps)


def test_a_film_that_is_left_early_is_closed(files):
    film = iter_video(files["mp4"])
    assert next(film)[0] == 0.0
    film.close()
    with pytest.raises(ValueError, match="fps must be"):
        next(iter_video(files["mp4"], fps=0))

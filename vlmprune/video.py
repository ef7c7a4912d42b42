"""Reading video: a few frames of a file with their times, decoding no more of it than needed.

PyAV first lists the packets of the video stream without decoding them: that gives the number and the time of every
frame, also where the frame rate varies, and tells what is no video. Only then are frames decoded, by one of

- decord, where it is installed. It is unmaintained and known to crash and to hang, and Python cannot survive either in
  its own process: it runs in a child process, started once and reused, and killed when it takes too long. Whatever goes
  wrong there, PyAV takes over.
- PyAV, in this process: seeks to the key frame before each wanted frame and decodes from there.
- torchcodec, on request.

Needs `pip install "vlmprune[video]"`.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from transformers.video_utils import VideoMetadata

Backend: TypeAlias = Literal["auto", "decord", "pyav", "torchcodec"]
BACKENDS = ("decord", "pyav", "torchcodec")

MAX_PIXELS = 64 * 2**20  # of one frame: 8K is half of it
MAX_BYTES = 4 * 2**30  # of all frames asked for
# decord counts frames from the packets behind a key frame, which is wrong where the decoder drops some of these: HEVC
# with open GOPs and MPEG-TS silently came out as other frames. It is used only where tests show it to be right.
DECORD_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
DECORD_CODECS = ("h264", "libx264", "vp8", "vp9", "libvpx", "libvpx-vp9")
# Demuxers of ordinary video files. Playlists, which name other files and addresses, are not among them.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,ivf,h264,hevc,m4v,gif,nut"


@dataclass(frozen=True)
class Clip:
    """Frames of a video.

    Attributes:
        frames: uint8 [T, H, W, 3], RGB.
        timestamps: float64 [T], seconds from the first frame of the file to the moment each is shown.
        indices: int64 [T], their numbers in the file, in order of presentation.
        fps: frames a second of the file, averaged.
        duration: seconds of the file, from its first frame to the end of its last.
        total: frames in the file.
        backend: what decoded them; "" for frames that came from elsewhere.
        decoded: frames that had to be decoded for it; None where the backend does not tell.
    """

    frames: np.ndarray = field(repr=False)
    timestamps: np.ndarray
    indices: np.ndarray
    fps: float
    duration: float
    total: int
    backend: str = ""
    decoded: int | None = None

    @classmethod
    def of(cls, frames: Sequence[Image.Image] | np.ndarray, fps: float) -> Clip:
        """A whole clip of frames at hand: pictures of one size, or uint8 [T, H, W, 3], shown at a constant rate.

        Raises:
            ValueError: no frames, frames of unequal size, another layout, or a rate that is not above zero.
        """
        try:
            stack = np.stack([np.asarray(frame.convert("RGB")) if isinstance(frame, Image.Image) else frame
                              for frame in frames])  # fmt: skip
        except ValueError:
            raise ValueError("a clip needs at least one frame, and all of one size.") from None
        if stack.dtype != np.uint8 or stack.ndim != 4 or stack.shape[-1] != 3:
            raise ValueError(f"a clip's frames are uint8 [T, H, W, 3], got {stack.dtype} {list(stack.shape)}.")
        if not (np.isfinite(fps) and fps > 0):
            raise ValueError(f"fps must be a number above zero, got {fps!r}.")
        number = np.arange(len(stack))
        return cls(stack, number / fps, number, float(fps), len(stack) / fps, len(stack))

    def __len__(self) -> int:
        return len(self.frames)

    def take(self, index: Sequence[int] | np.ndarray) -> Clip:
        """The frames at `index` (positions within this clip, ints [K]), with their own times."""
        index = np.asarray(index, dtype=np.int64)
        return replace(self, frames=self.frames[index], timestamps=self.timestamps[index], indices=self.indices[index])

    def crop(self, boxes: Sequence[int] | Sequence[Sequence[int]] | np.ndarray) -> Clip:
        """A rectangle of every frame: (left, top, right, bottom) in pixels, right and bottom exclusive.

        Args:
            boxes: one for all, int [4], or one a frame, int [T, 4], all of one size.

        Raises:
            ValueError: boxes of unequal size, empty ones, or ones that stick out.
        """
        each = np.broadcast_to(np.asarray(boxes, dtype=np.int64), (len(self), 4))
        high, wide = self.frames.shape[1:3]
        sides = each[:, 2:] - each[:, :2]
        if (sides != sides[0]).any() or (sides < 1).any() or each.min() < 0 or (each[:, 2:] > (wide, high)).any():
            raise ValueError(f"crop boxes must be of one size and lie within {wide} x {high} pixels.")
        parts = [frame[top:bottom, left:right] for frame, (left, top, right, bottom) in zip(self.frames, each)]
        return replace(self, frames=np.stack(parts))

    @property
    def images(self) -> list[Image.Image]:
        """The frames as RGB pictures."""
        return [Image.fromarray(frame) for frame in self.frames]

    @property
    def interval(self) -> float:
        """Mean seconds between neighbouring frames of this clip; of a single one, how long the file lasts."""
        if len(self) < 2:
            return self.duration
        return float(self.timestamps[-1] - self.timestamps[0]) / (len(self) - 1)

    def metadata(self) -> VideoMetadata:
        """What transformers' processors make time stamps and M-RoPE positions from.

        They know a time only as frame number over frame rate, and the pace of the sampled frames only as
        `len(frames_indices) / total_num_frames * fps` (Qwen2.5-VL's `second_per_grid_ts` is `temporal_patch_size` over
        it). Where the frame rate is constant and the frames cover the file, these are the file's own numbers. Frames
        from a part of it get the `total_num_frames` that their own mean interval implies, and where the frame rate
        varies, frames are numbered by microseconds.
        """
        from transformers.video_utils import VideoMetadata

        times, rate, indices = self.timestamps, self.fps, self.indices
        if np.abs(indices / rate - times).max() > 0.25 / rate:
            rate, indices = 1e6, np.rint(times * 1e6).astype(np.int64)
        span = len(self) * self.interval * rate
        whole = self.duration * rate
        return VideoMetadata(
            total_num_frames=max(1, round(whole if abs(span - whole) <= whole / len(self) else span)),
            fps=rate,
            width=self.frames.shape[2],
            height=self.frames.shape[1],
            duration=self.duration,
            video_backend=self.backend or None,
            frames_indices=indices.tolist(),
        )


def read_video(
    path: str | os.PathLike[str],
    frames: int | None = None,
    *,
    fps: float | None = None,
    indices: Sequence[int] | None = None,
    backend: Backend = "auto",
    timeout: float = 120.0,
) -> Clip:
    """Read some frames of a video file.

    Args:
        path: the file.
        frames: so many, spread evenly over the frames of the file like transformers' own sampling (number
            `int(k * total / frames)`); all of them where it has fewer. The default is 16.
        fps: those shown at 0, 1 / fps, 2 / fps ... seconds, each once.
        indices: these, by number, in this order; negative ones count from the end.
        backend: "auto" takes decord where it is installed, and PyAV where decord is not or fails.
        timeout: seconds after which reading is given up.

    Raises:
        ValueError: a file that is missing, empty, damaged, cut short, no video or too large for memory, or an
            impossible choice of frames; one sentence each.
        ImportError: the backend is not installed.
        TimeoutError: it took longer than `timeout`.
    """
    if (frames is not None) + (fps is not None) + (indices is not None) > 1:
        raise ValueError("give one of frames, fps and indices.")
    if frames is not None and (isinstance(frames, bool) or not isinstance(frames, (int, np.integer)) or frames < 1):
        raise ValueError(f"frames must be an int of at least 1, got {frames!r}.")
    if fps is not None and not (isinstance(fps, (int, float)) and np.isfinite(fps) and fps > 0):
        raise ValueError(f"fps must be a number above zero, got {fps!r}.")
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}.")
    _require(backend)
    file, end = _check_file(path), time.monotonic() + timeout
    with _readable(file):
        track = _Track.of(file, end)
        chosen = _choose(track, 16 if frames is None and fps is None else frames, fps, indices, file)
        size = len(np.unique(chosen)) * track.width * track.height * 3
        if size > MAX_BYTES:
            raise ValueError(
                f"{len(chosen)} frames of {track.width} x {track.height} pixels take {size / 2**30:.0f} GiB: ask for "
                f"fewer than {MAX_BYTES // (3 * track.width * track.height) + 1}."
            )
        wanted, back = np.unique(chosen, return_inverse=True)
        pictures, used, decoded = _decode(file, track, wanted, backend, end)
    return Clip(
        frames=pictures if len(wanted) == len(chosen) and (back == np.arange(len(back))).all() else pictures[back],
        timestamps=track.times[chosen],
        indices=chosen,
        fps=track.fps,
        duration=track.duration,
        total=len(track.times),
        backend=used,
        decoded=decoded,
    )


def iter_video(
    path: str | os.PathLike[str], *, fps: float | None = None, timeout: float = 120.0
) -> Iterator[tuple[float, np.ndarray]]:
    """The frames of a file one after the other, as a camera would give them: one is held at a time.

    Args:
        fps: those shown at 0, 1 / fps, 2 / fps ... seconds, each once; by default all.
        timeout: seconds after which listing the file's packets is given up.

    Yields:
        (seconds from the first frame of the file, uint8 [H, W, 3]). Read by PyAV.

    Raises:
        ValueError, ImportError, TimeoutError: as `read_video`.
    """
    if fps is not None and not (isinstance(fps, (int, float)) and np.isfinite(fps) and fps > 0):
        raise ValueError(f"fps must be a number above zero, got {fps!r}.")
    _require("pyav")
    file = _check_file(path)
    with _readable(file):
        track = _Track.of(file, time.monotonic() + timeout)
        wanted = _choose(track, None if fps else len(track.times), fps, None, file)
        done = 0
        with _open(file) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for number, picture in _frames(container, stream, track, file, np.inf):
                if picture is None or done == len(wanted) or number < wanted[done]:
                    continue
                # A broken frame is passed over.
                done = int(np.searchsorted(wanted, number, side="right"))
                if wanted[done - 1] == number:
                    yield float(track.times[number]), _pixels(picture, track)
        if not done:
            raise ValueError(f"'{file}' is damaged: none of its frames can be decoded.")


def available() -> tuple[str, ...]:
    """The backends that are installed."""
    modules = {"decord": "decord", "pyav": "av", "torchcodec": "torchcodec"}
    return tuple(name for name, module in modules.items() if find_spec(module) and find_spec("av"))


def _require(backend: str) -> None:
    if find_spec("av") is None:
        raise ImportError('reading video needs PyAV: pip install "vlmprune[video]".')
    if backend != "auto" and backend not in available():
        raise ImportError(f"{backend} is not installed: pip install {backend}, or choose the backend auto.")


def _check_file(path: str | os.PathLike[str]) -> Path:
    file = Path(path).expanduser()
    if not file.exists():
        raise ValueError(f"no such video: '{file}'.")
    if not file.is_file():
        raise ValueError(f"'{file}' is {'a folder' if file.is_dir() else 'no ordinary file'}: give a video file.")
    if not file.stat().st_size:
        raise ValueError(f"'{file}' is empty.")
    return file


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Turns FFmpeg's errors into one sentence about the file."""
    import av

    try:
        yield
    except PermissionError:
        raise ValueError(f"'{file}' cannot be read: permission denied.") from None
    except av.error.FFmpegError as error:
        if isinstance(error, TimeoutError):
            raise
        raise ValueError(f"'{file}' is not a video that can be read, or it is damaged: {error.strerror}.") from None


@dataclass(frozen=True)
class _Track:
    """The video stream as its packets tell it, frames in order of presentation.

    Attributes:
        pts: int64 [N], in the stream's time base, ascending; None where packets carry no times.
        times: float64 [N], seconds since the first frame.
        keys: int64 [K], numbers of the frames at which decoding can start, ascending.
        start: seconds on the file's own clock at which the first frame is shown.
        known: whether decord is known to give the right frames of such a file.
    """

    pts: np.ndarray | None
    times: np.ndarray
    keys: np.ndarray
    start: float
    fps: float
    duration: float
    width: int
    height: int
    known: bool

    def key(self, number: int, back: int = 0) -> int:
        """The last key frame at or before a frame, or `back` key frames before that."""
        return int(self.keys[max(int(np.searchsorted(self.keys, number, side="right")) - 1 - back, 0)])

    def at(self, number: int) -> int:
        assert self.pts is not None
        return int(self.pts[number])

    def number(self, pts: int | None) -> int | None:
        """The frame shown at `pts`, None where there is none."""
        assert self.pts is not None
        number = len(self.pts) if pts is None else int(np.searchsorted(self.pts, pts))
        return number if number < len(self.pts) and self.pts[number] == pts else None

    @classmethod
    def of(cls, file: Path, end: float) -> _Track:
        with _open(file) as container:
            if not container.streams.video:
                what = "only sound" if container.streams.audio else "no pictures"
                raise ValueError(f"'{file}' is not a video: it holds {what}.")
            stream = container.streams.video[0]
            decoder = stream.codec_context
            if decoder is None or decoder.width < 1 or decoder.height < 1:
                raise ValueError(f"'{file}' is not a video that can be read, or it is damaged: no known codec or size.")
            width, height = decoder.width, decoder.height
            if width * height > MAX_PIXELS:
                raise ValueError(f"'{file}' has frames of {width} x {height} pixels: scale it down first.")
            rate, base = float(stream.average_rate or 0), float(stream.time_base or 0)
            sound = bool(container.streams.audio)
            promised = stream.frames if container.format.name == DECORD_FORMATS[0] else 0
            told = (container.duration or 0) / 1e6
            kind = container.format.name, decoder.name
            known = kind[0] in DECORD_FORMATS and kind[1] in DECORD_CODECS
            seen = list(_packets(container, stream, file, end))
        packets = [(pts, duration, key) for pts, duration, key, shown in seen if shown]
        if not packets:
            raise ValueError(f"'{file}' holds no frames: it is damaged or cut short.")
        if any(pts is None for pts, _, _ in packets) or not base:
            rate = rate or 25.0
            times = np.arange(len(packets)) / rate
            return cls(None, times, np.zeros(1, np.int64), 0.0, rate, len(times) / rate, width, height, False)
        pts = np.array([packet[0] for packet in packets], dtype=np.int64)
        order = np.argsort(pts, kind="stable")
        pts, packets = pts[order], [packets[i] for i in order]
        times = (pts - pts[0]) * base
        last = packets[-1][1] * base or (1 / rate if rate else 0.0)
        duration = float(times[-1]) + last
        if promised > len(seen) or (not sound and told - duration > max(1.0, 0.1 * told)):
            missing = f"of {promised} frames" if promised > len(seen) else f"of {told:.0f} seconds"
            raise ValueError(f"'{file}' is cut short: {missing} only the first {duration:.1f} seconds are there.")
        keys = np.flatnonzero([packet[2] for packet in packets])
        if not len(keys) or keys[0]:
            keys = np.concatenate([[0], keys])
        average = len(pts) / duration if duration > 0 else rate or 25.0
        return cls(pts, times, keys, float(pts[0] * base), average, duration or 1 / average, width, height, known)


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    import av

    # A file object and not the name, which FFmpeg might take for an address or a pattern.
    options = {"format_whitelist": FORMATS, "protocol_whitelist": "none"}
    with open(file, "rb") as stream, av.open(stream, options=options, metadata_errors="replace") as container:
        yield container


def _packets(container: Any, stream: Any, file: Path, end: float) -> Iterator[tuple[int | None, int, bool, bool]]:
    """(time, duration, whether decoding can start here, whether it is shown) of every packet."""
    import av

    try:
        for packet in container.demux(stream):
            if time.monotonic() > end:
                raise TimeoutError(f"reading '{file}' took too long: cut it shorter, or raise the time limit.")
            if packet.dts is not None or packet.size:  # the last one, which flushes the decoder, has neither
                yield packet.pts, packet.duration or 0, packet.is_keyframe, packet.size > 0 and not packet.is_discard
    except (av.error.InvalidDataError, av.error.EOFError, IndexError):  # PyAV fails so on streams that turn up late
        return


def _choose(
    track: _Track, frames: int | None, fps: float | None, indices: Sequence[int] | None, file: Path
) -> np.ndarray:
    total = len(track.times)
    if indices is not None:
        chosen = np.asarray(indices)
        if chosen.ndim != 1 or not len(chosen) or chosen.dtype.kind not in "iu":
            raise ValueError(f"indices must be a list of at least one int, got {indices!r}.")
        wrong = chosen[(chosen < -total) | (chosen >= total)]
        if len(wrong):
            raise ValueError(f"'{file}' has {total} frames, numbered from 0: there is no frame {wrong[0]}.")
        return (chosen % total).astype(np.int64)
    if fps is not None:
        # Frame i is on screen from times[i] to times[i + 1] and is taken if a multiple of 1 / fps falls in between.
        edges = np.ceil(np.append(track.times, track.duration) * fps - 1e-6)
        chosen = np.flatnonzero(edges[1:] > edges[:-1])
        return chosen if len(chosen) else np.zeros(1, np.int64)
    assert frames is not None
    count = min(int(frames), total)
    return np.arange(count, dtype=np.int64) * total // count


def _decode(
    file: Path, track: _Track, wanted: np.ndarray, backend: str, end: float
) -> tuple[np.ndarray, str, int | None]:
    """(frames at `wanted`, ascending and unique; who decoded them; how many it decoded)."""
    if backend == "torchcodec":
        return _torchcodec(file, track, wanted), "torchcodec", None
    if backend == "decord" and not track.known:
        raise ValueError(f"decord gives wrong frames of files like '{file}': choose the backend pyav or auto.")
    if backend == "decord" or (backend == "auto" and track.known and "decord" in available()):
        try:
            # Half of what is left, so that PyAV has a chance too.
            left = end - time.monotonic()
            return _DECORD.read(file, track, wanted, left / 2 if backend == "auto" else left), "decord", None
        except (ValueError, OSError) as error:
            if backend == "decord":
                raise ValueError(f"decord cannot read '{file}': {error}.") from None
    pictures, decoded = _pyav(file, track, wanted, end)
    return pictures, "pyav", decoded


def _pyav(file: Path, track: _Track, wanted: np.ndarray, end: float) -> tuple[np.ndarray, int]:
    """Frames uint8 [K, H, W, 3] at `wanted`, and how many packets went through the decoder."""
    out = np.empty(0, dtype=np.uint8)
    decoded, done, back = 0, 0, 0  # back: key frames to start further back, as a seek may land too late
    while done < len(wanted):
        with _open(file) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            while done < len(wanted):
                start = track.key(wanted[done], back)
                if start:
                    container.seek(int(track.at(start)), stream=stream, backward=True)
                missed = int(wanted[done])
                for number, picture in _frames(container, stream, track, file, end):
                    decoded += picture is None
                    if picture is None or number < wanted[done]:
                        continue
                    if number > wanted[done]:
                        break
                    pixels = _pixels(picture, track)
                    if not done:
                        out = np.empty((len(wanted), *pixels.shape), dtype=np.uint8)
                    out[done] = pixels
                    done, back = done + 1, 0
                    if done == len(wanted) or track.key(wanted[done]) > number:
                        break
                if done < len(wanted) and wanted[done] == missed:
                    if not start:
                        raise ValueError(f"'{file}' is damaged: its frame {missed} cannot be decoded.")
                    back = max(1, 2 * back)
                if done < len(wanted) and not track.key(wanted[done], back):
                    break  # not every format can seek to its beginning: open it again
    return out, decoded


def _frames(container: Any, stream: Any, track: _Track, file: Path, end: float) -> Iterator[tuple[int, Any]]:
    """(number, picture) from where the container stands, and (-1, None) for every packet that was decoded."""
    import av

    serial = 0
    for packet in container.demux(stream):
        if time.monotonic() > end:
            raise TimeoutError(f"decoding '{file}' took too long: ask for fewer frames, or raise the time limit.")
        try:
            pictures = packet.decode()
        except av.error.InvalidDataError:  # a broken packet: the frames behind it may still come
            pictures = []
        if packet.size:
            yield -1, None
        for picture in pictures:
            number = serial if track.pts is None else track.number(picture.pts)
            serial += 1
            if number is not None:
                yield number, picture


def _pixels(picture: Any, track: _Track) -> np.ndarray:
    """uint8 [H, W, 3], RGB, upright as it was held when it was filmed."""
    pixels = picture.to_ndarray(format="rgb24", width=track.width, height=track.height)
    return np.rot90(pixels, round(picture.rotation / 90))


def _torchcodec(file: Path, track: _Track, wanted: np.ndarray) -> np.ndarray:
    try:
        from torchcodec.decoders import VideoDecoder

        decoder = VideoDecoder(str(file), dimension_order="NHWC", num_ffmpeg_threads=0)
        if len(decoder) != len(track.times):
            raise RuntimeError(f"counts {len(decoder)} frames instead of {len(track.times)}")
        batch = decoder.get_frames_at(wanted.tolist())
        off = batch.pts_seconds.numpy() - track.start - track.times[wanted]
        if np.abs(off).max() > 0.25 / track.fps:
            raise RuntimeError(f"gives frame {wanted[np.abs(off).argmax()]} from another time")
        return batch.data.numpy()
    except (RuntimeError, ValueError, IndexError, OSError) as error:
        if "libtorchcodec" in str(error):
            raise ImportError("torchcodec finds no shared FFmpeg libraries: install FFmpeg 4 to 8.") from None
        raise ValueError(f"torchcodec cannot read '{file}': {str(error).strip().splitlines()[0]}.") from None


class _Decord:
    """The child process that runs decord; see `_decord_worker.py`."""

    def __init__(self, script: Path | None = None) -> None:
        self._script = script or Path(__file__).with_name("_decord_worker.py")
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def read(self, file: Path, track: _Track, wanted: np.ndarray, seconds: float) -> np.ndarray:
        """Frames uint8 [K, H, W, 3] at `wanted`.

        Raises:
            ValueError: decord failed, crashed or hung.
        """
        request = {"path": str(file.resolve()), "indices": wanted.tolist(), "count": len(track.times)}
        with self._lock:
            process = self._started()
            assert process.stdin is not None
            assert process.stdout is not None
            hung = threading.Event()
            timer = threading.Timer(max(seconds, 0.1), _end, (process, hung))
            timer.daemon = True
            timer.start()
            whole = False
            try:
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
                head = process.stdout.readline()
                answer = json.loads(head) if head else {}
                if "shape" in answer:
                    out = np.empty(answer["shape"], dtype=np.uint8)
                    whole = process.stdout.readinto(out.reshape(-1).data) == out.nbytes  # type: ignore[attr-defined]
                else:
                    whole = "error" in answer
            except (BrokenPipeError, json.JSONDecodeError):
                answer = {}
            finally:
                timer.cancel()
                if not whole:
                    self.stop()
        if "error" in answer:
            raise ValueError(re.sub(r"\[[\d:]+\] \S+:\d+: ", "", answer["error"]).rstrip("."))
        if not whole:
            raise ValueError("it hung" if hung.is_set() else "it crashed")
        return out

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None or self._owner != os.getpid():
            self._process = subprocess.Popen(
                [sys.executable, str(self._script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the parent, which then stops it
            )
            self._owner = os.getpid()
        return self._process

    def stop(self) -> None:
        """End the process, if this one started it."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.communicate()


def _end(process: subprocess.Popen[bytes], hung: threading.Event) -> None:
    hung.set()
    process.kill()


_DECORD = _Decord()
atexit.register(_DECORD.stop)

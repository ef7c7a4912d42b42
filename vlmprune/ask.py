"""Ask a vision-language model about pictures, with and without pruning, and measure both. Behind `ask` and `demo`."""

from __future__ import annotations

import json
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature, PreTrainedConfig
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from vlmprune.adapters import FAMILIES, introduce
from vlmprune.contract import Keep, Pruner, check_keep
from vlmprune.report import PruneReport
from vlmprune.session import prune

if TYPE_CHECKING:
    from vlmprune.video import Clip

MAX_ASPECT = 200
MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs


@dataclass(frozen=True)
class Chat:
    """A loaded model with its processor. `name` is for display: the hub id, or the folder's own name."""

    model: Any
    processor: Any
    name: str

    def __post_init__(self) -> None:
        introduce(self.model, self.processor)

    @property
    def settings(self) -> str:
        """What a timing depends on: attention backend, dtype, device."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        return f"{self.model.config.get_text_config()._attn_implementation}, {dtype}, {device_name(self.model.device)}"


@dataclass(frozen=True)
class Answer:
    """One greedy answer.

    Attributes:
        text: the answer without the prompt.
        new_tokens: tokens generated.
        first_token_seconds: from the call of `generate()` to its first token, vision tower and selection included.
        total_seconds: the whole `generate()` call.
        report: what pruning did; None for a run without a session.
    """

    text: str
    new_tokens: int
    first_token_seconds: float
    total_seconds: float
    report: PruneReport | None


def parse_keep(text: str) -> Keep:
    """`"64"` is a count, `"0.1"` a ratio.

    Raises:
        ValueError: not a number, or not an allowed one.
    """
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        return check_keep(value)
    return check_keep(text)  # type: ignore[arg-type]  # raises, and names what is allowed


def load_image(file: Path | BinaryIO) -> Image.Image:
    """A picture file as RGB: upright (EXIF), transparency on white, 16-bit and float greyscale scaled to 8 bits.

    Raises:
        ValueError: missing, not a picture, damaged, too large or too thin.
    """
    name = f"'{file}'" if isinstance(file, Path) else "the picture"
    if isinstance(file, Path):
        if not file.exists():
            raise ValueError(f"no such image: {name}.")
        if file.is_dir():
            raise ValueError(f"{name} is a folder: give an image file.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                _check_size(name, *image.size)
                return _rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:
        raise ValueError(f"{name} is larger than {MAX_PIXELS // 10**6} megapixels: scale it down first.") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not an image that Pillow can read.") from None
    except (OSError, SyntaxError, EOFError) as error:  # what Pillow's plug-ins raise on damaged files
        raise ValueError(f"{name} cannot be read as an image: {error}.") from None


def _check_size(name: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{name} has {width * height / 1e6:.0f} megapixels: scale it below {MAX_PIXELS // 10**6}.")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"{name} is {width} x {height} pixels, longer than {MAX_ASPECT} : 1: crop it first.")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        pixels = np.asarray(image, dtype=np.float64)
        low, high = (np.nanmin(pixels), np.nanmax(pixels)) if image.mode == "F" else (0, 65535)
        scaled = np.nan_to_num((pixels - low) / ((high - low) or 1)).clip(0, 1)
        image = Image.fromarray((255 * scaled).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def load_chat(source: str | None = None, device: str | None = None, dtype: str | None = None, **options: Any) -> Chat:
    """Load a checkpoint and its processor, the bundled model without `source`.

    Args:
        source: folder or hub id.
        device: where to put it; by default "cuda" where there is one, else "cpu". Not looked at with a `device_map`.
        dtype: "float32", "bfloat16", "float16" or None for the checkpoint's own.
        options: further arguments of `from_pretrained`, such as `device_map` or `attn_implementation`.

    Raises:
        ValueError: an unknown device, nothing that can be loaded, or an unsupported family.
    """
    place = _device(device)
    if source is None:
        from vlmprune import bundled

        logging.disable_progress_bar()
        try:
            shipped, processor = bundled.load(dtype=getattr(torch, dtype) if dtype else None)
        finally:
            logging.enable_progress_bar()
        return Chat(nn.Module.to(shipped, place), processor, bundled.model_path().name)
    path = Path(source).expanduser()
    if path.is_dir():
        _check_folder(path)
        source = str(path)
    elif path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ValueError(
            f"'{source}' is not a folder: give a model folder or a hub id such as llava-hf/llava-1.5-7b-hf."
        )
    with _loading(source):
        # Read before AutoConfig, which fails on types it has not heard of.
        kind = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
    supported = {kind: family.family for family in FAMILIES for kind in family.model_types}
    if kind not in supported:
        known = ", ".join(f"{family} ({kind})" for kind, family in supported.items())
        raise ValueError(f"'{source}' is a '{kind}' model; supported families: {known}.")
    with _loading(source):
        processor = AutoProcessor.from_pretrained(source)
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype or "auto", **options)
    placed = model.eval() if "device_map" in options else model.eval().to(place)
    return Chat(placed, processor, path.resolve().name if path.is_dir() else source)


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"there is no device '{name}' here: use cpu, or cuda where there is a GPU.") from None
    if device.type == "meta":
        raise ValueError("device 'meta' computes nothing: use cpu or cuda.")
    return device


def _check_folder(path: Path) -> None:
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"'{path}' holds no model: config.json is missing.")
    try:
        kind = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError):
        raise ValueError(f"'{file}' is not a model config: it is no JSON object.") from None
    if kind is None:
        raise ValueError(f"'{file}' is not a model config: it names no model_type.")


@contextmanager
def _loading(source: str) -> Iterator[None]:
    # Loaders raise whatever their formats and the network raise; all of it means the same to the user.
    try:
        yield
    except Exception as error:
        raise ValueError(f"'{source}' cannot be loaded: {_first_sentence(error)}.") from error


def _first_sentence(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).split(". ")[0].rstrip(".:")


def encode(chat: Chat, images: Sequence[Image.Image], question: str, clips: Sequence[Clip] = ()) -> BatchFeature:
    """Inputs of `generate()` for one prompt, on the model's device; see `prompt_inputs`."""
    inputs = prompt_inputs(chat.processor, question, images, clips)
    return inputs.to(chat.model.device, chat.model.dtype)


def prompt_inputs(
    processor: Any, question: str, images: Sequence[Image.Image] = (), clips: Sequence[Clip] = ()
) -> BatchFeature:
    """What a family's processor makes of one prompt: clips, then pictures, then the question.

    The prompt follows the chat template if there is one. Clips are taken as they are, no frame dropped, with their
    times (see `Clip.metadata`). A processor that knows no video gets their frames as so many pictures.

    Raises:
        ValueError: an empty question, or one that holds a placeholder.
    """
    return batch_inputs(processor, [(question, images, clips)])


def batch_inputs(processor: Any, prompts: Sequence[tuple[str, Sequence[Image.Image], Sequence[Clip]]]) -> BatchFeature:
    """What `prompt_inputs` makes, for several prompts of (question, images, clips) at once, padded to one length.

    Raises:
        ValueError: an empty question, or one that holds a placeholder.
    """
    parts = [_prompt(processor, *prompt) for prompt in prompts]
    return written_inputs(
        processor,
        [text for text, _, _ in parts],
        [image for _, images, _ in parts for image in images],
        [clip for _, _, clips in parts for clip in clips],
    )


def written_inputs(
    processor: Any, texts: Sequence[str], images: Sequence[Image.Image], clips: Sequence[Clip] = ()
) -> BatchFeature:
    """What a family's processor makes of prompts that are written out, placeholders and all, padded to one length.

    Args:
        texts: one a prompt.
        images, clips: what the placeholders stand for, in order over all prompts.

    Raises:
        ValueError: clips of unequal length where the family cannot take them.
    """
    # A template that writes the BOS token itself must not get a second one.
    bos = getattr(processor.tokenizer, "bos_token", None)
    extra: dict[str, Any] = {}
    if clips:
        least = getattr(processor.video_processor, "temporal_patch_size", None) or 1
        extra["videos"] = [_frames(clip, least) for clip in clips]
        extra["video_metadata"] = [clip.metadata() for clip in clips]
        extra["do_sample_frames"] = False
    try:
        return processor(
            images=list(images) or None,
            text=list(texts),
            return_tensors="pt",
            padding=len(texts) > 1,
            add_special_tokens=not (bos and texts[0].startswith(bos)),
            **extra,
        )
    except ValueError:
        if len({len(clip) for clip in clips}) > 1:
            raise ValueError("this family takes several videos only with equally many frames each.") from None
        raise


def _prompt(
    processor: Any, question: str, images: Sequence[Image.Image], clips: Sequence[Clip]
) -> tuple[str, list[Image.Image], list[Clip]]:
    """The text of a prompt, and the images and clips that its placeholders stand for."""
    clips, images = list(clips), list(images)
    if clips and getattr(processor, "video_processor", None) is None:
        clips, images = [], [*(frame for clip in clips for frame in clip.images), *images]
    marks = {"video": getattr(processor, "video_token", None) or "<video>"} if clips else {}
    marks["image"] = getattr(processor, "image_token", None) or "<image>"
    if not question.strip():
        raise ValueError("the question is empty.")
    for mark in marks.values():
        if mark in question:
            raise ValueError(f"the question must not hold '{mark}': images and videos are put before it.")
    kinds = ["video"] * len(clips) + ["image"] * len(images)
    if getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None):
        content = [*({"type": kind} for kind in kinds), {"type": "text", "text": question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    else:
        prompt = "".join(f"{marks[kind]}\n" for kind in kinds) + question
    return prompt, images, clips


def _frames(clip: Clip, least: int) -> torch.Tensor:
    """uint8 [T, 3, H, W]; the last frame is repeated where there are fewer than `least`."""
    frames = torch.from_numpy(np.ascontiguousarray(clip.frames)).movedim(-1, 1)
    return torch.cat([frames, *[frames[-1:]] * (least - len(frames))])


class _Clock(BaseStreamer):
    """Times at which `generate()` hands on the prompt and then each token (on a GPU: when the token has arrived)."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def answer(
    chat: Chat,
    inputs: BatchFeature,
    pruner: Pruner | None = None,
    max_new_tokens: int = 64,
    min_new_tokens: int | None = None,
) -> Answer:
    """Generate one greedy answer, under a session if a pruner is given, and time it."""
    if pruner is None:
        return _generate(chat, inputs, max_new_tokens, min_new_tokens)
    with prune(chat.model, pruner) as session:
        done = _generate(chat, inputs, max_new_tokens, min_new_tokens)
        return replace(done, report=session.last)


def _generate(chat: Chat, inputs: BatchFeature, max_new_tokens: int, min_new_tokens: int | None = None) -> Answer:
    clock = _Clock()
    with quiet(), torch.inference_mode():
        start = time.perf_counter()
        ids = chat.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            do_sample=False,
            num_beams=1,
            streamer=clock,
        )
        end = time.perf_counter()
    new = ids[0, inputs["input_ids"].shape[1] :]
    text = chat.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    return Answer(text, len(new), clock.times[1] - start, end - start, None)


@contextmanager
def quiet() -> Iterator[None]:
    """Without remarks on sampling settings in a checkpoint's generation config, which are of no use here."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def compare(
    chat: Chat, inputs: BatchFeature, pruner: Pruner, max_new_tokens: int = 64, repeats: int = 3, warm_up: bool = True
) -> tuple[Answer, Answer]:
    """(unpruned, pruned) answers to the same inputs on the same model, device and attention backend.

    The two take turns, `repeats` times after an untimed turn each; times are medians, the texts those of the last turn.
    """
    full, pruned = [], []
    for _ in range(repeats + warm_up):
        full.append(answer(chat, inputs, None, max_new_tokens))
        pruned.append(answer(chat, inputs, pruner, max_new_tokens))
    return _median(full[warm_up:]), _median(pruned[warm_up:])


def _median(runs: Sequence[Answer]) -> Answer:
    return replace(
        runs[-1],
        first_token_seconds=statistics.median(run.first_token_seconds for run in runs),
        total_seconds=statistics.median(run.total_seconds for run in runs),
    )


def device_name(device: torch.device) -> str:
    """`"cuda: NVIDIA H200"` or `"cpu (2 threads)"`."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"cpu ({threads} thread{'s' * (threads > 1)})" if device.type == "cpu" else device.type

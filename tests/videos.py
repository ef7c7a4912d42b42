"""Video files for tests, written with PyAV, and processors for the tiny models of `families`."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from families import END, IMAGE, PINPOINTS, START, VIDEO
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    GotOcr2ImageProcessor,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaNextImageProcessor,
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

BITS = 8


def picture(number: int, height: int = 96, width: int = 128) -> np.ndarray:
    """A frame, uint8 [H, W, 3], that shows its number: a row of white squares for the bits, and a tint."""
    frame = np.zeros((height, width, 3), np.uint8)
    frame[..., 0] = number * 7 % 200
    frame[..., 1] = np.linspace(0, 200, width).astype(np.uint8)
    step = width // BITS
    for bit in range(BITS):
        frame[8:24, bit * step + 2 : (bit + 1) * step - 2] = 255 * (number >> bit & 1)
    return frame


def number(frame: np.ndarray) -> int:
    """The number that a decoded frame shows."""
    step = frame.shape[1] // BITS
    lit = [frame[12:20, bit * step + 4 : (bit + 1) * step - 4].mean() > 128 for bit in range(BITS)]
    return sum(1 << bit for bit, on in enumerate(lit) if on)


def write(
    path: Path,
    codec: str = "libx264",
    frames: int = 60,
    fps: float = 10,
    times: Any = None,
    size: tuple[int, int] = (96, 128),
    rotate: int = 0,
    **options: str,
) -> Path:
    """A video file of `picture(0)`, `picture(1)` ..., shown at `times` (seconds) or at a constant rate."""
    base = Fraction(1, 1000)
    with av.open(str(path), "w", options={k: options.pop(k) for k in ("movflags",) if k in options}) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.gop_size = int(options.pop("gop", 12))
        stream.codec_context.time_base = base
        stream.options = options
        if rotate:
            stream.set_display_rotation(rotate)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(i, *size), format="rgb24")
            frame.pts, frame.time_base = round(1000 * (i / fps if times is None else times[i])), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def tokenizer(**names: str) -> PreTrainedTokenizerFast:
    """One token a character, and the tiny models' special tokens under a family's names."""
    ids = {"start": START, "end": END, "video": VIDEO, "image": IMAGE}
    special = {names.get(kind, f"<|{kind}|>"): number for kind, number in ids.items()}
    vocabulary = {"<pad>": 0} | {chr(31 + i): i for i in range(1, 96)} | special
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", additional_special_tokens=[*special], padding_side="left"
    )


def processor(family: str) -> Any:
    """A processor like those of the family's checkpoints, for its tiny model."""
    tiles = {"size": {"height": 16, "width": 16}, "crop_size": {"height": 16, "width": 16}}
    llava = {"image": "<image>", "video": "<video>"}
    if family.startswith("qwen"):
        tokens = tokenizer(image="<|image_pad|>", video="<|video_pad|>", start="<|vision_start|>", end="<|vision_end|>")
        grid = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
        grid |= {"size": {"shortest_edge": 64, "longest_edge": 10**6}}
        kinds: dict[str, Any] = {
            "qwen2-vl": (Qwen2VLProcessor, Qwen2VLVideoProcessor),
            "qwen2.5-vl": (Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
            "qwen3-vl": (Qwen3VLProcessor, Qwen3VLVideoProcessor),
            "qwen3-vl-moe": (Qwen3VLProcessor, Qwen3VLVideoProcessor),
        }
        kind, video = kinds[family]
        return kind(Qwen2VLImageProcessor(**grid), tokens, video(**grid), chat_template=QWEN_TEMPLATE)
    if family == "internvl":
        tokens = tokenizer(image="<IMG_CONTEXT>", video="<video>", start="<img>", end="</img>")
        names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
        for name, token in (names | {"video_token": "<video>"}).items():
            setattr(tokens, name, token)
            setattr(tokens, f"{name}_id", tokens.convert_tokens_to_ids(token))
        square = {"size": {"height": 24, "width": 24}}
        return InternVLProcessor(
            GotOcr2ImageProcessor(**square), tokens, InternVLVideoProcessor(**square), image_seq_length=9
        )
    if family == "llava-onevision":
        return LlavaOnevisionProcessor(
            LlavaOnevisionImageProcessor(size=tiles["size"], image_grid_pinpoints=PINPOINTS),
            tokenizer(**llava),
            LlavaOnevisionVideoProcessor(size=tiles["size"]),
            num_image_tokens=16,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_2",
        )
    if family == "llava-next-video":
        return LlavaNextVideoProcessor(
            LlavaNextVideoVideoProcessor(**tiles),
            LlavaNextImageProcessor(**tiles, image_grid_pinpoints=PINPOINTS),
            tokenizer(**llava),
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    size = {"size": {"height": 40, "width": 40}, "crop_size": {"height": 40, "width": 40}}
    return LlavaProcessor(
        CLIPImageProcessor(**size),
        tokenizer(**llava),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


QWEN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'video') %}<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

"""What the trainers of small modules share: questions and answers (bundled scenes or clips, or a file of one's own),
the model, and settings from the command line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from vlmprune import bundled
from vlmprune.ask import batch_inputs, load_image
from vlmprune.video import Clip, read_video

S = TypeVar("S")


CLIPS = "digit-clips"
FRAMES = 16  # read of a file of one's own

Picture: TypeAlias = "Image.Image | Clip"


class Questions(Dataset):
    """(picture, question, answer) of drawn scenes, of drawn clips ("digit-clips"), or of a JSON Lines file."""

    def __init__(self, data: str | None, split: str = "train", scenes: int = 0, seed: int = 0) -> None:
        self.folder = Path(data).parent if data not in (None, CLIPS) else None
        if data is None:
            from vlmprune.scenes import digit_scenes

            self.rows = [
                {"image": scene.image, "question": question.text, "answer": question.answer}
                for scene in digit_scenes(split, scenes, seed)  # type: ignore[arg-type]
                for question in scene.questions
            ]
        elif data == CLIPS:
            from vlmprune.video_scenes import digit_clips

            self.rows = [
                {"video": Clip.of(clip.frames, clip.fps), "question": question.text, "answer": question.answer}
                for clip in digit_clips(split, scenes, seed)  # type: ignore[arg-type]
                for question in clip.questions
            ]
        else:
            lines = Path(data).read_text(encoding="utf-8").splitlines()
            self.rows = [json.loads(line) for line in lines if line.strip()]
            # Every tenth is held out for measuring.
            self.rows = [row for i, row in enumerate(self.rows) if (i % 10 == 0) == (split != "train")]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Picture, str, str]:
        row = self.rows[index]
        picture = row["video"] if "video" in row else row["image"]
        if self.folder is not None:
            path = self.folder / picture
            picture = read_video(path, FRAMES) if "video" in row else load_image(path)
        return picture, row["question"], row["answer"]


def collate(processor: Any, samples: Sequence[tuple[Picture, str, str]]) -> dict[str, Tensor]:
    """Left-padded prompts with their answers appended; `labels` are -100 but for the answers."""
    prompts: list[tuple[str, list[Image.Image], list[Clip]]] = [
        (text, [], [picture]) if isinstance(picture, Clip) else (text, [picture], []) for picture, text, _ in samples
    ]
    inputs = dict(batch_inputs(processor, prompts))
    tokenizer = processor.tokenizer
    answers = [
        [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for _, _, answer in samples
    ]
    width = max(map(len, answers))
    tail = torch.tensor([ids + [-100] * (width - len(ids)) for ids in answers])
    prompt = inputs["input_ids"].shape
    real = (tail != -100).long()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    inputs["labels"] = torch.cat([torch.full(prompt, -100), tail], 1)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tail.masked_fill(real == 0, pad)], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], real], 1)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], torch.zeros_like(tail)], 1)
    return inputs


def load(name: str | None, data: str | None = None) -> tuple[nn.Module, Any]:
    """A model with eager attention, the bundled one for such data by default, and its processor, which pads on the
    left."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model: Any
    if name is None:
        model, processor = bundled.load_video() if data == CLIPS else bundled.load()
        model.set_attn_implementation("eager")
    else:
        model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", attn_implementation="eager").eval()
        processor = AutoProcessor.from_pretrained(name)
    processor.tokenizer.padding_side = "left"
    return model, processor


def from_arguments(kind: type[S], description: str | None) -> S:
    """Settings, a dataclass, from flags named after its fields, over those of a JSON file (`--config`)."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="JSON file of settings; flags override it")
    kinds, fields = typing.get_type_hints(kind), dataclasses.fields(kind)  # type: ignore[arg-type]
    for item in fields:
        flag, default = f"--{item.name.replace('_', '-')}", item.default
        if isinstance(default, bool):
            parser.add_argument(flag, action="store_true", default=None)
        elif isinstance(default, tuple):
            any_number = Ellipsis in typing.get_args(kinds[item.name])
            width = "+" if any_number else len(default)
            parser.add_argument(flag, type=type(default[0]), nargs=width, help=f"default {default}")
        else:
            parser.add_argument(flag, type=str if default is None else type(default), help=f"default {default}")
    given = vars(parser.parse_args())
    file = given.pop("config")
    settings = json.loads(file.read_text(encoding="utf-8")) if file else {}
    settings |= {name: value for name, value in given.items() if value is not None}
    if unknown := sorted(set(settings) - {item.name for item in fields}):
        parser.error(f"unknown settings {', '.join(unknown)}")
    return kind(
        **{
            name: Path(value) if name == "out" else tuple(value) if isinstance(value, list) else value
            for name, value in settings.items()
        }
    )

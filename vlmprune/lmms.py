"""A model for lmms-eval: any supported checkpoint under any pruner.

lmms-eval finds it by the entry-point group `lmms_eval.models` once both packages are installed:

    lmms-eval --model vlmprune --model_args pretrained=llava-hf/llava-1.5-7b-hf,pruner=divprune,keep=0.1 --tasks pope

`vlmprune_llava`, `vlmprune_qwen_vl` and `vlmprune_internvl` are other names of the same model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm

ALIASES = ("vlmprune_llava", "vlmprune_qwen_vl", "vlmprune_internvl")


def manifest() -> ModelManifest:
    """What the entry point gives lmms-eval."""
    return ModelManifest(model_id="vlmprune", chat_class_path="vlmprune.lmms.VlmPrune", aliases=ALIASES)


class VlmPrune(lmms):
    """A checkpoint whose every `generate()` runs in a pruning session.

    Args:
        pretrained: folder or hub id, or "bundled".
        pruner: a method's name, or "none" for the unpruned model.
        keep, positions: as everywhere; the method's own by default.
        batch_size: prompts a batch.
        device, dtype, device_map, attn_implementation: how the checkpoint is loaded.
        max_num_frames: frames taken of a video, evenly.
        settings: further fields of the method, such as `layer=2`.

    Raises:
        ValueError: whatever `vlmprune.create_pruner` and `vlmprune.prune` refuse, before the first sample.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "bundled",
        pruner: str = "divprune",
        keep: float | int | None = None,
        positions: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        device_map: str | None = None,
        attn_implementation: str | None = None,
        max_num_frames: int = 8,
        max_batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        from accelerate import Accelerator

        from vlmprune import create_pruner, prune
        from vlmprune.ask import load_chat

        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}.")
        self.batch_size = int(batch_size)
        self.max_num_frames = max_num_frames
        fields = {key: value for key, value in (("keep", keep), ("positions", positions)) if value is not None}
        self.pruner = None if pruner == "none" else create_pruner(pruner, **fields, **settings)
        if self._world_size > 1:
            device = str(self.accelerator.device)
        wanted = {"device_map": device_map, "attn_implementation": attn_implementation}
        options = {key: value for key, value in wanted.items() if value is not None}
        self.chat = load_chat(None if pretrained == "bundled" else pretrained, device, dtype, **options)
        tokenizer = self.chat.processor.tokenizer
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if self.pruner is not None:
            prune(self.chat.model, self.pruner).close()

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers to `requests`, in order; those with the same generation settings are batched."""
        answers: list[str] = [""] * len(requests)
        bar = tqdm(total=len(requests), disable=self.rank != 0, desc=str(self.pruner or "unpruned"))
        for places in self._batches(requests):
            prompts = [self._messages(requests[place]) for place in places]
            settings = requests[places[0]].args[2]
            for place, text in zip(places, self._answer(prompts, settings)):
                answers[place] = text
                self.cache_hook.add_partial("generate_until", (requests[place].args[0], settings), text)
            bar.update(len(places))
        bar.close()
        return answers

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Refused: a prompt that is pruned once and scored for several continuations needs a cache of its own."""
        raise NotImplementedError("vlmprune answers generate_until tasks: choose the task's generative form.")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Refused, see `loglikelihood`."""
        raise NotImplementedError("vlmprune answers single-round generate_until tasks.")

    def _batches(self, requests: Sequence[Instance]) -> Iterator[list[int]]:
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(repr(request.args[2]), []).append(place)
        for places in groups.values():
            places.sort(key=lambda place: len(requests[place].args[0]), reverse=True)
            for first in range(0, len(places), self.batch_size):
                yield places[first : first + self.batch_size]

    def _messages(self, request: Instance) -> list[dict[str, Any]]:
        _, to_messages, _, number, task, split = request.args
        return to_messages(self.task_dict[task][split][number])

    def _answer(self, prompts: Sequence[list[dict[str, Any]]], settings: dict[str, Any]) -> list[str]:
        from vlmprune import prune
        from vlmprune.ask import written_inputs

        written = [self._write(messages) for messages in prompts]
        inputs = written_inputs(
            self.chat.processor,
            [text for text, _, _ in written],
            [image for _, images, _ in written for image in images],
            [clip for _, _, clips in written for clip in clips],
        ).to(self.chat.model.device, self.chat.model.dtype)
        session: Any = nullcontext() if self.pruner is None else prune(self.chat.model, self.pruner)
        with session, torch.inference_mode():
            ids = self.chat.model.generate(**inputs, **_generation(settings))
        new = ids[:, inputs["input_ids"].shape[1] :]
        replies = self.chat.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [_until(reply.strip(), settings.get("until")) for reply in replies]

    def _write(self, messages: list[dict[str, Any]]) -> tuple[str, list[Image.Image], list[Any]]:
        """The templated text of a conversation, its images, and its clips, in order."""
        from vlmprune.video import read_video

        processor = self.chat.processor
        images: list[Image.Image] = []
        clips: list[Any] = []
        turns = []
        for message in messages:
            content: list[dict[str, Any]] = []
            for part in message["content"]:
                kind = part["type"]
                if kind == "text":
                    content.append({"type": "text", "text": part["text"]})
                elif kind == "image":
                    images.append(_picture(part["url"]))
                    content.append({"type": "image"})
                elif kind == "video":
                    clip = read_video(part["url"], frames=self.max_num_frames)
                    if getattr(processor, "video_processor", None) is None:  # a family that knows images only
                        images += clip.images
                        content += [{"type": "image"}] * len(clip)
                    else:
                        clips.append(clip)
                        content.append({"type": "video"})
                else:
                    raise ValueError(f"vlmprune takes text, images and videos, not {kind!r}.")
            turns.append({"role": message["role"], "content": content})
        text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return text, images, clips


def _generation(settings: dict[str, Any]) -> dict[str, Any]:
    """`generate()` options of a task's `generation_kwargs`; greedy unless it asks for a temperature."""
    warm = float(settings.get("temperature") or 0) > 0
    options = {
        "max_new_tokens": int(settings.get("max_new_tokens", 128)),
        "num_beams": int(settings.get("num_beams") or 1),
        "do_sample": warm,
    }
    if warm:
        options |= {key: settings[key] for key in ("temperature", "top_p", "top_k") if settings.get(key) is not None}
    return options


def _until(reply: str, marks: str | Sequence[str] | None) -> str:
    for mark in [marks] if isinstance(marks, str) else marks or []:
        reply = reply.split(mark)[0]
    return reply.strip()


def _picture(source: Any) -> Image.Image:
    from vlmprune.ask import load_image

    return source.convert("RGB") if isinstance(source, Image.Image) else load_image(Path(source))

"""The one table of cases: every family and every pruner, through which the generic tests go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    SiglipVisionConfig,
)

import vlmprune

IMAGE, PAD, VOCAB = 99, 0, 100


@dataclass
class FamilyCase:
    """A tiny random model and what turns a list of prompts into its inputs.

    A prompt is a list of ints (text tokens) and of "image"; `inputs(prompts, images)` pads on the left.
    """

    name: str
    build: Callable[[], PreTrainedModel]
    tokens_per_image: int
    image_size: int

    def model(self, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        torch.manual_seed(0)
        model = self.build().eval().to(dtype)
        for parameter in model.parameters():  # livelier than the default initialisation, so that tokens matter
            if parameter.ndim > 1:
                parameter.data.mul_(4)
        model.set_attn_implementation(attention)
        model.generation_config.pad_token_id = PAD
        return model

    def inputs(self, prompts: list[list[Any]], seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Prompts hold text ids and ("image", number): the same number is the same picture in every batch."""
        rows, pixels = [], []
        for prompt in prompts:
            row: list[int] = []
            for part in prompt:
                if isinstance(part, tuple):
                    generator = torch.Generator().manual_seed(1000 * seed + part[1])
                    pixels.append(torch.randn(3, self.image_size, self.image_size, generator=generator))
                    row += [IMAGE] * self.tokens_per_image
                else:
                    row.append(part)
            rows.append(row)
        width = max(len(row) for row in rows)
        ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if pixels:
            inputs["pixel_values"] = torch.stack(pixels).to(dtype)
        return inputs


def clip(**changes: Any) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 40,
            "patch_size": 8,
            **changes,
        }
    )


def decoder(config: type, **changes: Any) -> Any:
    return config(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "pad_token_id": PAD,
            "bos_token_id": None,
            "eos_token_id": None,
            **changes,
        }
    )


def llava(vision: Any, text: Any, **changes: Any) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, **changes)
    )


def siglip() -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=36,
        patch_size=6,
    )


FAMILIES = {
    case.name: case
    for case in (
        FamilyCase("llava-clip-llama", lambda: llava(clip(), decoder(LlamaConfig)), 25, 40),
        FamilyCase(
            "llava-siglip-qwen2",
            lambda: llava(
                siglip(), decoder(Qwen2Config), vision_feature_select_strategy="full", vision_feature_layer=-1
            ),
            36,
            36,
        ),
        # A window shorter than the unpruned prompt: what a query sees must still be counted in original columns.
        FamilyCase(
            "llava-clip-mistral-window",
            lambda: llava(clip(), decoder(MistralConfig, sliding_window=20)),
            25,
            40,
        ),
    )
}


@dataclass(kw_only=True)
class Staged(vlmprune.Pruner):
    """Keeps the longest rows, a share of the item's original tokens behind each stage: tests the stages themselves."""

    keep: vlmprune.Keep = 0.3
    schedule: tuple[tuple[int, float], ...] = ((1, 0.5), (2, 0.2))

    name: ClassVar[str] = "staged"

    def layers(self, depth: int) -> tuple[int, ...]:
        return tuple(layer for layer, _ in self.schedule)

    def budget(self, counts: Sequence[int], layer: int = 0, depth: int = 1) -> list[int]:
        return counts if self.keep == 1.0 else [round(dict(self.schedule)[layer] * count) for count in counts]

    def select(self, tokens: vlmprune.VisualTokens, budget: torch.Tensor) -> vlmprune.Selection:
        score = tokens.features.float().norm(dim=-1).masked_fill(~tokens.valid, -1)
        index = score.sort(dim=1, descending=True, stable=True).indices[:, : int(budget.max())]
        return vlmprune.Selection(index.masked_fill(torch.arange(index.shape[1]) >= budget[:, None], -1))


def composed(first: str = "divprune", keep: vlmprune.Keep = 0.6, positions: Any = "original") -> vlmprune.Compose:
    """The boundary by one method, two decoder layers by another."""
    return vlmprune.Compose(
        vlmprune.create_pruner(first, keep=keep, positions=positions),
        Staged(keep=1.0 if keep == 1.0 else 0.3, positions=positions),
    )


@dataclass
class PrunerCase:
    """A pruner and two settings of it, easy and hard, each with `keep` well below 1."""

    name: str
    settings: tuple[dict[str, Any], ...] = field(default=({"keep": 0.3}, {"keep": 4}))
    cls: Callable[..., vlmprune.Pruner] | None = None

    def make(self, hard: bool = False, **changes: Any) -> vlmprune.Pruner:
        fields = {**self.settings[hard], **changes}
        return self.cls(**fields) if self.cls else vlmprune.create_pruner(self.name, **fields)


PRUNERS = {
    case.name: case
    for case in (
        PrunerCase("divprune"),
        PrunerCase("fastv", ({"keep": 0.5, "layer": 1}, {"keep": 20})),
        PrunerCase("pool"),
        PrunerCase("random", ({"keep": 0.3, "seed": 3}, {"keep": 4})),
        PrunerCase("uniform"),
        # Two stages inside the decoder; the boundary and a stage that removes every visual token.
        PrunerCase("staged", ({}, {"schedule": ((0, 0.5), (1, 0.25), (2, 0.0))}), Staged),
        PrunerCase("compose", ({}, {"first": "pool"}), composed),
    )
}

# Batches of prompts: unequal lengths, no image, one, several, neighbours, image first and last.
BATCHES: dict[str, list[list[Any]]] = {
    "one": [[1, 2, ("image", 0), 3, 4, 5]],
    "three": [[1, ("image", 0), 2, ("image", 1), ("image", 2), 3]],
    "text": [[1, 2, 3, 4]],
    "unequal": [
        [1, 2, ("image", 0), 3, 4, 5],
        [7, 8, 9],
        [("image", 1), 5, ("image", 2), 6, ("image", 0)],
        [4, ("image", 2), 3, 3],
    ],
}

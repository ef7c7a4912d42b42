"""Tiny random models of every family, and what turns prompts into their inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SiglipVisionConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

PAD, VOCAB = 0, 100
START, END, VIDEO, IMAGE = 96, 97, 98, 99
PLACEHOLDERS = (IMAGE, VIDEO)
SPECIAL = [START, END, VIDEO, IMAGE]

Part = int | tuple[str, int]
"""A text token, or ("image", number) or ("video", number): the same number is the same picture in every prompt."""


@dataclass
class FamilyCase:
    """A tiny random model and its inputs.

    Attributes:
        build: makes the model.
        tokens: visual tokens of image 0, 1, 2.
        video_tokens: of video 0, 1; empty where the family has no videos.
        lacks: signals that the family does not give.
        earliest: first decoder layer above 0 before which tokens may leave.
    """

    name: str
    build: Callable[[], PreTrainedModel]
    tokens: tuple[int, int, int]
    video_tokens: tuple[int, ...] = ()
    lacks: frozenset[str] = frozenset()
    earliest: int = 1
    positions: ClassVar[tuple[str, ...]] = ("original", "compact")

    def __str__(self) -> str:
        return self.name

    def model(self, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        torch.manual_seed(0)
        model = self.build().eval().to(dtype)
        for parameter in model.parameters():  # livelier than the default initialisation, so that tokens matter
            if parameter.ndim > 1:
                parameter.data.mul_(4)
        model.set_attn_implementation(attention)
        model.generation_config.pad_token_id = PAD
        return model

    def count(self, kind: str, number: int, prompt: list[Part]) -> int:
        return (self.tokens if kind == "image" else self.video_tokens)[number]

    def part(self, kind: str, number: int, prompt: list[Part]) -> list[int]:
        """What stands in the prompt for an image or a video."""
        return [IMAGE if kind == "image" else VIDEO] * self.count(kind, number, prompt)

    def spans(self, prompts: list[list[Part]]) -> list[tuple[int, int, int]]:
        """(row, column of the first visual token, visual tokens) of every item, left padding included."""
        rows = self.rows(prompts)
        width = max(map(len, rows))
        spans = []
        for number, (prompt, row) in enumerate(zip(prompts, rows)):
            column = width - len(row)
            for part in prompt:
                ids = [part] if isinstance(part, int) else self.part(*part, prompt)
                placed = [at for at, token in enumerate(ids) if token in PLACEHOLDERS]
                if placed:
                    spans.append((number, column + placed[0], len(placed)))
                column += len(ids)
        return spans

    def rows(self, prompts: list[list[Part]]) -> list[list[int]]:
        return [
            [token for part in prompt for token in ([part] if isinstance(part, int) else self.part(*part, prompt))]
            for prompt in prompts
        ]

    def inputs(self, prompts: list[list[Part]], seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Model inputs, padded on the left; `seed` changes all pictures."""
        rows = self.rows(prompts)
        width = max(map(len, rows))
        ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, **self.marks(ids)}
        for kind in ("image", "video"):
            parts = [part for prompt in prompts for part in prompt if isinstance(part, tuple) and part[0] == kind]
            if parts:
                numbers = [number for _, number in parts]
                inputs |= self.pixels(kind, numbers, _generators(seed, kind, numbers), prompts)
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}

    def marks(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """What else the model is told of `ids`, column by column."""
        return {}

    def pixels(
        self, kind: str, numbers: list[int], generators: Iterator[torch.Generator], prompts: list[list[Part]]
    ) -> dict[str, torch.Tensor]:
        raise NotImplementedError


def _generators(seed: int, kind: str, numbers: list[int]) -> Iterator[torch.Generator]:
    for number in numbers:
        yield torch.Generator().manual_seed(1000 * seed + 100 * (kind == "video") + number)


@dataclass
class LlavaCase(FamilyCase):
    size: int = 40

    def pixels(self, kind, numbers, generators, prompts):
        return {"pixel_values": torch.stack([torch.randn(3, self.size, self.size, generator=g) for g in generators])}


@dataclass
class LlavaNextCase(FamilyCase):
    """Tiles of 16 x 16 pixels, 4 x 4 patches; images with 3, 5 and 3 pictures, thumbnail included."""

    sizes: tuple[tuple[int, int], ...] = ((16, 32), (30, 18), (12, 14))
    pictures: tuple[int, ...] = (3, 5, 3)
    frames: int = 3

    def pixels(self, kind, numbers, generators, prompts):
        if kind == "video":
            videos = [torch.randn(self.frames, 3, 16, 16, generator=g) for g in generators]
            return {"pixel_values_videos": torch.stack(videos)}
        tiles = torch.zeros(len(numbers), max(self.pictures), 3, 16, 16)
        for tile, number, generator in zip(tiles, numbers, generators):
            tile[: self.pictures[number]] = torch.randn(self.pictures[number], 3, 16, 16, generator=generator)
        return {"pixel_values": tiles, "image_sizes": torch.tensor([self.sizes[number] for number in numbers])}


@dataclass
class LlavaOnevisionCase(LlavaNextCase):
    """Several images in one prompt have no tiles."""

    def count(self, kind, number, prompt):
        images = sum(isinstance(part, tuple) and part[0] == "image" for part in prompt)
        return 17 if kind == "image" and images > 1 else super().count(kind, number, prompt)

    def pixels(self, kind, numbers, generators, prompts):
        inputs = super().pixels(kind, numbers, generators, prompts)
        if kind == "image":
            counts = [sum(isinstance(part, tuple) and part[0] == "image" for part in prompt) for prompt in prompts]
            inputs["batch_num_images"] = torch.tensor(counts)
        return inputs


@dataclass
class VideoLlavaCase(LlavaCase):
    """Videos of 3 frames, a CLS token and 4 x 4 patches each."""

    def pixels(self, kind, numbers, generators, prompts):
        if kind == "video":
            videos = [torch.randn(3, 3, self.size, self.size, generator=g) for g in generators]
            return {"pixel_values_videos": torch.stack(videos)}
        made = super().pixels(kind, numbers, generators, prompts)
        return made if VIDEO_LLAVA_TAKES in made else {VIDEO_LLAVA_TAKES: made["pixel_values"]}


VIDEO_LLAVA_TAKES = next(
    name
    for name in ("pixel_values", "pixel_values_images")  # up to transformers 5.22
    if name in inspect.signature(VideoLlavaForConditionalGeneration.forward).parameters
)


@dataclass
class QwenCase(FamilyCase):
    """Grids (frames, rows, columns) of patches; placeholders between vision start and end tokens."""

    grids: tuple[tuple[int, int, int], ...] = ((1, 6, 8), (1, 4, 6), (1, 8, 6))
    video_grids: tuple[tuple[int, int, int], ...] = ((3, 4, 4), (2, 6, 4))
    stamps: bool = False  # a time stamp before every frame
    positions: ClassVar[tuple[str, ...]] = ("original",)

    def part(self, kind, number, prompt):
        frames, rows, cols = (self.grids if kind == "image" else self.video_grids)[number]
        token = IMAGE if kind == "image" else VIDEO
        if kind == "video" and self.stamps:
            run = [START, *[token] * (rows * cols // 4), END]
            return [token for frame in range(frames) for token in (80 + frame, *run)]
        return [START, *[token] * (frames * rows * cols // 4), END]

    def marks(self, ids):
        return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}

    def pixels(self, kind, numbers, generators, prompts):
        grids = torch.tensor([(self.grids if kind == "image" else self.video_grids)[number] for number in numbers])
        patches = [torch.randn(int(grid.prod()), 3 * 2 * 4 * 4, generator=g) for grid, g in zip(grids, generators)]
        name = "pixel_values" if kind == "image" else "pixel_values_videos"
        return {name: torch.cat(patches), f"{kind}_grid_thw": grids}


@dataclass
class InternVLCase(FamilyCase):
    """Tiles of 6 x 6 patches, 3 x 3 tokens; images of 3, 1 and 2 tiles, between start and end tokens."""

    def part(self, kind, number, prompt):
        return [START, *super().part(kind, number, prompt), END]

    def pixels(self, kind, numbers, generators, prompts):
        counts = [self.tokens[number] // 9 for number in numbers]
        tiles = [torch.randn(count, 3, 24, 24, generator=g) for count, g in zip(counts, generators)]
        return {"pixel_values": torch.cat(tiles)}


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


def siglip(**changes: Any) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 36,
            "patch_size": 6,
            **changes,
        }
    )


TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
}


def decoder(config: type, **changes: Any) -> Any:
    return config(**{**TEXT, **changes})


def llava(vision: Any, text: Any, **changes: Any) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, **changes)
    )


TILES = {"image_size": 16, "patch_size": 4}
PINPOINTS = [[16, 32], [32, 16], [32, 32]]


def llava_next() -> PreTrainedModel:
    return LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            vision_config=clip(**TILES),
            text_config=decoder(LlamaConfig),
            image_token_index=IMAGE,
            image_grid_pinpoints=PINPOINTS,
        )
    )


def llava_next_video() -> PreTrainedModel:
    return LlavaNextVideoForConditionalGeneration(
        LlavaNextVideoConfig(
            vision_config=clip(**TILES),
            text_config=decoder(LlamaConfig),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=PINPOINTS,
            spatial_pool_mode="average",
        )
    )


def llava_onevision() -> PreTrainedModel:
    return LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            vision_config=siglip(**TILES, vision_use_head=False),
            text_config=decoder(Qwen2Config),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=PINPOINTS,
            vision_aspect_ratio="anyres_max_2",
        )
    )


def video_llava() -> PreTrainedModel:
    return VideoLlavaForConditionalGeneration(
        VideoLlavaConfig(
            vision_config=clip(**TILES),
            text_config=decoder(LlamaConfig),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
        )
    )


TOWER = {"depth": 3, "num_heads": 4, "in_channels": 3, "patch_size": 4, "temporal_patch_size": 2}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}


def qwen(model: type, config: type, vision: dict[str, Any], **text: Any) -> PreTrainedModel:
    return model(
        config(
            vision_config={**TOWER, **vision},
            text_config={**TEXT, "rope_parameters": MROPE, **text},
            **TOKENS,
        )
    )


def qwen2_vl() -> PreTrainedModel:
    vision = {"embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2}
    return qwen(Qwen2VLForConditionalGeneration, Qwen2VLConfig, vision)


def qwen2_5_vl() -> PreTrainedModel:
    vision = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 48}
    windows = {"window_size": 16, "fullatt_block_indexes": [1]}
    return qwen(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, {**vision, **windows})


QWEN3_TOWER = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 48, "num_position_embeddings": 64}


def qwen3_vl() -> PreTrainedModel:
    vision = {**QWEN3_TOWER, "deepstack_visual_indexes": [1]}
    return qwen(Qwen3VLForConditionalGeneration, Qwen3VLConfig, vision, head_dim=12)


def qwen3_vl_moe() -> PreTrainedModel:
    vision = {**QWEN3_TOWER, "deepstack_visual_indexes": [0, 2]}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return qwen(Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeConfig, vision, head_dim=12, **experts)


def internvl() -> PreTrainedModel:
    return InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 24,
                "patch_size": 4,
            },
            text_config=decoder(Qwen2Config),
            image_token_id=IMAGE,
            image_seq_length=9,
        )
    )


NO_CLS = frozenset({"cls_attention", "cls_attention_last", "cls_features", "cls_keys", "cls_logits_last"})
QWEN_LACKS = NO_CLS | {"encoder_kept"}

FAMILIES: dict[str, FamilyCase] = {
    case.name: case
    for case in (
        LlavaCase("llava-clip-llama", lambda: llava(clip(), decoder(LlamaConfig)), (25, 25, 25)),
        LlavaCase(
            "llava-siglip-qwen2",
            lambda: llava(
                siglip(), decoder(Qwen2Config), vision_feature_select_strategy="full", vision_feature_layer=-1
            ),
            (36, 36, 36),
            lacks=NO_CLS,
            size=36,
        ),
        # A window shorter than the unpruned prompt: what a query sees must still be counted in original columns.
        LlavaCase(
            "llava-clip-mistral-window",
            lambda: llava(clip(), decoder(MistralConfig, sliding_window=20)),
            (25, 25, 25),
        ),
        # 16 for the thumbnail; then rows x (columns + line break): 4 x (8 + 1), 8 x (4 + 1), 4 x (4 + 1).
        LlavaNextCase("llava-next", llava_next, (52, 56, 36)),
        LlavaNextCase("llava-next-video", llava_next_video, (52, 56, 36), (12, 12)),
        # The second image has 8 x 8 tokens in its tiles, shrunk to 5 x 5.
        LlavaOnevisionCase(
            "llava-onevision",
            llava_onevision,
            (52, 46, 36),
            (13, 13),
            lacks=NO_CLS,
            sizes=((16, 32), (31, 29), (12, 14)),
        ),
        VideoLlavaCase("video-llava", video_llava, (16, 16, 16), (51, 51), frozenset({"encoder_kept"}), size=16),
        QwenCase("qwen2-vl", qwen2_vl, (12, 6, 12), (12, 12), QWEN_LACKS),
        QwenCase("qwen2.5-vl", qwen2_5_vl, (12, 6, 12), (12, 12), QWEN_LACKS),
        QwenCase("qwen3-vl", qwen3_vl, (12, 6, 12), (12, 12), QWEN_LACKS, stamps=True),
        QwenCase(
            "qwen3-vl-moe",
            qwen3_vl_moe,
            (12, 6, 12),
            (12, 12),
            QWEN_LACKS | {"activation_overlap"},
            earliest=2,
            stamps=True,
        ),
        InternVLCase("internvl", internvl, (27, 9, 18), (), frozenset({"cls_features", "encoder_kept"})),
    )
}

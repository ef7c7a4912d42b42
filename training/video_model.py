"""Train the bundled video model: `python training/video_model.py --out FOLDER`, or in several processes with
`torchrun --nproc-per-node 4 training/video_model.py --out FOLDER --threads 1`.

A Qwen2.5-VL of the size of the bundled image model and grown out of its weights. Stage A teaches the vision tower to
read pairs of crowded frames. Stages B and C train the language model on questions about clips. Every batch is a
function of (seed, stage, step, process), so a killed run continues from its checkpoint as if it had not stopped. The
run ends by writing a `save_pretrained` folder and `evaluation.json`, measured on clips of a seed that nothing else
uses. `--evaluate FOLDER` measures a finished model.

Visual tokens are never dropped in training.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, distributed, nn
from transformers import (
    GenerationConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from vlmprune import bundled
from vlmprune.scenes import COLOURS, SIZE
from vlmprune.video_scenes import (
    FPS,
    VIDEO_KINDS,
    Clip,
    VideoQuestion,
    dense_clip,
    digit_clip,
    digit_clips,
)

PATCH, MERGE, PAIR = 8, 2, 2
SIDE = SIZE // PATCH
PATCHES, TOKENS = SIDE**2, (SIDE // MERGE) ** 2
INK = 0.1
SEED, VALIDATION_SEED, REPORT_SEED = 23, 7, 70_615
SPECIAL = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
WORDS = ["appear", "appears", "when", "often", "does", "do", "order", "colours", "start", "middle", "end"]
WORDS += ["early", "late", "before", "after", "times", "second", "frames", "then", "clip"]
TEXT, SLOTS = 168, 18
PREFIX = ["<s>", "user", "<|vision_start|>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ ' ' + message['role'] + ' ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ ' ' + part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% if message['role'] == 'assistant' %}{{ ' ' + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' assistant' }}{% endif %}"
)


@dataclass(frozen=True)
class Stage:
    """`steps` of `batch` clips of a schedule laid out for `horizon` steps, learning rates outside and inside the tower,
    how many crowded pairs of frames come beside a batch of clips, and whether the answers teach the tower too (that
    costs half as much again), and whether clips grow from 10 to 16 frames over the first half."""

    steps: int
    horizon: int
    batch: int
    rate: float
    tower_rate: float
    warmup: int
    crowds: int = 0
    joint: bool = False
    grow: bool = False


STAGES = {
    "A": Stage(450, horizon=450, batch=16, rate=0.0, tower_rate=1.5e-3, warmup=30),
    "B": Stage(760, horizon=760, batch=4, rate=1.6e-3, tower_rate=0.0, warmup=30, grow=True),
    "C": Stage(1600, horizon=1600, batch=8, rate=1.5e-3, tower_rate=0.0, warmup=30),
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The image model's word tokenizer with more words; question marks, commas and full stops are words."""
    image = bundled.load()[1].tokenizer
    known = sorted(image.get_vocab(), key=image.get_vocab().get)
    words = [*known, *(word for word in [*SPECIAL, *WORDS] if word not in known)]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit()] + [pre_tokenizers.Split(mark, "isolated") for mark in "?.,"]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL,
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> Qwen2_5_VLProcessor:
    common = {
        "patch_size": PATCH,
        "temporal_patch_size": PAIR,
        "merge_size": MERGE,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "size": {"shortest_edge": SIZE**2, "longest_edge": SIZE**2},
    }
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**common),
        build_tokenizer(),
        Qwen2VLVideoProcessor(**common, cap_pixels_per_frame=False),
        chat_template=TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    """The untrained model, float32."""
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    marks = {
        name.strip("<|>").replace("_pad", "") + "_token_id": tokenizer.convert_tokens_to_ids(name) for name in SPECIAL
    }
    vision = {
        "depth": 3,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_heads": 4,
        "in_channels": 3,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": PAIR,
        # One position a pair of frames at the frame rate that processors assume for videos without one.
        "tokens_per_second": round(FPS / PAIR),
        # The window is the whole frame.
        "window_size": SIZE,
        "fullatt_block_indexes": [0, 1, 2],
        "out_hidden_size": 128,
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.05,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4]},
        "tie_word_embeddings": True,
        **ids,
    }
    config = Qwen2_5_VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=True, **marks, **ids)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=8, **ids)
    return model


@torch.no_grad()
def graft(model: Qwen2_5_VLForConditionalGeneration, image: LlavaForConditionalGeneration) -> None:
    """Start from the image model's weights.

    The language model carries over as it is (biases of q, k, v are zero). Of the tower, what has a counterpart: its
    residual stream is made mean-free, which turns LayerNorm into RMSNorm; quick-GELU is SwiGLU with a constant gate;
    the projector of four patches is their mean. Position embeddings and the class token have none.
    """
    source = image.model.language_model.state_dict()
    target = model.model.language_model.state_dict()
    for name, value in target.items():
        if name.endswith("_proj.bias"):
            value.zero_()
        elif name == "embed_tokens.weight":
            value.normal_(std=source[name].std().item())
            value[: len(source[name])] = source[name]
        else:
            value.copy_(source[name])
    tower, visual = image.model.vision_tower, model.model.visual

    def centred(weight: Tensor) -> Tensor:
        return weight - weight.mean(dim=0, keepdim=True)

    first = tower.embeddings.patch_embedding.weight * tower.pre_layrnorm.weight[:, None, None, None]
    visual.patch_embed.proj.weight.copy_((centred(first) / PAIR)[:, :, None].expand(-1, -1, PAIR, -1, -1))
    for block, layer in zip(visual.blocks, tower.encoder.layers):
        attention = layer.self_attn
        rows = [attention.q_proj, attention.k_proj, attention.v_proj]
        weight, bias = torch.cat([row.weight for row in rows]), torch.cat([row.bias for row in rows])
        block.norm1.weight.copy_(layer.layer_norm1.weight)
        block.attn.qkv.weight.copy_(weight)
        block.attn.qkv.bias.copy_(bias + weight @ layer.layer_norm1.bias)
        block.attn.proj.weight.copy_(centred(attention.out_proj.weight))
        block.attn.proj.bias.copy_(centred(attention.out_proj.bias))
        block.norm2.weight.copy_(layer.layer_norm2.weight)
        block.mlp.gate_proj.weight.copy_(1.702 * layer.mlp.fc1.weight)
        block.mlp.gate_proj.bias.copy_(1.702 * (layer.mlp.fc1.bias + layer.mlp.fc1.weight @ layer.layer_norm2.bias))
        block.mlp.up_proj.weight.mul_(0.1)
        block.mlp.up_proj.bias.fill_(1 / 1.702)
        block.mlp.down_proj.weight.copy_(centred(layer.mlp.fc2.weight))
        block.mlp.down_proj.bias.copy_(centred(layer.mlp.fc2.bias))
    projector, merger = image.model.multi_modal_projector, visual.merger.mlp
    for layer in (merger[0], merger[2]):
        layer.weight.mul_(0.2)
    for at in range(MERGE**2):
        part = slice(128 * at, 128 * (at + 1))
        merger[0].weight[part, part] = projector.linear_1.weight
        merger[0].bias[part] = projector.linear_1.bias
        merger[2].weight[:, part] = projector.linear_2.weight / MERGE**2
    merger[2].bias.copy_(projector.linear_2.bias)
    model.tie_weights()


class Heads(nn.Module):
    """Training-only heads. On the tower: digit (10: none) and colour (6: none) of each patch. On the visual tokens
    behind the second decoder layer: how many actors came before this one, how often it had come before, and in which
    pair of frames it came this time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.digit = nn.Linear(width, 11)
        self.colour = nn.Linear(width, len(COLOURS) + 1)
        self.rank = nn.Linear(width, 4)
        self.round = nn.Linear(width, 3)
        self.start = nn.Linear(width, 8)


@dataclass
class Frames:
    """Pairs of frames as patches `[P, 144, 384]` in the tower's order, and the digit and colour index on each patch
    `[P, 144]` and each visual token `[P, 36]` (10 and 6: none)."""

    patches: Tensor
    digit: Tensor
    colour: Tensor
    token_digit: Tensor
    token_colour: Tensor
    cover: list[np.ndarray]


def blocks(cover: np.ndarray) -> np.ndarray:
    """`[A, P, 12, 12]` -> `[A, P, 144]` in the tower's order, 2 x 2 after 2 x 2."""
    side = SIDE // MERGE
    grid = cover.reshape(*cover.shape[:2], side, MERGE, side, MERGE).transpose(0, 1, 2, 4, 3, 5)
    return grid.reshape(*cover.shape[:2], PATCHES)


def frames_of(clips: list[Clip]) -> Frames:
    """Pairs of frames of all clips, one clip after the other; an odd last frame is paired with itself."""
    colours = list(COLOURS)
    pixels, covers, labels = [], [], []
    for clip in clips:
        odd = len(clip) % PAIR
        film = np.concatenate([clip.frames, clip.frames[-odd:]]) if odd else clip.frames
        pixels.append(film)
        cover = clip.coverage(PATCH)
        cover = np.concatenate([cover, cover[:, -odd:]], axis=1) if odd else cover
        cover = blocks(cover.reshape(len(cover), -1, PAIR, SIDE, SIDE).mean(axis=2))
        coarse = cover.reshape(*cover.shape[:2], TOKENS, MERGE**2).mean(axis=3)
        covers.append(coarse)
        row = []
        for grid, bar in ((cover, INK), (coarse, 0.5 * INK)):
            owner, inked = grid.argmax(axis=0), grid.max(axis=0) > bar
            row.append(np.where(inked, np.array([actor.digit for actor in clip.actors])[owner], 10))
            row.append(np.where(inked, np.array([colours.index(a.colour) for a in clip.actors])[owner], len(colours)))
        labels.append(row)
    video = torch.from_numpy(np.concatenate(pixels)).float().div_(127.5).sub_(1).permute(0, 3, 1, 2)
    side = SIDE // MERGE
    video = video.reshape(-1, PAIR, 3, side, MERGE, PATCH, side, MERGE, PATCH).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    stacked = [torch.from_numpy(np.concatenate(column)) for column in zip(*labels)]
    return Frames(video.reshape(-1, PATCHES, 3 * PAIR * PATCH**2), *stacked, covers)


class Tower(nn.Module):
    """The vision tower on frames of one size at once; the same weights and results as `model.model.visual`."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual
        cells = torch.arange(PATCHES)
        inner, outer, side = cells % MERGE**2, cells // MERGE**2, SIDE // MERGE
        rows, cols = outer // side * MERGE + inner // MERGE, outer % side * MERGE + inner % MERGE
        angles = torch.stack([rows, cols], dim=1)[..., None] * visual.rotary_pos_emb.inv_freq
        angles = angles.flatten(1).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """`[P, 144, 384]` -> patch states `[P, 144, D]` and visual tokens `[P, 36, D]`."""
        visual = self.visual
        states = F.linear(patches, visual.patch_embed.proj.weight.flatten(1))
        for block in visual.blocks:
            heads = block.attn.num_heads
            q, k, v = block.attn.qkv(block.norm1(states)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            q, k = rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            states = states + block.attn.proj(mixed)
            states = states + block.mlp(block.norm2(states))
        tokens = visual.merger.mlp(visual.merger.ln_q(states).unflatten(1, (TOKENS, -1)).flatten(2))
        return states, tokens


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def reading_loss(
    heads: Heads, table: Tensor, ids: dict[str, Tensor], frames: Frames, states: Tensor, tokens: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """Patches should tell their digit and colour, and visual tokens lie near the embeddings of those words."""
    scale = states.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt()
    loss, scores = torch.zeros(()), {}
    for name, label in (("digit", frames.digit), ("colour", frames.colour)):
        head: nn.Linear = getattr(heads, name)
        logits, inked = head(states * scale), frames.digit < 10
        loss = loss + F.cross_entropy(logits[inked], label[inked]) + F.cross_entropy(logits[~inked], label[~inked])
        scores["patch_" + name] = (logits[inked].argmax(-1) == label[inked]).float().mean().item()
    inked = frames.token_digit < 10
    named, words = F.normalize(tokens[inked], dim=-1), F.normalize(table, dim=-1)
    for name, label in (("digit", frames.token_digit), ("colour", frames.token_colour)):
        logits = 12 * named @ words[ids[name]].T
        loss = loss + F.cross_entropy(logits, label[inked])
        scores[name] = (logits.argmax(-1) == label[inked]).float().mean().item()
    return loss, scores


@dataclass
class Batch:
    """Clips of one length and the questions packed behind each.

    Packed text `[B, TEXT]` with the block of each token (0: padding), its position in the block, the next token to
    predict or -100; per question the column of its key word (-1: none) `[B, SLOTS]` and the visual tokens that show who
    it names `[B, SLOTS, V]`; per visual token `[B, V]` how many actors came before the one on it, how often it had come
    before and in which pair of frames it came this time (-100: nobody there). `answers` `[A, 2]` are row and column
    from which each word of an answer is said, and `shown` `[A, V]` the visual tokens that show it. `asked` names kind,
    columns and tokens of every answer.
    """

    frames: Frames
    ids: Tensor
    block: Tensor
    offset: Tensor
    labels: Tensor
    key: Tensor
    named: Tensor
    rank: Tensor
    round: Tensor
    start: Tensor
    answers: Tensor
    shown: Tensor
    asked: list[list[tuple[str, int, int]]]


def words(text: str) -> list[str]:
    return text.lower().replace("?", " ?").split()


def collate(clips: list[Clip], tokenizer: PreTrainedTokenizerFast) -> Batch:
    frames = frames_of(clips)
    size, visual = len(clips), frames.cover[0][0].size
    ids, block, offset = (np.zeros((size, TEXT), dtype=np.int64) for _ in range(3))
    labels = np.full((size, TEXT), -100)
    key = np.full((size, SLOTS), -1)
    named = np.zeros((size, SLOTS, visual), dtype=bool)
    rank, rounds, starts = (np.full((size, visual), -100) for _ in range(3))
    asked: list[list[tuple[str, int, int]]] = []
    answers, shown = [], []
    pair = np.arange(visual) // TOKENS
    for row, clip in enumerate(clips):
        cover = frames.cover[row].reshape(len(clip.actors), visual)
        owner, inked = cover.argmax(axis=0), cover.max(axis=0) > 0.5 * INK
        for array, part in zip((rank, rounds, starts), history(clip, owner)):
            array[row, inked] = part[inked]
        start = 0
        asked.append([])
        for slot, question in enumerate(clip.questions[:SLOTS]):
            ask, answer = [*words(question.text), "assistant"], [*words(question.answer), "</s>"]
            tokens = tokenizer.convert_tokens_to_ids(ask + answer)
            stop, reply = start + len(tokens), start + len(ask) - 1
            if stop > TEXT:
                break
            ids[row, start:stop] = tokens
            block[row, start:stop] = slot + 1
            offset[row, start:stop] = np.arange(len(tokens))
            labels[row, reply : stop - 1] = tokens[len(ask) :]
            asked[-1].append((question.kind, reply, stop - 1))
            seen = inked & np.isin(pair, np.array(question.frames) // PAIR)
            for place in range(len(answer) - 1):
                meant = question.actors[place : place + 1] if question.kind == "order" else question.actors
                answers.append((row, reply + place))
                shown.append(seen & np.isin(owner, meant))
            if question.key:
                key[row, slot] = start + ask.index(question.key)
                meant = [i for i, a in enumerate(clip.actors) if question.key in (str(a.digit), a.colour)]
                named[row, slot] = inked & np.isin(owner, meant)
            start = stop
    arrays = (ids, block, offset, labels, key, named, rank, rounds, starts, np.array(answers), np.array(shown))
    return Batch(frames, *map(torch.from_numpy, arrays), asked)


def history(clip: Clip, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each visual token `[V]`: how many actors came before its owner, which appearance of its owner it shows, and
    the pair of frames in which that began."""
    first = [actor.appearances[0].start for actor in clip.actors]
    rank = np.array([sum(other < mine for other in first) for mine in first])[owner]
    frame = np.arange(len(owner)) // TOKENS * PAIR + 1
    begun = [np.array([part.start for part in actor.appearances]) for actor in clip.actors]
    rounds = np.array([np.searchsorted(begun[o], f, side="right") - 1 for o, f in zip(owner, frame)])
    rounds = np.maximum(rounds, 0)
    return rank, rounds, np.array([begun[o][r] // PAIR for o, r in zip(owner, rounds)])


def layout(batch: Batch, stride: Tensor) -> tuple[Tensor, Tensor]:
    """M-RoPE positions `[3, B, S]` and additive mask `[B, 1, S, S]` of prefix, visual tokens and packed questions.

    Questions see what stands before them all, and themselves. `stride` `[B]` is the step in time from pair to pair.
    """
    size, visual = batch.rank.shape
    side, front = SIDE // MERGE, len(PREFIX)
    cells = torch.arange(visual)
    clock = (cells // TOKENS * stride[:, None]).floor().long()
    place = torch.stack([cells // side % side, cells % side])[:, None].expand(-1, size, -1)
    seen = torch.cat([clock[None], place]) + front
    behind = torch.cat([torch.zeros(size, 1, dtype=torch.long), 1 + batch.offset], dim=1) + front + side
    before = torch.arange(front).expand(3, size, -1)
    positions = torch.cat([before, seen, behind.expand(3, -1, -1)], dim=2)
    shared = torch.zeros(size, front + visual + 1, dtype=torch.long)
    block = torch.cat([shared, torch.where(batch.block == 0, -1, batch.block)], dim=1)
    sees = (block[:, None, :] == 0) | (block[:, None, :] == block[:, :, None])
    sees &= torch.ones(block.shape[1], block.shape[1], dtype=torch.bool).tril()
    return positions, torch.zeros(sees.shape).masked_fill_(~sees, torch.finfo(torch.float32).min)[:, None]


def looking_loss(model: Qwen2_5_VLForConditionalGeneration, batch: Batch, embeds: Tensor, positions: Tensor):
    """Head 0 of layer 0 should look from a question's key word at the visual tokens it names."""
    text = model.model.language_model
    layer = text.layers[0]
    row, slot = (batch.key >= 0).logical_and(batch.named.any(-1)).nonzero(as_tuple=True)
    visual, front = batch.rank.shape[1], len(PREFIX)
    column = batch.key[row, slot] + front + visual + 1
    width = layer.self_attn.q_proj.out_features // layer.self_attn.config.num_attention_heads
    cos, sin = text.rotary_emb(embeds, positions)
    states = layer.input_layernorm(embeds)
    q, k = layer.self_attn.q_proj, layer.self_attn.k_proj
    keys = F.linear(states[:, front : front + visual], k.weight[:width], k.bias[:width])
    keys = rotate(keys, cos[:, front : front + visual], sin[:, front : front + visual])
    query = rotate(F.linear(states[row, column], q.weight[:width], q.bias[:width]), cos[row, column], sin[row, column])
    log_p = ((keys[row] @ query[:, :, None])[..., 0] * width**-0.5).log_softmax(-1)
    return -log_p.masked_fill(~batch.named[row, slot], -torch.inf).logsumexp(-1).mean()


def showing_loss(
    model: Qwen2_5_VLForConditionalGeneration, batch: Batch, embeds: Tensor, middle: Tensor, positions: Tensor
) -> Tensor:
    """Head 0 of layer 2 should look from where an answer is said at the visual tokens that show it."""
    text = model.model.language_model
    layer = text.layers[2]
    some = batch.shown.any(-1)
    (row, column), shown = batch.answers[some].unbind(1), batch.shown[some]
    visual, front = batch.rank.shape[1], len(PREFIX)
    column = column + front + visual + 1
    width = layer.self_attn.q_proj.out_features // layer.self_attn.config.num_attention_heads
    cos, sin = text.rotary_emb(embeds, positions)
    states = layer.input_layernorm(middle)
    q, k = layer.self_attn.q_proj, layer.self_attn.k_proj
    end = front + visual
    keys = rotate(F.linear(states[:, :end], k.weight[:width], k.bias[:width]), cos[:, :end], sin[:, :end])
    query = rotate(F.linear(states[row, column], q.weight[:width], q.bias[:width]), cos[row, column], sin[row, column])
    log_p = ((keys[row] @ query[:, :, None])[..., 0] * width**-0.5).log_softmax(-1)[:, front:]
    return -log_p.masked_fill(~shown, -torch.inf).logsumexp(-1).mean()


class Trainer:
    def __init__(self, out: Path, stages: dict[str, Stage]) -> None:
        torch.manual_seed(SEED)
        self.out, self.stages = out, stages
        self.worker = distributed.get_rank() if distributed.is_initialized() else 0
        self.processor = build_processor()
        self.tokenizer = self.processor.tokenizer
        self.model = build_model(self.tokenizer)
        graft(self.model, bundled.load()[0])
        self.heads = Heads(128)
        self.tower = Tower(self.model.model.visual)
        to_ids = self.tokenizer.convert_tokens_to_ids
        self.word_ids = {
            "digit": torch.tensor(to_ids([str(d) for d in range(10)])),
            "colour": torch.tensor(to_ids(list(COLOURS))),
        }
        self.bos = torch.tensor([to_ids(PREFIX)])
        self.mark = torch.tensor([to_ids(["<|vision_end|>"])])
        self.middle: Tensor | None = None
        self.model.model.language_model.layers[1].register_forward_hook(self.remember)
        self.checkpoint = out / "checkpoint.pt"

    def remember(self, module: nn.Module, args: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        self.middle = output if isinstance(output, Tensor) else output[0]

    def optimizer(self, stage: Stage, name: str) -> torch.optim.AdamW:
        tower_parameters = [*self.model.model.visual.parameters(), *self.heads.parameters()]
        groups = [{"params": tower_parameters, "lr": stage.tower_rate, "base": stage.tower_rate}]
        if name != "A":
            rest = [p for n, p in self.model.named_parameters() if "visual." not in n]
            groups.append({"params": rest, "lr": stage.rate, "base": stage.rate})
        return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01, fused=True)

    def run(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        state = torch.load(self.checkpoint, weights_only=True) if self.checkpoint.exists() else None
        if state:
            self.model.load_state_dict(state["model"])
            self.heads.load_state_dict(state["heads"])
        spent = dict.fromkeys(self.stages, 0.0) | (state["spent"] if state else {})
        for name, stage in self.stages.items():
            if state and (state["stage"], state["step"]) >= (name, stage.steps):
                continue
            optimizer = self.optimizer(stage, name)
            first = 0
            if state and state["stage"] == name:
                first = state["step"]
                optimizer.load_state_dict(state["optimizer"])
            self.run_stage(name, stage, optimizer, first, spent)
        if self.worker:
            return
        save(self.model, self.processor, self.out / "model")
        (self.out / "minutes.json").write_text(json.dumps({k: round(v / 60, 1) for k, v in spent.items()}))

    def run_stage(
        self, name: str, stage: Stage, optimizer: torch.optim.AdamW, first: int, spent: dict[str, float]
    ) -> None:
        began = saved = time.monotonic()
        already = spent[name]
        scores: dict[str, list[float]] = defaultdict(list)
        for step in range(first, stage.steps):
            warm = min(1.0, (step + 1) / stage.warmup)
            fall = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / stage.horizon))
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * warm * fall
            rng = np.random.default_rng([SEED, ord(name), step, self.worker])
            loss, parts = (self.loss_a if name == "A" else self.loss_b)(rng, stage, step / stage.horizon)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.share_gradients(optimizer)
            nn.utils.clip_grad_norm_((p for group in optimizer.param_groups for p in group["params"]), 1.0)
            optimizer.step()
            for key, value in parts.items():
                scores[key].append(value)
            now = time.monotonic()
            spent[name] = already + now - began
            if self.worker:
                continue
            if (step + 1) % 25 == 0:
                pace = (now - began) / (step + 1 - first)
                shown = " ".join(f"{key} {np.mean(values):.3f}" for key, values in scores.items())
                left = pace * (stage.steps - step - 1) / 60
                print(f"{name} {step + 1}/{stage.steps} {pace:.2f} s/step, {left:.1f} min left: {shown}", flush=True)
                scores.clear()
            if name != "A" and (step + 1) % 200 == 0:
                print(
                    "validation " + show(self.accuracy(list(digit_clips("validation", 64, VALIDATION_SEED)))),
                    flush=True,
                )
            if now - saved > 120 or step + 1 == stage.steps:
                saved = now
                state = {
                    "model": self.model.state_dict(),
                    "heads": self.heads.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "stage": name,
                    "step": step + 1,
                    "spent": spent,
                }
                partial = self.checkpoint.with_suffix(".part")
                torch.save(state, partial)
                os.replace(partial, self.checkpoint)

    def share_gradients(self, optimizer: torch.optim.AdamW) -> None:
        """Every process takes the mean of all gradients."""
        if not distributed.is_initialized():
            return
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads])
        distributed.all_reduce(flat)
        flat /= distributed.get_world_size()
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads])):
            grad.copy_(part.view_as(grad))

    def loss_a(self, rng: np.random.Generator, stage: Stage, progress: float) -> tuple[Tensor, dict[str, float]]:
        frames = frames_of([dense_clip(rng, "train") for _ in range(stage.batch)])
        table = self.model.get_input_embeddings().weight.detach()
        return reading_loss(self.heads, table, self.word_ids, frames, *self.tower(frames.patches))

    def states(self, batch: Batch, visual: Tensor, stride: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States behind the last layer of the packed text `[B, TEXT, D]`, the embeddings and the positions."""
        table = self.model.get_input_embeddings()
        size = len(visual)
        parts = [table(self.bos).expand(size, -1, -1), visual, table(self.mark).expand(size, -1, -1), table(batch.ids)]
        embeds = torch.cat(parts, dim=1)
        positions, mask = layout(batch, stride)
        text = self.model.model.language_model
        out = text(
            inputs_embeds=embeds, attention_mask={"full_attention": mask}, position_ids=positions, use_cache=False
        )[0]
        return out[:, -TEXT:], embeds, positions

    def loss_b(self, rng: np.random.Generator, stage: Stage, progress: float) -> tuple[Tensor, dict[str, float]]:
        longest = 10 + min(6, int(12 * progress)) if stage.grow else 16
        size, length = stage.batch, int(rng.integers(8, longest + 1))
        clips = [digit_clip(rng, "train", frames=(length, length), per_kind=3) for _ in range(size)]
        batch = collate(clips, self.tokenizer)
        with torch.set_grad_enabled(stage.joint):
            patches, visual = self.tower(batch.frames.patches)
        visual = visual.reshape(size, -1, visual.shape[-1])
        stride = np.where(rng.random(size) < 0.7, 1.0, rng.uniform(1, 3, size))
        states, embeds, positions = self.states(batch, visual, torch.from_numpy(stride).float())
        replies = batch.labels != -100
        answer = F.cross_entropy(self.model.lm_head(states[replies]), batch.labels[replies])
        looking = looking_loss(self.model, batch, embeds, positions)
        front, count = len(PREFIX), visual.shape[1]
        middle = F.layer_norm(self.middle[:, front : front + count], visual.shape[-1:])
        past = {
            name: F.cross_entropy(getattr(self.heads, name)(middle).flatten(0, 1), getattr(batch, name).flatten())
            for name in ("rank", "round", "start")
        }
        showing = showing_loss(self.model, batch, embeds, self.middle, positions)
        loss = answer + 0.3 * looking + 0.3 * showing + 0.5 * sum(past.values())
        parts = {"answer": answer.item(), "looking": looking.item(), "showing": showing.item()}
        parts |= {name: value.item() for name, value in past.items()}
        table = self.model.get_input_embeddings().weight
        if stage.joint:
            tokens = visual.reshape(-1, TOKENS, visual.shape[-1])
            reading, scores = reading_loss(self.heads, table, self.word_ids, batch.frames, patches, tokens)
            loss = loss + 0.2 * reading
            parts["digit"] = scores["digit"]
        if stage.crowds:
            crowd = frames_of([dense_clip(rng, "train") for _ in range(stage.crowds)])
            reading, scores = reading_loss(self.heads, table, self.word_ids, crowd, *self.tower(crowd.patches))
            loss = loss + 0.3 * reading
            parts["crowd"] = scores["digit"]
        right = self.model.lm_head(states[replies]).argmax(-1) == batch.labels[replies]
        parts["token"] = right.float().mean().item()
        return loss, parts

    @torch.no_grad()
    def accuracy(self, clips: list[Clip], size: int = 16) -> dict[str, tuple[int, int]]:
        """Right answers (every token, given those before it) and questions per kind; time passes as by default."""
        counts = {kind: [0, 0] for kind in VIDEO_KINDS}
        groups: dict[int, list[Clip]] = defaultdict(list)
        for clip in clips:
            groups[-(-len(clip) // PAIR)].append(clip)
        for group in groups.values():
            for first in range(0, len(group), size):
                batch = collate(group[first : first + size], self.tokenizer)
                visual = self.tower(batch.frames.patches)[1].reshape(len(batch.ids), batch.rank.shape[1], -1)
                states = self.states(batch, visual, torch.ones(len(visual)))[0]
                right = (self.model.lm_head(states).argmax(-1) == batch.labels) | (batch.labels == -100)
                for row, asked in enumerate(batch.asked):
                    for kind, start, stop in asked:
                        counts[kind][0] += bool(right[row, start:stop].all())
                        counts[kind][1] += 1
        return {kind: (good, total) for kind, (good, total) in counts.items()}


@torch.no_grad()
def answers(
    model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, pairs: list[tuple[Clip, str]]
) -> list[str]:
    """Answers to questions about clips, through the processor and `generate()`, in one left-padded batch."""
    chats = [[{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": text}]}] for _, text in pairs]
    prompts = processor.apply_chat_template(chats, add_generation_prompt=True)
    metadata = [[{"fps": clip.fps, "total_num_frames": len(clip)}] for clip, _ in pairs]
    videos = [[clip.frames] for clip, _ in pairs]
    inputs = processor(text=prompts, videos=videos, video_metadata=metadata, padding=True, return_tensors="pt")
    out = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(out, skip_special_tokens=True)]


def wilson(good: int, total: int) -> tuple[float, float]:
    """95 % Wilson interval of a proportion."""
    z = 1.959964
    share, grain = good / total, z * z / total
    centre = (share + grain / 2) / (1 + grain)
    half = z * math.sqrt(share * (1 - share) / total + grain / total / 4) / (1 + grain)
    return centre - half, centre + half


def show(counts: dict[str, tuple[int, int]]) -> str:
    shares = {kind: good / total for kind, (good, total) in counts.items()}
    return f"mean {np.mean(list(shares.values())):.3f} " + " ".join(
        f"{kind} {share:.3f}" for kind, share in shares.items()
    )


def save(model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, folder: Path) -> None:
    """Write a float16 `save_pretrained` folder without changing `model`."""
    partial = build_model(processor.tokenizer)
    partial.load_state_dict(model.state_dict())
    partial.to(torch.float16).save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def evaluate(folder: Path, per_kind: int, seed: int = REPORT_SEED, batch: int = 32) -> dict:
    """Accuracy on fresh test clips with all tokens: of every kind the first `per_kind` questions, one a clip."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = Qwen2_5_VLProcessor.from_pretrained(folder)
    asked: list[tuple[Clip, VideoQuestion]] = []
    counts = dict.fromkeys(VIDEO_KINDS, 0)
    used = 0
    for clip in digit_clips("test", 20 * per_kind, seed):
        used += 1
        for question in clip.questions:
            if counts[question.kind] < per_kind:
                counts[question.kind] += 1
                asked.append((clip, question))
        if min(counts.values()) == per_kind:
            break
    right = dict.fromkeys(VIDEO_KINDS, 0)
    for first in range(0, len(asked), batch):
        part = asked[first : first + batch]
        replies = answers(model, processor, [(clip, question.text) for clip, question in part])
        for reply, (_, question) in zip(replies, part):
            right[question.kind] += reply == question.answer
    result: dict = {"clips": used, "seed": seed, "mean": 0.0, "kinds": {}}
    for kind, total in counts.items():
        low, high = wilson(right[kind], total)
        result["kinds"][kind] = {
            "right": right[kind],
            "questions": total,
            "accuracy": round(right[kind] / total, 4),
            "low": round(low, 4),
            "high": round(high, 4),
        }
    result["mean"] = round(float(np.mean([entry["accuracy"] for entry in result["kinds"].values()])), 4)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the checkpoint, the model and the evaluation")
    parser.add_argument("--evaluate", type=Path, metavar="FOLDER", help="only measure a finished model")
    parser.add_argument("--count", type=int, default=512, help="test clips to measure each kind of question on")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if "RANK" in os.environ:
        distributed.init_process_group("gloo")
    if arguments.evaluate:
        print(json.dumps(evaluate(arguments.evaluate, arguments.count), indent=1))
        return
    if not arguments.out:
        parser.error("one of --out and --evaluate is needed")
    trainer = Trainer(arguments.out, STAGES)
    trainer.run()
    if trainer.worker:
        return
    result = evaluate(arguments.out / "model", arguments.count)
    (arguments.out / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

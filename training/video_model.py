"""Train the bundled video model: `python training/video_model.py --out FOLDER`.

A Qwen2.5-VL of about the size of the bundled image model and grown out of its weights. Stages A and C teach the vision
tower to read pairs of crowded frames. Stages B and D to F train the language model on questions about clips, whose
visual tokens the tower computes once, in a second process that writes shards of clips ahead; D begins with two more
decoder layers. A killed run continues from its checkpoint. Shards are functions of (seed, number), batches of (seed,
stage, step) and of how many shards there are by then. The run ends by writing a `save_pretrained` folder and
`evaluation.json`, measured on clips of a seed that nothing else uses. `--evaluate FOLDER` measures a finished model.

Visual tokens are never dropped in training.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import pickle
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
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

import vlmprune
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
    questions_about,
)

PATCH, MERGE, PAIR = 8, 2, 2
SIDE = SIZE // PATCH
PATCHES, TOKENS = SIDE**2, (SIDE // MERGE) ** 2
INK = 0.1
SEED, VALIDATION_SEED, REPORT_SEED = 23, 7, 91_133
SPECIAL = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
WORDS = ["appear", "appears", "when", "often", "does", "do", "order", "colours", "start", "middle", "end"]
WORDS += ["early", "late", "before", "after", "times", "second", "frames", "then", "clip"]
TEXT, SLOTS, SHARD = 168, 18, 32
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
    """`steps` of `batch` clips or crowded pairs of frames, of a schedule laid out for `horizon` steps. `layers` is the
    depth of the language model, 0 where the tower learns; `pool` names the clips. `muon`: matrices learn by Muon at
    `rate` and everything else by AdamW at 0.6 of it, otherwise all by AdamW."""

    steps: int
    horizon: int
    batch: int
    rate: float
    layers: int = 0
    pool: str = ""
    muon: bool = True


STAGES = {
    "A": Stage(450, horizon=450, batch=16, rate=1.5e-3, muon=False),
    "B": Stage(760, horizon=760, batch=16, rate=1.6e-3, layers=4, pool="P", muon=False),
    "C": Stage(3000, horizon=3000, batch=16, rate=1.5e-3),
    "D": Stage(1039, horizon=4400, batch=16, rate=2e-3, layers=6, pool="P"),
    "E": Stage(1045, horizon=2800, batch=16, rate=1.5e-3, layers=6, pool="Q"),
    "F": Stage(600, horizon=600, batch=16, rate=1e-3, layers=6, pool="Q"),
}
# Shards of a pool. P is of the tower as A leaves it, Q as C does.
POOLS = {"P": 326, "Q": 523}
# Where layers of the shallow model go in the deep one; those between start as identities.
DEEPER = {0: 0, 1: 1, 2: 4, 3: 5}
# The layer whose first head is to look at what shows an answer, by depth.
SHOWING = {4: 2, 6: 4}
# What the states of a visual token behind a layer are to tell, by depth: in which pair of frames it is, whether its
# actor comes in that pair, when it came, how often it had come before, how many actors came before it.
HISTORY = {"time": 8, "fresh": 2, "start": 8, "round": 3, "rank": 4}
TELLS = {
    4: {1: ("start", "round", "rank")},
    6: {0: ("time",), **dict.fromkeys((1, 2, 3), ("fresh", "start", "round", "rank"))},
}
WEIGHT = {"order": 2.0, "often": 1.5, "last": 1.3}


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


def build_model(tokenizer: PreTrainedTokenizerFast, layers: int) -> Qwen2_5_VLForConditionalGeneration:
    """The untrained model, float32, with `layers` decoder layers."""
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
        "num_hidden_layers": layers,
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


@torch.no_grad()
def deepen(
    shallow: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast
) -> Qwen2_5_VLForConditionalGeneration:
    """The same function with two more decoder layers, whose output projections are zero."""
    model = build_model(tokenizer, 6)
    target = model.state_dict()
    front = "model.language_model.layers."
    for name, value in shallow.state_dict().items():
        if name.startswith(front):
            number, rest = name.removeprefix(front).split(".", 1)
            name = f"{front}{DEEPER[int(number)]}.{rest}"
        target[name].copy_(value)
    for number in set(range(6)) - set(DEEPER.values()):
        layer = model.model.language_model.layers[number]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.tie_weights()
    return model


class Heads(nn.Module):
    """Training-only heads. On the tower: digit (10: none) and colour (6: none) of each patch. On visual tokens behind
    decoder layers: `TELLS`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.digit = nn.Linear(width, 11)
        self.colour = nn.Linear(width, len(COLOURS) + 1)
        told = {(layer, name) for tells in TELLS.values() for layer, names in tells.items() for name in names}
        self.told = nn.ModuleDict({f"{layer}_{name}": nn.Linear(width, HISTORY[name]) for layer, name in sorted(told)})


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
            q, k = rotate(q, self.cos, self.sin).to(v.dtype), rotate(k, self.cos, self.sin).to(v.dtype)
            states = states + block.attn.proj(mix(q, k, v).transpose(1, 2).flatten(2))
            states = states + block.mlp(block.norm2(states))
        tokens = visual.merger.mlp(visual.merger.ln_q(states).unflatten(1, (TOKENS, -1)).flatten(2))
        return states, tokens


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def mix(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention `[..., S, E]`; on a CPU its backward is several times faster than the fused kernel's."""
    scores = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).float()
    return (scores if mask is None else scores + mask).softmax(-1).to(v.dtype) @ v


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
    """Clips of one length, their visual tokens `[B, V, D]`, and the questions packed behind each.

    Packed text `[B, T]` with the block of each token (0: padding), its position in the block, the next token to predict
    or -100 and its weight. `inked` `[B, V]` are visual tokens with somebody on them, `told` `[I]` what those are to
    tell. `keys` `[K, 2]` are row and column of the words that name somebody, `named` `[K, V]` the visual tokens of who
    that is; `said` `[A, 2]` where words of answers are said, `shown` `[A, V]` the visual tokens that show them. `asked`
    names kind, first and last column of every answer.
    """

    visual: Tensor
    ids: Tensor
    block: Tensor
    offset: Tensor
    labels: Tensor
    weight: Tensor
    inked: Tensor
    told: dict[str, Tensor]
    keys: Tensor
    named: Tensor
    said: Tensor
    shown: Tensor
    asked: list[list[tuple[str, int, int]]]


def words(text: str) -> list[str]:
    return text.lower().replace("?", " ?").split()


def collate(clips: list[Clip], cover: list[np.ndarray], tokens: Tensor, vocabulary: dict[str, int]) -> Batch:
    """A batch of clips with coverage `[A, P, 36]` each and visual tokens `[B, V, D]`."""
    visual = tokens.shape[1]
    pair = np.arange(visual) // TOKENS
    inks, keys, named, said, shown = [], [], [], [], []
    told: dict[str, list[np.ndarray]] = {name: [] for name in HISTORY}
    rows: list[tuple[list, ...]] = []
    asked: list[list[tuple[str, int, int]]] = []
    for row, (clip, part) in enumerate(zip(clips, cover)):
        flat = part.reshape(len(clip.actors), visual)
        owner, inked = flat.argmax(axis=0), flat.max(axis=0) > 0.5 * INK
        rank, rounds, starts = history(clip, part.shape[1])
        who, when = owner[inked], pair[inked]
        inks.append(inked)
        told["time"].append(when)
        told["fresh"].append(starts[who, when] == when)
        told["start"].append(starts[who, when])
        told["round"].append(rounds[who, when])
        told["rank"].append(rank[who])
        ids: list[int] = []
        block: list[int] = []
        offset: list[int] = []
        labels: list[int] = []
        weight: list[float] = []
        asked.append([])
        for slot, question in enumerate(clip.questions[:SLOTS]):
            ask, answer = [*words(question.text), "assistant"], [*words(question.answer), "</s>"]
            said_ids = [vocabulary[word] for word in ask + answer]
            start, reply = len(ids), len(ids) + len(ask) - 1
            if start + len(said_ids) > TEXT:
                break
            ids += said_ids
            block += [slot + 1] * len(said_ids)
            offset += range(len(said_ids))
            labels += [-100] * (len(ask) - 1) + said_ids[len(ask) :] + [-100]
            weight += [WEIGHT.get(question.kind, 1.0)] * len(said_ids)
            asked[-1].append((question.kind, reply, len(ids) - 1))
            seen = inked & np.isin(pair, np.array(question.frames) // PAIR)
            for place in range(len(answer) - 1):
                meant = question.actors
                if question.kind == "order":
                    meant = meant[place : place + 1]
                elif question.kind == "count":
                    meant = (int(rank.argmax()),)
                here = seen & np.isin(owner, meant)
                if question.kind == "often":
                    here &= rounds[meant[0]][pair] == len(clip.actors[meant[0]].appearances) - 1
                if here.any():
                    said.append((row, reply + place))
                    shown.append(here)
            if question.key:
                meant = [i for i, a in enumerate(clip.actors) if question.key in (str(a.digit), a.colour)]
                here = inked & np.isin(owner, meant)
                if here.any():
                    keys.append((row, start + ask.index(question.key)))
                    named.append(here)
        rows.append((ids, block, offset, labels, weight))
    longest = max(len(row[0]) for row in rows)

    def padded(column: int, fill: float) -> Tensor:
        return torch.tensor([[*row[column], *[fill] * (longest - len(row[column]))] for row in rows])

    return Batch(
        tokens,
        padded(0, 0),
        padded(1, 0),
        padded(2, 0),
        padded(3, -100),
        padded(4, 1.0),
        torch.from_numpy(np.array(inks)),
        {name: torch.from_numpy(np.concatenate(parts)).long() for name, parts in told.items()},
        *(torch.from_numpy(np.array(part)) for part in (keys, named, said, shown)),
        asked,
    )


def history(clip: Clip, pairs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How many actors came before each `[A]`, and for each pair of frames `[A, P]` which appearance of an actor is the
    latest by then and the pair in which that began."""
    first = np.array([actor.appearances[0].start for actor in clip.actors])
    rounds, starts = [], []
    for actor in clip.actors:
        begun = np.array([part.start for part in actor.appearances])
        latest = np.searchsorted(begun, np.arange(pairs) * PAIR + 1, side="right") - 1
        rounds.append(np.maximum(latest, 0))
        starts.append(begun[rounds[-1]] // PAIR)
    return (first[:, None] > first).sum(axis=1), np.array(rounds), np.array(starts)


class Reader(nn.Module):
    """The language model on a batch, the same weights and results as `model.model.language_model`: questions see what
    stands before them all, and themselves; behind the last layer there are only the states that answers are read from.
    """

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.text = model.model.language_model
        self.table = model.get_input_embeddings()
        self.register_buffer("front", torch.tensor([tokenizer.convert_tokens_to_ids(PREFIX)]))
        self.register_buffer("mark", torch.tensor([tokenizer.convert_tokens_to_ids(["<|vision_end|>"])]))

    def forward(self, batch: Batch, stride: Tensor) -> tuple[Tensor, list[Tensor], list[tuple[Tensor, Tensor]]]:
        """`stride` `[B]` is the step in time from pair to pair. Returns the states where `labels` are `[N, D]`; behind
        every layer but the last the states of inked tokens `[I, D]`; and of every layer the first head's queries of the
        text `[B, T, E]` and keys of all before it `[B, 3 + V + 1, E]`."""
        size, visual = len(batch.ids), batch.visual.shape[1]
        front, side = self.front.shape[1], SIDE // MERGE
        shared = front + visual + 1
        both = (self.table(part).expand(size, -1, -1) for part in (self.front, self.mark))
        x = torch.cat([next(both), batch.visual, next(both), self.table(batch.ids)], dim=1)

        cells = torch.arange(visual)
        clock = (cells // TOKENS * stride[:, None]).floor().long()
        place = torch.stack([cells // side % side, cells % side])[:, None].expand(-1, size, -1)
        seen = torch.cat([clock[None], place]) + front
        behind = F.pad(1 + batch.offset, (1, 0)) + front + side
        before = torch.arange(front).expand(3, size, -1)
        cos, sin = self.text.rotary_emb(x, torch.cat([before, seen, behind.expand(3, -1, -1)], dim=2))
        cos, sin = cos[:, None], sin[:, None]

        lowest = -1e9
        causal = torch.full((shared, shared), lowest).triu(1)
        own = (batch.block[:, None, :] == batch.block[:, :, None]).tril()
        mask = F.pad(torch.zeros(own.shape).masked_fill(~own, lowest), (shared, 0))[:, None]
        row, column = (batch.labels != -100).nonzero(as_tuple=True)
        kept, first = [], []
        last = len(self.text.layers) - 1
        for number, layer in enumerate(self.text.layers):
            attention, mlp = layer.self_attn, layer.mlp
            parts = [attention.q_proj, attention.k_proj, attention.v_proj]
            weight, bias = torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
            heads = attention.config.num_attention_heads
            qkv = F.linear(layer.input_layernorm(x), weight, bias)
            q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
            q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
            first.append((q[:, 0, shared:], k[:, 0, :shared]))
            mixed = mix(q[:, :, shared:], k, v, mask)
            if number < last:
                earlier = mix(q[:, :, :shared], k[:, :, :shared], v[:, :, :shared], causal)
                x = x + attention.o_proj(torch.cat([earlier, mixed], dim=2).transpose(1, 2).flatten(2))
            else:
                x = x[row, shared + column] + attention.o_proj(mixed.transpose(1, 2)[row, column].flatten(1))
            gate, up = F.linear(
                layer.post_attention_layernorm(x), torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
            ).chunk(2, dim=-1)
            x = x + mlp.down_proj(F.silu(gate) * up)
            if number < last:
                kept.append(x[:, front : front + visual][batch.inked])
        return self.text.norm(x), kept, first


def gaze_loss(first: tuple[Tensor, Tensor], places: Tensor, targets: Tensor, leave: int) -> Tensor:
    """A head should look from `places` `[N, 2]` at visual tokens `targets` `[N, V]`; the tokens before those count
    unless `leave` skips them."""
    queries, keys = first
    row, column = places.unbind(1)
    keys = keys[:, leave:-1].float()
    scores = (keys[row] @ queries[row, column].float()[:, :, None])[..., 0] * keys.shape[-1] ** -0.5
    log_p = scores.log_softmax(-1)[:, -targets.shape[1] :]
    return -log_p.masked_fill(~targets, -torch.inf).logsumexp(-1).mean()


@torch.inference_mode()
def fill(pool: Path, visual: nn.Module, shards: int) -> None:
    """Write training clips whose visual tokens are computed once, in bfloat16, on one thread.

    Shard n holds `SHARD` clips of one length, stripped of pixels and questions, their coverage `[A, P, 36]` and their
    tokens `[SHARD, V, D]` in float16. Of 3 clips in 10 it is demanded that their order can be asked for. Shards that
    are there are left alone.
    """
    torch.set_num_threads(1)
    pool.mkdir(parents=True, exist_ok=True)
    tower, parent = Tower(visual), multiprocessing.parent_process()
    for number in range(shards):
        file = pool / f"{number:05}.pkl"
        if file.exists():
            continue
        if parent and not parent.is_alive():
            return
        rng = np.random.default_rng([SEED, ord(pool.name), number])
        length = int(rng.integers(8, 17))
        clips: list[Clip] = []
        while len(clips) < SHARD:
            ordered = rng.random() < 0.3
            while True:
                clip = digit_clip(rng, "train", frames=(length, length), kinds=("order",))
                if clip.questions or not ordered:
                    break
            clips.append(clip)
        frames = frames_of(clips)
        with torch.autocast("cpu", torch.bfloat16):
            parts = [tower(part)[1].half() for part in frames.patches.split(48)]
        tokens = torch.cat(parts).reshape(SHARD, -1, parts[0].shape[-1]).numpy()
        stripped = [
            replace(
                clip,
                frames=np.empty((length, 0)),
                actors=tuple(replace(actor, ink=np.empty(0), paint=np.empty(0)) for actor in clip.actors),
                questions=(),
            )
            for clip in clips
        ]
        partial = file.with_suffix(".part")
        partial.write_bytes(pickle.dumps((stripped, frames.cover, tokens)))
        os.replace(partial, file)


class Trainer:
    def __init__(self, out: Path, stages: dict[str, Stage]) -> None:
        torch.manual_seed(SEED)
        self.out, self.stages = out, stages
        self.processor = build_processor()
        self.tokenizer = self.processor.tokenizer
        self.vocabulary = self.tokenizer.get_vocab()
        self.heads = Heads(128)
        to_ids = self.tokenizer.convert_tokens_to_ids
        self.word_ids = {
            "digit": torch.tensor(to_ids([str(d) for d in range(10)])),
            "colour": torch.tensor(to_ids(list(COLOURS))),
        }
        model = build_model(self.tokenizer, 4)
        graft(model, bundled.load()[0])
        self.take(model)
        self.checkpoint = out / "checkpoint.pt"

    def take(self, model: Qwen2_5_VLForConditionalGeneration) -> None:
        self.model = model
        self.tower, self.reader = Tower(model.model.visual), Reader(model, self.tokenizer)

    def optimizers(self, stage: Stage) -> list[torch.optim.Optimizer]:
        own = [(n, p) for n, p in self.model.named_parameters() if ("visual." in n) != bool(stage.layers)]
        matrices = [p for n, p in own if p.ndim == 2 and "embed" not in n]
        rest = [p for n, p in own if p.ndim != 2 or "embed" in n] + list(self.heads.parameters())
        if not stage.muon:
            return [torch.optim.AdamW([*matrices, *rest], lr=stage.rate, betas=(0.9, 0.98), weight_decay=0.01)]
        decay = 0.01 if stage.layers else 0.05
        return [
            torch.optim.Muon(matrices, lr=stage.rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=0.6 * stage.rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def run(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        state = torch.load(self.checkpoint, weights_only=True) if self.checkpoint.exists() else None
        spent = dict.fromkeys(self.stages, 0.0) | (state["spent"] if state else {})
        for name, stage in self.stages.items():
            if stage.layers > self.model.config.text_config.num_hidden_layers:
                self.take(deepen(self.model, self.tokenizer))
            if state and (state["stage"], state["step"]) >= (name, stage.steps):
                if state["stage"] == name:
                    self.load(state)
                continue
            first = 0
            optimizers = self.optimizers(stage)
            if state and state["stage"] == name:
                self.load(state)
                first = state["step"]
                for optimizer, past in zip(optimizers, state["optimizers"]):
                    optimizer.load_state_dict(past)
            writer = self.write_ahead(stage.pool) if stage.pool else None
            self.run_stage(name, stage, optimizers, first, spent)
            if writer:
                writer.join()
        save(self.model, self.processor, self.out / "model")
        (self.out / "minutes.json").write_text(json.dumps({k: round(v / 60, 1) for k, v in spent.items()}))

    def write_ahead(self, name: str) -> multiprocessing.process.BaseProcess:
        """Fill a pool in a second process; returns when there is enough to begin with."""
        pool = self.out / name
        work = (pool, self.model.model.visual, POOLS[name])
        writer = multiprocessing.get_context("spawn").Process(target=fill, args=work, daemon=True)
        writer.start()
        while writer.is_alive() and len(list(pool.glob("*.pkl"))) < 64:
            time.sleep(1)
        return writer

    def load(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])

    def run_stage(
        self,
        name: str,
        stage: Stage,
        optimizers: list[torch.optim.Optimizer],
        first: int,
        spent: dict[str, float],
    ) -> None:
        began = saved = time.monotonic()
        already = spent[name]
        scores: dict[str, list[float]] = defaultdict(list)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        bases = [0.6 * stage.rate if stage.muon and at else stage.rate for at in range(len(groups))]
        for step in range(first, stage.steps):
            warm = min(1.0, (step + 1) / 50)
            fall = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / stage.horizon))
            for group, base in zip(groups, bases):
                group["lr"] = base * warm * fall
            rng = np.random.default_rng([SEED, ord(name), step])
            loss, parts = self.answering(rng, stage) if stage.layers else self.reading(rng, stage)
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_((p for group in groups for p in group["params"]), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            for key, value in parts.items():
                scores[key].append(value)
            now = time.monotonic()
            spent[name] = already + now - began
            if (step + 1) % 50 == 0:
                pace = (now - began) / (step + 1 - first)
                shown = " ".join(f"{key} {np.mean(values):.3f}" for key, values in scores.items())
                left = pace * (stage.steps - step - 1) / 60
                print(f"{name} {step + 1}/{stage.steps} {pace:.2f} s/step, {left:.1f} min left: {shown}", flush=True)
                scores.clear()
            if stage.layers and (step + 1) % 200 == 0:
                print(
                    "validation " + show(self.accuracy(list(digit_clips("validation", 128, VALIDATION_SEED)))),
                    flush=True,
                )
            if now - saved > 120 or step + 1 == stage.steps:
                saved = now
                state = {
                    "model": self.model.state_dict(),
                    "heads": self.heads.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "stage": name,
                    "step": step + 1,
                    "spent": spent,
                }
                partial = self.checkpoint.with_suffix(".part")
                torch.save(state, partial)
                os.replace(partial, self.checkpoint)

    def reading(self, rng: np.random.Generator, stage: Stage) -> tuple[Tensor, dict[str, float]]:
        frames = frames_of([dense_clip(rng, "train") for _ in range(stage.batch)])
        table = self.model.get_input_embeddings().weight.detach()
        with torch.autocast("cpu", torch.bfloat16):
            states, tokens = self.tower(frames.patches)
        return reading_loss(self.heads, table, self.word_ids, frames, states.float(), tokens.float())

    def answering(self, rng: np.random.Generator, stage: Stage) -> tuple[Tensor, dict[str, float]]:
        pool = self.out / stage.pool
        shard = rng.integers(len(list(pool.glob("*.pkl"))))
        clips, cover, tokens = pickle.loads((pool / f"{shard:05}.pkl").read_bytes())
        picked = rng.permutation(len(clips))[: stage.batch]
        asked = [
            replace(clips[i], questions=questions_about(rng, clips[i].actors, len(clips[i]), per_kind=3))
            for i in picked
        ]
        visual = torch.from_numpy(tokens[picked]).float()
        batch = collate(asked, [cover[i] for i in picked], visual, self.vocabulary)
        stride = np.where(rng.random(stage.batch) < 0.7, 1.0, rng.uniform(1, 3, stage.batch))
        with torch.autocast("cpu", torch.bfloat16):
            states, kept, first = self.reader(batch, torch.from_numpy(stride).float())
        replies = batch.labels != -100
        labels, weight = batch.labels[replies], batch.weight[replies]
        logits = self.model.lm_head(states.float())
        answer = (F.cross_entropy(logits, labels, reduction="none") * weight).sum() / weight.sum()
        looking = gaze_loss(first[0], batch.keys, batch.named, len(PREFIX))
        showing = gaze_loss(first[SHOWING[stage.layers]], batch.said, batch.shown, 0)
        loss = answer + 0.2 * looking + 0.3 * showing
        parts = {"answer": answer.item(), "looking": looking.item(), "showing": showing.item()}
        for layer, names in TELLS[stage.layers].items():
            behind = F.layer_norm(kept[layer].float(), kept[layer].shape[-1:])
            for name in names:
                guess = self.heads.told[f"{layer}_{name}"](behind)
                # Most appearances are first ones.
                rare = torch.tensor([1.0, 3.0, 6.0]) if name == "round" else None
                loss = loss + 0.15 * F.cross_entropy(guess, batch.told[name], rare)
                parts[f"{name}{layer}"] = (guess.argmax(-1) == batch.told[name]).float().mean().item()
        parts["token"] = (logits.argmax(-1) == labels).float().mean().item()
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
                part = group[first : first + size]
                frames = frames_of(part)
                visual = self.tower(frames.patches)[1].reshape(len(part), -1, 128)
                batch = collate(part, frames.cover, visual, self.vocabulary)
                states = self.reader(batch, torch.ones(len(part)))[0]
                replies = batch.labels != -100
                right = ~replies
                right[replies] = self.model.lm_head(states).argmax(-1) == batch.labels[replies]
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
    partial = build_model(processor.tokenizer, model.config.text_config.num_hidden_layers)
    partial.load_state_dict(model.state_dict())
    partial.to(torch.float16).save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def evaluate(
    folder: Path,
    per_kind: int,
    seed: int = REPORT_SEED,
    method: str | None = None,
    keep: float = 1.0,
    batch: int = 32,
) -> dict:
    """Accuracy on fresh test clips, with all tokens unless `method` drops some: of every kind the first `per_kind`
    questions, one a clip."""
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
        with vlmprune.prune(model, method, keep=keep) if method else nullcontext():
            replies = answers(model, processor, [(clip, question.text) for clip, question in part])
        for reply, (_, question) in zip(replies, part):
            right[question.kind] += reply == question.answer
    result: dict = {"clips": used, "seed": seed, "mean": 0.0, "kinds": {}}
    if method:
        result |= {"method": method, "keep": keep}
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
    parser.add_argument("--seed", type=int, default=REPORT_SEED, help="of the test clips")
    parser.add_argument("--method", help="with --evaluate: drop visual tokens by this method")
    parser.add_argument("--keep", type=float, default=0.25, help="share of visual tokens that --method keeps")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.evaluate:
        result = evaluate(arguments.evaluate, arguments.count, arguments.seed, arguments.method, arguments.keep)
        print(json.dumps(result, indent=1))
        return
    if not arguments.out:
        parser.error("one of --out and --evaluate is needed")
    trainer = Trainer(arguments.out, STAGES)
    trainer.run()
    result = evaluate(arguments.out / "model", arguments.count, arguments.seed)
    (arguments.out / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

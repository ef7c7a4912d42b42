"""Train the bundled image model: `python training/image_model.py --out FOLDER`.

Stage A teaches the vision tower to read patches of crowded scenes. Stage B trains the whole model on questions about
sparse scenes, after a while with crowded scenes for the tower beside them. Stage C is the same with more crowded scenes
and falling rates. Every batch is a function of (seed, stage, step), so a killed run continues from its checkpoint as if
it had not stopped. The run ends by writing a `save_pretrained` folder and `evaluation.json`, measured on scenes of a
seed that nothing else uses. `--evaluate FOLDER` measures a finished model and what is left of it after dropping tokens.

Visual tokens are never dropped in training. On a machine with other work, `OMP_WAIT_POLICY=PASSIVE` keeps threads from
spinning and nearly halves the time of a step.
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
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vlmprune.scenes import COLOURS, CORNERS, KINDS, SIZE, Scene, dense_scene, digit_scenes, sparse_scene

PATCH = 8
VISUAL = (SIZE // PATCH) ** 2
PREFIX = 2
TEXT = 120
INK = 0.12
SEED, VALIDATION_SEED, REPORT_SEED = 11, 5, 90_210
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
WORDS = [
    "user",
    "assistant",
    "?",
    ".",
    ",",
    "which",
    "what",
    "where",
    "how",
    "many",
    "digit",
    "digits",
    "is",
    "are",
    "there",
    "at",
    "the",
    "a",
    "an",
    "colour",
    "color",
    "yes",
    "no",
    "image",
    "video",
    "frame",
    "first",
    "last",
    "left",
    "right",
    "top",
    "bottom",
    "in",
    "of",
    "and",
]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ ' ' + message['role'] + ' ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}{{ ' ' + part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% if message['role'] == 'assistant' %}{{ ' ' + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' assistant' }}{% endif %}"
)


@dataclass(frozen=True)
class Stage:
    """`steps` of a schedule laid out for `horizon` steps, learning rates outside and inside the tower, and how many
    crowded scenes come beside a batch of sparse ones after a share of the horizon."""

    steps: int
    horizon: int
    batch: int
    rate: float
    tower_rate: float
    warmup: int
    crowds: int = 0
    crowds_from: float = 0.0


STAGES = {
    "A": Stage(1600, horizon=2400, batch=24, rate=2e-3, tower_rate=2e-3, warmup=100),
    "B": Stage(927, horizon=2800, batch=32, rate=1.5e-3, tower_rate=6e-4, warmup=150, crowds=12, crowds_from=0.25),
    "C": Stage(1200, horizon=1200, batch=16, rate=8e-4, tower_rate=1.2e-3, warmup=50, crowds=24),
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A lower-casing word tokenizer; question marks, commas and full stops are words."""
    words = [*SPECIAL, *WORDS, *map(str, range(10)), *COLOURS, *CORNERS]
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
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> LlavaProcessor:
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor,
        build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The untrained model, 1.5 million parameters, float32."""
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=128,
        initializer_factor=1.0,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.05,
        tie_word_embeddings=True,
        **ids,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=VISUAL,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
        **ids,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=8, **ids)
    return model


class Heads(nn.Module):
    """Training-only heads on the tower: digit, colour and corner of each patch, and what the image holds from CLS."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.digit = nn.Linear(width, 11)
        self.colour = nn.Linear(width, 7)
        self.corner = nn.Linear(width, len(CORNERS))
        self.holds = nn.ModuleList(nn.Linear(width, 10 + len(COLOURS)) for _ in range(2))


@dataclass
class Batch:
    """Images and, per patch, the digit (10: none), colour (6: none) and corner index of the object on it.

    With questions: packed text `[B, TEXT]` with the block of each token (0: padding), its position in the block, the
    next token to predict or -100; per question the column of its key word (-1: none) `[B, Q]` and the patches it names
    `[B, Q, VISUAL]`; `asked` names kind, columns and tokens of every answer.
    """

    pixels: Tensor
    digit: Tensor
    colour: Tensor
    corner: Tensor
    holds: Tensor
    ids: Tensor | None = None
    block: Tensor | None = None
    offset: Tensor | None = None
    labels: Tensor | None = None
    key: Tensor | None = None
    named: Tensor | None = None
    asked: list[list[tuple[str, int, int]]] | None = None


def collate(scenes: list[Scene], tokenizer: PreTrainedTokenizerFast | None = None, slots: int = 12) -> Batch:
    colours = list(COLOURS)
    size = len(scenes)
    digit = np.full((size, VISUAL), 10)
    colour = np.full((size, VISUAL), len(colours))
    corner = np.full((size, VISUAL), -100)
    holds = np.zeros((size, 10 + len(colours)), dtype=np.float32)
    covers = []
    for row, scene in enumerate(scenes):
        cover = scene.coverage(PATCH).reshape(len(scene.objects), VISUAL)
        owner, inked = cover.argmax(axis=0), cover.max(axis=0) > INK
        covers.append((owner, inked))
        digit[row, inked] = np.array([o.digit for o in scene.objects])[owner[inked]]
        colour[row, inked] = np.array([colours.index(o.colour) for o in scene.objects])[owner[inked]]
        corner[row, inked] = np.array([CORNERS.index(o.corner) for o in scene.objects])[owner[inked]]
        for thing in scene.objects:
            holds[row, [thing.digit, 10 + colours.index(thing.colour)]] = 1
    pixels = np.stack([np.asarray(scene.image) for scene in scenes]).transpose(0, 3, 1, 2)
    batch = Batch(
        torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1),
        *(torch.from_numpy(array) for array in (digit, colour, corner, holds)),
    )
    if tokenizer is None:
        return batch
    ids, block, offset = (np.zeros((size, TEXT), dtype=np.int64) for _ in range(3))
    labels = np.full((size, TEXT), -100)
    key = np.full((size, slots), -1)
    named = np.zeros((size, slots, VISUAL), dtype=bool)
    batch.asked = []
    for row, scene in enumerate(scenes):
        owner, inked = covers[row]
        start, asked = 0, []
        for slot, question in enumerate(scene.questions[:slots]):
            ask, answer = [*words(question.text), "assistant"], [*words(question.answer), "</s>"]
            tokens = tokenizer.convert_tokens_to_ids(ask + answer)
            stop, reply = start + len(tokens), start + len(ask) - 1
            if stop > TEXT:
                break
            ids[row, start:stop] = tokens
            block[row, start:stop] = slot + 1
            offset[row, start:stop] = np.arange(len(tokens))
            labels[row, reply : stop - 1] = tokens[len(ask) :]
            asked.append((question.kind, reply, stop - 1))
            if question.key and question.objects:
                key[row, slot] = start + ask.index(question.key)
                named[row, slot] = inked & np.isin(owner, question.objects)
            start = stop
        batch.asked.append(asked)
    batch.ids, batch.block, batch.offset = map(torch.from_numpy, (ids, block, offset))
    batch.labels, batch.key, batch.named = map(torch.from_numpy, (labels, key, named))
    return batch


def words(text: str) -> list[str]:
    return text.lower().replace("?", " ?").split()


def tower(model: LlavaForConditionalGeneration, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Patch features `[B, VISUAL, D]` as LLaVA takes them, CLS of that layer and CLS of the last layer `[B, D]`."""
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    return states[-2][:, 1:], states[-2][:, 0], states[-1][:, 0]


def tower_loss(heads: Heads, batch: Batch, patches: Tensor, *cls: Tensor) -> tuple[Tensor, dict[str, float]]:
    patches = heads.norm(patches)
    inked = batch.digit < 10
    digit, colour, corner = heads.digit(patches), heads.colour(patches), heads.corner(patches)
    loss = F.cross_entropy(corner[inked], batch.corner[inked])
    for logits, label in ((digit, batch.digit), (colour, batch.colour)):
        loss = loss + F.cross_entropy(logits[inked], label[inked]) + F.cross_entropy(logits[~inked], label[~inked])
    for head, state in zip(heads.holds, cls, strict=True):
        loss = loss + 0.5 * F.binary_cross_entropy_with_logits(head(heads.norm(state)), batch.holds)
    scores = {
        name: (logits[inked].argmax(-1) == label[inked]).float().mean().item()
        for name, logits, label in (
            ("digit", digit, batch.digit),
            ("colour", colour, batch.colour),
            ("corner", corner, batch.corner),
        )
    }
    return loss, scores


def layout(batch: Batch, scale: Tensor | None = None, kept: Tensor | None = None, compact: bool = False):
    """Positions `[B, S]` and additive attention mask `[B, 1, S, S]` of prefix, visual tokens and packed questions.

    Questions see the prefix, the visual tokens and themselves. `scale` `[B]` compresses the visual positions;
    `kept` `[B, K]` says which visual tokens are there, at their original or at renumbered (`compact`) positions.
    """
    size = len(batch.pixels)
    visual = torch.arange(VISUAL).expand(size, -1)
    length = torch.full((size, 1), VISUAL)
    if scale is not None:
        visual, length = (visual * scale[:, None]).floor().long(), (VISUAL * scale[:, None]).ceil().long()
    if kept is not None:
        visual = torch.arange(kept.shape[1]).expand(size, -1) if compact else kept
        length = torch.full((size, 1), kept.shape[1] if compact else VISUAL)
    prefix = torch.arange(PREFIX).expand(size, -1)
    positions = torch.cat([prefix, PREFIX + visual, PREFIX + length + batch.offset], dim=1)
    shared = torch.zeros(size, PREFIX + visual.shape[1], dtype=torch.long)
    block = torch.cat([shared, torch.where(batch.block == 0, -1, batch.block)], dim=1)
    sees = (block[:, None, :] == 0) | (block[:, None, :] == block[:, :, None])
    sees &= torch.ones(block.shape[1], block.shape[1], dtype=torch.bool).tril()
    return positions, torch.zeros(sees.shape).masked_fill_(~sees, torch.finfo(torch.float32).min)[:, None]


def embed(model: LlavaForConditionalGeneration, batch: Batch, visual: Tensor, bos: Tensor) -> Tensor:
    table = model.get_input_embeddings()
    return torch.cat([table(bos).expand(len(visual), -1, -1), visual, table(batch.ids)], dim=1)


def looking_loss(model: LlavaForConditionalGeneration, batch: Batch, embeds: Tensor, positions: Tensor, mask: Tensor):
    """Head 0 of layer 0 should look from a question's key word at the patches it names."""
    text = model.model.language_model
    layer = text.layers[0]
    row, slot = (batch.key >= 0).logical_and(batch.named.any(-1)).nonzero(as_tuple=True)
    column = batch.key[row, slot] + PREFIX + VISUAL
    width = layer.self_attn.head_dim
    cos, sin = text.rotary_emb(embeds, positions)
    states = layer.input_layernorm(embeds)
    keys = rotate(F.linear(states, layer.self_attn.k_proj.weight[:width]), cos, sin)
    query = F.linear(states[row, column], layer.self_attn.q_proj.weight[:width])
    query = rotate(query, cos[row, column], sin[row, column])
    logits = (keys[row] @ query[:, :, None])[..., 0] * width**-0.5 + mask[row, 0, column]
    log_p = logits.log_softmax(-1)[:, PREFIX : PREFIX + VISUAL]
    named = batch.named[row, slot]
    return -log_p.masked_fill(~named, -torch.inf).logsumexp(-1).mean()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def naming_loss(model: LlavaForConditionalGeneration, batch: Batch, visual: Tensor, ids: dict[str, Tensor]) -> Tensor:
    """Projected patches should lie near the embeddings of their digit, colour and corner words."""
    inked = batch.digit < 10
    patches = F.normalize(visual[inked], dim=-1)
    table = F.normalize(model.get_input_embeddings().weight, dim=-1)
    labels = {"digit": batch.digit, "colour": batch.colour, "corner": batch.corner}
    return sum(F.cross_entropy(12 * patches @ table[ids[name]].T, label[inked]) for name, label in labels.items())


class Trainer:
    def __init__(self, out: Path, stages: dict[str, Stage], compiled: bool) -> None:
        torch.manual_seed(SEED)
        self.out, self.stages = out, stages
        self.processor = build_processor()
        self.tokenizer = self.processor.tokenizer
        self.model = build_model(self.tokenizer)
        self.heads = Heads(128)
        to_ids = self.tokenizer.convert_tokens_to_ids
        self.word_ids = {
            "digit": torch.tensor(to_ids([str(d) for d in range(10)])),
            "colour": torch.tensor(to_ids(list(COLOURS))),
            "corner": torch.tensor(to_ids(list(CORNERS))),
        }
        self.bos = torch.tensor([to_ids(["<s>", "user"])])
        text = self.model.model.language_model
        self.text = torch.compile(text, dynamic=False) if compiled else text
        self.checkpoint = out / "checkpoint.pt"

    def optimizer(self, stage: Stage, name: str) -> torch.optim.AdamW:
        tower_parameters = [*self.model.model.vision_tower.parameters(), *self.heads.parameters()]
        groups = [{"params": tower_parameters, "lr": stage.tower_rate, "base": stage.tower_rate}]
        if name != "A":
            rest = [p for n, p in self.model.named_parameters() if "vision_tower" not in n]
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
            if state and state["stage"] > name:
                continue
            optimizer = self.optimizer(stage, name)
            first = 0
            if state and state["stage"] == name:
                first = state["step"]
                optimizer.load_state_dict(state["optimizer"])
            self.run_stage(name, stage, optimizer, first, spent)
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
            rng = np.random.default_rng([SEED, ord(name), step])
            loss, parts = (self.loss_a if name == "A" else self.loss_b)(rng, stage, step / stage.horizon)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_((p for group in optimizer.param_groups for p in group["params"]), 1.0)
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
            if name != "A" and (step + 1) % 300 == 0:
                print("validation " + show(self.validate()), flush=True)
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

    def loss_a(self, rng: np.random.Generator, stage: Stage, progress: float) -> tuple[Tensor, dict[str, float]]:
        reach = min(4, int(progress / 0.6 * 5))
        batch = collate(
            [dense_scene(rng, "train", max_offset=int(rng.integers(reach + 1))) for _ in range(stage.batch)]
        )
        return tower_loss(self.heads, batch, *tower(self.model, batch.pixels))

    def loss_b(self, rng: np.random.Generator, stage: Stage, progress: float) -> tuple[Tensor, dict[str, float]]:
        size = stage.batch
        batch = collate([sparse_scene(rng, "train", per_kind=2) for _ in range(size)], self.tokenizer)
        patches, *cls = tower(self.model, batch.pixels)
        visual = self.model.model.multi_modal_projector(patches)
        crowd = torch.zeros(())
        if stage.crowds and progress >= stage.crowds_from:
            dense = collate([dense_scene(rng, "train") for _ in range(stage.crowds)])
            crowded, *crowd_cls = tower(self.model, dense.pixels)
            named = self.model.model.multi_modal_projector(crowded)
            crowd = tower_loss(self.heads, dense, crowded, *crowd_cls)[0]
            crowd = 0.3 * crowd + 0.3 * naming_loss(self.model, dense, named, self.word_ids)
        scale = np.where(rng.random(size) < 0.5, rng.uniform(0.05, 1, size), 1.0)
        positions, mask = layout(batch, torch.from_numpy(scale).float())
        embeds = embed(self.model, batch, visual, self.bos)
        states = self.text(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False)[0]
        states = states[:, PREFIX + VISUAL :]
        replies = batch.labels != -100
        answer = F.cross_entropy(self.model.lm_head(states[replies]), batch.labels[replies])
        reading, scores = tower_loss(self.heads, batch, patches, *cls)
        naming = naming_loss(self.model, batch, visual, self.word_ids)
        looking = looking_loss(self.model, batch, embeds, positions, mask)
        loss = answer + 0.1 * reading + 0.3 * naming + 0.3 * looking + crowd
        parts = {
            "answer": answer.item(),
            "naming": naming.item(),
            "looking": looking.item(),
            "patch": scores["digit"],
            "crowd": crowd.item(),
        }
        return loss, parts

    @torch.no_grad()
    def validate(self) -> dict[str, tuple[int, int]]:
        scenes = list(digit_scenes("validation", 128, VALIDATION_SEED))
        batches = [collate(scenes[i : i + 32], self.tokenizer) for i in range(0, len(scenes), 32)]
        return accuracy(self.model, batches, self.bos)


@torch.no_grad()
def accuracy(
    model: LlavaForConditionalGeneration,
    batches: list[Batch],
    bos: Tensor,
    keep: int = VISUAL,
    method: str = "random",
    compact: bool = False,
) -> dict[str, tuple[int, int]]:
    """Right answers (every token) and questions per kind, with `keep` visual tokens chosen by `method`."""
    counts: dict[str, list[int]] = {kind: [0, 0] for kind in KINDS}
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        visual = model.model.multi_modal_projector(tower(model, batch.pixels)[0])
        kept = None
        if keep < VISUAL:
            kept = choose(visual, keep, method, generator)
            visual = visual.gather(1, kept[..., None].expand(-1, -1, visual.shape[-1]))
        positions, mask = layout(batch, kept=kept, compact=compact)
        embeds = embed(model, batch, visual, bos)
        states = model.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
        )[0]
        guess = model.lm_head(states[:, PREFIX + visual.shape[1] :]).argmax(-1)
        right = (guess == batch.labels) | (batch.labels == -100)
        for row, asked in enumerate(batch.asked):
            for kind, start, stop in asked:
                counts[kind][0] += bool(right[row, start:stop].all())
                counts[kind][1] += 1
    return {kind: (good, total) for kind, (good, total) in counts.items()}


def choose(visual: Tensor, keep: int, method: str, generator: torch.Generator) -> Tensor:
    """Indices `[B, keep]`, ascending, of the visual tokens that stay: random, on a slanted grid, or max-min."""
    size, tokens, _ = visual.shape
    if method == "random":
        return torch.rand(size, tokens, generator=generator).argsort(1)[:, :keep].sort(1).values
    if method == "uniform":
        side, period = math.isqrt(tokens), tokens / keep
        row, column = torch.arange(tokens) // side, torch.arange(tokens) % side
        phase = (column + round(0.382 * period) * row) % period
        return phase.argsort(stable=True)[:keep].sort().values.expand(size, -1)
    unit = F.normalize(visual, dim=-1)
    distance = 1 - unit @ unit.transpose(1, 2)
    distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    picked = [distance.amin(2).argmax(1)]
    distance.diagonal(dim1=1, dim2=2).fill_(0)
    nearest = torch.full((size, tokens), torch.inf)
    rows = torch.arange(size)
    for _ in range(keep - 1):
        nearest = torch.minimum(nearest, distance[rows, picked[-1]]).index_put((rows, picked[-1]), torch.tensor(-1.0))
        picked.append(nearest.argmax(1))
    return torch.stack(picked, 1).sort(1).values


@torch.no_grad()
def generated_accuracy(model: LlavaForConditionalGeneration, processor: LlavaProcessor, scenes: list[Scene]):
    """Right answers and questions per kind, through the processor and `generate()`, in left-padded batches."""
    pairs = [(scene.image, question) for scene in scenes for question in scene.questions]
    counts = {kind: [0, 0] for kind in KINDS}
    for first in range(0, len(pairs), 64):
        part = pairs[first : first + 64]
        chats = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
            for _, question in part
        ]
        prompts = processor.apply_chat_template(chats, add_generation_prompt=True)
        inputs = processor(images=[[image] for image, _ in part], text=prompts, padding=True, return_tensors="pt")
        out = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        for (_, question), text in zip(part, processor.batch_decode(out, skip_special_tokens=True), strict=True):
            counts[question.kind][0] += text.strip() == question.answer
            counts[question.kind][1] += 1
    return {kind: (good, total) for kind, (good, total) in counts.items()}


def wilson(good: int, total: int) -> tuple[float, float]:
    """95 % Wilson interval of a proportion."""
    z = 1.959964
    share, grain = good / total, z * z / total
    centre = (share + grain / 2) / (1 + grain)
    half = z * math.sqrt(share * (1 - share) / total + grain / total / 4) / (1 + grain)
    return centre - half, centre + half


def mean(counts: dict[str, tuple[int, int]]) -> float:
    return float(np.mean([good / total for good, total in counts.values()]))


def show(counts: dict[str, tuple[int, int]]) -> str:
    return f"mean {mean(counts):.3f} " + " ".join(f"{k} {g / n:.3f}" for k, (g, n) in counts.items())


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Write a float16 `save_pretrained` folder without changing `model`."""
    partial = build_model(processor.tokenizer)
    partial.load_state_dict(model.state_dict())
    partial.to(torch.float16).save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def evaluate(folder: Path, count: int) -> dict:
    """Accuracy per kind on fresh test scenes with all tokens, and mean accuracy of simple selections."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = LlavaProcessor.from_pretrained(folder)
    scenes = list(digit_scenes("test", count, REPORT_SEED))
    counts = generated_accuracy(model, processor, scenes)
    result = {"images": count, "seed": REPORT_SEED, "mean": round(mean(counts), 4), "kinds": {}, "selection": []}
    for kind, (good, total) in counts.items():
        low, high = wilson(good, total)
        result["kinds"][kind] = {
            "right": good,
            "questions": total,
            "accuracy": round(good / total, 4),
            "low": round(low, 4),
            "high": round(high, 4),
        }
    batches = [collate(scenes[i : i + 32], processor.tokenizer) for i in range(0, min(count, 256), 32)]
    bos = torch.tensor([processor.tokenizer.convert_tokens_to_ids(["<s>", "user"])])
    for method in ("random", "uniform", "maxmin"):
        for keep in (VISUAL, 72, 36, 18, 9):
            for compact in (False, True):
                share = mean(accuracy(model, batches, bos, keep, method, compact))
                positions = "compact" if compact else "original"
                result["selection"].append(
                    {"method": method, "keep": keep, "positions": positions, "mean": round(share, 4)}
                )
    return result


def write_demo(folder: Path, seed: int = 17) -> None:
    """Write six test scenes: the first with two digits or more on each of five photographs, and one on a pattern."""
    chosen: dict[str, Scene] = {}
    for scene in digit_scenes("test", 200, seed, digits=(2, 4)):
        name = scene.background if "/" in scene.background else "pattern"
        if name not in chosen and len(chosen) - ("pattern" in chosen) < 5 + (name == "pattern"):
            chosen[name] = scene
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, scene in enumerate(chosen.values(), 1):
        file = f"scene-{number}.png"
        scene.image.save(folder / file, optimize=True)
        questions = [{"kind": q.kind, "text": q.text, "answer": q.answer} for q in scene.questions]
        entries.append({"file": file, "background": scene.background, "questions": questions})
    (folder / "scenes.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the checkpoint, the model and the evaluation")
    parser.add_argument("--evaluate", type=Path, metavar="FOLDER", help="only measure a finished model")
    parser.add_argument("--demo", type=Path, metavar="FOLDER", help="only write the demo scenes")
    parser.add_argument("--count", type=int, default=1024, help="test images to measure on")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.evaluate:
        print(json.dumps(evaluate(arguments.evaluate, arguments.count), indent=1))
        return
    if arguments.demo:
        write_demo(arguments.demo)
        return
    if not arguments.out:
        parser.error("one of --out, --evaluate and --demo is needed")
    Trainer(arguments.out, STAGES, not arguments.no_compile).run()
    result = evaluate(arguments.out / "model", arguments.count)
    (arguments.out / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

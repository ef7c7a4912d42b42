"""Train the bundled CLIP: `python training/clip_model.py --out FOLDER`.

The image tower starts from the one of the bundled image model, the text tower from nothing. Scenes and phrases are
paired by content, many to many, under SigLIP's sigmoid loss (Zhai et al., arXiv 2303.15343): a phrase matches a scene
that holds what it names. Projected patches take the same loss against the patches under the named digit's ink, so that
the model can also tell where. Every batch is a function of (seed, step), so a killed run continues from its checkpoint
as if it had not stopped. The run ends by writing a folder that open_clip loads (`local-dir:FOLDER`) and
`evaluation.json`, measured on test scenes of a seed that nothing else uses.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from vlmprune.bundled import model_path
from vlmprune.scenes import COLOURS, CORNERS, SIZE, Scene, dense_scene, sparse_scene

PATCH, CONTEXT, DIM = 8, 32, 64
INK = 0.12  # a patch with more than this mean ink shows the digit; below a sixth of it, it does not
SEED, REPORT_SEED = 21, 90_211
WORDS = (
    "which what where when how many often digit digits is are there at the a an do does did in of and or on to it "
    "colour color frame frames image video clip first last left right top bottom appear appears appeared vanish "
    "vanishes disappear disappears seen shown show shows move moves moving before after between while during then "
    "time times moment end start order come comes leave leaves stay stays second seconds see long until next with "
    "that has have was were you this handwritten number photo picture direction up down same only most"
)
FILLER = WORDS.split()
PHRASES = (
    "{}",
    "a {}",
    "the {}",
    "a photo of a {}",
    "is there a {} ?",
    "where is the {} ?",
    "when does the {} appear ?",
    "what is the {} ?",
    "which digit is {} ?",
    "what colour is the {} ?",
    "in which frame is the {} ?",
    "how many times does the {} appear ?",
)


@dataclass(frozen=True)
class Wanted:
    """One thing a phrase names: a digit, a colour or both."""

    digit: int | None
    colour: str | None

    def matches(self, thing: object) -> bool:
        return self.digit in (None, thing.digit) and self.colour in (None, thing.colour)  # type: ignore[attr-defined]

    @property
    def words(self) -> str:
        return " ".join(str(word) for word in (self.colour, self.digit) if word is not None)


SINGLES = [Wanted(digit, None) for digit in range(10)] + [Wanted(None, colour) for colour in COLOURS]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A lower-casing word tokenizer. The end token has the highest number, where open_clip's text tower pools."""
    words = ["<pad>", "<s>", "<unk>", "?", ".", ",", *dict.fromkeys(FILLER), *map(str, range(10)), *COLOURS, *CORNERS]
    vocabulary = {word: i for i, word in enumerate([*words, "</s>"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit()] + [pre_tokenizers.Split(mark, "isolated") for mark in "?.,"]
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="right",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def configuration(vocabulary: int) -> dict:
    """What `open_clip_config.json` holds."""
    return {
        "model_cfg": {
            "embed_dim": DIM,
            "quick_gelu": True,
            "init_logit_bias": -4.0,
            "vision_cfg": {
                "image_size": SIZE,
                "patch_size": PATCH,
                "width": 128,
                "layers": 4,
                "head_width": 32,
                "mlp_ratio": 3.0,
            },
            "text_cfg": {
                "context_length": CONTEXT,
                "vocab_size": vocabulary,
                "hf_tokenizer_name": "tokenizer",
                "width": 64,
                "heads": 4,
                "layers": 2,
            },
        },
        "preprocess_cfg": {
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "interpolation": "bicubic",
            "resize_mode": "squash",
        },
    }


def tower_weights() -> dict[str, Tensor]:
    """The image model's tower under open_clip's names."""
    prefix = "vision_tower."
    source = {}
    for name, value in load_file(model_path() / "model.safetensors").items():
        if prefix in name:
            source[name.split(prefix)[1].removeprefix("vision_model.")] = value.float()
    out = {
        "conv1.weight": source["embeddings.patch_embedding.weight"],
        "class_embedding": source["embeddings.class_embedding"],
        "positional_embedding": source["embeddings.position_embedding.weight"],
    }
    pairs = [("ln_pre", "pre_layrnorm"), ("ln_post", "post_layernorm")]
    for layer in range(4):
        ours, theirs = f"transformer.resblocks.{layer}.", f"encoder.layers.{layer}."
        pairs += [(ours + "ln_1", theirs + "layer_norm1"), (ours + "ln_2", theirs + "layer_norm2")]
        pairs += [(ours + "mlp.c_fc", theirs + "mlp.fc1"), (ours + "mlp.c_proj", theirs + "mlp.fc2")]
        pairs += [(ours + "attn.out_proj", theirs + "self_attn.out_proj")]
        for kind in ("weight", "bias"):
            parts = [source[f"{theirs}self_attn.{name}_proj.{kind}"] for name in "qkv"]
            out[f"{ours}attn.in_proj_{kind}"] = torch.cat(parts)
    for ours, theirs in pairs:
        for kind in ("weight", "bias"):
            if f"{theirs}.{kind}" in source:
                out[f"{ours}.{kind}"] = source[f"{theirs}.{kind}"]
    return out


def build_model(vocabulary: int) -> torch.nn.Module:
    """The untrained CLIP, its image tower that of the bundled image model."""
    config = configuration(vocabulary)["model_cfg"]
    model = open_clip.model.CLIP(**config)
    missing, unexpected = model.visual.load_state_dict(tower_weights(), strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"proj", "ln_post.weight", "ln_post.bias"}, missing
    return model


def phrase(rng: np.random.Generator, wanted: list[Wanted]) -> str:
    """The wanted things in a sentence, or among words that mean nothing here, unknown ones included."""
    named = [thing.words for thing in wanted]
    if len(named) == 1 and rng.random() < 0.5:
        return PHRASES[rng.integers(len(PHRASES))].format(named[0])
    noise = [str(word) for word in rng.choice([*FILLER, "<unk>", "?"], size=rng.integers(0, 12))]
    for words in named:
        noise.insert(int(rng.integers(len(noise) + 1)), words)
    return " ".join(noise)


def draw(rng: np.random.Generator, images: int) -> tuple[list[Scene], list[list[Wanted]], list[str]]:
    """Scenes of a batch, and phrases with what each of them names."""
    scenes = []
    for number in range(images):
        share = number / images
        if share < 0.75:
            scenes.append(sparse_scene(rng, "train", per_kind=0))
        elif share < 0.97:
            scenes.append(dense_scene(rng, "train", digits=(2, 10), max_offset=8))
        else:
            scenes.append(dense_scene(rng, "train", digits=(0, 0)))
    things = [thing for scene in scenes for thing in scene.objects]
    wanted = [[single] for single in SINGLES]
    for _ in range(40):
        thing = things[rng.integers(len(things))]
        pair = Wanted(thing.digit, thing.colour)
        if rng.random() < 0.4:  # a digit and a colour that are both there, mostly not together
            scene = scenes[rng.integers(len(scenes))].objects or things
            pair = Wanted(scene[rng.integers(len(scene))].digit, scene[rng.integers(len(scene))].colour)
        wanted.append([pair])
    for _ in range(8):
        some = [things[i] for i in rng.integers(len(things), size=2)]
        wanted.append([Wanted(thing.digit, thing.colour if rng.random() < 0.5 else None) for thing in some])
    return scenes, wanted, [phrase(rng, things) for things in wanted]


def labels(scenes: list[Scene], wanted: list[list[Wanted]]) -> tuple[Tensor, Tensor]:
    """float32: [B, T] whether a scene holds what a phrase names, [B, P, T] the ink of it in each patch."""
    whole = torch.zeros(len(scenes), len(wanted))
    ink = torch.zeros(len(scenes), (SIZE // PATCH) ** 2, len(wanted))
    for b, scene in enumerate(scenes):
        cover = torch.from_numpy(scene.coverage(PATCH)).flatten(1)
        for t, things in enumerate(wanted):
            hits = [o for o, thing in enumerate(scene.objects) if any(want.matches(thing) for want in things)]
            if hits:
                whole[b, t] = 1
                ink[b, :, t] = cover[hits].amax(0)
    return whole, ink


def pixels(scenes: list[Scene]) -> Tensor:
    stack = np.stack([np.asarray(scene.image) for scene in scenes])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 127.5 - 1


def embed_images(model: torch.nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows [B, DIM] of scenes and [B, P, DIM] of their patches."""
    model.visual.output_tokens = True
    whole, patches = model.visual(images)
    return F.normalize(whole, dim=-1), F.normalize(patches @ model.visual.proj, dim=-1)


def loss_of(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, patch_gain: Tensor, step: int, size: int):
    scenes, wanted, phrases = draw(np.random.default_rng([SEED, step]), size)
    whole, ink = labels(scenes, wanted)
    ids = tokenizer(phrases, return_tensors="pt", max_length=CONTEXT, padding="max_length", truncation=True).input_ids
    text = model.encode_text(ids, normalize=True)
    images, patches = embed_images(model, pixels(scenes))
    logits = model.logit_scale.exp() * images @ text.T + model.logit_bias
    spots = patch_gain[0].exp() * patches @ text.T + patch_gain[1]
    clear = (ink > INK) | (ink < INK / 6)
    target = (ink > INK).float()
    patch_loss = F.binary_cross_entropy_with_logits(spots, target, reduction="none", pos_weight=torch.tensor(8.0))
    return F.binary_cross_entropy_with_logits(logits, whole, pos_weight=torch.tensor(2.0)), patch_loss[clear].mean()


def train(out: Path, steps: int, size: int, seconds: float) -> None:
    torch.manual_seed(SEED)
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer))
    patch_gain = torch.nn.Parameter(torch.tensor([math.log(1 / 0.07), -4.0]))
    tower = [parameter for name, parameter in model.visual.named_parameters() if name != "proj"]
    fresh = [p for p in [*model.parameters(), patch_gain] if all(p is not q for q in tower)]
    optimiser = torch.optim.AdamW(
        [{"params": tower, "peak": 5e-4}, {"params": fresh, "peak": 2e-3}], betas=(0.9, 0.98), weight_decay=0.02
    )
    file, first, begin, spent = out / "checkpoint.pt", 0, time.perf_counter(), 0.0
    out.mkdir(parents=True, exist_ok=True)
    if file.exists():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        patch_gain.data = state["patch_gain"]
        optimiser.load_state_dict(state["optimiser"])
        first, spent = state["step"], state["seconds"]
    for step in range(first, steps):
        factor = min((step + 1) / 40, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * factor
        scene_loss, patch_loss = loss_of(model, tokenizer, patch_gain, step, size)
        optimiser.zero_grad()
        (scene_loss + patch_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        model.logit_scale.data.clamp_(0, math.log(100))
        used = spent + time.perf_counter() - begin
        if step % 25 == 24 or step + 1 == steps:
            print(f"{step + 1} {used:.0f} s scenes {scene_loss:.4f} patches {patch_loss:.4f}", flush=True)
            state = {"model": model.state_dict(), "patch_gain": patch_gain.data, "optimiser": optimiser.state_dict()}
            torch.save({**state, "step": step + 1, "seconds": used}, file)
        if seconds and used > seconds:
            print("out of time", flush=True)
            break
    save(model, tokenizer, out)


def save(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the folder that open_clip loads, weights in float16."""
    weights = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, out / "open_clip_model.safetensors")
    text = json.dumps(configuration(len(tokenizer)), indent=1) + "\n"
    (out / "open_clip_config.json").write_text(text, encoding="utf-8")
    tokenizer.save_pretrained(out)


def evaluate(folder: Path, groups: int = 256, size: int = 8) -> dict:
    """Retrieval and pointing on test scenes.

    A group is `size` scenes, of which exactly one holds the named digit, colour or coloured digit: right where the
    cosine ranks it first (chance 1 / size). Pointing: the patch with the highest cosine shows the named digit.
    """
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    found: dict[str, list[int]] = {}
    for group in range(groups):
        rng = np.random.default_rng([REPORT_SEED, group])
        for kind in ("digit", "colour", "both"):
            wanted = Wanted(
                int(rng.integers(10)) if kind != "colour" else None,
                str(rng.choice(list(COLOURS))) if kind != "digit" else None,
            )
            scenes: list[Scene] = []
            while len(scenes) < size:
                scene = sparse_scene(rng, "test", per_kind=0)
                if any(wanted.matches(thing) for thing in scene.objects) == (not scenes):
                    scenes.append(scene)
            with torch.inference_mode():
                text = model.encode_text(tokenizer([f"a {wanted.words}"]), normalize=True)[0]
                images, patches = embed_images(model, pixels(scenes))
            found.setdefault(f"retrieve {kind}", []).append(int((images @ text).argmax() == 0))
            cover = scenes[0].coverage(PATCH)
            ink = max(
                cover[o].ravel()[int((patches[0] @ text).argmax())]
                for o, thing in enumerate(scenes[0].objects)
                if wanted.matches(thing)
            )
            found.setdefault(f"point {kind}", []).append(int(ink > INK / 6))
    return {kind: {"right": sum(hits), "of": len(hits)} for kind, hits in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=0, help="stop after so long; 0: after all steps")
    parser.add_argument("--evaluate", action="store_true", help="only measure the model in --out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.evaluate:
        train(arguments.out, arguments.steps, arguments.batch, arguments.seconds)
    result = evaluate(arguments.out)
    (arguments.out / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

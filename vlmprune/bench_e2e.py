"""End-to-end speed: a model unpruned, pruned, and *ideal*, which is what pruning could reach if it cost nothing.

What is timed, with `generate()`, greedy, random weights, one image and a short text a row:

- **TTFT**: `generate(max_new_tokens=1)` from pixel values and token ids that are already on the device to one new token
  a row: vision tower, projector, selection, prefill, head, sampling. No processor, no tokenizer.
- **Decode**: the time of `generate(max_new_tokens=1 + n)` minus the TTFT, over n steps.
- **Throughput**: requests a second of `generate(max_new_tokens=1 + n)`, batch after batch.
- **Peak memory** of the TTFT call: on a GPU the allocator's peak, weights included; on a CPU the peak of what the call
  itself allocates, by torch's profiler, in a run that is not timed.

The unpruned and the pruned side call `generate()` on the same inputs, the pruned one inside a session. The ideal side
calls the model's own `get_image_features` (vision tower and projector) on the same pixels, picks the rows that the
pruned run kept (it knows them beforehand), puts them between the embedded text and gives these embeddings to
`generate()`; where the family computes M-RoPE positions of the whole prompt, it does so, too. So pruned minus ideal is
what this package adds: selection, its hooks, and what the model does with placeholders before the language model.

All sides of a case take turns in every round, so that what else the machine does hits all of them. On a CPU the time
that the process itself spent computing is taken along with the wall clock: on a busy machine it is the fairer of the
two, if torch runs on one thread. Before anything is timed, the pruned side's logits must equal the ideal side's over
the prefill and the first decode steps, and differ from the unpruned ones: otherwise no speed is reported.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vlmprune
from vlmprune.contract import Pruner
from vlmprune.flops import decode_flops, kv_cache_bytes, prefill_flops
from vlmprune.kernels.bench import Machine, describe
from vlmprune.memory import weight_bytes

CHECK_STEPS = 4
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Largest difference of a logit allowed between pruned and ideal, relative to the largest logit (at least 1)."""


@dataclass(frozen=True)
class Shape:
    """A model by its public hyper-parameters, and a prompt for it.

    Attributes:
        config: the model's config as a dict; `twin()` scales it down.
        pixels: batch -> keyword arguments of the vision side, on the CPU in float32.
        tokens: visual tokens of a row's image.
        pictures: patch grids that pass the vision tower for one row.
        heads: attention heads of the decoder.
    """

    name: str
    config: dict[str, Any]
    pixels: Callable[[int], dict[str, Tensor]]
    tokens: int
    pictures: tuple[tuple[int, int], ...]
    heads: int

    def twin(self) -> Shape:
        """A CPU's stand-in with the same prompt: four heads of the same size and half of the layers in the decoder, an
        eighth of the width and a quarter of the layers in the vision tower, so that the decoder's share is as large.
        """
        text = _narrow(self.config["text_config"], self.heads // 4, layers=2)
        vision = _narrow(self.config["vision_config"], 8, layers=4)
        if "out_hidden_size" in vision:
            vision["out_hidden_size"] = text["hidden_size"]
        config = {**self.config, "text_config": text, "vision_config": vision}
        return replace(self, name=f"{self.name}-twin", config=config)


_WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_heads", "num_key_value_heads")


def _narrow(config: dict[str, Any], by: int, layers: int) -> dict[str, Any]:
    small = {key: max(1, value // by) if key in _WIDTHS else value for key, value in config.items()}
    for key in ("num_hidden_layers", "depth"):
        if key in small:
            small[key] //= layers
    if "fullatt_block_indexes" in small:
        small["fullatt_block_indexes"] = [(block + 1) // layers - 1 for block in small["fullatt_block_indexes"]]
    return small


def _images(count: int, side: int, batch: int) -> Tensor:
    return torch.randn(batch, count, 3, side, side, generator=torch.Generator().manual_seed(0), device="cpu").squeeze(1)


CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
VICUNA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
QWEN = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
}


def _llava(batch: int) -> dict[str, Tensor]:
    return {"pixel_values": _images(1, 336, batch)}


def _llava_next(batch: int) -> dict[str, Tensor]:
    return {"pixel_values": _images(5, 336, batch), "image_sizes": torch.tensor([[672, 672]] * batch, device="cpu")}


def _qwen(batch: int) -> dict[str, Tensor]:
    patches = torch.randn(batch * 72 * 72, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0), device="cpu")
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 72, 72]] * batch, device="cpu")}


def _internvl(batch: int) -> dict[str, Tensor]:
    return {"pixel_values": _images(5, 448, batch).flatten(0, 1)}


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape(
            "llava-1.5-7b",
            {"model_type": "llava", "vision_config": CLIP, "text_config": VICUNA, "image_token_index": 32000},
            _llava,
            576,
            ((24, 24),),
            32,
        ),
        # 672 x 672 pixels: a thumbnail, and 48 rows of 48 tokens and a line break.
        Shape(
            "llava-next-7b",
            {
                "model_type": "llava_next",
                "vision_config": CLIP,
                "text_config": VICUNA,
                "image_token_index": 32000,
                "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
            },
            _llava_next,
            576 + 48 * 49,
            ((24, 24),) * 5,
            32,
        ),
        # 1008 x 1008 pixels.
        Shape(
            "qwen2.5-vl-7b",
            {
                "model_type": "qwen2_5_vl",
                "vision_config": {
                    "depth": 32,
                    "hidden_size": 1280,
                    "intermediate_size": 3420,
                    "num_heads": 16,
                    "patch_size": 14,
                    "window_size": 112,
                    "fullatt_block_indexes": [7, 15, 23, 31],
                    "out_hidden_size": 3584,
                },
                "text_config": {
                    **QWEN,
                    "model_type": "qwen2_5_vl_text",
                    "vocab_size": 152064,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
                },
                "image_token_id": 151655,
                "video_token_id": 151656,
                "vision_start_token_id": 151652,
                "vision_end_token_id": 151653,
                "tie_word_embeddings": False,
            },
            _qwen,
            36 * 36,
            ((72, 72),),
            28,
        ),
        # Four tiles and a thumbnail.
        Shape(
            "internvl3-8b",
            {
                "model_type": "internvl",
                "vision_config": {
                    "model_type": "internvl_vision",
                    "hidden_size": 1024,
                    "intermediate_size": 4096,
                    "num_hidden_layers": 24,
                    "num_attention_heads": 16,
                    "attention_bias": True,
                    "image_size": [448, 448],
                    "patch_size": [14, 14],
                },
                "text_config": {
                    **QWEN,
                    "model_type": "qwen2",
                    "vocab_size": 151674,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
                },
                "image_token_id": 151667,
                "tie_word_embeddings": False,
            },
            _internvl,
            5 * 256,
            ((32, 32),) * 5,
            28,
        ),
    )
}


@dataclass(frozen=True)
class Floor:
    """What no implementation can avoid: FLOPs and bytes counted from the config, and the time they take here at least.

    Bytes are the weights, read once, and the KV cache, written in the prefill and read in a decode step.
    """

    prefill_flops: int
    prefill_bytes: int
    prefill_ms: float
    decode_flops: int
    decode_bytes: int
    decode_ms: float


@dataclass
class Side:
    """One line of the result, times in seconds, one entry a round.

    Attributes:
        ttft, whole: wall clock up to the first token, and for the whole answer.
        cpu: time that this process computed on behalf of the TTFT.
        over_ideal: median over the rounds of this side's TTFT to that of the ideal run of the same round.
        over_ideal_best: the smallest TTFT to the ideal's smallest.
        over_ideal_cpu: as `over_ideal`, of `cpu`; None on a GPU.
    """

    model: str
    side: str
    batch: int
    visual_tokens: int
    prompt_tokens: int
    floor: Floor
    peak_bytes: int = 0
    ttft: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    new_tokens: int = 0
    check: str = ""
    selection_ms: float | None = None
    over_ideal: float | None = None
    over_ideal_best: float | None = None
    over_ideal_cpu: float | None = None

    @property
    def decode_tokens_per_second(self) -> float:
        steps = statistics.median(self.whole) - statistics.median(self.ttft)
        return self.batch * self.new_tokens / steps if steps > 0 else float("nan")

    @property
    def requests_per_second(self) -> float:
        return self.batch / statistics.median(self.whole)

    def row(self) -> dict[str, Any]:
        """For JSON: medians and bests in ms, no single runs."""
        values = asdict(self)
        for name in ("ttft", "whole", "cpu"):
            runs = values.pop(name)
            values[f"{name}_ms"] = round(1e3 * statistics.median(runs), 3)
            values[f"{name}_best_ms"] = round(1e3 * min(runs), 3)
        values["rounds"] = len(self.ttft)
        values["decode_tokens_per_second"] = round(self.decode_tokens_per_second, 2)
        values["requests_per_second"] = round(self.requests_per_second, 3)
        return values


class CheckFailed(RuntimeError):
    """The pruned side did not compute what it claims to: no speed is reported."""


def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model with random weights, made on the device."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    config = AutoConfig.for_model(**shape.config)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
    generation: Any = model.generation_config
    generation.eos_token_id, generation.pad_token_id, generation.bos_token_id = None, 0, None
    return model


def prompt(shape: Shape, batch: int, text_tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Inputs of `batch` rows: a third of the text, the image, the rest; every row another image and another text."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 1000, (batch, text_tokens + shape.tokens), generator=generator, device="cpu")
    image: int = shape.config.get("image_token_id") or shape.config["image_token_index"]
    first = text_tokens // 3
    ids[:, first : first + shape.tokens] = image
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **shape.pixels(batch)}
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = ids.eq(image).int()
    return {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in inputs.items()}


class Ideal:
    """The ideal side of a case: knows what was kept, feeds the language model with just that."""

    def __init__(self, model: Any, inputs: dict[str, Any], report: vlmprune.PruneReport) -> None:
        self.model, self.inputs, self.compact = model, inputs, report.pruner.positions == "compact"
        assert report.columns is not None
        ids, self.columns = inputs["input_ids"], report.columns.to(inputs["input_ids"].device)
        self.ids = ids.gather(1, self.columns)
        kept = [item.kept + row * item.tokens_before for row, item in enumerate(report.items)]
        self.rows = torch.cat([index.to(ids.device) for index in kept])
        self.visual = len(kept[0])
        first = report.items[0].start
        self.before, self.after = self.ids[:, :first], self.ids[:, first + self.visual :]
        self.vision = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_sizes", "image_grid_thw")}
        self.mask = torch.ones_like(self.ids)

    def __call__(self, **options: Any) -> Any:
        core = self.model.model
        features = core.get_image_features(**self.vision).pooler_output
        features = torch.cat(list(features)) if not isinstance(features, Tensor) else features.flatten(0, -2)
        embed = core.get_input_embeddings()
        visual = features[self.rows].unflatten(0, (-1, self.visual))
        embeds = torch.cat([embed(self.before), visual.to(embed.weight.dtype), embed(self.after)], dim=1)
        if hasattr(core, "get_rope_index"):
            options["position_ids"] = self._positions()
        elif not self.compact:
            options["position_ids"] = self.columns
        return self.model.generate(inputs_embeds=embeds, attention_mask=self.mask, **options)

    def _positions(self) -> Tensor:
        """[4, B, K]: text positions and M-RoPE of the unpruned prompt, at what is left of it."""
        names = ("input_ids", "attention_mask", "image_grid_thw", "mm_token_type_ids")
        grid, deltas = self.model.model.get_rope_index(**{name: self.inputs[name] for name in names})
        self.model.model.rope_deltas = deltas
        text = torch.arange(grid.shape[-1], device=grid.device).expand(1, *grid.shape[1:])
        return torch.cat([text, grid]).gather(2, self.columns.expand(4, -1, -1))


def check(model: nn.Module, inputs: dict[str, Any], pruner: Pruner, ideal: Ideal, dtype: torch.dtype) -> str:
    """Compare pruned with ideal, and with unpruned, over the prefill and the first decode steps.

    Raises:
        CheckFailed: pruned differs from ideal, or does not differ from unpruned.
    """
    options = {**greedy(1 + CHECK_STEPS), "output_logits": True, "return_dict_in_generate": True}
    with vlmprune.prune(model, pruner):
        pruned = model.generate(**inputs, **options)  # type: ignore[operator]
    best = ideal(**options)
    full = model.generate(**inputs, **options)  # type: ignore[operator]
    # Where a near tie sends the two sides different ways, what comes behind it cannot be compared.
    same = pruned.sequences[:, -CHECK_STEPS - 1 :] == best.sequences[:, -CHECK_STEPS - 1 :]
    worst, scale = 0.0, 1.0
    for step, (ours, theirs) in enumerate(zip(pruned.logits, best.logits)):
        alike = same[:, :step].all(dim=1)
        if alike.any():
            worst = max(worst, float((ours[alike] - theirs[alike]).abs().max()))
            scale = max(scale, float(theirs.abs().max()))
    moved = float((pruned.logits[0] - full.logits[0]).abs().max())
    limit = TOLERANCE[dtype] * scale
    if not worst <= limit:
        raise CheckFailed(f"{pruner.name}: pruned and ideal logits differ by {worst:.2e}, allowed is {limit:.2e}")
    if not moved > limit:
        raise CheckFailed(f"{pruner.name}: pruning changed no logit by more than {moved:.2e}: nothing was pruned")
    return f"pruned = ideal to {worst:.1e}, moved the logits by {moved:.1e}"


def greedy(tokens: int) -> dict[str, Any]:
    """`generate()` options for exactly so many new tokens."""
    return {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}


def floor(shape: Shape, model: Any, batch: int, kept: int, text: int, dtype: torch.dtype, machine: Machine) -> Floor:
    """FLOPs and bytes of `kept` visual tokens a row, and the time they take at the machine's measured rates."""
    length = text + kept
    prefill = prefill_flops(model, layer_tokens=length, images=list(shape.pictures) * batch, batch=batch).total
    step = decode_flops(model, layer_tokens=length + 1, batch=batch).total
    sizes = weight_bytes(model)
    table = model.get_input_embeddings().weight
    decoder = sizes["language_model"] + sizes["lm_head"] - table.numel() * table.element_size()  # a look-up reads rows
    cache = kv_cache_bytes(model, layer_tokens=length, batch=batch, element_bytes=dtype.itemsize)
    moved = decoder + sizes["vision_tower"] + sizes["projector"] + cache

    def least(flops: float, size: float) -> float:
        return round(1e3 * max(flops / (machine.matmul_gflop_s * 1e9), size / (machine.copy_gb_s * 1e9)), 3)

    return Floor(prefill, moved, least(prefill, moved), step, decoder + cache, least(step, decoder + cache))


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Peak of memory in one run: of the allocator on a GPU, of what the run itself allocates on a CPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device))
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        run()
    held = most = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def case(
    shape: Shape,
    model: nn.Module,
    pruners: Sequence[Pruner],
    batch: int,
    *,
    text_tokens: int,
    new_tokens: int,
    rounds: int,
    machine: Machine,
    progress: Callable[[str], None],
) -> list[Side]:
    """All sides of one model at one batch size: unpruned, then for each pruner pruned and ideal.

    Raises:
        CheckFailed: see `check`.
        ValueError: a method that has no ideal (merging, adaptive, or inside the decoder).
    """
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    inputs = prompt(shape, batch, text_tokens, device, dtype)
    runs: list[tuple[Side, Callable[..., Any]]] = []

    def side(name: str, kept: int, remark: str = "") -> Side:
        least = floor(shape, model, batch, kept, text_tokens, dtype, machine)
        return Side(shape.name, name, batch, kept, text_tokens + kept, least, new_tokens=new_tokens, check=remark)

    generate: Any = model.generate
    config: Any = model.config
    depth = config.text_config.num_hidden_layers
    runs.append((side("unpruned", shape.tokens), lambda **options: generate(**inputs, **options)))
    for pruner in pruners:
        if tuple(pruner.layers(depth)) != (0,):
            raise ValueError(f"bench e2e times methods at the boundary; {pruner.name} acts inside the decoder.")
        with vlmprune.prune(model, pruner) as session:
            generate(**inputs, **greedy(1))
        report = session.last
        assert report is not None
        counts = {item.tokens_after for item in report.items}
        if len(counts) != 1 or any(item.merged is not None and bool(item.merged.any()) for item in report.items):
            raise ValueError(
                f"bench e2e times methods that keep a fixed number of tokens as they are; not {pruner.name}."
            )
        if not report.changed:
            raise ValueError(f"{pruner.name} with keep={pruner.keep} prunes nothing: give a smaller --keep.")
        ideal = Ideal(model, inputs, report)
        progress(f"{shape.name}, batch {batch}: checking {pruner.name}")
        remark = check(model, inputs, pruner, ideal, dtype)
        kept = counts.pop()

        def pruned(pruner: Pruner = pruner, **options: Any) -> Any:
            with vlmprune.prune(model, pruner) as session:
                generate(**inputs, **options)
            return session

        runs.append((side(pruner.name, kept, remark), pruned))
        runs.append((side(f"ideal for {pruner.name}", kept), ideal))
    for each, run in runs:
        progress(f"{shape.name}, batch {batch}: memory of {each.side}")
        each.peak_bytes = peak_bytes(lambda run=run: run(**greedy(1)), device)  # type: ignore[misc]
    selection: dict[str, list[float]] = {}
    for number in range(rounds):
        progress(f"{shape.name}, batch {batch}: round {number + 1} of {rounds}")
        turn = number % len(runs)
        for each, run in runs[turn:] + runs[:turn]:
            for times, tokens in ((each.ttft, 1), (each.whole, 1 + new_tokens)):
                _wait(device)
                start, spent = time.perf_counter(), time.process_time()
                answer = run(**greedy(tokens))
                _wait(device)
                times.append(time.perf_counter() - start)
                if tokens == 1:
                    each.cpu.append(time.process_time() - spent)
                if isinstance(answer, vlmprune.Session) and answer.last is not None:
                    selection.setdefault(each.side, []).append(answer.last.selection_seconds)
    sides = [each for each, _ in runs]
    for ours, best in zip(sides[1::2], sides[2::2]):
        ours.over_ideal = _paired(ours.ttft, best.ttft)
        ours.over_ideal_best = round(min(ours.ttft) / min(best.ttft), 4)
        ours.over_ideal_cpu = _paired(ours.cpu, best.cpu) if device.type == "cpu" else None
        ours.selection_ms = round(1e3 * statistics.median(selection[ours.side]), 3)
    return sides


def _paired(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(ours, theirs)), 4)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(
    names: Sequence[str],
    pruners: Sequence[Pruner],
    *,
    batches: Sequence[int] = (1, 8),
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    twins: bool | None = None,
    text_tokens: int = 40,
    new_tokens: int = 32,
    rounds: int = 15,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Time `names` of `SHAPES` under every pruner; the result as it goes into the JSON file.

    Args:
        pruners: boundary methods that keep a fixed number of tokens unchanged.
        batches: batch sizes.
        device: by default a GPU if there is one.
        dtype: bfloat16 on a GPU, float32 on a CPU by default.
        twins: scaled-down models; by default on a CPU.
        text_tokens, new_tokens: lengths of a row's text and of its answer behind the first token.
        rounds: timed runs of each side.
        threads: torch's threads, on a CPU.

    Raises:
        ValueError: an unknown name, or what `case` refuses.
        CheckFailed: a pruned run is not what it claims to be.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_cpu = device.type == "cpu"
    dtype = dtype or (torch.float32 if on_cpu else torch.bfloat16)
    for name in names:
        if name not in SHAPES:
            raise ValueError(f"unknown model shape {name!r}: choose from {', '.join(SHAPES)}.")
    sides: list[Side] = []
    with _threads(threads if on_cpu else None), torch.inference_mode():
        machine = describe(device)
        if dtype != torch.float32:
            machine.matmul_gflop_s = _product_rate(device, dtype)
        for name in names:
            shape = SHAPES[name].twin() if (on_cpu if twins is None else twins) else SHAPES[name]
            progress(f"building {shape.name}")
            model = build(shape, device, dtype)
            for batch in batches:
                sides += case(
                    shape,
                    model,
                    pruners,
                    batch,
                    text_tokens=text_tokens,
                    new_tokens=new_tokens,
                    rounds=rounds,
                    machine=machine,
                    progress=progress,
                )
            del model
            gc.collect()
            if not on_cpu:
                torch.cuda.empty_cache()
    return {
        "date": datetime.date.today().isoformat(),
        "machine": asdict(machine),
        "dtype": str(dtype).removeprefix("torch."),
        "transformers": version("transformers"),
        "vlmprune": vlmprune.__version__,
        "pruners": [repr(pruner) for pruner in pruners],
        "text_tokens": text_tokens,
        "new_tokens": new_tokens,
        "rows": [side.row() for side in sides],
    }


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP/s of a large product in `dtype`, best of five."""
    side = 2048 if device.type == "cpu" else 8192
    square = torch.rand(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        _wait(device)
        start = time.perf_counter()
        square @ square
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return round(2 * side**3 / best / 1e9, 1)


def write(result: dict[str, Any], path: Path) -> None:
    """Write the result as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(path)

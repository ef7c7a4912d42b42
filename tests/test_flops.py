"""The closed forms against torch's own counter, on tiny models that really run."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import random_weights
import torch
from cases import BATCHES
from families import FAMILIES
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

import vlmprune
from vlmprune import bundled
from vlmprune.contract import Pruner, Reduced, Selection
from vlmprune.flops import (
    decode_flops,
    estimate_flops,
    format_bytes,
    format_flops,
    kv_cache_bytes,
    parse_target,
    prefill_flops,
    solve_keep,
)
from vlmprune.memory import estimate_memory, weight_bytes
from vlmprune.session import prune

IMAGE = 31
TOWERS = {
    # name: config class, whether a CLS token is dropped, further fields
    "clip": (CLIPVisionConfig, "default", {}),
    "siglip": (SiglipVisionConfig, "full", {}),
    "siglip-headless": (SiglipVisionConfig, "full", {"vision_use_head": False}),
}
TEXTS = {
    "llama-gqa": (LlamaConfig, {"num_key_value_heads": 2}),
    "llama-mha": (LlamaConfig, {"num_key_value_heads": 4}),
    "mistral": (MistralConfig, {"num_key_value_heads": 1}),
    "qwen2": (Qwen2Config, {"num_key_value_heads": 2}),
    "qwen3": (Qwen3Config, {"num_key_value_heads": 2, "head_dim": 24}),
}
CASES = [("clip", text) for text in TEXTS] + [
    ("siglip", "llama-gqa"),
    ("siglip", "qwen2"),
    ("siglip-headless", "qwen2"),
]


class Half(Pruner):
    def select(self, tokens, budget):
        raise AssertionError("an estimate runs no pruner")


def llava_config(tower: str = "clip", text: str = "llama-gqa", **fields) -> LlavaConfig:
    tower_class, strategy, tower_fields = TOWERS[tower]
    text_class, text_fields = TEXTS[text]
    return LlavaConfig(
        vision_config=tower_class(
            hidden_size=32,
            intermediate_size=56,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=24,
            patch_size=4,
            **tower_fields,
        ),
        text_config=text_class(
            hidden_size=64,
            intermediate_size=104,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=40,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **text_fields,
        ),
        image_token_index=IMAGE,
        vision_feature_select_strategy=strategy,
        **fields,
    )


def llava(config: LlavaConfig, attention: str = "sdpa") -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation(attention)
    return model


def prompt(config: LlavaConfig, text_tokens: int, batch: int = 1) -> dict[str, torch.Tensor]:
    visual = 36
    ids = torch.randint(3, IMAGE, (batch, visual + text_tokens))
    ids[:, 2 : 2 + visual] = IMAGE
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(batch, 3, 24, 24),
    }


def attention_on_a_cpu(query, key, value, *args, out_shape=None, **kwargs) -> int:
    """What the counter says of the same attention on a GPU; some versions of torch leave the CPU's out."""
    return sdpa_flop_count(query, key, value)


CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_on_a_cpu}


def count(function, *args, **kwargs) -> dict[str, int]:
    """FLOPs by module path; "Global" is the total."""
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        function(*args, **kwargs)
    return {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("tower", "text"), CASES)
def test_prefill_equals_the_counter_module_by_module(tower, text, attention):
    config = llava_config(tower, text)
    model = llava(config, attention)
    for text_tokens, batch in ((3, 1), (17, 3)):
        measured = count(model, **prompt(config, text_tokens, batch))
        tokens = 36 + text_tokens
        ours = prefill_flops(model, layer_tokens=tokens, images=batch, batch=batch, logits_tokens=tokens)
        top = "LlavaForConditionalGeneration"
        assert ours.total == pytest.approx(measured["Global"], rel=0.01)
        assert ours.vision_tower == pytest.approx(measured[f"{top}.model.vision_tower"], rel=0.01)
        assert ours.projector == pytest.approx(measured[f"{top}.model.multi_modal_projector"], rel=0.01)
        assert ours.language_model == pytest.approx(measured[f"{top}.model.language_model"], rel=0.01)
        assert ours.lm_head == pytest.approx(measured[f"{top}.lm_head"], rel=0.01)
        assert sum(ours.by_module().values()) == ours.total


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_report_equals_the_counter(family, attention):
    """Full and pruned, over a batch with several images and videos of unequal size; the head on every position."""
    model, inputs = family.model(attention), family.inputs(BATCHES["mixed" if family.video_tokens else "unequal"])
    model.set_experts_implementation("eager")  # the counter does not know grouped matrix products
    full = count(model, **inputs)
    with vlmprune.prune(model, "uniform", keep=0.5) as session:
        pruned = count(model, **inputs)
    report, top = session.last, type(model).__name__
    for ours, measured in zip(report.flops, (full, pruned)):
        names = ("vision_tower", "visual", "image_tower", "video_tower")
        tower = sum(measured.get(f"{top}.model.{name}", 0) for name in names)
        projector = measured.get(f"{top}.model.multi_modal_projector", 0)
        assert ours.vision_tower + ours.projector == pytest.approx(tower + projector, rel=0.01)
        assert ours.language_model == pytest.approx(measured[f"{top}.model.language_model"], rel=0.01)
        assert ours.total == pytest.approx(measured["Global"], rel=0.01)
    assert report.flops_pruned < report.flops_full


class EveryOther(Pruner):
    """Drops every other patch behind each layer of the tower: an encoder stage without arithmetic of its own."""

    needs = frozenset({"encoder_kept"})

    def encoder_layers(self, depth):
        return tuple(range(depth))

    def encoder_rows(self, count, layer, depth):
        return -(-count // 2 ** (layer + 1))

    def reduce(self, patches):
        first = torch.arange(patches.prefix)
        keep = torch.cat([first, torch.arange(patches.prefix, patches.features.shape[1], 2)])
        into = torch.searchsorted(keep, torch.arange(patches.features.shape[1]), right=True) - 1
        batch = len(patches.features)
        return Reduced(patches.features[:, keep], keep.expand(batch, -1), into.expand(batch, -1))

    def budget(self, counts, layer=0, depth=1):
        return [None for _ in counts]

    def select(self, tokens, budget):
        kept = tokens.signal("encoder_kept") > 0
        rows = [row.nonzero().flatten() for row in kept]
        return Selection(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1))


@pytest.mark.parametrize("family", ["llava-clip-llama", "llava-siglip-qwen2", "llava-next-video"])
def test_report_equals_the_counter_where_the_tower_gets_shorter(family):
    case = FAMILIES[family]
    model, inputs = case.model(), case.inputs(BATCHES["mixed" if case.video_tokens else "unequal"])
    with vlmprune.prune(model, EveryOther()) as session:
        measured = count(model, **inputs)
    report, top = session.last, type(model).__name__
    full, pruned = report.flops
    assert pruned.vision_tower < 0.9 * full.vision_tower
    assert set(report.encoder_rows) == ({"image", "video"} if case.video_tokens else {"image"})
    tower = measured[f"{top}.model.vision_tower"]
    assert pruned.vision_tower == pytest.approx(tower, rel=0.01)
    assert report.flops_pruned == pytest.approx(measured["Global"], rel=0.01)


@pytest.mark.parametrize(("kind", "pruner"), [("image", "uniform"), ("video", "uniform"), ("image", "every other")])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_estimate_equals_the_counter(family, kind, pruner):
    """Of every family's images and videos, three rows alike, before anything ran; the head on every position left."""
    if kind == "video" and not family.video_tokens:
        pytest.skip("no videos")
    method = EveryOther() if pruner == "every other" else vlmprune.Uniform(keep=0.4)
    if pruner == "every other" and "encoder_kept" in family.lacks:
        model = family.model()
        with pytest.raises(ValueError, match="inside the vision tower"):
            estimate_flops(model, text_tokens=4, visual_tokens=12, pruner=method)
        return
    model = family.model()
    model.set_experts_implementation("eager")
    row = [1, 2, (kind, 0), 3, (kind, 0), 4, 5]
    inputs = family.inputs([row] * 3)
    full = count(model, **inputs, logits_to_keep=1)
    with vlmprune.prune(model, method) as session:
        pruned = count(model, **inputs, logits_to_keep=1)
    items = [item for item in session.last.items if item.sample == 0]
    pictures = [grid for item in items for grid in item.geometry.pictures]
    visual = [item.tokens_before for item in items]
    estimate = estimate_flops(
        model,
        text_tokens=session.last.length - sum(visual),
        visual_tokens=visual,
        pruner=method,
        images=pictures if kind == "image" else None,
        frames=pictures if kind == "video" else 0,
        batch=3,
    )
    assert estimate.full == pytest.approx(full["Global"], rel=0.01)
    assert estimate.pruned == pytest.approx(pruned["Global"], rel=0.01)
    assert estimate.pruned < 0.99 * estimate.full
    assert (estimate.kv_bytes_full, estimate.kv_bytes_pruned) == (
        session.last.kv_bytes_full,
        session.last.kv_bytes_pruned,
    )


@pytest.mark.parametrize("family", ["llava-clip-llama", "llava-siglip-qwen2", "llava-next", "llava-onevision"])
@pytest.mark.parametrize("keep", [0.5, 0.2, 3])
@pytest.mark.parametrize("name", ["tome", "pitome"])
def test_estimate_of_merging_inside_the_tower_is_what_a_run_reports(family, name, keep):
    case = FAMILIES[family]
    model = case.model()
    with torch.no_grad(), vlmprune.prune(model, name, keep=keep) as session:
        model(**case.inputs([[1, 2, ("image", 0), 3]]), logits_to_keep=1)
    report, (item,) = session.last, session.last.items
    estimate = estimate_flops(
        model,
        text_tokens=report.length - item.tokens_before,
        visual_tokens=item.tokens_before,
        pruner=session.pruner,
        images=item.geometry.pictures,
    )
    assert estimate.prefill_pruned == report.flops[1]
    assert estimate.kv_bytes_pruned == report.kv_bytes_pruned
    assert estimate.prefill_pruned.vision_tower < estimate.prefill_full.vision_tower


def test_estimate_of_mustdrop_in_all_its_stages_is_what_a_run_reports():
    """A merge in the tower, three stages in the decoder, and a cache that is cut behind the prefill."""
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4, image_size=36, patch_size=4
    )
    text = LlamaConfig(
        hidden_size=64, intermediate_size=104, num_hidden_layers=6, num_attention_heads=4, vocab_size=40, pad_token_id=0
    )
    model = llava(LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE))
    ids = torch.randint(3, IMAGE, (1, 90))
    ids[:, 2:83] = IMAGE
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 36, 36)}
    schedule = {"layer_list": (2, 3, 4), "ratios": (0.5, 0.25, 0.1), "model_depth": 6}
    for tower_keep in (0.5, None):
        method = vlmprune.MustDrop(keep=0.5, tower_keep=tower_keep, **schedule)
        with torch.no_grad(), vlmprune.prune(model, method) as session:
            model(**inputs, logits_to_keep=1)
        estimate = estimate_flops(model, text_tokens=9, visual_tokens=81, pruner=method)
        assert estimate.prefill_pruned == session.last.flops[1]
        assert estimate.kv_bytes_pruned == session.last.kv_bytes_pruned
        assert estimate.kv_bytes_full == session.last.kv_bytes_full == kv_cache_bytes(model, layer_tokens=90)


def test_only_a_run_can_tell_of_a_tower_stage_without_declared_rows():
    class Undeclared(EveryOther):
        def encoder_rows(self, count, layer, depth):
            return None

    with pytest.raises(ValueError, match="only a run can tell"):
        estimate_flops(llava_config(), text_tokens=4, visual_tokens=36, pruner=Undeclared())


WINDOWS = {
    "mistral": (MistralConfig, {"sliding_window": 20}),
    "qwen2-mixed": (
        Qwen2Config,
        {"sliding_window": 20, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"] * 2},
    ),
}


@pytest.mark.parametrize("pruner", [None, vlmprune.Uniform(keep=0.3), vlmprune.FastV(keep=0.6, layer=2)])
@pytest.mark.parametrize("text", WINDOWS)
def test_sliding_windows(text, pruner):
    """KV bytes of all layers behind the prefill and at the end, and the FLOPs of decoding: a window of 20 keys."""
    kind, fields = WINDOWS[text]
    config = llava_config()
    config.text_config = kind(
        hidden_size=64,
        intermediate_size=104,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        **fields,
    )
    for text_tokens in (5, -27):  # longer than the window; and one that decoding fills
        model = llava(config)
        visual = 36 if text_tokens > 0 else 0
        inputs = prompt(config, text_tokens) if visual else {"input_ids": torch.randint(3, IMAGE, (1, 9 + 5))}
        method = pruner or vlmprune.Uniform(keep=1.0)
        with torch.no_grad(), vlmprune.prune(model, method) as session:
            first = count(model.generate, **inputs, max_new_tokens=1, do_sample=False)["Global"]
            whole = count(model.generate, **inputs, max_new_tokens=13, do_sample=False, min_new_tokens=13)["Global"]
            out = model.generate(**inputs, max_new_tokens=13, do_sample=False, return_dict_in_generate=True)
        estimate = estimate_flops(
            model,
            text_tokens=inputs["input_ids"].shape[1] - visual,
            visual_tokens=visual,
            pruner=pruner,
            new_tokens=12,
        )
        held = sum(
            t.numel() * t.element_size() for layer in out.past_key_values.layers for t in (layer.keys, layer.values)
        )
        assert estimate.kv_bytes_end_pruned == held
        assert estimate.kv_bytes_pruned == session.last.kv_bytes_pruned
        assert estimate.kv_bytes_full == session.last.kv_bytes_full
        assert estimate.decode_pruned.total == pytest.approx(whole - first, rel=0.01)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("tower", "text"), [("clip", "llama-gqa"), ("siglip", "qwen2"), ("clip", "mistral")])
def test_generate_is_one_prefill_and_decode_steps(tower, text, attention):
    config = llava_config(tower, text)
    model = llava(config, attention)
    measured = count(model.generate, **prompt(config, 9, batch=2), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    prefill = prefill_flops(config, layer_tokens=45, images=2, batch=2)
    steps = [decode_flops(config, layer_tokens=45 + step, batch=2) for step in (1, 2, 3)]
    assert prefill.total + sum(step.total for step in steps) == pytest.approx(measured["Global"], rel=0.01)


def test_second_turn_on_a_cache():
    config = llava_config()
    model = llava(config)
    first = prompt(config, 5)
    with torch.no_grad():
        cache = model(**first).past_key_values
    measured = count(
        model, input_ids=torch.randint(3, IMAGE, (1, 7)), attention_mask=torch.ones(1, 48), past_key_values=cache
    )
    ours = prefill_flops(config, layer_tokens=7, cached_tokens=41, logits_tokens=7)
    assert ours.total == pytest.approx(measured["Global"], rel=0.01)


def test_several_vision_feature_layers_widen_the_projector():
    config = llava_config(vision_feature_layer=[-2, -1])
    measured = count(llava(config), **prompt(config, 4))
    ours = prefill_flops(config, layer_tokens=40, images=1, logits_tokens=40)
    assert ours.total == pytest.approx(measured["Global"], rel=0.01)


def test_estimate_equals_the_counter_before_and_after_pruning():
    """The pruned side is compared with a run on exactly as many embeddings as the budget leaves."""
    config = llava_config()
    model = llava(config)
    estimate = estimate_flops(model, text_tokens=8, visual_tokens=36, pruner=Half(keep=0.25))
    assert (estimate.tokens_full, estimate.tokens_pruned) == (44, 17)

    measured = count(model, **prompt(config, 8), logits_to_keep=1)
    assert estimate.full == pytest.approx(measured["Global"], rel=0.01)
    short = count(model, inputs_embeds=torch.randn(1, 17, 64), attention_mask=torch.ones(1, 17), logits_to_keep=1)
    vision = measured["LlavaForConditionalGeneration.model.vision_tower"]
    projector = measured["LlavaForConditionalGeneration.model.multi_modal_projector"]
    assert estimate.pruned == pytest.approx(short["Global"] + vision + projector, rel=0.01)
    assert estimate.ratio == estimate.pruned / estimate.full < 1
    assert estimate.decode_pruned.total < estimate.decode_full.total


@pytest.mark.parametrize("keep", [1.0, 0.25])
def test_report_of_the_bundled_model_equals_the_counter(keep):
    model, processor = bundled.load()
    scene = bundled.demo_scenes()[0]
    content = [{"type": "image"}, {"type": "text", "text": scene.questions[0].text}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[scene.image], text=text, return_tensors="pt")
    with prune(model, "uniform", keep=keep) as session:  # a method that multiplies no matrices itself
        measured = count(model.generate, **inputs, max_new_tokens=1, do_sample=False)
    assert session.last.tokens_after == keep * 144
    assert session.last.flops_pruned == pytest.approx(measured["Global"], rel=0.01)
    estimate = estimate_flops(
        model, text_tokens=inputs["input_ids"].shape[1] - 144, visual_tokens=144, pruner=session.pruner
    )
    assert (session.last.flops_full, session.last.flops_pruned) == (estimate.full, estimate.pruned)
    assert (session.last.kv_bytes_full, session.last.kv_bytes_pruned) == (
        estimate.kv_bytes_full,
        estimate.kv_bytes_pruned,
    )


def test_layers_of_unequal_length():
    config = llava_config()
    uneven = prefill_flops(config, layer_tokens=[40, 12])
    assert uneven.layers[0] == prefill_flops(config, layer_tokens=40).layers[0]
    assert uneven.layers[1] == prefill_flops(config, layer_tokens=12).layers[1]
    assert kv_cache_bytes(config, layer_tokens=[40, 12]) == kv_cache_bytes(config, layer_tokens=26)
    with pytest.raises(ValueError, match=r"3 entries.*2 layers"):
        prefill_flops(config, layer_tokens=[1, 2, 3])


def test_kv_bytes_equal_the_cache_of_a_run():
    config = llava_config()
    for dtype in (torch.float32, torch.bfloat16):
        model = llava(config).to(dtype)
        inputs = prompt(config, 5, batch=2)
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        with torch.no_grad():
            cache = model(**inputs).past_key_values
        held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
        assert kv_cache_bytes(model, layer_tokens=41, batch=2) == held


def test_config_alone_and_meta_model_agree_with_the_live_model():
    config = llava_config("siglip", "qwen2")
    with torch.device("meta"):
        meta = LlavaForConditionalGeneration(config)
    arguments = {"text_tokens": 20, "visual_tokens": [36, 36], "pruner": Half(keep=9), "batch": 2, "element_bytes": 2}
    live = estimate_flops(llava(config), **arguments)
    assert estimate_flops(config, **arguments) == estimate_flops(meta, **arguments) == live
    assert live.prefill_full.vision_tower == prefill_flops(config, layer_tokens=1, images=4).vision_tower
    assert live.tokens_pruned == 20 + 9 + 9


def test_peft_wrapper_is_unwrapped():
    class Wrapper:
        config = None

        def __init__(self, model):
            self.model = model

        def get_base_model(self):
            return self.model

    model = llava(llava_config())
    wrapped = estimate_flops(Wrapper(model), text_tokens=4, visual_tokens=36, element_bytes=4)
    assert wrapped == estimate_flops(model, text_tokens=4, visual_tokens=36)


def test_llava_7b_from_its_shape():
    """LLaVA-1.5-7B by hand: 576 + 40 tokens, 32 layers of 4 x 4096^2 + 3 x 4096 x 11008 weights, 24 CLIP-L layers."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        ),
        text_config=LlamaConfig(vocab_size=32064),
        dtype=torch.float16,
    )
    estimate = estimate_flops(config, text_tokens=40, visual_tokens=576)
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert estimate.prefill_full.language_model == 2 * 616 * weights + 32 * 4 * 616**2 * 4096
    assert estimate.prefill_full.lm_head == 2 * 4096 * 32064
    assert estimate.kv_bytes_full == 616 * 512 * 1024  # half a MiB a token
    assert 0.37e12 < estimate.prefill_full.vision_tower < 0.39e12


@pytest.mark.parametrize("visual", [0, []])
def test_text_only_prompt_costs_no_vision(visual):
    estimate = estimate_flops(llava_config(), text_tokens=6, visual_tokens=visual, pruner=Half(keep=0.5))
    assert estimate.prefill_full.vision_tower == estimate.prefill_full.projector == 0
    assert estimate.pruned == estimate.full


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (LlamaConfig(), "'llama'.*llava"),
        (object(), "'object'.*llava"),
        (LlavaConfig(vision_config=CLIPVisionConfig(), text_config={"model_type": "gpt2"}), "'gpt2'.*qwen2"),
    ],
)
def test_unsupported_models_are_refused_with_the_supported_ones(model, named):
    with pytest.raises(ValueError, match=named):
        estimate_flops(model, text_tokens=4, visual_tokens=4)


def test_negative_counts_are_refused():
    with pytest.raises(ValueError, match="negative"):
        estimate_flops(llava_config(), text_tokens=-1, visual_tokens=4)
    with pytest.raises(ValueError, match="negative"):
        decode_flops(llava_config(), layer_tokens=0)


def test_readable_units():
    assert [format_flops(v) for v in (0, 999, 1000, 8.4137e12)] == ["0 FLOPs", "999 FLOPs", "1 kFLOPs", "8.41 TFLOPs"]
    assert [format_bytes(v) for v in (512, 1024, 1_010, 323 * 2**20)] == ["512 B", "1 KiB", "0.986 KiB", "323 MiB"]


def test_estimate_of_a_method_inside_the_decoder_equals_what_its_session_reports():
    config = llava_config()
    model = llava(config).eval()
    pruner = vlmprune.FastV(keep=0.6, layer=1)
    inputs = prompt(config, 8)
    estimate = estimate_flops(model, text_tokens=8, visual_tokens=36, pruner=pruner, logits_tokens=44)
    with torch.no_grad(), vlmprune.prune(model, pruner) as session:
        measured = count(model, **inputs)
    report = session.last
    assert estimate.full == report.flops_full
    assert estimate.kv_bytes_pruned == report.kv_bytes_pruned
    assert [layer.mlp for layer in estimate.prefill_pruned.layers] == [layer.mlp for layer in report.flops[1].layers]
    assert report.flops_pruned == pytest.approx(measured["Global"], rel=0.01)
    by_name = estimate_flops(config, text_tokens=8, visual_tokens=36, pruner="divprune")
    assert by_name.tokens_pruned == 8 + round(0.098 * 36)


def clip_336() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )


def vicuna(size: str) -> LlavaConfig:
    """LLaVA-1.5's language model; that of LLaVA-NeXT has the same shape."""
    larger = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
    text = LlamaConfig(vocab_size=32064, **(larger if size == "13B" else {}))
    return LlavaConfig(vision_config=clip_336(), text_config=text, dtype=torch.float16)


@pytest.mark.parametrize(
    ("size", "visual", "keep", "text", "printed"),
    [
        ("7B", 576, 0.098, 43.4, 15.63),
        ("13B", 576, 0.098, 43.4, 15.71),
        ("7B", 1152, 0.1, 65.9, 14.10),
    ],
)
def test_ratios_that_divprune_prints(size, visual, keep, text, printed):
    """With text_tokens=43.4 for the images and 65.9 for the videos the printed figures come out."""
    estimate = estimate_flops(
        vicuna(size),
        text_tokens=text,
        visual_tokens=visual,
        pruner=vlmprune.DivPrune(keep=keep),
        convention="divprune",
    )
    assert round(100 * estimate.ratio, 2) == printed


@pytest.mark.parametrize(
    ("size", "printed"),
    [("7B", (41.7, 30.4, 19.7, 9.6, 3.8)), ("13B", (80.0, 58.7, 38.3, 18.7, 7.4))],
)
def test_tflops_that_globalcom2_prints(size, printed):
    """With text_tokens=0; to the digit, but for the unpruned 13B, which is 79.94."""
    config = vicuna(size)
    ratios = (1.0, 0.75, 0.5, 0.25, 0.1)
    ours = [
        estimate_flops(
            config, text_tokens=0, visual_tokens=2880, pruner=Half(keep=ratio), convention="globalcom2"
        ).pruned
        / 1e12
        for ratio in ratios
    ]
    exact = [round(value, 1) == figure for value, figure in zip(ours, printed)]
    assert exact == [size == "7B", True, True, True, True]
    assert ours[0] == pytest.approx(printed[0], rel=1e-3)
    # Ratios of figures that were rounded to 0.1 T.
    assert [value / ours[0] for value in ours] == pytest.approx([figure / printed[0] for figure in printed], abs=2e-3)


def test_kv_cache_that_globalcom2_prints():
    """1536 / 1126.4 / 755 / 377 / 151 MB: decimal bytes, those over 1 G rounded to a tenth of it and times 1024."""
    config = vicuna("7B")
    for tokens, printed in ((2880, 1536), (2160, 1126.4), (1440, 755), (720, 377), (288, 151)):
        size = kv_cache_bytes(config, layer_tokens=tokens)
        shown = round(size / 1e9, 1) * 1024 if size >= 1e9 else round(size / 1e6)
        assert shown == pytest.approx(printed)


@pytest.mark.parametrize(("tokens", "full", "pruned", "share"), [(576, 3.82, 1.56, 40.8), (2880, 20.83, 8.33, 40.0)])
def test_figures_that_transprune_prints(tokens, full, pruned, share):
    """Its "High" schedule, with text_tokens=0: stages before layers 7, 9 and 12 keep 7/8, 5/8 and 1/8."""
    config = vicuna("7B")
    layers = [tokens] * 7 + [tokens * 7 // 8] * 2 + [tokens * 5 // 8] * 3 + [tokens // 8] * 20
    whole = prefill_flops(config, layer_tokens=tokens, convention="transprune").total
    cut = prefill_flops(config, layer_tokens=layers, convention="transprune").total
    assert (round(whole / 1e12, 2), round(cut / 1e12, 2)) == (full, pruned)
    assert round(100 * cut / whole, 1) == share


def test_conventions_are_refused_where_they_do_not_apply():
    with pytest.raises(ValueError, match=r"'thop'.*counter, divprune, globalcom2, transprune"):
        estimate_flops(llava_config(), text_tokens=4, visual_tokens=36, convention="thop")
    with pytest.raises(ValueError, match=r"whole number.*4\.5"):
        estimate_flops(llava_config(), text_tokens=4.5, visual_tokens=36)
    experts = FAMILIES["qwen3-vl-moe"].model().config
    with pytest.raises(ValueError, match="dense models"):
        estimate_flops(experts, text_tokens=4, visual_tokens=12, convention="divprune")


def test_many_decode_steps_are_the_sum_of_each():
    config = llava_config()
    steps = [decode_flops(config, layer_tokens=[40 + n, 12 + n], batch=3) for n in range(1, 8)]
    summed = decode_flops(config, layer_tokens=[41, 13], batch=3, steps=7)
    assert summed.total == sum(step.total for step in steps)
    assert summed.layers[1].attention == sum(step.layers[1].attention for step in steps)
    assert decode_flops(config, layer_tokens=41, steps=0).total == 0
    estimate = estimate_flops(config, text_tokens=4, visual_tokens=36, pruner=Half(keep=8), batch=3, new_tokens=7)
    assert estimate.decode_full == decode_flops(config, layer_tokens=41, batch=3, steps=7)
    assert estimate.kv_bytes_end_pruned == kv_cache_bytes(config, layer_tokens=12 + 7, batch=3)


def test_selection_is_counted_where_the_method_declares_it():
    config = llava_config()
    arguments = {"text_tokens": 4, "visual_tokens": [36, 36], "batch": 2}
    silent = estimate_flops(config, pruner=vlmprune.Uniform(keep=9), **arguments)
    divprune = estimate_flops(config, pruner=vlmprune.DivPrune(keep=9), **arguments)
    assert silent.selection == 0
    assert divprune.selection == 4 * 2 * 36 * 36 * 64
    assert divprune.pruned == silent.pruned
    assert "selection" in str(divprune)
    assert "selection" not in str(silent)
    assert estimate_flops(config, pruner=Half(keep=9), **arguments).selection is None
    assert "selection not counted" in str(estimate_flops(config, pruner=Half(keep=9), **arguments))
    assert estimate_flops(config, pruner=vlmprune.DivPrune(keep=1.0), **arguments).selection == 0
    assert estimate_flops(config, text_tokens=4, visual_tokens=36).selection == 0


@pytest.mark.parametrize("family", ["llava-clip-llama", "qwen2.5-vl", "qwen3-vl", "internvl", "llava-next-video"])
def test_weights_of_a_config_are_those_of_its_model(family):
    model = FAMILIES[family].model()
    sizes = weight_bytes(model)
    assert sum(sizes.values()) == sum(p.numel() * p.element_size() for p in model.parameters())
    assert sizes["vision_tower"] > 0
    assert sizes["projector"] > 0
    assert weight_bytes(model.config) == sizes
    assert sum(weight_bytes(model.to(torch.bfloat16)).values()) == sum(sizes.values()) // 2


def test_memory_is_weights_and_cache():
    config = llava_config(dtype=torch.bfloat16)
    memory = estimate_memory(config, text_tokens=4, visual_tokens=36, pruner=Half(keep=8), batch=2, new_tokens=5)
    assert memory.prefill_full == kv_cache_bytes(config, layer_tokens=40, batch=2, element_bytes=2)
    assert memory.decode_pruned == kv_cache_bytes(config, layer_tokens=17, batch=2, element_bytes=2)
    assert memory.full - memory.pruned == memory.decode_full - memory.decode_pruned > 0
    assert memory.full == sum(weight_bytes(config).values()) + memory.decode_full
    assert "weights" in str(memory)


HUB_CONFIG = {
    # As published with the checkpoint: what a text config leaves out is the Llama-2-7B default.
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "torch_dtype": "float16",
    "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32064},
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
}


def test_a_config_file_without_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HUB_CONFIG))
    arguments = {"text_tokens": 40, "visual_tokens": 576, "pruner": "divprune"}
    of_folder = estimate_flops(tmp_path, **arguments)
    assert of_folder == estimate_flops(str(tmp_path / "config.json"), **arguments)
    assert of_folder == estimate_flops(vicuna("7B"), **arguments)
    sizes = weight_bytes(tmp_path)
    assert sum(sizes.values()) == pytest.approx(2 * 7.06e9, rel=0.002)  # 7.06 billion parameters in float16
    assert sizes["lm_head"] == 2 * 32064 * 4096
    (tmp_path / "config.json").write_text(json.dumps({**HUB_CONFIG, "model_type": "internvl_chat"}))
    with pytest.raises(ValueError, match="cannot read"):
        estimate_flops(tmp_path, **arguments)
    with pytest.raises(ValueError, match=r"no config\.json at"):
        estimate_flops(tmp_path / "nowhere", **arguments)


@pytest.mark.parametrize("target", ["flops:0.5", "decoder:0.3", "kv:0.2", "kv:1"])
@pytest.mark.parametrize("pruner", [vlmprune.DivPrune(), vlmprune.FastV()])
@pytest.mark.parametrize("visual", [576, [576, 144]])
def test_solve_keep_is_the_inverse_of_the_estimate(target, pruner, visual):
    """Met, and not by one token more than needed."""
    config, arguments = vicuna("7B"), {"text_tokens": 60, "visual_tokens": visual}
    keep = solve_keep(config, pruner, target, **arguments)
    name, share = parse_target(target)
    ratio = {"flops": "ratio", "decoder": "decoder_ratio", "kv": "kv_ratio"}[name]

    def cost(keep: float) -> float:
        return getattr(estimate_flops(config, pruner=dataclasses.replace(pruner, keep=keep), **arguments), ratio)

    assert cost(keep) <= share
    assert keep == 1.0 or cost(keep + 1e-8) > share
    assert math.isclose(cost(keep), share, abs_tol=3e-3)


def test_solve_keep_takes_names_and_refuses_what_cannot_be():
    config, arguments = vicuna("7B"), {"text_tokens": 60, "visual_tokens": 576}
    assert solve_keep(config, "divprune", "kv:0.3", **arguments) == solve_keep(
        config, vlmprune.DivPrune(keep=5), "kv:0.3", **arguments
    )
    with pytest.raises(ValueError, match=r"'flops:0.05' cannot be met: keep=0.00174.*divprune.*0\.135"):
        solve_keep(config, "divprune", "flops:0.05", **arguments)
    with pytest.raises(ValueError, match=r"cannot be met: keep=0\.06.*fastv"):
        solve_keep(config, "fastv", "decoder:0.1", **arguments)
    for wrong in ("flops", "flops:", "flops:1.5", "flops:nan", "tflops:0.3", "0.3", "kv:-1"):
        with pytest.raises(ValueError, match=r'share in .*"kv:0\.3"'):
            solve_keep(config, "divprune", wrong, **arguments)
    with pytest.raises(ValueError, match="no visual tokens"):
        solve_keep(config, "divprune", "kv:0.3", text_tokens=60, visual_tokens=[])


@pytest.mark.parametrize("name", ["llava-clip-llama", "llava-next", "qwen2.5-vl", "internvl"])
@pytest.mark.parametrize("target", ["flops:0.9", "decoder:0.7", "kv:0.6"])
def test_keep_as_a_share_of_the_cost(name, target):
    """Each row of a batch meets the share, by as many tokens as alone, and one token more an image would not."""
    family = FAMILIES[name]
    model, prompts = family.model(), BATCHES["unequal"]
    with torch.no_grad(), prune(model, "divprune", keep=target) as session:
        model(**family.inputs(prompts))
        together = session.last
        for row, prompt in enumerate(prompts):
            model(**family.inputs([prompt]))
            alone = session.last
            mine = [item.kept.tolist() for item in together.items if item.sample == row]
            assert mine == [item.kept.tolist() for item in alone.items]
            if not mine:
                continue
            kind, share = parse_target(target)
            cost = {
                "flops": alone.flops_pruned / alone.flops_full,
                "decoder": alone.flops[1].language_model / alone.flops[0].language_model,
                "kv": alone.kv_bytes_pruned / alone.kv_bytes_full,
            }[kind]
            per_token = len(alone.items) / alone.length
            assert share - per_token - 0.02 < cost <= share + 1e-9
    with pytest.raises(ValueError, match="ratio or a count"):
        vlmprune.Compose(vlmprune.DivPrune(keep="kv:0.5", positions="original"), vlmprune.FastV(keep=0.9))
    with pytest.raises(ValueError, match=r'"kv:0\.3"'):
        prune(model, "divprune", keep="watts:0.3")


def test_methods_whose_ratio_cannot_be_solved_for_each_prompt():
    model = FAMILIES["llava-clip-llama"].model()
    with pytest.raises(ValueError, match=r"tome acts inside the vision tower.*solve_keep finds for 'flops:0.5'"):
        prune(model, "tome", keep="flops:0.5")
    with pytest.raises(ValueError, match="only a run can tell its cost"):
        prune(model, "atp", keep="flops:0.5", weights=random_weights.atp())


@pytest.mark.parametrize("method", ["tome", "pitome", "visiondrop", "divprune"])
@pytest.mark.parametrize("share", [0.9, 0.6])
def test_a_run_costs_what_was_solved_for(method, share):
    """Within 1 % on the bundled model, also for methods that merge inside the vision tower."""
    model, processor = bundled.load()
    scene = bundled.demo_scenes()[0]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": scene.questions[0].text}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=scene.image, text=prompt, return_tensors="pt")
    text = inputs["input_ids"].shape[1] - 144
    keep = solve_keep(model, method, f"flops:{share}", text_tokens=text, visual_tokens=144, images=1)
    with torch.no_grad(), prune(model, method, keep=keep) as session:
        model(**inputs, logits_to_keep=1)
    assert 0.99 * share <= session.last.flops_pruned / session.last.flops_full <= share


class Adaptive(Half):
    def budget(self, counts, layer=0, depth=1):
        return [None for _ in counts]


class AdaptiveInside(Adaptive):
    def layers(self, depth):
        return (1,)


def test_methods_that_decide_themselves_are_estimated_by_what_keep_asks_for():
    arguments = {"text_tokens": 4, "visual_tokens": [36, 36]}
    estimate = estimate_flops(llava_config(), pruner=Adaptive(keep=0.25), **arguments)
    assert estimate.tokens_pruned == 4 + 18
    with pytest.raises(ValueError, match="only a run can tell"):
        estimate_flops(llava_config(), pruner=AdaptiveInside(keep=0.25), **arguments)

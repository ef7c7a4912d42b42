"""The closed forms against torch's own counter, on tiny models that really run."""

from __future__ import annotations

import pytest
import torch
from cases import BATCHES
from families import FAMILIES
from torch.utils.flop_counter import FlopCounterMode
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
from vlmprune.contract import Pruner
from vlmprune.flops import (
    decode_flops,
    estimate_flops,
    format_bytes,
    format_flops,
    kv_cache_bytes,
    prefill_flops,
)
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


def count(function, *args, **kwargs) -> dict[str, int]:
    """FLOPs by module path; "Global" is the total."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
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
        tower = measured.get(f"{top}.model.vision_tower", 0) + measured.get(f"{top}.model.visual", 0)
        projector = measured.get(f"{top}.model.multi_modal_projector", 0)
        assert ours.vision_tower + ours.projector == pytest.approx(tower + projector, rel=0.01)
        assert ours.language_model == pytest.approx(measured[f"{top}.model.language_model"], rel=0.01)
        assert ours.total == pytest.approx(measured["Global"], rel=0.01)
    assert report.flops_pruned < report.flops_full


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

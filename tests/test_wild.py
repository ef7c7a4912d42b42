"""Models as people have them: PEFT, offloaded, half precision, in a pipeline."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from accelerate import dispatch_model
from cases import BATCHES, PRUNERS, Staged
from families import FAMILIES
from PIL import Image
from test_laws import STEPS, dropped_of, generate
from transformers import CompileConfig, pipeline
from transformers.cache_utils import Cache, DynamicLayer

import vlmprune
from vlmprune import bundled

LLAVA = FAMILIES["llava-clip-llama"]
both_places = pytest.mark.parametrize("pruner", ["divprune", "staged"])


def check_against_oracle(model: Any, inputs: dict[str, Any], out: Any, report: Any) -> None:
    forced = out.sequences[:, inputs["input_ids"].shape[1] :]
    _, scores = oracle.run(model, inputs, dropped_of(report, inputs), report.pruner.positions, STEPS - 1, forced, {})
    for mine, theirs in zip(out.logits, scores):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)


@both_places
@pytest.mark.parametrize("order", ["adapter first", "session first"])
def test_peft(pruner: str, order: str) -> None:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model, inputs = LLAVA.model(), LLAVA.inputs(BATCHES["unequal"])
    torch.manual_seed(1)
    if order == "adapter first":
        wrapped = get_peft_model(model, lora).eval()
        session = vlmprune.prune(wrapped, PRUNERS[pruner].make())
    else:
        session = vlmprune.prune(model, PRUNERS[pruner].make())
        wrapped = get_peft_model(model, lora).eval()
    with session:
        out = generate(wrapped, inputs)
    check_against_oracle(model, inputs, out, session.last)


@both_places
def test_layers_offloaded_to_disk(pruner: str, tmp_path: Any) -> None:
    """accelerate moves each layer in when it runs, through hooks of its own."""
    inputs = LLAVA.inputs(BATCHES["unequal"])
    with vlmprune.prune(LLAVA.model(), PRUNERS[pruner].make()) as session:
        plain = generate(session.model, inputs)
    device_map = {
        "model.vision_tower": "disk",
        "model.multi_modal_projector": "cpu",
        "model.language_model.embed_tokens": "cpu",
        "model.language_model.layers.0": "cpu",
        "model.language_model.layers.1": "disk",
        "model.language_model.layers.2": "disk",
        "model.language_model.norm": "cpu",
        "model.language_model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    model = dispatch_model(LLAVA.model(), device_map, main_device="cpu", offload_dir=tmp_path)
    assert next(model.model.language_model.layers[2].parameters()).device.type == "meta"
    with vlmprune.prune(model, PRUNERS[pruner].make()):
        moved = generate(model, inputs)
    for mine, theirs in zip(moved.logits, plain.logits):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


@both_places
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(pruner: str, dtype: torch.dtype) -> None:
    """Runs in the model's dtype, and says what fp32 says within its precision."""
    inputs = LLAVA.inputs(BATCHES["unequal"], dtype=dtype)
    model = LLAVA.model(dtype=dtype)
    with torch.no_grad(), vlmprune.prune(model, PRUNERS[pruner].make()) as session:
        logits = model(**inputs).logits
        kept = [item.stages[-1].kept.tolist() for item in session.last.items]
    assert logits.dtype == dtype
    assert logits.isfinite().all()

    class Same(type(session.pruner)):  # the same tokens in fp32: the choice itself may differ at near ties
        def select(self, tokens: vlmprune.VisualTokens, budget: torch.Tensor) -> vlmprune.Selection:
            stage = session.last.items
            rows = [
                torch.tensor([i.tolist().index(t) for t in wanted])
                for i, wanted in zip(tokens.index, [s.stages[self.stage_of(tokens.layer)].kept.tolist() for s in stage])
            ]
            return vlmprune.Selection(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1))

        def stage_of(self, layer: int) -> int:
            return list(self.layers(3)).index(layer)

    full = LLAVA.model()
    same = Same(**{**PRUNERS[pruner].settings[0], "positions": session.pruner.positions})
    with torch.no_grad(), vlmprune.prune(full, same) as reference:
        expected = full(**LLAVA.inputs(BATCHES["unequal"])).logits
    assert [item.stages[-1].kept.tolist() for item in reference.last.items] == kept
    real = session.last.columns >= 0
    error = (logits.float() - expected)[real].abs().mean() / expected[real].abs().mean()
    assert error < (0.1 if dtype == torch.bfloat16 else 0.02)


def test_pipeline() -> None:
    """transformers' own pipeline, on the bundled model, with a session around it."""
    model, processor = bundled.load()
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    scene = bundled.demo_scenes()[0]
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": scene.image}, {"type": "text", "text": scene.questions[0].text}],
        }
    ]
    options = {"return_full_text": False, "generate_kwargs": {"max_new_tokens": 4, "do_sample": False}}
    full = ask(text=chat, **options)
    with vlmprune.prune(model, "divprune", keep=0.5) as session:
        pruned = ask(text=chat, **options)
    assert session.last.items[0].tokens_after == 72
    assert isinstance(scene.image, Image.Image)
    assert full[0]["generated_text"]
    assert pruned[0]["generated_text"] == full[0]["generated_text"]


@both_places
def test_flex_attention(pruner: str) -> None:
    """Block masks are cut like any other. Uncompiled: the CPU code generator of some torch versions fails on it."""
    inputs = LLAVA.inputs(BATCHES["unequal"])
    model = LLAVA.model()
    model.model.language_model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"), vlmprune.prune(model, PRUNERS[pruner].make()) as session:
        out = generate(model, inputs)
        assert model.model.language_model.config._attn_implementation == "flex_attention"
    check_against_oracle(LLAVA.model(), inputs, out, session.last)


@both_places
def test_quantised_linears(pruner: str) -> None:
    """int8 weights by torchao in the language model."""
    quantization = pytest.importorskip("torchao.quantization")
    model, inputs = LLAVA.model(), LLAVA.inputs(BATCHES["unequal"])
    quantization.quantize_(model.model.language_model, quantization.Int8WeightOnlyConfig())
    assert type(model.model.language_model.layers[0].self_attn.q_proj.weight.data) is not torch.Tensor
    with vlmprune.prune(model, PRUNERS[pruner].make()) as session:
        out = generate(model, inputs)
    check_against_oracle(model, inputs, out, session.last)


def test_quantised_cache_is_refused_in_one_sentence() -> None:
    """On a stand-in, for the real one needs a package of its own."""

    class QuantizedCache(Cache):
        pass

    cache = QuantizedCache(layers=[DynamicLayer() for _ in range(3)])
    for batch in ("one", "text"):
        session = vlmprune.prune(LLAVA.model(), "divprune", keep=0.3)
        with session, pytest.raises(ValueError, match="use DynamicCache"):
            session.model(**LLAVA.inputs(BATCHES[batch]), past_key_values=cache)


@both_places
def test_the_real_quantised_cache_is_refused(pruner: str) -> None:
    """In the prefill of generate(), before anything runs, images or not; the model generates with it as before."""
    pytest.importorskip("optimum.quanto")
    model, inputs = LLAVA.model(), LLAVA.inputs(BATCHES["one"])
    quantised = {
        "cache_implementation": "quantized",
        "cache_config": {"backend": "quanto", "nbits": 4, "q_group_size": 16, "residual_length": 8},
        "max_new_tokens": 2,
    }
    before = generate(model, inputs, **quantised).sequences
    with vlmprune.prune(model, PRUNERS[pruner].make()) as session:
        for prompt in (inputs, LLAVA.inputs(BATCHES["text"])):
            with pytest.raises(ValueError, match="a QuantizedCache cannot hold"):
                generate(model, prompt, **quantised)
    assert session.last is None
    assert torch.equal(generate(model, inputs, **quantised).sequences, before)


@pytest.mark.parametrize(
    ("name", "pruner", "policy"),
    [
        ("llava-clip-llama", "divprune", "compact"),
        ("llava-clip-llama", "compose", "compact"),
        ("llava-next-video", "late", "compact"),
        ("qwen2.5-vl", "compose", "original"),
        ("qwen3-vl-moe", "divprune", "original"),
        ("internvl", "divprune", "original"),
    ],
)
def test_decode_step_compiles_in_one_graph(name: str, pruner: str, policy: str) -> None:
    """generate() compiles the decode step of a static cache: one graph for all prompts of a length, as unpruned."""
    family = FAMILIES[name]
    model, counters = family.model(), torch._dynamo.utils.counters
    inputs = [family.inputs(BATCHES["unequal"], seed=seed) for seed in (0, 1)]
    options = CompileConfig(backend="eager", mode=None, fullgraph=True)
    options._compile_all_devices = True
    torch._dynamo.reset()
    late = Staged(schedule=((2, 0.3),), positions=policy)  # the layers before it hold everything
    with vlmprune.prune(model, late if pruner == "late" else PRUNERS[pruner].make(positions=policy)) as session:
        plain = [generate(model, each) for each in inputs]
        counters.clear()
        for each, expected in zip(inputs, plain):
            compiled = generate(model, each, cache_implementation="static", compile_config=options)
            assert session.last.changed
            for mine, theirs in zip(compiled.logits, expected.logits):
                torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_text_alone_compiles_too() -> None:
    """A session that has nothing to prune leaves the compiled decode step alone."""
    model, inputs = LLAVA.model(), LLAVA.inputs([[1, 2, 3, 4]])
    options = CompileConfig(backend="eager", mode=None, fullgraph=True)
    options._compile_all_devices = True
    torch._dynamo.reset()
    plain = generate(model, inputs)
    with vlmprune.prune(model, PRUNERS["compose"].make()) as session:
        compiled = generate(model, inputs, cache_implementation="static", compile_config=options)
    assert session.last.items == []
    for mine, theirs in zip(compiled.logits, plain.logits):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)

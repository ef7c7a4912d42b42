"""The end-to-end benchmark on tiny models: what it compares, what it counts, and when it refuses. No timings."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import AutoConfig
from typer.testing import CliRunner

import vlmprune
from vlmprune import bench_e2e
from vlmprune.bench_e2e import SHAPES, CheckFailed, Ideal, Shape
from vlmprune.cli import app
from vlmprune.flops import prefill_flops
from vlmprune.kernels.bench import Machine
from vlmprune.memory import weight_bytes

MACHINE = Machine("cpu", "a machine", threads=1, copy_gb_s=10.0, matmul_gflop_s=100.0)
CPU = torch.device("cpu")


IDS = {"image_token_id": 1050, "video_token_id": 1051, "vision_start_token_id": 1052, "vision_end_token_id": 1053}


def small_qwen(batch: int) -> dict[str, torch.Tensor]:
    patches = torch.randn(batch * 16 * 16, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 16, 16]] * batch)}


def tiny(name: str) -> Shape:
    """A shape with two thin layers on each side and few words; for Qwen2.5-VL with a smaller image, too."""
    shape = SHAPES[name].twin()
    text = {**shape.config["text_config"], "hidden_size": 256, "num_hidden_layers": 2, "intermediate_size": 64}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 1100}
    vision = {**shape.config["vision_config"], "num_hidden_layers": 2}
    ids = {key: IDS[key] for key in shape.config if key in IDS} or {"image_token_index": 1050}
    if "depth" in vision:
        vision |= {"depth": 2, "fullatt_block_indexes": [1], "out_hidden_size": 256}
        del vision["num_hidden_layers"]
        shape = dataclasses.replace(shape, pixels=small_qwen, tokens=64, pictures=((16, 16),))
    config = {**shape.config, **ids, "text_config": text, "vision_config": vision}
    return dataclasses.replace(shape, name="tiny", config=config)


def ideal_of(model, inputs, pruner) -> tuple[Ideal, vlmprune.PruneReport]:
    with torch.inference_mode(), vlmprune.prune(model, pruner) as session:
        model.generate(**inputs, **bench_e2e.greedy(1))
    return Ideal(model, inputs, session.last), session.last


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llava-1.5-7b", 7.06e9), ("llava-next-7b", 7.06e9), ("qwen2.5-vl-7b", 8.29e9), ("internvl3-8b", 7.94e9)],
)
def test_shapes_are_those_of_the_published_models(name, parameters):
    config = AutoConfig.for_model(**SHAPES[name].config)
    assert sum(weight_bytes(config).values()) / 4 == pytest.approx(parameters, rel=0.005)
    twin = AutoConfig.for_model(**SHAPES[name].twin().config)
    text = config.text_config
    assert twin.text_config.hidden_size // 4 == text.hidden_size // text.num_attention_heads
    cost = prefill_flops(twin, layer_tokens=40 + SHAPES[name].tokens // 10, images=list(SHAPES[name].pictures))
    assert cost.total < 0.02 * prefill_flops(config, layer_tokens=40 + SHAPES[name].tokens, images=1).total


@pytest.mark.parametrize(
    ("name", "rows"), [("llava-1.5-7b", 2), ("llava-next-7b", 1), ("qwen2.5-vl-7b", 2), ("internvl3-8b", 1)]
)
def test_pruned_equals_ideal(name, rows):
    """Several rows, each with an image of its own; the check tells a right ideal from one with another row."""
    shape = tiny(name)
    model = bench_e2e.build(shape, CPU, torch.float32)
    inputs = bench_e2e.prompt(shape, rows, 6, CPU, torch.float32)
    pruner = vlmprune.DivPrune(keep=7)
    ideal, report = ideal_of(model, inputs, pruner)
    assert report.tokens_before == rows * shape.tokens
    assert report.items[0].geometry.pictures == shape.pictures
    with torch.inference_mode():
        line = bench_e2e.check(model, inputs, pruner, ideal, torch.float32)
        assert "pruned = ideal" in line
        ideal.rows = ideal.rows.flip(0)
        with pytest.raises(CheckFailed, match="differ by"):
            bench_e2e.check(model, inputs, pruner, ideal, torch.float32)


def test_a_session_that_prunes_nothing_is_no_success():
    shape = tiny("llava-1.5-7b")
    model = bench_e2e.build(shape, CPU, torch.float32)
    inputs = bench_e2e.prompt(shape, 1, 6, CPU, torch.float32)
    pruner = vlmprune.Uniform(keep=7)
    with torch.inference_mode():
        whole = model.generate(**inputs, **bench_e2e.greedy(5), output_logits=True, return_dict_in_generate=True)
        with pytest.raises(CheckFailed, match="nothing was pruned"):
            bench_e2e.check(_Always(model, whole), inputs, pruner, lambda **options: whole, torch.float32)


class _Always(torch.nn.Module):
    """A model whose answer no session changes."""

    def __init__(self, model, answer):
        super().__init__()
        self.inner, self.answer, self.config = model, answer, model.config
        self.model = model.model

    def generate(self, **options):
        return self.answer


def test_floor_is_counted_from_the_config():
    shape = tiny("llava-1.5-7b")
    model = bench_e2e.build(shape, CPU, torch.float32)
    floor = bench_e2e.floor(shape, model, 2, 58, 40, torch.float32, MACHINE)
    counted = prefill_flops(model, layer_tokens=98, images=2, batch=2).total
    cache = 2 * 2 * 2 * 98 * 128 * 4  # keys and values, rows, layers, positions, one head of 128, bytes
    table = model.get_input_embeddings().weight.numel() * 4
    weights = sum(p.numel() * 4 for p in model.parameters()) - table
    assert floor.prefill_flops == counted
    assert floor.prefill_bytes == weights + cache
    assert floor.prefill_ms == pytest.approx(1e3 * max(counted / 100e9, (weights + cache) / 10e9), abs=1e-3)
    assert floor.decode_flops < floor.prefill_flops / 20


def test_peak_bytes_sees_what_a_run_allocates():
    one = bench_e2e.peak_bytes(lambda: torch.empty(1 << 20).add_(1), CPU)
    two = bench_e2e.peak_bytes(lambda: torch.ones(1 << 20) + torch.ones(1 << 20), CPU)
    assert one == pytest.approx(4 << 20, rel=0.01)
    assert two == pytest.approx(3 * (4 << 20), rel=0.01)


def test_the_command_writes_every_side(tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "llava-1.5-7b", tiny("llava-1.5-7b"))
    monkeypatch.setattr(bench_e2e, "describe", lambda device: MACHINE)
    out = tmp_path / "e2e.json"
    options = ["--rounds", "2", "--new-tokens", "2", "--batch", "2", "--full", "--threads", "1"]
    result = CliRunner().invoke(app, ["bench", "e2e", *options, "--out", str(out)])
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    sides = [(row["side"], row["batch"]) for row in written["rows"]]
    each = ["unpruned", "divprune", "ideal for divprune", "uniform", "ideal for uniform"]
    assert sides == [(side, 2) for side in each]
    full, pruned, ideal = written["rows"][:3]
    assert full["prompt_tokens"] == 616
    assert pruned["prompt_tokens"] == ideal["prompt_tokens"] == 40 + 58
    assert pruned["floor"] == ideal["floor"] != full["floor"]
    assert 0 < ideal["peak_bytes"] <= pruned["peak_bytes"] < full["peak_bytes"]
    assert "pruned = ideal" in pruned["check"]
    assert pruned["selection_ms"] > 0
    assert {"over_ideal", "over_ideal_best", "over_ideal_cpu"} <= pruned.keys()
    assert ideal["over_ideal"] is None
    assert pruned["rounds"] == 2
    assert pruned["requests_per_second"] > 0
    assert written["machine"]["processor"] == "a machine"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "gpt-4"], "unknown model shape 'gpt-4'"),
        (["--pruner", "fastv", "--keep", "0.9"], "acts inside the decoder"),
        (["--pruner", "pool"], "not pool"),
        (["--keep", "1.0"], "prunes nothing"),
        (["--keep", "7.5"], "keep must be"),
    ],
)
def test_what_cannot_be_compared_is_refused(options, said, monkeypatch):
    monkeypatch.setitem(SHAPES, "llava-1.5-7b", tiny("llava-1.5-7b"))
    monkeypatch.setattr(bench_e2e, "describe", lambda device: MACHINE)
    result = CliRunner().invoke(app, ["bench", "e2e", "--full", "--batch", "1", *options])
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())


def test_a_red_check_withholds_the_speed(tmp_path, monkeypatch):
    def red(*_):
        raise CheckFailed("divprune: pruned and ideal logits differ by 1.0")

    monkeypatch.setitem(SHAPES, "llava-1.5-7b", tiny("llava-1.5-7b"))
    monkeypatch.setattr(bench_e2e, "describe", lambda device: MACHINE)
    monkeypatch.setattr(bench_e2e, "check", red)
    out = tmp_path / "e2e.json"
    result = CliRunner().invoke(app, ["bench", "e2e", "--full", "--batch", "1", "--out", str(out)])
    assert result.exit_code == 1
    assert "no speed is reported" in " ".join(result.output.split())
    assert not out.exists()

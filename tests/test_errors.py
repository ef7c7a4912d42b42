"""Degenerate and bad input: one sentence, early, that says what to do."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import BATCHES, PRUNERS, settings_of
from families import FAMILIES, clip, decoder, llava
from test_laws import generate, model_of
from transformers import LlamaConfig, LlamaForCausalLM

import vlmprune
from vlmprune.contract import budget
from vlmprune.registry import pruner_classes

LLAVA = FAMILIES["llava-clip-llama"]
BOUNDARY = [
    name
    for name, case in PRUNERS.items()
    if not case.cls and case.make().layers(3) == (0,) and None not in case.make().budget([9])
]


@pytest.mark.parametrize("keep", [0, -1, 1.5, float("nan"), float("inf"), "x", True, False, None, 0.0, -0.1, [0.5]])
@pytest.mark.parametrize("name", vlmprune.list_pruners())
def test_bad_keep(name: str, keep: object) -> None:
    if keep is None and pruner_classes()[name].__dataclass_fields__["keep"].default is None:  # the method knows
        return
    with pytest.raises(ValueError, match=r"float in \(0, 1\].*int >= 1"):
        vlmprune.create_pruner(name, keep=keep)
    with pytest.raises(ValueError, match=r"float in \(0, 1\].*int >= 1"):
        vlmprune.prune(model_of(LLAVA), name, keep=keep)


def test_good_keep() -> None:
    for keep in (1, 7, 0.5, 1.0, np.float32(0.5), np.int64(3)):
        vlmprune.create_pruner("uniform", keep=keep)
    assert [budget(n, 0.5) for n in (5, 7, 9)] == [2, 4, 4], "half to even"
    assert budget(576, 0.098) == 56
    assert budget(1152, 0.1) == 115
    assert budget(10, 64) == 10
    assert budget(10, 1) == 1
    assert budget(10, 1.0) == 10


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="'divprune'"):
        vlmprune.create_pruner("divprun")
    with pytest.raises(ValueError, match=r"known are .*divprune, .*fastv, .*pool, "):
        vlmprune.create_pruner("qqqqqqq")
    with pytest.raises(ValueError, match=r"no field 'kep'.*keep"):
        vlmprune.create_pruner("divprune", kep=0.1)
    with pytest.raises(ValueError, match="positions"):
        vlmprune.create_pruner("divprune", positions="renumber")
    with pytest.raises(ValueError, match=r"vlmprune\.Pruner"):
        vlmprune.prune(model_of(LLAVA), 0.5)


def test_unsupported_models() -> None:
    plain = LlamaForCausalLM(decoder(LlamaConfig))
    for model in (plain, torch.nn.Linear(2, 2), None, "llava-hf/llava-1.5-7b-hf"):
        with pytest.raises(ValueError, match=r"supported families: LLaVA-1\.5 \(llava\)"):
            vlmprune.prune(model, "divprune")


def test_missing_signal_is_named_before_any_forward() -> None:
    class Needy(vlmprune.Random):
        needs = frozenset({"cls_attention"})

    with pytest.raises(ValueError, match=r"cls_attention.*LLaVA-1\.5.*divprune"):
        vlmprune.prune(model_of(FAMILIES["llava-siglip-qwen2"]), Needy(keep=0.5))
    Needy.needs = frozenset({"cls_attention|received_attention"})
    vlmprune.prune(model_of(FAMILIES["llava-siglip-qwen2"]), Needy(keep=0.5)).close()
    Needy.needs = frozenset({"sixth_sense"})
    with pytest.raises(ValueError, match=r"sixth_sense.*SIGNALS"):
        vlmprune.prune(model_of(LLAVA), Needy(keep=0.5))


QWEN = "qwen2.5-vl"
# Settings that a family cannot serve, and the same with the error's advice taken.
LACKING = [
    ("llava-siglip-qwen2", {"name": "fopru", "score": "cls"}, {"score": "received"}),
    ("llava-siglip-qwen2", {"name": "visiondrop", "query": "cls"}, {"query": "auto"}),
    ("llava-siglip-qwen2", {"name": "visionzip", "query": "cls"}, {"query": "auto"}),
    ("llava-siglip-qwen2", {"name": "globalcom2", "score": "logits"}, {"score": "auto"}),
    ("llava-siglip-qwen2", {"name": "globalcom2", "score": "softmax"}, {"score": "cosine"}),
    (QWEN, {"name": "tome"}, {"where": "boundary"}),
    (QWEN, {"name": "pitome"}, {"where": "boundary"}),
    (QWEN, {"name": "mustdrop", "tower_keep": 0.5}, {"tower_keep": None}),
    ("qwen3-vl-moe", {"name": "corematching"}, {"name": "fastv"}),
]


@pytest.mark.parametrize(("family", "fields", "advice"), LACKING)
def test_a_missing_signal_comes_with_the_setting_that_works(family: str, fields: dict, advice: dict) -> None:
    case = next(each for name, each in FAMILIES.items() if name.startswith(family))
    model, inputs = model_of(case), case.inputs(BATCHES["one"])
    field, value = next(iter(advice.items()))
    with pytest.raises(ValueError, match=rf"{fields['name']} needs .*: .*{field if field != 'name' else value}"):
        vlmprune.prune(model, vlmprune.create_pruner(**{"keep": 0.5, **fields}))
    taken = {"keep": 0.8, **(fields if field != "name" else {}), **advice}
    with vlmprune.prune(model, vlmprune.create_pruner(**taken)) as session:
        generate(model, inputs, max_new_tokens=1)
    assert session.last.changed


def test_every_method_lacks_nothing_or_says_what_to_do() -> None:
    """By the table of cases: whatever a family cannot serve is refused with that method's own advice."""
    refused = set()
    for family in FAMILIES.values():
        for name, case in PRUNERS.items():
            for hard in (False, True):
                pruner = case.make(hard)
                if hard in settings_of(family, name) or any(0 < each < family.earliest for each in pruner.layers(3)):
                    continue
                with pytest.raises(ValueError, match=re.escape(pruner.otherwise)):
                    vlmprune.prune(model_of(family), pruner)
                refused.add(name)
    assert {"tome", "pitome"} <= refused


@pytest.mark.parametrize("name", BOUNDARY)
def test_one_visual_token(name: str) -> None:
    model = llava(clip(image_size=8), decoder(LlamaConfig)).eval()
    inputs = {"input_ids": torch.tensor([[1, 99, 2]]), "pixel_values": torch.randn(1, 3, 8, 8)}
    with vlmprune.prune(model, PRUNERS[name].make(keep=1)) as session:
        generate(model, inputs, max_new_tokens=2)
        assert session.last.items[0].kept.tolist() == [0]
        assert not session.last.changed
    if PRUNERS[name].make(keep=0.4).budget([1]) != [0]:  # at least one
        return
    with vlmprune.prune(model, PRUNERS[name].make(keep=0.4)) as session, pytest.warns(UserWarning, match="rounds to 0"):
        generate(model, inputs, max_new_tokens=2)
    assert session.last.items[0].tokens_after == 0
    assert session.last.columns.tolist() == [[0, 2]]


@pytest.mark.parametrize("name", BOUNDARY)
def test_budgets_at_the_edge(name: str) -> None:
    model, inputs = model_of(LLAVA), LLAVA.inputs(BATCHES["unequal"])
    for keep, expected in ((1, 1), (24, 24), (25, 25), (10_000, 25), (1.0, 25), (0.999, 25)):
        with vlmprune.prune(model, PRUNERS[name].make(keep=keep)) as session:
            generate(model, inputs, max_new_tokens=2)
        if keep != 0.999:
            assert PRUNERS[name].make(keep=keep).budget([25]) == [expected]
        expected = PRUNERS[name].make(keep=keep).budget([25])[0]
        assert [item.tokens_after for item in session.last.items] == [expected] * 5
        assert session.last.changed == (expected < 25)


@pytest.mark.parametrize("name", BOUNDARY)
@pytest.mark.parametrize("rows", ["equal", "zero"])
def test_equal_and_zero_rows(name: str, rows: str) -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(BATCHES["three"])
    last = model.model.multi_modal_projector.linear_2
    last.weight.data.zero_()
    last.bias.data.fill_(0.0 if rows == "zero" else 0.5)
    with vlmprune.prune(model, PRUNERS[name].make(keep=6)) as session:
        generate(model, inputs, max_new_tokens=2)
    for item in session.last.items:
        assert len(set(item.kept.tolist())) == 6


def test_nan_is_an_error_that_says_where_to_look() -> None:
    model, inputs = model_of(LLAVA), LLAVA.inputs(BATCHES["one"])
    inputs["pixel_values"][0, 0, 0, 0] = float("nan")
    for name in PRUNERS:
        if name == "yopo":  # looks at no token
            continue
        with vlmprune.prune(model, PRUNERS[name].make()), pytest.raises(ValueError, match="NaN or infinity"):
            generate(model, inputs)


def test_masks_that_do_not_fit() -> None:
    model, inputs = model_of(LLAVA), LLAVA.inputs(BATCHES["one"])
    length = inputs["input_ids"].shape[1]
    with vlmprune.prune(model, "divprune", keep=0.3):
        with pytest.raises(ValueError, match="2-D attention_mask"):
            model(**{**inputs, "attention_mask": torch.zeros(1, 1, length, length)})
        with pytest.raises(ValueError, match="attention_mask must cover"):
            model(**{**inputs, "attention_mask": torch.ones(1, length + 3)})
        with pytest.raises(ValueError, match="2-D attention_mask"):
            model(**{**inputs, "attention_mask": "all"})


def test_a_pruner_that_breaks_the_contract_is_caught() -> None:
    class Wrong(vlmprune.Random):
        answer = ((0, 0),)

        def select(self, tokens, budget):
            return vlmprune.Selection(torch.tensor(self.answer))

    model, inputs = model_of(LLAVA), LLAVA.inputs(BATCHES["one"])
    for answer in (((0, 0),), ((0,),), ((0, 25),), ((0, 1, 2),)):
        Wrong.answer = answer
        with vlmprune.prune(model, Wrong(keep=2)), pytest.raises(ValueError, match="2 different indices"):
            generate(model, inputs)


def test_registering() -> None:
    with pytest.raises(TypeError, match="subclass"):
        vlmprune.register_pruner(dict)

    class DivPrune(vlmprune.Pruner):
        name = "divprune"

        def select(self, tokens, budget):
            raise AssertionError

    with pytest.raises(ValueError, match="taken"):
        vlmprune.register_pruner(DivPrune)
    assert vlmprune.list_pruners() == sorted(vlmprune.list_pruners())


def test_import_is_light() -> None:
    code = (
        "import sys, vlmprune; heavy = {'triton', 'decord', 'av', 'matplotlib', 'gradio', 'open_clip', 'transformers'}"
        "; print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert out.stdout.strip() == "[]"

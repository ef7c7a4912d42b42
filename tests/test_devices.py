"""Every tensor says where it lives: none lands on the default device of the user."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BATCHES, CENTRAL, KINDS, PRUNERS, pruners_of, settings_of, widest
from families import FAMILIES
from test_laws import generate, model_of
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import vlmprune
from vlmprune import adapters, kernels

FACTORIES = {factory.__name__ for factory in _device_constructors()}
FOLDERS = {Path(package.__file__).parent for package in (vlmprune, adapters, kernels)}


def homeless(source: str) -> Iterator[int]:
    """Lines that make a tensor and give no device; a module's own state may follow the default."""
    calls = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    state = {part for node in calls if node.func.attr in ("Parameter", "register_buffer") for part in ast.walk(node)}
    for node in calls:
        makes = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch" and node.func.attr in FACTORIES
        if makes and node not in state and not {keyword.arg for keyword in node.keywords} & {"device", None}:
            yield node.lineno


def test_every_tensor_is_made_with_a_device() -> None:
    """In the source, so on every path of it."""
    assert list(homeless("torch.arange(3)\ntorch.zeros(2, device=d)\nx.new_zeros(2)\nnn.Parameter(torch.ones(2))")) == [
        1
    ]
    files = [path for folder in FOLDERS for path in folder.rglob("*.py")]
    assert len(files) > 100
    assert [f"{path}:{line}" for path in files for line in homeless(path.read_text())] == []


class Refusing(TorchFunctionMode):
    """Refuses what this package makes without a device, directly or through a function of torch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in FACTORIES and kwargs.get("device") is None:
            frame = sys._getframe(1)
            while frame.f_globals["__name__"].split(".")[0] == "torch":
                frame = frame.f_back
            if frame.f_globals["__name__"].split(".")[0] == "vlmprune":
                pytest.fail(f"{frame.f_code.co_filename}:{frame.f_lineno}: {func.__name__} without a device")
        return func(*args, **kwargs)


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


def outcome(family: str, method: str) -> Any:
    """All that one call of forward() and of generate() gives, as the caller's default device has it."""
    case = FAMILIES[family]
    model, inputs = model_of(case), INPUTS[family]
    with torch.no_grad(), vlmprune.prune(model, PRUNERS[method].make(settings_of(case, method)[0])) as session:
        logits, first = model(**inputs).logits, session.last
        out = generate(model, inputs, max_new_tokens=3)
        report = session.last
        assert str(first).split(",")[0] == str(report).split(",")[0]
        assert "visual tokens" in str(report)
        items = [
            (item.start, item.kept, item.tokens_after, item.columns, item.merged, item.geometry.row, item.cached)
            for item in report.items
        ]
        stages = [(stage.layer, stage.kept) for item in report.items for stage in item.stages]
        sums = report.flops_pruned, report.average_keep, report.layer_visual_tokens, report.kv_bytes, report.columns
    return logits, out.sequences, out.logits, items, stages, sums


INPUTS = {name: case.inputs(BATCHES[widest(case)]) for name, case in FAMILIES.items()}


def check(family: str, method: str, elsewhere: Any) -> None:
    expected = outcome(family, method)
    with elsewhere:
        found = outcome(family, method)
    # Attention of torch's own modules takes another way where calls are watched, and differs in the last bits.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "method"),
    [(CENTRAL, method) for method in pruners_of(FAMILIES[CENTRAL])]
    + [("internvl", method) for method in (*KINDS, "fopru", "globalcom2")],
)
def test_default_device_of_the_user(family: str, method: str) -> None:
    """Whatever lands on the meta device has no values: what is made there breaks, or is seen."""
    check(family, method, default_device("meta"))


def test_every_method_was_asked() -> None:
    assert pruners_of(FAMILIES[CENTRAL]) == list(PRUNERS)


@pytest.mark.parametrize(
    ("family", "method"),
    [(name, "compose") for name in ("llava-next-video", "llava-onevision", "video-llava", "qwen2.5-vl", "qwen3-vl")]
    + [("qwen3-vl-moe", "divprune")]
    + [("qwen2.5-vl", method) for method in ("fastvid", "flashvid", "holitom", "dycoke", "hicom", "vqtoken")]
    + [("llava-onevision", "framefusion"), ("llava-next", "globalcom2")],
)
def test_other_families(family: str, method: str) -> None:
    """transformers' own code makes tensors on the default device: only ours are refused."""
    check(family, method, Refusing())

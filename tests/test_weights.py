"""`weights` of every trained method: a folder or the module itself, and what is said of anything else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import random_weights
import torch
from cases import BATCHES
from families import FAMILIES
from test_laws import model_of

import vlmprune
from vlmprune.pruners.atp import ThresholdModules
from vlmprune.pruners.explain import Mapper
from vlmprune.pruners.hicom import HIComModules
from vlmprune.pruners.qtsplus import TokenSelector
from vlmprune.pruners.vqtoken import VQAttention


class Trained(NamedTuple):
    """A trained method: its module, weights for `families.py`, who writes such, what to use without, a shape."""

    name: str
    kind: Any
    folder: Callable[[], Path]
    script: str
    instead: str
    other_shape: dict[str, Any]


TRAINED = (
    Trained("atp", ThresholdModules, random_weights.atp, "training/atp.py", "atp-calibrated", {"hidden": 32}),
    Trained(
        "explain", Mapper, random_weights.explain, "training/explain.py", "first_layer_attention", {"channels": [4, 8]}
    ),
    Trained(
        "hicom",
        HIComModules,
        random_weights.hicom,
        "training/condense.py --method hicom",
        "hicom_local",
        {"queries": 4},
    ),
    Trained(
        "vqtoken",
        VQAttention,
        random_weights.vqtoken,
        "training/condense.py --method vqtoken",
        "kmeans_tokens",
        {"grid": [2, 2, 2]},
    ),
    Trained(
        "qtsplus",
        TokenSelector,
        random_weights.qtsplus,
        "training/qtsplus.py",
        "qtsplus-training-free",
        {"kv_heads": 4},
    ),
)
each = pytest.mark.parametrize("case", TRAINED, ids=[case.name for case in TRAINED])


def test_every_trained_method_is_here() -> None:
    from vlmprune.registry import pruner_classes

    ours = {name for name, cls in pruner_classes().items() if cls.trained and cls.__module__.startswith("vlmprune.")}
    assert {case.name for case in TRAINED} == ours


@each
def test_a_module_does_what_its_folder_does(case: Trained) -> None:
    family = FAMILIES["llava-clip-llama"]
    model, inputs = model_of(family), family.inputs(BATCHES["one"])
    logits = []
    for weights in (case.folder(), str(case.folder()), case.kind.load(case.folder())):
        with torch.no_grad(), vlmprune.prune(model, case.name, keep=0.5, weights=weights) as session:
            logits.append(model(**inputs).logits[:, -1])
        assert session.last.changed
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@each
def test_a_folder_is_read_once_and_anew_when_written_anew(case: Trained, tmp_path: Path) -> None:
    folder = shutil.copytree(case.folder(), tmp_path / "weights")
    held = [_module(vlmprune.create_pruner(case.name, weights=folder), case) for _ in range(2)]
    assert held[0] is held[1]
    case.kind.load(folder).save(folder)
    assert _module(vlmprune.create_pruner(case.name, weights=folder), case) is not held[0]


def _module(pruner: vlmprune.Pruner, case: Trained) -> Any:
    (found,) = (value for value in vars(pruner).values() if isinstance(value, case.kind))
    return found


def _not_there(folder: Path, case: Trained) -> None:
    shutil.rmtree(folder)


def _empty(folder: Path, case: Trained) -> None:
    for file in folder.iterdir():
        file.unlink()


def _no_tensors(folder: Path, case: Trained) -> None:
    (folder / "model.safetensors").write_bytes(b"no tensors")


def _without_tensors(folder: Path, case: Trained) -> None:
    (folder / "model.safetensors").unlink()


def _config(text: str) -> Callable[[Path, Trained], None]:
    def write(folder: Path, case: Trained) -> None:
        (folder / "config.json").write_text(text)

    return write


def _other_shape(folder: Path, case: Trained) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert case.other_shape.keys() <= config.keys()
    (folder / "config.json").write_text(json.dumps({**config, **case.other_shape}))


def _lacks_a_field(folder: Path, case: Trained) -> None:
    config = json.loads((folder / "config.json").read_text())
    (field,) = case.other_shape
    (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if name != field}))


SPOILT = {
    "no folder": (_not_there, "No such file"),
    "empty folder": (_empty, "No such file"),
    "no tensors": (_without_tensors, "No such file"),
    "broken tensors": (_no_tensors, "wrote"),
    "no json": (_config("no json"), "Expecting value"),
    "no object": (_config("[]"), "wrote"),
    "another method": (_config('{"method": "other"}'), "weights of 'other', not of '{name}'"),
    "other shapes": (_other_shape, "size mismatch"),
    "half a config": (_lacks_a_field, "wrote"),
}


@each
@pytest.mark.parametrize("spoil", SPOILT)
def test_what_is_not_such_a_folder(case: Trained, spoil: str, tmp_path: Path) -> None:
    folder = shutil.copytree(case.folder(), tmp_path / "weights")
    ruin, why = SPOILT[spoil]
    ruin(folder, case)
    with pytest.raises(ValueError, match=f"not a folder that {case.script} wrote") as caught:
        vlmprune.create_pruner(case.name, weights=folder)
    assert why.format(name=case.name) in str(caught.value)
    assert "\n" not in str(caught.value)


@each
def test_nothing_or_something_else(case: Trained) -> None:
    with pytest.raises(ValueError, match=rf"{case.name} needs trained weights.*{case.script} wrote.*{case.instead}$"):
        vlmprune.create_pruner(case.name)
    other = next(each for each in TRAINED if each.name != case.name)
    for weights in (other.kind.load(other.folder()), 3):
        with pytest.raises(ValueError, match=rf"{case.name} takes as weights= a folder or a {case.kind.__name__}"):
            vlmprune.create_pruner(case.name, weights=weights)


@each
def test_weights_for_another_kind_of_model_are_refused(case: Trained, tmp_path: Path) -> None:
    """Of the same width and depth, they would choose without a word; in wrappers and compositions too."""
    folder = tmp_path / "weights"
    case.kind.load(case.folder()).save(folder, model={"model_type": "llava_next"})
    model = model_of(FAMILIES["llava-clip-llama"])
    pruner = vlmprune.create_pruner(case.name, weights=folder)
    first = vlmprune.create_pruner("uniform", positions=pruner.positions)
    why = rf"{case.name} are for a model of type 'llava_next', this one is a 'llava'"
    for wrong in (pruner, vlmprune.Merge(pruner), vlmprune.Compose(first, pruner)):
        with pytest.raises(ValueError, match=why):
            vlmprune.prune(model, wrong)
    case.kind.load(case.folder()).save(folder, model={"model_type": "llava"})
    vlmprune.prune(model, case.name, weights=folder).close()

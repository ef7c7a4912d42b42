"""The table of methods is the truth, and the README shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import pytest

import vlmprune
from vlmprune import methods_table
from vlmprune.contract import SIGNALS
from vlmprune.registry import frame_selectors

README = Path(__file__).parents[1] / "README.md"
HINT = "run python -m vlmprune.methods_table"


def test_the_readme_shows_the_table() -> None:
    assert methods_table.markdown() in README.read_text(encoding="utf-8"), HINT


def test_every_family_was_asked_for_every_method() -> None:
    assert methods_table.tried() == json.loads(methods_table.DATA.read_text(encoding="utf-8")), HINT


def test_every_method_is_in_it_with_what_its_class_says() -> None:
    table = {method.name: method for method in methods_table.methods()}
    assert list(table) == sorted([*vlmprune.list_pruners(), *frame_selectors()])
    assert (table["free_video_llm"].stage, table["free_video_llm"].where) == ("frames", "all")
    assert (table["divprune"].query_aware, table["divprune"].trained) == (False, False)
    assert (table["atp"].query_aware, table["atp"].trained) == (True, True)
    assert table["divprune"].where == "all"
    assert "keep=0.098" in table["divprune"].settings
    assert all(method.paper and method.stage and method.summary for method in table.values())
    assert {"compose"} <= {method.name for method in methods_table.wrappers()}


def test_families_that_lack_a_signal_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Needy(vlmprune.DivPrune):
        """Needs a CLS token."""

        name: ClassVar[str] = "needy"
        needs: ClassVar[frozenset[str]] = frozenset({"cls_attention"})

    assert "cls_attention" in SIGNALS
    Needy.__module__ = "vlmprune.pruners.needy"
    monkeypatch.setattr("vlmprune.registry.pruner_classes", lambda: {"needy": Needy})
    found = methods_table.tried()
    assert "LLaVA-1.5 with SigLIP" in found["lacking"]["needy"]
    assert "LLaVA-1.5" not in found["lacking"]["needy"]
    monkeypatch.setattr(methods_table, "_data", lambda: found)
    where = methods_table.Method.of(Needy, found).where
    assert "with SigLIP" in where if where.startswith("all but") else "with SigLIP" not in where


def test_plug_ins_are_not_tried() -> None:
    class Foreign(vlmprune.DivPrune):
        """Of another package."""

        name: ClassVar[str] = "foreign"

    assert methods_table.Method.of(Foreign, methods_table._data()).where == "not tried"


def test_every_method_is_public() -> None:
    import vlmprune.pruners

    assert set(vlmprune.pruners.__all__) <= set(vlmprune.__all__)
    assert not [name for name in vlmprune.__all__ if not hasattr(vlmprune, name)]

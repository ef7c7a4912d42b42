"""The scripts of `training/`, which is a folder and no package, as modules."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest


def trainer(name: str) -> Any:
    """`training/<name>.py`; skips where accelerate is missing."""
    pytest.importorskip("accelerate")
    folder = str(Path(__file__).parents[1] / "training")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


def batch(processor: Any, count: int, split: str = "train", seed: int = 0) -> Any:
    """The first `count` questions of two scenes, collated as in training."""
    questions = trainer("questions")
    rows = questions.Questions(None, split, 2, seed)
    return questions.collate(processor, [rows[i] for i in range(count)])

"""Untrained weights of the learned methods, for the models of `families.py`: three decoder layers."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from vlmprune.pruners.atp import ThresholdModules
from vlmprune.pruners.explain import Mapper

_held = tempfile.TemporaryDirectory()


def atp() -> Path:
    """Modules before layers 1 and 2, with thresholds near the middle, so that every item loses some tokens."""
    folder = Path(_held.name) / "atp"
    if not folder.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            modules = ThresholdModules((1, 2), 3)
        with torch.no_grad():
            for head in modules.heads:
                head.redundancy.bias.fill_(0.0)
        modules.save(folder)
    return folder


def explain() -> Path:
    folder = Path(_held.name) / "explain"
    if not folder.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            Mapper((4, 6)).save(folder)
    return folder

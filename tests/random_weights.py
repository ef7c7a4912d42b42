"""Untrained weights of the learned methods, for the models of `families.py`: three decoder layers."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from vlmprune.pruners.atp import ThresholdModules
from vlmprune.pruners.explain import Mapper
from vlmprune.pruners.hicom import HIComModules
from vlmprune.pruners.qtsplus import TokenSelector
from vlmprune.pruners.vqtoken import VQAttention

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


def hicom() -> Path:
    """For language models of width 48, with a readout that does something."""
    folder = Path(_held.name) / "hicom"
    if not folder.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            modules = HIComModules(48, width=16, queries=3, heads=2)
            torch.nn.init.normal_(modules.local[2].weight, std=0.1)
        modules.save(folder)
    return folder


def vqtoken() -> Path:
    """For language models of width 48, with an attention that does something."""
    folder = Path(_held.name) / "vqtoken"
    if not folder.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = VQAttention(48, width=16, heads=2, grid=(2, 3, 3))
            torch.nn.init.normal_(module.out.weight, std=0.1)
        module.save(folder)
    return folder


def qtsplus(width: int = 48, heads: int = 4, depth: int = 3) -> Path:
    """Two scoring layers and two that rewrite, with weights large enough that all matter; budgets grow with entropy."""
    folder = Path(_held.name) / f"qtsplus-{width}"
    if not folder.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            selector = TokenSelector(width, heads, heads // 2, depth, scoring=2, reencode=2)
            for parameter in selector.parameters():
                parameter.data.mul_(2)
            first, last = selector.budget.mlp[0], selector.budget.mlp[2]
            for parameter in (*first.parameters(), *last.parameters()):
                parameter.data.zero_()
            first.weight.data[0, -1], last.weight.data[0, 0], last.bias.data[0] = 1, 4, -9
            selector.save(folder)
    return folder

"""Visual tokens made of plain tensors, for the tests of methods without a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

import vlmprune


def tokens_of(
    *features: torch.Tensor,
    shapes: Sequence[vlmprune.Geometry] | None = None,
    layer: int = 0,
    depth: int = 4,
    index: Sequence[torch.Tensor] | None = None,
    **signals: torch.Tensor | Sequence[torch.Tensor] | None,
) -> vlmprune.VisualTokens:
    """Items of these rows [N, D]; `signals` by name, [I, ...] or one [N, ...] an item."""
    counts = tuple(len(rows) for rows in features)
    tables = {
        name: pad_sequence(list(each), batch_first=True) if isinstance(each, Sequence) else each
        for name, each in signals.items()
    }
    return vlmprune.VisualTokens(
        features=pad_sequence(list(features), batch_first=True),
        counts=counts,
        index=tuple(index or [torch.arange(count) for count in counts]),
        shapes=tuple(shapes or [vlmprune.Geometry.grid(1, count) for count in counts]),
        layer=layer,
        depth=depth,
        signal=lambda need: tables[need.rstrip("?").split("|")[0]],  # type: ignore[arg-type, return-value]
    )


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picks(selection: vlmprune.Selection) -> list[list[int]]:
    """Kept indices of each item, ascending."""
    return [sorted(index[index >= 0].tolist()) for index in selection.index]

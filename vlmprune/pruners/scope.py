from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlmprune.contract import Geometry, Selection, Sizes, VisualTokens
from vlmprune.pruners._grid import shares
from vlmprune.pruners._places import pictures
from vlmprune.pruners._wrap import Wrapper

# Signals that are not one entry a token along axis 1 (contract.SIGNALS).
_OF_ITEM = {"instruction", "instruction_mask", "instruction_queries", "text_features", "text_mask"}
_OF_PICTURE = {"cls_features", "cls_keys"}
_OF_ORIGINAL = {"prompt_features"}
_TOKENS_LAST = {"text_attention", "next_text_attention"}


class _Part(NamedTuple):
    """Some of an item's tokens, int64 on the CPU: numbers among those remaining, and of all it came with."""

    item: int
    members: Tensor
    originals: Tensor
    keep: int
    asked: bool


class _Scope(Wrapper):
    @abstractmethod
    def parts_of(self, shape: Geometry) -> Tensor:
        """int64 [N0]: the part that each token belongs to, -1 for none."""

    def cache_layers(self, depth: int) -> tuple[int, ...]:
        if self.pruner.cache_layers(depth):
            raise ValueError(f"{self.pruner.name} cuts the KV cache, which knows no tiles: use it without {self.name}")
        return ()

    def selection_flops(self, sizes: Sizes) -> int | None:
        parts = [
            replace(sizes, tokens=tokens, keep=round(sizes.keep * tokens / sizes.tokens), grids=(grid,), frames=1)
            for tokens, grid in zip(sizes.parts, sizes.grids)
        ]
        inner = [self.pruner.selection_flops(part) for part in parts if part.keep < part.tokens]
        return None if None in inner else sum(each for each in inner if each is not None)

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        parts = list(self._divide(tokens, budget))
        asked = [part for part in parts if part.asked]
        device = tokens.features.device
        choice = Selection(torch.empty(0, 0, dtype=torch.int64, device=device))
        if asked:
            choice = self.pruner.select(
                _restrict(tokens, asked), torch.tensor([part.keep for part in asked], device="cpu")
            )
        merges, flags = choice.features is not None, choice.merged
        if merges and flags is None:
            flags = torch.ones_like(choice.index, dtype=torch.bool)
        index: list[list[Tensor]] = [[] for _ in tokens.counts]
        rows: list[list[Tensor]] = [[] for _ in tokens.counts]
        merged: list[list[Tensor]] = [[] for _ in tokens.counts]
        answers = iter(range(len(asked)))
        for part in parts:
            pick = part.members.to(device, non_blocking=True)
            answer = next(answers) if part.asked else None
            if answer is not None:
                chosen = choice.index[answer, : part.keep]
                pick = pick[chosen.clamp(min=0)].masked_fill(chosen < 0, -1)
            index[part.item].append(pick)
            if not merges:
                continue
            assert choice.features is not None
            assert flags is not None
            if answer is None:
                rows[part.item].append(tokens.features[part.item][pick])
                merged[part.item].append(torch.zeros_like(pick, dtype=torch.bool))
            else:
                rows[part.item].append(choice.features[answer, : part.keep])
                merged[part.item].append(flags[answer, : part.keep])
        # Sorted, for a part of which fewer stay than there was room for leaves a gap.
        joined, order = _join(index, -1).sort(dim=1, descending=True)
        if not merges:
            return Selection(joined)
        features = _join(rows, 0)
        return Selection(
            joined, features.gather(1, order[..., None].expand_as(features)), _join(merged, 0).gather(1, order)
        )

    def _divide(self, tokens: VisualTokens, budget: Tensor) -> Iterator[_Part]:
        """Every item's parts and what each may keep: by size, and placeless tokens only once all others stay."""
        adaptive = self.pruner.budget([len(shape) for shape in tokens.shapes], tokens.layer, tokens.depth)
        for item, (shape, count, keep) in enumerate(zip(tokens.shapes, tokens.counts, budget.tolist())):
            number = self.parts_of(shape)
            here = number if count == len(shape) else number[tokens.index[item].cpu()]
            sizes = torch.bincount(here[here >= 0], minlength=int(number.max()) + 1)
            places = min(keep, int(sizes.sum()))
            for part, (size, share) in enumerate(zip(sizes.tolist(), shares(sizes, places).tolist())):
                if share:
                    members, originals = ((each == part).nonzero().flatten() for each in (here, number))
                    yield _Part(item, members, originals, share, share < size or adaptive[item] is None)
            loose = (here < 0).nonzero().flatten()[: keep - places]
            yield _Part(item, loose, loose, len(loose), False)


@dataclass(init=False)
class PerTile(_Scope):
    """A method that chooses inside each picture by itself: `PerTile(MMTok(keep=0.1))`.

    A picture is what passed the vision tower as one: a tile or the thumbnail of an image, a frame of a video. The
    item's budget is the inner method's, shared out by the pictures' sizes (largest remainders), so that a ratio holds
    in each; all signals are cut to the picture. Line breaks between rows belong to none, and stay only once all else
    does. Behind the boundary, finding out what is left of each picture waits for the GPU.
    """

    name: ClassVar[str] = "per_tile"
    paper: ClassVar[str] = "wrapper"

    def parts_of(self, shape: Geometry) -> Tensor:
        return pictures(shape)


@dataclass(init=False)
class PerFrame(_Scope):
    """A method that chooses inside each frame of a video by itself: `PerFrame(CDPruner(keep=0.25))`.

    As `PerTile` for videos; an image is one frame, however many tiles it has. Where a model merges neighbouring frames
    into one plane of tokens, that plane is a frame.
    """

    name: ClassVar[str] = "per_frame"
    paper: ClassVar[str] = "wrapper"

    def parts_of(self, shape: Geometry) -> Tensor:
        number = shape.plane if shape.kind == "video" else torch.zeros_like(shape.plane)
        return number.masked_fill(shape.placeless, -1)


@dataclass
class _Parts(VisualTokens):
    """Parts of the items of `whole`; `cut` takes an [I, N] table of these to one of the parts."""

    whole: VisualTokens | None = None
    cut: Callable[[Tensor], Tensor] | None = None


def of_whole(tokens: VisualTokens, table_of: Callable[[VisualTokens], Tensor]) -> Tensor:
    """`table_of(tokens)` [I, N]; inside a scope, made for the whole items and cut to the parts."""
    if not isinstance(tokens, _Parts):
        return table_of(tokens)
    assert tokens.whole is not None
    assert tokens.cut is not None
    return tokens.cut(of_whole(tokens.whole, table_of))


Given: TypeAlias = Tensor | Callable[[VisualTokens], Tensor]
"""Similarity of every token with the question, from elsewhere: [I, N], one row for each item of the prompts in order,
in the order of its tokens; or a function that gives it for the items (of those that lose tokens) in a
`VisualTokens`."""


def given_scores(tokens: VisualTokens, given: Given, name: str) -> Tensor:
    """fp32 [I, N] on the features' device: what the method `name` was given, of the tokens that are asked for.

    Raises:
        ValueError: scores that do not fit the tokens.
    """

    def whole(tokens: VisualTokens) -> Tensor:
        scores = given if isinstance(given, Tensor) else given(tokens)
        if scores.shape != tokens.valid.shape:
            raise ValueError(
                f"{name}'s relevance must be {list(tokens.valid.shape)} here, one entry a visual token of each image "
                f"that loses tokens, got {list(scores.shape)}"
            )
        return scores

    return of_whole(tokens, whole).to(tokens.features.device, torch.float32)


def _join(parts: list[list[Tensor]], fill: int) -> Tensor:
    """[I, K, ...] of every item's pieces [K_p, ...], one behind the other."""
    return pad_sequence([torch.cat(pieces) for pieces in parts], batch_first=True, padding_value=fill)


def _restrict(tokens: VisualTokens, parts: list[_Part]) -> VisualTokens:
    """The parts as items of their own, with their signals."""
    device = tokens.features.device
    members = [part.members.to(device, non_blocking=True) for part in parts]
    originals = [part.originals.to(device, non_blocking=True) for part in parts]

    def rows(table: Tensor, index: list[Tensor]) -> Tensor:
        return pad_sequence([table[part.item][each] for part, each in zip(parts, index)], batch_first=True)

    def signal(need: str) -> Tensor:
        table = tokens.signal(need)
        name = need.rstrip("?").split("|")[0]
        if table is None:  # an optional one that the model lacks
            return table
        if name in _OF_ITEM:
            return torch.stack([table[part.item] for part in parts])
        if name in _OF_PICTURE:
            numbers = [pictures(tokens.shapes[part.item])[part.originals].unique() for part in parts]
            return rows(table, [each.to(device, non_blocking=True) for each in numbers])
        if name in _TOKENS_LAST:
            return rows(table.mT, members).mT
        return rows(table, originals if name in _OF_ORIGINAL else members)

    return _Parts(
        features=rows(tokens.features, members),
        counts=tuple(len(each) for each in members),
        index=tuple(
            torch.searchsorted(own, tokens.index[part.item][each]) for part, own, each in zip(parts, originals, members)
        ),
        shapes=tuple(_crop(tokens.shapes[part.item], part.originals) for part in parts),
        layer=tokens.layer,
        depth=tokens.depth,
        signal=signal,
        project=tokens.project,
        whole=tokens,
        cut=lambda table: rows(table, members),
    )


def _crop(shape: Geometry, originals: Tensor) -> Geometry:
    """The geometry of these tokens (int64, ascending); if they are of one picture, as an item that has just that."""
    numbers = pictures(shape)[originals].unique().tolist()
    crop = shape.take(originals)
    if len(numbers) > 1:
        return crop
    row, col = crop.row - crop.row.min(), crop.col - crop.col.min()
    before = sum(height * width for height, width in shape.pictures[: numbers[0]])
    return replace(
        crop,
        plane=torch.zeros_like(crop.plane),
        row=row,
        col=col,
        grids=((int(row.max()) + 1, int(col.max()) + 1),),
        pictures=shape.pictures[numbers[0] : numbers[0] + 1],
        tile=None,
        sources=None if crop.sources is None else torch.where(crop.sources < 0, -1, crop.sources - before),
    )

"""What a pruner sees and what it returns. Shared by pruners, adapters and the runtime; knows no model and no method."""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

Keep: TypeAlias = float | int
"""What survives: a float in (0, 1] is a ratio of the item's visual tokens, an int >= 1 a count per item.

`prune()` also takes a share of the unpruned cost, such as "flops:0.3" (see `TARGETS`), and solves for the ratio.
"""

TARGETS = {
    "flops": "prefill FLOPs, vision tower included",
    "decoder": "prefill FLOPs of the decoder layers",
    "kv": "KV-cache bytes after the prefill",
}
"""What a budget can be asked for in, each as a share of the unpruned."""

Presets: TypeAlias = Mapping[str, Mapping[float, Mapping[str, Any]]]
"""Published settings: by model (or task), then by average number of tokens over the decoder layers, or share of all."""

Positions: TypeAlias = Literal["original", "compact"]
"""Position ids after pruning: as in the unpruned prompt, or renumbered without gaps."""


OBSERVER: ContextVar[AbstractContextManager[Any] | None] = ContextVar("observer", default=None)
"""Who watches what choosing costs: entered by `choosing`."""


def choosing() -> AbstractContextManager[Any]:
    """Around everything that runs for a method alone: its choice, and the signals that it reads."""
    return OBSERVER.get() or nullcontext()


def check_keep(keep: Keep) -> Keep:
    """Return `keep` unchanged if it is allowed.

    Raises:
        ValueError: anything but a float in (0, 1] or an int >= 1.
    """
    if isinstance(keep, str) and ":" in keep:
        parse_target(keep)
        return keep
    allowed = "keep must be a float in (0, 1] (ratio of an item's visual tokens) or an int >= 1 (count per item)"
    if isinstance(keep, bool) or not isinstance(keep, numbers.Real):
        raise ValueError(f"{allowed}, got {keep!r}")
    if isinstance(keep, numbers.Integral):
        if keep < 1:
            raise ValueError(f"{allowed}, got {keep!r}")
    elif not (math.isfinite(keep) and 0 < keep <= 1):
        raise ValueError(f"{allowed}, got {keep!r}")
    return keep


def parse_target(target: str) -> tuple[str, float]:
    """`"flops:0.3"` -> `("flops", 0.3)`.

    Raises:
        ValueError: an unknown quantity, or a share outside (0, 1].
    """
    name, _, share = target.partition(":")
    try:
        value = float(share)
    except ValueError:
        value = 0.0
    if name not in TARGETS or not 0 < value <= 1:
        known = ", ".join(f'"{key}:0.3" ({meaning})' for key, meaning in TARGETS.items())
        raise ValueError(
            f"a budget is asked for as a share in (0, 1] of the unpruned cost, as {known}; got {target!r}."
        )
    return name, value


def budget(count: int, keep: Keep) -> int:
    """Tokens kept of `count`: a ratio rounds half to even (DivPrune's rule, and may give 0), a count is clamped."""
    return min(int(keep), count) if isinstance(keep, numbers.Integral) else round(float(keep) * count)


def is_all(keep: Keep | str) -> bool:
    """Whether `keep` is the ratio 1.0, which leaves everything as it is; 1 is a count."""
    return not isinstance(keep, numbers.Integral) and keep == 1.0


@dataclass(frozen=True)
class Geometry:
    """Where each of an item's N visual tokens sits in the picture.

    Attributes:
        plane: int64 [N], number of the picture (a frame, a thumbnail, a picture put together from tiles) that the
            token belongs to.
        row, col: int64 [N], cell inside that plane's grid; -1 for tokens that show no place.
        grids: (rows, columns) of every plane.
        kind: "image" or "video".
        pictures: (rows, columns) of the patches of every picture that passed the vision tower for this item.
        tile: int64 [N], number of the picture that a token came from, where planes are put together from several; -1
            for tokens that came from none. None: every plane is one picture.
        sources: int64 [N, G], numbers of the patches that a token is made of, counted over all `pictures` as the vision
            tower takes them; -1 for none.
    """

    plane: Tensor
    row: Tensor
    col: Tensor
    grids: tuple[tuple[int, int], ...]
    kind: Literal["image", "video"] = "image"
    pictures: tuple[tuple[int, int], ...] = ()
    tile: Tensor | None = None
    sources: Tensor | None = None

    @classmethod
    def grid(
        cls,
        rows: int,
        cols: int,
        *,
        planes: int = 1,
        prefix: int = 0,
        suffix: int = 0,
        kind: Literal["image", "video"] = "image",
        patches: tuple[int, int] | None = None,
        sources: Tensor | None = None,
    ) -> Geometry:
        """Planes of rows x cols tokens in raster order, one after the other.

        Args:
            prefix: tokens without a place before each plane (a CLS token).
            suffix: tokens without a place after the last plane (a line break).
            patches: patch grid of each plane in the vision tower; None: rows x cols.
            sources: int64 [rows * cols, G], patches of each token of a plane; None: one patch a token.
        """
        cell = torch.arange(-prefix, rows * cols, device="cpu").repeat(planes)
        cell = torch.cat([cell, torch.full((suffix,), -1, device="cpu")])
        each = torch.arange(planes, device="cpu").repeat_interleave(prefix + rows * cols)
        plane = torch.cat([each, torch.full((suffix,), planes - 1, device="cpu")])
        of_plane = torch.arange(rows * cols, device="cpu")[:, None] if sources is None else sources
        patch_rows, patch_cols = patches or (rows, cols)
        numbers = of_plane[cell.clamp(min=0)] + (plane * patch_rows * patch_cols)[:, None]
        return cls(
            plane=plane,
            row=torch.where(cell < 0, -1, cell // cols),
            col=torch.where(cell < 0, -1, cell % cols),
            grids=((rows, cols),) * planes,
            kind=kind,
            pictures=((patch_rows, patch_cols),) * planes,
            sources=numbers.masked_fill(cell[:, None] < 0, -1),
        )

    def after(self, count: int) -> Geometry:
        """The same item without its first `count` tokens."""
        return self.take(torch.arange(count, len(self), device="cpu"))

    def take(self, index: Tensor) -> Geometry:
        """The tokens at `index` (int64 [K], on the CPU)."""
        tile = None if self.tile is None else self.tile[index]
        sources = None if self.sources is None else self.sources[index]
        return replace(
            self, plane=self.plane[index], row=self.row[index], col=self.col[index], tile=tile, sources=sources
        )

    @property
    def placeless(self) -> Tensor:
        """bool [N]: tokens without a place in the picture, such as line breaks between rows or a CLS token."""
        return self.row < 0

    def __len__(self) -> int:
        return self.plane.numel()


@dataclass(frozen=True)
class Item:
    """One image or video in one row of the sequence; columns count from the first of the forward call.

    Attributes:
        sample: row of the batch.
        start: column of the first visual token.
        length: number of visual tokens.
        columns: int64 [length], ascending, column of every token, where text stands between them (the time stamps of a
            Qwen3-VL video); None: they follow each other.
        span: columns from `start` to the last token or text between, where `columns` is given.
        number: which of the images (or videos) encoded for this call it is; for a run of tiles, the first of them.
    """

    sample: int
    start: int
    length: int
    geometry: Geometry
    columns: Tensor | None = None
    span: int = 0
    number: int = 0

    @property
    def where(self) -> slice | Tensor:
        """Index of the item's columns in its row."""
        return slice(self.start, self.stop) if self.columns is None else self.columns

    @property
    def stop(self) -> int:
        """Column behind the item."""
        return self.start + (self.length if self.columns is None else self.span)


SIGNALS: dict[str, str] = {
    # From the vision encoder. Where several patches make one token, the mean over them; 0 for tokens of no patch.
    "encoder_features": "[I, N, C]: features that the projector takes",
    "projector_inputs": "[I, N, C']: the same as the projector takes them, several patches of a token side by side",
    "cls_features": "[I, P, C]: CLS row of each of the item's P pictures, in the layer of `encoder_features`",
    "cls_attention": "fp32 [I, N]: attention of the picture's CLS token to it, mean over heads, in the encoder layer "
    "that makes the features",
    "cls_attention_last": "the same in the encoder's last layer",
    "cls_logits_last": "the same in the encoder's last layer, before the softmax",
    "received_attention": "fp32 [I, N]: attention received from the patches that see it, mean over these and heads, "
    "softmax over all they see, in the encoder layer that makes the features",
    "received_attention_last": "the same in the encoder's last layer",
    "received_logits": "fp32 [I, N]: logits that patches have for it, before the softmax, mean over the patches that "
    "see it and over heads, in the encoder layer that makes the features",
    "given_logits": "the same of its own logits, mean over the patches that it sees",
    "encoder_keys": "[I, N, d]: keys, mean over heads, in the encoder layer that makes the features, before RoPE",
    "cls_keys": "[I, P, d]: the same of the CLS rows",
    "encoder_kept": "fp32 [I, N]: behind an encoder stage (`Pruner.reduce`), of how many patches the token is the "
    "representative; 0 for those that went into another",
    # From the prompt.
    "instruction": "[I, M, D]: input embeddings of the words of the question, zero rows behind the last",
    "instruction_mask": "bool [I, M]",
    "instruction_queries": "[I, M, H, d]: queries of `instruction` in the decoder's last layer, made of the embeddings "
    "themselves, without RoPE",
    "instruction_keys": "[I, N, G, d]: keys, made likewise, of `features` at the boundary",
    "prompt_features": "[I, N0, D]: `features` at the boundary of all the item's original tokens",
    "text_features": "[I, T, D]: input embeddings of the text behind the item, to the end of the prompt",
    "text_mask": "bool [I, T]: which of these rows are real",
    # From the decoder. "next_" computes what the layer behind the stage would attend to, and works at the boundary too.
    "last_attention": "fp32 [I, N]: attention of the row's last token to it in the layer before, mean over heads",
    "next_last_attention": "the same in the layer behind the stage",
    "text_attention": "fp32 [I, T, N]: attention of each text token behind the item (rows of `text_mask`) in the layer "
    "before, mean over heads, softmax over all keys",
    "next_text_attention": "the same in the layer behind the stage",
    "all_attention": "fp32 [I, N]: attention to it in the layer before, mean over all tokens that can see it (itself "
    "and those behind it in its row) and over heads, softmax over all keys",
    "visual_attention": "fp32 [I, N]: sum over the item's own tokens of their attention to it, mean over heads, "
    "softmax over all keys, in the layer before",
    "next_visual_attention": "the same in the layer behind the stage",
    "next_inner_attention": "the same in the layer behind the stage, softmax over the item's own tokens",
    "next_keys": "[I, N, d]: keys, mean over heads, rotated, in the layer behind the stage",
    "next_plain_keys": "the same before they are rotated",
    "transition": "fp32 [I, N]: how much attention and MLP changed it, summed over the layers from "
    "`Pruner.accumulate(depth)` to the stage (TransPrune's TTV, as its code has it)",
    "transition_strict": "the same as the paper has it: 1 - |cos|, and a softmax over the item's own tokens",
    # At a cache stage (`Pruner.select_cache`).
    "cache_keys": "[I, N, G * d]: keys that the layer holds, of all key heads",
    "cache_attention": "fp32 [I, N]: attention of the last query to it in that layer, mean over heads",
    "cache_alive": "bool [I, N]: whether it was still there behind the last decoder stage",
    # From the decoder's blocks.
    "activation_overlap": "fp32 [I, N]: FFN neurons that are positive for both it and the last word of the question, "
    "in the layer before",
    "core_overlap": "fp32 [I, N]: FFN neurons that are positive for it and core to the prompt, in the layer before: "
    "among the `CORE` of all neurons most often among the `CORE` of a prompt token's largest positive ones",
}
CORE = 0.4
"""What a pruner can name in `needs` and ask `VisualTokens.signal` for, with shapes.

"one|other" asks for the first of them that the model has; "one?" for one that may be missing, and is None then. N
their remaining tokens (padded like `features`, with zeros), all on the features' device.
"""


def _no_signal(name: str) -> Tensor:
    raise KeyError(f"the signal {name!r} was not asked for: name it in the pruner's `needs`")


def _no_projector(rows: Tensor) -> Tensor:
    raise KeyError('projecting was not asked for: name "projector_inputs" in the pruner\'s `needs`')


@dataclass
class VisualTokens:
    """The visual tokens of every item of a batch, padded at the end to a common length.

    Attributes:
        features: [I, N, D], what the language model sees: projected rows at the boundary, hidden states before a
            decoder layer; rows past an item's count are zero.
        counts: number of tokens of each item that are still there.
        index: per item, int64 [N] on the features' device: which of its original tokens these are, ascending.
        shapes: one `Geometry` per item, of all its original tokens.
        layer: decoder layer before which the choice is made; 0 is the boundary.
        depth: decoder layers of the model.
        signal: gives a further signal by name (see `SIGNALS`): those that the pruner `needs`, computed when asked for.
        project: the model's projector, from rows like `projector_inputs` [..., C'] to rows like `features` [..., D]
            (with "projector_inputs" in `needs`).
    """

    features: Tensor
    counts: tuple[int, ...]
    index: tuple[Tensor, ...]
    shapes: tuple[Geometry, ...]
    layer: int = 0
    depth: int = 1
    signal: Callable[[str], Tensor] = field(default=_no_signal, repr=False)
    project: Callable[[Tensor], Tensor] = field(default=_no_projector, repr=False)

    @cached_property
    def geometry(self) -> tuple[Geometry, ...]:
        """Where each item's remaining tokens sit. Behind the boundary, asking for it waits for the GPU."""
        return tuple(
            shape if len(shape) == count else shape.take(index.cpu())
            for shape, count, index in zip(self.shapes, self.counts, self.index)
        )

    @cached_property
    def valid(self) -> Tensor:
        """bool [I, N]: True for real tokens, False for padding."""
        counts = torch.tensor(self.counts, device="cpu").to(self.features.device, non_blocking=True)
        return torch.arange(self.features.shape[1], device=self.features.device) < counts[:, None]


@dataclass
class Selection:
    """What stays.

    Attributes:
        index: int64 [I, K], kept tokens of each item in any order, -1 after an item's last.
        features: [I, K, D] rows to put in their place, or None to leave the tokens as they are. A merging pruner
            gives the merged row at the index of the token that stands for its group.
        merged: bool [I, K], which rows of `features` stand for several tokens; None: all.
    """

    index: Tensor
    features: Tensor | None = None
    merged: Tensor | None = None


@dataclass
class Patches:
    """The rows of P pictures inside a vision tower, behind one of its layers.

    Attributes:
        features: [P, T, C], hidden states.
        prefix: rows in front that are no patches (1 for a CLS token).
        size: fp32 [P, T], how many of the original rows each stands for.
        place: int64 [P, T], ascending, which of the original rows it is in the place of.
        grid: (rows, columns) of the original patches.
        layer: the layer that has just run; depth: how many make the features.
        keys: gives the layer's attention keys, fp32 [P, T, d], mean over heads.
    """

    features: Tensor
    prefix: int
    size: Tensor
    place: Tensor
    grid: tuple[int, int]
    layer: int
    depth: int
    keys: Callable[[], Tensor] = field(repr=False)


@dataclass
class Reduced:
    """What is left of the rows of `Patches`.

    Attributes:
        features: [P, K, C].
        keep: int64 [P, K], ascending: the rows whose places the new ones take.
        into: int64 [P, T]: which of the new rows each row went into.
    """

    features: Tensor
    keep: Tensor
    into: Tensor


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What an estimate knows of one item at one stage.

    Attributes:
        tokens: that reach the stage; of `originally` so many, `keep` are left behind it.
        layer, depth: as in `VisualTokens`.
        width: columns of `features` (D).
        encoder_width: of "encoder_features" (C).
        encoder_key, decoder_key: of one attention head in the tower and in the decoder (d), which has `decoder_heads`.
        words: text tokens of the prompt, all of which are taken to stand behind the item and to be the question.
        grids: patches of each of the item's pictures, before any merge; `prefix` rows (CLS) stand in front of them.
        frames: of a video, 1 for an image.
        encoder_depth: layers of the tower that make the features.
        projection: FLOPs of projecting one row.
        signals: names that answer the pruner's `needs`.
    """

    tokens: int
    originally: int
    keep: int
    layer: int
    depth: int
    width: int
    encoder_width: int
    encoder_key: int
    decoder_key: int
    decoder_heads: int
    words: int
    grids: tuple[tuple[int, int], ...]
    frames: int
    prefix: int
    encoder_depth: int
    projection: int
    signals: frozenset[str]

    @property
    def parts(self) -> list[int]:
        """Of its tokens, how many are of each picture."""
        patches = [rows * columns for rows, columns in self.grids]
        return [round(self.tokens * each / sum(patches)) for each in patches]

    @property
    def geometry(self) -> Geometry:
        """Where its tokens would be if all its pictures were alike and none had line breaks."""
        (rows, columns), tokens = self.grids[0], self.parts[0]
        side = (tokens / (rows * columns)) ** 0.5
        kind: Literal["image", "video"] = "video" if self.frames > 1 else "image"
        return Geometry.grid(round(rows * side), round(columns * side), planes=len(self.grids), kind=kind)


_OF_DECODER = frozenset(
    {
        *("last_attention", "text_attention", "all_attention", "visual_attention"),
        *("transition", "transition_strict", "activation_overlap", "core_overlap"),
    }
)


def of_decoder(need: str) -> bool:
    """Whether the signals that an entry of `needs` names come from decoder layers."""
    return any(name in _OF_DECODER or name.startswith("next_") for name in need.rstrip("?").split("|"))


@dataclass(kw_only=True)
class Pruner(ABC):
    """A method: chooses which visual tokens of each item stay. Its dataclass fields are its hyper-parameters.

    Class attributes:
        name: the name it is registered under.
        paper: where it was published.
        stage: where it acts, for people ("boundary", "decoder", ...).
        needs: signals (names of `SIGNALS`) beyond `features` without which it cannot run. A method whose needs depend
            on its fields overrides it with a property.
        query_aware: whether the question has a say.
        trained: whether it comes with weights of its own that must be trained.
        otherwise: what to do where a model lacks a signal, as the end of a sentence.
        presets: its published settings.
    """

    keep: Keep = 1.0
    positions: Positions = "original"

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    stage: ClassVar[str] = "boundary"
    needs: ClassVar[frozenset[str]] = frozenset()
    query_aware: ClassVar[bool] = False
    trained: ClassVar[bool] = False
    otherwise: ClassVar[str] = "use a method that works on the features alone, such as divprune"
    presets: ClassVar[Presets] = {}

    @classmethod
    def preset(cls, name: str, average_tokens: float | None = None, **fields: Any) -> Pruner:
        """A published setting: `VisionDrop.preset("llava-1.5", average_tokens=32)`. `presets` lists them.

        Args:
            name: model, or task, that it was published for.
            average_tokens: its budget, as its authors call it: tokens of that model, on average over the decoder
                layers, or a share of them. None: the first that is listed.
            fields: change other settings.

        Raises:
            ValueError: a setting that is not published.
        """
        budgets = cls.presets.get(name, {})
        average = next(iter(budgets), None) if average_tokens is None else average_tokens
        if average is None or average not in budgets:
            known = "; ".join(f"{key!r} with {', '.join(map(str, each))}" for key, each in cls.presets.items())
            raise ValueError(f"{cls.name} publishes {known or 'no settings'}: for others use keep=")
        return cls(**{**budgets[average], **fields})

    def __post_init__(self) -> None:
        # None where it is the default: the method knows how much.
        if self.keep is not None or type(self).__dataclass_fields__["keep"].default is not None:
            check_keep(self.keep)
        if self.positions not in ("original", "compact"):
            raise ValueError(f'positions must be "original" or "compact", got {self.positions!r}')

    @property
    def published_positions(self) -> Positions:
        """The policy that its authors used."""
        published: Any = type(self).__dataclass_fields__["positions"].default
        return published

    def with_positions(self, positions: Positions) -> Pruner:
        """The same method with another policy."""
        return replace(self, positions=positions)

    def layers(self, depth: int) -> tuple[int, ...]:
        """Decoder layers, of `depth`, before which it chooses, ascending; 0 is the boundary."""
        return (0,)

    def budget(self, counts: Sequence[int], layer: int = 0, depth: int = 1) -> Sequence[int | None]:
        """Tokens that items which came with `counts` tokens have left behind the stage before `layer`, of `depth`.

        None for an item of which only `select` can tell (adaptive methods; that costs a synchronisation on a GPU).
        """
        return [budget(count, self.keep) for count in counts]

    def encoder_layers(self, depth: int) -> tuple[int, ...]:
        """Layers of the vision tower, of the `depth` that make the features, behind which it calls `reduce`.

        A pruner with such a stage names the signal "encoder_kept" in `needs` and selects by it at the boundary.
        """
        return ()

    def encoder_rows(self, count: int, layer: int, depth: int) -> int | None:
        """Patches, of a picture's `count`, that `reduce` leaves behind `layer` of the tower (see `encoder_layers`).

        None where only a run can tell; estimates of cost refuse such a method.
        """
        return None

    @property
    def proportional(self) -> bool:
        """Whether attention in the tower weighs a row by the number of patches it stands for, behind `reduce`."""
        return False

    def reduce(self, patches: Patches) -> Reduced | None:
        """Merge rows of pictures inside the tower; None leaves them. As many must be left in every picture."""
        return None

    def cache_layers(self, depth: int) -> tuple[int, ...]:
        """Decoder layers, of `depth`, whose KV cache it cuts behind the prefill and, as `cache_due` says, later."""
        return ()

    def cache_budget(self, count: int, left: int, layer: int, depth: int) -> int:
        """Of an item's `left` tokens, out of `count`, that `layer` computes: how many its cache holds.

        For estimates of cost; `select_cache` is what chooses.
        """
        return left

    def cache_due(self, step: int) -> bool:
        """Whether the cache is cut behind this step: 0 is the prefill, n the n-th decoded token."""
        return step == 0

    def select_cache(self, tokens: VisualTokens) -> Selection:
        """Choose the tokens whose keys and values the cache of layer `tokens.layer` still holds; as many as it likes.

        `tokens.features` [I, N, G * d] are the values of all key heads; `features` of the selection take their places.
        Positions are not renumbered: a layer's queries stay where they were.
        """
        raise NotImplementedError(f"{self.name} names cache layers, so it must select there")

    def check_model(self, config: Any) -> None:  # noqa: B027  most methods serve any
        """Raise a ValueError where it cannot serve a model of this config; asked once, by `prune()`."""

    def accumulate(self, depth: int) -> tuple[int, ...]:
        """Decoder layers, of `depth`, over which the signal "transition" is summed."""
        return ()

    def reads(self, layer: int, depth: int) -> frozenset[str]:
        """Entries of `needs` that it asks for at the stage before `layer`, of `depth`; for estimates of cost.

        A method that chooses at the boundary and inside the decoder reads the decoder's signals inside and the others
        at the boundary, unless it says otherwise.
        """
        stages = self.layers(depth)
        if 0 not in stages or len(stages) == 1:
            return self.needs
        return frozenset(need for need in self.needs if of_decoder(need) == (layer > 0))

    def selection_flops(self, sizes: Sizes) -> int | None:
        """FLOPs of the matrix products in `select` (and `reduce`, `select_cache`) for one item at one stage.

        On the CPU, multiply-adds twice, signals not counted; an upper bound where they depend on what is in the
        picture. None: not declared, and estimates say so.
        """
        return None

    @abstractmethod
    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        """Choose `budget` (int64 [I], on the CPU) tokens of each item; indices count within `tokens`.

        Called at each of `layers`, with the items that are to lose some of their tokens there but not all. An item
        whose budget is None comes with all its tokens as budget, and keeps those given, however few.
        """

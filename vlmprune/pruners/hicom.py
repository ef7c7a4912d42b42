from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.nn.utils.rnn import pad_sequence

from vlmprune.contract import Keep, Positions, Presets, Pruner, Selection, Sizes, VisualTokens
from vlmprune.pruners._weights import check_made_for, check_width, load_module, products, save_module, trained_module
from vlmprune.pruners._windows import SIDE, TIME, Windows
from vlmprune.pruners.scope import Given, given_scores
from vlmprune.registry import register_pruner

SCRIPT = "training/condense.py --method hicom"
_INSTRUCTION = frozenset({"instruction", "instruction_mask"})
BLOCK = 1 << 26  # entries of windows' rows held at a time, 256 MiB in fp32


def scaled_dot(embeddings: Tensor, guide: Tensor) -> Tensor:
    """fp32 [..., N]: g . E_j / sqrt(Q) of embeddings [..., N, Q] and a guide [..., Q]."""
    return (embeddings.float() * guide.float()[..., None, :]).sum(-1) / embeddings.shape[-1] ** 0.5


def cosine_logits(embeddings: Tensor, guide: Tensor, scale: float) -> Tensor:
    """fp32 [..., N]: exp(scale) cos(g, E_j), as CLIP and SigLIP weigh it; their bias cancels in a softmax."""
    return cosine_similarity(embeddings.float(), guide.float()[..., None, :], dim=-1) * math.exp(scale)


def pool(features: Tensor, logits: Tensor, members: Tensor) -> Tensor:
    """fp32 [W, D]: sum_j A_j F_j of every window, A the softmax of its members' logits.

    Args:
        features: [N, D].
        logits: fp32 [N].
        members: int64 [W, E], -1 behind a window's last.
    """
    step = max(1, BLOCK // max(1, members.shape[1] * features.shape[1]))
    parts = []
    for some in members.split(step):
        there = some >= 0
        weights = logits[some.clamp(min=0)].masked_fill(~there, -torch.inf).softmax(1)
        rows = features[some.clamp(min=0)].float()
        parts.append((weights[:, None] @ rows)[:, 0])
    return torch.cat(parts)


def mean_instruction(tokens: VisualTokens) -> Tensor:
    """fp32 [I, D]: mean input embedding of the words of each item's question; 0 where there are none."""
    words, real = tokens.signal("instruction").float(), tokens.signal("instruction_mask")
    return (words * real[..., None]).sum(1) / real.sum(1).clamp(min=1)[:, None]


class _Windowed(Pruner):
    """What both forms share: windows from `keep` or `kernel`, and pooling by logits."""

    kernel: tuple[int, int] | None

    @abstractmethod
    def read(self, tokens: VisualTokens) -> tuple[Tensor, Tensor]:
        """Logits, fp32 [I, N], and guides, fp32 [I, Q]."""

    def local(self, pooled: Tensor) -> Tensor:
        """fp32 [W, D]: the rows of windows, of what was pooled."""
        return pooled

    def whole(self, tokens: VisualTokens, item: int, guide: Tensor, count: int) -> Tensor:
        """fp32 [count, D]: rows that see all of the item."""
        raise NotImplementedError

    def globals_of(self, keep: int) -> int:
        """How many of `keep` rows, at most, are such."""
        return 0

    def budget(self, counts: Sequence[int], layer: int = 0, depth: int = 1) -> Sequence[int | None]:
        plain = super().budget(counts, layer, depth)
        if self.kernel is None:
            return plain
        return [count if keep == count else None for keep, count in zip(plain, counts)]

    def selection_flops(self, sizes: Sizes) -> int:
        geometry, last = sizes.geometry, self.globals_of(sizes.keep)
        if self.kernel is None:
            windows = Windows.of_count(geometry, min(sizes.keep - last, len(geometry)))
        else:
            windows = Windows.of_kernel(geometry, *self.kernel)
            last = min(last, len(geometry) - len(windows))
        return 2 * windows.members.numel() * sizes.width + self.module_flops(sizes, len(windows), last)

    def module_flops(self, sizes: Sizes, windows: int, last: int) -> int:
        """Products of `read`, `local` and `whole`."""
        return 0

    def select(self, tokens: VisualTokens, budget: Tensor) -> Selection:
        read = zip(*self.read(tokens))
        chosen = [self._item(tokens, item, keep, *own) for item, (keep, own) in enumerate(zip(budget.tolist(), read))]
        index, rows, merged = (pad_sequence(list(each), batch_first=True) for each in zip(*chosen))
        counts = torch.tensor([len(each) for each, _, _ in chosen], device="cpu").to(index.device, non_blocking=True)
        real = torch.arange(index.shape[1], device=index.device) < counts[:, None]
        return Selection(index.masked_fill(~real, -1), rows, merged)

    def _item(
        self, tokens: VisualTokens, item: int, keep: int, logits: Tensor, guide: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """int64 [K] indices, [K, D] rows in the features' dtype, bool [K] which of them were merged."""
        geometry, features = tokens.geometry[item], tokens.features[item]
        spare, last = 0, self.globals_of(keep)
        if self.kernel is None:
            count = min(keep - last, int((~geometry.placeless).sum()))
            windows, spare = Windows.of_count(geometry, count), keep - last - count
        else:
            windows = Windows.of_kernel(geometry, *self.kernel)
            last = min(last, len(geometry) - len(windows))
        loose = geometry.placeless.nonzero().flatten()[:spare]
        taken = torch.zeros(len(geometry), dtype=torch.bool, device="cpu")
        taken[windows.middle] = taken[loose] = True
        ends = (~taken).nonzero().flatten()[len(geometry) - int(taken.sum()) - last :]
        index = torch.cat([windows.middle, loose, ends]).to(features.device, non_blocking=True)
        pooled = pool(features, logits, windows.members.to(features.device, non_blocking=True))
        plain = features[index[len(windows) : len(windows) + len(loose)]]
        rows = [self.local(pooled).to(features.dtype), plain]
        if last:
            rows.append(self.whole(tokens, item, guide, last).to(features.dtype))
        changed = (windows.members >= 0).sum(1) > 1
        merged = torch.cat(
            [
                changed,
                torch.zeros(len(loose), dtype=torch.bool, device="cpu"),
                torch.ones(last, dtype=torch.bool, device="cpu"),
            ]
        )
        return index, torch.cat(rows), merged.to(features.device, non_blocking=True)


@register_pruner
@dataclass(kw_only=True)
class HIComLocal(_Windowed):
    """Pool small windows of space and time, each token weighed by how well it fits the question.

    The local branch of HICom (arXiv 2503.16036, CVPR 2025) without its training: not the published model, a stand-in
    for `hicom`. Within each window A = softmax_j(g . E_j / sqrt(D)) and the row is sum_j A_j F_j. F and E are the
    projected tokens and g is the mean input embedding of the question's words, where HICom's own are SigLIP's patch and
    text embeddings; give CLIP's cosines as `relevance` to come closer. There are no global tokens.

    Published windows are 4 frames x 3 x 3 patches (an image: 3 x 3). With `kernel` they are exactly these, and the
    count follows from the grid: a `keep` of less than all then has no further say. Without it `keep` is exact, and
    makes the windows c (4, 3, 3) long with the c that it takes; the default, 1/36, gives the published ones on a video
    whose sides they divide. Windows that do not divide a side overlap by one (`axis_windows`). A row stands at its
    window's middle token. Line breaks stay only where `keep` has room for them after all places; positions as published
    compact.

    Attributes:
        kernel: frames, and rows and columns, of a window; None: what `keep` asks for.
        scale: logits are exp(scale) times cosines instead of scaled dot products.
        relevance: cosines from elsewhere, as `CDPruner` takes them (`patch_relevance` makes them of CLIP's patches);
            needs `scale`, CLIP's is about 4.6.
    """

    keep: Keep = 1 / (TIME * SIDE * SIDE)
    positions: Positions = "compact"
    kernel: tuple[int, int] | None = None
    scale: float | None = None
    relevance: Given | None = field(default=None, repr=False, compare=False)

    name: ClassVar[str] = "hicom_local"
    paper: ClassVar[str] = "after arXiv 2503.16036, without its training"
    query_aware: ClassVar[bool] = True
    # 32 frames of 27 x 27 patches in windows of 4 x 3 x 3
    presets: ClassVar[Presets] = {"local43": {648: {"kernel": (TIME, SIDE)}}}

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_kernel(self.name, self.kernel)
        if self.relevance is not None and self.scale is None:
            raise ValueError(
                "hicom_local weighs a given relevance by exp(scale): set scale= as well, CLIP's is about 4.6"
            )

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset() if self.relevance is not None else _INSTRUCTION

    def read(self, tokens: VisualTokens) -> tuple[Tensor, Tensor]:
        if self.relevance is not None:
            assert self.scale is not None
            return given_scores(tokens, self.relevance, self.name) * math.exp(self.scale), tokens.features[:, 0]
        guide = mean_instruction(tokens)
        if self.scale is None:
            return scaled_dot(tokens.features, guide), guide
        return cosine_logits(tokens.features, guide, self.scale), guide


def sine_table(length: int, width: int, device: torch.device) -> Tensor:
    """fp32 [length, width], width even: sin and cos of position / 10000^(2 i / width), in turn."""
    rate = torch.arange(0, width, 2, device=device, dtype=torch.float32).mul(-math.log(10000.0) / width).exp()
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)


def places_3d(plane: Tensor, row: Tensor, col: Tensor, width: int) -> Tensor:
    """fp32 [N, width], HICom's PE3D: the sum of the sine tables of frame, row and column (int64 [N] each, CPU)."""
    parts = [sine_table(int(each.max()) + 1, width, torch.device("cpu"))[each] for each in (plane, row, col)]
    return parts[0] + parts[1] + parts[2]


class HIComModules(nn.Module):
    """The trained part of HICom, for language models of one width.

    Args:
        hidden: D, width of the language model.
        width: of embeddings, guide and queries (1152 as published), a multiple of `heads`.
        queries: learned queries of the global branch.
        heads: of its attention, and of the guide's.
    """

    def __init__(self, hidden: int, width: int = 64, queries: int = 8, heads: int = 4) -> None:
        super().__init__()
        self.hidden, self.width, self.queries, self.heads = hidden, width, queries, heads
        self.patch = nn.Sequential(nn.LayerNorm(hidden), *_mlp(hidden, hidden))
        self.embed = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, width))
        self.word = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, width))
        self.reader = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.guide = nn.LayerNorm(width)
        self.local = _mlp(hidden, hidden)
        self.query = nn.Parameter(torch.randn(queries, width))
        self.modulate = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 2 * width))
        self.modulated = nn.LayerNorm(width)
        self.values = nn.Linear(hidden, width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.whole = _mlp(width, hidden)
        # At first a window's row is what was pooled.
        nn.init.zeros_(self.local[2].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.local[2].bias)  # type: ignore[arg-type]

    def read(self, words: Tensor, real: Tensor) -> Tensor:
        """The guide g, [I, width], of the embeddings [I, M, D] of a question's words (bool [I, M]); 0 without any."""
        if not words.shape[1]:
            return words.new_zeros(len(words), self.width, dtype=torch.float32)
        asked = real.any(1, keepdim=True)
        # Attention without any key is NaN: a question without words reads one row and is set to 0 behind.
        seen = real | (~asked & (torch.arange(words.shape[1], device=real.device) == 0))
        x = self.word(words.float()) + sine_table(words.shape[1], self.width, words.device)
        x = self.reader(x, src_key_padding_mask=~seen)
        return self.guide((x * seen[..., None]).sum(1) / seen.sum(1, keepdim=True)) * asked

    def embeddings(self, features: Tensor) -> Tensor:
        """E, [I, N, width]: x + MLP(LN(x)) of the tokens [I, N, D], as in SigLIP's pooling head, at g's width."""
        x = features.float()
        return self.embed(x + self.patch(x))

    def summary(self, features: Tensor, places: Tensor, guide: Tensor, count: int) -> Tensor:
        """[count, D]: the first `count` queries, LN(q (1 + s) + b) with (s, b) = MLP(g), after attending to all tokens.

        Args:
            features: [N, D].
            places: fp32 [N, width], `places_3d`.
            guide: [width].
        """
        scale, shift = self.modulate(guide).chunk(2)
        queries = self.modulated(self.query[:count] * (1 + scale) + shift)[None]
        values = (self.values(features.float()) + places)[None]
        found = self.attention(queries, values, values, need_weights=False)[0]
        return self.whole((queries + found)[0])

    def save(self, folder: str | Path, **notes: Any) -> None:
        """Write `model.safetensors` (fp16) and `config.json`; `notes` go into the latter."""
        shape = {"hidden": self.hidden, "width": self.width, "queries": self.queries, "heads": self.heads}
        save_module(self, folder, torch.float16, method="hicom", **shape, **notes)

    @classmethod
    def load(cls, folder: str | Path) -> HIComModules:
        """Read what `save` wrote, on the CPU, in fp32.

        Raises:
            ValueError: no such folder, or weights that do not fit its config.
        """
        names = ("hidden", "width", "queries", "heads")
        return load_module(folder, "hicom", SCRIPT, lambda config: cls(*(config[name] for name in names)))


def _mlp(inner: int, outer: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inner, outer), nn.GELU(), nn.Linear(outer, outer))


@register_pruner
@dataclass(kw_only=True)
class HICom(_Windowed):
    """Pool small windows by the question, and add a few learned tokens that look at the whole picture for it.

    "Hybrid-Level Instruction Injection for Video Token Compression in Multi-modal Large Language Models", CVPR 2025,
    arXiv 2503.16036. Trained, aware of the question. Local branch: as `hicom_local`, with learned embeddings E and
    guide g, A = softmax_j(g . E_j / sqrt(width)), and a GELU readout of what was pooled. Global branch: learned queries
    LN(q (1 + s) + b), (s, b) = MLP(g), attend to all tokens with their places in frame, row and column; a GELU readout
    of query + attention.

    The released model (HICom_7B) replaces the projector of its own fine-tuned Qwen2.5 and SigLIP, head and text tower
    included: its weights mean nothing to another language model and are not read here. `weights` is a folder written
    by `training/condense.py`, for one language model, which stays as it is; without weights there is `hicom_local`.
    So the modules sit behind the projector: F are the projected tokens, the local readout is a correction of what was
    pooled; E is the published x + MLP(LN(x)) and a projection; g is the mean of one transformer layer over the input
    embeddings of the question's words instead of SigLIP's text tower. The official builder, given the release's own
    configuration string, leaves the queries unmodulated and all global tokens alike; here they are as in the paper.

    `keep` counts both: min(queries, keep // 4) rows are global (published 32 of 680), the others are windows; with
    `kernel` all queries come on top of its windows. A global row stands at one of the last tokens that is no window's
    middle. The rest is as in `hicom_local`.

    Attributes:
        weights: the folder, or the modules themselves.
        kernel: frames, and rows and columns, of a window; None: what `keep` asks for.
    """

    keep: Keep = 680 / (32 * 27 * 27)
    positions: Positions = "compact"
    kernel: tuple[int, int] | None = None
    weights: str | Path | HIComModules | None = None

    name: ClassVar[str] = "hicom"
    paper: ClassVar[str] = "arXiv 2503.16036"
    needs: ClassVar[frozenset[str]] = _INSTRUCTION
    query_aware: ClassVar[bool] = True
    trained: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_kernel(self.name, self.kernel)
        self._modules = trained_module(self.name, HIComModules, self.weights, f"{SCRIPT} wrote", "hicom_local")

    def check_model(self, config: Any) -> None:
        check_made_for(self.name, SCRIPT, self._modules, config)

    def globals_of(self, keep: int) -> int:
        return self._modules.queries if self.kernel else min(self._modules.queries, keep // 4)

    def module_flops(self, sizes: Sizes, windows: int, last: int) -> int:
        made, n, words, width = self._modules, sizes.tokens, sizes.words, self._modules.width
        read = n * products(made.patch, made.embed) + words * products(made.word, made.reader) + 4 * words**2 * width
        if not last:
            return read + windows * products(made.local)
        keys = n * products(made.values) + 4 * n * width**2
        whole = products(made.modulate) + keys + last * (4 * width**2 + 4 * n * width + products(made.whole))
        return read + windows * products(made.local) + whole

    def read(self, tokens: VisualTokens) -> tuple[Tensor, Tensor]:
        check_width(self.name, SCRIPT, self._modules.hidden, tokens)
        modules = self._modules.to(tokens.features.device)
        guide = modules.read(tokens.signal("instruction"), tokens.signal("instruction_mask"))
        return scaled_dot(modules.embeddings(tokens.features), guide), guide

    def local(self, pooled: Tensor) -> Tensor:
        return pooled + self._modules.local(pooled)

    def whole(self, tokens: VisualTokens, item: int, guide: Tensor, count: int) -> Tensor:
        geometry, features = tokens.geometry[item], tokens.features[item]
        shown = (~geometry.placeless).nonzero().flatten()
        places = places_3d(geometry.plane[shown], geometry.row[shown], geometry.col[shown], self._modules.width)
        device = features.device
        seen = features[shown.to(device, non_blocking=True)]
        return self._modules.summary(seen, places.to(device, non_blocking=True), guide, count)


def _check_kernel(name: str, kernel: tuple[int, int] | None) -> None:
    """Raise ValueError, with one sentence, on anything but None or two counts of at least 1."""
    if kernel is None:
        return
    good = isinstance(kernel, Sequence) and not isinstance(kernel, str) and len(kernel) == 2
    if not good or not all(type(side) is int and side >= 1 for side in kernel):
        raise ValueError(f"{name} needs kernel=(frames, rows and columns), such as ({TIME}, {SIDE}), got {kernel!r}")

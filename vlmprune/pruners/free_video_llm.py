"""Free Video-LLM: frames and a region of each, chosen by the question."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmprune.contract import budget
from vlmprune.pruners._before_tower import Clip, FrameScorer, FrameSelector


def loader_frames(total: int, count: int) -> Tensor:
    """Frames that the authors' loader takes: the middles of equal segments, rounded half to even.

    Returns:
        int64 [min(total, count)], ascending.
    """
    count = min(total, count)
    edges = [round((total - 1) / count * i) for i in range(count + 1)]
    return torch.tensor([(left + right) // 2 for left, right in pairwise(edges)], device="cpu")


def matching_frames(score: Tensor, count: int) -> Tensor:
    """The `count` frames with the highest score, in order of time; of equal ones the earlier.

    Args:
        score: [T], cosine of each frame's pooled row with the question's.

    Returns:
        int64 [min(T, count)], ascending.
    """
    return score.argsort(descending=True, stable=True)[:count].sort().values


def relevant_cells(score: Tensor, ratio: float) -> Tensor:
    """The best `ratio` of a grid's cells, rounded down but at least one, by score [..., P]: int64 [..., K]."""
    return score.argsort(dim=-1, descending=True, stable=True)[..., : max(1, int(score.shape[-1] * ratio))]


def region(cells: Tensor, grid: tuple[int, int], ratio: float) -> Tensor:
    """A box of fixed size around the centroid of some cells, moved back inside where it sticks out.

    Args:
        cells: int64 [..., K], cells of a grid in raster order.
        grid: (rows, columns).
        ratio: area of the box over that of the grid; either side gets its square root, rounded half to even.

    Returns:
        int64 [..., 4]: left, top, right, bottom in cells, right and bottom exclusive.
    """
    rows, cols = grid
    height, width = (max(1, round(side * math.sqrt(ratio))) for side in grid)
    # Truncated to whole cells, as the authors do.
    col, row = (cells % cols).double().mean(-1).long(), (cells // cols).double().mean(-1).long()
    left = (col - width // 2).clamp(0, cols - width)
    top = (row - height // 2).clamp(0, rows - height)
    return torch.stack([left, top, left + width, top + height], dim=-1)


def pool_pairs(rows: Tensor) -> Tensor:
    """Maximum of every two neighbours in a raster of even width: [T, N, D] to [T, N / 2, D]."""
    return F.max_pool1d(rows.transpose(1, 2), kernel_size=2).transpose(1, 2)


def crop_tokens(rows: Tensor, boxes: Tensor, grid: tuple[int, int]) -> Tensor:
    """Rows [T, P, D] whose cell lies in the frame's box (int64 [T, 4]), raster order: [T, height * width, D]."""
    left, top, right, bottom = (edge[:, None] for edge in boxes.unbind(-1))
    cell = torch.arange(rows.shape[1], device=rows.device)
    row, col = cell // grid[1], cell % grid[1]
    inside = (row >= top) & (row < bottom) & (col >= left) & (col < right)
    return rows[inside].view(len(rows), -1, rows.shape[-1])


def streams(
    features: Tensor,
    frame_score: Tensor,
    patches: Tensor,
    text: Tensor,
    *,
    slow: int = 3,
    middle: int = 5,
    fast: int = 50,
    fast_grid: tuple[int, int] = (4, 4),
    roi: float = 0.8,
    official_roi_grid: bool = False,
) -> Tensor:
    """The published arrangement for an image model: three streams of tokens from one clip, one behind the other.

    A few frames chosen by the question and a few at equal distances, both pooled in pairs and cropped to the region
    that fits the question, and every frame in a few averages. A frame can come three times.

    Args:
        features: [T, S * S, D], projected patches of square frames, raster order.
        frame_score: [T], see `matching_frames`.
        patches: [T, S * S, C], patches of the last CLIP layer in the space of the text.
        text: [C], the question there.
        official_roi_grid: read the pooled S x S / 2 grid as S / 2 x S, like the official code, whose regions are
            therefore no rectangles of the picture.

    Returns:
        [M, D]; M is 2648 for 50 frames of 24 x 24 patches with the defaults.
    """
    total, side = len(features), math.isqrt(features.shape[1])
    grid = (side // 2, side) if official_roi_grid else (side, side // 2)

    def cropped(chosen: Tensor) -> Tensor:
        score = F.cosine_similarity(pool_pairs(patches[chosen]), text, dim=-1)
        boxes = region(relevant_cells(score, roi), grid, roi)
        return crop_tokens(pool_pairs(features[chosen]), boxes, grid).flatten(0, 1)

    even = torch.linspace(0, total, middle + 1, dtype=torch.float64, device="cpu").long()[:-1]
    most = matching_frames(frame_score, fast)
    square = features[most].transpose(1, 2).unflatten(-1, (side, side))
    pooled = F.adaptive_avg_pool2d(square, fast_grid).flatten(2).transpose(1, 2)
    return torch.cat([cropped(matching_frames(frame_score, slow)), cropped(even), pooled.flatten(0, 1)])


@dataclass(kw_only=True)
class FreeVideoLLM(FrameSelector):
    """Keep the frames whose CLIP embedding is nearest to the question's, and of each the region that fits it.

    Han et al., "Free Video-LLM: Prompt-guided Visual Perception for Efficient Training-free Video LLMs", arXiv
    2410.10441 (frame sampling by the prompt; RoI cropping with area ratio 0.8). Training-free.

    The authors choose after the vision tower, for an image model whose own CLIP does the scoring (`streams` is their
    arrangement). Here the choice comes before the tower, for any model and any text-image scorer: frames that are
    dropped cost no encoding. A cropped frame is to the model a whole one: models of fixed resolution see it enlarged,
    those of native resolution get fewer tokens, and both count positions within the crop. Cells are scored by the
    scorer's patches without the authors' pooling in pairs, and with its last norm unless it is told otherwise.

    Attributes:
        keep: frames kept, a count or a share.
        roi: area of the region over that of the frame; 1.0 keeps frames whole.
    """

    roi: float = 0.8

    name: ClassVar[str] = "free_video_llm"
    paper: ClassVar[str] = "Han et al., arXiv 2410.10441"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.roi, bool) or not isinstance(self.roi, (int, float)) or not 0 < self.roi <= 1:
            raise ValueError(f"roi must be a ratio in (0, 1], got {self.roi!r}")

    def frames(self, clip: Clip, question: str, scorer: FrameScorer) -> Clip:
        """The clip's best frames for the question, cropped; at least one.

        Args:
            clip: T frames.
            question: what is asked.
            scorer: gives the cosines.

        Returns:
            A clip of round(keep * T) or min(keep, T) frames, in order of time and with their own times.
        """
        count = max(1, budget(len(clip), self.keep))
        if count < len(clip):
            clip = clip.take(matching_frames(scorer.frames(clip.frames, question), count).tolist())
        if self.roi == 1:
            return clip
        score, grid = scorer.patches(clip.frames, question)
        boxes = region(relevant_cells(score, self.roi), grid, self.roi)
        height, width = clip.frames.shape[1:3]
        return clip.crop(pixel_boxes(boxes, grid, scorer.seen(width, height), width, height))


def pixel_boxes(
    boxes: Tensor, grid: tuple[int, int], seen: Sequence[float], width: int, height: int
) -> list[list[int]]:
    """Boxes of cells int64 [T, 4] as pixels of a `width` x `height` picture of which the grid covers `seen`.

    Where the grid covers only a part (a middle square), the rest is cropped away by the same share on either side.
    """
    rows, cols = grid
    out = []
    for axis, cells, side, (start, stop) in ((0, cols, width, seen[::2]), (1, rows, height, seen[1::2])):
        first, last = boxes[:, axis], boxes[:, axis + 2]
        share = (last - first)[0].item() / cells
        # One size for all frames, whatever the rounding of their corners.
        size = min(side, max(1, round(share * side)))
        middle = (start + (stop - start) * (first + last).double() / (2 * cells)) * side
        out.append((middle - size / 2).round().long().clamp(0, side - size))
        out.append(out[-1] + size)
    left, right, top, bottom = out
    return torch.stack([left, top, right, bottom], dim=-1).tolist()

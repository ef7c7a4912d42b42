"""HICom's windows in space and time, over an item's grid of tokens."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmprune.contract import Geometry
from vlmprune.pruners._grid import shares

TIME, SIDE = 4, 3  # published kernel: frames, and rows and columns


def axis_windows(length: int, kernel: int | None = None, count: int | None = None) -> tuple[Tensor, int]:
    """Windows on an axis: int64 [S], where each starts, and how long they all are.

    S = ceil(length / kernel), or `count` with kernel = ceil(length / S). With r = length mod S (S where that is 0) the
    first r windows advance by the kernel, the others by one less and start one earlier, so that each overlaps the one
    before by one. That is HICom's rule, and it needs length = S (kernel - 1) + r, which always holds for a `count`.
    Where it does not, S windows start at floor(s (length - kernel) / (S - 1)).
    """
    if count is None:
        assert kernel is not None
        kernel = min(kernel, length)
        count = -(-length // kernel)
    else:
        kernel = -(-length // count)
    step, wide = torch.arange(count, device="cpu"), length % count or count
    if count * kernel == length:
        starts = step * kernel
    elif count * (kernel - 1) + wide == length:
        starts = step * (kernel - 1) + step.clamp(max=wide) - (step >= wide).long()
    else:
        starts = step * (length - kernel) // max(count - 1, 1)
    return starts, kernel


class Windows:
    """Windows over the tokens of an item that show a place.

    Attributes:
        members: int64 [W, E], on the CPU: the tokens of each window, time-major, then row, then column; -1 behind its
            last.
        middle: int64 [W], the token in the middle of each window (up and left of it, and before it, where there are
            two); all different.
    """

    def __init__(self, members: Tensor, middle: Tensor) -> None:
        self.members, self.middle = members, middle

    def __len__(self) -> int:
        return len(self.middle)

    @classmethod
    def of_kernel(cls, geometry: Geometry, time: int, side: int) -> Windows:
        """Windows of `time` x `side` x `side` tokens of a video, 1 x `side` x `side` of an image's pictures."""
        volumes = _volumes(geometry)
        return cls._over(volumes, [_of_kernel(*volume.shape, time, side) for volume in volumes])

    @classmethod
    def of_count(cls, geometry: Geometry, count: int) -> Windows:
        """As many windows as `count`, at most one a token; `_of_count` says of which shape."""
        volumes = _volumes(geometry)
        each = shares(torch.tensor([volume.numel() for volume in volumes], device="cpu"), count).tolist()
        return cls._over(volumes, [_of_count(*volume.shape, share) for volume, share in zip(volumes, each)])

    @classmethod
    def _over(cls, volumes: list[Tensor], tables: list[tuple[Tensor, Tensor]]) -> Windows:
        members, middle = [], []
        for volume, (cells, centre) in zip(volumes, tables):
            flat = volume.flatten()
            members.append(flat[cells.clamp(min=0)].masked_fill(cells < 0, -1))
            middle.append(flat[centre])
        return cls(_stacked(members), torch.cat(middle))


def _stacked(tables: list[Tensor]) -> Tensor:
    """int64 [sum of W, widest E] of tables [W, E], padded by -1."""
    widest = max(table.shape[1] for table in tables)
    return torch.cat([pad(table, (0, widest - table.shape[1]), value=-1) for table in tables])


def _volumes(geometry: Geometry) -> list[Tensor]:
    """int64 [T, H, W] each: the tokens of a video, or of every picture of an image, by their places.

    Raises:
        ValueError: places whose tokens are gone.
    """
    placed = (~geometry.placeless).nonzero().flatten()
    numbers = geometry.plane[placed]
    volumes = []
    for number in numbers.unique().tolist():
        here = placed[numbers == number]
        row, col = (place - place.min() for place in (geometry.row[here], geometry.col[here]))
        plane = torch.full((int(row.max()) + 1, int(col.max()) + 1), -1, device="cpu")
        plane[row, col] = here
        if len(here) < plane.numel():
            raise ValueError("hicom pools whole pictures: let it act before methods that cut them")
        volumes.append(plane)
    if geometry.kind == "video" and len({plane.shape for plane in volumes}) == 1:
        return [torch.stack(volumes)]
    return [plane[None] for plane in volumes]


@functools.lru_cache(maxsize=64)
def _of_kernel(frames: int, rows: int, cols: int, time: int, side: int) -> tuple[Tensor, Tensor]:
    """Members [W, E] and middles [W] of all windows of a kernel, as flat numbers in a [frames, rows, cols] volume."""
    axes = [axis_windows(frames, 1 if frames == 1 else time), axis_windows(rows, side), axis_windows(cols, side)]
    return _product(axes, rows, cols)


@functools.lru_cache(maxsize=64)
def _of_count(frames: int, rows: int, cols: int, count: int) -> tuple[Tensor, Tensor]:
    """The same of `count` windows, in the proportions of the published kernel, c (4, 3, 3) for some c.

    A video is cut into round(frames / 4 c) stretches, which share the count; each of these (an image is one) into bands
    of rows, and each band into windows, as square as the count allows. Every axis by `axis_windows`.
    """
    if not count:
        return torch.empty(0, 0, dtype=torch.int64, device="cpu"), torch.empty(0, dtype=torch.int64, device="cpu")
    scale = (frames * rows * cols / (TIME * SIDE * SIDE * count)) ** (1 / 3)
    stretches = max(1, min(frames, count, round(frames / (TIME * scale))), -(-count // (rows * cols)))
    starts, long = axis_windows(frames, count=stretches)
    members: list[Tensor] = []
    middle: list[Tensor] = []
    for number, start in enumerate(starts.tolist()):
        share = (number + 1) * count // stretches - number * count // stretches
        bands = max(1, min(rows, share, round((share * rows / cols) ** 0.5)), -(-share // cols))
        tops, high = axis_windows(rows, count=bands)
        for band, top in enumerate(tops.tolist()):
            width = (band + 1) * share // bands - band * share // bands
            single = [
                (torch.tensor([start], device="cpu"), long),
                (torch.tensor([top], device="cpu"), high),
                axis_windows(cols, count=width),
            ]
            cells, centre = _product(single, rows, cols)
            members.append(cells)
            middle.append(centre)
    return _stacked(members), torch.cat(middle)


def _product(axes: list[tuple[Tensor, int]], rows: int, cols: int) -> tuple[Tensor, Tensor]:
    scales = (rows * cols, cols, 1)
    starts = [start * scale for (start, _), scale in zip(axes, scales)]
    corner = (starts[0][:, None, None] + starts[1][:, None] + starts[2]).flatten()
    inside = [torch.arange(size, device="cpu") * scale for (_, size), scale in zip(axes, scales)]
    offset = (inside[0][:, None, None] + inside[1][:, None] + inside[2]).flatten()
    centre = sum((size - 1) // 2 * scale for (_, size), scale in zip(axes, scales))
    return corner[:, None] + offset, corner + centre

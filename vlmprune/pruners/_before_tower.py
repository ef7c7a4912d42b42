"""What a method of the `frames` stage is: it chooses frames, or parts of them, before the vision tower sees any."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor

from vlmprune.contract import Keep, check_keep


class FrameClip(Protocol):
    """What it needs of a clip; `vlmprune.video.Clip` is one."""

    @property
    def frames(self) -> Any:
        """uint8 [T, H, W, 3]."""

    def take(self, index: Any) -> Any:
        """The frames at positions int [K], with their times."""

    def crop(self, boxes: Any) -> Any:
        """Rectangles (left, top, right, bottom) in pixels, int [T, 4], all of one size."""

    def __len__(self) -> int: ...


class FrameScorer(Protocol):
    """What it needs of a text-image model; `vlmprune.clip.ClipScorer` is one."""

    def frames(self, frames: Any, text: str) -> Tensor:
        """Match of each frame with a text, fp32 [T]."""

    def patches(self, images: Any, text: str) -> tuple[Tensor, tuple[int, int]]:
        """Match of each patch, fp32 [T, rows * columns], and (rows, columns)."""

    def seen(self, width: int, height: int) -> Sequence[float]:
        """(left, top, right, bottom) that the patches cover, as fractions of the picture."""


Clip = TypeVar("Clip", bound=FrameClip)


@dataclass(kw_only=True)
class FrameSelector(ABC):
    """A method that acts on a clip before the model. Its dataclass fields are its hyper-parameters.

    Attributes:
        keep: share of the clip's frames that stay, or their number.
    """

    keep: Keep = 8

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    stage: ClassVar[str] = "frames"
    query_aware: ClassVar[bool] = True
    trained: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_keep(self.keep)

    @abstractmethod
    def frames(self, clip: Clip, question: str, scorer: FrameScorer) -> Clip:
        """What of the clip the model is to see, frames in order of time and with their own times."""

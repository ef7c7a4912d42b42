"""Samples as left-padded inputs of `generate()`, made once and shared by all settings of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from vlmprune.ask import Chat, batch_inputs
from vlmprune.sweep.data import Sample

if TYPE_CHECKING:
    from vlmprune.video import Clip

CACHE_BYTES = 2 << 30
Pictures: TypeAlias = "tuple[list[Image.Image], list[Clip]]"
Choose: TypeAlias = "Callable[[Clip, str], Clip]"


@dataclass(frozen=True)
class Batch:
    """Inputs of some samples, on the CPU, and which samples could not be turned into any.

    Attributes:
        number: place in the sweep's order of batches.
        samples: places in the data set; one a row of the inputs.
        pictures: of each sample, as loaded: its images, then the frames of its clip.
        bad: (place in the data set, why) of samples left out.
    """

    number: int
    samples: tuple[int, ...]
    inputs: BatchFeature
    pictures: tuple[tuple[Image.Image, ...], ...]
    bad: tuple[tuple[int, str], ...]


class Batches:
    """All batches of a data set for one model, in a fixed order: long questions first, alike in what comes with them.

    A batch is made when it is first asked for and kept while all of them take less than 2 GB.
    """

    def __init__(self, chat: Chat, samples: Sequence[Sample], size: int, prompt: str) -> None:
        self._chat, self._all, self._prompt = chat, samples, prompt
        shape = [(s.frames, len(s.images)) for s in samples]
        order = sorted(range(len(samples)), key=lambda i: (shape[i], len(samples[i].question)), reverse=True)
        groups: list[list[int]] = []
        for place in order:
            if not groups or len(groups[-1]) == size or shape[groups[-1][0]] != shape[place]:
                groups.append([])
            groups[-1].append(place)
        self.groups = [tuple(group) for group in groups]
        self._made: dict[int, Batch] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, number: int) -> Batch:
        if number in self._made:
            return self._made[number]
        batch = self.make(self.groups[number], number)
        size = sum(value.nbytes for value in batch.inputs.values() if isinstance(value, Tensor))
        if self._bytes + size <= CACHE_BYTES:
            self._bytes += size
            self._made[number] = batch
        return batch

    def make(self, places: Sequence[int], number: int = -1, choose: Choose | None = None) -> Batch:
        """A batch of any samples; those that cannot be read or encoded are left out.

        Args:
            choose: makes of a clip and the question what the model is to see.
        """
        good: list[int] = []
        pictures: list[Pictures] = []
        bad: list[tuple[int, str]] = []
        for place in places:
            sample = self._all[place]
            try:
                images = [load() for load in sample.images]
                clips = [sample.video()] if sample.video else []
                if choose is not None:
                    clips = [choose(clip, sample.question) for clip in clips]
                pictures.append((images, clips))
                good.append(place)
            except (ValueError, OSError) as error:
                bad.append((place, f"sample '{sample.id}': {line(error)}"))
        inputs = None
        if good:
            try:
                inputs = self._encode([self._all[place] for place in good], pictures)
            except Exception as error:  # processors raise whatever they meet: find the samples that it is about
                if len(good) == 1:
                    bad.append((good[0], f"sample '{self._all[good[0]].id}': {line(error)}"))
                    good, pictures = [], []
                else:
                    alone = [self.make([place], choose=choose) for place in good]
                    bad += [entry for batch in alone for entry in batch.bad]
                    left = [place for batch in alone for place in batch.samples]
                    if len(left) == len(good):
                        raise ValueError(f"samples that can be read alone cannot be batched: {line(error)}") from error
                    again = self.make(left, number, choose)
                    return Batch(number, again.samples, again.inputs, again.pictures, (*bad, *again.bad))
        shown = tuple((*images, *(frame for clip in clips for frame in clip.images)) for images, clips in pictures)
        return Batch(number, tuple(good), inputs if inputs is not None else BatchFeature(), shown, tuple(bad))

    def _encode(self, samples: Sequence[Sample], pictures: Sequence[Pictures]) -> BatchFeature:
        asked = [self._prompt.replace("{question}", sample.question) for sample in samples]
        return batch_inputs(
            self._chat.processor, [(text, images, clips) for text, (images, clips) in zip(asked, pictures)]
        )

    def __iter__(self) -> Iterator[Batch]:
        return (self[number] for number in range(len(self)))


def prepare_tokenizer(chat: Chat) -> None:
    """Let the processor pad on the left, as `generate()` wants it."""
    tokenizer = chat.processor.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def line(error: BaseException) -> str:
    """What an error says, on one line and without its full stop."""
    return (" ".join(str(error).split()) or type(error).__name__).rstrip(".")

"""Frames chosen by the question before the model sees any, as one of a sweep's methods."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.backends import mha
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vlmprune.sweep.plan import Setting

if TYPE_CHECKING:
    from vlmprune.clip import ClipScorer
    from vlmprune.video import Clip


class FrameChoice:
    """Applies a setting's frame selector; its scorer is loaded once for all settings that use the same.

    Attributes:
        flops: of scoring, counted over the calls since this was last set to 0.
        changed: whether any of these calls dropped or cropped a frame.
    """

    def __init__(self, setting: Setting, device: torch.device, held: FrameChoice | None = None) -> None:
        from vlmprune.clip import ClipScorer

        selector, name = setting.selector, setting.settings.get("clip")
        assert selector is not None
        self.setting, self._selector, self._name = setting, selector, name
        self._scorer: ClipScorer = (
            held._scorer if held is not None and held._name == name else ClipScorer.named(name, device=device)
        )
        self.flops, self.changed = 0, False

    def __call__(self, clip: Clip, question: str) -> Clip:
        """What of the clip the model is to see."""
        chosen = self._selector.frames(clip, question, self._scorer)
        self.changed |= chosen.frames.shape != clip.frames.shape
        return chosen

    def counted(self, clip: Clip, question: str) -> Clip:
        """The same, with the scorer's FLOPs added to `flops`."""
        counter, fast = FlopCounterMode(display=False), mha.get_fastpath_enabled()
        mha.set_fastpath_enabled(False)  # neither fused layers nor fused attention on a CPU are counted
        try:
            with counter, sdpa_kernel(SDPBackend.MATH):
                chosen = self(clip, question)
        finally:
            mha.set_fastpath_enabled(fast)
        self.flops += counter.get_total_flops()
        return chosen

"""Fewer tokens inside a vision tower: what a pruner merges between its layers, and the way back to its full grid."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vlmprune.adapters.tower import Tower
from vlmprune.contract import Patches, Reduced, choosing


class Reduction:
    """Merges rows between the layers of a tower whose pictures are rows of a batch (CLIP, SigLIP).

    Behind the tower every patch is given the row of its group, so that whatever follows (projector, unpadding, line
    breaks) finds the grid it expects; the table "encoder_kept" tells which patches stand for a group, and of how
    many; the boundary drops the others.

    Args:
        module: the tower as the model calls it; its output's `hidden_states[feature]` are the features.
        layers: behind which `reduce` is called; those behind the features' layer are left out.
        proportional: whether attention weighs a row by how many patches it stands for (ToMe, equation 1).
    """

    def __init__(
        self,
        tower: Tower,
        module: nn.Module,
        feature: int,
        layers: Sequence[int],
        reduce: Callable[[Patches], Reduced | None],
        proportional: bool,
    ) -> None:
        self.tower, self.feature = tower, feature
        self.module = module
        self.layers = [layer for layer in layers if layer <= tower.feature_layer]
        self.reduce, self.proportional = reduce, proportional
        self._inputs: dict[int, Tensor] = {}
        self._rows: list[int] = []
        self._restart(None)

    def watch(self) -> list[RemovableHandle]:
        """Put on the hooks."""
        handles = [
            self.module.register_forward_pre_hook(self._before_tower, with_kwargs=True),
            self.module.register_forward_hook(self._after_tower),
        ]
        for layer in self.layers:
            keep = functools.partial(self._before_attention, layer)
            handles.append(self.tower.attentions[layer].register_forward_pre_hook(keep, with_kwargs=True))
        for number, block in enumerate(self.tower.layers):
            between = functools.partial(self._before_layer, number)
            handles.append(block.register_forward_pre_hook(between, with_kwargs=True))
        return handles

    def _restart(self, grid: tuple[int, int] | None) -> None:
        self._grid = grid
        self._place: Tensor | None = None  # [P, T], original row of each row that is left
        self._into: Tensor | None = None  # [P, T0], where each original row went
        self._size: Tensor | None = None  # fp32 [P, T]
        self._features: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self._inputs, self._rows = {}, []

    def _before_tower(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        pixels = args[0] if args else kwargs["pixel_values"]
        patch: Any = module.config.patch_size  # type: ignore[union-attr]
        self._restart((pixels.shape[-2] // patch, pixels.shape[-1] // patch))

    def _before_attention(self, layer: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._inputs[layer] = args[0] if args else kwargs["hidden_states"]

    def _before_layer(self, number: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if number - 1 in self.layers:
            hidden = self._apply(number - 1, hidden)
        self._rows.append(hidden.shape[1])
        if self._size is None:
            return None
        if self.proportional:
            kwargs = {**kwargs, "attention_mask": self._size.log()[:, None, None].to(hidden.dtype)}
            if len(args) > 1:
                args = (args[0], kwargs.pop("attention_mask"), *args[2:])
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def _apply(self, layer: int, hidden: Tensor) -> Tensor:
        """Let the pruner merge behind `layer`."""
        if hidden.device.type == "cpu" and not hidden.sum().isfinite():
            raise ValueError("visual features contain NaN or infinity: check the image, the dtype and the vision tower")
        batch, count, _ = hidden.shape
        every = torch.arange(count, device=hidden.device).expand(batch, -1)
        place = every if self._place is None else self._place
        into = every if self._into is None else self._into
        size = torch.ones(batch, count, device=hidden.device) if self._size is None else self._size
        assert self._grid is not None
        patches = Patches(
            features=hidden,
            prefix=self.tower.prefix,
            size=size,
            place=place,
            grid=self._grid,
            layer=layer,
            depth=self.tower.feature_layer + 1,
            keys=functools.partial(self._keys, layer),
        )
        with choosing():
            reduced = self.reduce(patches)
        if reduced is not None:
            hidden = reduced.features
            self._size = torch.zeros_like(size[:, : hidden.shape[1]]).scatter_add(1, reduced.into, size)
            self._place, self._into = place.gather(1, reduced.keep), reduced.into.gather(1, into)
            seen = self.tower.seen.setdefault(self.tower.modality, {})
            seen.setdefault("encoder_into", {})[layer] = self._into
        if layer == self.tower.feature_layer and self._place is not None:
            self._features = self._left(hidden)
        return hidden

    def _left(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert self._place is not None
        assert self._into is not None
        assert self._size is not None
        return features, self._place, self._into, self._size

    def _keys(self, layer: int) -> Tensor:
        return self.tower.heads("k", self.tower.attentions[layer], self._inputs[layer]).float().mean(1)

    def _after_tower(self, module: nn.Module, args: Any, output: Any) -> None:
        last = self.tower.feature_layer
        states = list(output.hidden_states)
        if last in self.layers and last == len(self.tower.layers) - 1:
            self._apply(last, states[self.feature])
        if self._place is None:
            self._restart(None)
            return
        features, place, into, size = self._features or self._left(states[self.feature])
        states[self.feature] = features.gather(1, into[..., None].expand(-1, -1, features.shape[-1]))
        output["hidden_states"] = tuple(states)
        kept = torch.zeros_like(into, dtype=torch.float32).scatter(1, place, size)
        seen = self.tower.seen.setdefault(self.tower.modality, {})
        seen["encoder_kept"] = kept[:, self.tower.prefix :].flatten()
        seen["encoder_rows"] = self._rows
        self._restart(None)

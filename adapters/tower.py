"""What a vision tower leaves behind while it encodes: features before the projector, attention, keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vlmprune.kernels import attention_scores

# What each signal reads: the projector's input, or an attention module (of the features' layer, of the last).
FROM_PROJECTOR = frozenset({"encoder_features", "projector_inputs"})
FROM_FEATURES_LAYER = frozenset(
    {"cls_attention", "received_attention", "received_logits", "given_logits", "encoder_keys", "cls_keys"}
)
FROM_LAST_LAYER = frozenset({"cls_attention_last", "cls_logits_last", "received_attention_last"})
SIGNALS = FROM_PROJECTOR | FROM_FEATURES_LAYER | FROM_LAST_LAYER | {"cls_features"}
NEEDS_CLS = frozenset({"cls_features", "cls_attention", "cls_attention_last", "cls_logits_last", "cls_keys"})


class Tower:
    """A tower whose pictures all have as many patches, one row of a batch each (CLIP, SigLIP, InternViT).

    A table is a tensor with one row for each patch of all pictures that one call encoded, in their order.

    Args:
        projector: its input are the features.
        layers: the tower's blocks.
        attentions: the attention module of each block.
        feature_layer: number of the block whose output the features are.
        prefix: tokens in front of a picture's patches (1 for a CLS token).
    """

    def __init__(
        self,
        projector: nn.Module,
        layers: Sequence[nn.Module],
        attentions: Sequence[nn.Module],
        feature_layer: int,
        prefix: int,
    ) -> None:
        self.projector, self.layers, self.attentions = projector, layers, attentions
        self.feature_layer, self.prefix = feature_layer, prefix
        self.modality = "image"  # what is being encoded
        self.seen: dict[str, dict[Any, Any]] = {}  # modality -> what its last encoding left

    def watch(self, signals: Iterable[str]) -> list[RemovableHandle]:
        """Put on the hooks that these signals need."""
        wanted = frozenset(signals)
        handles = []
        if wanted & FROM_PROJECTOR:
            handles.append(self.projector.register_forward_pre_hook(self._before_projector))
        layers = {self.feature_layer} if wanted & FROM_FEATURES_LAYER else set()
        if wanted & FROM_LAST_LAYER:
            layers.add(len(self.attentions) - 1)
        for number in layers:

            def keep(module: nn.Module, args: Any, kwargs: dict[str, Any], number: int = number) -> None:
                hidden = args[0] if args else kwargs["hidden_states"]
                self._left[number] = (hidden, {k: v for k, v in kwargs.items() if k != "hidden_states"})

            handles.append(self.attentions[number].register_forward_pre_hook(keep, with_kwargs=True))
        if "cls_features" in wanted:

            def keep_cls(module: nn.Module, args: Any, output: Any) -> None:
                self._left["cls"] = (output[0] if isinstance(output, tuple) else output)[:, 0]

            handles.append(self.layers[self.feature_layer].register_forward_hook(keep_cls))
        return handles

    def begin(self, modality: str) -> None:
        """Called before pictures of this modality are encoded."""
        self.modality, self.seen[modality] = modality, {}

    @property
    def _left(self) -> dict[Any, Any]:
        return self.seen.setdefault(self.modality, {})

    def _before_projector(self, module: nn.Module, args: Any) -> None:
        self._left["projector"] = args[0]

    def read(self, modality: str, signal: str) -> Tensor:
        """The signal's table: a row for each patch, [P, C] for `cls_features` and `cls_keys` (a row for each picture).

        Raises:
            ValueError: nothing was encoded under the session.
        """
        left = self.seen.get(modality)
        if not left:
            raise ValueError("these features were encoded before the session began: give the model the pixels")
        if signal not in left:
            left[signal] = self._make(left, signal)
        return left[signal]

    def _make(self, left: dict[Any, Any], signal: str) -> Tensor:
        if signal == "projector_inputs":
            return left["projector"].flatten(0, -2)
        if signal == "cls_features":
            return left["cls"]
        layer = len(self.attentions) - 1 if signal in FROM_LAST_LAYER else self.feature_layer
        attention = self.attentions[layer]
        hidden, kwargs = left[layer]
        # Where rows merged inside the tower, each patch is given what its row has.
        merges = left.get("encoder_into", {})
        behind = [number for number in merges if number < layer]
        into = merges[max(behind)] if behind else None
        if signal in ("encoder_keys", "cls_keys"):
            return self.keys(attention, hidden, signal == "cls_keys", into)
        if signal.startswith("cls_"):
            q, k, mask = self.heads("q", attention, hidden[:, :1]), self.heads("k", attention, hidden), None
        else:
            q, k, mask = self.queries_and_keys(attention, hidden, kwargs)
        if signal in ("received_logits", "given_logits"):
            scores = self._mean_logits(q, k, mask, signal == "given_logits")
        elif signal.startswith("received"):
            received = attention_scores(q[:, :, self.prefix :], k, mask=mask, query_mask=mask)
            count = k.shape[2] - self.prefix if mask is None else mask.sum(1, keepdim=True)
            scores = received / count
        elif signal == "cls_logits_last":
            scale = q.shape[-1] ** -0.5
            scores = (q.float() @ k.float().mT * scale).mean(1)[:, 0]
        else:
            scores = attention_scores(q, k, mask=mask, reduce="rows")[:, 0]
        if into is not None:
            scores = scores.gather(1, into)
        return self.flat(scores[:, self.prefix :], mask)

    def _mean_logits(self, q: Tensor, k: Tensor, mask: Tensor | None, given: bool) -> Tensor:
        """fp32 [groups, S]: logits of patches for each row, mean over patches and heads; `given`: its own for patches.

        A mean of products with one side fixed is the product with the mean: no map is needed.
        """
        own, others = (q, k) if given else (k, q)
        own, others = own.float(), others[:, :, self.prefix :].float()
        if mask is None:
            mean = others.mean(2, keepdim=True)
        else:
            real = mask[:, None, :, None]
            mean = (others * real).sum(2, keepdim=True) / real.sum(2, keepdim=True)
        return (own * mean).sum(-1).mean(1) * q.shape[-1] ** -0.5

    def queries_and_keys(
        self, attention: Any, hidden: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries and keys [groups, H, S, d] of patches that see each other, and which are real (None: all)."""
        return self.heads("q", attention, hidden), self.heads("k", attention, hidden), None

    def heads(self, part: Literal["q", "k"], attention: Any, hidden: Tensor) -> Tensor:
        """Queries or keys [groups, H, S, d] of hidden states [groups, S, C]."""
        rows = getattr(attention, f"{part}_proj")(hidden)
        norm = getattr(attention, f"{part}_norm", None)
        rows = rows if norm is None else norm(rows)
        return rows.view(*rows.shape[:-1], attention.num_heads, -1).transpose(1, 2)

    def keys(self, attention: Any, hidden: Tensor, cls: bool, into: Tensor | None) -> Tensor:
        """Keys before RoPE, mean over heads: of the patches, or of CLS."""
        mean = self.heads("k", attention, hidden).float().mean(1)
        if into is not None:
            mean = mean.gather(1, into[..., None].expand(-1, -1, mean.shape[-1]))
        return mean[:, 0] if cls else mean[:, self.prefix :].flatten(0, 1)

    def flat(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """Scores [groups, S] as a table."""
        return scores.flatten()


class PackedTower(Tower):
    """A tower that packs patches of all pictures into one row, and may look through windows (Qwen-VL).

    Its patches lie in blocks of `merge` x `merge` that make one token.
    """

    def __init__(self, tower: Any, attentions: Sequence[nn.Module], merge: int) -> None:
        super().__init__(tower.merger, tower.blocks, attentions, len(attentions) - 1, prefix=0)
        self.tower, self.merge = tower, merge

    def watch(self, signals: Iterable[str]) -> list[RemovableHandle]:
        handles = super().watch(signals)
        if handles:

            def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
                self._left["grid"] = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]

            handles.append(self.tower.register_forward_pre_hook(keep, with_kwargs=True))
        return handles

    def _make(self, left: dict[Any, Any], signal: str) -> Tensor:
        if signal == "projector_inputs":
            rows = left["projector"]
            return self._restored(rows.view(-1, rows.shape[-1] * self.merge**2), left)
        table = super()._make(left, signal)
        return self._restored(table.view(-1, self.merge**2, *table.shape[1:]), left).flatten(0, 1)

    def _restored(self, blocks: Tensor, left: dict[Any, Any]) -> Tensor:
        """Blocks of patches in the order of the tokens; the tower sorts them by window."""
        if not hasattr(self.tower, "window_size"):
            return blocks
        from transformers.vision_utils import get_vision_window_index

        config = self.tower.config
        order, _ = get_vision_window_index(
            left["grid"],
            spatial_merge_size=self.merge,
            window_size=config.window_size,
            patch_size=config.patch_size,
        )
        return blocks[order.to(blocks.device).argsort()]

    def queries_and_keys(
        self, attention: Any, hidden: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        import sys

        q, k, _ = attention.qkv(hidden).view(len(hidden), 3, attention.num_heads, -1).permute(1, 0, 2, 3).unbind(0)
        rotate = vars(sys.modules[type(attention).__module__])["apply_rotary_pos_emb_vision"]
        q, k = rotate(q, k, *kwargs["position_embeddings"])
        bounds = kwargs["cu_seqlens"]
        sizes = bounds.diff()
        widest = int(sizes.max())
        place = torch.arange(widest, device=bounds.device)
        mask = (place < sizes[:, None]).to(hidden.device)
        index = (bounds[:-1, None] + place).clamp(max=len(hidden) - 1).to(hidden.device)
        return q[index].transpose(1, 2), k[index].transpose(1, 2), mask

    def keys(self, attention: Any, hidden: Tensor, cls: bool, into: Tensor | None) -> Tensor:
        rows = attention.qkv(hidden).view(len(hidden), 3, attention.num_heads, -1)
        return rows[:, 1].float().mean(1)

    def flat(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        return scores.flatten() if mask is None else scores[mask]

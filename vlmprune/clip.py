"""How well frames and patches match a text, by CLIP: any model that open_clip knows, or a local checkpoint.

Needs `pip install "vlmprune[clip]"`; a transformers CLIP folder needs nothing further.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Pictures = Sequence[Image.Image] | np.ndarray
"""Pictures of any sizes, or uint8 [I, H, W, 3]."""


class ClipScorer:
    """Cosines between pictures, their patches and texts under one CLIP model.

    Args:
        model: what to load.
            None: the small CLIP of digit scenes that comes with the package.
            A folder: one that open_clip wrote (`open_clip_config.json`), or a transformers CLIP checkpoint.
            Otherwise a name of open_clip: "ViT-B-32", "hf-hub:organisation/name", "local-dir:folder".
        pretrained: open_clip's tag of weights ("openai", "laion2b_s34b_b79k") or a file, for a plain name.
        device: where to run.
        batch_size: pictures at a time.
        post_norm: whether patches pass the tower's last layer norm before they are projected, as the pooled row does;
            Free Video-LLM leaves it out.

    Raises:
        ValueError: nothing that can be loaded.
        ImportError: open_clip is missing.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        pretrained: str | None = None,
        *,
        device: str | torch.device = "cpu",
        batch_size: int = 32,
        post_norm: bool = True,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.batch_size, self.post_norm, self.device = batch_size, post_norm, torch.device(device)
        self._towers: _OpenClip | _Transformers = _load(model, pretrained, self.device)

    @classmethod
    def named(cls, name: str | None, **options: Any) -> ClipScorer:
        """From one text, as on the command line: "ViT-L-14:openai", else as `model`."""
        if name is None or name.startswith(("hf-hub:", "local-dir:")) or Path(name).is_dir():
            return cls(name, **options)
        model, _, weights = name.partition(":")
        return cls(model, weights or None, **options)

    def text(self, text: str | Sequence[str]) -> Tensor:
        """Unit rows of texts, cut where the model's context ends.

        Returns:
            fp32 [L, C], on the CPU; L is 1 for a single text.

        Raises:
            ValueError: a text is empty.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or not all(part.strip() for part in texts):
            raise ValueError("the text to score against is empty.")
        with torch.no_grad():
            return F.normalize(self._towers.text(texts).float(), dim=-1).cpu()

    def embed(self, images: Pictures) -> Tensor:
        """Unit rows of pictures, fp32 [I, C] on the CPU."""
        with torch.no_grad():
            rows = [self._towers.whole(batch).float().cpu() for batch in self._batches(images)]
        return F.normalize(torch.cat(rows), dim=-1)

    def frames(self, frames: Pictures, text: str | Sequence[str]) -> Tensor:
        """How well each frame matches a text.

        Args:
            frames: T pictures, or uint8 [T, H, W, 3] such as `Clip.frames`.
            text: a question or a description; of several texts each is scored.

        Returns:
            Cosines, fp32 [T] for a single text, [T, L] for a list of L.

        Raises:
            ValueError: no frames, or an empty text.
        """
        score = self.embed(frames) @ self.text(text).T
        return score[:, 0] if isinstance(text, str) else score

    def patches(self, images: Pictures, text: str | Sequence[str]) -> tuple[Tensor, tuple[int, int]]:
        """How well each patch of each picture matches a text.

        The projection that CLIP learnt for the pooled row is put on every patch of the last layer. With checkpoints
        trained on captions these cosines are weak, and known to come out inverted on some; the bundled model was
        trained for them.

        Returns:
            Cosines, fp32 [I, P] ([I, P, L] for a list of texts), and the grid (rows, columns) of the P patches, in
            raster order. They cover what the model's preprocessing leaves of the picture; see `seen`.

        Raises:
            ValueError: no pictures, an empty text, or an image tower without patches (a ResNet).
        """
        words = self.text(text)
        grid = self._towers.grid
        with torch.no_grad():
            rows = [
                (F.normalize(self._towers.patches(batch, self.post_norm).float(), dim=-1).cpu() @ words.T)
                for batch in self._batches(images)
            ]
        score = torch.cat(rows)
        return score[..., 0] if isinstance(text, str) else score, grid

    def seen(self, width: int, height: int) -> tuple[float, float, float, float]:
        """(left, top, right, bottom), as fractions of a `width` x `height` picture, of what the model looks at.

        Everything where the preprocessing squashes, the middle square where it crops.
        """
        if not self._towers.crops or width == height:
            return 0.0, 0.0, 1.0, 1.0
        side = min(width, height)
        left, top = (1 - side / width) / 2, (1 - side / height) / 2
        return left, top, 1 - left, 1 - top

    def _batches(self, images: Pictures) -> Iterator[Tensor]:
        if not len(images):
            raise ValueError("there are no pictures to score.")
        for first in range(0, len(images), self.batch_size):
            part = images[first : first + self.batch_size]
            pictures = [image if isinstance(image, Image.Image) else Image.fromarray(image) for image in part]
            yield self._towers.pixels([picture.convert("RGB") for picture in pictures]).to(self.device)


class _OpenClip:
    def __init__(self, model: Any, preprocess: Any, tokenizer: Any, crops: bool) -> None:
        self.model, self.preprocess, self.tokenizer, self.crops = model.eval(), preprocess, tokenizer, crops
        self.device = next(model.parameters()).device

    def text(self, texts: list[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(texts).to(self.device))

    def pixels(self, pictures: list[Image.Image]) -> Tensor:
        return torch.stack([self.preprocess(picture) for picture in pictures])

    def whole(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)

    @property
    def grid(self) -> tuple[int, int]:
        visual = self.model.visual
        if hasattr(visual, "trunk"):
            size = getattr(getattr(visual.trunk, "patch_embed", None), "grid_size", None)
            if size is None or not hasattr(visual.head, "proj"):
                raise ValueError("this CLIP has an image tower without patches: choose a ViT.")
            return tuple(size)
        if not hasattr(visual, "conv1") or not hasattr(visual, "proj") or not hasattr(visual, "grid_size"):
            raise ValueError("this CLIP has an image tower without patches: choose a ViT.")
        return tuple(visual.grid_size)

    def patches(self, pixels: Tensor, post_norm: bool) -> Tensor:
        visual = self.model.visual
        out = visual.forward_intermediates(
            pixels, indices=1, normalize_intermediates=post_norm, intermediates_only=True, output_fmt="NLC"
        )
        rows = out["image_intermediates"][-1]
        return visual.head(rows) if hasattr(visual, "trunk") else rows @ visual.proj


class _Transformers:
    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        model: torch.nn.Module = CLIPModel.from_pretrained(folder, dtype=torch.float32)
        self.model: Any = model.to(device).eval()
        self.processor = CLIPImageProcessor.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.crops = bool(self.processor.do_center_crop)
        self.device = device

    def text(self, texts: list[str]) -> Tensor:
        length = self.model.config.text_config.max_position_embeddings
        inputs = self.tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=length)
        return self.model.text_projection(self.model.text_model(**inputs.to(self.device)).pooler_output)

    def pixels(self, pictures: list[Image.Image]) -> Tensor:
        return self.processor(pictures, return_tensors="pt")["pixel_values"]

    def whole(self, pixels: Tensor) -> Tensor:
        return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)

    @property
    def grid(self) -> tuple[int, int]:
        vision = self.model.config.vision_config
        side = vision.image_size // vision.patch_size
        return side, side

    def patches(self, pixels: Tensor, post_norm: bool) -> Tensor:
        rows = self.model.vision_model(pixel_values=pixels).last_hidden_state[:, 1:]
        return self.model.visual_projection(self.model.vision_model.post_layernorm(rows) if post_norm else rows)


def _load(model: str | Path | None, pretrained: str | None, device: torch.device) -> _OpenClip | _Transformers:
    if model is None:
        from vlmprune.bundled import clip_path

        model = clip_path()
    name = str(model)
    folder = Path(name.removeprefix("local-dir:")).expanduser()
    local = isinstance(model, Path) or name.startswith(("local-dir:", ".", "/", "~")) or folder.is_dir()
    if local:
        kind = _kind(folder)
        if kind == "transformers":
            try:
                return _Transformers(folder, device)
            except (OSError, ValueError, KeyError, RuntimeError) as error:
                raise ValueError(f"'{folder}' cannot be loaded as a CLIP: {_sentence(error)}.") from error
        name, pretrained = f"local-dir:{folder}", None
    try:
        import open_clip
    except ImportError:
        raise ImportError('CLIP scores need open_clip: pip install "vlmprune[clip]".') from None
    if not name.startswith(("local-dir:", "hf-hub:")):
        if name not in open_clip.list_models():
            raise ValueError(f"open_clip knows no model '{name}', and there is no such folder.")
        if pretrained is None:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none are published"
            raise ValueError(f"give the weights of '{name}' with pretrained: a file, or a tag ({tags}).")
    try:
        loaded, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=pretrained, device=device)
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # what its downloads, formats and configurations raise
        raise ValueError(f"'{name}' cannot be loaded as a CLIP: {_sentence(error)}.") from error
    return _OpenClip(loaded, preprocess, tokenizer, loaded.visual.preprocess_cfg["resize_mode"] == "shortest")


def _kind(folder: Path) -> str:
    """Whether open_clip or transformers wrote a folder."""
    if not folder.is_dir():
        raise ValueError(f"no such folder: '{folder}'.")
    if (folder / "open_clip_config.json").is_file():
        return "open_clip"
    file = folder / "config.json"
    try:
        kind = json.loads(file.read_text(encoding="utf-8")).get("model_type") if file.is_file() else None
    except (ValueError, AttributeError):
        kind = None
    if kind != "clip":
        raise ValueError(f"'{folder}' holds no CLIP: neither open_clip_config.json nor a config.json of type clip.")
    return "transformers"


def _sentence(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".:")

"""What ships with the package: a small LLaVA model that reads digit scenes, six held-out scenes to try it on, and a
small Qwen2.5-VL model that watches digit clips.

The models are stand-ins for tests, demos and curves on any machine; see `digit-llava/README.md` and
`digit-qwen-vl/README.md` for how they were trained and how well they answer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    import torch
    from transformers import (
        LlavaForConditionalGeneration,
        LlavaProcessor,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
    )

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class DemoQuestion:
    """A question about a demo scene, its kind (see `vlmprune.scenes.Kind`) and its right answer."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class DemoScene:
    """A shipped scene: RGB image of 96 x 96 pixels, its file name, and questions."""

    name: str
    image: Image.Image
    questions: tuple[DemoQuestion, ...]


def _model(video: bool) -> str:
    return "digit-qwen-vl" if video else "digit-llava"


def model_path() -> Path:
    """Folder of the bundled model, readable by `from_pretrained`."""
    return _HERE / "digit-llava"


def video_model_path() -> Path:
    """Folder of the bundled video model, readable by `from_pretrained`."""
    return _HERE / "digit-qwen-vl"


def clip_path() -> Path:
    """Folder of the bundled CLIP of digit scenes, readable by open_clip: `vlmprune.clip.ClipScorer()`."""
    return _HERE / "digit-clip"


def atp_weights() -> Path:
    """Folder of ATP's threshold modules for the bundled model: `vlmprune.ATP(weights=bundled.atp_weights())`."""
    return _HERE / "digit-llava-atp"


def gsearch_schedule() -> Path:
    """File of a G-Search schedule for the bundled model: `vlmprune.GSearch(schedule=bundled.gsearch_schedule())`."""
    return _HERE / "digit-llava-gsearch.json"


def qtsplus_weights(video: bool = False) -> Path:
    """Folder of QTSplus's selector for the bundled model, or the video model: `vlmprune.QTSplus(weights=...)`."""
    return _HERE / f"{_model(video)}-qtsplus"


def explain_weights() -> Path:
    """Folder of the relevance mapper for the bundled model: `vlmprune.Explain(weights=bundled.explain_weights())`."""
    return _HERE / "digit-llava-explain"


def hicom_weights(video: bool = False) -> Path:
    """Folder of HICom's modules for the bundled model, or the video model: `vlmprune.HICom(weights=...)`."""
    return _HERE / f"{_model(video)}-hicom"


def vqtoken_weights(video: bool = False) -> Path:
    """Folder of VQToken's module for the bundled model, or the video model: `vlmprune.VQToken(weights=...)`."""
    return _HERE / f"{_model(video)}-vqtoken"


def load(dtype: torch.dtype | None = None) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The bundled model in evaluation mode, float32 unless `dtype` says otherwise, on the CPU, and its processor."""
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(model_path(), dtype=dtype or torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(model_path())


def load_video(dtype: torch.dtype | None = None) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """The bundled video model in evaluation mode, float32 unless `dtype` says otherwise, on the CPU, and its
    processor."""
    import torch
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(video_model_path(), dtype=dtype or torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(video_model_path())


def demo_scenes() -> list[DemoScene]:
    """The shipped test scenes, at least two questions each. Digits and photographs were not used in training."""
    folder = _HERE / "demo"
    scenes = []
    for entry in json.loads((folder / "scenes.json").read_text(encoding="utf-8")):
        with Image.open(folder / entry["file"]) as image:
            questions = tuple(DemoQuestion(**question) for question in entry["questions"])
            scenes.append(DemoScene(entry["file"], image.convert("RGB"), questions))
    return scenes

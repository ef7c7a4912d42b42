"""A method of your own: keep the tokens that differ most from the picture's average.

    python examples/own_method.py

It runs on any supported family, in batches and in generate(); the laws in tests/test_laws.py would hold for it.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

import vlmprune
from vlmprune import bundled


@vlmprune.register_pruner
@dataclass(kw_only=True)
class Outliers(vlmprune.Pruner):
    keep: vlmprune.Keep = 0.25

    name: ClassVar[str] = "outliers"

    def select(self, tokens: vlmprune.VisualTokens, budget: torch.Tensor) -> vlmprune.Selection:
        rows = tokens.features.float()
        mean = (rows * tokens.valid[..., None]).sum(1, keepdim=True) / tokens.valid.sum(1)[:, None, None]
        score = (rows - mean).norm(dim=-1).masked_fill(~tokens.valid, -1)
        index = score.sort(dim=1, descending=True, stable=True).indices[:, : int(budget.max())]
        place = torch.arange(index.shape[1], device=index.device)
        return vlmprune.Selection(index.masked_fill(place >= budget.to(index.device)[:, None], -1))


if __name__ == "__main__":
    model, processor = bundled.load()
    scene = bundled.demo_scenes()[0]
    for question in scene.questions:
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        inputs = processor(images=scene.image, text=prompt, return_tensors="pt")
        with vlmprune.prune(model, "outliers", keep=36) as session:
            out = model.generate(**inputs, max_new_tokens=4)
        answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"{question.text:32} {answer:14} (truth: {question.answer})  {session.last}")

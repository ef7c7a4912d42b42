"""Ask any supported checkpoint about a picture with a tenth of its visual tokens.

    python examples/ask_image.py photo.jpg "What is this?" --model llava-hf/llava-1.5-7b-hf

Without --model the bundled model answers; it knows coloured digits only.
"""

import argparse

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmprune
from vlmprune import bundled

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("image")
parser.add_argument("question")
parser.add_argument("--model", default=str(bundled.model_path()), help="hub id or folder")
parser.add_argument("--keep", type=float, default=0.1)
options = parser.parse_args()

model = AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto").eval()
processor = AutoProcessor.from_pretrained(options.model)
image = Image.open(options.image).convert("RGB")
chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": options.question}]}]
prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
inputs = processor(images=image, text=prompt, return_tensors="pt").to(model.device, model.dtype)

with vlmprune.prune(model, "divprune", keep=options.keep) as session:
    out = model.generate(**inputs, max_new_tokens=64)

print(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(session.last)

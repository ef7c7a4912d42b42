"""Ask about a video: the frames that fit the question best, with a quarter of their visual tokens.

    python examples/ask_video.py clip.mp4 "Which digit appears first?" --frames 16 --frame-keep 8

Without --model the bundled video model answers; it and the bundled CLIP know coloured digits only.
"""

import argparse

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmprune
from vlmprune import FreeVideoLLM, bundled
from vlmprune.ask import prompt_inputs
from vlmprune.clip import ClipScorer
from vlmprune.video import read_video

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("video")
parser.add_argument("question")
parser.add_argument("--model", default=str(bundled.video_model_path()), help="hub id or folder")
parser.add_argument("--frames", type=int, default=16, help="frames read")
parser.add_argument("--frame-keep", type=int, default=8, help="frames shown to the model")
parser.add_argument("--keep", type=float, default=0.25)
options = parser.parse_args()

model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.float32).eval()
processor = AutoProcessor.from_pretrained(options.model)
clip = read_video(options.video, options.frames)
clip = FreeVideoLLM(keep=options.frame_keep, roi=1.0).frames(clip, options.question, ClipScorer())
inputs = prompt_inputs(processor, options.question, clips=[clip])

with vlmprune.prune(model, "divprune", keep=options.keep) as session:
    out = model.generate(**inputs, max_new_tokens=64, do_sample=False)

print("frames at", ", ".join(f"{seconds:.2f}" for seconds in clip.timestamps), "s")
print(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
print(session.last)

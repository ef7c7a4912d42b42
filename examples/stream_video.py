"""Watch a video as it comes and ask about it now and then, holding a bounded number of visual tokens.

    python examples/stream_video.py                                      # a clip of moving digits
    python examples/stream_video.py clip.mp4 "What happens?" --fps 1 --model Qwen/Qwen2.5-VL-7B-Instruct

A camera is used in the same way: `add()` its frames. Without --model the bundled video model answers; it knows coloured
digits only. The clip of digits needs `pip install "vlmprune[scenes]"`.
"""

import argparse

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmprune
from vlmprune import bundled
from vlmprune.video import iter_video
from vlmprune.video_scenes import digit_clips

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("video", nargs="?", help="a clip of digits if there is none")
parser.add_argument("question", nargs="?", default="How many digits are there?")
parser.add_argument("--model", default=str(bundled.video_model_path()), help="hub id or folder")
parser.add_argument("--fps", type=float, help="frames taken a second; all if not given")
parser.add_argument("--keep", type=float, default=0.5, help="share of a frame's visual tokens that enters")
parser.add_argument("--budget", type=int, default=72, help="visual tokens held at most")
parser.add_argument("--evict", default="divprune", help='"oldest", or a method that chooses who stays')
parser.add_argument("--every", type=int, default=8, help="frames between two questions")
options = parser.parse_args()

model = AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.float32).eval()
processor = AutoProcessor.from_pretrained(options.model)
if options.video:
    frames = iter_video(options.video, fps=options.fps)
else:
    clip = next(digit_clips("test", 1, frames=(16, 16)))
    frames = ((number / clip.fps, frame) for number, frame in enumerate(clip.frames))

with vlmprune.stream(
    model, processor, "divprune", keep=options.keep, budget=options.budget, evict=options.evict
) as watching:
    for number, (seconds, frame) in enumerate(frames, 1):
        watching.add(frame, seconds)
        if number % options.every == 0:
            print(f"{seconds:.2f} s: {watching.ask(options.question, max_new_tokens=32)}")
    print(watching.report)

"""Search how many visual tokens each decoder layer needs, save the schedule, and answer with it.

    python examples/search_schedule.py --out schedule.json
    vlmprune ask picture.png "What is this?" --pruner gsearch --set schedule=schedule.json

The quality needs no labels: how far the pruned model's answers diverge from the full model's. Use pictures and
questions like those to come; here they are the bundled scenes.
"""

import argparse

import vlmprune
from vlmprune import bundled
from vlmprune.ask import encode, load_chat
from vlmprune.pruners.gsearch import GSearch, Schedule
from vlmprune.search import KLQuality, greedy_search

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="hub id or folder; the bundled model without")
parser.add_argument("--scenes", type=int, default=6)
parser.add_argument("--tolerance", type=float, default=0.02, help="divergence allowed, in nats per token")
parser.add_argument("--step", type=float, default=1 / 16, help="grid of the shares")
parser.add_argument("--start", type=int, default=1, help="first layer to see fewer tokens")
parser.add_argument("--out", default="schedule.json")
options = parser.parse_args()

chat = load_chat(options.model)
asked = [(scene.image, q.text) for scene in bundled.demo_scenes()[: options.scenes] for q in scene.questions]
prompts = [encode(chat, [image], text) for image, text in asked]

quality = KLQuality(chat.model, prompts)
depth = chat.model.config.get_text_config().num_hidden_layers
ratios = greedy_search(
    quality, depth, tolerance=options.tolerance, step=options.step, start=options.start, group=max(1, depth // 16)
)
schedule = Schedule(
    ratios, {"model": chat.name, "quality": "kl", "tolerance": options.tolerance, "prompts": len(asked)}
)
schedule.save(options.out)
print(f"{quality.evaluations} evaluations, shares by layer: {', '.join(f'{ratio:.3g}' for ratio in ratios)}")

with vlmprune.prune(chat.model, GSearch(schedule=options.out)) as session:
    out = chat.model.generate(**prompts[0], max_new_tokens=16)
print(asked[0][1], chat.processor.decode(out[0, prompts[0]["input_ids"].shape[1] :], skip_special_tokens=True))
print(session.last)

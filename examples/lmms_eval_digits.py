"""A task for lmms-eval that needs no network: questions about digit scenes, for the bundled model.

    python examples/lmms_eval_digits.py out/digits --scenes 32
    lmms-eval --model vlmprune --model_args pruner=divprune,keep=0.25 --tasks vlmprune_digits \
        --include_path out/digits --batch_size 16

The same samples go to `vlmprune sweep --data out/digits/digits.jsonl`, and give the same accuracy.
"""

import argparse
import json
from pathlib import Path

from vlmprune.scenes import digit_scenes

TASK = """\
task: vlmprune_digits
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function digits.pictures
doc_to_text: !function digits.question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 16
process_results: !function digits.score
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 1.0
"""

FUNCTIONS = '''\
"""How lmms-eval reads and scores the digit scenes: as `vlmprune sweep` does."""

from pathlib import Path

from vlmprune.ask import load_image
from vlmprune.sweep.metrics import exact_match


def pictures(doc):
    return [load_image(Path(__file__).parent / doc["image"])]


def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def score(doc, results):
    return {"exact_match": exact_match(results[0], [doc["answer"]])}
'''


def write_task(folder: Path, scenes: int, seed: int = 20261) -> int:
    """Write pictures, questions and the task; return how many questions there are."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, scene in enumerate(digit_scenes("test", scenes, seed)):
        scene.image.save(folder / f"scene{number}.png")
        for place, question in enumerate(scene.questions):
            record = {"id": f"scene{number}-{place}", "image": f"scene{number}.png"}
            lines.append(json.dumps({**record, "question": question.text, "answer": question.answer}))
    data = folder.resolve() / "digits.jsonl"
    data.write_text("\n".join(lines) + "\n")
    (folder / "digits.yaml").write_text(TASK.format(data=data))
    (folder / "digits.py").write_text(FUNCTIONS)
    return len(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scenes", type=int, default=32)
    parser.add_argument("--seed", type=int, default=20261)
    options = parser.parse_args()
    print(f"{write_task(options.folder, options.scenes, options.seed)} questions in {options.folder}")

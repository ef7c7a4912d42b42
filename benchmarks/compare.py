"""Methods of a finished sweep against others, question by question, with McNemar's exact test.

    python benchmarks/compare.py benchmarks/results/accuracy-video --of vqtoken qtsplus --to mmtok framefusion

Writes `paired.json` into the folder. Methods are named as in the sweep's rows, without their settings; budgets that one
of a pair does not reach are left out.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

from paired import paired

from vlmprune.sweep import store


def answers(folder: Path, row: dict[str, Any]) -> dict[str, bool]:
    """By question, whether it was answered right."""
    with gzip.open(folder / "predictions" / f"{row['id']}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return {reply["id"]: reply["score"] == 1 for reply in map(json.loads, lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--of", nargs="+", required=True)
    parser.add_argument("--to", nargs="+", required=True)
    options = parser.parse_args()
    rows = [row for row in store.read(options.folder / store.RESULTS) if row["status"] == "ok"]
    if unknown := {*options.of, *options.to} - {row["method"] for row in rows}:
        parser.error(f"{options.folder} has no rows of {', '.join(sorted(unknown))}")
    found = []
    for one in (row for row in rows if row["method"] in options.of):
        for other in (row for row in rows if row["method"] in options.to and row["keep"] == one["keep"]):
            mine, theirs = answers(options.folder, one), answers(options.folder, other)
            test = paired([mine[name] for name in mine], [theirs[name] for name in mine])
            found.append({"keep": one["keep"], "of": one["id"], "to": other["id"], **test})
            print(
                f"{one['keep']:<7} {one['method']:12} {other['method']:12} +{test['only_trained']} "
                f"-{test['only_fixed']} p {test['p']:.2g}"
            )
    environment = rows[0]["environment"]
    store.write_json(options.folder / "paired.json", {"environment": environment, "pairs": found})


if __name__ == "__main__":
    main()

"""Decodes frames with decord in a process of its own; `vlmprune.video` runs this file and kills it when it hangs.

One request a line on standard input, JSON: {"path": str, "indices": [int], "count": int}. The answer is one line of
JSON, {"shape": [T, H, W, 3]} and then the uint8 frames, or {"error": str}.
"""

import json
import os
import sys


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # decord may print; standard output is for answers
    import decord

    for line in sys.stdin.buffer:
        try:
            request = json.loads(line)
            reader = decord.VideoReader(request["path"], num_threads=0)
            if len(reader) != request["count"]:
                raise ValueError(f"counts {len(reader)} frames instead of {request['count']}")
            frames = reader.get_batch(request["indices"]).asnumpy()
            del reader
        except Exception as error:
            answers.write(json.dumps({"error": str(error).strip().split("\n")[0]}).encode() + b"\n")
        else:
            answers.write(json.dumps({"shape": frames.shape}).encode() + b"\n")
            answers.write(memoryview(frames).cast("B"))
        answers.flush()


if __name__ == "__main__":
    main()

"""The example package is installed for real, and its method is there by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "examples" / "plugin_package"

USE = """
import json, sys
import vlmprune
from vlmprune import bundled

known = vlmprune.list_pruners()
assert "vlmprune_longest" in sys.modules
model, processor = bundled.load()
scene = bundled.demo_scenes()[0]
chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": scene.questions[0].text}]}]
prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
inputs = processor(images=scene.image, text=prompt, return_tensors="pt")
with vlmprune.prune(model, "longest", keep=36, p=1.0) as session:
    model.generate(**inputs, max_new_tokens=2)
    features = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
longest = features.norm(p=1.0, dim=-1).sort(descending=True, stable=True).indices[:36].sort().values
print(json.dumps({"known": known, "kept": session.last.items[0].kept.tolist(), "longest": longest.tolist()}))
"""


def test_an_installed_package_brings_its_method(tmp_path: Path) -> None:
    source, target = shutil.copytree(PACKAGE, tmp_path / "source"), tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, cwd=tmp_path)
    for path, known in ((str(target), True), ("", False)):
        command = USE if known else "import json, vlmprune; print(json.dumps({'known': vlmprune.list_pruners()}))"
        done = subprocess.run(
            [sys.executable, "-c", command],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout.splitlines()[-1])
        assert ("longest" in said["known"]) == known
        if known:
            assert len(said["kept"]) == 36
            assert said["kept"] == said["longest"]

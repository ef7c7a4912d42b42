import os
import pathlib
import subprocess
import sys

import pytest


def test_triton_cases_in_their_own_process(too_late):
    """Nothing is skipped silently: if the interpreter could not be chosen here, the cases run where it can."""
    if not too_late:
        pytest.skip("the Triton cases run in this process")
    here = pathlib.Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "triton", "--import-mode=importlib", str(here)]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=here.parent.parent, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_import_is_light():
    code = "import sys, vlmprune.kernels; assert 'triton' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

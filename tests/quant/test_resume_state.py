"""A search that is killed by the system in the middle of a block, and the same command again."""

import os
import signal
import subprocess
import sys

from tests.quant.models import loud, random_rows
from vila.quant.awq_cache import save_search
from vila.quant.awq_search import search_model
from vila.quant.quant_config import QuantConfig

CODE = """
import os, signal, sys
from pathlib import Path
from tests.quant.models import loud, random_rows
from vila.quant import awq_search
from vila.quant.awq_search import search_model

limits, calls = awq_search.search_limits, []

def killed(*args):
    calls.append(1)
    if len(calls) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return limits(*args)

awq_search.search_limits = killed
model, _ = loud(layers=3)
search_model(model, random_rows(), awq_search.QuantConfig(group_size=16), resume_dir=Path(sys.argv[1]))
"""


def test_a_killed_search_resumes_to_the_same_bytes(tmp_path):
    kept = tmp_path / "blocks"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", CODE, str(kept)], env=env, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-500:]
    assert [path.name for path in kept.iterdir()] == ["00000.safetensors"]
    first = (kept / "00000.safetensors").read_bytes()
    # Half a file that its writer was killed over is no finished block.
    broken = kept / ".00001.safetensors.x.partial"
    broken.mkdir()
    (broken / "00001.safetensors").write_bytes(first[:100])
    os.utime(broken, (0, 0))
    model, _ = loud(layers=3)
    options = QuantConfig(group_size=16)
    save_search(search_model(model, random_rows(), options, resume_dir=kept), tmp_path / "resumed.safetensors")
    save_search(search_model(model, random_rows(), options), tmp_path / "whole.safetensors")
    assert (tmp_path / "resumed.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()

"""A search that is killed by the system in the middle of a block, and the same command again."""

import os
import signal
import subprocess
import sys

from tests.quant.models import loud, random_rows
from vila.quant.awq_search import search_to_file
from vila.quant.quant_config import QuantConfig

CODE = """
import os, signal, sys
from pathlib import Path
from tests.quant.models import loud, random_rows
from vila.quant import awq_search
from vila.quant.awq_search import search_to_file

limits, calls = awq_search.search_limits, []

def killed(*args):
    calls.append(1)
    if len(calls) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return limits(*args)

awq_search.search_limits = killed
model, _ = loud(layers=3)
search_to_file(model, random_rows(), Path(sys.argv[1]), awq_search.QuantConfig(group_size=16))
"""


def test_a_killed_search_resumes_to_the_same_bytes(tmp_path):
    target = tmp_path / "search.safetensors"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", CODE, str(target)], env=env, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-500:]
    kept = tmp_path / "search.safetensors.blocks"
    assert [path.name for path in kept.iterdir()] == ["00000.safetensors"]
    assert not target.exists()
    first = (kept / "00000.safetensors").read_bytes()
    # Half a file that its writer was killed over is no finished block.
    broken = kept / ".00001.safetensors.x.partial"
    broken.mkdir()
    (broken / "00001.safetensors").write_bytes(first[:100])
    os.utime(broken, (0, 0))
    model, _ = loud(layers=3)
    options = QuantConfig(group_size=16)
    search_to_file(model, random_rows(), target, options)
    search_to_file(model, random_rows(), tmp_path / "whole.safetensors", options)
    assert target.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()

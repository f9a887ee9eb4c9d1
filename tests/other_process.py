"""Effects of other processes on a directory: a lock that is held, and remains of a killed writer."""

import fcntl
import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

HOST, PID = "node7", 4321


@contextmanager
def locked_elsewhere(folder, name=".lock"):
    """Context manager: `folder` is locked by process 4321 of host node7."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.write(json.dumps({"host": HOST, "pid": PID}))
        stream.flush()
        yield


def killed_writer(target: Path, *, replaced: bool = False) -> Path:
    """Kill a writer of `target` with SIGKILL; return the temporary directory that it leaves."""
    code = (
        "import os, sys; from pathlib import Path; from vila.core.files import atomic_path\n"
        "target = Path(sys.argv[1])\n"
        "with atomic_path(target) as part:\n"
        "    part.mkdir(); (part / 'half').write_text('half')\n"
        "    if sys.argv[2]: target.rename(part.parent / 'replaced')\n"
        "    os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(target), "1" if replaced else ""], check=False)
    assert ended.returncode == -9
    (holder,) = target.parent.glob(f".{target.name}.*partial")
    return holder

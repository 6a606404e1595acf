"""What the ranks of the launcher tests do: `python -m ranks FOLDER BEHAVIOUR_OF_RANK_0 BEHAVIOUR_OF_RANK_1 ...`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from rlhf import pulse
from rlhf.launch import die_with_parent, is_worker, launcher_pid

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
behaviour = sys.argv[2 + rank]


def note(name: str, text: str = "") -> None:
    """Leave a file behind, whole or not at all."""
    temporary = folder / f".tmp-{name}-{rank}"
    temporary.write_text(text)
    temporary.rename(folder / f"{name}-{rank}")


def stop_when_asked(number: int, frame: object) -> None:
    """What a training rank does with SIGTERM: finish something, then exit as stopped."""
    note("asked")
    time.sleep(0.3)
    sys.exit(75)


die_with_parent(grace_s=1.0)
if behaviour == "polite":
    signal.signal(signal.SIGTERM, stop_when_asked)
if behaviour == "stubborn":
    signal.signal(signal.SIGTERM, lambda number, frame: note("asked"))  # and goes on
    subprocess.Popen(["sleep", "300"])
shown = ("WORLD_SIZE", "OMP_NUM_THREADS", "DS_ACCELERATOR")
facts = {"argv": sys.argv, "worker": is_worker(), "launcher": launcher_pid(), **{key: os.environ[key] for key in shown}}
private = os.environ[pulse.FOLDER]
facts |= {"folder": private, "folder_mode": os.stat(private).st_mode & 0o777}
note("started", json.dumps(facts))
sys.stdout.write(f"rank {rank} speaks\n")  # one write: unbuffered prints of two ranks would mix
if behaviour == "done":
    time.sleep(1.5)
    note("done")
elif behaviour.startswith("exit"):
    time.sleep(1.5)
    sys.exit(int(behaviour.removeprefix("exit")))
else:
    with pulse.doing("a nap"):
        time.sleep(300)

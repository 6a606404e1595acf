"""The waiting side of the launcher tests: `python parent.py FOLDER BEHAVIOUR ...` launches one rank per behaviour."""

import sys
from pathlib import Path

from rlhf import launch
from rlhf.errors import WorkerLostError

folder = Path(sys.argv[1])
launch.LOST_GRACE_S = 1.0
try:
    code = launch.launch(
        sys.argv[1:],
        launch.World(gpus=len(sys.argv) - 2, cpu=True),
        stage=folder,
        succeeded=(folder / "done-0").exists,
        module="ranks",
        grace_s=20.0,
        watchdog_s=4.0,
    )
except WorkerLostError as error:
    print(error)
    code = error.exit_code
sys.exit(code)

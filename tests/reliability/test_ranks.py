"""Two ranks that are lost: rows of the reliability sheet with few tries, and that they can fail."""

from __future__ import annotations

import signal

import pytest

from scripts.reliability import ranks
from scripts.reliability.kills import progress
from scripts.reliability.sheet import ROWS

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("id", ["R6", "R13", "S12"])
def test_nothing_is_lost(lab, id):
    row = ROWS[id]
    tally, _ = row.run(lab, tries=row.quick, seed=0)
    assert tally.tried == row.quick and not tally.violations, tally.violations


def test_a_socket_for_the_whole_world_is_seen(lab):
    """Ranks that find each other over the network, as those of several nodes do, listen on every interface."""
    from scripts.reliability.sockets import watched

    child = lab.start(lab.command("sft", "--name", "open"), ranks=2)
    assert {"::", "0.0.0.0"} & watched(child, lab.root / "open")


def test_a_rank_that_waits_in_vain_says_where(lab):
    """Without the watchdog, as on several nodes: its patience ends, in the groups that DeepSpeed makes too."""
    words = lab.command("sft", "--name", "stuck", "--rank-timeout", "3", "--set", "train.steps=1000")
    child = lab.start([*words, *ranks.options("sft", 2)], ranks=2)
    assert child.until(lambda: progress(lab.root / "stuck") >= 3), child.text("err")
    child.kill(signal.SIGSTOP, rank=1)
    try:
        assert child.until(lambda: child.is_running() and child.pids[0] in child.codes)
        assert child.codes == {child.pids[0]: 10}, child.text("err")
        assert "error: rank 0 has lost another rank, in the " in child.text("err")
        assert "Timed out waiting 3000ms" in child.text("err")
    finally:
        child.kill()
        child.wait()

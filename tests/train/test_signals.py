"""Requests to stop: at once while starting, after the step while training, at once when asked again with Ctrl-C."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from rlhf.errors import StoppedError
from rlhf.train.signals import StopRequest

ALL = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    before = {number: signal.getsignal(number) for number in ALL}
    yield StopRequest().listen()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ALL)
def test_while_starting_a_request_ends_the_process(stop, number):
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    assert stop.requested


@pytest.mark.parametrize("number", ALL)
def test_while_training_a_request_waits_for_the_step(stop, number):
    stop.after_step = True
    assert not stop.requested
    signal.raise_signal(number)
    signal.raise_signal(signal.SIGTERM)  # launchers may repeat theirs
    assert stop.requested
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_signal_that_is_ignored_stays_ignored(stop):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    StopRequest().listen()
    signal.raise_signal(signal.SIGHUP)
    assert not stop.requested


def test_what_looks_on_the_way_leaves_once_there_is_a_request(stop):
    stop.after_step = True
    stop.check()
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(StoppedError, match="stopped on request after step 3"):
        raise stop.error(" after step 3")
    with pytest.raises(StoppedError):
        stop.check()


def test_a_file_is_a_request_and_so_is_the_end_of_the_time(stop, tmp_path):
    stop.after_step = True
    with stop.watching(tmp_path / "STOP", None):
        (tmp_path / "STOP").touch()
        assert comes(stop) and "STOP" in stop.why
    stop.requested = False
    with stop.watching(tmp_path / "none", 1e-6):
        assert comes(stop) and stop.why == "after max_minutes = 1e-06"
    stop.requested = False
    with stop.watching(tmp_path / "none", 10.0):
        pass
    (tmp_path / "none").touch()  # nobody looks any more
    assert not comes(stop, within=0.8)


def comes(stop: StopRequest, within: float = 10.0) -> bool:
    deadline = time.monotonic() + within
    while not stop.requested and time.monotonic() < deadline:
        time.sleep(0.02)
    return stop.requested

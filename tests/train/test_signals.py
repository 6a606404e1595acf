"""Requests to stop: at once while starting, after the step while training, at once when asked again with Ctrl-C."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from rlhf.train.signals import StopRequest


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield StopRequest().listen()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_while_starting_a_request_ends_the_process(stop, number):
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    assert stop.requested


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_while_training_a_request_waits_for_the_step(stop, number):
    stop.after_step = True
    assert not stop.requested
    signal.raise_signal(number)
    signal.raise_signal(signal.SIGTERM)  # launchers may repeat theirs
    assert stop.requested
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)

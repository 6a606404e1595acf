"""Crash simulation: actions in a forked child that dies without warning at a chosen file operation."""

import os
import sys
from collections.abc import Callable

import pytest

_WATCHED = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}
_CUT_OFF = 99


def _in_child(action: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _dies_before(operation: int, action: Callable[[], object]) -> bool:
    def run() -> None:
        left = operation

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if event in _WATCHED:
                left -= 1
                if left == 0:
                    os._exit(_CUT_OFF)

        sys.addaudithook(count)
        action()

    code = _in_child(run)
    assert code in (0, _CUT_OFF), code
    return code == _CUT_OFF


@pytest.fixture
def in_child() -> Callable[[Callable[[], object]], int]:
    """in_child(action): the exit status of a forked child that runs it: 0 done, 1 raised."""
    return _in_child


@pytest.fixture
def dies_before() -> Callable[[int, Callable[[], object]], bool]:
    """dies_before(n, action): whether the action has n file operations; if so it was cut off right before the n-th."""
    return _dies_before

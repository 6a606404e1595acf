"""Functions of the user's own: found by `file.py:name`, called under a time limit, their answers checked.

The limit interrupts Python code, waiting included. It cannot interrupt a single call into compiled code that does not
return (a tensor operation, an extension): that is told when it comes back. Threads and processes that the function has
started go on.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import math
import numbers
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf.bounds import OutOfTimeError, time_limit
from rlhf.errors import RecipeError, UserError
from rlhf.rewards.base import Column

UserFunction = Callable[[list[Any], list[Any]], Any]


def load_function(spec: str) -> None:
    """Run the user's file and find `file.py:name` in it, so that its mistakes come up before any model is loaded."""
    _loaded(spec)


def call(spec: str, timeout: float, *arguments: list[Any]) -> Any:
    """What `file.py:name` returns within `timeout` seconds. Whatever it raises becomes one error with its line."""
    function, path = _loaded(spec), Path(spec.rpartition(":")[0])
    started = time.monotonic()
    try:
        with time_limit(timeout):
            result = function(*arguments)  # type: ignore[call-arg]
    except UserError:
        raise
    except OutOfTimeError as late:
        raise _too_long(spec, timeout, _line(late, path)) from None
    except (Exception, SystemExit) as error:
        raise RecipeError(
            f"the reward function raised {_what_happened(error, path)}",
            where=spec,
            fix="it must return scores for every answer; None leaves an answer unscored",
        ) from error
    if time.monotonic() - started > timeout:
        raise _too_long(spec, timeout, "")
    return result


def checked_scores(result: Any, count: int, spec: str, what: str = "scores") -> Column:
    """The user's scores as floats; a wrong type, length or value is the user's to mend, never replaced by 0."""
    fix = f"it must return a list of {count} numbers; None leaves an answer unscored"
    if not isinstance(result, list | tuple):
        raise RecipeError(f"expected a list of {what}, found {shown(result)}", where=spec, fix=fix)
    if len(result) != count:
        raise RecipeError(f"expected {count} {what}, found {len(result)}: {shown(result)}", where=spec, fix=fix)
    scores: Column = []
    for i, score in enumerate(result):
        if score is not None and not is_finite(score):
            raise RecipeError(
                f"expected a finite number or None as score {i}, found {shown(score)}", where=spec, fix=fix
            )
        scores.append(None if score is None else float(score))
    return scores


def is_finite(score: Any) -> bool:
    """True for a real number (Python's or numpy's) that a float can hold."""
    try:
        return isinstance(score, numbers.Real) and math.isfinite(score)
    except OverflowError:  # an integer beyond 1e308
        return False


def shown(value: Any) -> str:
    """Type and the beginning of a value, for messages."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 120 else text[:120] + '...'}"


def _too_long(spec: str, timeout: float, line: str) -> RecipeError:
    return RecipeError(
        f"expected an answer of the reward function within {timeout:g} s, found none{line}",
        where=spec,
        fix="Make it faster, or raise `timeout` in the reward's options.",
    )


@cache
def _loaded(spec: str) -> UserFunction:
    """The function named by `file.py:name`, from exactly that file: nothing is looked up on the import path."""
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if path.suffix != ".py" or not name.isidentifier():
        raise RecipeError(f"expected file.py:name, found {spec!r}", where="rewards: function")
    if not path.is_file():
        raise RecipeError(f"expected a Python file, found none at {path.resolve()}", where=f"rewards: function: {spec}")
    names = vars(_module(path.resolve()))
    loaded = names[name] if name in names else None
    if not callable(loaded):
        found = ", ".join(key for key, value in names.items() if callable(value) and not key.startswith("_"))
        raise RecipeError(f"expected a function {name!r}, found {found or 'no function'}", where=str(path))
    with suppress(ValueError):  # a callable written in C may not tell its arguments
        arguments = inspect.signature(loaded)
        try:
            arguments.bind([], [])
        except TypeError:
            what = f"expected a function of two lists, found {name}{arguments}"
            raise RecipeError(what, where=str(path)) from None
    return loaded  # type: ignore[no-any-return]


@cache
def _module(path: Path) -> ModuleType:
    """The user's file, run once. Registered under a name of its own first, as dataclasses and pickling expect."""
    name = "rlhf_reward_" + hashlib.sha256(str(path).encode()).hexdigest()[:16]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise RecipeError(f"the file could not be loaded: {_what_happened(error, path)}", where=str(path)) from error
    return module


def _what_happened(error: BaseException, path: Path) -> str:
    """Type and message of an exception, and the line of the user's file that it came from or through."""
    return f"{type(error).__name__}: {error}{_line(error, path)}"


def _line(error: BaseException, path: Path) -> str:
    """The last line of the user's file that an exception came from or through."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    return f" (line {lines[-1]})" if lines else ""

"""Functions of the user's own: what they are given, what they may return, how long they may take."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from rlhf.errors import RecipeError
from rlhf.rewards.rules import user_function
from rlhf.rewards.user_code import call, load_function


def written(folder: Path, body: str) -> str:
    file = folder / "my_rewards.py"
    file.write_text(body)
    return f"{file}:score"


def test_a_users_function_scores(tmp_path: Path) -> None:
    body = "def score(rows, answers):\n    return [len(a) + r['bonus'] if a else None for r, a in zip(rows, answers)]\n"
    spec = written(tmp_path, body)
    assert user_function([{"bonus": 1}, {"bonus": 2}], ["abc", ""], function=spec, timeout=60.0) == [4.0, None]


def test_a_users_function_cannot_change_the_rows(tmp_path: Path) -> None:
    body = "def score(rows, answers):\n    rows[0]['answer'] = 1\n    answers.clear()\n    return [1]\n"
    rows, answers = [{"answer": 0}], ["a"]
    assert user_function(rows, answers, function=written(tmp_path, body), timeout=60.0) == [1.0]
    assert (rows, answers) == ([{"answer": 0}], ["a"])


def test_numpy_scalars_booleans_and_dataclasses_work(tmp_path: Path) -> None:
    body = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport numpy as np\n"
        "@dataclass\nclass Judge:\n    bias: float\n"
        "def score(rows, answers):\n    return (np.float32(Judge(0.5).bias), True, 3)\n"
    )
    assert user_function([{}] * 3, [""] * 3, function=written(tmp_path, body), timeout=60.0) == [0.5, 1.0, 3.0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("1.0", "expected a list of scores, found float 1.0"),
        ("None", "expected a list of scores, found NoneType None"),
        ("'ab'", "expected a list of scores, found str 'ab'"),
        ("(x for x in [1, 2])", "expected a list of scores, found generator"),
        ("[1.0]", r"expected 2 scores, found 1: list \[1.0\]"),
        ("[1.0, 'x']", "expected a finite number or None as score 1, found str 'x'"),
        ("[1.0, float('nan')]", "expected a finite number or None as score 1, found float nan"),
        ("[float('-inf'), 1]", "expected a finite number or None as score 0, found float -inf"),
        ("[10 ** 400, 1]", "expected a finite number or None as score 0, found int 1000"),
        ("[1j, 1]", "expected a finite number or None as score 0, found complex 1j"),
    ],
)
def test_bad_scores_name_the_file_and_what_it_returned(tmp_path: Path, returned: str, message: str) -> None:
    spec = written(tmp_path, f"def score(rows, answers):\n    return {returned}\n")
    with pytest.raises(RecipeError, match=message) as caught:
        user_function([{}, {}], ["a", "b"], function=spec, timeout=60.0)
    assert spec in str(caught.value) and "return a list of 2 numbers" in str(caught.value)


def test_an_exception_in_the_function_names_its_line(tmp_path: Path) -> None:
    spec = written(tmp_path, "import json\n\ndef score(rows, answers):\n    return json.loads('{')\n")
    with pytest.raises(RecipeError, match=r"the reward function raised JSONDecodeError: .* \(line 4\)"):
        user_function([{}], ["a"], function=spec, timeout=60.0)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def score(rows, answers)\n", "could not be loaded: SyntaxError"),
        ("import no_such_module_anywhere\n", r"could not be loaded: ModuleNotFoundError: .* \(line 1\)"),
        ("def other(rows, answers):\n    return []\n", "expected a function 'score', found other"),
        ("score = 3\n", "expected a function 'score', found no function"),
        ("import sys\nsys.exit(0)\n", r"could not be loaded: SystemExit: 0 \(line 2\)"),
        ("def score(answers):\n    return []\n", r"expected a function of two lists, found score\(answers\)"),
    ],
)
def test_files_that_do_not_load_or_have_no_such_function(tmp_path: Path, body: str, message: str) -> None:
    spec = written(tmp_path, body)
    for use in (load_function, lambda function: user_function([{}], ["a"], function=function, timeout=60.0)):
        with pytest.raises(RecipeError, match=message):
            use(spec)


def test_a_function_cannot_end_the_run_as_if_it_were_done(tmp_path: Path) -> None:
    spec = written(tmp_path, "import sys\ndef score(rows, answers):\n    sys.exit(0)\n")
    load_function(spec)
    with pytest.raises(RecipeError, match=r"raised SystemExit: 0 \(line 3\)"):
        user_function([{}], ["a"], function=spec, timeout=60.0)


@pytest.mark.parametrize("spec", ["score", "os:getcwd", "file.py:", "file.py:a.b", "nowhere/file.py:score", ":score"])
def test_a_function_is_found_by_path_only(spec: str) -> None:
    with pytest.raises(RecipeError, match="rewards: function"):
        user_function([{}], ["a"], function=spec, timeout=60.0)


# --- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    ["while True:\n        pass", "import time\n    time.sleep(60)", "re.match('(a+)+$', 'a' * 40 + 'b')"],
)
def test_a_call_that_takes_too_long_is_one_error_at_once(tmp_path: Path, body: str) -> None:
    spec = written(tmp_path, f"import re\ndef score(rows, answers):\n    {body}\n    return [1]\n")
    before = signal.getsignal(signal.SIGALRM)
    started = time.monotonic()
    with pytest.raises(
        RecipeError, match=r"expected an answer of the reward function within 0.2 s, found none"
    ) as caught:
        user_function([{}], ["a"], function=spec, timeout=0.2)
    assert time.monotonic() - started < 2
    assert spec in str(caught.value) and "raise `timeout`" in str(caught.value)
    assert re.search(r"\(line [34]\)", str(caught.value))
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_function_that_swallows_the_interruption_is_told_when_it_returns(tmp_path: Path) -> None:
    body = (
        "import time\ndef score(rows, answers):\n"
        "    try:\n        time.sleep(5)\n    except BaseException:\n        pass\n    return [1]\n"
    )
    with pytest.raises(RecipeError, match="within 0.1 s, found none"):
        user_function([{}], ["a"], function=written(tmp_path, body), timeout=0.1)


def test_a_handler_of_exceptions_does_not_swallow_it(tmp_path: Path) -> None:
    body = (
        "import time\ndef score(rows, answers):\n    while True:\n"
        "        try:\n            time.sleep(5)\n        except Exception:\n            pass\n"
    )
    with pytest.raises(RecipeError, match="within 0.1 s, found none"):
        user_function([{}], ["a"], function=written(tmp_path, body), timeout=0.1)


def test_a_call_in_time_leaves_an_earlier_timer_and_handler_alone(tmp_path: Path) -> None:
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        spec = written(tmp_path, "def score(rows, answers):\n    return [1]\n")
        assert user_function([{}], ["a"], function=spec, timeout=0.01) == [1.0]
        time.sleep(0.5)
        assert rung == [1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_outside_of_the_main_thread_a_late_call_is_told_when_it_returns(tmp_path: Path) -> None:
    spec = written(tmp_path, "import time\ndef score(rows, answers):\n    time.sleep(0.2)\n    return [1]\n")
    found: list[object] = []

    def run() -> None:
        for timeout in (60.0, 0.05):
            try:
                found.append(call(spec, timeout, [{}], ["a"]))
            except RecipeError as error:
                found.append(error.what)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [[1], "expected an answer of the reward function within 0.05 s, found none"]


def test_two_functions_of_a_file_share_its_one_run(tmp_path: Path) -> None:
    body = (
        "import os\nfrom pathlib import Path\n"
        "with open(__file__ + '.runs', 'a') as file:\n    file.write('x')\n"
        "def score(rows, answers):\n    return [1]\ndef other(rows, answers):\n    return [2]\n"
    )
    spec = written(tmp_path, body)
    other = f"{os.path.relpath(tmp_path)}/my_rewards.py:other"
    assert user_function([{}], [""], function=spec, timeout=60.0) == [1.0]
    assert user_function([{}], [""], function=other, timeout=60.0) == [2.0]
    assert (tmp_path / "my_rewards.py.runs").read_text() == "x"

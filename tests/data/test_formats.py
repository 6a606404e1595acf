"""Every row format: found from the columns, and turned into a record."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from rlhf.data.formats import NO_ANSWER, NO_PARTNER, OTHER_PROMPT, OTHER_PROMPTS, Record, convert, detect, reward_fields
from rlhf.data.mapping import Mapping
from rlhf.data.messages import message
from rlhf.data.reshape import pair_up
from rlhf.errors import DataError, RecipeError
from rlhf.recipe.schema import SourceBlock


def u(content: str) -> dict[str, str]:
    return message("user", content)


def a(content: str) -> dict[str, str]:
    return message("assistant", content)


def s(content: str) -> dict[str, str]:
    return message("system", content)


def read(row: dict[str, Any], **options: Any) -> tuple[str, Record]:
    source = SourceBlock(path="x", **options)
    mapped = Mapping(source, "data")("x:1", row)
    found = detect(mapped, "x:1", source, "data")
    return found, convert(mapped, "x:1", found, source)


def parts(record: Record) -> tuple[Any, ...]:
    return record.kind, record.prompt, record.answer or (record.chosen, record.rejected)


HH = "\n\nHuman: hi\n\nAssistant: hello \n\nHuman: and?\n\nAssistant: "
SHARE = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
SINGLE = {
    "prompt_completion": ({"prompt": "p", "completion": "c"}, [u("p")], [a("c")]),
    "prompt_completion messages": (
        {"prompt": [s("s"), u("p")], "completion": [{"role": "assistant", "content": "c"}]},
        [s("s"), u("p")],
        [a("c")],
    ),
    "messages": ({"messages": [s("s"), u("1"), a("2"), u("3"), a("4")]}, [s("s"), u("1"), a("2"), u("3")], [a("4")]),
    "messages parts": (
        {
            "messages": [
                {"role": "User", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                a("c"),
            ]
        },
        [u("ab")],
        [a("c")],
    ),
    "messages names": (
        {"messages": [message("developer", "d"), message("human", "1"), message("model", "2")]},
        [s("d"), u("1")],
        [a("2")],
    ),
    "sharegpt": ({"conversations": SHARE, "system": "s"}, [s("s"), u("hi")], [a("hello")]),
    "alpaca": ({"instruction": "do", "input": "this", "output": "done"}, [u("do\n\nthis")], [a("done")]),
    "alpaca short": ({"instruction": "do", "input": "", "output": "done"}, [u("do")], [a("done")]),
    "alpaca history": (
        {"instruction": "do", "output": "done", "history": [["q", "r"]], "system": ""},
        [u("q"), a("r"), u("do")],
        [a("done")],
    ),
    "labelled": ({"prompt": "p", "completion": "c", "label": 1}, [u("p")], [a("c")]),
    "scored": ({"prompt": "p", "completion": "c", "score": "-1.5"}, [u("p")], [a("c")]),
    "scored sharegpt": ({"conversations": SHARE, "score": 2}, [u("hi")], [a("hello")]),
    "labelled messages": ({"messages": [u("p"), a("c")], "label": True}, [u("p")], [a("c")]),
    "labelled sharegpt": ({"conversations": SHARE, "label": "true"}, [u("hi")], [a("hello")]),
}


@pytest.mark.parametrize("case", SINGLE)
def test_formats_with_one_answer(case: str) -> None:
    row, prompt, answer = SINGLE[case]
    found, record = read(row)
    assert found == case.split()[0]
    assert parts(record) == ("completion", prompt, answer)
    assert record.label is (True if found == "labelled" else None)


PAIRS = {
    "pairs": ({"prompt": "p", "chosen": "c", "rejected": "r"}, [u("p")], [a("c")], [a("r")]),
    "pairs single messages": (
        {"prompt": [u("p")], "chosen": a("c"), "rejected": [a("r")]},
        [u("p")],
        [a("c")],
        [a("r")],
    ),
    "pairs repeated prompt": (
        {"prompt": "p", "chosen": [u("p"), a("c")], "rejected": [u("p"), a("r")]},
        [u("p")],
        [a("c")],
        [a("r")],
    ),
    "pairs prompt column of whole conversations": (
        {"prompt": "p", "chosen": [s("s"), u("p"), a("c")], "rejected": [s("s"), u("p"), a("r")]},
        [s("s"), u("p")],
        [a("c")],
        [a("r")],
    ),
    "pairs without prompt": (
        {"chosen": [u("p"), a("x"), u("q"), a("c")], "rejected": [u("p"), a("x"), u("q"), a("r")]},
        [u("p"), a("x"), u("q")],
        [a("c")],
        [a("r")],
    ),
    "pairs that part early": (
        {"chosen": [u("p"), a("x"), u("q"), a("c")], "rejected": [u("p"), a("r")]},
        [u("p")],
        [a("x"), u("q"), a("c")],
        [a("r")],
    ),
    "dialogue_pairs": (
        {"chosen": HH + "fine", "rejected": HH + "no"},
        [u("hi"), a("hello"), u("and?")],
        [a("fine")],
        [a("no")],
    ),
    "dialogue_pairs joined turns": (
        {"chosen": "Human: a\n\nHuman: b\n\nAssistant: c", "rejected": "\n\nHuman: a\n\nHuman: b\n\nAssistant:"},
        [u("a\n\nb")],
        [a("c")],
        [a("")],
    ),
    "sharegpt_pairs": (
        {"conversations": SHARE[:1], "chosen": SHARE[1], "rejected": {"from": "gpt", "value": "r"}},
        [u("hi")],
        [a("hello")],
        [a("r")],
    ),
}


@pytest.mark.parametrize("case", PAIRS)
def test_formats_with_two_answers(case: str) -> None:
    row, prompt, chosen, rejected = PAIRS[case]
    found, record = read({**row, "margin": 2})
    assert found == case.split()[0]
    assert parts(record) == ("pair", prompt, (chosen, rejected))
    assert (record.problem, record.margin) == ("", 2.0)


def test_lists() -> None:
    row = {"prompt": "p", "answers": ["x", [a("y"), u("q"), a("z")], a("x")], "scores": [1, 0, 1.5]}
    found, record = read({**row, "source": 7}, system="s")
    assert (found, record.kind, record.prompt) == ("lists", "list", [s("s"), u("p")])
    assert record.answers == [[a("x")], [a("y"), u("q"), a("z")], [a("x")]]
    assert (record.scores, record.fields) == ((1.0, 0.0, 1.5), {"prompt": "p", "scores": [1, 0, 1.5], "source": 7})
    whole = [[u("p"), a("x")], [u("p"), a("y")]]
    record = read({"prompt": [u("p")], "answers": whole, "ranks": [2, 1]})[1]
    assert (record.answers, record.scores) == ([[a("x")], [a("y")]], (-2.0, -1.0))
    both = {"prompt": "p", "answers": ["x", "y"], "scores": [3, 4], "place": [1, 2]}
    assert read(both, columns={"ranks": "place"})[1].scores == (-1.0, -2.0)
    assert read({"prompt": "p", "answers": ["x"]})[1].fields == {"prompt": "p", "answers": ["x"]}  # of a prompt


def test_lists_that_cannot_be_used_say_why() -> None:
    row = {"prompt": "p", "scores": [1, 0]}
    assert read({**row, "answers": ["x", [a("y"), u("z")]]})[1].problem == NO_ANSWER
    assert read({**row, "answers": ["x", [u("p")]]})[1].problem == NO_ANSWER
    assert read({**row, "answers": ["x", [u("other"), a("y")]]})[1].problem == OTHER_PROMPTS


def test_numbers_of_pairs() -> None:
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    scored = {"score_chosen": 2, "score_rejected": "1.5", "win_rate_chosen": 0.8, "win_rate_rejected": 0.1}
    record = read({**row, **scored})[1]
    assert (record.scores, record.win_rates, record.margin) == ((2.0, 1.5), (0.8, 0.1), 0.0)
    assert (read(row)[1].scores, read({**row, "score_chosen": 2})[1].scores) == ((), ())
    record = read({**row, "better": 2, "worse": 1}, columns={"score_chosen": "better", "score_rejected": "worse"})[1]
    assert record.scores == (2.0, 1.0)


def test_texts_and_prompts() -> None:
    found, record = read({"text": " some words here", "label": 0})
    assert (found, record.kind, record.text) == ("text", "text", " some words here")
    found, record = read({"text": " some words here"}, prompt_words=2)
    assert (found, *parts(record)) == ("text", "completion", [u(" some words")], [a(" here")])
    assert parts(read({"text": "one"}, prompt_words=2)[1]) == ("completion", [u("one")], [a("")])
    found, record = read({"prompt": "p", "answer": "4", "level": 2})
    assert (found, record.kind, record.prompt, record.fields) == (
        "prompts",
        "prompt",
        [u("p")],
        {"prompt": "p", "answer": "4", "level": 2},
    )
    assert parts(read({"messages": [u("p")]})[1])[:2] == ("prompt", [u("p")])


def test_reward_fields_keep_columns_but_not_what_became_messages() -> None:
    record = read({"question": "q", "answer": "4"}, columns={"prompt": "question", "completion": "answer"})[1]
    assert reward_fields(record) == {
        "question": "q",
        "answer": "4",
        "prompt": "q",
        "completion": "4",
        "messages": [u("q")],
    }
    fields = reward_fields(read({"chosen": HH + "fine", "rejected": HH + "no", "source": 7})[1])
    assert fields.keys() == {"source", "prompt", "messages"}
    assert fields["prompt"] == "user: hi\n\nassistant: hello\n\nuser: and?"


def test_system_messages() -> None:
    assert read({"prompt": "p"}, system="s")[1].prompt == [s("s"), u("p")]
    assert read({"prompt": "p", "system": "own"}, system="s")[1].prompt == [s("own"), u("p")]
    assert read({"prompt": [s("first"), u("p")]}, system="s")[1].prompt == [s("first"), u("p")]


def test_the_format_with_the_most_mapped_columns_wins() -> None:
    row = {"messages": [u("a"), a("b")], "title": "t", "label": 1}
    assert read(row)[0] == "labelled"
    assert read(row, templates={"text": "{title}"})[0] == "text"
    assert read(row, format="messages")[0] == "messages"
    both = {"prompt": "p", "completion": "c", "instruction": "i", "output": "o"}
    assert (read(both)[0], read(both, format="alpaca")[0]) == ("prompt_completion", "alpaca")


def test_options_that_a_format_has_no_use_for() -> None:
    with pytest.raises(RecipeError, match="data.prompt_words: expected rows with a text, found the format prompts"):
        read({"prompt": "p"}, prompt_words=2)
    with pytest.raises(RecipeError, match="data.system: expected conversations, found plain texts"):
        read({"text": "p"}, system="s")


def test_unknown_columns_say_what_was_expected() -> None:
    with pytest.raises(DataError) as caught:
        read({"promt": "a", "completion": "b"})
    text = str(caught.value)
    assert text.startswith("x:1: columns: expected conversations + chosen + rejected, or ")
    assert "found promt, completion" in text and "e.g. columns: {prompt: promt}." in text
    with pytest.raises(DataError, match="expected instruction \\+ output, found prompt"):
        read({"prompt": "a"}, format="alpaca")
    with pytest.raises(DataError, match="expected prompt \\+ completion \\+ label, or .*, found prompt, completion"):
        read({"prompt": "a", "completion": "b"}, pair_labels=True)


BAD_ROWS = {
    "number": ({"prompt": "p", "completion": 3}, "completion: expected text, found the number 3"),
    "null": ({"prompt": None, "completion": "c"}, "prompt: expected text, found null"),
    "bool": ({"text": True}, "text: expected text, found true"),
    "object": ({"text": {"a": 1}}, "text: expected text, found an object with a"),
    "NUL": ({"text": "ab\0"}, "text: expected text, found a NUL character at character 3"),
    "surrogate": ({"text": "a\ud800"}, "text: expected text, found half of a surrogate pair (\\ud800) at character 2"),
    "no messages": ({"messages": []}, "messages: expected at least one message, found an empty list"),
    "text messages": ({"messages": "hi"}, "messages: expected a list of messages, found 'hi'"),
    "message": ({"messages": [u("a"), "b"]}, "messages[1]: expected {role, content} or {from, value}, found 'b'"),
    "keys": (
        {"messages": [{"role": "user"}]},
        "messages[0]: expected {role, content} or {from, value}, found an object",
    ),
    "role": ({"messages": [message("owner", "x")]}, "messages[0].role: expected one of system, developer, user"),
    "content": ({"messages": [{"role": "user", "content": None}]}, "messages[0].content: expected text, found null"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "messages[0].content[0]: expected a part of type text, found 'image'",
    ),
    "tool call": (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]},
        "messages[0].tool_calls: expected a message of text, found a tool call",
    ),
    "value": (
        {"conversations": [{"from": "human", "value": 3}]},
        "conversations[0].value: expected text, found the num",
    ),
    "history": (
        {"instruction": "a", "output": "b", "history": ["x"]},
        "history[0]: expected [question, answer], found",
    ),
    "label": (
        {"prompt": "p", "completion": "c", "label": 0.5},
        "label: expected true, false, 1 or 0, found the number",
    ),
    "margin": (
        {"prompt": "p", "chosen": "c", "rejected": "r", "margin": "much"},
        "margin: expected a number, found 'much'",
    ),
    "score": ({"prompt": "p", "completion": "c", "score": None}, "score: expected a number, found null"),
    "density": (
        {"prompt": "p", "completion": "c", "score": 1, "density": 1},
        "density: expected a number between 0 and 1, found the number 1",
    ),
    "score of a side": (
        {"prompt": "p", "chosen": "c", "rejected": "r", "score_chosen": float("inf"), "score_rejected": 1},
        "score_chosen: expected a number, found the number inf",
    ),
    "one answer": (
        {"prompt": "p", "answers": ["x"], "scores": [1]},
        "answers: expected at least 2 answers to compare, found 1",
    ),
    "no list": ({"prompt": "p", "answers": "xy", "scores": [1]}, "answers: expected a list of answers, found 'xy'"),
    "answer": ({"prompt": "p", "answers": ["x", 3], "scores": [1, 2]}, "answers[1]: expected text, found the number 3"),
    "no messages in an answer": (
        {"prompt": "p", "answers": [[], "x"], "scores": [1, 2]},
        "answers[0]: expected at least one message, found an empty list",
    ),
    "lengths": (
        {"prompt": "p", "answers": ["x", "y"], "scores": [1, 2, 3]},
        "scores: expected one for each of 2 answers, found 3",
    ),
    "text score": (
        {"prompt": "p", "answers": ["x", "y"], "scores": [1, "2"]},
        "scores[1]: expected a number, found '2'",
    ),
    "nan score": (
        {"prompt": "p", "answers": ["x", "y"], "scores": [float("nan"), 2]},
        "scores[0]: expected a number, found the number nan",
    ),
    "rank": (
        {"prompt": "p", "answers": ["x", "y"], "ranks": [0, 1]},
        "ranks[0]: expected a rank from 1, the best, found the number 0",
    ),
    "margin nan": (
        {"prompt": "p", "chosen": "c", "rejected": "r", "margin": float("nan")},
        "margin: expected a number",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_name_file_line_and_field(case: str) -> None:
    row, expected = BAD_ROWS[case]
    with pytest.raises(DataError) as caught:
        read(row)
    assert str(caught.value).startswith(f"x:1: {expected}"), str(caught.value)


def test_rows_that_change_their_type_or_lose_a_column_later() -> None:
    source = SourceBlock(path="x")
    for row, found, expected in (
        ({"prompt": "p"}, "prompt_completion", "completion: expected this column, found prompt"),
        ({"prompt": "p", "completion": ["c"]}, "prompt_completion", "completion[0]: expected {role, content}"),
        ({"chosen": "no transcript", "rejected": HH}, "dialogue_pairs", "chosen: expected a transcript"),
        ({"output": "o"}, "alpaca", "instruction: expected this column, found output"),
        ({"instruction": "i", "output": "o", "history": 5}, "alpaca", "history: expected a list of [question, answer]"),
        ({"chosen": "c", "rejected": "r"}, "pairs", "prompt: expected this column, found chosen, rejected"),
        ({"prompt": "p", "answers": ["a", "b"]}, "lists", "scores: expected this column, found prompt, answers"),
    ):
        with pytest.raises(DataError) as caught:
            convert(row, "x:9", found, source)
        assert str(caught.value).startswith(f"x:9: {expected}")


def test_pairs_that_cannot_be_used_say_why() -> None:
    assert read({"chosen": [u("a"), a("b")], "rejected": [u("x"), a("c")]})[1].problem == OTHER_PROMPT
    assert read({"chosen": [u("a"), a("b"), u("c")], "rejected": [u("a"), a("d")]})[1].problem == NO_ANSWER


def test_labels_become_pairs_of_one_prompt_in_file_order() -> None:
    rows = [
        ("p", "1", True),
        ("q", "2", False),
        ("p", "3", False),
        ("p", "4", False),
        ("p", "5", True),
        ("q", "6", False),
    ]
    records = [read({"prompt": p, "completion": c, "label": label}, pair_labels=True)[1] for p, c, label in rows]
    unpaired: Counter[str] = Counter()
    pairs = list(pair_up(records, unpaired))
    assert [(p.prompt[0]["content"], p.chosen[0]["content"], p.rejected[0]["content"]) for p in pairs] == [
        ("p", "1", "3"),
        ("p", "5", "4"),
    ]
    assert unpaired == {NO_PARTNER: 2}
    found, record = read({"text": "good film", "label": "0"}, pair_labels=True)
    assert (found, record.label, parts(record)) == ("labelled", False, ("completion", [], [a("good film")]))

"""All rewards of a recipe as one: weights, unscored answers, and what each part is given."""

from __future__ import annotations

import torch

from rlhf.batch import Rollout
from rlhf.rewards.scorer import Scorer, model_part, rendered_part, rule_part, standardised


def rollout(count: int = 3) -> Rollout:
    """Two prompt and two response columns; row i is made of the token i + 1."""
    ids = torch.arange(1, count + 1)[:, None].expand(count, 4).contiguous()
    attention = torch.ones(count, 4, dtype=torch.bool)
    mask = attention[:, 2:]
    rows = [{"row": i, "answer": str(i)} for i in range(count)]
    texts = [str(i) for i in range(count)]
    return Rollout(ids, attention, mask, torch.zeros(count, 2), torch.ones(count, dtype=torch.bool), texts, rows)


def test_scores_are_a_weighted_sum_and_parts_are_told_unweighted():
    parts = {"one": lambda rollout: [1.0, 2.0, 3.0], "two": lambda rollout: [0.5, 0.0, -1.0]}
    scores = Scorer(parts, {"one": 2.0, "two": -1.0})(rollout())
    assert scores.total.tolist() == [1.5, 4.0, 7.0] and scores.total.dtype == torch.float32
    assert {name: part.tolist() for name, part in scores.parts.items()} == {"one": [1, 2, 3], "two": [0.5, 0, -1]}
    assert scores.steps is None


def test_an_answer_that_any_part_leaves_unscored_is_unscored():
    parts = {"one": lambda rollout: [1.0, None, 3.0], "two": lambda rollout: [None, None, 1.0]}
    scores = Scorer(parts, {"one": 1.0, "two": 1.0})(rollout())
    assert scores.total.isnan().tolist() == [True, True, False] and scores.total[2] == 4.0
    assert scores.parts["one"].isnan().tolist() == [False, True, False]


def test_a_rule_sees_rows_and_texts():
    seen = []

    def rule(rows, answers):
        seen.append((rows, answers))
        return [float(row["answer"] == answer) for row, answer in zip(rows, answers, strict=True)]

    assert rule_part(rule)(rollout()) == [1.0, 1.0, 1.0]
    assert seen == [([{"row": i, "answer": str(i)} for i in range(3)], ["0", "1", "2"])]


def in_twos(attention, prompt_columns, prompts):
    """Passes of two rows, and one of a stand-in."""
    assert len(attention) == len(prompts) and prompt_columns < attention.shape[1]
    yield from ((list(range(len(attention)))[i : i + 2], True) for i in range(0, len(attention), 2))
    yield [0], False


def test_a_model_reads_the_sampled_tokens_in_passes():
    sizes = []

    def score(ids, attention):
        assert attention.all() and not torch.is_grad_enabled()
        sizes.append(len(ids))
        return ids.float().sum(-1)

    part = model_part(score, in_twos, torch.device("cpu"))
    assert part(rollout(5)) == [4.0, 8.0, 12.0, 16.0, 20.0]
    assert sizes == [2, 2, 1, 1]


# --- steps ------------------------------------------------------------------------------------------------------------

NAN = float("nan")


def ragged() -> Rollout:
    """Answers of 4, 2 and 3 tokens behind one prompt token."""
    mask = torch.arange(4) < torch.tensor([4, 2, 3])[:, None]
    ids = torch.ones(3, 5, dtype=torch.long)
    attention = torch.cat([torch.ones(3, 1, dtype=torch.bool), mask], 1)
    done = torch.ones(3, dtype=torch.bool)
    return Rollout(ids, attention, mask, torch.zeros(3, 4), done, ["", "", ""], [{}, {}, {}])


def test_steps_are_weighted_added_up_and_all_else_stands_on_the_last_token():
    first = torch.tensor([[1.0, NAN, NAN, 2.0], [NAN, 3.0, NAN, NAN], [NAN, NAN, 4.0, NAN]])
    second = torch.tensor([[10.0, 20.0, NAN, 30.0], [40.0, 50.0, NAN, NAN], [NAN, NAN, 60.0, NAN]])
    step_parts = {"process": lambda rollout: first, "process_2": lambda rollout: second}
    weights = {"rule": 0.5, "process": 2.0, "process_2": 0.1}
    scores = Scorer({"rule": lambda rollout: [7.0, 8.0, 9.0]}, weights, step_parts)(ragged())
    assert scores.steps is not None and scores.steps.dtype == torch.float32
    expected = torch.tensor([[3.0, 2.0, NAN, 4 + 3 + 3.5], [4.0, 6 + 5 + 4, NAN, NAN], [NAN, NAN, 8 + 6 + 4.5, NAN]])
    torch.testing.assert_close(scores.steps, expected, equal_nan=True, atol=1e-6, rtol=0)
    torch.testing.assert_close(scores.steps.nansum(-1), scores.total, atol=1e-5, rtol=0)
    assert scores.parts["process"].tolist() == [3.0, 3.0, 4.0] and scores.parts["process_2"].tolist() == [60, 90, 60]


def test_an_unscored_answer_has_no_steps():
    steps = torch.tensor([[1.0, NAN, NAN, 2.0], [NAN, NAN, NAN, NAN], [NAN, NAN, 4.0, NAN]])
    weights = {"rule": 1.0, "process": 1.0}
    rule = {"rule": lambda rollout: [None, 1.0, 1.0]}
    scores = Scorer(rule, weights, {"process": lambda rollout: steps})(ragged())
    assert scores.total.isnan().tolist() == [True, True, False]
    assert scores.steps is not None and scores.steps[:2].isnan().all() and scores.steps[2].nansum() == 5.0
    assert scores.parts["process"].isnan().tolist() == [False, True, False]


def test_random_steps_sum_to_the_total():
    torch.manual_seed(0)
    batch = ragged()
    for _ in range(20):
        parts = {}
        for name in ("a", "b"):
            values = torch.where(torch.rand(3, 4) < 0.5, torch.randn(3, 4), NAN)
            values = torch.where(batch.response_mask, values, NAN)
            values[torch.arange(3), batch.response_mask.sum(-1) - 1] = torch.randn(3)
            parts[name] = lambda rollout, values=values: values
        scores = Scorer({"r": lambda rollout: [1.0, -2.0, 0.0]}, {"r": -3.0, "a": 0.7, "b": 1.3}, parts)(batch)
        torch.testing.assert_close(scores.steps.nansum(-1), scores.total, atol=1e-5, rtol=0)
        assert scores.steps[~batch.response_mask].isnan().all()


# --- reward models that read otherwise --------------------------------------------------------------------------------


def test_rows_that_do_not_fit_or_cannot_be_written_are_unscored_but_called_for(caplog):
    calls = []

    def score(ids, attention):
        assert not torch.is_grad_enabled()
        calls.append((ids.tolist(), attention.sum(-1).tolist()))
        return (ids * attention).sum(-1).float()

    rows = [[1, 2], [1, 2, 3, 4], None, [5], [6, 7, 8]]
    part = rendered_part(score, lambda rollout: rows, pad_id=9, room=3, cut=in_twos, device=torch.device("cpu"))
    assert part(rollout(5)) == [3.0, None, None, 5.0, 21.0]
    stand_in = ([[1, 2]], [2])
    assert calls == [([[1, 2], [9, 9]], [2, 1]), ([[9], [5]], [1, 1]), ([[6, 7, 8]], [3]), stand_in]
    (record,) = caplog.records
    text = record.getMessage()
    assert "2 of 5 answers unscored: 1 longer than its 3 positions, 1 that its chat template cannot write" in text


def test_published_statistics_leave_unscored_answers_alone():
    part = standardised(lambda rollout: [1.0, None, 5.0], 2.0, 4.0)
    assert part(rollout()) == [-0.25, None, 0.75]

"""All rewards of a recipe as one: weights, unscored answers, and what each part is given."""

from __future__ import annotations

import torch

from rlhf.batch import Rollout
from rlhf.rewards.scorer import Scorer, model_part, rule_part


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
    total, found = Scorer(parts, {"one": 2.0, "two": -1.0})(rollout())
    assert total.tolist() == [1.5, 4.0, 7.0] and total.dtype == torch.float32
    assert {name: scores.tolist() for name, scores in found.items()} == {"one": [1, 2, 3], "two": [0.5, 0, -1]}


def test_an_answer_that_any_part_leaves_unscored_is_unscored():
    parts = {"one": lambda rollout: [1.0, None, 3.0], "two": lambda rollout: [None, None, 1.0]}
    total, found = Scorer(parts, {"one": 1.0, "two": 1.0})(rollout())
    assert total.isnan().tolist() == [True, True, False] and total[2] == 4.0
    assert found["one"].isnan().tolist() == [False, True, False]


def test_a_rule_sees_rows_and_texts():
    seen = []

    def rule(rows, answers):
        seen.append((rows, answers))
        return [float(row["answer"] == answer) for row, answer in zip(rows, answers, strict=True)]

    assert rule_part(rule)(rollout()) == [1.0, 1.0, 1.0]
    assert seen == [([{"row": i, "answer": str(i)} for i in range(3)], ["0", "1", "2"])]


def test_a_model_reads_the_sampled_tokens_in_micro_batches():
    sizes = []

    def score(ids, attention):
        assert attention.all() and not torch.is_grad_enabled()
        sizes.append(len(ids))
        return ids.float().sum(-1)

    for micro_batch, expected in ((2, [2, 2, 1]), (8, [5])):
        sizes.clear()
        part = model_part(score, micro_batch, torch.device("cpu"))
        assert part(rollout(5)) == [4.0, 8.0, 12.0, 16.0, 20.0]
        assert sizes == expected

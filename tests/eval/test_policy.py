"""Evaluation of published models, against the same quantities computed another way."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.data import collate
from rlhf.data.demo import demo_rows
from rlhf.data.examples import load_examples
from rlhf.eval.policy import evaluate_policy, load_policy, score_pairs
from rlhf.models.sample import generate
from rlhf.models.tokenizer import decoder, load_tokenizer
from rlhf.recipe.schema import DataBlock, SamplingBlock

SAMPLING = SamplingBlock(max_new_tokens=6)


def test_a_policy_has_no_distance_to_itself(publish, tmp_path):
    stage = publish(tmp_path, "sft", "sft", 0)
    answers = evaluate_policy(stage, load_policy(stage), "demo:eval_prompts", SAMPLING)
    assert len(answers.texts) == len(answers.kl) == len(demo_rows("eval_prompts"))
    assert max(map(abs, answers.kl)) == 0.0
    again = evaluate_policy(stage, load_policy(stage), "demo:eval_prompts", SAMPLING)
    assert again.texts == answers.texts


def test_kl_is_the_difference_of_sequence_logprobs(publish, tmp_path):
    stage, base = publish(tmp_path, "dpo", "dpo", 1), publish(tmp_path, "sft", "sft", 0)
    answers = evaluate_policy(stage, load_policy(base), "demo:eval_prompts", SAMPLING)
    tokenizer = load_tokenizer(str(stage.model), None)
    examples = load_examples(DataBlock(path="demo:eval_prompts"), tokenizer, "prompts", seed=0).train[:30]
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    rollout = generate(
        load_policy(stage),
        collate.prompts(examples, pad),
        answers=1,
        sampling=SAMPLING,
        stop_ids=[end],
        pad_id=pad,
        seeds=list(range(30)),
        decode=decoder(tokenizer),
    )
    assert rollout.texts == answers.texts[:30]
    models = [AutoModelForCausalLM.from_pretrained(each.model).eval() for each in (stage, base)]
    for ids, attention, mask, kl in zip(
        rollout.ids, rollout.attention, rollout.response_mask, answers.kl, strict=False
    ):
        row = ids[attention]  # without padding
        logprobs = [model(row[None]).logits.log_softmax(-1)[0] for model in models]
        places = range(len(row) - int(mask.sum()), len(row))
        expected = sum((logprobs[0][t - 1, row[t]] - logprobs[1][t - 1, row[t]]).item() for t in places)
        assert kl == pytest.approx(expected, abs=1e-5)
    assert max(map(abs, answers.kl)) > 0.1


def test_scores_are_those_of_plain_transformers(publish, tmp_path):
    stage = publish(tmp_path, "rm", "rm", 2)
    chosen, rejected = score_pairs(stage, "demo:eval_pairs")
    rows = demo_rows("eval_pairs")
    assert len(chosen) == len(rejected) == len(rows)
    tokenizer = AutoTokenizer.from_pretrained(stage.model)
    model = AutoModelForSequenceClassification.from_pretrained(stage.model).eval()
    for row, *scores in list(zip(rows, chosen, rejected, strict=True))[:20]:
        for side, score in zip(("chosen", "rejected"), scores, strict=True):
            parts = (row["prompt"], row[side])
            ids = [id for part in parts for id in tokenizer.encode(part, add_special_tokens=False)]
            with torch.no_grad():
                found = model(torch.tensor([[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]])).logits
            assert found.item() == pytest.approx(score, abs=1e-5)

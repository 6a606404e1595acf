"""Invariants refuse what trains wrong in silence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.batch import Experience
from rlhf.errors import NumericsError
from rlhf.train.experience import Answers
from rlhf.train.guards import (
    active_dropout,
    check_counts,
    check_finite,
    check_ids,
    check_no_dropout,
    check_same_weights,
    check_sampler,
    check_scored,
)


@pytest.mark.parametrize(
    ("dtype", "allowed", "refused"), [("fp32", 9e-4, 1.1e-3), ("bf16", 0.09, 0.11), ("fp32", 0.0, float("nan"))]
)
def test_two_passes_of_the_same_weights_agree(dtype, allowed, refused):
    check_same_weights(allowed, dtype, "fresh samples of step 1")
    with pytest.raises(NumericsError, match="fresh samples of step 1: log-probabilities differ by"):
        check_same_weights(refused, dtype, "fresh samples of step 1")


def test_a_rollout_needs_a_score():
    check_scored(1, 8, step=0)
    with pytest.raises(NumericsError, match="rollout 3, found all 8 answers unscored"):
        check_scored(0, 8, step=2)


def test_a_minibatch_needs_something_to_learn_from():
    check_counts({"tokens": 3.0, "sequences": 1.0}, step=0, index=0)
    with pytest.raises(NumericsError, match="expected tokens to learn from in minibatch 2 of step 5, found none"):
        check_counts({"rows": 1.0, "tokens": 0.0}, step=4, index=1)


@pytest.mark.parametrize(
    ("dtype", "allowed", "refused"),
    [("fp32", 9e-4, 1.1e-3), ("bf16", 0.049, 0.051), ("fp32", 0.0, float("nan")), ("bf16", 0.0, float("inf"))],
)
def test_sampler_and_trainer_agree(dtype, allowed, refused):
    check_sampler(allowed, dtype, step=2)
    with pytest.raises(NumericsError, match="rollout 3: expected sampler and trainer to agree") as caught:
        check_sampler(refused, dtype, step=2)
    assert "other weights" in str(caught.value) and "temperature" in str(caught.value)


# --- dropout ----------------------------------------------------------------------------------------------------------


def llama(**options) -> nn.Module:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        **options,
    )
    return LlamaForCausalLM(config).train()


def test_dropout_layers_are_found_where_they_are_on():
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5), nn.Sequential(nn.Dropout1d(0.25), nn.Dropout(0.0)))
    assert active_dropout(module) == ["1 (0.5)", "2.0 (0.25)"]
    module[2].eval()
    assert active_dropout(module) == ["1 (0.5)"]
    assert active_dropout(module.eval()) == []
    check_no_dropout(module, "policy")


def test_attention_dropout_is_found_in_layers_and_configuration():
    model = llama(attention_dropout=0.1)
    found = active_dropout(model)
    assert found.count("LlamaForCausalLM.config.attention_dropout (0.1)") == 1
    assert [name for name in found if "layers.1" in name] == ["model.layers.1.self_attn.attention_dropout (0.1)"]
    with pytest.raises(NumericsError, match=r"policy: expected no dropout, found LlamaForCausalLM.*and \d more"):
        check_no_dropout(model, "policy")
    assert active_dropout(model.eval()) == [] and active_dropout(llama()) == []


@pytest.mark.parametrize("rate", [0.0, 0.05])
def test_dropout_of_an_adapter_is_found(rate):
    config = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=rate, task_type="CAUSAL_LM")
    found = active_dropout(get_peft_model(llama(), config).train())
    assert len(found) == (2 if rate else 0)
    assert all("lora_dropout" in name and "(0.05)" in name for name in found)


# --- ids and numbers --------------------------------------------------------------------------------------------------


def test_ids_stay_inside_the_vocabulary():
    check_ids(torch.tensor([[0, 4], [3, 1]]), 5, step=0)
    with pytest.raises(NumericsError, match="rollout 1: .* found 2 outside, the first 5 in row 1, column 0"):
        check_ids(torch.tensor([[0, 4], [5, -1]]), 5, step=0)
    with pytest.raises(NumericsError, match="the first -1 in row 0, column 1"):
        check_ids(torch.tensor([[0, -1]]), 5, step=0)


MASK = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]]).bool()  # the last answer is unscored
PER_TOKEN = ("old_logprobs", "ref_logprobs", "advantages", "rewards", "old_values", "returns")


def experience() -> Experience:
    numbers = {name: torch.where(MASK, -1.0, torch.nan) for name in PER_TOKEN}  # padding may hold anything
    ids, attention = torch.zeros(3, 5, dtype=torch.long), torch.ones(3, 5).bool()
    return Experience(ids, attention, MASK, scores=torch.tensor([1.0, 2.0, torch.nan]), **numbers)


def test_only_what_counts_must_be_finite():
    check_finite(experience(), step=0)
    check_finite(replace(experience(), rewards=None, old_values=None, returns=None), step=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", PER_TOKEN)
def test_a_number_that_counts_is_finite(name, bad):
    broken = experience()
    getattr(broken, name)[1, 1:] = bad
    with pytest.raises(
        NumericsError, match=f"rollout 5: expected finite {name}, found 2 of 5 .*{bad} in row 1, token 1"
    ):
        check_finite(broken, step=4)


def test_a_score_is_finite():
    broken = experience()
    broken.scores[1] = torch.inf
    with pytest.raises(NumericsError, match="expected finite scores, found 1 of 2 .* inf in row 1"):
        check_finite(broken, step=0)


def test_the_samplers_numbers_are_looked_at_too():
    good = experience()
    logprobs, finished = good.old_logprobs.clone(), torch.ones(3).bool()
    answers = Answers(good.ids, good.attention, MASK, logprobs, finished, good.scores, good.scores[:, None])
    check_finite(answers, step=0)
    logprobs[0, 0] = -torch.inf
    with pytest.raises(NumericsError, match="expected finite sample_logprobs, found 1 of 5 .* -inf in row 0, token 0"):
        check_finite(answers, step=0)

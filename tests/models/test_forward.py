from __future__ import annotations

import pytest
import torch

from rlhf.models.build import add_lora
from rlhf.models.forward import PolicyModule, ScorerModule
from rlhf.models.head import Extras
from rlhf.recipe.schema import LoraBlock, SamplingBlock


def after(ids: torch.Tensor, start: int) -> torch.Tensor:
    """The mask of all columns from `start` on."""
    return torch.ones_like(ids, dtype=torch.bool)[:, start:]


def last(values: torch.Tensor, attention: torch.Tensor, row: int, length: int) -> torch.Tensor:
    """The real columns of a (B, T - 1) result."""
    return values[row][attention[row, 1:]][-(length - 1) :]


def test_logprobs_do_not_depend_on_padding(tiny, family, ragged):
    policy, (rows, padded) = PolicyModule(tiny(family)), ragged
    for side in ("left", "right"):
        ids, attention = padded(side)
        batched = policy(ids, attention, after(ids, 1))
        assert batched.isfinite().all()
        for i, row in enumerate(rows):
            alone = policy(row[None], torch.ones(1, len(row)), after(row[None], 1))[0]
            torch.testing.assert_close(last(batched, attention, i, len(row)), alone, atol=1e-5, rtol=0)


def test_scores_and_values_do_not_depend_on_padding(tiny, family, ragged):
    scorer, (rows, padded) = ScorerModule(tiny(family, scorer=True)), ragged
    for side in ("left", "right"):
        ids, attention = padded(side)
        scores, values = scorer(ids, attention), scorer(ids, attention, after(ids, 1))
        for i, row in enumerate(rows):
            ones = torch.ones(1, len(row), dtype=torch.bool)
            torch.testing.assert_close(scores[i], scorer(row[None], ones)[0], atol=1e-5, rtol=0)
            alone = scorer(row[None], ones, after(row[None], 1))[0]
            torch.testing.assert_close(last(values, attention, i, len(row)), alone, atol=1e-5, rtol=0)


def test_appended_padding_changes_no_score(tiny, ragged):
    scorer, (_, padded) = ScorerModule(tiny("llama", scorer=True)), ragged
    ids, attention = padded("right")
    more = torch.nn.functional.pad(ids, (0, 5)), torch.nn.functional.pad(attention, (0, 5))
    torch.testing.assert_close(scorer(*more), scorer(ids, attention), atol=1e-6, rtol=0)


def test_a_real_token_with_the_pad_id_is_scored(tiny):
    scorer = ScorerModule(tiny("llama", scorer=True))
    ids = torch.tensor([[7, 8, 0, 0]])
    assert scorer(ids, torch.tensor([[1, 1, 1, 0]])) != scorer(ids, torch.tensor([[1, 1, 0, 0]]))


def test_logprobs_are_those_of_the_plain_model(tiny, family):
    model = tiny(family)
    ids = torch.randint(5, 300, (3, 10))
    plain = model(input_ids=ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    for start in (1, 4, 9):
        ours = PolicyModule(model)(ids, torch.ones_like(ids), after(ids, start))
        torch.testing.assert_close(ours, plain[:, start - 1 :], atol=1e-5, rtol=0)


def test_values_are_read_before_their_token(tiny, family):
    model = tiny(family, scorer=True)
    ids = torch.randint(5, 300, (2, 9))
    for t in range(1, 9):  # the plain score of the first t tokens is the value of the state before token t
        values = ScorerModule(model)(ids, torch.ones_like(ids), after(ids, t))
        assert values.shape == (2, 9 - t)
        torch.testing.assert_close(values[:, 0], model(input_ids=ids[:, :t]).logits[:, 0], atol=1e-5, rtol=0)


def test_sampling_options_shape_the_distribution(tiny):
    model = tiny("llama")
    ids = torch.randint(5, 300, (2, 8))
    logits = model(input_ids=ids).logits[:, 2:-1] / 0.7
    top = logits.topk(5).values[..., -1:]
    kept = torch.where(logits < top, -torch.inf, logits).scatter(
        -1, ids[:, 3:, None], logits.gather(-1, ids[:, 3:, None])
    )
    sampling = SamplingBlock(temperature=0.7, top_k=5)
    logprobs, entropy = PolicyModule(model)(
        ids, torch.ones_like(ids), after(ids, 3), sampling=sampling, extras=Extras(entropy="value")
    )
    expected = kept.log_softmax(-1).gather(-1, ids[:, 3:, None]).squeeze(-1)
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)
    probs = torch.where(logits < top, -torch.inf, logits).softmax(-1)
    torch.testing.assert_close(entropy, -torch.special.xlogy(probs, probs).sum(-1), atol=1e-5, rtol=0)
    assert logprobs.requires_grad and not entropy.requires_grad


def test_outputs_are_float32_under_bf16(tiny):
    ids = torch.randint(5, 300, (2, 6))
    policy, scorer = PolicyModule(tiny("llama").bfloat16()), ScorerModule(tiny("llama", scorer=True).bfloat16())
    outputs = [
        *policy(ids, ids > 0, after(ids, 2), extras=Extras(entropy="value")),
        scorer(ids, ids > 0),
        scorer(ids, ids > 0, after(ids, 2)),
    ]
    assert {output.dtype for output in outputs} == {torch.float32}


def test_no_gradient_is_nan_under_left_padding(tiny, family, ragged):
    policy, (_, padded) = PolicyModule(tiny(family)), ragged
    ids, attention = padded("left")
    (policy(ids, attention, after(ids, 8)) * attention[:, 8:]).sum().backward()
    assert all(p.grad.isfinite().all() for p in policy.parameters() if p.grad is not None)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_trained_parameter_gets_a_gradient_in_every_call(tiny, family, checkpointing):
    ids = torch.randint(5, 300, (2, 8))
    for scorer, calls in ((False, [{"mask": after(ids, 6)}]), (True, [{}, {"mask": after(ids, 6)}])):
        for with_lora in (False, True):
            model = tiny(family, scorer=scorer)
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if with_lora:
                model = add_lora(model, LoraBlock(rank=2), "SEQ_CLS" if scorer else "CAUSAL_LM")
            module = (ScorerModule if scorer else PolicyModule)(model.train())
            for options in calls:
                module.zero_grad()
                module(ids, torch.ones_like(ids), **options).sum().backward()
                missing = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
                assert not missing, (family, scorer, with_lora, missing)


def test_adapter_off_is_the_base_and_comes_back(tiny, family):
    ids = torch.randint(5, 300, (2, 8))
    attention = torch.ones_like(ids)
    base = PolicyModule(tiny(family))(ids, attention, after(ids, 2))
    policy = PolicyModule(add_lora(tiny(family), LoraBlock(rank=2), "CAUSAL_LM"))
    torch.testing.assert_close(policy(ids, attention, after(ids, 2)), base, atol=0, rtol=0)  # B starts at 0
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    changed = policy(ids, attention, after(ids, 2))
    assert (changed - base).abs().max() > 1e-2
    trained = [p.requires_grad for p in policy.parameters()]
    with torch.no_grad(), policy.adapter_off():
        torch.testing.assert_close(policy(ids, attention, after(ids, 2)), base, atol=0, rtol=0)
        assert [p.requires_grad for p in policy.parameters()] == trained
    torch.testing.assert_close(policy(ids, attention, after(ids, 2)), changed, atol=0, rtol=0)


def test_a_full_policy_has_no_adapter_to_switch_off(tiny):
    with pytest.raises(AssertionError, match="only a LoRA policy"), PolicyModule(tiny("llama")).adapter_off():
        pass


@pytest.mark.parametrize("start", [0, 8])
def test_a_mask_that_is_not_of_the_last_columns_is_refused(tiny, start):
    ids = torch.randint(5, 300, (1, 8))
    for module in (PolicyModule(tiny("llama")), ScorerModule(tiny("llama", scorer=True))):
        with pytest.raises(AssertionError, match="mask"):
            module(ids, torch.ones_like(ids), after(ids, start))

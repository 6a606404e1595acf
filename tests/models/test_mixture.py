"""Answers of two policies' mixture: at its ends one of them, between them the normalised product."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from rlhf.batch import Prompts
from rlhf.models import sample
from rlhf.models.build import add_lora
from rlhf.models.forward import PolicyModule
from rlhf.models.mixture import Mixture
from rlhf.recipe.schema import LoraBlock, SamplingBlock

STOP = list(range(100, 130))


@pytest.fixture
def prompts(ragged) -> Prompts:
    ids, attention = ragged[1]("left")
    return Prompts(ids, attention, [{"row": i} for i in range(len(ids))])


def answer(policy, prompts, **options):
    return sample.generate(
        policy,
        prompts,
        answers=3,
        sampling=SamplingBlock(**{"max_new_tokens": 20, **options}),
        stop_ids=STOP,
        pad_id=0,
        seeds=list(range(3 * len(prompts))),
        decode=str,
    )


def two(tiny, family) -> tuple[PolicyModule, PolicyModule]:
    policy, reference = (PolicyModule(tiny(family)) for _ in range(2))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return policy, reference


def test_at_its_ends_it_is_one_of_the_two(tiny, family, prompts):
    policy, reference = two(tiny, family)
    alone = [answer(each, prompts) for each in (policy, reference)]
    ends = [answer(Mixture(policy, reference, end, nullcontext), prompts) for end in (0.0, 1.0)]
    assert not alone[0].ids.equal(alone[1].ids)
    for one, mixed in zip(alone, ends, strict=True):
        assert one.ids.equal(mixed.ids) and one.response_mask.equal(mixed.response_mask)
        torch.testing.assert_close(one.sample_logprobs, mixed.sample_logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"temperature": 1.3, "top_k": 40}], ids=str)
def test_between_them_it_is_their_normalised_product(tiny, family, prompts, options):
    """Against whole forward passes, without caches: log-probs are mixed, scaled and normalised again."""
    policy, reference = two(tiny, family)
    rollout = answer(Mixture(policy, reference, 0.3, nullcontext), prompts, **options)
    assert rollout.finished.any() and len(set(rollout.response_mask.sum(-1).tolist())) > 3
    width = rollout.response_mask.shape[1]
    logits = [each.core(**each.inputs(rollout.ids, rollout.attention)).logits for each in (policy, reference)]
    own, other = (each[:, -width - 1 : -1].double().log_softmax(-1) for each in logits)
    mixed = (0.7 * own + 0.3 * other) / SamplingBlock(**options).temperature
    if "top_k" in options:
        smallest = mixed.topk(options["top_k"]).values[..., -1:]
        mixed = mixed.masked_fill(mixed < smallest, -torch.inf)
    expected = mixed.log_softmax(-1).gather(-1, rollout.ids[:, -width:, None]).squeeze(-1)
    gap = torch.where(rollout.response_mask, expected - rollout.sample_logprobs, 0.0).abs().max()
    assert gap <= 1e-4


def test_an_adapter_is_off_for_the_reference_only(tiny, prompts):
    model = tiny("llama")
    base = answer(PolicyModule(model), prompts)
    policy = PolicyModule(add_lora(model, LoraBlock(rank=4), "CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    adapted = answer(policy, prompts)
    assert not adapted.ids.equal(base.ids)
    for mixture, expected in ((0.0, adapted), (1.0, base)):
        assert answer(Mixture(policy, policy, mixture, policy.adapter_off), prompts).ids.equal(expected.ids)
        assert answer(policy, prompts).ids.equal(adapted.ids), "the adapter is on again"


def test_sampling_leaves_both_in_the_mode_they_were_in(tiny, prompts):
    policy, reference = two(tiny, "llama")
    policy.train(), reference.eval()
    answer(Mixture(policy, reference, 0.5, nullcontext), prompts)
    assert policy.training and not reference.training

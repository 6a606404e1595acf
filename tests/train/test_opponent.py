"""Rollouts whose answers are compared with those of an opponent."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.batch import Rollout
from rlhf.train.experience import to_experience
from rlhf.train.online import OnlineCollector
from rlhf.train.opponent import Opponent
from rlhf.train.rollout import generate
from rlhf.train.seeding import derive
from tests.train.test_online import collector


def lengths(rollout: Rollout) -> list[float | None]:
    """An answer's length is its score; one of four tokens is unscored."""
    counts = rollout.response_mask.sum(-1).tolist()
    return [None if count == 4 else count / 2 for count in counts]


def against(mixture: float) -> OnlineCollector:
    one = collector(lengths, answers=2, prompts=8, inner_epochs=2)
    return replace(one, opponent=Opponent(one.actor, one.reference, mixture))


def test_a_score_is_how_sure_the_answer_beats_its_opponent(forked):
    def body() -> None:
        one = against(0.4)
        own, opponents = one.sample(3, 0, "policy"), one.sample(3, 0, "opponent")
        assert not torch.equal(own.response_mask.sum(-1), opponents.response_mask.sum(-1))
        ours, theirs = (torch.tensor([float("nan") if s is None else s for s in lengths(r)]) for r in (own, opponents))
        found = one.draw(3, 0)
        torch.testing.assert_close(found.scores, torch.sigmoid(ours - theirs) - 0.5, equal_nan=True, atol=1e-6, rtol=0)
        assert found.scores.isnan().any() and not found.scores.isnan().all()
        assert one.part_names() == ["reward/mine", "rollout/opponent_score"]
        torch.testing.assert_close(found.parts, torch.stack([ours, theirs], 1), equal_nan=True)

    forked(body)


def test_at_its_ends_the_opponent_is_the_policy_or_the_reference(forked):
    def body() -> None:
        for mixture in (0.0, 1.0):
            one = against(mixture)
            found = one.sample(0, 0, "opponent")
            train = one.recipe.train
            seeds = [derive(train.seed, "opponent", 0, place, g) for place in range(8) for g in range(2)]
            prompts = [one.prompts[int(row["prompt"])] for row in found.rows[::2]]
            module = one.reference.engine.module if mixture else one.actor.module
            alone = generate(module, prompts, seeds, one.recipe.sampling, one.sampler)
            assert found.texts == alone.texts and len(set(alone.texts)) > 5

    forked(body)


def test_an_opponent_changes_no_answer_of_the_policy(forked):
    """Its seeds are its own, and the invariants of fresh samples hold."""

    def body() -> None:
        one = against(0.25)
        found = one.draw(0, 0)
        assert torch.equal(found.ids, replace(one, opponent=None).draw(0, 0).ids)
        seen = one.look_back(found)
        gap = torch.where(found.response_mask, seen.old_logprobs - found.sample_logprobs, 0.0).abs().max()
        assert gap < 1e-5
        experience = to_experience(found, seen, one.recipe, one.state)
        assert experience.response_mask.any(-1).equal(~found.scores.isnan()), "an answer without a verdict is left out"

    forked(body)


def test_two_ranks_compare_as_one_does(two_ranks, forked):
    def drawn() -> list[float]:
        return against(0.4).draw(1, 0).scores.nan_to_num(9.0).tolist()

    first, second = two_ranks(lambda rank: drawn())
    assert first == second

    def body() -> None:
        torch.testing.assert_close(torch.tensor(drawn()), torch.tensor(first), atol=1e-6, rtol=0)

    forked(body)


@pytest.mark.pipeline
def test_a_reference_over_other_tokens_is_refused(tiny, cli, tmp_path):
    """The same tokenizer, but a vocabulary that was padded: the distributions cannot be mixed."""
    folder = tmp_path / "padded"
    shutil.copytree(tiny.root / "sft" / "model", folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    model.save_pretrained(folder)
    words = ["opponent={}", "kl={placement: reward, estimator: k1}", f"reference.path={folder}"]
    done = cli(*tiny.command("grpo", "--name", "padded", *(w for word in words for w in ("--set", word))))
    assert done.code == 4, done.err
    size = model.config.vocab_size
    assert f"reference: expected the policy's {size - 8} tokens, found a model of {size}" in done.err

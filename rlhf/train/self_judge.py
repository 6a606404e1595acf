"""Self-rewarding (arXiv:2401.10020): the policy that has answered judges its own answers by a rubric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from rlhf.data import chat
from rlhf.data.examples import PromptExample
from rlhf.data.messages import as_text, message
from rlhf.engine import dist
from rlhf.engine.engine import Engine
from rlhf.errors import NumericsError
from rlhf.models.build import max_positions
from rlhf.recipe.judge_options import SelfRubricJudge
from rlhf.recipe.stages import LabelBlock
from rlhf.rewards import verdicts
from rlhf.rewards.chat_service import Reply
from rlhf.rewards.verdicts import Row, Verdict
from rlhf.train.job import Job
from rlhf.train.replies import ReplyCache, digest
from rlhf.train.rollout import Sampler, generate, in_turns
from rlhf.train.seeding import derive
from rlhf.train.stages import sampler


@dataclass(frozen=True)
class Question:
    """An answer to be judged, as a prompt of the policy's own, with a seed and a name in the cache for every vote."""

    place: int  # among the answers of the step
    example: PromptExample
    seeds: list[int]
    keys: list[str]


def self_judge(
    job: Job, block: SelfRubricJudge, label: LabelBlock, tokenizer: PreTrainedTokenizerFast, policy: Engine
) -> SelfJudge:
    """The policy as its own judge. What it replied is kept by its weights, tokenizer, template and sampling."""
    model = job.recipe.model
    weights = job.parents["model"].content_hash if "model" in job.parents else f"{model.path}@{model.revision}"
    ask = sampler(policy, tokenizer, block.sampling, job.stop.check)
    reads = [weights, model.dtype, chat.tokenizer_hash(tokenizer), chat.template_hash(tokenizer)]
    made_by = [block.kind, *reads, block.sampling.model_dump(mode="json"), sorted(ask.stop_ids)]
    cache = dist.agreed(lambda: ReplyCache(job.folder.root / "cache", made_by))
    return SelfJudge(block, label, policy, ask, chat.ChatTemplate(tokenizer), cache)


@dataclass(frozen=True)
class SelfJudge:
    """The policy gives every answer points. An answer whose question does not fit into the model is unscored."""

    block: SelfRubricJudge
    label: LabelBlock
    policy: Engine
    sampler: Sampler
    template: chat.ChatTemplate
    cache: ReplyCache

    def __call__(self, answers: list[Row], step: int) -> list[Row]:
        """Ask on all ranks."""
        room, length = max_positions(self.policy.module.core.config), self.block.sampling.max_new_tokens
        questions = self.questions(answers)
        fitting = [each for each in questions if room is None or len(each.example.ids) + length <= room]
        replies = self.replies(fitting)
        said: dict[int, list[Verdict]] = {each.place: [verdicts.TOO_LONG] * self.block.votes for each in questions}
        for each in fitting:
            said[each.place] = [verdicts.points(replies[key], self.block.verdict) for key in each.keys]
        for place, row in enumerate(answers):
            row["votes"] = said[place] if place in said else []
            row["score"] = verdicts.mean_score(row["votes"])
        if questions and all(row["score"] is None for row in answers):
            reply = replies[fitting[0].keys[0]] if fitting else "none, no question fits into the model's positions"
            raise NumericsError(
                f"expected judgements in step {step + 1}, found none of {len(questions)} answers; the first: {reply!r}",
                where="judge",
                fix="The policy must have learned to judge, from rows whose prompt is like judge.template and whose"
                " answer holds what judge.verdict finds. It needs room: judge.sampling.max_new_tokens.",
            )
        return answers

    def questions(self, answers: list[Row]) -> list[Question]:
        """One per answer that takes part."""
        judged = [i for i, row in enumerate(answers) if verdicts.takes_part(row, self.label.unfinished)]
        texts = [
            verdicts.fill(
                self.block.template, {"prompt": as_text(answers[i]["prompt"]), "answer": answers[i]["answer"]}
            )
            for i in judged
        ]
        rows = [self.template.prompt([message("user", text)], "judge.template") for text in texts]
        found = []
        for i, text, (ids, _) in zip(judged, texts, self.template.encode(rows), strict=True):
            seeds = [derive(self.label.seed, "judge", *answers[i]["place"], vote) for vote in range(self.block.votes)]
            example = PromptExample(ids, answers[i]["row"], {"prompt": text}, "judge.template")
            found.append(Question(i, example, seeds, [digest([text, seed]) for seed in seeds]))
        return found

    def replies(self, questions: list[Question]) -> dict[str, str]:
        """The text of every vote by its name in the cache, on all ranks.

        Batches are what they would be without a cache, and one of which any vote is not known is sampled as a whole: a
        resumed stage says the same as one that was not stopped.
        """
        size = max(1, self.label.rollout_batch // self.block.votes)
        batches = [questions[i : i + size] for i in range(0, len(questions), size)]
        known = dist.from_main(self.known(questions))
        new = [batch for batch in batches if any(key not in known for each in batch for key in each.keys)]
        with self.policy.gathered() as policy:
            fresh = dict(in_turns(new, lambda batch: self.sampled(policy, batch, size)))
        dist.agreed(lambda: self.keep(fresh))
        self.cache.counts.update(asked=len(fresh), cached=sum(key not in fresh for key in known))
        return known | fresh

    def known(self, questions: Sequence[Question]) -> dict[str, str]:
        """What this rank's cache holds of the votes."""
        return {key: self.cache[key].text for each in questions for key in each.keys if key in self.cache}

    def keep(self, fresh: dict[str, str]) -> None:
        """Write what is new, on rank 0."""
        for key, text in fresh.items() if dist.is_main() else ():
            if key not in self.cache:
                self.cache.add(key, Reply(text))

    def sampled(self, policy: Any, batch: list[Question], size: int) -> list[tuple[str, str]]:
        """(name, text) of every vote of a batch. A short batch is filled up with its last question."""
        filled = batch + batch[-1:] * (size - len(batch))
        examples, seeds = [each.example for each in filled], [seed for each in filled for seed in each.seeds]
        slots = self.label.rollout_batch
        rollout = dist.agreed(lambda: generate(policy, examples, seeds, self.block.sampling, self.sampler, slots))
        keys = [key for each in batch for key in each.keys]
        return list(zip(keys, rollout.texts, strict=False))

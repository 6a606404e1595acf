"""Judges of `rlhf label`: what a language model says of answers, as their scores.

A judge takes the answers of a step and gives them back with their `score` and what it is made of: `comparisons` (on the
first answer of every two), or `votes`. Replies are kept as they come, see replies.py: not even a crash in the middle of
a step makes the same question be asked again.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import PreTrainedTokenizerFast

from rlhf.data.messages import as_text, message
from rlhf.engine import dist
from rlhf.engine.engine import Engine
from rlhf.errors import ServiceError
from rlhf.recipe.judge_options import Endpoint, PairwiseJudge, RubricJudge, SelfRubricJudge
from rlhf.recipe.stages import LabelBlock, LabelRecipe
from rlhf.rewards import verdicts
from rlhf.rewards.chat_service import ChatService, Reply
from rlhf.rewards.http import shown
from rlhf.rewards.verdicts import Row, Verdict
from rlhf.train.job import Job
from rlhf.train.replies import ReplyCache, digest
from rlhf.train.seeding import derive
from rlhf.train.self_judge import self_judge

logger = logging.getLogger("rlhf.judge")

_TOP = 5  # tokens whose probabilities are asked for: 1 and 2 are among them, or the reply says neither
_LARGEST_SEED = 2**31 - 1  # that every service takes


class Judge(Protocol):
    """Scores the answers of a step, on all ranks alike."""

    cache: ReplyCache

    def __call__(self, answers: list[Row], step: int) -> list[Row]:
        """The same rows, with their `score` and what it is made of."""


def judge(job: Job, tokenizer: PreTrainedTokenizerFast, policy: Engine) -> Judge:
    """The recipe's judge."""
    recipe = job.recipe
    assert isinstance(recipe, LabelRecipe) and recipe.judge is not None
    block = recipe.judge
    if isinstance(block, SelfRubricJudge):
        return self_judge(job, block, recipe.label, tokenizer, policy)
    cache = dist.agreed(lambda: ReplyCache(job.folder.root / "cache", [block.kind, block.url, block.model]))
    return EndpointJudge(block, recipe.label, cache, ChatService(block) if dist.is_main() else None, job.stop.check)


@dataclass
class EndpointJudge:
    """A model behind an address. Rank 0 asks, the others wait."""

    block: Endpoint
    label: LabelBlock
    cache: ReplyCache
    service: ChatService | None  # on rank 0
    poll: Callable[[], None] = lambda: None  # raises where asking must end early; what was said is kept
    has_warned: bool = False

    def __call__(self, answers: list[Row], step: int) -> list[Row]:
        """Ask on rank 0, tell all."""
        judged = self.compared if isinstance(self.block, PairwiseJudge) else self.rated
        return dist.from_main(dist.agreed(lambda: judged(answers) if dist.is_main() else None))

    def compared(self, answers: list[Row]) -> list[Row]:
        """Every two different answers to a prompt against each other, in both orders."""
        block, size = self.block, self.label.answers
        assert isinstance(block, PairwiseJudge)
        asked: dict[tuple[int, int, str], dict[str, Any]] = {}  # (place, place of a later one, order) -> what is posted
        for a, b in self.comparisons(answers):
            prompt, one, other = as_text(answers[a]["prompt"]), answers[a]["answer"], answers[b]["answer"]
            asked[a, b, "first"] = self.request({"prompt": prompt, "first": one, "second": other})
            asked[a, b, "second"] = self.request({"prompt": prompt, "first": other, "second": one})
        said = self.verdicts(asked)
        for row in answers:
            row["comparisons"] = []
        for a, b in self.comparisons(answers):
            both = said[a, b, "first"], said[a, b, "second"]
            answers[a]["comparisons"].append(verdicts.comparison(b % size, *both, soft=block.soft))
        for start in range(0, len(answers), size):
            group = answers[start : start + size]
            shares = verdicts.shares(group)
            for i, row in enumerate(group):
                row["score"] = verdicts.win_rate(i, shares)
        return answers

    def comparisons(self, answers: list[Row]) -> list[tuple[int, int]]:
        """Places of the answers that are compared: every two to one prompt that take part and are not the same text."""
        starts = range(0, len(answers), self.label.answers)
        return [
            (a, b)
            for start in starts
            for a, b in itertools.combinations(range(start, start + self.label.answers), 2)
            if all(verdicts.takes_part(answers[i], self.label.unfinished) for i in (a, b))
            and answers[a]["answer"] != answers[b]["answer"]
        ]

    def rated(self, answers: list[Row]) -> list[Row]:
        """Every answer by itself, several times."""
        block = self.block
        assert isinstance(block, RubricJudge)
        asked = {
            (place, vote): self.request({"prompt": as_text(row["prompt"]), "answer": row["answer"]}, vote)
            for place, row in enumerate(answers)
            if verdicts.takes_part(row, self.label.unfinished)
            for vote in range(block.votes)
        }
        said = self.verdicts(asked)
        for place, row in enumerate(answers):
            row["votes"] = [said[place, vote] for vote in range(block.votes) if (place, vote) in said]
            row["score"] = verdicts.mean_score(row["votes"])
        return answers

    def request(self, texts: Mapping[str, str], vote: int = 0) -> dict[str, Any]:
        """What is posted."""
        block = self.block
        body = {
            "model": block.model,
            "messages": [message("user", verdicts.fill(block.template, texts))],
            "temperature": block.temperature,
            "max_tokens": block.max_tokens,
            "seed": derive(self.label.seed, "judge", vote) & _LARGEST_SEED,
        }
        is_soft = isinstance(block, PairwiseJudge) and block.soft
        return body | ({"logprobs": True, "top_logprobs": _TOP} if is_soft else {})

    def verdicts(self, asked: Mapping[Any, dict[str, Any]]) -> dict[Any, Verdict]:
        """What was said to every request. Refuses a step without any verdict."""
        assert self.service is not None
        keys = {place: digest(body) for place, body in asked.items()}
        wanted = {key: asked[place] for place, key in keys.items() if key not in self.cache}
        self.cache.counts.update(asked=len(wanted), cached=len(set(keys.values())) - len(wanted))
        failed: dict[str, Reply] = {}
        with closing(self.service.ask(wanted)) as replies:
            for key, reply in replies:
                if reply.problem:
                    failed[key] = reply
                else:
                    self.cache.add(key, reply)
                self.poll()
        said = {
            place: failed[key].problem if key in failed else self.read(self.cache[key]) for place, key in keys.items()
        }
        if bad := {place: reason for place, reason in said.items() if isinstance(reason, str)}:
            first = next((reply.shown for reply in failed.values()), None)
            came = self.cache[keys[next(iter(bad))]].text if first is None else first
            self.complain(list(bad.values()), len(said), came)
        return said

    def read(self, reply: Reply) -> Verdict:
        """The verdict in a reply."""
        if isinstance(self.block, RubricJudge):
            return verdicts.points(reply.text, self.block.verdict)
        if self.block.soft:
            return verdicts.share(reply.logprobs, self.block.verdict)
        return verdicts.preference(reply.text, self.block.verdict)

    def complain(self, reasons: list[str], asked: int, came: str) -> None:
        """Warn once of replies without a verdict; end the run where a step has no other. came: instead of the first."""
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(Counter(reasons).items()))
        where = f"judge: {shown(self.block.url)}"
        if len(reasons) == asked:
            raise ServiceError(
                f"expected verdicts, found none in {asked} replies ({counts}); for example: {came[:200]!r}",
                where=where,
                fix="See that an OpenAI-compatible service answers there, and that judge.template makes its model say"
                " what judge.verdict finds. Verdicts are kept: the same command goes on from here.",
            )
        if not self.has_warned:
            logger.warning("%s: of %d verdicts %s; for example: %r", where, asked, counts, came[:200])
            self.has_warned = True

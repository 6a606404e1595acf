"""The rules about judges of `rlhf label`; `check.py` runs them among the others."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rlhf.recipe.judge_options import EndpointBlock, PairwiseJudge, RubricBlock, SelfRubricJudge
from rlhf.recipe.problems import Problem
from rlhf.recipe.reward_rules import address, pattern, variable
from rlhf.recipe.stages import LabelRecipe


def one_labeller(recipe: LabelRecipe) -> Iterator[Problem]:
    """Answers are scored by rewards or by a judge."""
    if bool(recipe.rewards) == (recipe.judge is not None):
        found = "both" if recipe.rewards else "neither"
        yield Problem(
            "rewards", f"expected one of rewards and judge, found {found}", "remove one, or add one", ("judge",)
        )


def judge_options(recipe: LabelRecipe) -> Iterator[Problem]:
    """Addresses can be asked, templates show what is judged, patterns have one group."""
    judge = recipe.judge
    if judge is None:
        return
    if isinstance(judge, EndpointBlock):
        yield from address("judge.url", judge.url)
        yield from variable("judge.api_key_env", judge.api_key_env)
    fields = ("{prompt}", "{first}", "{second}") if isinstance(judge, PairwiseJudge) else ("{prompt}", "{answer}")
    if missing := [field for field in fields if field not in judge.template]:
        yield Problem("judge.template", f"expected {', '.join(fields)} in the text, found no {', '.join(missing)}")
    problems = list(pattern("judge.verdict", judge.verdict))
    yield from problems
    if not problems and (groups := re.compile(judge.verdict).groups) != 1:
        yield Problem("judge.verdict", f"expected a pattern with one group, found {groups}", "write others as (?:...)")


def judged_sampling(recipe: LabelRecipe) -> Iterator[Problem]:
    """Several votes are several draws, and an empty stop text would end every judgement at once."""
    judge = recipe.judge
    if isinstance(judge, SelfRubricJudge):
        for i, text in enumerate(judge.sampling.stop):
            if not text:
                yield Problem(f"judge.sampling.stop.{i}", "expected a token, found empty text", "remove it")
    elif isinstance(judge, RubricBlock) and judge.temperature == 0 and judge.votes > 1:
        what = f"expected 1 at temperature 0, found {judge.votes}"
        yield Problem("judge.votes", what, "the votes would be the same: raise judge.temperature, or ask once")


JUDGE_RULES = (one_labeller, judge_options, judged_sampling)

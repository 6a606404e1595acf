"""Options of judges, one block per kind: language models that say which answers are better, for `rlhf label`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rlhf.recipe.schema import Block, SamplingBlock

PAIRWISE = """\
Below are a prompt and two answers to it. Decide which answer serves whoever wrote the prompt better: is it correct, \
does it do what was asked, is it complete, is it clear? The order of the answers means nothing, and a longer answer is \
not better for being longer.

[Prompt]
{prompt}
[Answer 1]
{first}
[Answer 2]
{second}
[End]

You may reason briefly. Then write one last line: Preferred=1, Preferred=2, or Preferred=tie if neither is better."""

RUBRIC = """\
Below are a prompt and an answer to it. Begin at 0 points and add one point for each statement that holds:
- The answer is about what was asked and helps at least a little.
- It covers a good part of what was asked, though perhaps not all.
- It settles the main question, so that the reader can use it as it is.
- It speaks to the reader as an assistant would, is complete, and is well ordered and easy to follow.
- It could hardly be better: expert, exact, to the point, with nothing superfluous.

[Prompt]
{prompt}
[Answer]
{answer}
[End]

You may give reasons briefly. Then write one last line: Score: N, where N is the number of points from 0 to 5."""


class EndpointBlock(Block):
    """An OpenAI-compatible chat service, and how it is asked."""

    url: str = Field(description="its base address, e.g. http://127.0.0.1:8000/v1; /chat/completions is added")
    model: str = Field(min_length=1, description="name of the model that the service is asked for")
    api_key_env: str | None = Field(
        None, min_length=1, description="environment variable that holds the key; the key itself is written nowhere"
    )
    timeout: float = Field(60.0, gt=0, description="seconds that one request may take")
    retries: int = Field(3, ge=0, le=10, description="further tries of a failed request; then its verdict is missing")
    concurrency: int = Field(8, ge=1, le=256, description="requests under way at the same time")
    max_tokens: int = Field(256, ge=1, description="longest reply in tokens")


class PairwiseJudge(EndpointBlock):
    """A service that compares two answers; every two of a prompt's answers are compared, in both orders."""

    kind: Literal["pairwise"] = "pairwise"
    temperature: float = Field(0.0, ge=0, description="of the replies")
    template: str = Field(PAIRWISE, description="what is asked: text with {prompt}, {first} and {second}")
    verdict: str = Field(
        r"Preferred ?= ?(1|2|tie)",
        description="regular expression whose one group is 1, 2 or tie; its last match in the reply counts",
    )
    soft: bool = Field(
        False,
        description="share of 1 against 2 in the reply's token probabilities, mean of both orders, instead of verdicts",
    )


class RubricBlock(Block):
    """An additive rubric of five points (arXiv:2401.10020 fig. 2)."""

    template: str = Field(RUBRIC, description="what is asked: text with {prompt} and {answer}")
    verdict: str = Field(
        r"Score: ?(\d+(?:\.\d+)?)",
        description="regular expression whose one group is a number from 0 to 5; its last match in the reply counts",
    )
    votes: int = Field(3, ge=1, description="judgements per answer, of which the mean is taken")


class RubricJudge(EndpointBlock, RubricBlock):
    """A service that gives every answer points by a rubric."""

    kind: Literal["rubric"] = "rubric"
    temperature: float = Field(0.7, ge=0, description="of the replies; votes differ only above 0")


class SelfRubricJudge(RubricBlock):
    """The policy itself gives every answer points by a rubric: self-rewarding (arXiv:2401.10020)."""

    kind: Literal["self_rubric"] = "self_rubric"
    sampling: SamplingBlock = Field(SamplingBlock(), description="how its judgements are sampled")


Endpoint = PairwiseJudge | RubricJudge
Judge = Annotated[PairwiseJudge | RubricJudge | SelfRubricJudge, Field(discriminator="kind")]

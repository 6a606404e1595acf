"""Sample generations for the same few prompts, at a steady interval: what the model says, not only what it scores."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from rlhf.batch import Rollout
from rlhf.data.examples import Example, Loaded, PromptExample, TokenExample
from rlhf.engine import dist
from rlhf.engine.engine import Engine
from rlhf.errors import StoppedError, UserError
from rlhf.models.tokenizer import decoder
from rlhf.recipe.schema import LogBlock, SamplingBlock
from rlhf.rewards.scorer import Scorer
from rlhf.run.commit import append_jsonl
from rlhf.run.stage import StageDir
from rlhf.train.progress import Progress
from rlhf.train.rollout import Sampler, generate
from rlhf.train.seeding import derive

logger = logging.getLogger("rlhf.samples")


@dataclass(frozen=True)
class SampleWriter:
    """Generates, writes samples.jsonl and shows them. All ranks generate the same: sharded models stay in step."""

    engine: Engine
    prompts: list[PromptExample]
    sampling: SamplingBlock
    sampler: Sampler
    scorer: Scorer | None
    seed: int
    log: LogBlock
    folder: StageDir
    progress: Progress

    def __call__(self, step: int) -> None:
        """Sample once per prompt; the seeds do not depend on the step, so that only the model changes between rows."""
        if not self.prompts:
            return
        seeds = [derive(self.seed, "show", place) for place in range(len(self.prompts))]
        with self.engine.gathered() as policy:
            rollout = dist.agreed(lambda: generate(policy, self.prompts, seeds, self.sampling, self.sampler))
        scores = self.scores(rollout)
        if not dist.is_main():
            return
        for example, answer, score in zip(self.prompts, rollout.texts, scores, strict=True):
            prompt = str(example.fields["prompt"])
            row = {"step": step, "row": example.row, "prompt": prompt, "answer": answer}
            score = None if score is None or math.isnan(score) else score  # an unscored answer has none
            append_jsonl(self.folder.samples, row if score is None else {**row, "score": score})
            if self.log.show_samples:
                self.progress.show_sample(prompt, answer, score)

    def scores(self, rollout: Rollout) -> list[float | None]:
        """What the answers score; a reward that fails here is no reason to lose what was learned."""
        if self.scorer is None:
            return [None] * len(rollout)
        try:
            scores: list[float | None] = self.scorer(rollout).total.tolist()
            return scores
        except StoppedError:
            raise
        except UserError as error:
            logger.warning("samples are shown without scores: %s", error)
            return [None] * len(rollout)


def shown_prompts(log: LogBlock, data: Loaded, tokenizer: PreTrainedTokenizerFast) -> list[PromptExample]:
    """The prompts that are sampled from: of the first held-out rows, else of the first training rows.

    The two answers of a pair that was taken apart have one prompt, which is shown once.
    """
    examples: dict[bytes, PromptExample] = {}
    for example in (data.eval or data.train)[: 2 * log.samples]:
        prompt = as_prompt(example, tokenizer)
        examples.setdefault(prompt.ids.tobytes(), prompt)
    return [example for example in list(examples.values())[: log.samples] if len(example.ids)]


def as_prompt(example: Example, tokenizer: PreTrainedTokenizerFast) -> PromptExample:
    """What stands before the first supervised token, to sample from."""
    if isinstance(example, PromptExample):
        return example
    is_text = isinstance(example, TokenExample)
    ids = example.ids[: int(example.mask.argmax())] if is_text else example.prompt_ids
    return PromptExample(ids, example.row, {"prompt": decoder(tokenizer)(ids.tolist())})

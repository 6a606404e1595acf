"""Scores of a published reward model on the pairs of a recipe, for `rlhf data --reward`."""

from __future__ import annotations

from rlhf.data import collate
from rlhf.data.chat import ChatTemplate
from rlhf.data.examples import load_examples
from rlhf.engine import dist
from rlhf.errors import CheckpointError
from rlhf.models.build import has_score_head, max_positions
from rlhf.models.load import read_config
from rlhf.models.tokenizer import ensure_pad, load_tokenizer
from rlhf.recipe.reward_options import ModelReward
from rlhf.recipe.schema import DataBlock
from rlhf.train import roles
from rlhf.train.job import Job
from rlhf.train.objectives import join, trim
from rlhf.train.parts import dataset
from rlhf.train.pool import Budget


def pair_scores(job: Job, data: DataBlock, source: str) -> dict[int, tuple[float, float]]:
    """Row -> scores of the chosen and the rejected answer, of all pairs that fit, held-out ones too.

    The reward model reads the pairs with its own tokenizer and template. data: the recipe's, without its filter. A pair
    that is longer than the model's positions has no scores.
    """
    config = read_config(source, None)
    if not has_score_head(source, None):
        what = f"expected a reward model, found a model without a score head ({', '.join(config.architectures or [])})"
        raise CheckpointError(what, where=source, fix="Name a stage of rlhf rm, or the folder of a reward model.")
    tokenizer = load_tokenizer(source, None)
    ensure_pad(tokenizer, config)
    ChatTemplate(tokenizer)  # for what it refuses
    room = max_positions(config)
    longest = data.max_length if room is None else min(data.max_length, room)
    loaded = load_examples(data.model_copy(update={"max_length": longest}), tokenizer, "pairs", job.seed)
    dist.start()
    engine = roles.score_engine(job, source, tokenizer, ModelReward(path=source), "model")
    examples = [*loaded.train, *loaded.eval]
    found: dict[int, tuple[float, float]] = {}
    with engine.evaluating():
        for micro in dataset(examples, collate.pairs, tokenizer.pad_token_id).pool().cut(Budget.of(job.recipe)):
            both = trim(join(micro.rows)).to(engine.device)
            sides = [scores.tolist() for scores in engine(both.ids, both.attention).chunk(2)]
            rows = [examples[place].row for place in micro.places]
            found |= {row: (chosen, rejected) for row, chosen, rejected in zip(rows, *sides, strict=True)}
    dist.finish()
    return found

"""The tokenizer of a stage: the model's own, or one trained on the stage's data for a model made from scratch."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from rlhf.data import chat
from rlhf.data.examples import raw_texts
from rlhf.engine import dist
from rlhf.errors import CheckpointError
from rlhf.models.load import read_config
from rlhf.models.tokenizer import ensure_pad, load_tokenizer, train_tokenizer
from rlhf.run import commit
from rlhf.train.job import Job
from rlhf.train.writing import library_writes

logger = logging.getLogger("rlhf.tokenizer")


def stage_tokenizer(job: Job, kind: str) -> PreTrainedTokenizerFast:
    """The tokenizer on every rank. A trained one is kept in the stage folder, so that a resumed stage has it again."""
    if job.recipe.model.init is None:
        return find_tokenizer(job, kind)
    home = job.folder.path / "tokenizer"
    dist.agreed(lambda: _keep(job, kind, home) if dist.is_main() else None)
    return load_tokenizer(str(home), None)


def _keep(job: Job, kind: str, home: Path) -> None:
    """Train it, unless it is there whole. It depends on recipe and data alone: what is damaged is made anew."""
    if home.exists():
        try:
            commit.verify(home, hash_limit=None)
            return
        except CheckpointError as error:
            logger.warning("damaged, made anew: %s", error)
    temporary = commit.fresh_temporary(home)
    with library_writes(temporary, 0):
        find_tokenizer(job, kind).save_pretrained(temporary)
    commit.commit_dir(temporary, home, {})


def check_published(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A published tokenizer reads back with the tokens and the template of the stage's."""
    again = load_tokenizer(str(folder), None)
    for what, hash_of in (("tokens", chat.tokenizer_hash), ("chat template", chat.template_hash)):
        if hash_of(again) != hash_of(tokenizer):
            raise CheckpointError(
                f"expected on disk the {what} of the stage's tokenizer, found others",
                where=str(folder),
                fix="Nothing was published. The last checkpoint is untouched: the same command tries again.",
            )


def find_tokenizer(job: Job, kind: str) -> PreTrainedTokenizerFast:
    """Load or train it, with a chat template and a padding token that ends nothing. Nothing is written."""
    block = job.recipe.model
    config = None
    if block.init is not None:
        tokenizer = train_tokenizer(raw_texts(job.recipe.data, kind), block.init.vocab, None)
    else:
        source = job.source("model", block)
        config = read_config(source, block.revision)  # first: where the hub is out of reach this says so once
        tokenizer = load_tokenizer(source, block.revision)
    template = block.chat_template or (None if tokenizer.chat_template else "plain")
    if template is not None:
        chat.set_template(tokenizer, template)
        logger.info("chat template: %s", template)
    ensure_pad(tokenizer, config)
    return tokenizer

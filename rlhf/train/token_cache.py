"""Tokenised rows of a run directory, kept from one start to the next and shared by its stages and ranks."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import tokenizers
import transformers
from transformers import PreTrainedTokenizerFast

from rlhf import __version__
from rlhf.data import chat
from rlhf.data.columns import StoredExamples, can_store, write_examples
from rlhf.data.examples import Loaded
from rlhf.data.report import DataReport, SourceReport, TokenCounts
from rlhf.engine import dist
from rlhf.errors import UserError
from rlhf.recipe.schema import DataBlock
from rlhf.run import commit

logger = logging.getLogger("rlhf.data")

LEAST_TOKENS = 200_000  # fewer are tokenised again in a second or two, at every start and on every rank
_TRAIN, _EVAL = "train.arrow", "eval.arrow"


def cache_key(
    data: DataBlock, tokenizer: PreTrainedTokenizerFast, kind: str, seed: int, fingerprints: dict[str, str]
) -> str | None:
    """A hash of all that the rows depend on: the files' content, tokenizer and template, the data options, the code.

    fingerprints: of the sources, by recipe key. None where a source is a hub id: its content may change unseen.
    """
    if any(found.startswith("hub:") for found in fingerprints.values()):
        return None
    code = [__version__, transformers.__version__, tokenizers.__version__]
    read_by = [chat.tokenizer_hash(tokenizer), chat.template_hash(tokenizer)]
    parts = [code, read_by, kind, seed, data.model_dump(mode="json", by_alias=True), fingerprints]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def cached_examples(folder: Path, key: str | None, load: Callable[[], Loaded]) -> Loaded:
    """`load()` once per key, on rank 0; afterwards, and on the other ranks, its rows come from a mapped file.

    Small data and prompts are not kept. What is damaged is made anew: no file is used whose hash is not the manifest's.
    Every rank must call it.
    """
    if key is None:
        return load()
    path = folder / f"tokens-{key}"
    if not dist.from_main(_is_sound(path) if dist.is_main() else None):
        data = dist.agreed(lambda: load() if dist.is_main() else None)
        if not dist.from_main(_keep(path, data) if data is not None else None):
            return data if data is not None else load()
    else:
        logger.info("tokenised rows read from %s", path)
    return _read(path)


def _is_sound(path: Path) -> bool:
    """Whether there is a whole folder; one that is damaged is replaced by what is made anew."""
    if not path.exists():
        return False
    try:
        commit.verify(path, hash_limit=None)
        return True
    except UserError as error:
        logger.warning("damaged, made anew: %s", error)
        return False


def _keep(path: Path, data: Loaded) -> bool:
    """Write the rows where that pays. Without room for them a stage does without."""
    parts = {name: rows for name, rows in ((_TRAIN, data.train), (_EVAL, data.eval)) if rows}
    tokens = data.report.train.tokens + data.report.eval.tokens
    if tokens < LEAST_TOKENS or not all(can_store(rows) for rows in parts.values()):
        return False
    try:
        temporary = commit.fresh_temporary(path)
        for name, rows in parts.items():
            write_examples(temporary / name, rows)
        commit.commit_dir(temporary, path, {"report": data.report.as_dict()})
    except (OSError, UserError) as error:
        logger.warning("tokenised rows are not kept for the next start: %s", error)
        return False
    logger.info("tokenised rows kept in %s", path)
    return True


def _read(path: Path) -> Loaded:
    """The rows and the report of a folder that `_keep` wrote."""
    manifest = commit.read_json(path / commit.MANIFEST)
    report = manifest["report"]
    sources = [
        SourceReport(**{**each, "dropped": Counter(each["dropped"]), "changed": Counter(each["changed"])})
        for each in report["sources"]
    ]
    counts = [TokenCounts(**report[part]) for part in ("train", "eval")]
    train, held_out = (StoredExamples(path / name) if name in manifest["files"] else [] for name in (_TRAIN, _EVAL))
    return Loaded(train, held_out, DataReport(sources, *counts))

"""Published stages of tiny random models, made without training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from rlhf.data.chat import set_template
from rlhf.data.demo import demo_rows
from rlhf.models.build import Setup, build_policy, build_scorer
from rlhf.models.export import save_policy, save_scorer
from rlhf.models.forward import PolicyModule, ScorerModule
from rlhf.models.tokenizer import train_tokenizer
from rlhf.recipe.schema import InitBlock
from rlhf.run.rundir import RunDir
from rlhf.run.stage import StageDir


@pytest.fixture(scope="session")
def publish() -> Callable[..., StageDir]:
    """publish(run, name, command, seed) makes a finished stage; "rm" publishes a reward model, the others a policy.

    recipe, parents: recorded as what the stage was made from. texts: of the tokenizer.
    """
    init = InitBlock(hidden=16, layers=1, heads=2, vocab=500, context=128)
    own = [row["prompt"] + row["completion"] for row in demo_rows("sft")[:300]]

    @functools.cache
    def tokenizer_of(texts: tuple[str, ...]) -> PreTrainedTokenizerFast:
        tokenizer = train_tokenizer(texts, 500, None)
        set_template(tokenizer, "plain")
        return tokenizer

    def make(
        run: Path,
        name: str,
        command: str,
        seed: int,
        *,
        recipe: dict[str, Any] | None = None,
        parents: dict[str, str] | None = None,
        texts: tuple[str, ...] = tuple(own),
    ) -> StageDir:
        torch.set_num_threads(1)
        tokenizer = tokenizer_of(texts)
        setup = Setup("fp32", "sdpa", None, gradient_checkpointing=False, dropout=False, trained=False, seed=seed)
        stage = RunDir(run).stage(name)
        is_reward = command == "rm"
        recipe = {"seed": seed, "sampling": {"temperature": 0.9}, **(recipe or {})}
        with stage.open({"stage": command, "recipe": recipe, "parents": parents or {}}):
            if is_reward:
                scorer = ScorerModule(build_scorer(init, tokenizer, setup, head="new"))
                save_scorer(scorer, tokenizer, stage.export_dir("model"))
            else:
                policy = PolicyModule(build_policy(init, tokenizer, setup))
                save_policy(policy, tokenizer, stage.export_dir("model"))
            facts = {"stop_ids": [tokenizer.eos_token_id], "pad_id": tokenizer.pad_token_id}
            stage.publish("reward" if is_reward else "policy", facts, 1)
        return stage

    return make

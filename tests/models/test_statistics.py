"""Published statistics of scores: written, read, refused, taken out, and without any effect on the scores."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from rlhf.errors import CheckpointError
from rlhf.models.build import Setup, build_scorer
from rlhf.models.export import save_scorer
from rlhf.models.forward import ScorerModule
from rlhf.models.statistics import ScoreStatistics, read_statistics, set_statistics


@pytest.fixture
def folder(tiny, tokenizer, tmp_path):
    module = ScorerModule(tiny("llama", scorer=True, vocab_size=len(tokenizer)))
    save_scorer(module, tokenizer, tmp_path / "without")
    set_statistics(module.core.config, ScoreStatistics(-1.5, 0.25))
    save_scorer(module, tokenizer, tmp_path / "with")
    return tmp_path


def test_published_statistics_can_be_read_and_change_no_score(folder, ragged):
    config = json.loads((folder / "with" / "config.json").read_text())
    assert (config["score_mean"], config["score_std"]) == (-1.5, 0.25)
    assert read_statistics(str(folder / "with"), None, "rewards.0.statistics") == ScoreStatistics(-1.5, 0.25)
    ids, attention = ragged[1]("right")
    plain, described = (
        AutoModelForSequenceClassification.from_pretrained(folder / name)(ids, attention_mask=attention).logits
        for name in ("without", "with")
    )
    assert torch.equal(plain, described) and plain.std() > 0


def test_a_model_that_is_trained_further_loses_them(folder, tokenizer):
    frozen = Setup.frozen("fp32", "sdpa")
    source = str(folder / "with")
    assert build_scorer(source, tokenizer, frozen, head="keep").config.score_mean == -1.5
    trained = build_scorer(source, tokenizer, replace(frozen, trained=True), head="keep")
    assert not hasattr(trained.config, "score_mean") and not hasattr(trained.config, "score_std")
    assert "score_mean" not in trained.config.to_dict()


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({}, "found none"),
        ({"score_mean": 1.0}, "found 1.0 and None"),
        ({"score_mean": 1.0, "score_std": 0.0}, "found 1.0 and 0.0"),
        ({"score_mean": 1.0, "score_std": -1.0}, "found 1.0 and -1.0"),
        ({"score_mean": "1", "score_std": 1.0}, "found 1 and 1.0"),
        ({"score_mean": math.nan, "score_std": 1.0}, "found nan and 1.0"),
        ({"score_mean": True, "score_std": True}, "found True and True"),
    ],
)
def test_a_model_without_them_is_refused_by_key_and_folder(folder, values, found):
    source = str(folder / "without")
    config = AutoConfig.from_pretrained(source)
    for name, value in values.items():
        setattr(config, name, value)
    config.save_pretrained(source)
    with pytest.raises(CheckpointError, match=found) as caught:
        read_statistics(source, None, "rewards.0.statistics")
    text = str(caught.value)
    assert text.startswith("rewards.0.statistics: ") and source in text and "rlhf rm" in text


def test_an_adapter_does_not_have_its_bases(folder, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    facts = {"peft_type": "LORA", "base_model_name_or_path": str(folder / "with"), "modules_to_save": ["score"]}
    (adapter / "adapter_config.json").write_text(json.dumps(facts))
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="found none"):
        read_statistics(str(adapter), None, "rewards.0.statistics")

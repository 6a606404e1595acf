"""`rlhf merge` through the command line: full models, adapters, tied weights, pipelines, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.algo.merging import linear

pytestmark = pytest.mark.pipeline
WEIGHTS = "model.safetensors"
METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "ties": {"density": 0.4, "scale": 1.5},
    "dare": {"density": 0.5, "seed": 3},
    "slerp": {},
}


@pytest.fixture(scope="module")
def models(cli, tiny):
    """Two policies from `sft`: one trained in full, one with an adapter."""
    done = cli(*tiny.command("sft", "--name", "more", "--set", "model={from: sft}", "--set", "train.seed=1"))
    assert done.code == 0, done.err
    adapter = ["--set", "model.lora={rank: 4, target: [q_proj, v_proj]}", "--set", "train.lr=1e-2"]
    done = cli(*tiny.command("dpo", "--name", "adapted", *adapter))
    assert done.code == 0, done.err
    return tiny


def recipe(run, name: str, **changes: Any) -> list[str | Path]:
    """The words of a command with a recipe of its own."""
    values = {
        "base": {"from": "sft"},
        "models": [{"from": "more", "weight": 0.5}, {"from": "adapted", "weight": 0.5}],
        **changes,
    }
    file = run.recipes / f"merge-{name}.yaml"
    file.write_text(yaml.safe_dump(values))
    return ["merge", file, "--run", run.root, "--name", name]


def weights(run, name: str) -> dict[str, torch.Tensor]:
    return load_file(run.root / name / "model" / WEIGHTS)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_publishes_a_policy_between_the_models(cli, models, method):
    command = recipe(models, f"merged-{method}", method={"name": method, **METHODS[method]})
    done = cli(*command)
    assert done.code == 0, done.err
    folder = models.root / f"merged-{method}"
    assert done.out.splitlines() == [f"merge finished: {folder}/model", f"next: rlhf report {models.root}"]
    base, more, adapted, found = (weights(models, name) for name in ("sft", "more", "adapted", f"merged-{method}"))
    assert found.keys() == base.keys() and "lm_head.weight" not in found, "tied embeddings are one tensor"
    for name, value in found.items():
        assert value.dtype == torch.float32 and value.isfinite().all()
        reached = 2 * torch.maximum((more[name] - base[name]).abs(), (adapted[name] - base[name]).abs())
        assert ((value - base[name]).abs() <= reached + 1e-6).all(), name
    assert any(not value.equal(base[name]) for name, value in found.items())
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(models.root / "sft" / "model").chat_template
    assert model(**tokenizer("the plot was", return_tensors="pt")).logits.isfinite().all()


def test_linear_is_the_average_of_the_published_weights(cli, models):
    """That of the adapter in full: its matrices are not averaged."""
    done = cli(*recipe(models, "average"))
    assert done.code == 0, done.err
    more, adapted, found = (weights(models, name) for name in ("more", "adapted", "average"))
    for name, value in found.items():
        torch.testing.assert_close(value, (more[name] + adapted[name]) / 2, atol=1e-6, rtol=0)


def test_all_weight_on_one_model_gives_its_bytes(cli, models):
    sources = [{"from": "more", "weight": 1}, {"from": "adapted", "weight": 0}]
    done = cli(*recipe(models, "one", models=sources, method={"name": "slerp"}))
    assert done.code == 0, done.err
    more, found = weights(models, "more"), weights(models, "one")
    for name, value in found.items():
        torch.testing.assert_close(value, more[name], atol=1e-7, rtol=0)


def test_an_adapter_folder_counts_as_its_base_with_the_update(cli, models, tmp_path):
    """The peft folder beside a published policy, named by path, is what the stage published."""
    folder = tmp_path / "adapter"
    shutil.copytree(models.root / "adapted" / "model" / "adapter", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(models.root / "sft" / "model")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    sources = [{"from": "more", "weight": 0.5}, {"path": str(folder), "weight": 0.5}]
    for name, changes in (("by-stage", {}), ("by-path", {"models": sources})):
        done = cli(*recipe(models, name, method={"name": "ties", "density": 0.3}, **changes))
        assert done.code == 0, done.err
    one, two = weights(models, "by-stage"), weights(models, "by-path")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-6, rtol=0)


def test_weights_in_bf16(cli, models):
    done = cli(*recipe(models, "narrow", dtype="bf16"))
    assert done.code == 0, done.err
    base, more, adapted, found = (weights(models, name) for name in ("sft", "more", "adapted", "narrow"))
    for name, value in found.items():
        whole = linear(base[name], torch.stack([more[name], adapted[name]]), torch.tensor([0.5, 0.5]))
        assert value.equal(whole.bfloat16()), "rounded once, at the end"


def test_draws_are_the_seeds(cli, models):
    for name, seed in (("drawn-1", 1), ("drawn-1-again", 1), ("drawn-2", 2)):
        done = cli(*recipe(models, name, method={"name": "dare", "density": 0.5, "seed": seed}))
        assert done.code == 0, done.err
    one, again, two = (weights(models, name) for name in ("drawn-1", "drawn-1-again", "drawn-2"))
    assert all(value.equal(again[name]) for name, value in one.items())
    assert not all(value.equal(two[name]) for name, value in one.items())
    base, layers = weights(models, "sft"), [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    kept = [one[name] != base[name] for name in layers]
    assert not kept[0].equal(kept[1]), "tensors of one shape are drawn apart"


# --- what a stage promises --------------------------------------------------------------------------------------------


def test_what_it_was_made_from_is_on_record(cli, cold_cli, models):
    command = recipe(models, "recorded", method={"name": "ties"})
    done = cli(*command)
    assert done.code == 0, done.err
    folder = models.root / "recorded"
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    facts = manifest["facts"]
    assert manifest["kind"] == "policy" and facts["base"] == "sft" and facts["lora"] is False
    for name in ("tokenizer_hash", "template_hash", "stop_ids", "pad_id"):
        assert facts[name] == json.loads((models.root / "sft" / "MANIFEST.json").read_text())["facts"][name]
    base, more = weights(models, "sft"), weights(models, "more")
    changes = {key: change["norm"] for key, change in facts["changes"].items()}
    expected = sum(float((more[name] - base[name]).double().square().sum()) for name in base) ** 0.5
    assert changes.keys() == {"models.0", "models.1", "merged"}
    assert changes["models.0"] == pytest.approx(expected, rel=1e-6)
    assert facts["changes"]["models.0"]["changed"] > 0.9
    assert 0.05 < facts["changes"]["models.1"]["changed"] < 0.4, "an adapter on two projections"
    assert 0.1 < facts["changes"]["merged"]["changed"] < 0.41, "no more than the two densities"
    provenance = json.loads((folder / "provenance.json").read_text())
    assert [parent["stage"] for parent in provenance["parents"]] == ["sft", "more", "adapted"]
    again = cold_cli(*command)
    assert again.code == 0 and not again.torch and "merge was finished before" in again.out
    changed = cold_cli(*command, "--set", "method.density=0.5")
    assert changed.code == 2 and "method.density: 0.2 before, 0.5 now" in changed.err
    status = {stage["name"]: stage for stage in json.loads(cold_cli("status", models.root, "--json").out)}
    assert status["recorded"]["kind"] == "policy" and status["recorded"]["state"] == "finished"
    report = cli("report", models.root)
    assert report.code == 0, report.err


def test_sft_under_an_l1_penalty_leaves_weights_as_they_were(cli, models):
    """Which makes for a sparse change to merge; without the penalty nearly every weight moves."""
    done = cli(*models.command("sft", "--name", "sparse", "--set", "model={from: sft}", "--set", "train.l1=0.9"))
    assert done.code == 0, done.err
    base, more, sparse = (weights(models, name) for name in ("sft", "more", "sparse"))
    unchanged = [sum(int((found[name] == base[name]).sum()) for name in base) for found in (more, sparse)]
    total = sum(value.numel() for value in base.values())
    assert unchanged[0] < 0.05 * total < 0.2 * total < unchanged[1] < total


def test_a_merged_policy_is_trained_on(cli, models):
    done = cli(*recipe(models, "start"))
    assert done.code == 0, done.err
    done = cli(*models.command("dpo", "--name", "after-merge", "--set", "model.from=start"))
    assert done.code == 0, done.err


def test_a_dry_run_says_what_is_added(cold_cli, models):
    before = models.files()
    done = cold_cli(*recipe(models, "dry"), "--dry-run")
    assert done.code == 0 and not done.torch and models.files() == before
    assert yaml.safe_load(done.out)["method"] == {"name": "linear"}
    assert done.out.splitlines()[-1].startswith("# linear: 0.5 x more + 0.5 x adapted, each less sft")


def test_in_a_pipeline_devices_go_to_the_other_stages(cold_cli, models):
    recipe(models, "piped")
    steps = [
        {"stage": "dpo", "recipe": "dpo.yaml", "name": "adapted-too"},
        {"stage": "merge", "recipe": "merge-piped.yaml", "name": "piped"},
    ]
    file = models.recipes / "paft.yaml"
    file.write_text(yaml.safe_dump({"stages": steps}))
    done = cold_cli("run", file, "--run", models.root, "--gpus", "2", "--dry-run")
    assert done.code == 0 and "of 2 devices" in done.out and "# linear: " in done.out, done.err


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "code", "text"),
    [
        ("models=[]", 2, "models: expected a list of blocks of options, at least 1, found []"),
        ("models.0.weight=-1", 2, "models.0.weight: expected a number >= 0, found -1"),
        ("models=[{from: more}]", 2, "models.0.weight: expected a number >= 0, found nothing"),
        ("method.name=tie", 2, "did you mean ties?"),
        ("method={name: ties, density: 0}", 2, "method.density: expected a number > 0 and <= 1, found 0"),
        ("data.path=x", 2, "data: expected a known key"),
        ("base.from=rm", 4, "base.from: expected a policy, found a reward model"),
        ("models.1.from=rm", 4, "models.1.from: expected a policy, found a reward model"),
        ("models.1.from=none", 4, "models.1.from: expected a finished stage with a policy, found no folder"),
        ("models.1={path: /no/such/model, weight: 1}", 4, "/no/such/model: expected a model folder, found nothing"),
    ],
)
def test_refusals_without_torch(cold_cli, models, option, code, text):
    before = models.files()
    done = cold_cli(*recipe(models, "refused"), "--set", option)
    assert done.code == code and text in done.err and not done.torch, done.err
    assert models.files() == before


def test_devices_are_refused(cold_cli, models):
    done = cold_cli(*recipe(models, "refused"), "--gpus", "2")
    assert done.code == 2 and "expected one process, found 2" in done.err and "--gpus" in done.err


@pytest.fixture
def copy(models, tmp_path):
    """A plain folder with the weights of `more`, to be broken."""
    folder = tmp_path / "copy"
    shutil.copytree(models.root / "more" / "model", folder)
    return folder


def refused(cli, models, copy: Path) -> str:
    sources = [{"from": "adapted", "weight": 0.5}, {"path": str(copy), "weight": 0.5}]
    done = cli(*recipe(models, "broken", models=sources), "--restart")
    assert done.code == 4 and not (models.root / "broken" / "MANIFEST.json").exists(), done.err
    return done.err


def test_another_architecture_is_named(cli, models, copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    text = refused(cli, models, copy)
    assert "models.1.path: expected the base's architecture, num_hidden_layers 2, found 1 in" in text


def test_another_tokenizer_is_named(cli, models, copy):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.add_tokens(["unheard"])
    tokenizer.save(str(copy / "tokenizer.json"))
    assert "models.1.path: expected the base's tokenizer, found another one in" in refused(cli, models, copy)


def test_another_chat_template_is_named(cli, models, copy):
    (copy / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}<|eos|>")
    assert "models.1.path: expected the chat template of models.0, found another one" in refused(cli, models, copy)


def test_a_missing_tensor_is_named(cli, models, copy):
    tensors = load_file(copy / WEIGHTS)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
    assert "found no model.layers.1.mlp.up_proj.weight" in refused(cli, models, copy)


def test_a_tensor_of_another_shape_is_named(cli, models, copy):
    tensors = load_file(copy / WEIGHTS)
    tensors["model.norm.weight"] = torch.ones(16)
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
    text = refused(cli, models, copy)
    assert "models.1: expected model.norm.weight of the base's shape (32,), found (16,)" in text


def test_weights_that_are_not_finite_are_named(cli, models, copy):
    tensors = load_file(copy / WEIGHTS)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
    assert "models.1: expected finite weights, found NaN or infinity in model.norm.weight" in refused(cli, models, copy)


def test_a_scorer_in_a_folder_is_named(cli, models):
    path = str(models.root / "rm" / "model")
    done = cli(*recipe(models, "broken", models=[{"path": path, "weight": 1}]), "--restart")
    assert done.code == 4 and "models.0.path: expected a policy, found a model with a score head" in done.err

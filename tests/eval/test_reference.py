"""What a policy was trained against, read off its provenance: every way to name it, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf.algo.preference import PREFERENCE_LOSSES
from rlhf.errors import CheckpointError, RecipeError
from rlhf.eval.reference import Reference, Scale, scale_of, trained_against
from rlhf.recipe.stages import GRPORecipe, PreferenceRecipe, SFTRecipe
from rlhf.run.lineage import Parent, content_hash
from rlhf.run.rundir import RunDir

DATA = {"path": "demo:pairs", "max_length": 96}


def preference(**changes: Any) -> dict[str, Any]:
    """A recipe as a stage records it."""
    return plain(PreferenceRecipe, {"model": {"from": "sft"}, "data": DATA, **changes})


def plain(kind: Any, recipe: dict[str, Any]) -> dict[str, Any]:
    return kind.model_validate(recipe).model_dump(mode="json", by_alias=True)


def parent(run: Path, name: str) -> Parent:
    stage = RunDir(run).stage(name)
    manifest = stage.read_manifest()
    return Parent(stage.path, manifest, content_hash(manifest))


@pytest.fixture
def run(publish, tmp_path) -> Path:
    publish(tmp_path, "sft", "sft", 0, recipe=plain(SFTRecipe, {"model": {"init": {}}, "data": {"path": "demo:sft"}}))
    publish(tmp_path, "old", "sft", 1)
    return tmp_path


def trained(publish, run: Path, recipe: dict[str, Any], command: str = "dpo", **parents: str) -> Parent:
    publish(run, "policy", command, 2, recipe=recipe, parents=parents)
    return parent(run, "policy")


def test_without_a_reference_of_its_own_it_is_the_model(publish, run):
    policy = trained(publish, run, preference(), model=parent(run, "sft").content_hash)
    assert trained_against(policy) == Reference(str(run / "sft" / "model"), None, "sft")
    assert scale_of(policy, None) == Scale(0.1, is_average=False)
    assert scale_of(policy, 2.0) == Scale(2.0, is_average=False)


def test_a_reference_of_its_own_comes_first(publish, run):
    hashes = {key: parent(run, name).content_hash for key, name in (("model", "sft"), ("reference", "old"))}
    policy = trained(publish, run, preference(reference={"from": "old"}), **hashes)
    assert trained_against(policy).name == "old"


def test_a_reference_from_the_hub(publish, run):
    policy = trained(publish, run, preference(reference={"path": "owner/name", "revision": "abc"}))
    assert trained_against(policy) == Reference("owner/name", "abc", "owner/name")
    assert trained_against(trained_again(publish, run, {"path": "~/models/x"})).source == str(Path.home() / "models/x")


def trained_again(publish, run: Path, reference: dict[str, str]) -> Parent:
    publish(run, "again", "dpo", 2, recipe=preference(reference=reference))
    return parent(run, "again")


def test_a_reference_that_was_made_again_is_refused(publish, run):
    policy = trained(publish, run, preference(), model=parent(run, "old").content_hash)
    with pytest.raises(CheckpointError, match="made again since"):
        trained_against(policy)


def test_a_reference_that_was_never_published_is_refused(publish, run):
    policy = trained(publish, run, preference(model={"init": {}}))
    with pytest.raises(CheckpointError, match="made from scratch"):
        trained_against(policy)


def test_sft_has_no_reference(run):
    for read in (trained_against, lambda policy: scale_of(policy, None)):
        with pytest.raises(RecipeError, match="made by rlhf sft") as error:
            read(parent(run, "sft"))
        assert "--reference STAGE --beta NUMBER" in error.value.fix
    assert scale_of(parent(run, "sft"), 0.3).beta == 0.3


def test_an_on_policy_stage_has_a_reference_and_needs_a_beta(publish, run):
    recipe = plain(GRPORecipe, {"model": {"from": "sft"}, "data": {"path": "demo:prompts"}})
    policy = trained(publish, run, recipe, "grpo", model=parent(run, "sft").content_hash)
    assert trained_against(policy).name == "sft"
    with pytest.raises(RecipeError, match="found one made by rlhf grpo"):
        scale_of(policy, None)


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_beta_is_a_positive_number(run, beta):
    with pytest.raises(RecipeError, match="above 0"):
        scale_of(parent(run, "sft"), beta)


@pytest.mark.parametrize("name", PREFERENCE_LOSSES.names())
def test_every_preference_loss_says_how_its_reward_is_read(publish, run, name):
    entry = PREFERENCE_LOSSES[name]
    recipe = preference(loss={"name": name})
    policy = trained(publish, run, recipe, model=parent(run, "sft").content_hash)
    scale = scale_of(policy, None)
    assert scale.is_average == entry.traits.average
    assert scale.beta == (1.0 if entry.traits.scale is None else recipe["loss"][entry.traits.scale])
    if entry.traits.reference:
        assert trained_against(policy).name == "sft"
    else:
        with pytest.raises(RecipeError, match=f"with the loss {name}"):
            trained_against(policy)

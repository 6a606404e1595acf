"""What a published policy was trained against, and how strongly it was held to it: read off its provenance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.algo.preference import PREFERENCE_LOSSES
from rlhf.errors import CheckpointError, RecipeError
from rlhf.run.commit import read_json
from rlhf.run.lineage import PROVENANCE, Parent
from rlhf.run.rundir import RunDir, resolve_parent

COMMAND = "rlhf eval implicit-reward"
_SAY = "say what to compare with: --reference STAGE --beta NUMBER"


@dataclass(frozen=True)
class Reference:
    """A reference policy: a folder or hub id, and what to call it."""

    source: str
    revision: str | None
    name: str


@dataclass(frozen=True)
class Scale:
    """What turns log-ratios into rewards."""

    beta: float
    is_average: bool  # the loss takes the mean over tokens, not the sum, for the log-odds of a preference


def trained_against(policy: Parent) -> Reference:
    """The reference of a stage's own recipe, unchanged since."""
    inputs = read_json(policy.path / PROVENANCE)["inputs"]
    recipe = inputs["recipe"]
    if "reference" not in recipe or not _compares(inputs):
        raise RecipeError(
            f"expected a stage that was trained against a reference, found {policy.path}, made by {_maker(inputs)}",
            where=f"{COMMAND}: --policy",
            fix=f"Name a dpo stage whose loss has a reference, or {_SAY}",
        )
    key = "reference" if recipe["reference"]["from"] or recipe["reference"]["path"] else "model"
    named = recipe[key]
    where = f"{policy.path / 'resolved.yaml'}: {key}"
    if named["from"]:
        parent = resolve_parent(named["from"], RunDir(policy.path.parent), ("policy",), f"{key}.from", where)
        if parent.content_hash != inputs["parents"][key]:
            raise CheckpointError(
                f"expected the reference that {policy.path} was trained against, found {parent.path} made again since",
                where=where,
                fix=f"Train {policy.name} again, or name the old reference: --reference STAGE",
            )
        return Reference(str(parent.model), None, parent.name)
    if named["path"]:
        return Reference(str(Path(named["path"]).expanduser()), named["revision"], named["path"])
    raise CheckpointError(
        "expected a reference that was published, found a model made from scratch",
        where=where,
        fix="Train against a published policy, or name one: --reference STAGE",
    )


def scale_of(policy: Parent, beta: float | None) -> Scale:
    """`beta` if it is given, else the one of the preference loss that the policy was trained with."""
    if beta is not None and not beta > 0:
        raise RecipeError(f"expected a number above 0, found {beta:g}", where=f"{COMMAND}: --beta")
    inputs = read_json(policy.path / PROVENANCE)["inputs"]
    if inputs["stage"] != "dpo":
        if beta is None:
            raise RecipeError(
                f"expected a policy of a preference loss, which has a beta, found one made by {_maker(inputs)}",
                where=f"{COMMAND}: --policy",
                fix=f"Name a dpo stage, or {_SAY}",
            )
        return Scale(beta, is_average=False)
    loss = inputs["recipe"]["loss"]
    traits = PREFERENCE_LOSSES[loss["name"]].traits
    if beta is None:
        beta = 1.0 if traits.scale is None else float(loss[traits.scale])
    return Scale(beta, traits.average)


def _compares(inputs: dict[str, Any]) -> bool:
    """Whether the loss has a reference; on-policy stages always have one."""
    return inputs["stage"] != "dpo" or PREFERENCE_LOSSES[inputs["recipe"]["loss"]["name"]].traits.reference


def _maker(inputs: dict[str, Any]) -> str:
    loss = f" with the loss {inputs['recipe']['loss']['name']}" if inputs["stage"] == "dpo" else ""
    return f"rlhf {inputs['stage']}{loss}"

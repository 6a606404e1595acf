"""Which base the roles of a stage have in common, and with which adapter each stands on it.

Models are told apart by content where stages made them, else by their folder or hub id. A model can stand in two ways:
as a base of its own, or as an adapter on the model that its training started from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import CheckpointError
from rlhf.models.build import has_score_head
from rlhf.models.folder import ADAPTER_CONFIG, is_adapter, read_adapter
from rlhf.models.shared import CRITIC, POLICY, REFERENCE, Role
from rlhf.recipe.reward_options import ModelReward
from rlhf.recipe.schema import ModelRef
from rlhf.recipe.stages import OnlineRecipe, PPORecipe
from rlhf.run import commit
from rlhf.run.lineage import Parent, content_hash, recorded_parents
from rlhf.run.stage import PARTS
from rlhf.train.job import Job, local_path


@dataclass(frozen=True)
class Stand:
    """A model as an adapter on a base, or (adapter None) as the base itself."""

    base: frozenset[str]  # the base's identities
    adapter: str | None


@dataclass(frozen=True)
class Layout:
    """The base to load, every role on it, and what the manifest says of the base."""

    source: str
    revision: str | None
    roles: dict[str, Role]
    base: dict[str, str | None]


def role_name(key: str) -> str:
    """The role of a reward's recipe key: rewards.0 -> rewards_0."""
    return key.replace(".", "_")


def plan(job: Job) -> Layout:
    """The layout that all roles allow: on the policy's start itself, else on the base that its adapter stands on."""
    recipe = job.recipe
    assert isinstance(recipe, OnlineRecipe)
    refs: dict[str, ModelRef] = {"model": recipe.model}
    if isinstance(recipe, PPORecipe):
        refs["critic"] = recipe.critic
    refs |= {f"rewards.{i}": reward for i, reward in enumerate(recipe.rewards) if isinstance(reward, ModelReward)}
    possible = {key: list(stands(job, key, ref)) for key, ref in refs.items()}
    for policy in possible["model"]:
        found = {key: _on(policy.base, choices) for key, choices in possible.items()}
        if None not in found.values():
            return _layout(job, policy, {key: stand for key, stand in found.items() if stand is not None}, refs)
    raise _no_common_base(job, refs, possible)


def stands(job: Job, key: str, ref: ModelRef) -> Iterator[Stand]:
    """How the model of a recipe key can stand. A scorer is not a base: its head, and often its base, have moved."""
    source = job.source(key, ref)
    if not has_score_head(source, ref.revision):
        yield Stand(frozenset(_identities(job, key, ref)), None)
    folder = source if is_adapter(source) else str(Path(source) / "adapter")
    if (Path(folder) / ADAPTER_CONFIG).is_file():
        fact = _recorded_base(job.parents[key]) if key in job.parents else None
        if fact is None:
            adapter = read_adapter(folder)
            revision = adapter["revision"] if "revision" in adapter else None
            fact = {"path": adapter["base_model_name_or_path"], "revision": revision}
        yield Stand(frozenset({_identity(fact)}), folder)


def adapter_base(job: Job) -> dict[str, str | None] | None:
    """What the adapter that a stage publishes stands on: {content_hash} of a stage, or {path, revision}."""
    recipe = job.recipe
    if recipe.model.lora is None or recipe.model.init is not None:
        return None
    if isinstance(recipe, OnlineRecipe) and recipe.share_base:
        return plan(job).base
    return _own_base(job)


# --- identities -------------------------------------------------------------------------------------------------------


def _identities(job: Job, key: str, ref: ModelRef) -> set[str]:
    if key not in job.parents:
        return {_identity({"path": ref.path, "revision": ref.revision})}
    parent = job.parents[key]
    return {
        _identity({"content_hash": parent.content_hash}),
        _identity({"path": str(parent.model), "revision": None}),
    }


def _identity(base: dict[str, Any]) -> str:
    if "content_hash" in base:
        return f"content {base['content_hash']}"
    path = local_path(base["path"])
    return f"folder {Path(path).resolve()}" if Path(path).exists() else f"hub {path} {base['revision']}"


def _own_base(job: Job) -> dict[str, str | None]:
    """The policy's start as the manifest's fact."""
    if "model" in job.parents:
        return {"content_hash": job.parents["model"].content_hash}
    model = job.recipe.model
    assert model.path is not None
    path = local_path(model.path)
    return {"path": str(Path(path).resolve()) if Path(path).exists() else path, "revision": model.revision}


def _recorded_base(parent: Parent) -> dict[str, str | None] | None:
    facts = parent.manifest["facts"]
    return facts["adapter_base"] if "adapter_base" in facts else None


# --- the choice -------------------------------------------------------------------------------------------------------


def _on(base: frozenset[str], choices: list[Stand]) -> Stand | None:
    return next((stand for stand in choices if stand.base & base), None)


def _layout(job: Job, policy: Stand, found: dict[str, Stand], refs: dict[str, ModelRef]) -> Layout:
    roles = {POLICY: Role(policy.adapter, trained=True)}
    if policy.adapter is not None:
        roles[REFERENCE] = Role(policy.adapter)
    for key, stand in found.items():
        if key == "critic":
            keep = has_score_head(job.source(key, refs[key]), refs[key].revision)
            roles[CRITIC] = Role(stand.adapter, "keep" if keep else "new", trained=True)
        elif key != "model":
            roles[role_name(key)] = Role(stand.adapter, "keep")
    if policy.adapter is None:
        return Layout(job.source("model", job.recipe.model), job.recipe.model.revision, roles, _own_base(job))
    fact = _recorded_base(job.parents["model"]) if "model" in job.parents else None
    adapter = read_adapter(policy.adapter)
    if fact is None:
        revision = adapter["revision"] if "revision" in adapter else None
        fact = {"path": adapter["base_model_name_or_path"], "revision": revision}
    if "content_hash" in fact:
        return Layout(str(_stage_of(job.parents["model"], fact["content_hash"])), None, roles, fact)
    assert fact["path"] is not None
    return Layout(local_path(fact["path"]), fact["revision"], roles, fact)


def _stage_of(child: Parent, wanted: str | None) -> Path:
    """The model folder of the stage with this content, which a stage was made from."""
    for parent in recorded_parents(child.path):
        folder = child.path.parent / parent["path"]  # an absolute path stays itself
        if parent["content_hash"] == wanted and (folder / commit.MANIFEST).is_file():
            if content_hash(commit.verify(folder, parts=PARTS)) == wanted:
                return folder / "model"
    raise CheckpointError(
        f"expected the stage that {child.path} was made from, found it gone or made again",
        where="share_base",
        fix="Restore that stage, or remove share_base.",
    )


def _no_common_base(job: Job, refs: dict[str, ModelRef], possible: dict[str, list[Stand]]) -> CheckpointError:
    def told(key: str) -> str:
        name = job.source(key, refs[key])
        if not possible[key]:
            return f"{key} ({name}): a whole scorer, trained in full"
        return f"{key} ({name}): " + " or ".join(
            "its own weights" if stand.adapter is None else f"an adapter on {_spoken(job, stand)}"
            for stand in possible[key]
        )

    lines = "\n    ".join(told(key) for key in possible)
    start = job.recipe.model.from_ or job.recipe.model.path
    source = "from" if job.recipe.model.from_ else "path"
    return CheckpointError(
        f"expected one base under all roles, found\n    {lines}",
        where="share_base",
        fix=f"Train every scorer with model: {{{source}: {start}, lora: {{}}}}, on the weights that the policy starts"
        " from; or remove share_base.",
    )


def _spoken(job: Job, stand: Stand) -> str:
    """A base in words: the stage of this recipe that it is, or its folder or hub id."""
    (identity,) = stand.base
    kind, _, rest = identity.partition(" ")
    if kind != "content":
        return rest.removesuffix(" None")
    names = [str(parent.path) for parent in job.parents.values() if parent.content_hash == rest]
    return names[0] if names else f"a stage that is not part of this recipe ({rest[:12]})"

"""One base under several roles, in one process: who answers, whose parameters are whose, what is published."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf.errors import CheckpointError
from rlhf.models.build import Setup, build_policy, build_scorer
from rlhf.models.export import save_policy, save_scorer
from rlhf.models.forward import PolicyModule, ScorerModule
from rlhf.models.head import Extras
from rlhf.models.shared import Role, SharedModule, alone, build_shared, stored_config
from rlhf.recipe.schema import LoraBlock, SamplingBlock

LORA = Setup("fp32", "sdpa", LoraBlock(rank=2), gradient_checkpointing=False, dropout=False, trained=True, seed=5)
FROZEN = replace(LORA, lora=None, trained=False)
START = 4


def after(ids: torch.Tensor) -> torch.Tensor:
    """The mask of all columns from START on."""
    return torch.ones_like(ids, dtype=torch.bool)[:, START:]


def stir(module: torch.nn.Module, seed: int, scale: float = 0.2) -> None:
    """Trained weights that are far from where they started."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=draw))


@pytest.fixture
def folders(tiny, tokenizer, family, tmp_path) -> Path:
    """`base`, an `sft` and an `rm` that are adapters on it, and `rm2`, an adapter on `sft`; published as stages do."""
    tiny(family).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    setup = replace(LORA, attention="eager" if family == "gemma2" else "sdpa")
    sft = PolicyModule(build_policy(str(tmp_path / "base"), tokenizer, setup))
    stir(sft, 1)
    save_policy(sft, tokenizer, tmp_path / "sft")
    for name, base, seed in (("rm", "base", 2), ("rm2", "sft", 3)):
        rm = ScorerModule(build_scorer(str(tmp_path / base), tokenizer, setup, head="new"))
        stir(rm, seed)
        save_scorer(rm, tokenizer, tmp_path / name)
    return tmp_path


def setup_of(family: str) -> Setup:
    return replace(LORA, attention="eager" if family == "gemma2" else "sdpa")


def on_the_start(folders: Path, tokenizer, family: str) -> SharedModule:
    adapter = str(folders / "rm2" / "adapter")
    roles = {
        "policy": Role(None, trained=True),
        "critic": Role(adapter, "keep", trained=True),
        "rewards_0": Role(adapter, "keep"),
    }
    return build_shared(str(folders / "sft"), tokenizer, setup_of(family), roles, revision=None)


def on_the_adapters_base(folders: Path, tokenizer, family: str) -> SharedModule:
    adapter = str(folders / "sft" / "adapter")
    roles = {
        "policy": Role(adapter, trained=True),
        "reference": Role(adapter),
        "critic": Role(adapter, "new", trained=True),
        "rewards_0": Role(str(folders / "rm" / "adapter"), "keep"),
    }
    return build_shared(str(folders / "base"), tokenizer, setup_of(family), roles, revision=None)


def separate(folders: Path, name: str, tokenizer, family: str, head: str | None = None):
    setup = replace(FROZEN, attention=setup_of(family).attention)
    if head is None:
        return PolicyModule(build_policy(str(folders / name), tokenizer, setup))
    return ScorerModule(build_scorer(str(folders / name), tokenizer, replace(setup, seed=LORA.seed), head=head))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_a_base_that_is_the_policys_start(folders, tokenizer, family, ragged):
    shared, (ids, attention) = on_the_start(folders, tokenizer, family), ragged[1]("left")
    policy, rm = separate(folders, "sft", tokenizer, family), separate(folders, "rm2", tokenizer, family, head="keep")
    for role in ("policy", "reference"):
        close(shared(ids, attention, mask=after(ids), role=role), policy(ids, attention, after(ids)))
    close(shared(ids, attention, role="rewards_0"), rm(ids, attention))
    close(shared(ids, attention, mask=after(ids), role="critic"), rm(ids, attention, after(ids)))
    sampling = SamplingBlock(temperature=0.7, top_k=9)
    for found, expected in zip(
        shared(ids, attention, mask=after(ids), role="policy", sampling=sampling, extras=Extras(entropy="value")),
        policy(ids, attention, after(ids), sampling, extras=Extras(entropy="value")),
        strict=True,
    ):
        close(found, expected)


@torch.no_grad()
def test_a_base_that_the_policy_is_an_adapter_on(folders, tokenizer, family, ragged):
    shared, (ids, attention) = on_the_adapters_base(folders, tokenizer, family), ragged[1]("right")
    policy, rm = separate(folders, "sft", tokenizer, family), separate(folders, "rm", tokenizer, family, head="keep")
    for role in ("policy", "reference"):
        close(shared(ids, attention, mask=after(ids), role=role), policy(ids, attention, after(ids)))
    close(shared(ids, attention, role="rewards_0"), rm(ids, attention))
    critic = separate(folders, "sft", tokenizer, family, head="new")  # the policy's weights under a head of its own
    close(shared(ids, attention, mask=after(ids), role="critic"), critic(ids, attention, after(ids)))
    for parameter in shared.own("policy").values():
        parameter.mul_(1.5)
    close(shared(ids, attention, mask=after(ids), role="reference"), policy(ids, attention, after(ids)))
    moved = shared(ids, attention, mask=after(ids), role="policy") - policy(ids, attention, after(ids))
    assert moved.abs().max() > 1e-2


def test_a_loss_reaches_exactly_its_role(folders, tokenizer, family, ragged):
    shared, (ids, attention) = on_the_start(folders, tokenizer, family), ragged[1]("left")
    flags = {name: parameter.requires_grad for name, parameter in shared.named_parameters()}
    own = {role: set(shared.own(role)) for role in ("policy", "critic", "rewards_0")}
    assert {name for name, trained in flags.items() if trained} == own["policy"] | own["critic"]
    assert not own["policy"] & own["critic"] and len(own["critic"]) == len(own["policy"]) + 1
    for role in ("policy", "critic"):
        shared.zero_grad()
        shared(ids, attention, mask=after(ids), role=role).sum().backward()
        assert {name for name, p in shared.named_parameters() if p.grad is not None} == own[role]
        with torch.no_grad():
            shared(ids, attention, mask=after(ids), role="reference"), shared(ids, attention, role="rewards_0")
        assert {name: p.requires_grad for name, p in shared.named_parameters()} == flags


def test_checkpointed_layers_give_the_same_gradients(folders, tokenizer, family, ragged):
    ids, attention = ragged[1]("left")
    found = []
    for checkpointing in (False, True):
        setup = replace(setup_of(family), gradient_checkpointing=checkpointing)
        roles = {"policy": Role(None, trained=True), "critic": Role(str(folders / "rm2" / "adapter"), "keep", True)}
        shared = build_shared(str(folders / "sft"), tokenizer, setup, roles, revision=None)
        for role in ("policy", "critic"):
            shared(ids, attention, mask=after(ids), role=role).sum().backward()
        found.append({name: p.grad for name, p in shared.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_published_roles_are_plain_models_and_adapters(folders, tokenizer, family, ragged):
    ids, attention = ragged[1]("left")
    for kind, build in (("start", on_the_start), ("base", on_the_adapters_base)):
        shared = build(folders, tokenizer, family)
        stir(shared, 4, scale=0.02)
        state = dict(shared.named_parameters(remove_duplicate=False))
        expected = {role: shared(ids, attention, mask=after(ids), role=role) for role in ("policy", "critic")}
        for role, save, head in (("policy", save_policy, None), ("critic", save_scorer, "keep")):
            module, weights = alone(shared, role, state)
            out = folders / f"{kind}-{role}"
            save(module, tokenizer, out, weights)
            for source in (out.name, f"{out.name}/adapter"):
                model = separate(folders, source, tokenizer, family, head=head)
                close(model(ids, attention, after(ids)), expected[role])


@pytest.mark.parametrize("family", ["llama"])
def test_an_adapter_that_is_more_than_low_rank_updates_is_refused(folders):
    config = folders / "rm" / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_dora": false', '"use_dora": true'))
    with pytest.raises(CheckpointError, match="a score head alone, found use_dora"):
        stored_config(str(folders / "rm" / "adapter"))


@pytest.mark.parametrize("family", ["llama"])
def test_an_adapter_without_its_head_is_refused(folders, tokenizer, family):
    roles = {"policy": Role(None, trained=True), "critic": Role(str(folders / "sft" / "adapter"), "keep", True)}
    with pytest.raises(CheckpointError, match="found no base_model.model.score.weight"):
        build_shared(str(folders / "base"), tokenizer, setup_of(family), roles, revision=None)

"""One frozen base under several roles: each adds a LoRA adapter, and where it scores or values, a scalar head.

Who plays is a matter of which adapter is on. Switching never touches `requires_grad`, and a head is a module of its
own, so every engine over this module can train its part while the base is held once. A role without an adapter is the
base itself.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from rlhf.errors import CheckpointError
from rlhf.models.build import Setup, build_policy, lora_config, new_head, seeded, with_adapter
from rlhf.models.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter
from rlhf.models.forward import PolicyModule, RoleModule, ScorerModule, read_scores
from rlhf.models.load import check_names, reading

POLICY, REFERENCE, CRITIC = "policy", "reference", "critic"
_SCORE, _PEFT = "score", "base_model.model."


@dataclass(frozen=True)
class Role:
    """What a role adds to the base.

    adapter: a folder whose adapter it starts as; None: a fresh one, which changes nothing yet.
    head: whether it scores, and with whose head: "keep" takes the one stored beside the adapter.
    """

    adapter: str | None
    head: Literal["none", "keep", "new"] = "none"
    trained: bool = False


class SharedModule(RoleModule):
    """All roles over one base. The base and the adapters are `model.*`, the heads `heads.<role>.*`."""

    def __init__(self, model: PeftModel, heads: dict[str, nn.Module], trained: list[str]) -> None:
        super().__init__(model)
        self.heads = nn.ModuleDict(heads)
        self._layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        # In a tuple, since an attribute would list the model's weights a second time.
        self._policy = (PolicyModule(model),)
        self.requires_grad_(False)
        for role in trained:
            for parameter in self.own(role).values():
                parameter.requires_grad_(True)

    def own(self, role: str) -> dict[str, nn.Parameter]:
        """The parameters that only this role has: adapter and head, by the module's names."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if _is_of(name, role) or name.startswith(f"heads.{role}.")
        }

    def use(self, role: str) -> None:
        """Switch to a role's adapter, or to the base where it has none."""
        has_adapter = role in self.model.peft_config
        assert has_adapter or role == REFERENCE, f"{role} is none of {', '.join(self.model.peft_config)}, {REFERENCE}"
        for layer in self._layers:
            layer._disable_adapters = not has_adapter
            if has_adapter:
                layer._active_adapter = [role]

    def forward(self, ids: Tensor, attention: Tensor, mask: Tensor | None = None, *, role: str, **options: Any) -> Any:
        """What a `PolicyModule`, or for a role with a head a `ScorerModule`, of this role's weights would return.

        The adapter stays on afterwards: with gradient checkpointing the backward pass runs the layers once more.
        """
        self.use(role)
        if role not in self.heads:
            self._policy[0].packs = self.packs
            return self._policy[0](ids, attention, mask, **options)
        return read_scores(self.heads[role], *self.states(ids, attention), attention, mask, **options)

    def backbone(self) -> list[nn.Parameter]:
        """The frozen weights below the language-model head: what every role uses."""
        return [parameter for name, parameter in self.decoder.named_parameters() if ".lora_" not in name]


def build_shared(
    source: str, tokenizer: PreTrainedTokenizerFast, setup: Setup, roles: dict[str, Role], *, revision: str | None
) -> SharedModule:
    """The base from a folder or hub id, with every role's adapter and head on it.

    setup: as for a policy that is trained with `setup.lora`, the block of fresh adapters. A fresh adapter and head are
    drawn as `build_policy` and `build_scorer` draw them.
    """
    assert setup.lora is not None and POLICY in roles
    plain = replace(setup, lora=None)
    model: Any = build_policy(source, tokenizer, plain, revision=revision)
    hidden, dtype = model.get_input_embeddings().embedding_dim, model.dtype
    fresh: LoraConfig | None = None
    heads: dict[str, nn.Module] = {}
    for name, role in roles.items():
        if role.adapter is not None:
            config = stored_config(role.adapter)
        else:
            # Once resolved, the target is a list of names: peft would also look for them among the adapters' layers.
            config = copy.deepcopy(fresh) if fresh is not None else lora_config(model, setup.lora, "CAUSAL_LM")
        with seeded(setup.seed):
            model = with_adapter(model, config, name)
        if role.adapter is None and fresh is None:
            fresh = copy.deepcopy(model.peft_config[name])
        if role.head != "none":
            heads[name] = new_head(hidden, dtype, setup.seed)
        if role.adapter is not None:
            copy_adapter(model, name, role.adapter, heads[name] if role.head == "keep" else None)
    if setup.gradient_checkpointing:
        model.enable_input_require_grads()
    for config in model.peft_config.values():
        config.base_model_name_or_path = model.get_base_model().name_or_path
    return SharedModule(model, heads, [name for name, role in roles.items() if role.trained]).train()


# --- adapters of others -----------------------------------------------------------------------------------------------


def stored_config(folder: str) -> LoraConfig:
    """The configuration of an adapter folder, for a model without a head; what cannot be carried over is refused."""
    known = read_adapter(folder)
    config = LoraConfig.from_pretrained(folder)
    strange = [key for key in ("use_dora", "lora_bias", "trainable_token_indices") if getattr(config, key)]
    strange += ["bias"] if config.bias != "none" else []
    strange += [f"modules_to_save {name}" for name in known.get("modules_to_save") or () if name not in _HEADS]
    if strange:
        raise CheckpointError(
            f"expected low-rank updates and a score head alone, found {', '.join(strange)}",
            where=f"{folder}/{ADAPTER_CONFIG}",
            fix="Leave out share_base, or train this adapter with `model.lora`.",
        )
    return replace(config, task_type="CAUSAL_LM", modules_to_save=None, inference_mode=False)


_HEADS = (_SCORE, "classifier")  # what peft lists for sequence classification, whichever the model has


def copy_adapter(model: PeftModel, name: str, folder: str, head: nn.Module | None) -> None:
    """Fill an adapter with the weights of a folder, and a head with the one stored there."""
    targets = {
        key.replace(f".{name}.", ".").removesuffix(f".{name}"): parameter
        for key, parameter in model.named_parameters()
        if _is_of(key, name)
    }
    if head is not None:
        targets[f"{_PEFT}{_SCORE}.weight"] = head.weight
    path = Path(folder) / ADAPTER_WEIGHTS
    with reading(folder), safe_open(str(path), framework="pt") as file, torch.no_grad():
        stored = set(file.keys()) - ({f"{_PEFT}{_SCORE}.weight"} if head is None else set())
        check_names(sorted(targets.keys() - stored), sorted(stored - targets.keys()), folder, "LoRA adapter")
        for key, parameter in targets.items():
            value = file.get_tensor(key)
            if value.shape != parameter.shape:
                shapes = f"{tuple(parameter.shape)}, found {tuple(value.shape)}"
                raise CheckpointError(f"expected {key} of shape {shapes}", where=str(path))
            parameter.copy_(value)


# --- one role alone ---------------------------------------------------------------------------------------------------


def alone(module: SharedModule, role: str, state: dict[str, Tensor] | None) -> tuple[RoleModule, dict[str, Tensor]]:
    """A role as a module of its own with the adapter `default`, without memory behind it, and its weights from `state`.

    state: whole weights by the shared module's names; None: none are returned. Made for `save_policy`, `save_scorer`.
    """
    core, is_scorer = module.core, role in module.heads
    config = copy.deepcopy(core.config)
    adapter = copy.deepcopy(module.model.peft_config[role])
    with torch.device("meta"):
        if is_scorer:
            config.num_labels = 1
            with reading(core.name_or_path):
                plain = AutoModelForSequenceClassification.from_config(config, dtype=core.dtype)
            adapter = replace(adapter, task_type="SEQ_CLS", modules_to_save=list(_HEADS))
        else:
            plain = type(core)(config).to(core.dtype)
            plain.generation_config = core.generation_config
        model = with_adapter(plain, adapter, "default")
        view = ScorerModule(model) if is_scorer else PolicyModule(model)
    view.core.name_or_path = core.name_or_path
    if state is None:
        return view, {}
    prefix = f"model.{_PEFT}"
    found = {f"{prefix}{name}": value for name, value in core.named_buffers()} | state
    others = [name for name in module.model.peft_config if name != role]
    own = {}
    for name, value in found.items():
        if name == f"heads.{role}.weight":
            own[f"{prefix}{_SCORE}.modules_to_save.default.weight"] = value
        elif not name.startswith("heads.") and not any(_is_of(name, other) for other in others):
            own[_renamed(name, role) if _is_of(name, role) else name] = value
    known = set(view.state_dict())  # without the language-model head of a scorer, and buffers that no file holds
    # A layer on which only other roles have an adapter is a plain one here.
    plainly = {name if name in known else name.replace(".base_layer.", "."): value for name, value in own.items()}
    return view, {name: value for name, value in plainly.items() if name in known}


def _is_of(name: str, role: str) -> bool:
    """Whether a parameter belongs to a role's adapter."""
    return ".lora_" in name and f".{role}." in f"{name}."


def _renamed(name: str, role: str) -> str:
    return f"{name}.".replace(f".{role}.", ".default.").removesuffix(".")

"""Publishing a model: a Hugging Face folder that plain transformers loads with the same logits or scores.

Works on full weights by name, as an engine gathers them, and never changes the live model. The folder is the caller's:
whoever makes it durable and visible does so after these functions return.
"""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.core_model_loading import revert_weight_conversion

from rlhf.errors import CheckpointError, NumericsError
from rlhf.models.folder import ADAPTER_WEIGHTS, read_json
from rlhf.models.forward import PolicyModule, RoleModule, ScorerModule
from rlhf.models.load import quiet

logger = logging.getLogger("rlhf.models")

_ADAPTER, _PEFT = "default", "base_model.model."


def save_policy(
    module: PolicyModule, tokenizer: PreTrainedTokenizerFast, folder: Path, state: dict[str, Tensor] | None = None
) -> None:
    """Write weights, configuration, generation configuration, tokenizer and chat template into `folder`.

    state: the module's weights, whole, by the module's own names; None takes the live ones. A LoRA policy is published
    merged, its adapter beside it in `adapter/`.
    """
    _save(module, tokenizer, folder, state)


def save_scorer(
    module: ScorerModule, tokenizer: PreTrainedTokenizerFast, folder: Path, state: dict[str, Tensor] | None = None
) -> None:
    """The same for a reward model or critic: a folder for AutoModelForSequenceClassification with one label.

    Plain transformers reads the score at the last token that is not the padding token, so that must not end a text.
    """
    config = module.core.config
    pad = config.get_text_config().pad_token_id
    assert config.num_labels == 1, f"expected one label, found {config.num_labels}"
    assert pad is not None and pad == tokenizer.pad_token_id != tokenizer.eos_token_id, f"padding token {pad}"
    _save(module, tokenizer, folder, state)


def merged_state_dict(module: RoleModule, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Full weights under plain Hugging Face names and in the model's dtype, LoRA updates added in float32.

    state: by the module's names (`model.*`), whole, on the CPU. Tied weights appear once.
    """
    state = {name.removeprefix("model."): value for name, value in state.items()}
    if isinstance(module.model, PeftModel):
        state = _merge(module.model, state)
    skeleton = _skeleton(module)
    tied = set(skeleton.all_tied_weights_keys)
    dtypes = {name: value.dtype for name, value in skeleton.state_dict().items()}
    # Buffers are never sharded, so an engine hands over parameters only.
    state = {name: value for name, value in module.core.named_buffers() if name in dtypes} | state
    return {
        name: value.detach().to("cpu", dtypes.get(name, value.dtype)).contiguous()
        for name, value in state.items()
        if name not in tied
    }


def _save(
    module: RoleModule, tokenizer: PreTrainedTokenizerFast, folder: Path, state: dict[str, Tensor] | None
) -> None:
    state = dict(module.state_dict()) if state is None else state
    merged = merged_state_dict(module, state)
    skeleton = _skeleton(module)
    check_weights(merged, skeleton, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        skeleton.save_pretrained(folder, state_dict=dict(merged))
    tokenizer.save_pretrained(folder)
    keep_code(folder)
    check_files(folder, revert_weight_conversion(skeleton, dict(merged)))  # a class may store under other names
    if isinstance(module.model, PeftModel):
        _save_adapter(module.model, state, folder / "adapter")


def keep_code(folder: Path) -> None:
    """A model with code of its own is published with it: transformers has copied the files of the classes in use.

    What `auto_map` names beyond those, or in another model's folder, is left out: nobody would find it here.
    """
    for name in ("config.json", "tokenizer_config.json"):
        config = read_json(folder / name) if (folder / name).is_file() else {}
        if config.get("auto_map"):
            kept = {key: _own(value, folder) for key, value in config["auto_map"].items()}
            config["auto_map"] = {key: value for key, value in kept.items() if value}
            if name == "config.json" and not {"AutoConfig"} <= config["auto_map"].keys():
                what = f"expected the model's code beside its weights, found auto_map {config['auto_map']}"
                raise CheckpointError(what, where=str(folder), fix="Nothing was published.")
            (folder / name).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _own(value: object, folder: Path) -> object:
    """A name of `auto_map` without the model it came from, None where its file is not here; of a list each."""
    if isinstance(value, list):
        names = [_own(each, folder) for each in value]
        return names if any(names) else None
    name = str(value).rpartition("--")[2]
    return name if value and (folder / f"{name.rpartition('.')[0].replace('.', '/')}.py").is_file() else None


def _skeleton(module: RoleModule) -> nn.Module:
    """The plain model without memory behind it: names, shapes, dtypes, and how its class writes itself to a folder."""
    core = module.core
    with torch.device("meta"):
        skeleton = type(core)(copy.deepcopy(core.config)).to(core.dtype)
    if core.can_generate():
        skeleton.generation_config = _generation_config(core)
    return skeleton


def _generation_config(core: nn.Module) -> GenerationConfig:
    """The base model's, but only its token ids where its options contradict each other: it could not be written."""
    config = copy.deepcopy(core.generation_config)
    try:
        config.validate(strict=True)
    except ValueError:
        logger.warning("generation_config.json is published with token ids only: the base model's is not valid")
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        return GenerationConfig(**{name: getattr(config, name) for name in names})
    return config


def _merge(model: PeftModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """peft's names and separate updates -> plain names and sums, W + scale * B A."""
    plain: dict[str, Tensor] = {}
    for name, value in state.items():
        if ".lora_" not in name and ".original_module." not in name:
            name = name.removeprefix(_PEFT).replace(f".modules_to_save.{_ADAPTER}.", ".")
            plain[name.replace(".base_layer.", ".")] = value
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            weight = plain[f"{name}.weight"]
            update = _update(layer, f"{_PEFT}{name}", state) * layer.scaling[_ADAPTER]
            plain[f"{name}.weight"] = (weight.float() + update).to(weight.dtype)
    return plain


def _update(layer: LoraLayer, name: str, state: dict[str, Tensor]) -> Tensor:
    """B A in the layout of the layer's weight, float32."""
    if layer.lora_embedding_A:
        down, up = (state[f"{name}.lora_embedding_{side}.{_ADAPTER}"].float() for side in "AB")
        return (up @ down).T
    down, up = (state[f"{name}.lora_{side}.{_ADAPTER}.weight"].float() for side in "AB")
    return (up @ down).T if layer.fan_in_fan_out else up @ down


def _save_adapter(model: PeftModel, state: dict[str, Tensor], folder: Path) -> None:
    """The adapter alone, for peft. It fits on the weights that the stage started from."""
    state = {name.removeprefix("model."): value for name, value in state.items()}
    adapter = get_peft_model_state_dict(model, state_dict=state, adapter_name=_ADAPTER, save_embedding_layers=False)
    folder.mkdir(exist_ok=True)
    tensors = {
        name: value.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, value in adapter.items()
    }
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = copy.deepcopy(model.peft_config[_ADAPTER])
    config.inference_mode = True
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)  # a set: its order would change the folder's hash
    config.save_pretrained(folder)


def check_weights(weights: dict[str, Tensor], skeleton: nn.Module, folder: Path) -> None:
    """Every tensor of the model is there, has its shape, and is finite."""
    shapes = {name: value.shape for name, value in skeleton.state_dict().items()}
    shapes = {name: shape for name, shape in shapes.items() if name not in skeleton.all_tied_weights_keys}
    wrong = sorted(name for name in shapes.keys() | weights.keys() if shapes.get(name) != _shape(weights, name))
    if wrong:
        raise CheckpointError(
            f"expected {wrong[0]} of shape {_text(shapes.get(wrong[0]))}, found {_text(_shape(weights, wrong[0]))}"
            f" ({len(wrong)} of {len(shapes)} tensors are wrong)",
            where=str(folder),
            fix="Nothing was published. The last checkpoint is untouched.",
        )
    check_finite(weights, folder)


def check_finite(weights: dict[str, Tensor], folder: Path) -> None:
    """No weight is NaN or infinite."""
    broken = sorted(name for name, value in weights.items() if not value.isfinite().all())
    if broken:
        raise NumericsError(
            f"expected finite weights, found NaN or infinity in {broken[0]} ({len(broken)} tensors)",
            where=str(folder),
            fix="Nothing was published. Lower train.lr and start again from the last checkpoint.",
        )


def check_files(folder: Path, weights: dict[str, Tensor]) -> None:
    """What was written reads back as the same tensors: every name, shape, type and value, and none beside them."""
    missing = set(weights)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                found, wanted = tensors.get_tensor(name), weights[name] if name in weights else None
                is_same = wanted is not None and found.dtype == wanted.dtype and found.equal(wanted)
                if name not in missing or not is_same:
                    raise _other_weights(folder, f"found {name} with other content in {file.name}")
                missing.remove(name)
    if missing:
        raise _other_weights(folder, f"found no {min(missing)} ({len(missing)} of {len(weights)} tensors are missing)")


def _other_weights(folder: Path, found: str) -> CheckpointError:
    fix = "Nothing was published. The last checkpoint is untouched: the same command tries again."
    return CheckpointError(f"expected on disk the weights that were written, {found}", where=str(folder), fix=fix)


def _shape(weights: dict[str, Tensor], name: str) -> torch.Size | None:
    return weights[name].shape if name in weights else None


def _text(shape: torch.Size | None) -> str:
    return "none" if shape is None else str(tuple(shape))

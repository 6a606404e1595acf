"""Policies and scorers, made from a hub id, a local folder, a LoRA adapter folder, or from scratch.

What is built depends on its arguments alone: never on the rank, nor on what was drawn before.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

from rlhf.errors import CheckpointError, RecipeError
from rlhf.models.folder import is_adapter, read_adapter
from rlhf.models.load import DTYPES, attention_checked, load_weights, merge_adapter, read_config
from rlhf.models.statistics import set_statistics
from rlhf.models.tokenizer import end_ids
from rlhf.recipe.schema import InitBlock, LoraBlock, ModelBlock

logger = logging.getLogger("rlhf.models")


@dataclass(frozen=True)
class Setup:
    """How a model is prepared, wherever it comes from."""

    dtype: str
    attention: str
    lora: LoraBlock | None
    gradient_checkpointing: bool
    dropout: bool
    trained: bool
    seed: int

    @classmethod
    def to_train(cls, block: ModelBlock, seed: int) -> Setup:
        """As the recipe's `model` block says."""
        return cls(
            block.dtype,
            block.attention,
            block.lora,
            block.gradient_checkpointing,
            block.dropout,
            trained=True,
            seed=seed,
        )

    @classmethod
    def frozen(cls, dtype: str, attention: str) -> Setup:
        """For a model that is only called: no adapter, no dropout, no gradients."""
        return cls(dtype, attention, None, gradient_checkpointing=False, dropout=False, trained=False, seed=0)


def build_policy(
    source: str | InitBlock, tokenizer: PreTrainedTokenizerFast, setup: Setup, *, revision: str | None = None
) -> nn.Module:
    """A causal language model; with `setup.lora` wrapped by peft, the base frozen.

    The embedding grows where the tokenizer has more tokens than it has rows (see `ensure_pad`).
    """
    with seeded(setup.seed):
        if isinstance(source, InitBlock):
            with attention_checked(setup.attention):
                model = LlamaForCausalLM(init_config(source, tokenizer, setup)).to(DTYPES[setup.dtype])
        else:
            model = _load_policy(source, setup, revision)
        fit_tokenizer(model, tokenizer)
        return finish(model, setup, "CAUSAL_LM")


def build_scorer(
    source: str | InitBlock,
    tokenizer: PreTrainedTokenizerFast,
    setup: Setup,
    *,
    head: Literal["keep", "new"],
    revision: str | None = None,
) -> nn.Module:
    """A model with a scalar head `score` on its hidden states: a reward model or a critic.

    head: "keep" takes the head from the files and fails if there is none; "new" draws one from
    N(0, 1 / (hidden + 1)), e.g. to turn a policy into a reward model.
    """
    with seeded(setup.seed):
        if isinstance(source, InitBlock):
            config = init_config(source, tokenizer, setup)
            config.num_labels = 1
            with attention_checked(setup.attention):
                model = LlamaForSequenceClassification(config).to(DTYPES[setup.dtype])
        else:
            model = _load_scorer(source, setup, head, revision)
        if head == "new" or isinstance(source, InitBlock):
            draw_head(model, setup.seed)
        fit_tokenizer(model, tokenizer)
        if setup.trained:
            set_statistics(model.config, None)  # of the scores before training
        return finish(model, setup, "SEQ_CLS")


def has_score_head(source: str, revision: str | None) -> bool:
    """Whether a folder or hub id is a scorer by its own account."""
    if is_adapter(source):
        return "score" in (read_adapter(source).get("modules_to_save") or [])
    names = read_config(source, revision).architectures or []
    return any(name.endswith("ForSequenceClassification") for name in names)


def max_positions(config: PreTrainedConfig) -> int | None:
    """The longest sequence the model was made for, in tokens; None where its configuration does not say."""
    text = config.get_text_config()
    return text.max_position_embeddings if hasattr(text, "max_position_embeddings") else None


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws inside depend on the seed alone; the global generator is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


# --- sources --------------------------------------------------------------------------------------------------------


def init_config(block: InitBlock, tokenizer: PreTrainedTokenizerFast, setup: Setup) -> LlamaConfig:
    """The configuration of a model made from scratch; its vocabulary is the tokenizer's."""
    if block.hidden % block.heads:
        raise RecipeError(
            f"expected a number that divides hidden ({block.hidden}), found {block.heads}", where="model.init.heads"
        )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=block.hidden,
        intermediate_size=block.ffn or 4 * block.hidden,
        num_hidden_layers=block.layers,
        num_attention_heads=block.heads,
        num_key_value_heads=block.kv_heads or block.heads,
        max_position_embeddings=block.context,
        tie_word_embeddings=block.tied,
        attention_dropout=block.dropout if setup.dropout else 0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = setup.attention
    return config


def _load_policy(source: str, setup: Setup, revision: str | None) -> nn.Module:
    if is_adapter(source):
        adapter = read_adapter(source)
        base = _load_policy(adapter["base_model_name_or_path"], setup, adapter.get("revision"))
        return merge_adapter(base, source).requires_grad_(True)
    config = without_dropout(read_config(source, revision), setup)
    return load_weights(AutoModelForCausalLM, source, revision, config, dtype=setup.dtype, attention=setup.attention)


def _load_scorer(source: str, setup: Setup, head: Literal["keep", "new"], revision: str | None) -> nn.Module:
    if is_adapter(source):
        adapter = read_adapter(source)
        base = _load_scorer(adapter["base_model_name_or_path"], setup, "new", adapter.get("revision"))
        if head == "keep" and "score" not in (adapter.get("modules_to_save") or []):
            raise CheckpointError("expected an adapter of a reward model or critic, found no score head", where=source)
        return merge_adapter(base, source).requires_grad_(True)
    config = without_dropout(read_config(source, revision), setup)
    config.num_labels = 1
    is_new = head == "new"
    model = load_weights(
        AutoModelForSequenceClassification,
        source,
        revision,
        config,
        dtype=setup.dtype,
        attention=setup.attention,
        fresh=lambda name: is_new and name == "score.weight",
        unused=lambda name: is_new and name.startswith(("lm_head.", "embed_out.")),
    )
    return model


def draw_head(model: nn.Module, seed: int) -> None:
    """A fresh scalar head, N(0, 1 / (hidden + 1)).        [Ziegler 2019, arXiv:1909.08593, and its published code]

    Scores then start with a variance near 1 on normalised hidden states, whatever the model's width.
    """
    if not hasattr(model, "score"):
        raise CheckpointError(f"expected a decoder with a `score` head, found a {type(model).__name__}")
    old = model.score
    assert old.out_features == 1, f"expected a head with one output, found {old.out_features}"
    # A new module: the old one's weight may be sharded already, and then no rank holds all of it.
    model.score = new_head(old.in_features, old.weight.dtype, seed)


def new_head(hidden: int, dtype: torch.dtype, seed: int) -> nn.Linear:
    """The head that `draw_head` gives to a model."""
    head = nn.Linear(hidden, 1, bias=False, dtype=dtype)
    draws = torch.randn(1, hidden, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        head.weight.copy_(draws / math.sqrt(hidden + 1))
    return head


# --- preparation ----------------------------------------------------------------------------------------------------


def without_dropout(config: PreTrainedConfig, setup: Setup) -> PreTrainedConfig:
    """The configuration with every dropout rate at 0, unless the setup asks for dropout."""
    if not setup.dropout:
        for part in {id(part): part for part in (config, config.get_text_config())}.values():
            for name, value in vars(part).copy().items():
                if "drop" in name and isinstance(value, float):
                    setattr(part, name, 0.0)
    return config


def fit_tokenizer(model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> None:
    """Tell the model which token pads and which ends, and give every token of the tokenizer an embedding row.

    New rows are the mean of the old ones: a new token is then neither likely nor impossible.
    """
    embedding = model.get_input_embeddings()
    rows = embedding.num_embeddings  # the weight itself may be sharded
    if len(tokenizer) > rows:
        logger.info("embedding grows from %d to %d rows for new tokens", rows, len(tokenizer))
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                if layer is not None:
                    layer.weight[rows:] = layer.weight[:rows].float().mean(0).to(layer.weight.dtype)
    config = model.config.get_text_config()
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id
    assert pad is not None and pad not in end_ids(tokenizer, config), f"padding token {pad} is missing or ends a text"
    for part in (model.config, config, *([model.generation_config] if model.can_generate() else [])):
        part.pad_token_id = pad


def finish(model: nn.Module, setup: Setup, task: Literal["CAUSAL_LM", "SEQ_CLS"]) -> nn.Module:
    """Dropout off, gradient checkpointing, adapter, frozen or ready to train."""
    if not setup.dropout:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    if not setup.trained:
        return model.eval().requires_grad_(False)
    if setup.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if setup.lora is not None:
        model = add_lora(model, setup.lora, task)
        if setup.gradient_checkpointing:
            model.enable_input_require_grads()
    return model.train()


def add_lora(model: nn.Module, block: LoraBlock, task: Literal["CAUSAL_LM", "SEQ_CLS"]) -> nn.Module:
    """The model with fresh adapters, all else frozen; a scorer's head is trained in full.        [arXiv:2106.09685]

    Adapters have the base's dtype: under bf16 the optimizer keeps the fp32 master copy, as for full fine-tuning.
    """
    return with_adapter(model, lora_config(model, block, task), "default")


def lora_config(model: nn.Module, block: LoraBlock, task: Literal["CAUSAL_LM", "SEQ_CLS"]) -> LoraConfig:
    """peft's configuration of a fresh adapter."""
    return LoraConfig(
        r=block.rank,
        lora_alpha=block.alpha,
        lora_dropout=block.dropout,
        target_modules=block.target,
        task_type=task,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )


def with_adapter(model: nn.Module, config: LoraConfig, name: str) -> PeftModel:
    """The model with one more adapter, which is the first where peft has not wrapped the model yet."""
    shared = _shared_modules(model.get_base_model() if isinstance(model, PeftModel) else model)
    try:
        if isinstance(model, PeftModel):
            model.add_adapter(name, config, autocast_adapter_dtype=False)
            adapted = model
        else:
            adapted = get_peft_model(model, config, adapter_name=name, autocast_adapter_dtype=False)
    except ValueError as error:
        raise RecipeError(
            str(error).splitlines()[0], where="model.lora.target", fix="Name modules of this model, or use all-linear."
        ) from error
    others = sorted({type(m).__name__ for m in adapted.modules() if isinstance(m, LoraLayer)} - {"Linear", "Embedding"})
    if others:
        raise RecipeError(
            f"expected linear layers, found {', '.join(others)}, whose update cannot be merged for publishing",
            where="model.lora.target",
            fix="List the projections by name, e.g. [q_proj, k_proj, v_proj, o_proj].",
        )
    names = {name for name, _ in adapted.named_modules()}
    wrapped = sorted(name for name in shared if f"base_model.model.{name}.base_layer" in names)
    if wrapped:
        raise RecipeError(
            f"expected modules with weights of their own, found {', '.join(wrapped)}, which share theirs",
            where="model.lora.target",
            fix="Leave out the embeddings: merging the adapter would untie them.",
        )
    return adapted


def _shared_modules(model: nn.Module) -> list[str]:
    """Names of the input and output embeddings, where they are one matrix."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    if ends[1] is None or ends[0].weight is not ends[1].weight:
        return []
    return [name for name, module in model.named_modules() if any(module is end for end in ends)]

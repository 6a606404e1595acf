"""Blocks that recipes are made of. Every option, default, range and help line lives here or in `options.py`.

No torch: a recipe must be refused in a blink. `rlhf explain KEY` and `rlhf schema STAGE` print the field descriptions.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


class Block(BaseModel):
    """A group of options. Unknown keys are errors, types are never guessed, values never change after loading."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        populate_by_name=True,
        validate_default=True,
        defer_build=True,
    )

    # Groups of keys of which only one may be given; `--set` of one replaces another that the file gives.
    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = ()
    # Options of a named choice that are not arguments of its function.
    not_arguments: ClassVar[tuple[str, ...]] = ()
    # key -> keys that say more about its value; `--set` of the key makes what a file says of the old value void
    qualifiers: ClassVar[dict[str, tuple[str, ...]]] = {}


def conflict(message: str, *keys: str) -> PydanticCustomError:
    """An error of a whole block that is about these of its keys."""
    # The message is given as a value of the template, since it may hold braces.
    return PydanticCustomError("conflict", "{message}", {"message": message, "keys": keys})


def default_name(name: str) -> BeforeValidator:
    """Lets a block leave out its `name`: `{beta: 0.05}` keeps the stage's default choice."""

    def fill(value: Any) -> Any:
        return {"name": name, **value} if isinstance(value, dict) else value

    return BeforeValidator(fill)


class LoraBlock(Block):
    """Low-rank adapters instead of full fine-tuning (arXiv:2106.09685)."""

    rank: int = Field(16, ge=1, description="rank of the update matrices")
    alpha: float = Field(32, gt=0, description="scale of the update, applied as alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter input; keep 0 outside SFT")
    target: str | list[str] = Field("all-linear", description="module names that get an adapter, or all-linear")


class InitBlock(Block):
    """A small Llama-style model made from scratch, with a BPE tokenizer trained on the stage's own data."""

    hidden: int = Field(128, ge=8, description="hidden size")
    layers: int = Field(4, ge=1, description="transformer blocks")
    heads: int = Field(4, ge=1, description="attention heads; must divide hidden")
    kv_heads: int | None = Field(None, ge=1, description="key/value heads; default: as many as heads")
    ffn: int | None = Field(None, ge=8, description="feed-forward size; default: 4 x hidden")
    vocab: int = Field(1024, ge=300, description="tokens of the BPE vocabulary, special tokens included")
    context: int = Field(1024, ge=16, description="longest sequence in tokens")
    tied: bool = Field(True, description="share input and output embeddings")
    dropout: float = Field(0.0, ge=0, lt=1, description="attention dropout")


class ModelRef(Block):
    """Where a model comes from: a stage (`from`), or a folder or hub id (`path`)."""

    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (("from", "path"),)
    qualifiers: ClassVar[dict[str, tuple[str, ...]]] = {key: ("revision",) for key in ("from", "path", "init")}

    from_: str | None = Field(
        None, alias="from", description="a stage of this run directory (sft) or of another one (runs/other/sft)"
    )
    path: str | None = Field(None, description="a local model folder or a hub id")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")


class ModelBlock(ModelRef):
    """The model a stage trains: exactly one of `from`, `path` and `init`."""

    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (("from", "path", "init"),)

    init: InitBlock | None = Field(None, description="make a small model from scratch instead of loading one")
    dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="compute type; bf16 keeps fp32 master weights (ZeRO >= 1)"
    )
    lora: LoraBlock | None = Field(None, description="train adapters instead of all weights")
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in backward: less memory, ~30 % slower"
    )
    attention: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = Field(
        "sdpa", description="attention implementation of transformers"
    )
    chat_template: str | None = Field(
        None, description="chatml, plain or a .jinja file; default: the tokenizer's own, plain where it has none"
    )
    dropout: bool = Field(
        False, description="keep the model's dropout on while training (SFT only; others need it off)"
    )

    @model_validator(mode="after")
    def _one_source(self) -> ModelBlock:
        given = [key for key, value in (("from", self.from_), ("path", self.path), ("init", self.init)) if value]
        if len(given) != 1:
            found = " and ".join(given) if given else "none of them"
            raise conflict(f"expected exactly one of from, path and init, found {found}", "from", "path", "init")
        return self


class ZeroBlock(Block):
    """How DeepSpeed shards one model over the devices (arXiv:1910.02054)."""

    stage: Literal[0, 1, 2, 3] = Field(
        0, description="0 nothing, 1 optimizer state, 2 + gradients, 3 + parameters are sharded; frozen models: 0 or 3"
    )
    offload_optimizer: bool = Field(
        False, description="keep optimizer state in CPU memory (trained models, stage >= 1)"
    )
    offload_params: bool = Field(False, description="keep parameters in CPU memory between uses (stage 3)")
    persistence_threshold: int = Field(
        100_000, ge=0, description="stage 3: parameters with fewer elements stay whole on every device"
    )
    bucket_size: int = Field(50_000_000, ge=1_000, description="elements per communication bucket")


class SourceBlock(Block):
    """One dataset and how its rows are read."""

    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (("from", "path"),)
    qualifiers: ClassVar[dict[str, tuple[str, ...]]] = {
        key: ("output", "name", "split", "data_dir", "revision") for key in ("from", "path")
    }

    from_: str | None = Field(
        None, alias="from", description="rows of a label stage of this run directory (label) or another (runs/a/label)"
    )
    output: Literal["pairs", "best", "lists"] = Field(
        "pairs",
        description="what the label stage in `from` has made: pairs, the best answer to each prompt (for sft), or lists"
        " of answers with scores",
    )
    path: str | None = Field(
        None,
        description="file, folder of data files, save_to_disk folder, hub id, or demo:sft, demo:pairs, demo:lists,"
        " demo:prompts, demo:judgements",
    )
    name: str | None = Field(None, description="configuration of a hub dataset")
    split: str = Field("train", description="split of a hub dataset or save_to_disk folder")
    data_dir: str | None = Field(None, description="sub-folder of a hub dataset")
    revision: str | None = Field(None, description="branch, tag or commit of a hub dataset")
    format: Literal[
        "auto",
        "prompt_completion",
        "text",
        "messages",
        "pairs",
        "dialogue_pairs",
        "sharegpt",
        "sharegpt_pairs",
        "alpaca",
        "prompts",
        "labelled",
        "scored",
        "lists",
    ] = Field("auto", description="row format; auto looks at the columns and says what it found")
    columns: dict[str, str] = Field({}, description="canonical name -> column of the file, e.g. {prompt: question}")
    templates: dict[str, str] = Field(
        {}, description='canonical name -> text with {columns} in it, e.g. {prompt: "Review: {title}"}'
    )
    system: str | None = Field(None, description="system message put before every row that has none")
    prompt_words: int | None = Field(None, ge=1, description="text rows: the first N words become the prompt")
    pair_labels: bool = Field(
        False, description="labelled rows: pair each label-true answer with a label-false one of the same prompt"
    )
    weight: float = Field(
        1.0, gt=0, description="share of its rows that a source gives, relative to the largest weight"
    )
    part: str | None = Field(
        None,
        pattern=r"^[1-9][0-9]{0,8}/[1-9][0-9]{0,8}$",
        description="every n-th row, e.g. 1/2 and 2/2: halves that share no row, for a train and a test reward model",
    )
    limit: int | None = Field(None, ge=1, description="read at most this many rows")


class FilterBlock(Block):
    """Which training rows are left out, each counted by its reason. Held-out rows are never left out."""

    of_pairs: ClassVar[tuple[str, ...]] = (  # what can only be asked of pairs
        "min_margin",
        "max_margin",
        "max_length_ratio",
        "max_length_difference",
        "drop_equal",
        "drop_conflicts",
    )

    min_margin: float | None = Field(
        None, description="pairs: least score margin (score_chosen - score_rejected, score_margin or margin of the row)"
    )
    max_margin: float | None = Field(None, description="pairs: largest score margin")
    max_length_ratio: float | None = Field(
        None, ge=1, description="pairs: most that the longer answer may have of the shorter one's tokens, e.g. 2"
    )
    max_length_difference: int | None = Field(
        None, ge=0, description="pairs: most tokens that one answer may have more than the other"
    )
    drop_equal: bool = Field(False, description="pairs: leave out those whose answers differ in white space only")
    drop_conflicts: bool = Field(
        False, description="pairs: leave out all rows of two answers to a prompt that are ranked both ways"
    )
    drop_duplicates: bool = Field(
        False, description="keep the first of rows that are equal up to white space; of prompts to answer, each once"
    )
    drop_eval_overlap: Literal["none", "rows", "prompts"] = Field(
        "none", description="leave out rows that are held out too, or all rows to a prompt that is held out"
    )


class ReweightBlock(Block):
    """Pairs weigh sigmoid(score margin / temperature) in the loss, scaled to mean 1 over the training rows."""

    temperature: float = Field(1.0, gt=0, description="score margin at which a pair has 73 % of the largest weight")


class DataBlock(SourceBlock):
    """What a stage learns from. One source inline (`path: ...`, `from: ...`) or several under `sources`."""

    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (("from", "path", "sources"), ("eval", "eval_rows"))
    key: ClassVar[str] = "data"  # where a recipe has this block

    sources: list[SourceBlock] = Field([], description="several weighted sources instead of one")
    eval: SourceBlock | None = Field(
        None, description="held-out data; default: `eval_rows` rows taken from the sources"
    )
    eval_rows: int = Field(0, ge=0, description="rows held out of the sources for evaluation, chosen by seed")
    max_length: int = Field(1024, ge=8, description="longest prompt + answer in tokens")
    max_prompt_length: int | None = Field(
        None, ge=1, description="longest prompt in tokens; default: no limit of its own"
    )
    on_long: Literal["drop", "truncate_prompt", "truncate_answer", "error"] = Field(
        "drop", description="what happens to rows over the limits; every case is counted in the log"
    )
    on_empty: Literal["drop", "error"] = Field("drop", description="what happens to rows with an empty answer")
    train_on: Literal["all_answers", "last_answer"] = Field(
        "all_answers", description="multi-turn rows: supervise every assistant turn, or the last one"
    )
    filter: FilterBlock = Field(FilterBlock(), description="which training rows are left out")
    reweight: ReweightBlock | None = Field(None, description="pairs: how much each counts in the loss; default: alike")

    @model_validator(mode="after")
    def _one_source(self) -> DataBlock:
        given = [key for key, value in (("from", self.from_), ("path", self.path), ("sources", self.sources)) if value]
        if len(given) != 1:
            found = " and ".join(given) if given else "none of them"
            raise conflict(f"expected exactly one of from, path and sources, found {found}", "from", "path", "sources")
        if self.eval is not None and self.eval_rows:
            raise conflict("expected eval or eval_rows, found both", "eval", "eval_rows")
        return self

    def all_sources(self) -> list[SourceBlock]:
        """The training sources, whichever way they were written."""
        return self.sources or [SourceBlock(**{k: getattr(self, k) for k in SourceBlock.model_fields})]


Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimBlock(Block):
    """Optimizer and learning-rate schedule of one trained model."""

    lr: float = Field(1e-5, gt=0, description="peak learning rate")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="adamw, or sgd for debugging")
    betas: tuple[Decay, Decay] = Field(  # a list in YAML, hence not strict
        (0.9, 0.95), strict=False, description="AdamW decay rates of the two moments"
    )
    eps: float = Field(1e-8, gt=0, description="AdamW epsilon")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    max_grad_norm: float = Field(1.0, ge=0, description="clip the global gradient norm to this; 0: never clip")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="decay after warm-up")
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the optimizer steps with rising learning rate")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="learning rate at the end, as a share of the peak")


MICRO_TOKENS = 8192


class LearnBlock(OptimBlock):
    """What both kinds of training share."""

    micro_tokens: int = Field(
        MICRO_TOKENS,
        ge=1,
        description="tokens per forward pass and device at most, a prompt that rows share counted once; a longer row"
        " goes alone. Never changes the result",
    )
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        None,
        description="rows per forward pass and device at most; auto: find micro_tokens by measuring memory",
    )
    max_skipped: int = Field(
        3,
        ge=1,
        description="so many updates in a row end the run that were left out because a number in them is not finite;"
        " 1: the first does",
    )
    seed: int = Field(0, ge=0, le=2**32 - 1, description="seed of everything random")


class TrainBlock(LearnBlock):
    """Offline training: passes over a fixed dataset."""

    epochs: float = Field(1.0, gt=0, description="passes over the data; ignored where `steps` is given")
    steps: int | None = Field(None, ge=1, description="optimizer steps")
    batch_size: int = Field(64, ge=1, description="rows per optimizer step, over all devices")


class OnlineTrainBlock(LearnBlock):
    """On-policy training: sample, score, then learn from the samples."""

    rollouts: int = Field(100, ge=1, description="rounds of sampling and learning")
    prompts: int = Field(64, ge=1, description="prompts per rollout, over all devices")
    answers: int = Field(1, ge=1, description="answers sampled per prompt")
    inner_epochs: int = Field(1, ge=1, description="passes over each rollout")
    minibatches: int = Field(1, ge=1, description="optimizer steps per pass; must divide prompts x answers")
    rollout_batch: int = Field(64, ge=1, description="answers sampled at a time on a device, while others wait")
    target_kl: float | None = Field(
        None, gt=0, description="make no further update on a rollout once the policy moved this far, in nats per token"
    )
    max_refills: int = Field(
        0, ge=0, description="further rounds of prompts that replace groups of equal scores (DAPO's dynamic sampling)"
    )


class SamplingBlock(Block):
    """How answers are sampled. The same distribution is used when log-probabilities are computed."""

    max_new_tokens: int = Field(128, ge=1, description="longest answer in tokens, end token included")
    temperature: float = Field(1.0, gt=0, description="divides the logits, when sampling and when training")
    top_p: float = Field(
        1.0, gt=0, le=1, description="sample from the smallest set of tokens with this probability; 1: off"
    )
    top_k: int = Field(0, ge=0, description="sample from the k most likely tokens; 0: off")
    stop: list[str] = Field([], description="further tokens that end an answer, beside the model's own end tokens")
    decode_dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="precision that answers are sampled in; auto: the model's own"
    )


class KeepBestBlock(Block):
    """The step that a metric is best at: its checkpoint is kept."""

    metric: str = Field(description="a name in metrics.jsonl, e.g. eval/loss")
    larger_is_better: bool = Field(description="false for a loss, true for an accuracy or a score")
    publish: bool = Field(False, description="publish the weights of the best step, not those of the last one")


class CheckpointBlock(Block):
    """Checkpoints for resuming. A request to stop writes one whatever stands here."""

    every: int = Field(0, ge=0, description="steps between checkpoints; 0: not by their number")
    minutes: float | None = Field(
        None, gt=0, description="minutes between checkpoints, whichever of `every` and this comes first"
    )
    keep: int = Field(2, ge=1, description="newest checkpoints kept")
    keep_best: KeepBestBlock | None = Field(
        None, description="also keep the checkpoint of the best step so far, written whenever the metric improves"
    )


class EvalBlock(Block):
    """Evaluation on held-out rows while training."""

    every: int = Field(0, ge=0, description="steps between evaluations; 0: only at the end")


class RecordBlock(Block):
    """Where the numbers of a stage go."""

    every: int = Field(1, ge=1, description="steps between rows of metrics.jsonl")
    tensorboard: bool = Field(False, description="also write TensorBoard events")
    wandb: str | None = Field(None, description="also log to this Weights & Biases project")


class LogBlock(RecordBlock):
    """What is shown and recorded while training."""

    samples_every: int = Field(0, ge=0, description="steps between sample generations; 0: only at start and end")
    samples: int = Field(3, ge=0, description="prompts that are sampled from each time")
    show_samples: bool = Field(True, description="print the samples on the console too")

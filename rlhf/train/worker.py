"""One stage from start to published result, on every rank: `run(job)`."""

from __future__ import annotations

import logging
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from rlhf.data import chat
from rlhf.data.examples import Loaded, load_examples
from rlhf.engine import dist
from rlhf.engine.finite import not_finite
from rlhf.errors import StoppedError, UserError, WorkerLostError
from rlhf.models.export import save_policy, save_scorer
from rlhf.models.statistics import set_statistics
from rlhf.recipe.schema import DataBlock
from rlhf.recipe.stages import OnlineRecipe, Recipe
from rlhf.run import commit
from rlhf.run.disk import free_bytes, require_room
from rlhf.run.layout import refuse_other_layout
from rlhf.run.opened import Opened
from rlhf.train import label as labelling
from rlhf.train import memory, merging, stages
from rlhf.train.checkpoints import Checkpoints, best_checkpoint, load_checkpoint
from rlhf.train.guards import check_weights
from rlhf.train.job import Job, Kind, data_kind
from rlhf.train.layout import adapter_base
from rlhf.train.loop import Stage, fit
from rlhf.train.metrics import MetricsLog
from rlhf.train.parts import Parts
from rlhf.train.preflight import check_models, check_needs, check_rewards, check_samples
from rlhf.train.progress import Progress
from rlhf.train.seeding import seed_everything
from rlhf.train.shared import published
from rlhf.train.signals import StopRequest
from rlhf.train.sound import check_parents, sound_checkpoint
from rlhf.train.standing import Standing, leave_together
from rlhf.train.token_cache import cache_key, cached_examples
from rlhf.train.tokenizers import check_published, stage_tokenizer
from rlhf.train.writing import library_writes

logger = logging.getLogger("rlhf.stage")


def run(job: Job, stop: StopRequest, held: Opened | None = None) -> bool:
    """Run, resume or recognise as finished. Returns True where there was nothing to do. Raises UserError.

    held: the stage folder where this process has opened it; ranks open it here, since all must hear of a refusal.
    """
    job = replace(job, stop=stop)
    if dist.start(job.rank_timeout_s).type == "cpu":
        memory.keep_freed()
    console = Console(stderr=True)
    with opened(job, held) as (mode, checkpoint), logging_to(job, console), in_users_words(), asked_to_stop(job):
        if checkpoint is not None:
            refuse_other_layout(checkpoint, {"devices": dist.world_size()})
        if mode == "finished":
            logger.info("%s was finished before with the same inputs", job.folder.path)
            dist.finish()
            return True
        check_parents(job)
        if job.stage == "label":
            label(job, console)
        elif job.stage == "merge":
            merging.merge(job, devices())
        else:
            train(job, checkpoint, console)
    dist.finish()
    return False


def train(job: Job, checkpoint: Path | None, console: Console) -> None:
    """Data, models, loop, publication."""
    recipe, folder = job.recipe, job.folder
    checkpoint = sound_checkpoint(folder.checkpoints, checkpoint)
    tokenizer, data = prepare(job)
    base = adapter_base(job)  # now, while the parents are what they were checked to be
    parts = stages.assemble(job, tokenizer, data)
    first_step = load_checkpoint(checkpoint, parts.running()) if checkpoint else 0
    if first_step:
        logger.info("goes on after step %d of %d", first_step, parts.steps)
    written = first_step - (parts.standing.unfinished is not None)  # steps whose rows are in the logs
    with (
        Checkpoints(folder, parts.running(), recipe.checkpoint.keep) as checkpoints,
        Progress(title(job), parts.steps, written, console) as progress,
    ):
        stage = stages.to_stage(
            job,
            parts,
            tokenizer,
            progress,
            checkpoints,
            report=lambda done, name, value: heartbeat(job, parts.steps, done, name, value, parts.standing),
        )
        metrics = go_through(job, stage, first_step, progress)
    log_best(job, parts)
    publish(job, parts, tokenizer, base, published_step(job, parts))
    log_key_metric(job, stage, metrics)


def label(job: Job, console: Console) -> None:
    """Prompts, models, answers, pairs; no weight changes."""
    tokenizer, data = prepare(job)
    source = labelling.collector(job, tokenizer, data.train)
    first_step = dist.from_main(dist.agreed(lambda: labelling.go_on(source) if dist.is_main() else None))
    stage = labelling.to_stage(source, lambda done, name, value: heartbeat(job, source.steps, done, name, value))
    with Progress(title(job), source.steps, first_step, console) as progress:
        metrics = go_through(job, stage, first_step, progress)
    refusal: UserError | None = None
    if dist.is_main():
        try:
            labelling.publish(source)
        except UserError as error:  # the other ranks must hear of it
            refusal = error
    if (refusal := dist.from_main(refusal)) is not None:
        raise refusal
    log_key_metric(job, stage, metrics)


def prepare(job: Job) -> tuple[PreTrainedTokenizerFast, Loaded]:
    """Tokenizer and data, and what can be refused without a model; how the stage is made is written down."""
    folder, seed, kind = job.folder, job.seed, data_kind(job.recipe)
    seed_everything(seed)
    tokenizer = stage_tokenizer(job, kind)
    check_models(job, tokenizer)
    data = load_data(job, tokenizer, kind)
    dist.agreed(lambda: check_rewards(job, tokenizer, data.train))
    check_needs(job, data)
    check_samples(job, tokenizer, data)
    facts = report_data(data)
    if dist.is_main():
        folder.write_recipe(job.recipe_text, job.resolved_text)
        folder.write_provenance(devices=devices(), seed=seed, parents=job.distinct_parents(), data=facts)
    return tokenizer, data


def title(job: Job) -> str:
    """What the progress line calls the stage."""
    return job.stage if job.folder.name == job.stage else f"{job.stage} {job.folder.name}"


def go_through(job: Job, stage: Stage, first_step: int, progress: Progress) -> dict[str, float]:
    """The loop, from a step on. From here on a request to stop waits until what was learned is on the disk."""
    folder, stop = job.folder, job.stop
    if dist.is_main():
        folder.cut_logs(first_step, redo=stage.standing.unfinished is not None)
    dist.barrier()
    stop.after_step = True
    leave_together(stop)  # where a request came while the interpreter could not be interrupted
    with closing(MetricsLog(folder.metrics, job.recipe.log, f"{folder.root.name}/{folder.name}", first_step)) as log:
        return fit(stage, first_step, log, progress, stop)


def log_key_metric(job: Job, stage: Stage, metrics: dict[str, float]) -> None:
    """The stage's last word."""
    key = metrics.get(stage.key_metric)
    logger.info("%s: %s %s", job.folder.path, stage.key_metric, "-" if key is None else f"{key:.4g}")


def log_best(job: Job, parts: Parts) -> None:
    """Where the best step is."""
    watched, best = parts.standing.watched, parts.standing.best
    if watched is not None and best is None:
        logger.warning("checkpoint.keep_best: no step had %s, so that none is the best", watched.metric)
    elif watched is not None and best is not None:
        where = "the last one" if best.step == parts.steps else str(job.folder.checkpoint(best.step))
        logger.info("best %s: %.4g, of step %d: %s", watched.metric, best.value, best.step, where)


def published_step(job: Job, parts: Parts) -> int:
    """The step whose weights are published, which the models have from here on."""
    watched, best = parts.standing.watched, parts.standing.best
    if watched is None or not watched.publish or best is None or best.step == parts.steps:
        return parts.steps
    path = job.folder.checkpoint(best.step)
    commit.verify(path, hash_limit=None)
    return load_checkpoint(path, replace(parts.running(), standing=Standing()))


def load_data(job: Job, tokenizer: PreTrainedTokenizerFast, kind: Kind) -> Loaded:
    """The stage's rows, and supervised ones where the recipe mixes them in."""
    recipe = job.recipe
    data = load_rows(job, tokenizer, recipe.data, kind)
    if isinstance(recipe, OnlineRecipe) and recipe.pretraining is not None:
        data = replace(data, pretraining=load_rows(job, tokenizer, recipe.pretraining.data, "tokens"))
    return data


def load_rows(job: Job, tokenizer: PreTrainedTokenizerFast, data: DataBlock, kind: Kind) -> Loaded:
    """Tokenised rows of one block of a recipe, from an earlier start where it kept them."""
    if kind == "prompts":
        return load_examples(data, tokenizer, kind, job.seed, max_new_tokens=job.new_tokens())
    found = {key: value for key, value in job.inputs["data"].items() if f"{key}.".startswith(f"{data.key}.")}
    key = cache_key(data, tokenizer, kind, job.seed, found)
    return cached_examples(job.folder.root / "cache", key, lambda: load_examples(data, tokenizer, kind, job.seed))


def report_data(data: Loaded) -> dict[str, Any]:
    """Say what was read; returns the same for provenance.json."""
    facts = data.report.as_dict()
    for line in data.report.lines():
        logger.info(line)
    if data.pretraining is not None:
        facts["pretraining"] = data.pretraining.report.as_dict()
        for line in data.pretraining.report.lines():
            logger.info("pretraining: %s", line)
    return facts


def heartbeat(
    job: Job, steps: int, done: int, name: str, value: float | None, standing: Standing | None = None
) -> None:
    """Keep status.json up to date."""
    if dist.is_main():
        best = None if standing is None else standing.told()
        job.folder.write_status(step=done, total_steps=steps, key_metric={"name": name, "value": value}, best=best)


def publish(
    job: Job, parts: Parts, tokenizer: PreTrainedTokenizerFast, base: dict[str, str | None] | None, step: int
) -> None:
    """Write the trained models as Hugging Face folders; the manifest comes last.

    base: what an adapter stands on. step: whose weights these are.
    """
    statistics = parts.statistics() if parts.statistics is not None else None
    if statistics is not None:
        set_statistics(parts.published["model"][0].module.core.config, statistics)
    for part, (engine, _) in parts.published.items():
        average = parts.averages[part] if part in parts.averages else None
        with average.swapped() if average is not None else nullcontext():
            state = engine.state_dict()
        dist.agreed(partial(refuse_not_finite, job, part, state))
        dist.agreed(partial(export, job, parts, tokenizer, part, state))
    kind = parts.published["model"][1]
    facts = {
        "base": base_model(job),
        "tokenizer_hash": chat.tokenizer_hash(tokenizer),
        "template_hash": chat.template_hash(tokenizer),
        "stop_ids": sorted(parts.stop_ids),
        "pad_id": tokenizer.pad_token_id,
        "head": None if kind == "policy" else "score",
        "dtype": job.recipe.model.dtype,
        "lora": job.recipe.model.lora is not None,
        "step": step,
        **(statistics.facts() if statistics is not None else {}),
        "adapter_base": base,
    }
    dist.agreed(lambda: job.folder.publish(kind, facts, parts.steps) if dist.is_main() else None)


def export(
    job: Job, parts: Parts, tokenizer: PreTrainedTokenizerFast, part: str, state: dict[str, torch.Tensor] | None
) -> None:
    """Write one trained model on rank 0, which has its whole weights, and see that it reads back.

    Older checkpoints make room for it.
    """
    if state is None:
        return
    engine, kind = parts.published[part]
    if kind == "policy":  # plain `generate` must stop where our rollouts do
        engine.module.core.generation_config.eos_token_id = parts.stop_ids
    module, weights = published(engine, state)
    needs = sum(weight.numel() * weight.element_size() for weight in weights.values())
    if free_bytes(job.folder.path) < needs:
        gone = commit.make_room(job.folder.checkpoints, best_checkpoint(job.folder, parts.standing))
        logger.warning("little room for the result; deleted: %s", ", ".join(gone) or "nothing")
        require_room(job.folder.path, needs)
    target = job.folder.export_dir(part)
    with library_writes(target, needs):
        (save_policy if kind == "policy" else save_scorer)(module, tokenizer, target, weights)
    check_published(target, tokenizer)


def refuse_not_finite(job: Job, part: str, state: dict[str, torch.Tensor] | None) -> None:
    """Weights that are about to be published are finite, or nothing is."""
    fix = f"Nothing is published; checkpoints are in {job.folder.checkpoints}. Lower train.lr."
    check_weights(not_finite(state or {}), str(job.folder.path / part), fix)


def base_model(job: Job) -> str:
    """What the trained model was before: a stage, a folder or hub id, or nothing."""
    return "init" if job.recipe.model.init else job.recipe.model.from_ or str(job.recipe.model.path)


def devices() -> list[str]:
    """Names of the devices of this node."""
    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"]


# --- the stage folder and the log -------------------------------------------------------------------------------------


@contextmanager
def opened(job: Job, held: Opened | None) -> Iterator[tuple[str, Path | None]]:
    """The stage folder, held by the caller or by rank 0; a refusal reaches every rank."""
    if held is not None:
        yield held.mode, held.checkpoint
        return
    answer: tuple[str, Path | None] | Exception | None = None
    if dist.is_main():
        try:
            held = job.folder.open(job.inputs, restart=job.restart, launcher=job.launcher)
            answer = (held.mode, held.checkpoint)
        except Exception as error:  # noqa: BLE001  the other ranks must hear of it, whatever it is
            answer = error
    answer = dist.from_main(answer)
    if isinstance(answer, Exception):
        raise answer
    if held is None:
        yield answer
    else:
        with held:
            yield answer


@contextmanager
def in_users_words() -> Iterator[None]:
    """Say what happened, and what to do, where memory runs out or another rank is gone; phases within say it closer."""
    with memory.phase("the stage outside of its steps", "the size of the models or of the data"):
        yield


@contextmanager
def asked_to_stop(job: Job) -> Iterator[None]:
    """Inside, a file STOP in the stage folder and the end of `max_minutes` are requests to stop."""
    minutes = job.recipe.max_minutes if isinstance(job.recipe, Recipe) else None
    with job.stop.watching(job.folder.stop, minutes):
        yield


class ConsoleHandler(logging.Handler):
    """Log lines above the progress bar, unbroken, warnings in yellow."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else ""
        self.console.print(self.format(record), style=style, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def logging_to(job: Job, console: Console) -> Iterator[None]:
    """The stage's log: log.txt and the console on rank 0, warnings of other ranks on the console."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    root = logging.getLogger("rlhf")
    screen = ConsoleHandler(console)
    screen.setLevel(logging.INFO if dist.is_main() else logging.WARNING)
    handlers: list[logging.Handler] = [screen, *([job.folder.log_handler()] if dist.is_main() else [])]
    before = root.level
    root.setLevel(logging.INFO)
    for handler in handlers:
        root.addHandler(handler)
    started = time.monotonic()
    try:
        yield
        logger.info("%.1f s in this process", time.monotonic() - started)
    except (StoppedError, WorkerLostError) as error:
        logger.info(str(error.what))
        raise
    except Exception as error:
        if not (dist.is_main() or isinstance(error, UserError)):  # a failure of this rank alone
            handlers.append(job.folder.log_handler())
        for handler in handlers[1:]:  # the traceback is for the file; the user sees the message
            handler.handle(root.makeRecord(root.name, logging.ERROR, __file__, 0, "failed", (), sys.exc_info()))
        raise
    finally:
        root.setLevel(before)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()

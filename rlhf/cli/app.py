"""The `rlhf` command. Options are declared once for all stages; everything heavy is imported inside commands."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from rlhf import __version__
from rlhf.errors import RecipeError, ResourceError, StoppedError, UserError, WorkerLostError
from rlhf.pulse import RANK_TIMEOUT_S, WATCHDOG_S

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 120},
)

RecipeArgument = Annotated[Path, typer.Argument(help="the stage's YAML recipe", show_default=False)]
RunOption = Annotated[Path, typer.Option("--run", help="run directory; stages find each other in it")]
RunArgument = Annotated[Path, typer.Argument(help="run directory", show_default=False)]
NameOption = Annotated[str | None, typer.Option("--name", help="name of the stage folder; default: the stage")]
SetOption = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="override a recipe key; repeatable")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="print the resolved recipe and the batch arithmetic")]
GpusOption = Annotated[int | None, typer.Option("--gpus", min=1, help="devices per node; ranks on a CPU")]
NodesOption = Annotated[int | None, typer.Option("--num-nodes", min=1, help="nodes of the host file to use")]
HostfileOption = Annotated[Path | None, typer.Option("--hostfile", help="DeepSpeed host file: lines `host slots=n`")]
RestartOption = Annotated[bool, typer.Option("--restart", help="begin again; the old folder is kept as NAME.old-n")]
CodeOption = Annotated[list[Path], typer.Option("--allow-code", metavar="FILE", help="reward file that may run")]
ForeignOption = Annotated[bool, typer.Option("--allow-foreign", help="work in a run directory of another user")]
TrustOption = Annotated[
    list[str], typer.Option("--trust-code", metavar="MODEL@REVISION", help="model whose own code may run")
]
MOST_S = 10 * 24 * 3600
WatchdogOption = Annotated[
    int,
    typer.Option("--watchdog", metavar="SECONDS", min=2, max=MOST_S, help="a rank silent for so long is lost"),
]
TimeoutOption = Annotated[
    int,
    typer.Option("--rank-timeout", metavar="SECONDS", min=1, max=MOST_S, help="how long a rank waits for others"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="machine-readable output")]

LATER_RANK_S = 5.0
# What an operating system may answer to a path that a user has named; other failures of files are ours.
REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG)
STAGES = {
    "sft": "Supervised fine-tuning on completions.",
    "rm": "Reward model on preference pairs or lists.",
    "ppo": "PPO with a critic against a reward.",
    "grpo": "GRPO: groups of answers instead of a critic.",
    "dpo": "DPO and its family, on pairs, single labelled answers or lists.",
    "label": "Preference pairs from a policy: answers sampled, scored and compared.",
    "merge": "One policy from several that were trained from the same base.",
}


def show_version(wanted: bool) -> None:
    """Print the version and end."""
    if wanted:
        typer.echo(f"rlhf {__version__}")
        raise typer.Exit


@app.callback(help="RLHF as a pipeline of commands: SFT, reward model, then PPO, GRPO or DPO.")
def options(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    pass


def stage_function(stage: str) -> Callable[..., None]:
    """The command of one stage; all have these options."""

    def command(
        recipe: RecipeArgument,
        run: RunOption,
        name: NameOption = None,
        set_: SetOption = [],  # noqa: B006  typer copies it
        dry_run: DryRunOption = False,
        gpus: GpusOption = None,
        num_nodes: NodesOption = None,
        hostfile: HostfileOption = None,
        restart: RestartOption = False,
        allow_code: CodeOption = [],  # noqa: B006
        allow_foreign: ForeignOption = False,
        trust_code: TrustOption = [],  # noqa: B006
        watchdog: WatchdogOption = WATCHDOG_S,
        rank_timeout: TimeoutOption = RANK_TIMEOUT_S,
    ) -> None:
        from rlhf.cli.stages import StageCommand, run_stage

        ranks, waits = (gpus, num_nodes, hostfile), (watchdog, rank_timeout)
        allowed = (allow_code, allow_foreign, trust_code)
        run_stage(StageCommand(stage, recipe, run, name, set_, dry_run, *ranks, restart, *allowed, *waits))

    return command


for _stage, _help in STAGES.items():
    app.command(_stage, help=_help)(stage_function(_stage))
app.command("reward-model", help="The same as rm.", hidden=True)(stage_function("rm"))


@app.command("run", help="All stages of a pipeline file in order, skipping what is finished.")
def run_pipeline(
    pipeline: Annotated[Path, typer.Argument(help="pipeline YAML", show_default=False)],
    run: RunOption,
    set_: SetOption = [],  # noqa: B006
    dry_run: DryRunOption = False,
    gpus: GpusOption = None,
    num_nodes: NodesOption = None,
    hostfile: HostfileOption = None,
    allow_code: CodeOption = [],  # noqa: B006
    allow_foreign: ForeignOption = False,
    trust_code: TrustOption = [],  # noqa: B006
    watchdog: WatchdogOption = WATCHDOG_S,
    rank_timeout: TimeoutOption = RANK_TIMEOUT_S,
) -> None:
    from rlhf.cli.pipeline import PipelineOptions, run_all

    ranks, waits = (gpus, num_nodes, hostfile), (watchdog, rank_timeout)
    run_all(pipeline, PipelineOptions(run, set_, dry_run, *ranks, allow_code, allow_foreign, trust_code, *waits))


@app.command(help="Stages of a run directory: state, step, key metric, parents.")
def status(run: RunArgument, as_json: JsonOption = False) -> None:
    from rlhf.cli.inspect import show_status

    show_status(run, as_json=as_json)


@app.command(help="The first rows of a recipe's data as tokens: trained, context, dropped.")
def show(
    recipe: RecipeArgument,
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="rows")] = 3,
    stage: Annotated[str | None, typer.Option("--stage", help="stage of the recipe; default: its file name")] = None,
    run: Annotated[Path | None, typer.Option("--run", help="run directory, for models named `from:`")] = None,
    set_: SetOption = [],  # noqa: B006
) -> None:
    from rlhf.cli.inspect import show_data

    show_data(recipe, stage, run, set_, count)


@app.command(help="Every loss of rlhf dpo and rlhf rm: paper, rows, what it needs, default options.")
def losses(as_json: JsonOption = False) -> None:
    from rlhf.cli.losses import show_losses

    show_losses(as_json=as_json)


@app.command(help="What a recipe's data is like: length bias, duplicates, contradictions, overlap, label noise.")
def data(
    recipe: RecipeArgument,
    stage: Annotated[str | None, typer.Option("--stage", help="stage of the recipe; default: its file name")] = None,
    run: Annotated[Path | None, typer.Option("--run", help="run directory, for models named `from:`")] = None,
    set_: SetOption = [],  # noqa: B006
    reward: Annotated[
        str | None, typer.Option("--reward", help="reward model that judges the labels: a stage or a model folder")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    from rlhf.cli.data import DataCommand, report_data

    report_data(DataCommand(recipe, stage, run, set_, reward, as_json))


@app.command(help="What a recipe key means: type, default, range.")
def explain(
    key: Annotated[str, typer.Argument(help="dotted key, e.g. train.lr", show_default=False)],
    stage: Annotated[str | None, typer.Option("--stage", help="one stage only")] = None,
) -> None:
    from rlhf.recipe.explain import explain as explain_key

    typer.echo(explain_key(key, stage))


@app.command(help="JSON Schema of a stage's recipe, for editors.")
def schema(stage: Annotated[str, typer.Argument(help=", ".join(STAGES), show_default=False)]) -> None:
    from rlhf.recipe.explain import json_schema

    if stage not in STAGES:
        raise RecipeError(f"expected one of {', '.join(STAGES)}, found {stage!r}", where="rlhf schema")
    typer.echo(json.dumps(json_schema(stage), indent=2))


evaluation = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(evaluation, name="eval", help="Judge finished stages.")


@evaluation.command("demo", help="Judge a demo run with its gold reward: the closing table.")
def judge_demo(run: RunArgument) -> None:
    from rlhf.eval.demo import evaluate_demo

    if not evaluate_demo(run):
        sys.exit(1)


@evaluation.command("implicit-reward", help="Score pairs by beta log(policy / reference), beside a reward model.")
def judge_implicit_reward(
    run: RunArgument,
    data: Annotated[list[str], typer.Option("--data", help="file or folder of pairs, hub id, or demo:...; repeatable")],
    policy: Annotated[str, typer.Option("--policy", help="stage that learned from pairs")] = "dpo",
    reference: Annotated[str | None, typer.Option("--reference", help="stage; default: what it learned from")] = None,
    reward: Annotated[str | None, typer.Option("--reward", help="stage of a reward model to compare with")] = None,
    beta: Annotated[float | None, typer.Option("--beta", help="scale of the reward; default: of its loss")] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=0, help="pairs to show with every token's credit")] = 0,
    as_json: JsonOption = False,
) -> None:
    from rlhf.eval.implicit import Question, evaluate_implicit

    evaluate_implicit(Question(run, policy, data, reference, reward, beta, tokens, as_json))


@app.command(help="One page with everything a run directory knows: report/report.html.")
def report(run: RunArgument) -> None:
    from rlhf.report.page import write_report

    typer.echo(write_report(run))


@app.command(help="Is this machine fit for a run? Installation, devices, memory, ports, disk, limits.")
def doctor(
    run: Annotated[Path | None, typer.Option("--run", help="also try the disk of this run directory")] = None,
    selftest: Annotated[
        bool, typer.Option("--selftest", help="also kill tiny runs and compare what resumes with what was not killed")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    from rlhf.cli.doctor import examine

    examine(run, selftest=selftest, as_json=as_json)


def main() -> None:
    """Run the command; turn a UserError into its message and exit code."""
    if "RANK" in os.environ:  # DeepSpeed's launcher adds an argument of its own; the environment says the same
        sys.argv = [word for word in sys.argv if not word.startswith("--local_rank=")]
    try:
        app()
    except UserError as error:
        wait_for_first_rank()
        if not (isinstance(error, WorkerLostError) and is_ours()):  # the command that started the ranks knows more
            print(error if isinstance(error, StoppedError) else f"error: {error}", file=sys.stderr, flush=True)
        leave(error.exit_code)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        wait_for_first_rank()
        fix = "Name another path, or change its permissions or the space on its disk."
        print(f"error: {error.filename}: {error.strerror}\n  {fix}", file=sys.stderr, flush=True)
        leave(ResourceError.exit_code)
    except KeyboardInterrupt:
        leave(130)
    except Exception:
        if "RANK" not in os.environ:
            raise
        traceback.print_exc()
        leave(UserError.exit_code)


def wait_for_first_rank() -> None:
    """Ranks often fail together, with the same to say: the later ones give the launcher time to end them unheard."""
    if os.environ.get("RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(LATER_RANK_S)


def is_ours() -> bool:
    """Whether this is a rank that `rlhf --gpus` has started."""
    from rlhf.launch import launcher_pid

    return launcher_pid() is not None


def leave(code: int) -> None:
    """Exit at once where other ranks may be gone: waiting for their goodbye would hang."""
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)

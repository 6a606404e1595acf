"""Who may import whom. Algorithms never see a model, models never see an engine, the run directory never sees torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rlhf"
STDLIB = set(sys.stdlib_module_names)

# package -> what its files may import beside the standard library, their own package and rlhf.errors
ALLOWED = {
    "algo": {"torch", "rlhf.batch"},
    "batch": {"torch", "typing_extensions"},
    "bounds": set(),
    "recipe": {"annotated_types", "pydantic", "pydantic_core", "yaml", "typing_extensions"},
    "run": set(),
    "pulse": set(),
    "processes": {"rlhf.pulse"},
    "launch": {"rlhf.processes", "rlhf.pulse"},
    "data": {
        "datasets", "jinja2", "numpy", "pyarrow", "rich", "tokenizers", "torch", "transformers",
        "rlhf.batch", "rlhf.bounds", "rlhf.recipe",
    },
    "models": {
        "numpy", "peft", "safetensors", "tokenizers", "torch", "transformers", "rlhf.batch", "rlhf.recipe",
        "rlhf.algo.logprobs",
    },
    "rewards": {
        "torch", "rlhf.batch", "rlhf.bounds", "rlhf.data.demo", "rlhf.recipe", "rlhf.models", "rlhf.algo.registry",
    },
    "engine": {"deepspeed", "safetensors", "torch", "transformers", "rlhf.batch", "rlhf.pulse", "rlhf.recipe"},
    "train": {
        "rich", "safetensors", "tensorboard", "tokenizers", "torch", "transformers", "wandb", "rlhf.__version__",
        "rlhf.algo", "rlhf.batch", "rlhf.data", "rlhf.engine", "rlhf.launch", "rlhf.models", "rlhf.pulse",
        "rlhf.recipe",
        "rlhf.rewards", "rlhf.run",
    },
    "eval": {
        "rich", "torch", "transformers", "rlhf.algo", "rlhf.batch", "rlhf.data", "rlhf.models", "rlhf.recipe",
        "rlhf.report", "rlhf.run",
    },
    "report": {"matplotlib", "rich", "yaml", "rlhf.recipe", "rlhf.run"},
    "doctor": {"rlhf.__version__", "rlhf.data.demo", "rlhf.recipe", "rlhf.run"},
    "cli": {
        "rich", "typer", "rlhf.__version__", "rlhf.doctor", "rlhf.launch", "rlhf.models.folder", "rlhf.models.trust",
        "rlhf.pulse", "rlhf.recipe",
        "rlhf.report", "rlhf.run",
        "rlhf.train.job", "rlhf.train.signals",
    },
}  # fmt: skip
# `cli` may import these inside functions only: they are heavy, and a recipe must be refused in a blink.
# `doctor` asks torch in a process of its own.
LAZY = {"cli": {"rlhf.train", "rlhf.eval", "rlhf.data"}, "doctor": {"torch"}}
ONLY_ENGINE = ("deepspeed", "torch.distributed")


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def owner(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, whether the import stands at the top) of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set(map(id, tree.body))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [(f"{node.module}.{alias.name}", id(node) in top) for alias in node.names]
    return found


def is_within(module: str, allowed: set[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in allowed)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports(path):
    package = owner(path)
    if package in ("__init__", "__main__", "errors"):
        assert all(module.split(".")[0] in STDLIB or module == "rlhf.cli.app.main" for module, _ in imports(path))
        return
    allowed = ALLOWED[package] | {"rlhf.errors", f"rlhf.{package}"}
    for module, is_top in imports(path):
        if module.split(".")[0] in STDLIB:
            continue
        may = allowed if is_top else allowed | LAZY.get(package, set())
        assert is_within(module, may), f"{path.relative_to(ROOT)} imports {module}"


def test_deepspeed_has_one_home():
    for path in files():
        for module, _ in imports(path):
            if is_within(module, set(ONLY_ENGINE)):
                assert owner(path) == "engine", f"{path.relative_to(ROOT)} imports {module}"


# What a command must not import, since the user waits for it. Stages import `datasets` and `pyarrow` where their data
# is on the hub, in Parquet or kept from an earlier start, and what draws or reports where a recipe asks for it.
NOT_FOR_STAGES = {"datasets", "matplotlib", "pandas", "pyarrow", "tensorboard", "wandb"}
NOT_FOR_RECIPES = NOT_FOR_STAGES | {"deepspeed", "jinja2", "numpy", "peft", "tokenizers", "torch", "transformers"}
NOT_FOR_HELP = NOT_FOR_RECIPES | {"rlhf.recipe", "rlhf.run", "yaml"}


def imported(code: str, *arguments: str) -> set[str]:
    """The modules that a fresh Python has imported at the end of the code."""
    told = f"import sys\n{code}\nprint('imported:', *sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", told, *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert "imported: " in done.stdout, done.stdout + done.stderr
    return set(done.stdout.rpartition("imported: ")[2].split())


def after(*arguments: str, expected: int) -> set[str]:
    """The modules that are imported when a command has ended with the expected code."""
    code = "\n".join(
        (
            "from rlhf.cli.app import main",
            "sys.argv = ['rlhf', *sys.argv[1:]]",
            "try:\n    main()\nexcept SystemExit as end:\n    code = end.code or 0",
            f"assert code == {expected}, code",
        )
    )
    return imported(code, *arguments)


@pytest.mark.parametrize("words", [["--help"], ["sft", "--help"]], ids=" ".join)
def test_help_imports_next_to_nothing(words):
    assert not NOT_FOR_HELP & after(*words, expected=0)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("model: {path: x}\ndata: {path: y}\ntrane: {}\n", 2),  # a key that there is not
        ("model: {path: x}\ndata: {path: y.jsonl}\n", 3),  # a file that there is not
        ("model: {init: {context: 64}}\ndata: {path: demo:sft}\n", 2),  # keys that do not go together
    ],
)
def test_recipe_errors_come_before_anything_heavy(tmp_path, text, code):
    recipe = tmp_path / "sft.yaml"
    recipe.write_text(text)
    assert not NOT_FOR_RECIPES & after("sft", str(recipe), "--run", str(tmp_path / "run"), expected=code)


def test_stages_import_no_more_than_they_use():
    modules = imported("import rlhf.train.worker")
    assert {"torch", "transformers", "deepspeed"} <= modules
    assert not NOT_FOR_STAGES & modules


def test_files_stay_readable():
    for path in files():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 420, path

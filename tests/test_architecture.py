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
    "recipe": {"annotated_types", "pydantic", "pydantic_core", "yaml", "typing_extensions"},
    "run": set(),
    "launch": set(),
    "data": {
        "datasets", "jinja2", "numpy", "pyarrow", "rich", "tokenizers", "torch", "transformers",
        "rlhf.batch", "rlhf.recipe",
    },
    "models": {
        "numpy", "peft", "safetensors", "tokenizers", "torch", "transformers", "rlhf.batch", "rlhf.recipe",
        "rlhf.algo.logprobs",
    },
    "rewards": {"torch", "rlhf.batch", "rlhf.data.demo", "rlhf.recipe", "rlhf.models", "rlhf.algo.registry"},
    "engine": {"deepspeed", "safetensors", "torch", "transformers", "rlhf.batch", "rlhf.recipe"},
    "train": {
        "rich", "safetensors", "torch", "transformers", "wandb", "rlhf.algo", "rlhf.batch", "rlhf.data", "rlhf.engine",
        "rlhf.launch", "rlhf.models", "rlhf.recipe", "rlhf.rewards", "rlhf.run",
    },
    "eval": {
        "rich", "torch", "transformers", "rlhf.algo", "rlhf.batch", "rlhf.data", "rlhf.models", "rlhf.recipe",
        "rlhf.report", "rlhf.run",
    },
    "report": {"matplotlib", "rich", "yaml", "rlhf.recipe", "rlhf.run"},
    "cli": {
        "rich", "typer", "rlhf.__version__", "rlhf.launch", "rlhf.models.folder", "rlhf.recipe", "rlhf.report",
        "rlhf.run",
        "rlhf.train.job", "rlhf.train.signals",
    },
}  # fmt: skip
# `cli` may import these inside functions only: they are heavy, and a recipe must be refused in a blink.
LAZY = {"cli": {"rlhf.train", "rlhf.eval", "rlhf.data"}}
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


def test_help_and_recipe_errors_come_without_torch(tmp_path):
    recipe = tmp_path / "sft.yaml"
    recipe.write_text("model: {path: x}\ndata: {path: y}\ntrane: {}\n")
    code = (
        "import sys\n"
        "from rlhf.cli.app import main\n"
        "sys.argv = ['rlhf', *sys.argv[1:]]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    code = end.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'deepspeed', 'peft', 'matplotlib'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy), 'code:', code or 0)\n"
    )
    for arguments, expected in ((["--help"], 0), (["sft", str(recipe), "--run", str(tmp_path / "run")], 2)):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert f"heavy: [] code: {expected}" in done.stdout, done.stdout + done.stderr


def test_files_stay_readable():
    for path in files():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 420, path

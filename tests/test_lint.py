"""What the source must not contain: every way to run code that comes from data has one guarded home, or none."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

PACKAGE = Path(__file__).parents[1] / "rlhf"
FILES = sorted(PACKAGE.rglob("*.py"))
UNPICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
# Called by their bare names these run text.
RUN_TEXT = {"eval", "exec", "compile", "__import__", "execfile"}
# As attributes, of whatever module.
BANNED = {
    "torch.load": "rlhf/engine/files.py",
    "torch.jit.load": None,
    "torch.hub.load": None,
    "numpy.load": None,
    "np.load": None,
    "yaml.load": None,
    "yaml.load_all": None,
    "yaml.full_load": None,
    "yaml.unsafe_load": None,
    "yaml.Loader": None,
    "yaml.UnsafeLoader": None,
    "yaml.FullLoader": None,
    "os.system": None,
    "os.popen": None,
    "importlib.import_module": None,
    "sympy.sympify": None,
}
HOMES = {"spec_from_file_location": "rlhf/rewards/user_code.py", "apply_chat_template": "rlhf/data/chat.py"}


def name(path: Path) -> str:
    return path.relative_to(PACKAGE.parent).as_posix()


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute, "" of anything else."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def findings(tree: ast.AST, place: str) -> Iterator[str]:
    """Every use of what is banned in a file."""
    for node in ast.walk(tree):
        line = f"{place}:{node.lineno}" if hasattr(node, "lineno") else place
        if isinstance(node, ast.Import):
            yield from imports([alias.name for alias in node.names], place, line)
        elif isinstance(node, ast.ImportFrom):
            yield from imports([f"{node.module}.{alias.name}" for alias in node.names], place, line)
        elif isinstance(node, ast.Call):
            yield from calls(node, place, line)
        elif isinstance(node, ast.Attribute):
            full = dotted(node)
            if (full in BANNED and BANNED[full] != place) or (node.attr in HOMES and HOMES[node.attr] != place):
                yield f"{line}: {full or node.attr}"
            if node.attr in ("parse_expr", "sympify", "literal_eval"):
                yield f"{line}: {node.attr}"
        elif isinstance(node, ast.Dict) and place != "rlhf/models/load.py":
            if any(isinstance(key, ast.Constant) and key.value == "trust_remote_code" for key in node.keys):
                yield f"{line}: trust_remote_code"


def imports(names: list[str], place: str, line: str) -> Iterator[str]:
    """Of an import: unpicklers, templates beside transformers' sandbox, and what is banned as an attribute."""
    for full in names:
        if full.split(".")[0] in UNPICKLERS and place != "rlhf/engine/files.py":
            yield f"{line}: {full}"
        if full in BANNED and BANNED[full] != place:
            yield f"{line}: {full}"
        if full.split(".")[0] == "jinja2" and not full.startswith("jinja2.exceptions."):
            yield f"{line}: {full}: templates are rendered by transformers' sandbox alone"


def calls(node: ast.Call, place: str, line: str) -> Iterator[str]:
    """Of a call: text that is run, a shell, an unpickler that may do anything, trust that is written down."""
    if isinstance(node.func, ast.Name) and node.func.id in RUN_TEXT:
        yield f"{line}: {node.func.id}"
    for keyword in node.keywords:
        value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
        if keyword.arg in ("shell", "allow_pickle", "trust_remote_code") and value is True:
            yield f"{line}: {keyword.arg}=True"
        if keyword.arg == "weights_only" and value is not True:
            yield f"{line}: weights_only={ast.unparse(keyword.value)}"
    if dotted(node.func) == "torch.load" and "weights_only" not in [keyword.arg for keyword in node.keywords]:
        yield f"{line}: torch.load without weights_only"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_nothing_runs_what_it_reads(path):
    assert not list(findings(ast.parse(path.read_text(encoding="utf-8")), name(path)))


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from pickle import loads", "import marshal", "torch.load(f, weights_only=True)",
        "from torch import load", "yaml.load(f, Loader=L)", "yaml.unsafe_load(f)", "eval(x)", "exec(x)", "compile(x)",
        "__import__(x)", "os.system(x)", "subprocess.run(x, shell=True)", "np.load(f, allow_pickle=True)",
        "importlib.import_module(x)", "from jinja2 import Environment", "import jinja2", "ast.literal_eval(x)",
        "from jinja2.sandbox import SandboxedEnvironment", "tokenizer.apply_chat_template(x)", "sympy.parse_expr(x)",
        "A.from_pretrained(x, trust_remote_code=True)", "{'trust_remote_code': True}", "u.spec_from_file_location(x)",
    ],
)  # fmt: skip
def test_the_lint_sees(text):
    assert list(findings(ast.parse(text), "rlhf/somewhere.py")), text


@pytest.mark.parametrize(
    "text", ["torch.load(f)", "torch.load(f, weights_only=False)", "torch.load(f, weights_only=x)"]
)
def test_the_one_home_of_torch_load_reads_weights_only(text):
    assert list(findings(ast.parse(text), "rlhf/engine/files.py")), text


def test_templates_are_rendered_in_the_immutable_sandbox():
    template = chat_template_utils._compile_jinja_template("{{ messages }}")
    assert isinstance(template.environment, ImmutableSandboxedEnvironment)

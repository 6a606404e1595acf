"""A policy's weights by name, one tensor at a time where its files allow it: models need not fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from rlhf.models.build import Setup, build_policy
from rlhf.models.folder import check_files, is_adapter, read_json
from rlhf.models.load import reading

Reader = Callable[[str], Tensor]
FROZEN = Setup.frozen("fp32", "eager")  # loaded for its weights alone: any attention does


@contextmanager
def weights_of(
    source: str, revision: str | None, like: nn.Module, tokenizer: PreTrainedTokenizerFast
) -> Iterator[Reader]:
    """A function from the names of `like`'s parameters to the tensors of a folder, adapter folder or hub id.

    Tensors come from the files where those have the names of `like`. Otherwise (an adapter, a hub id, a checkpoint with
    names of its own) the model is loaded whole in float32, an adapter added to its base.
    """
    files = {} if is_adapter(source) or not Path(source).is_dir() else _files(Path(source))
    wanted, known = {name for name, _ in like.named_parameters()}, like.state_dict().keys()
    if wanted <= files.keys() <= known:
        with ExitStack() as stack, reading(source):
            opened = {file: stack.enter_context(safe_open(file, framework="pt")) for file in sorted({*files.values()})}
            yield lambda name: opened[files[name]].get_tensor(name)
    else:
        weights = dict(build_policy(source, tokenizer, FROZEN, revision=revision).named_parameters())
        yield lambda name: weights[name]


def _files(folder: Path) -> dict[str, Path]:
    """Tensor -> the file it is in; {} where the folder is laid out otherwise."""
    check_files(str(folder))
    if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        index = read_json(folder / SAFE_WEIGHTS_INDEX_NAME)
        return {name: folder / file for name, file in index["weight_map"].items()}
    file = folder / SAFE_WEIGHTS_NAME
    if not file.is_file():
        return {}
    with reading(str(folder)), safe_open(file, framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), file)

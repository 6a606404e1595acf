"""What is published is what was trained: reloaded by plain transformers, or not published at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from rlhf.train import worker
from scripts.reliability.lab import Lab, differing, digest
from scripts.reliability.row import Tally, row

CLOSE = 1e-6  # logits of the engine and of the reloaded model, float32
STAGES = {"sft": AutoModelForCausalLM, "rm": AutoModelForSequenceClassification}
TEXTS = ("the plot was quite good", "What is 3 + 4?\n#### 7", "  é\U0001f600 <|im_end|> ")
LORA = ("--set", "model.lora={rank: 4, alpha: 16}")


@row(
    "R24",
    "a published folder is loaded by plain transformers: policies and reward models, whole and LoRA, ZeRO 0 to 3; and"
    " weights or tokenizer change on the way to the disk",
    expected=f"logits equal to the engine's within {CLOSE:g}, every name and shape, tokenizer and template equal; else"
    " exit 4 and nothing is published, and the same command publishes it",
    asked="20",
    quick=4,
    full=24,
)
def exported(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: every fourth is damaged on the way."""
    ways, damages = cycle(product((0, 3, 1, 2), (False, True), STAGES)), cycle(DAMAGES)
    for number in range(tries):
        zero, lora, stage = next(ways)
        zeroed = f"zero={{stage: {zero}, bucket_size: 1000{', persistence_threshold: 0' if zero == 3 else ''}}}"
        words = lab.command(stage, "--name", "r24", "--set", zeroed, *(LORA if lora else ()))
        lab.clear("r24")
        what = f"{stage}, {'LoRA' if lora else 'whole'}, ZeRO-{zero}"
        if number % 4 == 3:
            name = next(damages)
            with tally.attempt(f"{what}: {name}"):
                not_published(lab, words, DAMAGES[name])
        else:
            with tally.attempt(what):
                equal_on_reload(lab, words, stage, lora)
    lab.clear("r24")


def equal_on_reload(lab: Lab, words: list[str], stage: str, lora: bool) -> None:
    """The folder against what the engine said just before it was written."""
    said, folder = lab.work / "said.pt", lab.root / "r24" / "model"
    done = lab.run(words, before=partial(listen, said))
    assert done.code == 0, done.err
    heard = torch.load(said, weights_only=True)
    again, info = STAGES[stage].from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        found = again.eval()(input_ids=heard["ids"]).logits
    gap = float((found.reshape(heard["logits"].shape) - heard["logits"]).abs().max())
    assert gap <= CLOSE, f"logits differ by {gap:.3g}"
    assert {name: value.shape for name, value in again.state_dict().items()} == heard["shapes"]
    tokenizer, trained = (AutoTokenizer.from_pretrained(path) for path in (folder, lab.root / "sft" / "model"))
    own = AutoTokenizer.from_pretrained(lab.root / "r24" / "tokenizer") if stage == "sft" else trained
    assert [tokenizer(text)["input_ids"] for text in TEXTS] == [own(text)["input_ids"] for text in TEXTS]
    assert tokenizer.chat_template == own.chat_template and tokenizer.eos_token_id == own.eos_token_id
    assert (folder / "adapter").exists() is lora


def listen(said: Path) -> None:
    """In the command: write down what the trained engine says, just before it is published."""
    publish = worker.publish

    def heard(job: Any, parts: Any, *more: Any) -> None:
        engine, kind = parts.published["model"]
        ids = torch.arange(3, 3 + 24).view(2, 12) * 5 % 390 + 5
        with engine.gathered() as module, engine.evaluating():
            logits = module.core(input_ids=ids).logits if kind == "policy" else module(ids, torch.ones_like(ids))
            with torch.device("meta"):
                plain = type(module.core)(module.core.config)
        shapes = {name: value.shape for name, value in plain.state_dict().items()}
        torch.save({"ids": ids, "logits": logits.clone(), "shapes": shapes}, said)
        publish(job, parts, *more)

    worker.publish = heard


# --- on the way to the disk ------------------------------------------------------------------------------------------


def not_published(lab: Lab, words: list[str], damage: Callable[[Path], None]) -> None:
    """Nothing is published; the same command then publishes what an undisturbed run does."""
    stage = lab.root / "r24"
    done = lab.run(words, before=partial(disturb, damage))
    assert done.code == 4, f"exit {done.code}: {done.err[-600:]}"
    assert "Nothing was published" in done.err and "Traceback" not in done.err, done.err[-600:]
    assert not (stage / "MANIFEST.json").exists() and not (stage / "model").exists()
    done = lab.run(words)
    assert done.code == 0, done.err
    found = digest(stage)
    lab.clear("r24")
    done = lab.run(words)
    assert done.code == 0, done.err
    assert not (different := differing(found, digest(stage))), different


def disturb(damage: Callable[[Path], None]) -> None:
    """In the command: change what was written, behind its back."""
    save = PreTrainedTokenizerFast.save_pretrained  # what is written last

    def saved(self: PreTrainedTokenizerFast, folder: Path, **options: Any) -> Any:
        files = save(self, folder, **options)
        if (Path(folder) / "model.safetensors").exists():
            damage(Path(folder))
        return files

    PreTrainedTokenizerFast.save_pretrained = saved  # type: ignore[method-assign]


def flip(folder: Path) -> None:
    """One bit of the last weight."""
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


def drop(folder: Path) -> None:
    """One tensor."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights.pop(max(weights))
    save_file(weights, file, metadata={"format": "pt"})


def narrow(folder: Path) -> None:
    """Another type of number."""
    file = folder / "model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(file).items()}, file, metadata={"format": "pt"})


def swap_tokens(folder: Path) -> None:
    """Two words of the vocabulary change places."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.__getitem__)[100:102]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    file.write_text(json.dumps(content))


def change_template(folder: Path) -> None:
    """One character of the chat template."""
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text() + "x")


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a flipped bit": flip,
    "swapped tokens": swap_tokens,
    "a tensor dropped": drop,
    "another template": change_template,
    "another type": narrow,
}

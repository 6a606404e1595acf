"""Reward models that read otherwise than the policy: other tokens, other sizes, another family."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2Config, GPT2ForSequenceClassification

from rlhf.models.tokenizer import train_tokenizer
from scripts.reliability.lab import Lab
from scripts.reliability.row import Tally, row

CLOSE = 1e-4  # of scores, against plain transformers on the same text
PLAIN = {"add_special_tokens": False}
EMBEDDING = "model.embed_tokens.weight"


@row(
    "R17",
    "a reward model with the policy's tokenizer, the same in another order, more words, more embeddings, another"
    " family, more control tokens; without a template, and with fewer embeddings than tokens",
    expected="answers are written anew in its own tokens and scored as plain transformers scores that text; or exit 2"
    " to 4 before anything is sampled; never an index error",
    asked="30",
    quick=4,
    full=30,
)
def readers(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: reward models in turn, with a seed of their own for what is sampled."""
    for number, (name, make) in enumerate(islice(cycle(MODELS.items()), tries)):
        folder = lab.work / "reader"
        shutil.rmtree(folder, ignore_errors=True)
        with tally.attempt(f"{name}, seed {seed + number}"):
            make(lab, folder)
            rewards = json.dumps([{"kind": "model", "path": str(folder)}])
            options = ["--set", f"rewards={rewards}", "--set", f"label.seed={seed + number}"]
            lab.clear("r17")
            done = lab.run(lab.command("label", "--name", "r17", *options))
            assert "Traceback" not in done.err and "IndexError" not in done.err, done.err[-800:]
            if name in REFUSED:
                assert done.code in (2, 3, 4), f"exit {done.code}: {done.err[-600:]}"
                assert not (lab.root / "r17" / "answers.jsonl").exists(), "answers were sampled"
            else:
                assert done.code == 0, done.err
                answers = read(lab.root / "r17" / "answers.jsonl")
                if name in ALIKE:  # it is given the tokens as they were sampled, as the stage `rm` is
                    lab.clear("r17-rm")
                    done = lab.run(lab.command("label", "--name", "r17-rm", *options[2:]))
                    assert done.code == 0, done.err
                    close(answers, [each["score"] for each in read(lab.root / "r17-rm" / "answers.jsonl")])
                else:
                    close(answers, alone(answers, folder))
    lab.clear("r17")


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of a file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def close(answers: list[dict[str, Any]], scores: list[float | None]) -> None:
    """Every answer has its score."""
    assert answers and len(answers) == len(scores)
    for answer, score in zip(answers, scores, strict=True):
        found = answer["score"]
        assert (found is None) is (score is None), answer
        if score is not None:
            assert abs(found - score) < CLOSE, f"{found} for {score}: {answer['answer']!r}"


def alone(answers: list[dict[str, Any]], folder: Path) -> list[float | None]:
    """What plain transformers says of the texts, an unfinished one without the end of its turn. A NUL has no score."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    scores: list[float | None] = []
    for answer in answers:
        asked = tokenizer.apply_chat_template(answer["prompt"], add_generation_prompt=True, tokenize=False)
        ids = [token for text in (asked, answer["answer"]) for token in tokenizer(text, **PLAIN)["input_ids"]]
        ids += [tokenizer.eos_token_id] if answer["finished"] else []
        with torch.no_grad():
            score = float(model(input_ids=torch.tensor([ids])).logits[0, 0])
        scores.append(None if "\0" in answer["answer"] else score)
    return scores


# --- reward models ---------------------------------------------------------------------------------------------------


def same(lab: Lab, folder: Path) -> None:
    """As it was trained."""
    shutil.copytree(lab.root / "rm" / "model", folder)


def reordered(lab: Lab, folder: Path) -> None:
    """The ids of all words but the control tokens are turned round, and the embedding with them."""
    same(lab, folder)
    file, weights = folder / "tokenizer.json", load_file(folder / "model.safetensors")
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    fixed = {token["content"] for token in content["added_tokens"]}
    words = sorted((index, word) for word, index in vocab.items() if word not in fixed)
    order = [index for index, _ in reversed(words)]
    table = weights[EMBEDDING].clone()
    for (index, word), new in zip(words, order, strict=True):
        vocab[word] = new
        table[new] = weights[EMBEDDING][index]
    content["model"]["vocab"] = dict(sorted(vocab.items(), key=lambda item: item[1]))
    file.write_text(json.dumps(content))
    save_file({**weights, EMBEDDING: table}, folder / "model.safetensors", metadata={"format": "pt"})


def _grown(lab: Lab, folder: Path, tokens: list[str], special: bool, rows: int | None = None) -> None:
    same(lab, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(tokens, special_tokens=special)
    tokenizer.save_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer) if rows is None else rows, mean_resizing=False)
    model.save_pretrained(folder)


def more_words(lab: Lab, folder: Path) -> None:
    """Words that the policy writes as several tokens are one here."""
    _grown(lab, folder, ["the", "was", " a"], special=False)


def more_controls(lab: Lab, folder: Path) -> None:
    """Control tokens that no text has."""
    _grown(lab, folder, ["<|tool|>", "<|end_tool|>"], special=True)


def more_embeddings(lab: Lab, folder: Path) -> None:
    """The embedding is padded to a round number of rows; the tokens are the same."""
    _grown(lab, folder, [], special=False, rows=512)


def another_family(lab: Lab, folder: Path) -> None:
    """GPT-2 with a vocabulary and a template of its own."""
    texts = [json.loads(line)["chosen"] for line in (lab.data / "pairs.jsonl").read_text().splitlines()]
    tokenizer = train_tokenizer(texts, 330, "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% if m['role']"
                                " == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
                                "[assistant] {% endif %}")  # fmt: skip
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=128, num_labels=1,
                        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    GPT2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def no_template(lab: Lab, folder: Path) -> None:
    """Another family that cannot say how a conversation is written."""
    another_family(lab, folder)
    (folder / "chat_template.jinja").unlink()


def few_embeddings(lab: Lab, folder: Path) -> None:
    """More tokens than the model has rows for: a folder put together wrongly."""
    another_family(lab, folder)
    torch.manual_seed(1)
    config = GPT2Config.from_pretrained(folder)
    config.vocab_size = 200
    GPT2ForSequenceClassification(config).save_pretrained(folder)


MODELS: dict[str, Callable[[Lab, Path], None]] = {
    "reordered": reordered,
    "another family": another_family,
    "fewer embeddings than tokens": few_embeddings,
    "more words": more_words,
    "no template": no_template,
    "more control tokens": more_controls,
    "more embeddings": more_embeddings,
    "same": same,
}
ALIKE = ("same", "more embeddings")
REFUSED = ("no template", "fewer embeddings than tokens")

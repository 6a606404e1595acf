"""Rows at and beyond every limit of length: what is dropped or cut is counted, what stays can be learned from."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.data.examples import Loaded, PairExample, PromptExample, load_examples
from rlhf.recipe.schema import DataBlock
from scripts.reliability.kills import whole_rows
from scripts.reliability.lab import Lab
from scripts.reliability.row import Tally, row

KINDS = {"tokens": "sft", "pairs": "dpo", "prompts": "grpo"}
RULES = ("drop", "truncate_prompt", "truncate_answer")
NEW_TOKENS = 4
WIDE = 1 << 20
COMMON = 20  # rows that always fit, with the three that are looked at
LIMITS: dict[str, Callable[[int, int], int]] = {  # (tokens of the prompt, of all) -> max_length
    "all": lambda prompt, total: total,
    "all but one": lambda prompt, total: total - 1,
    "the prompt": lambda prompt, total: prompt,
    "the prompt and one": lambda prompt, total: prompt + 1,
    "a tenth": lambda prompt, total: total // 10,
}
ODD = {  # prompt, answer
    "empty answer": ("what was it like", ""),
    "blank answer": ("what was it like", "  \n "),
    "empty prompt": ("", " it was good"),
    "only an end token": ("what was it like", "<|eos|>"),
    "an end token inside": ("what was it like", " it was <|eos|> good"),
    "a padding token": ("what <|pad|> it", " it was good<|pad|>"),
}


@row(
    "R16",
    "prompts and answers as long as max_length, one token more, ten times as long; empty, blank, and made of end or"
    " padding tokens; for texts, pairs and prompts, and every rule for what is too long",
    expected="exact counts of what was read, kept, dropped and cut; nothing longer than the limit, an end or the limit"
    " at the end of every answer; finite losses",
    asked="200",
    quick=24,
    full=200,
)
def lengths(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: rows looked at as data; every fortieth as a whole stage, too."""
    draw, edges = random.Random(seed), Edges(lab)
    for number in range(tries):
        kind, rule = list(KINDS)[number % 3], draw.choice(RULES)
        odd = draw.choice(list(ODD)) if draw.random() < 0.4 else None
        limit = draw.choice(list(LIMITS))
        words = draw.randrange(12, 40), draw.randrange(12, 40)
        with tally.attempt(f"{kind}, {rule}, {odd or f'{words} words, limit at {limit}'}"):
            if odd is not None:
                edges.check_odd(kind, rule, odd)
            else:
                edges.check_long(kind, rule, words, limit)
        if number % 40 == 0:
            with tally.attempt(f"{KINDS[kind]} on rows of all kinds, {rule}"):
                edges.check_stage(kind, rule)


@dataclass
class Edges:
    """The trained model that rows are given to."""

    lab: Lab

    def __post_init__(self) -> None:
        source = self.lab.root / "sft" / "model"
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.model = AutoModelForCausalLM.from_pretrained(source).eval()
        self.file = self.lab.work / "edges.jsonl"

    def load(self, kind: str, rows: list[dict[str, str]], **options: Any) -> Loaded:
        """The rows as a stage has them."""
        self.file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        block = DataBlock.model_validate({"path": str(self.file), **options})
        return load_examples(block, self.tokenizer, kind, 0, NEW_TOKENS if kind == "prompts" else 0)  # type: ignore[arg-type]

    def check_long(self, kind: str, rule: str, words: tuple[int, int], limit: str) -> None:
        """Three rows of equal length beside short ones, against a limit at a place of theirs."""
        long = as_row(kind, "good " * words[0], " fine" * words[1])
        (whole,) = self.load(kind, [long], max_length=WIDE).train
        prompt, total = parts(whole)
        answer = total - prompt
        most = max(LIMITS[limit](prompt, total), 8) + (NEW_TOKENS if kind == "prompts" else 0)
        room = most - (NEW_TOKENS if kind == "prompts" else 0)
        short = [as_row(kind, "a", " b")] * COMMON
        loaded = self.load(kind, [*short, *[long] * 3], max_length=most, on_long=rule)
        kept = loaded.train[COMMON:]
        (report,) = loaded.report.sources
        fits = total <= room
        stays = fits or (
            rule == "truncate_prompt"
            and answer + 1 <= room
            or rule == "truncate_answer"
            and kind != "prompts"
            and prompt < room
        )
        assert report.read == COMMON + 3 and report.kept == len(loaded.train)
        assert len(kept) == (3 if stays else 0), f"{len(kept)} of 3 stay: {prompt} + {answer} in {room}"
        assert sum(report.dropped.values()) == (0 if stays else 3), report.dropped
        assert sum(report.changed.values()) == (3 if stays and not fits else 0), report.changed
        for example in kept:
            now_prompt, now_total = parts(example)
            assert now_total == min(total, room), f"{now_total} tokens for {room}"
            if rule == "truncate_prompt":
                assert now_total - now_prompt == answer, "the answer was cut"
            elif not fits:
                assert now_prompt == prompt, "the prompt was cut"
            self.check_loss(example)

    def check_odd(self, kind: str, rule: str, odd: str) -> None:
        """Three odd rows among others: kept whole or dropped with a count; control tokens are letters."""
        rows = [as_row(kind, "a", " b")] * COMMON + [as_row(kind, *ODD[odd])] * 3
        loaded = self.load(kind, rows, max_length=200, on_long=rule)
        (report,) = loaded.report.sources
        kept = loaded.train[COMMON:]
        assert report.read == COMMON + 3 and report.kept == len(loaded.train)
        assert len(kept) in (0, 3) and sum(report.dropped.values()) == 3 - len(kept), report.dropped
        assert not report.changed
        if odd == "empty answer" and kind != "prompts":
            assert not kept, "an answer without a token was kept"
        if "token" in odd:
            assert len(kept) == 3, report.dropped
        for example in kept:
            for ids in texts(example):
                ends = [place for place, token in enumerate(ids) if token == self.tokenizer.eos_token_id]
                assert len(ends) <= 1 and (not ends or ends[0] == len(ids) - 1), "text became an end token"
                assert self.tokenizer.pad_token_id not in ids, "text became padding"
            self.check_loss(example)

    def check_loss(self, example: Any) -> None:
        """What a row teaches is a finite number, over at least one token."""
        for ids, mask in supervised(example):
            assert mask.any(), "nothing is supervised"
            with torch.no_grad():
                logits = self.model(torch.tensor([ids[-128:]])).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[-128:][1:]), reduction="none")
            assert losses.isfinite().all(), losses

    def check_stage(self, kind: str, rule: str) -> None:
        """All of it in one file, through the command."""
        rows = [as_row(kind, "a", " b")] * COMMON + [as_row(kind, *each) for each in ODD.values()]
        rows += [as_row(kind, "good " * n, " fine" * m) for n in (1, 20, 60, 600) for m in (1, 20, 60, 600)]
        options = {"max_length": 96, "on_long": rule}
        expected = self.load(kind, rows, **options).report.sources[0]
        if kind == "prompts":  # a stage's answers need more room than those above
            expected = load_examples(
                DataBlock.model_validate({"path": str(self.file), **options}), self.tokenizer, "prompts", 0, 12
            ).report.sources[0]
        stage, name = KINDS[kind], f"r16-{KINDS[kind]}"
        self.lab.clear(name)
        data = json.dumps({"path": str(self.file), **options})
        no_eval = ["--set", "eval.every=0"] if kind != "prompts" else []
        done = self.lab.run(self.lab.command(stage, "--name", name, "--set", f"data={data}", *no_eval, *own(stage)))
        assert done.code == 0, done.err
        folder = self.lab.root / name
        (found,) = json.loads((folder / "provenance.json").read_text())["data"]["sources"]
        same = {"read": expected.read, "kept": expected.kept, "dropped": dict(expected.dropped)}
        assert {key: found[key] for key in same} == same, found
        assert found["read"] == len(rows) and found["changed"] == dict(expected.changed)
        for metrics in whole_rows(folder / "metrics.jsonl"):
            assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in metrics.values()), metrics
        self.lab.clear(name)


def own(stage: str) -> list[str]:
    """The model goes on from sft: its tokenizer is the one that was counted with."""
    return ["--set", "model={from: sft}"] if stage == "sft" else []


def as_row(kind: str, prompt: str, answer: str) -> dict[str, str]:
    """A row of a kind; of a pair, the better answer."""
    if kind == "prompts":
        return {"prompt": prompt}
    if kind == "tokens":
        return {"prompt": prompt, "completion": answer}
    return {"prompt": prompt, "chosen": answer, "rejected": " no"}


def parts(example: Any) -> tuple[int, int]:
    """(tokens of the prompt, of the prompt and the longest answer)."""
    if isinstance(example, PromptExample):
        return len(example.ids), len(example.ids)
    if isinstance(example, PairExample):
        longest = max(len(example.chosen_ids), len(example.rejected_ids))
        return len(example.prompt_ids), len(example.prompt_ids) + longest
    return int(example.mask.argmax()), len(example.ids)


def texts(example: Any) -> list[list[int]]:
    """The ids of a row, as sequences that end where an answer does."""
    if isinstance(example, PairExample):
        return [[*example.prompt_ids.tolist(), *ids.tolist()] for ids in (example.chosen_ids, example.rejected_ids)]
    return [list(map(int, example.ids))]


def supervised(example: Any) -> list[tuple[list[int], Any]]:
    """(ids, mask of the tokens that are learned) of every sequence; a prompt teaches nothing."""
    if isinstance(example, PromptExample):
        return []
    masks = [example.chosen_mask, example.rejected_mask] if isinstance(example, PairExample) else [example.mask]
    return list(zip(texts(example), masks, strict=True))

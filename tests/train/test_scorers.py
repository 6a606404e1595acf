"""Reward models that read otherwise than the policy: their scores are those of plain transformers on plain text."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from rlhf.batch import Rollout
from rlhf.data import collate
from rlhf.data.chat import ChatTemplate, set_template
from rlhf.data.examples import PromptExample
from rlhf.data.messages import message
from rlhf.errors import CheckpointError
from rlhf.models.forward import ScorerModule
from rlhf.models.tokenizer import decoder, ensure_pad, train_tokenizer
from rlhf.rewards.scorer import model_part, rendered_part
from rlhf.train.scorers import own_template, reads_alike, rendered

TESTS = Path(__file__).parents[1]
CPU = torch.device("cpu")
QUESTIONS = ["what is two plus two", "hello", "how are you? " * 6, "USER: a chat between a user and an assistant"]
ANSWERS = ["it is four", "fine thanks, it is fine. how are you there?", "", "four\n\nis two plus <two>"]
FINISHED = [True, False, True, False]


def _build_tokenizer():
    spec = importlib.util.spec_from_file_location("data_conftest", TESTS / "data" / "conftest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build_tokenizer


build_tokenizer = _build_tokenizer()


def template(name: str) -> str:
    return (TESTS / "data" / "templates" / f"{name}.jinja").read_text()


OTHERS = {
    "qwen25": lambda: build_tokenizer(template("qwen25"), ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]),
    "llama3": lambda: build_tokenizer(
        template("llama3"),
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        bos="<|begin_of_text|>",
    ),
    "zephyr": lambda: build_tokenizer(template("zephyr"), words="pieces"),
    "llama2": lambda: build_tokenizer(template("llama2"), bos="<s>", words="pieces"),
}
ENDS = {"qwen25": "<|im_end|>", "llama3": "<|eot_id|>", "zephyr": "</s>", "llama2": "</s>"}


@pytest.fixture(scope="module")
def policy():
    """A byte-level tokenizer with a vocabulary and a template of its own."""
    tokenizer = train_tokenizer([*QUESTIONS, *ANSWERS] * 5, 310, None)
    set_template(tokenizer, "chatml")
    return tokenizer


def conversations() -> list[list[dict[str, str]]]:
    rows = [[message("user", question)] for question in QUESTIONS]
    rows[1] = [message("user", "hi"), message("assistant", "hello there"), *rows[1]]
    return rows


def sampled(policy, finished=FINISHED) -> Rollout:
    """A rollout as sampling makes it: left-padded prompts, answers as the tokenizer writes them, right-padded."""
    chat = ChatTemplate(policy)
    rows = conversations()
    prompts = chat.encode([chat.prompt(messages, "rows:1") for messages in rows])
    examples = [
        PromptExample(ids, i, {"prompt": "", "messages": messages})
        for i, ((ids, _), messages) in enumerate(zip(prompts, rows, strict=True))
    ]
    batch = collate.prompts(examples, policy.pad_token_id)
    end = policy.convert_tokens_to_ids(chat.end_token)
    answers = [
        policy.encode(text, add_special_tokens=False) + ([end] if done else [])
        for text, done in zip(ANSWERS, finished, strict=True)
    ]
    width = max(map(len, answers))
    mask = torch.arange(width) < torch.tensor([len(answer) for answer in answers])[:, None]
    padded = torch.tensor([answer + [policy.pad_token_id] * (width - len(answer)) for answer in answers])
    return Rollout(
        torch.cat([batch.ids, padded], 1),
        torch.cat([batch.attention, mask], 1),
        mask,
        torch.zeros(mask.shape),
        torch.tensor(finished),
        [decoder(policy)(answer) for answer in answers],
        batch.rows,
    )


def reward_model(tokenizer, **changes) -> torch.nn.Module:
    """A small reward model with weights large enough that every token, mask and position shows."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(
        "llama",
        **{**sizes, "intermediate_size": 64, "initializer_range": 0.15, "max_position_embeddings": 512, **changes},
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        num_labels=1,
    )
    return AutoModelForSequenceClassification.from_config(config).eval()


def cut_into(size):
    return lambda attention, columns, prompts: (
        (list(range(len(prompts)))[i : i + size], True) for i in range(0, len(prompts), size)
    )


def part_of(model, own, room=None, size=3):
    chat = ChatTemplate(own)
    options = {"pad_id": own.pad_token_id, "room": room, "cut": cut_into(size), "device": CPU}
    return rendered_part(ScorerModule(model), lambda rollout: rendered(chat, rollout), **options)


def plain_text(own, messages, answer: str, finished: bool, end: str) -> str:
    """What plain transformers writes: the template on the whole conversation, cut behind or before its last end."""
    text = own.apply_chat_template([*messages, message("assistant", answer)], tokenize=False)
    before, found, _ = text.rpartition(end)
    assert found
    return before + end if finished else before


@pytest.fixture(params=list(OTHERS))
def name(request) -> str:
    return request.param


@pytest.fixture
def own(name):
    tokenizer = OTHERS[name]()
    ensure_pad(tokenizer, None)
    return tokenizer


def test_a_batch_scores_as_each_text_alone_in_plain_transformers(policy, own, name):
    model, batch = reward_model(own), sampled(policy)
    assert not reads_alike(own, policy)
    scores = {size: part_of(model, own, size=size)(batch) for size in (1, 3, 4)}
    chat = ChatTemplate(own)
    for i, (messages, answer, finished) in enumerate(zip(conversations(), ANSWERS, FINISHED, strict=True)):
        (ids,) = rendered(chat, batch.select([i]))
        text = plain_text(own, messages, answer, finished, ENDS[name])
        assert own.decode(ids).replace(" ", "") == text.replace(" ", ""), "the rendered text"
        assert own.decode(ids).rstrip().endswith(ENDS[name]) == finished
        with torch.no_grad():
            alone = model(torch.tensor([ids.tolist()])).logits[0, 0].item()
        for size, found in scores.items():
            assert found[i] == pytest.approx(alone, abs=1e-5), (size, i)
    assert len({round(score, 3) for score in scores[4]}) == 4


@pytest.mark.parametrize("name", ["qwen25", "llama3"])
def test_byte_level_models_read_the_very_tokens_that_plain_transformers_makes_of_the_text(policy, own, name):
    model, batch = reward_model(own), sampled(policy)
    found = part_of(model, own)(batch)
    for i, (messages, answer, finished) in enumerate(zip(conversations(), ANSWERS, FINISHED, strict=True)):
        text = plain_text(own, messages, answer, finished, ENDS[name])
        inputs = own(text, add_special_tokens=False, return_tensors="pt")
        assert rendered(ChatTemplate(own), batch)[i].tolist() == inputs["input_ids"][0].tolist()
        with torch.no_grad():
            assert found[i] == pytest.approx(model(inputs["input_ids"]).logits[0, 0].item(), abs=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_is_not_read(policy, own, side):
    model, batch = reward_model(own), sampled(policy)
    rows = [ids.tolist() for ids in rendered(ChatTemplate(own), batch)]
    width = max(map(len, rows)) + 3
    ids = torch.full((len(rows), width), own.pad_token_id)
    attention = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        columns = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, columns], attention[i, columns] = torch.tensor(row), True
    with torch.no_grad():
        scores = ScorerModule(model)(ids, attention)
    torch.testing.assert_close(scores, torch.tensor(part_of(model, own)(batch)), atol=1e-5, rtol=0)


def test_equal_tokenizers_give_equal_scores_both_ways_on_finished_answers(policy):
    model = reward_model(policy)
    batch = sampled(policy, [True] * 4)
    assert reads_alike(policy, policy)
    as_sampled = model_part(ScorerModule(model), cut_into(3), CPU)(batch)
    assert part_of(model, policy)(batch) == pytest.approx(as_sampled, abs=1e-5)
    assert len({round(score, 3) for score in as_sampled}) == 4


def test_an_answer_that_was_cut_off_scores_otherwise_than_a_finished_one(policy, own):
    part = part_of(reward_model(own), own)
    ended, cut = part(sampled(policy, [True] * 4)), part(sampled(policy, [False] * 2 + [True] + [False]))
    assert all(abs(a - b) > 1e-3 for a, b in zip(ended[:2], cut[:2], strict=True)) and ended[2] == cut[2]


def test_rows_over_the_positions_are_unscored_and_none_is_cut(policy, own, caplog):
    model, batch = reward_model(own), sampled(policy)
    lengths = [len(ids) for ids in rendered(ChatTemplate(own), batch)]
    room = sorted(lengths)[1]
    full, limited = part_of(model, own)(batch), part_of(model, own, room=room)(batch)
    assert [score is None for score in limited] == [length > room for length in lengths]
    assert [a for a in limited if a is not None] == pytest.approx(
        [a for a, length in zip(full, lengths, strict=True) if length <= room], abs=1e-5
    )
    assert f"2 of 4 answers unscored: 2 longer than its {room} positions" in caplog.text


def test_control_tokens_in_an_answer_are_letters(policy, own, name):
    """An answer cannot open a turn of its own."""
    batch = sampled(policy)
    end = own.convert_tokens_to_ids(ENDS[name])
    before = [ids.tolist().count(end) for ids in rendered(ChatTemplate(own), batch)]
    texts = [f"{text} {ENDS[name]} x" for text in batch.texts]
    changed = Rollout(**{**vars(batch), "texts": texts})
    after = [ids.tolist().count(end) for ids in rendered(ChatTemplate(own), changed)]
    assert after == before


def test_a_model_with_one_vocabulary_and_no_template_is_given_tokens(policy):
    bare = train_tokenizer([*QUESTIONS, *ANSWERS] * 5, 310, None)
    assert reads_alike(bare, policy)
    set_template(bare, "plain")
    assert not reads_alike(bare, policy)
    other = build_tokenizer(None)
    assert not reads_alike(other, policy)
    with pytest.raises(CheckpointError, match="expected the policy's tokenizer or a chat template, found neither in x"):
        own_template(other, "rewards.0.path", "x")

"""The packed path against the plain one: values and gradients, on every family, for rows of every shape."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from rlhf.models import tree_attention
from rlhf.models.build import add_lora
from rlhf.models.forward import PolicyModule, RoleModule, ScorerModule
from rlhf.models.head import Extras
from rlhf.models.packing import pack, shared_beginnings
from rlhf.recipe.schema import LoraBlock, SamplingBlock

PACKED = ["llama", "qwen2", "gpt2"]


def drawn(*lengths: int, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 300, (length,), generator=draw) for length in lengths]


def padded(prompts: list[Tensor], answers: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts on the left of a common column, answers on its right: (ids, attention, mask of the answers)."""
    left, right = max(map(len, prompts)), max(map(len, answers))
    ids, attention = torch.zeros(len(prompts), left + right, dtype=torch.long), None
    attention = torch.zeros_like(ids, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        columns = slice(left - len(prompt), left + len(answer))
        ids[i, columns], attention[i, columns] = torch.cat([prompt, answer]), True
    return ids, attention, attention[:, left:]


def shapes() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    long, short = drawn(40, 35, seed=1)
    return {
        "groups": padded([long] * 3 + [short] * 3, drawn(3, 9, 5, 1, 12, 4)),
        "pairs": padded([long, short, long, short], drawn(6, 2, 3, 8)),
        "answers that begin alike": padded([long] * 3, [torch.cat([short[:9], each]) for each in drawn(3, 1, 4)]),
        "answers longer than prompts": padded(drawn(2, 1, 3), drawn(30, 41, 17)),
        "one token of each": padded(drawn(1, 1), drawn(1, 1)),
        "the same row twice": padded([long, long], [short, short]),
        "a row that another begins with": padded([long, long], [short[:4], short[:9]]),
        "alone": padded([long], [short[:5]]),
        "rows of one token, which ask for nothing": padded(
            [long[:1], long, short[:1]], [short[:0], short[:6], short[:0]]
        ),
    }


def both_paths(module: RoleModule, *args, **options) -> list[tuple[Tensor, list[Tensor]]]:
    """Numbers of the plain and of the packed path, with the gradients that a fixed weighting of them gives."""
    found = []
    for module.packs in (False, True):
        module.zero_grad()
        out = module(*args, **options)
        numbers = torch.stack([o.double() for o in out], -1) if isinstance(out, tuple) else out.double()
        weights = torch.linspace(-1, 1, numbers.numel(), dtype=torch.float64).view(numbers.shape).cos()
        (numbers * weights).sum().backward()
        found.append((numbers.detach(), [p.grad.clone() for p in module.parameters() if p.grad is not None]))
    return found


def assert_equal(plain, packed, atol: float) -> None:
    torch.testing.assert_close(packed[0], plain[0], atol=atol, rtol=0)
    assert len(plain[1]) == len(packed[1])
    for one, other in zip(plain[1], packed[1], strict=True):
        assert float((one - other).abs().max()) <= atol * max(1.0, float(one.abs().max()))


@pytest.mark.parametrize("shape", list(shapes()))
@pytest.mark.parametrize("name", PACKED)
def test_log_probs_and_gradients(tiny, name, shape):
    ids, attention, mask = shapes()[shape]
    policy = PolicyModule(tiny(name, max_position_embeddings=128, n_positions=128))
    assert policy.can_pack()
    outside = torch.ones_like(mask)
    plain, packed = both_paths(policy, ids, attention, mask, extras=Extras(entropy="value"))
    assert_equal(plain, packed, 1e-5)
    assert (plain[0][..., 0][outside & ~mask] == 0).all()


@pytest.mark.parametrize("name", PACKED)
def test_values_scores_and_gradients(tiny, name):
    scorer = ScorerModule(tiny(name, scorer=True, max_position_embeddings=128, n_positions=128))
    assert scorer.can_pack()
    for ids, attention, mask in shapes().values():
        assert_equal(*both_paths(scorer, ids, attention, mask), 1e-5)
        assert_equal(*both_paths(scorer, ids, attention), 1e-5)


def test_bf16_is_equal_within_its_rounding(tiny):
    ids, attention, mask = shapes()["groups"]
    for name in PACKED:
        policy = PolicyModule(tiny(name, max_position_embeddings=128, n_positions=128).bfloat16())
        assert policy.can_pack()
        plain, packed = both_paths(policy, ids, attention, mask)
        assert_equal(plain, packed, 0.15)


def test_every_question_is_answered_alike(tiny):
    ids, attention, mask = shapes()["groups"]
    policy = PolicyModule(tiny("llama", max_position_embeddings=128))
    other = PolicyModule(tiny("llama", max_position_embeddings=128, initializer_range=0.1))
    with torch.no_grad():
        reference = other(ids, attention, mask, extras=Extras(whole=True))
        assert reference.shape == (int(mask.sum()), 300)
        other.packs = other.can_pack()
        torch.testing.assert_close(other(ids, attention, mask, extras=Extras(whole=True)), reference, atol=1e-5, rtol=0)
    sampling = {"sampling": SamplingBlock(temperature=0.7, top_k=20, top_p=0.9)}
    asked = [Extras(entropy="gradient"), Extras(ref_distribution=reference), Extras(contrast=3)]
    options = [sampling, {**sampling, "extras": asked[0]}, *({"extras": extras} for extras in asked)]
    assert policy.can_pack()
    for each in options:
        assert_equal(*both_paths(policy, ids, attention, mask, **each), 1e-5)


def test_an_adapter_checkpointing_and_its_absence(tiny):
    ids, attention, mask = shapes()["groups"]
    model = tiny("llama", max_position_embeddings=128)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = PolicyModule(add_lora(model, LoraBlock(rank=2), "CAUSAL_LM").train())
    model.enable_input_require_grads()
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    assert policy.can_pack()
    assert_equal(*both_paths(policy, ids, attention, mask), 1e-5)


def test_a_sliding_window_holds_within_trunk_and_branch(tiny):
    options = {"sliding_window": 6, "max_position_embeddings": 128, "num_key_value_heads": 2, "intermediate_size": 64}
    policy = PolicyModule(tiny("mistral", initializer_range=0.15, **options))
    assert policy.can_pack()
    for ids, attention, mask in shapes().values():
        assert_equal(*both_paths(policy, ids, attention, mask), 1e-5)


def test_attention_dropout_is_not_forgotten(tiny):
    ids, attention, mask = shapes()["groups"]
    policy = PolicyModule(tiny("llama", max_position_embeddings=128, attention_dropout=0.5)).train()
    policy.packs = policy.can_pack()
    assert not policy(ids, attention, mask).equal(policy(ids, attention, mask))


def test_a_model_proves_itself_before_it_is_packed(tiny, family):
    policy = PolicyModule(tiny(family))
    text = policy.prove(policy)
    assert policy.packs == (family not in ("gemma2",)), text
    assert text.startswith("packed rows" if policy.packs else "padded rows")


def test_a_model_with_more_than_a_head_behind_its_layers_stays_padded(tiny):
    model = tiny("llama")
    plain = model.forward

    def capped(*args, **kwargs):
        output = plain(*args, **kwargs)
        output.logits = output.logits.tanh()
        return output

    capped.__signature__ = __import__("inspect").signature(plain)
    model.forward = capped
    policy = PolicyModule(model)
    assert "change this model's numbers" in policy.prove(policy) and not policy.packs


@pytest.mark.parametrize("window", [None, 6])
def test_every_kernel_computes_the_same(monkeypatch, window):
    """The tables that a kernel for unequal sequences gets, read by a loop over them; and masks against the spans."""
    ids, attention, _ = shapes()["groups"]
    layout, tokens = pack(ids, attention).layout, pack(ids, attention).ids.shape[1]
    query, key, value = (torch.randn(1, heads, tokens, 8, requires_grad=True) for heads in (4, 2, 2))
    found = []
    for kernel in ("spans", "varlen", "masked"):
        monkeypatch.setattr(tree_attention, "kernel_for", lambda _, kernel=kernel: kernel)
        monkeypatch.setattr(varlen, "varlen_attn", over_sequences)
        out = layout.attend(0, query, key, value, scale=0.3, window=window)
        grads = torch.autograd.grad(
            (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum(), [query, key, value]
        )
        found.append([out, *grads])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-5)


def over_sequences(query, key, value, ends_q, ends_k, most_q, most_k, *, scale, window_size, enable_gqa):
    """`varlen_attn` by its documentation: one causal attention for each sequence, aligned at the ends."""
    assert most_q == int(ends_q.diff().max()) and most_k == int(ends_k.diff().max()) and window_size[1] == 0
    outputs = []
    for i in range(len(ends_q) - 1):
        q, k, v = query[ends_q[i] : ends_q[i + 1]], key[ends_k[i] : ends_k[i + 1]], value[ends_k[i] : ends_k[i + 1]]
        places = torch.arange(len(k))
        own = places[len(k) - len(q) :, None]
        seen = places <= own
        if window_size[0] >= 0:
            seen &= places >= own - window_size[0]
        q, k, v = (each.transpose(0, 1)[None] for each in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=enable_gqa)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


# --- which rows share what --------------------------------------------------------------------------------------------


def test_a_shared_prompt_stands_once():
    ids, attention, _ = shapes()["groups"]
    packed = pack(ids, attention)
    assert packed.ids.shape[1] == 40 + 35 + 3 + 9 + 5 + 1 + 12 + 4
    assert pack(ids, attention, share=False).ids.shape[1] == int(attention.sum())
    assert packed.ids[0, packed.place[attention]].equal(ids[attention])
    positions = (attention.long().cumsum(-1) - 1)[attention]
    assert packed.positions[0, packed.place[attention]].equal(positions)


def test_a_short_common_beginning_is_not_worth_it():
    rows = [np.array([1, 2, 3, i, *range(50)]) for i in range(4)]
    assert sorted(row for group, _ in shared_beginnings(rows) for row in group) == [0, 1, 2, 3]
    assert {shared for _, shared in shared_beginnings(rows)} == {0}


def test_the_groups_are_the_best_that_there_are():
    draw = random.Random(0)
    for _ in range(30):
        prompts = [[draw.randrange(2) for _ in range(draw.randrange(1, 60))] for _ in range(3)]
        rows = [
            np.array(draw.choice(prompts) + [draw.randrange(2) for _ in range(draw.randrange(30))] + [2])
            for _ in range(7)
        ]
        groups = shared_beginnings(rows)
        assert sorted(row for group, _ in groups for row in group) == list(range(7))
        for group, shared in groups:
            assert all(rows[row][:shared].tolist() == rows[group[0]][:shared].tolist() for row in group)
        saved = sum((len(group) - 1) * shared for group, shared in groups)
        assert saved == best_saving(sorted(row.tolist() for row in rows))


def best_saving(rows: list[list[int]]) -> int:
    """The most tokens that cutting sorted rows into runs can save; runs that save less than 32 count nothing."""
    if not rows:
        return 0
    found = []
    for size in range(1, len(rows) + 1):
        common = next((i for i, column in enumerate(zip(*rows[:size], strict=False)) if len(set(column)) > 1), None)
        common = min(map(len, rows[:size])) if common is None else common
        saved = (size - 1) * common
        found.append((saved if saved >= 32 else 0 if size == 1 else -(10**9)) + best_saving(rows[size:]))
    return max(found)

from __future__ import annotations

import operator
from contextlib import nullcontext

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from rlhf.batch import Prompts
from rlhf.errors import CheckpointError, RecipeError, StoppedError
from rlhf.models import cpu_decoder, sample
from rlhf.models.build import add_lora
from rlhf.models.decoding import decoding_weights
from rlhf.models.draw import draw
from rlhf.models.forward import PolicyModule
from rlhf.models.tokenizer import decoder
from rlhf.recipe.schema import LoraBlock, SamplingBlock
from tests.models.conftest import FAMILIES, WIDE

STOP = list(range(100, 130))  # a tenth of the vocabulary: answers of many lengths


@pytest.fixture
def prompts(ragged) -> Prompts:
    ids, attention = ragged[1]("left")
    return Prompts(ids, attention, [{"row": i} for i in range(len(ids))])


def answer(
    policy, prompts, *, answers=1, seeds=None, stop_ids=STOP, decode=str, slots=64, poll=lambda: None, **options
):
    seeds = list(range(len(prompts) * answers)) if seeds is None else seeds
    sampling = SamplingBlock(**{"max_new_tokens": 20, **options})
    common = {"stop_ids": stop_ids, "pad_id": 0, "seeds": seeds, "decode": decode, "slots": slots, "poll": poll}
    return sample.generate(policy, prompts, answers=answers, sampling=sampling, **common)


OPTIONS = [{}, {"temperature": 0.6}, {"top_k": 7}, {"top_p": 0.8}, {"temperature": 1.4, "top_k": 50, "top_p": 0.9}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_sampler_logprobs_are_those_of_training(tiny, family, prompts, options):
    policy = PolicyModule(tiny(family))
    rollout = answer(policy, prompts, answers=3, **options)
    sampling = SamplingBlock(**options)
    logprobs = policy(rollout.ids, rollout.attention, rollout.response_mask, sampling=sampling)
    gap = torch.where(rollout.response_mask, logprobs - rollout.sample_logprobs, 0.0).abs().max()
    assert gap <= 1e-4
    assert rollout.sample_logprobs.dtype == torch.float32


def test_an_answer_is_the_same_alone_and_in_a_batch(tiny, family, prompts):
    policy = PolicyModule(tiny(family))
    together = answer(policy, prompts, answers=3, seeds=[7 * i for i in range(12)])
    for row in range(12):
        one = prompts.select([row // 3])
        kept = one.attention[0]
        one = Prompts(one.ids[:, kept], one.attention[:, kept], one.rows)  # no padding either
        alone = answer(policy, one, seeds=[7 * row])
        length = int(alone.response_mask.sum())
        width = prompts.ids.shape[1]
        assert together.response_mask[row].sum() == length
        assert together.ids[row, width : width + length].tolist() == alone.ids[0, -length:].tolist()
        assert together.finished[row] == alone.finished[0]


def test_layout_of_a_rollout(tiny, prompts):
    rollout = answer(PolicyModule(tiny("llama")), prompts, answers=5, decode=lambda ids: f"{len(ids)}")
    width, lengths = prompts.ids.shape[1], rollout.response_mask.sum(-1)
    assert rollout.ids.shape == (20, width + int(lengths.max()))
    assert rollout.ids[:, :width].equal(prompts.ids.repeat_interleave(5, 0))
    assert rollout.attention[:, :width].equal(prompts.attention.repeat_interleave(5, 0))
    assert [row["row"] for row in rollout.rows] == [i for i in range(4) for _ in range(5)]
    assert rollout.texts == [str(int(length)) for length in lengths]
    assert rollout.attention[:, width:].equal(rollout.response_mask)
    assert len(set(lengths.tolist())) > 3 and rollout.finished.any() and not rollout.finished.all()
    for tokens, mask, finished in zip(rollout.ids[:, width:], rollout.response_mask, rollout.finished, strict=True):
        length = int(mask.sum())
        stops = [i for i, token in enumerate(tokens[:length].tolist()) if token in STOP]
        assert stops == ([length - 1] if finished else [])  # the stop token is the answer's last
        assert finished or length == 20
        assert mask.tolist() == [True] * length + [False] * (len(mask) - length)
        assert (tokens[length:] == 0).all()
    assert rollout.sample_logprobs[~rollout.response_mask].eq(0).all()


def test_width_is_the_longest_answer_of_the_call(tiny, prompts):
    rollout = answer(PolicyModule(tiny("llama")), prompts, stop_ids=range(300))
    assert rollout.response_mask.shape == (4, 1) and rollout.finished.all()


@pytest.mark.parametrize("slots", [1, 3, 5, 64])
def test_how_many_are_sampled_at_a_time_changes_nothing(tiny, family, prompts, slots):
    policy = PolicyModule(tiny(family))
    together, apart = answer(policy, prompts, answers=4), answer(policy, prompts, answers=4, slots=slots)
    assert together.ids.equal(apart.ids) and together.response_mask.equal(apart.response_mask)
    torch.testing.assert_close(together.sample_logprobs, apart.sample_logprobs, atol=1e-5, rtol=0)


def test_the_order_of_waiting_changes_nothing(tiny, family, prompts):
    policy, order = PolicyModule(tiny(family)), [2, 0, 3, 1]
    one = answer(policy, prompts, answers=2, seeds=[10 * i + g for i in range(4) for g in range(2)], slots=3)
    seeds = [10 * i + g for i in order for g in range(2)]
    other = answer(policy, prompts.select(order), answers=2, seeds=seeds, slots=3)
    assert one.select([2 * i + g for i in order for g in range(2)]).ids.equal(other.ids)


def test_top_k_1_is_greedy(tiny, family, prompts):
    model = tiny(family)
    rollout = answer(PolicyModule(model), prompts, top_k=1, max_new_tokens=12, stop_ids=[2])
    model.generation_config.eos_token_id = 2
    inputs = {"input_ids": prompts.ids, "attention_mask": prompts.attention.long()}
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    width = min(expected.shape[1], rollout.ids.shape[1])
    assert rollout.ids[:, :width].equal(expected[:, :width])
    assert rollout.sample_logprobs.abs().max() == 0


def test_seeds_decide(tiny, prompts):
    policy = PolicyModule(tiny("llama"))
    first = answer(policy, prompts, answers=2)
    torch.manual_seed(123)
    assert first.ids.equal(answer(policy, prompts, answers=2).ids)
    assert not first.ids.equal(answer(policy, prompts, answers=2, seeds=list(range(50, 58))).ids)
    same = answer(policy, prompts, answers=2, seeds=[5] * 8)
    assert same.ids[0::2].equal(same.ids[1::2])


def test_the_global_generator_is_not_touched(tiny, prompts):
    before = torch.get_rng_state()
    answer(PolicyModule(tiny("llama")), prompts)
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_draws_follow_the_distribution(options):
    logits = torch.randn(1, 40) * 3
    count = 4000
    uniform = (torch.arange(count) + 0.5) / count  # evenly spread: frequencies are exact to 1 / count
    choice, logprobs = draw(logits.expand(count, -1), uniform, SamplingBlock(**options))
    sampling = SamplingBlock(**options)
    probs = (logits[0].double() / sampling.temperature).softmax(-1)
    if sampling.top_k:
        probs = torch.where(probs >= probs.topk(min(sampling.top_k, 40)).values[-1], probs, 0.0)
        probs = probs / probs.sum()
    if sampling.top_p < 1:
        ordered = probs.sort(descending=True).values
        num_kept = int((ordered.cumsum(-1) < sampling.top_p).sum()) + 1
        probs = torch.where(probs >= ordered[num_kept - 1], probs, 0.0)
        probs = probs / probs.sum()
    found = torch.bincount(choice, minlength=40) / count
    torch.testing.assert_close(found.double(), probs, atol=1.5 / count, rtol=0)
    torch.testing.assert_close(logprobs.double(), probs[choice].log(), atol=1e-5, rtol=0)


def test_no_uniform_draws_an_impossible_token():
    edges = torch.tensor([0.0, 2**-24, 0.5, 1 - 2**-24, 1.0])
    logits = torch.full((5, 50), -50.0)
    logits[:, 20:24] = torch.tensor([1.0, 3.0, 2.0, 0.0])
    choice, logprobs = draw(logits, edges, SamplingBlock(top_k=3))
    assert set(choice.tolist()) <= {20, 21, 22}
    assert choice[0] == 20 and logprobs.isfinite().all()


def test_modes_come_back_and_checkpointing_does_not_hurt(tiny, family, prompts):
    model = tiny(family)
    plain = answer(PolicyModule(model), prompts)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = PolicyModule(add_lora(model, LoraBlock(rank=2), "CAUSAL_LM"))
    policy.model.enable_input_require_grads()
    policy.train()
    next(iter(policy.core.children())).eval()
    modes = [module.training for module in policy.modules()]
    rollout = answer(policy, prompts)
    assert [module.training for module in policy.modules()] == modes
    assert rollout.ids.equal(plain.ids)  # fresh adapters change nothing
    assert not rollout.sample_logprobs.requires_grad


def test_bf16_policies_sample(tiny, prompts):
    policy = PolicyModule(tiny("llama").bfloat16())
    rollout = answer(policy, prompts, answers=2)
    assert rollout.sample_logprobs.dtype == torch.float32
    logprobs = policy(rollout.ids, rollout.attention, rollout.response_mask)
    gap = torch.where(rollout.response_mask, logprobs - rollout.sample_logprobs, 0.0).abs().mean()
    assert gap < 0.1  # bf16 rounds differently in batches of other shapes


def test_texts_leave_special_tokens_out(tiny, prompts, tokenizer):
    policy = PolicyModule(tiny("llama", vocab_size=len(tokenizer)))
    rollout = answer(policy, prompts, answers=8, stop_ids=[2], decode=decoder(tokenizer))
    assert rollout.ids[:, prompts.ids.shape[1] :].lt(5).any()
    assert not any("<|" in text for text in rollout.texts)


def test_more_tokens_than_positions_is_an_error(tiny, prompts):
    with pytest.raises(RecipeError, match="at most 52: the model has 64 positions and a prompt takes 12, found 60"):
        answer(PolicyModule(tiny("llama")), prompts, max_new_tokens=60)


def test_a_model_without_a_key_value_cache_is_an_error(prompts):
    model = MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(CheckpointError, match="MambaForCausalLM"):
        answer(PolicyModule(model.eval()), prompts)


# --- one cache or the other, one weight or another ---


@pytest.fixture
def plainly(monkeypatch):
    """Sampling through the cache of transformers and the model's own layers."""

    def sampled(policy, prompts, **options):
        with monkeypatch.context() as patch:
            patch.setattr(policy, "decoding", lambda dtype: nullcontext())
            return answer(policy, prompts, **options)

    return sampled


def assert_equal(one, other, atol=1e-5):
    assert one.ids.equal(other.ids) and one.response_mask.equal(other.response_mask)
    assert one.finished.equal(other.finished)
    torch.testing.assert_close(one.sample_logprobs, other.sample_logprobs, atol=atol, rtol=0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_both_caches_sample_the_same(tiny, family, prompts, plainly, options):
    policy = PolicyModule(tiny(family))
    assert_equal(answer(policy, prompts, answers=4, slots=6, **options), plainly(policy, prompts, answers=4, **options))


LOOKING_BACK = {
    "mistral": {"num_key_value_heads": 2, "sliding_window": 6, **WIDE},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
}


@pytest.mark.parametrize("name", LOOKING_BACK)
@pytest.mark.parametrize("is_packed", [True, False])
def test_windows_are_kept_to(tiny, prompts, plainly, monkeypatch, name, is_packed):
    monkeypatch.setitem(FAMILIES, name, {**FAMILIES.get(name, {}), **LOOKING_BACK[name]})
    if not is_packed:
        monkeypatch.setattr(cpu_decoder, "_WINDOWS", {})
    policy, wide = PolicyModule(tiny(name)), PolicyModule(tiny(name, sliding_window=None))
    found = answer(policy, prompts, answers=4, slots=6)
    assert_equal(found, plainly(policy, prompts, answers=4))
    assert not found.ids.equal(plainly(wide, prompts, answers=4).ids)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_packed_decoders_are_those_of_transformers(tiny, prompts, monkeypatch, name, bias):
    model = tiny(name, **({"attention_bias": bias} if name == "llama" else {}))
    with torch.no_grad():
        for key, value in model.named_parameters():
            value += 0.1 * torch.randn_like(value) if key.endswith("bias") or "norm" in key else 0
    policy = PolicyModule(model)
    assert cpu_decoder.has_cpu_decoder(model, torch.float32)
    found = answer(policy, prompts, answers=4)
    monkeypatch.setattr(cpu_decoder, "_WINDOWS", {})
    assert not cpu_decoder.has_cpu_decoder(model, torch.float32)
    assert_equal(found, answer(policy, prompts, answers=4))


def test_a_prompt_of_one_token(tiny, family, prompts, plainly):
    one = Prompts(prompts.ids[:, -1:], prompts.attention[:, -1:], prompts.rows)
    policy = PolicyModule(tiny(family))
    assert_equal(answer(policy, one, answers=3, slots=4), plainly(policy, one, answers=3))


def with_lora(model):
    model = add_lora(
        model, LoraBlock(rank=2, target=["c_attn"] if hasattr(model, "transformer") else "all-linear"), "CAUSAL_LM"
    )
    with torch.no_grad():
        for name, value in model.named_parameters():
            value += 0.3 * torch.randn_like(value) if "lora_B" in name else 0
    return PolicyModule(model)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gpt_neox"])
def test_adapters_are_merged(tiny, prompts, plainly, name):
    policy, base = with_lora(tiny(name)), PolicyModule(tiny(name))
    before = {key: value.clone() for key, value in policy.state_dict().items()}
    found = answer(policy, prompts, answers=3)
    assert_equal(found, plainly(policy, prompts, answers=3), atol=1e-4)  # sums in another order, of large weights
    assert not found.ids.equal(answer(base, prompts, answers=3).ids)
    with policy.adapter_off():
        assert_equal(answer(policy, prompts, answers=3), answer(base, prompts, answers=3))
    assert all(value.equal(before[key]) for key, value in policy.state_dict().items())


@pytest.mark.parametrize("make", [PolicyModule, with_lora], ids=["full", "lora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_answers_in_another_dtype(tiny, prompts, name, make):
    """A float32 policy answers in bfloat16 as its bfloat16 copy does, and stays what it was."""
    if make is with_lora and name == "gemma2":
        pytest.skip("its embeddings are tied")
    policy = make(tiny(name))
    parameters, modules = list(policy.parameters()), list(policy.modules())
    rollout = answer(policy, prompts, answers=8, decode_dtype="bf16")
    assert all(map(operator.is_, policy.parameters(), parameters))
    assert all(map(operator.is_, policy.modules(), modules))
    logprobs = policy(rollout.ids, rollout.attention, rollout.response_mask)
    gap = torch.where(rollout.response_mask, logprobs - rollout.sample_logprobs, 0.0).abs()
    assert 1e-4 < gap.sum() / rollout.response_mask.sum() < 0.05
    exact = answer(make(tiny(name)).bfloat16(), prompts, answers=8, decode_dtype="fp32")
    assert exact.sample_logprobs.dtype == torch.float32


def test_weights_of_the_right_dtype_are_shared(tiny):
    policy = with_lora(tiny("llama"))
    own = {id(parameter) for parameter in policy.parameters()}
    with decoding_weights(policy.core, None, pack=False):
        inside = {name: id(parameter) in own for name, parameter in policy.core.named_parameters()}
    assert inside["model.embed_tokens.weight"] and inside["model.norm.weight"]
    assert not inside["model.layers.0.self_attn.q_proj.weight"]  # merged
    plain = tiny("llama")
    own = list(map(id, plain.parameters()))
    with decoding_weights(plain, None, pack=False):
        assert list(map(id, plain.parameters())) == own


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sampling_ends_at_once_where_poll_says_so(tiny, family, prompts):
    policy, polled = PolicyModule(tiny(family)), []

    def poll() -> None:
        polled.append(None)
        if len(polled) == 3:
            raise StoppedError("stopped")

    with pytest.raises(StoppedError):
        answer(policy, prompts, poll=poll, max_new_tokens=12, stop_ids=[])
    assert len(polled) == 3
    free = answer(PolicyModule(tiny(family)), prompts)
    assert torch.equal(answer(policy, prompts).ids, free.ids)  # the policy is as it was

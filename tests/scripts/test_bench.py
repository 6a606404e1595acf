"""The benchmark's counts, order and text, and its plain loops: same loss and gradient as our objectives."""

from __future__ import annotations

import json
import math
import random
import time

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from rlhf.algo.advantages import gae, grpo
from rlhf.batch import Experience
from rlhf.data import collate
from rlhf.data.examples import PairExample, TokenExample
from rlhf.engine.engine import sum_terms
from rlhf.models.build import Setup, build_policy, build_scorer
from rlhf.models.forward import PolicyModule, ScorerModule
from rlhf.models.tokenizer import train_tokenizer
from rlhf.recipe.document import to_yaml
from rlhf.recipe.load import load_recipe
from rlhf.recipe.options import RmBtLoss
from rlhf.recipe.pair_options import DpoLoss
from rlhf.recipe.schema import InitBlock, OptimBlock
from rlhf.recipe.stages import GRPORecipe, PPORecipe
from rlhf.train.objectives import PolicyObjective, RewardObjective, SFTObjective, ValueObjective
from rlhf.train.preference import Policy, PreferenceObjective
from rlhf.train.state import OnlineState
from scripts.bench import __main__ as command
from scripts.bench import flops, material, page, raw_losses, run_case
from scripts.bench.cases import SUBJECTS, all_cases, chosen, recipe_of
from scripts.bench.flops import Shape
from scripts.bench.material import Sources
from scripts.bench.measure import Disturbance, Ratio, Sample, Work, alternate, peak_memory
from scripts.bench.one_thread import OneThread
from scripts.bench.raw_generate import generate
from scripts.bench.raw_model import Flat, RawLlama
from scripts.bench.raw_stages import answer_pair, token_pair
from scripts.bench.spec import Spec

TINY = Shape(hidden=8, layers=2, heads=2, kv_heads=1, ffn=16, vocab=10, head_dim=4)
INIT = InitBlock(hidden=16, layers=2, heads=4, kv_heads=2, ffn=32, vocab=300, context=64, tied=False)
PAD, CLOSE = 0, 1e-5
ROOT_MODEL = {"model": {"path": "m"}, "data": {"path": "demo:prompts"}, "rewards": [{"kind": "demo_gold"}]}


# --- operations ------------------------------------------------------------------------------------------------------


def test_weights_of_the_trunk_by_hand():
    # q and o: 8 x 8 each; k and v: 8 x 4 each; three matrices of 8 x 16; two layers
    assert TINY.trunk == 2 * (64 + 64 + 32 + 32 + 3 * 128) == 1152
    assert TINY.head == 80


def test_a_forward_pass_by_hand():
    # attention: 4 x 2 layers x 8 = 64 operations for every key position that is looked at; half a square of 3 and of 5
    assert flops.forward(TINY, [3, 5], 2) == 2 * 1152 * 8 + 64 * (4.5 + 12.5) + 2 * 80 * 2


def test_tokens_behind_others_look_at_them_too():
    both = flops.forward(TINY, [7], 0)
    assert flops.forward(TINY, [3], 0) + flops.forward(TINY, [4], 0, [3]) == both


def test_training_is_three_passes_and_adapters_save_a_third_of_the_linear_layers():
    whole = flops.training(TINY, [4], 4)
    assert whole == 3 * flops.forward(TINY, [4], 4)
    attention = 3 * 64 * 8
    assert flops.training(TINY, [4], 4, adapters=0) == pytest.approx(4 * 1152 * 4 + 4 * 80 * 4 + attention)
    assert flops.training(TINY, [4], 4, adapters=10) - flops.training(TINY, [4], 4, adapters=0) == 6 * 10 * 4


def test_decoding_reads_a_prompt_once_for_its_answers():
    one, four = (flops.decoding(TINY, [6], answers, 5 * answers) for answers in (1, 4))
    assert four - one == pytest.approx(3 * flops.forward(TINY, [5], 5, [6]))


def test_the_peak_is_a_rate():
    assert flops.matmul_peak(torch.float32, torch.device("cpu"), seconds=0.01) > 1e7


# --- order and ratios ------------------------------------------------------------------------------------------------


def test_sides_take_turns_and_the_warm_up_is_dropped():
    calls: list[tuple[str, int]] = []

    def side(name: str):
        def step(number: int) -> Work:
            calls.append((name, number))
            return Work(10, 1.0)

        return step

    found = alternate({"a": side("a"), "b": side("b")}, rounds=2)
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert {name: len(samples) for name, samples in found.items()} == {"a": 2, "b": 2}


def test_ratios_are_taken_within_rounds_and_per_token():
    mine = [Sample(Work(10, 0.0), wall, wall / 2) for wall in (1.0, 2.0, 4.0)]
    other = [Sample(Work(20, 0.0), wall, wall) for wall in (4.0, 16.0, 16.0)]
    assert Ratio.of(mine, other, "wall") == Ratio(2.0, 2.0, 4.0)
    assert Ratio.of(mine, other, "cpu") == Ratio(4.0, 4.0, 8.0)


def test_memory_of_a_step_is_what_it_takes_beside_what_is_held():
    held = torch.ones(4_000_000)
    found = peak_memory(lambda: (torch.ones(25_000_000) + held.sum()).sum())
    assert found is None or 80e6 < found < 400e6


def test_disturbance_is_a_share():
    around = Disturbance()
    assert around.share() is None, "nothing can be said of an instant"
    time.sleep(0.6)
    share = around.share()
    assert share is None or 0 <= share <= 1.1


# --- cases -----------------------------------------------------------------------------------------------------------


def test_cases_have_names_of_their_own_and_every_subject_has_some():
    names = [case.name for case in all_cases()]
    assert len(set(names)) == len(names)
    assert all(chosen([subject]) for subject in SUBJECTS)
    assert chosen(["all"]) == all_cases()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_every_case_has_a_recipe_that_the_stage_accepts(case, dtype, tmp_path):
    recipe = recipe_of(case, Sources(None, None), "policy", "scorer", steps=3, dtype=dtype)
    recipe["data"].setdefault("path", "demo:sft")
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(recipe))
    loaded = load_recipe(path, case.stage, world_size=case.ranks).recipe
    size = loaded.train.prompts * loaded.train.answers if case.is_online else loaded.train.batch_size
    assert size == case.rows


def test_a_case_runs_with_every_number_of_threads_but_ranks_and_curves():
    options = command.parsed(["all", "--threads", "1", "2"])
    found = command.jobs(options)
    assert {count for case, count in found if case.ranks > 1 or case.series} == {1}
    assert all({1, 2} == {n for c, n in found if c == case} for case in all_cases() if case.is_compared)


def test_the_command_is_shown_without_the_places_of_this_machine():
    words = ["sft", "--hh", "/data/a b", "--trl", "/opt/trl", "--raw", "--table-only"]
    assert command.shown_command(words) == "python -m scripts.bench sft --hh DIR --trl DIR --raw"


def test_tables_are_made_again_from_the_results_of_earlier_runs(tmp_path, capsys):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "rm-small-threads-1.json").write_text(json.dumps(result("rm small")))
    page_file = tmp_path / "page.md"
    words = ["rm", "sft", "--table-only", "--work", str(tmp_path), "--write", str(page_file)]
    assert command.main(words) == 0
    assert "| RM, small: 8 pairs | 1,234 |" in page_file.read_text() in capsys.readouterr().out
    assert "Incomplete: 1 of " in page_file.read_text()
    assert command.main(["rm", "--only", "sft small"]) == 2


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_our_real_stage_and_the_plain_loop_do_the_same_step(stage, forked, tmp_path, monkeypatch):
    monkeypatch.setitem(material.SHAPES, "small", (16, 2, 4, 2, 32, 320, False))
    monkeypatch.setattr(run_case, "WARM_STEPS", 1)
    case = next(case for case in all_cases() if case.stage == stage and case.is_compared)

    def body():
        sides, _ = run_case.build(case, Spec(case.name, 1, 1, raw=True, work=str(tmp_path), out=""), OneThread())
        ours, raw = sides["ours"](0), sides["raw"](0)
        if stage == "sft":
            assert ours.loss == pytest.approx(raw.loss, abs=CLOSE)
            assert (ours.tokens, ours.flops) == (raw.tokens, raw.flops)
        else:
            assert set(ours.seconds) == set(raw.seconds) == {"generate", "score", "train"}
            assert all(seconds > 0 for seconds in ours.seconds.values())
        assert ours.flops > 0

    forked(body)


# --- the page --------------------------------------------------------------------------------------------------------


def result(name: str, **changes) -> dict:
    side = {"rate": 1234.0, "share": 0.42, "seconds": 2.0, "tokens": 2468, "memory": 5e8, "loss": 4.5, "parts": {}}
    found = {
        "case": name,
        "threads": 1,
        "dtype": "fp32",
        "clock": "cpu",
        "device": "CPU",
        "peak": 9e10,
        "fast_peak": None,
        "rounds": 3,
        "others": 0.05,
    }
    found |= {"sides": {"ours": side}, "ratios": {}, "notes": []}
    return found | changes


def test_a_row_says_speed_ratio_and_share_and_leaves_out_who_took_no_part():
    trl = {**result("x")["sides"]["ours"], "rate": 500.0, "parts": {"train": 4.0}}
    sides = {"ours": result("x")["sides"]["ours"], "trl": trl}
    found = result("sft small", sides=sides, ratios={"trl": {"median": 2.468, "low": 2.4, "high": 2.5}}, others=0.3)
    text = page.page([found], "python -m scripts.bench sft")
    row = next(line for line in text.splitlines() if line.startswith("| SFT, small: 16 rows | 1,234"))
    assert row.split(" | ")[1:] == ["1,234", "500", "2.47 (2.40-2.50)", "", "", "42%", "42%", "", "30% ! |"]
    assert "- / - / 4.00" in text


def test_a_faster_library_is_told():
    text = page.page([result("sft small", fast_peak=2.5e11)], "python -m scripts.bench sft")
    assert "90 GFLOP/s with 1 thread(s) in PyTorch, and 250 by oneDNN" in text
    assert "oneDNN" not in page.page([result("sft small")], "python -m scripts.bench sft")


def test_growth_says_how_straight_its_line_is():
    assert page.line([(1, 3), (2, 5), (3, 7)]) == pytest.approx((2, 1))
    sizes = (4, 8, 16)
    curve = [result(f"sft small by-batch {rows}x128") for rows in sizes]
    for rows, each in zip(sizes, curve, strict=True):
        each["sides"] = {"ours": {**each["sides"]["ours"], "tokens": 128 * rows, "seconds": 0.1 * rows, "memory": None}}
    text = page.page(curve, "x")
    assert "seconds grow by 781.2 µs per token; a straight line explains 100.0% of the differences" in text


def test_ranks_are_put_beside_one_rank():
    two = result("sft small ranks-2")
    two["sides"] = {"ours": {**two["sides"]["ours"], "rate": 2468.0}}
    text = page.page([result("sft small"), two], "x")
    assert "| SFT, small: 16 rows, 2 ranks | 2,468 | 1,234 | 1 | 2.00 |" in text


# --- the plain loops -------------------------------------------------------------------------------------------------


class PlainEngine:
    """What an objective needs of an engine, without DeepSpeed."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module, self.device = module, torch.device("cpu")

    def __call__(self, *args, **kwargs):
        return self.module(*args, **kwargs)


SETUP = Setup("fp32", "sdpa", None, gradient_checkpointing=False, dropout=False, trained=True, seed=3)
TOKENIZER = train_tokenizer(["a b c d e f g"] * 3, 300, None)


def policy() -> LlamaForCausalLM:
    return build_policy(INIT, TOKENIZER, SETUP)


def scorer() -> torch.nn.Module:
    return build_scorer(INIT, TOKENIZER, SETUP, head="new")


def ids(draw: random.Random, low: int, high: int) -> np.ndarray:
    return np.array([draw.randrange(5, 260) for _ in range(draw.randint(low, high))], np.int32)


def pair_examples() -> list[PairExample]:
    draw, found = random.Random(1), []
    for row in range(4):
        answers = [ids(draw, 2, 7) for _ in range(2)]
        masks = [np.ones(len(answer), np.bool_) for answer in answers]
        found.append(PairExample(ids(draw, 2, 6), answers[0], masks[0], answers[1], masks[1], 0.0, row))
    return found


def objective_loss(objective, batch) -> torch.Tensor:
    counts = {name: float(count) for name, count in objective.counts(batch).items()}
    return sum_terms(objective.loss(batch), counts)


def check_same(loss: torch.Tensor, model: torch.nn.Module, raw_loss: torch.Tensor, raw: RawLlama) -> None:
    """Equal losses, and equal gradients of an early, a late and a last weight."""
    assert float(raw_loss.detach()) == pytest.approx(float(loss.detach()), abs=CLOSE)
    loss.backward()
    raw_loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    qkv = torch.cat([grads[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkv"])
    head = grads["score.weight" if "score.weight" in grads else "lm_head.weight"]
    expected = [grads["model.embed_tokens.weight"], qkv, grads["model.layers.1.mlp.down_proj.weight"], head]
    found = [raw.embedding.grad, raw.layers[0]["qkv"].grad, raw.layers[1]["down"].grad, raw.head.grad]
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, atol=CLOSE, rtol=0)
        assert float(other.abs().max()) > 100 * CLOSE


def test_sft_loop_equals_the_objective():
    draw, examples = random.Random(2), []
    for row in range(5):
        tokens = ids(draw, 6, 14)
        examples.append(TokenExample(tokens, np.arange(len(tokens)) >= 3, row))
    model = policy()
    raw = RawLlama(model).train()
    loss = objective_loss(SFTObjective(PlainEngine(PolicyModule(model)), OptimBlock()), collate.tokens(examples, PAD))
    check_same(loss, model, raw_losses.sft_loss(raw, [token_pair(example) for example in examples]), raw)


def test_dpo_loop_equals_the_objective():
    examples, model = pair_examples(), policy()
    raw, ref = RawLlama(model).train(), torch.tensor([[-20.0, -21.0], [-9.0, -11.0], [-30.0, -12.0], [-15.0, -15.0]])
    batch = collate.pairs(examples, PAD)
    batch = type(batch)(**{**vars(batch), "ref": ref})
    objective = PreferenceObjective.of(Policy(PlainEngine(PolicyModule(model))), OptimBlock(), DpoLoss())
    raw_loss = raw_losses.dpo_loss(raw, [answer_pair(example) for example in examples], ref, 0.1)
    check_same(objective_loss(objective, batch), model, raw_loss, raw)


def test_reward_loop_equals_the_objective():
    examples, model = pair_examples(), scorer()
    raw = RawLlama(model).train()
    objective = RewardObjective.from_block(PlainEngine(ScorerModule(model)), OptimBlock(), RmBtLoss())
    loss = objective_loss(objective, collate.pairs(examples, PAD))
    check_same(loss, model, raw_losses.reward_loss(raw, [answer_pair(example) for example in examples]), raw)


def experience(groups: list, values: dict[str, torch.Tensor]) -> tuple[Experience, torch.Tensor]:
    """Groups (prompt, answers) as padded rows, and where their answers' tokens stand; values: (M,) by field."""
    rows = [(prompt, answer) for prompt, answers in groups for answer in answers]
    wide, long = max(len(prompt) for prompt, _ in rows), max(len(answer) for _, answer in rows)
    tokens = torch.full((len(rows), wide + long), PAD)
    attention, mask = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros(len(rows), long, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(rows):
        tokens[i, wide - len(prompt) : wide + len(answer)] = torch.tensor([*prompt, *answer])
        attention[i, wide - len(prompt) : wide + len(answer)] = True
        mask[i, : len(answer)] = True
    spread = {name: torch.zeros(mask.shape).masked_scatter(mask, value.detach()) for name, value in values.items()}
    return Experience(tokens, attention, mask, scores=torch.zeros(len(rows)), **spread), mask


def two_groups() -> list:
    draw = random.Random(5)
    return [(ids(draw, 2, 5).tolist(), [ids(draw, 1, 6).tolist() for _ in range(3)]) for _ in range(2)]


def test_grpo_loop_equals_the_objective():
    groups, model = two_groups(), policy()
    raw, flat = RawLlama(model).train(), Flat.of(groups)
    with torch.no_grad():
        logprobs = raw.logprobs(flat)
    ref = logprobs + 0.3 * torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(0))
    scores = torch.tensor([1.0, 0.0, 0.0, 0.5, 1.0, 1.0])
    advantages = raw_losses.group_advantages(scores, 3)
    torch.testing.assert_close(advantages, grpo(scores.view(2, 3), eps=1e-4).flatten().float(), atol=CLOSE, rtol=0)
    spread = {"old_logprobs": logprobs, "ref_logprobs": ref, "advantages": advantages[flat.rows]}
    recipe = GRPORecipe.model_validate(ROOT_MODEL, by_alias=True)
    state = OnlineState.at_start(recipe)
    objective = PolicyObjective.from_recipe(PlainEngine(PolicyModule(model)), recipe, state)
    loss = objective_loss(objective, experience(groups, spread)[0])
    raw_loss = raw_losses.grpo_loss(raw, flat, advantages, ref, kl_coef=recipe.kl.coef, clip=(0.2, 0.2))
    check_same(loss, model, raw_loss, raw)


def test_critic_loop_equals_the_objective_and_its_advantages():
    groups, model = two_groups(), scorer()
    raw, flat = RawLlama(model).train(), Flat.of(groups)
    draw = torch.Generator().manual_seed(0)
    old, rewards = (torch.randn(len(flat.reads), generator=draw) for _ in range(2))
    advantages, returns = raw_losses.gae_by_row(rewards, old, flat, 0.95)
    fields = {"old_logprobs": old, "ref_logprobs": old, "advantages": advantages, "rewards": rewards}
    batch, mask = experience(groups, {**fields, "old_values": old, "returns": returns})
    expected = gae(batch.rewards, batch.old_values, mask, gamma=1.0, lam=0.95)
    for mine, other in zip((advantages, returns), expected, strict=True):
        torch.testing.assert_close(mine, other[mask], atol=CLOSE, rtol=0)
    recipe = PPORecipe.model_validate({**ROOT_MODEL, "critic": {"path": "c"}}, by_alias=True)
    objective = ValueObjective.from_block(PlainEngine(ScorerModule(model)), recipe.critic, recipe.value_loss)
    check_same(objective_loss(objective, batch), model, raw_losses.value_loss(raw, flat, old, returns, 0.2), raw)


def test_whole_segments_say_the_same_as_shared_prompts():
    groups, raw = two_groups(), RawLlama(policy())
    rows = [(prompt, answer) for prompt, answers in groups for answer in answers]
    torch.testing.assert_close(raw.logprobs(Flat.of(groups)), raw.logprobs(Flat.whole(rows)), atol=CLOSE, rtol=0)


def test_the_plain_sampler_reports_the_policys_own_log_probs_and_stops():
    raw, prompts = RawLlama(policy()), [prompt for prompt, _ in two_groups()]
    stops = list(range(200, 300))  # so many that answers end at various lengths, and finished ones leave the cache
    sampled = generate(raw, prompts, 8, 12, stops, seed=4)
    lengths = [len(answer) for answer in sampled.answers]
    assert len(lengths) == 16 and len(set(lengths)) > 3 and max(lengths) <= 12
    for answer in sampled.answers:
        assert all(token not in stops for token in answer[:-1]) and (len(answer) == 12 or answer[-1] in stops)
    flat = Flat.of((prompt, sampled.answers[8 * i : 8 * i + 8]) for i, prompt in enumerate(prompts))
    torch.testing.assert_close(torch.cat(sampled.logprobs), raw.logprobs(flat), atol=CLOSE, rtol=0)
    assert math.isfinite(float(sampled.logprobs[0].sum()))


def test_work_that_pauses_lets_others_have_its_thread():
    thread, heard = OneThread(), []

    def long() -> str:
        heard.append("begun")
        thread.serve()
        return "ended"

    future = thread.begin(long)
    assert thread.do(lambda: heard.copy()) == ["begun"] and not future.done()
    with pytest.raises(ZeroDivisionError):
        thread.do(lambda: 1 / 0)
    thread.go_on()
    assert future.result(timeout=10) == "ended"
    assert thread.do(lambda: 3) == 3

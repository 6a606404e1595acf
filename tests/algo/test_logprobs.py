"""Token log-probs and entropy against log-softmax written out, truncation against a loop over sorted tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf.algo.logprobs import (
    entropy,
    log1mexp,
    mixed_logits,
    scale_logits,
    sequence_logprobs,
    token_contrast,
    token_logprobs,
    truncate_logits,
)

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
OPTIONS = [
    OFF,
    {"temperature": 0.7, "top_k": 0, "top_p": 1.0},
    {"temperature": 1.0, "top_k": 3, "top_p": 1.0},
    {"temperature": 1.0, "top_k": 0, "top_p": 0.6},
    {"temperature": 1.3, "top_k": 4, "top_p": 0.7},
    {"temperature": 1.0, "top_k": 1, "top_p": 1.0},
    {"temperature": 1.0, "top_k": 0, "top_p": 1e-6},
]


def kept_by_hand(logits: list[float], top_k: int, top_p: float) -> set[int]:
    """Token ids of the truncated set, by walking down from the most likely one. For logits without ties."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    order = order[:top_k] if top_k else order
    total = sum(math.exp(logits[token]) for token in order)
    kept: set[int] = set()
    mass = 0.0
    for token in order:
        if mass >= top_p:
            break
        kept.add(token)
        mass += math.exp(logits[token]) / total
    return kept


def by_hand(logits: Tensor, target: int, temperature: float, top_k: int, top_p: float) -> float:
    scaled = (logits / temperature).tolist()
    kept = kept_by_hand(scaled, top_k, top_p) | {target}
    return scaled[target] - math.log(sum(math.exp(scaled[token]) for token in kept))


@pytest.mark.parametrize("options", OPTIONS)
def test_token_logprobs_match_a_loop(options: dict[str, float]) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 9, dtype=torch.float64) * 2
    targets = torch.randint(0, 9, (2, 6))
    found = token_logprobs(logits, targets, **options)
    for b in range(2):
        for t in range(6):
            expected = by_hand(logits[b, t], int(targets[b, t]), **options)
            assert abs(float(found[b, t]) - expected) < 1e-12


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_match_finite_differences(options: dict[str, float]) -> None:
    torch.manual_seed(1)
    logits = (torch.randn(3, 7, dtype=torch.float64) * 2).requires_grad_()
    targets = torch.tensor([0, 3, 6])
    assert torch.autograd.gradcheck(lambda z: token_logprobs(z, targets, **options), (logits,), atol=1e-7)


@pytest.mark.parametrize("options", OPTIONS)
def test_value_and_gradient_are_autograds_through_truncate_logits(options: dict[str, float]) -> None:
    torch.manual_seed(2)
    logits = torch.randn(4, 5, 11, dtype=torch.float64).requires_grad_()
    targets = torch.randint(0, 11, (4, 5))
    scaled = scale_logits(logits, temperature=options["temperature"])
    cut = truncate_logits(scaled, top_k=options["top_k"], top_p=options["top_p"], keep=targets)
    plain = cut.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    ours = token_logprobs(logits, targets, **options)
    torch.testing.assert_close(ours, plain, atol=1e-12, rtol=0)
    weight = torch.randn_like(ours)
    grads = [torch.autograd.grad((value * weight).sum(), logits)[0] for value in (ours, plain)]
    torch.testing.assert_close(grads[0], grads[1], atol=1e-12, rtol=0)


def test_no_options_is_log_softmax_and_inputs_are_left_alone() -> None:
    torch.manual_seed(3)
    logits, targets = torch.randn(3, 8), torch.tensor([1, 7, 0])
    before = logits.clone()
    expected = logits.log_softmax(-1)[torch.arange(3), targets]
    torch.testing.assert_close(token_logprobs(logits, targets, **OFF), expected, atol=1e-6, rtol=0)
    token_logprobs(logits, targets, temperature=0.5, top_k=2, top_p=0.5)
    assert torch.equal(logits, before)


def test_bfloat16_logits_are_computed_in_float32_and_get_a_bfloat16_gradient() -> None:
    torch.manual_seed(4)
    logits = torch.randn(2, 50).bfloat16().requires_grad_()
    targets = torch.tensor([3, 4])
    for options in OPTIONS:
        found = token_logprobs(logits, targets, **options)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, token_logprobs(logits.float(), targets, **options), atol=0, rtol=0)
        (grad,) = torch.autograd.grad(found.sum(), logits)
        assert grad.dtype == torch.bfloat16
    assert entropy(logits).dtype == torch.float32


def test_truncation_keeps_what_a_walk_down_the_probabilities_keeps() -> None:
    torch.manual_seed(5)
    logits = torch.randn(300, 12, dtype=torch.float64) * 2
    for top_k, top_p in [(0, 0.3), (0, 0.9), (5, 1.0), (5, 0.8), (12, 0.5), (20, 1.0), (1, 0.01)]:
        found = truncate_logits(logits, top_k=top_k, top_p=top_p)
        for row, cut in zip(logits.tolist(), found, strict=True):
            assert set(cut.isfinite().nonzero().flatten().tolist()) == kept_by_hand(row, top_k, top_p)


def test_truncation_by_hand() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert truncate_logits(logits, top_k=0, top_p=0.79).isfinite().tolist() == [True, True, False, False]
    assert truncate_logits(logits, top_k=0, top_p=0.81).isfinite().tolist() == [True, True, True, False]
    # in the three most likely ones the first two have 0.8 / 0.95 = 0.84
    assert truncate_logits(logits, top_k=3, top_p=0.83).isfinite().tolist() == [True, True, False, False]
    assert truncate_logits(logits, top_k=3, top_p=0.85).isfinite().tolist() == [True, True, True, False]
    kept = truncate_logits(logits, top_k=1, top_p=1.0, keep=torch.tensor(3))
    assert kept.isfinite().tolist() == [True, False, False, True]
    assert truncate_logits(logits, top_k=0, top_p=1.0) is logits


def test_ties_with_the_last_kept_token_stay() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0], [1.0, 2.0, 0.0, 1.0]])
    for options in ({"top_k": 2, "top_p": 1.0}, {"top_k": 0, "top_p": 0.6}, {"top_k": 2, "top_p": 0.99}):
        assert truncate_logits(logits, **options).isfinite().sum(-1).tolist() == [3, 3]


def test_a_token_outside_of_the_set_has_a_finite_logprob_and_gradient() -> None:
    logits = torch.tensor([[9.0, 1.0, 0.0]], requires_grad=True)
    value = token_logprobs(logits, torch.tensor([2]), temperature=1.0, top_k=1, top_p=1.0)
    torch.testing.assert_close(value, torch.tensor([-math.log(1 + math.exp(9))]), atol=1e-5, rtol=0)
    (grad,) = torch.autograd.grad(value.sum(), logits)
    assert grad.isfinite().all() and grad[0, 1] == 0  # the dropped token is not trained


def test_sampled_tokens_keep_their_logprob_exactly() -> None:
    torch.manual_seed(6)
    logits = torch.randn(64, 40)
    for options in OPTIONS:
        scaled = scale_logits(logits, temperature=options["temperature"])
        cut = truncate_logits(scaled, top_k=options["top_k"], top_p=options["top_p"])
        drawn = torch.multinomial(cut.softmax(-1), 1).squeeze(-1)
        when_sampled = cut.log_softmax(-1).gather(-1, drawn[:, None]).squeeze(-1)
        torch.testing.assert_close(token_logprobs(logits, drawn, **options), when_sampled, atol=2e-6, rtol=0)


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    value = token_logprobs(logits, torch.tensor([1]), **OFF)
    assert value == -2e4
    (grad,) = torch.autograd.grad(value.sum(), logits)
    assert grad.tolist() == [[-1, 1, 0]]
    assert entropy(logits) == 0


def test_no_grad_and_strided_logits() -> None:
    torch.manual_seed(7)
    logits = torch.randn(2, 5, 6, dtype=torch.float64)
    targets = torch.randint(0, 6, (2, 4))
    with torch.no_grad():
        sliced = token_logprobs(logits[:, :-1], targets, **OFF)
    copied = token_logprobs(logits[:, :-1].contiguous(), targets, **OFF)
    assert torch.equal(sliced, copied)


def test_entropy_by_hand_and_of_a_truncated_distribution() -> None:
    uniform = torch.zeros(5, dtype=torch.float64)
    assert abs(float(entropy(uniform)) - math.log(5)) < 1e-12
    cut = truncate_logits(torch.tensor([1.0, 1.0, 0.0, -3.0], dtype=torch.float64), top_k=2, top_p=1.0)
    cut.requires_grad_()
    assert abs(float(entropy(cut.detach())) - math.log(2)) < 1e-12
    (grad,) = torch.autograd.grad(entropy(cut), cut)
    assert grad.isfinite().all()


def test_entropy_has_the_right_gradient() -> None:
    torch.manual_seed(8)
    logits = torch.randn(3, 6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(entropy, (logits,))


@pytest.mark.parametrize("options", OPTIONS)
def test_entropy_of_the_sampled_distribution_has_a_finite_gradient(options: dict[str, float]) -> None:
    torch.manual_seed(9)
    logits = (torch.randn(5, 9, dtype=torch.float64) * 2).requires_grad_()

    def ours(z: Tensor) -> Tensor:
        scaled = scale_logits(z, temperature=options["temperature"])
        return entropy(truncate_logits(scaled, top_k=options["top_k"], top_p=options["top_p"]))

    found = ours(logits)
    (grad,) = torch.autograd.grad(found.sum(), logits)
    assert found.isfinite().all() and grad.isfinite().all()
    for row in range(5):
        # the definition, on the kept tokens alone
        z = (logits[row] / options["temperature"]).detach()
        kept = sorted(kept_by_hand(z.tolist(), options["top_k"], options["top_p"]))
        inside = logits.detach()[row, kept].requires_grad_()
        probs = (inside / options["temperature"]).softmax(-1)
        expected = -(probs * probs.log()).sum()
        assert abs(float((found[row] - expected).detach())) < 1e-12
        wanted = torch.zeros(9, dtype=torch.float64)
        wanted[kept] = torch.autograd.grad(expected, inside)[0]
        torch.testing.assert_close(grad[row], wanted, atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(ours, (logits,))


def test_the_gradient_of_the_entropy_is_finite_at_its_ends_and_in_narrow_types() -> None:
    one = torch.tensor([[3.0, -torch.inf, -torch.inf], [1e4, -1e4, -torch.inf]], requires_grad=True)
    found = entropy(one)
    (grad,) = torch.autograd.grad(found.sum(), one)
    assert found.tolist() == [0, 0] and (grad == 0).all()
    narrow = torch.randn(3, 8).bfloat16().requires_grad_()
    (grad,) = torch.autograd.grad(entropy(truncate_logits(narrow.float(), top_k=3, top_p=0.9)).sum(), narrow)
    assert grad.dtype == torch.bfloat16 and grad.isfinite().all()


def test_sequence_logprobs_sum_the_mask() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -torch.inf], [-4.0, -torch.inf, -torch.inf]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=torch.bool)
    assert sequence_logprobs(logprobs, mask).tolist() == [-3, -4]


# --- what is not a log-prob of the token itself -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log1mexp_keeps_its_digits_at_both_ends(dtype: torch.dtype) -> None:
    x = torch.tensor([-1e-4, -0.5, -math.log(2), -1.0, -40.0, -2000.0], dtype=dtype, requires_grad=True)
    found = log1mexp(x)
    expected = [math.log(-math.expm1(value)) for value in x.tolist()]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    (grad,) = torch.autograd.grad(found.sum(), x)
    assert grad.tolist() == pytest.approx(
        [-1 / math.expm1(-value) if value > -700 else 0.0 for value in x.tolist()], rel=1e-3
    )


def test_log1mexp_of_0_is_finite_and_without_gradient() -> None:
    x = torch.zeros(1, requires_grad=True)
    found = log1mexp(x)
    assert found.isfinite() and found < -10 and torch.autograd.grad(found.sum(), x)[0] == 0


def test_a_contrast_is_the_mean_over_the_best_other_tokens() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, 3.0], [0.5, 4.0, 1.0, 0.0]], dtype=torch.float64)
    found = token_contrast(logits, torch.tensor([3, 2]), k=2)

    def softplus(x: float) -> float:
        return math.log1p(math.exp(x))

    odds = (
        1 / (1 + math.exp(-1)),
        1 / (1 + math.exp(-3.5)),
    )  # of the best against the second best that is not the target
    first = odds[0] * softplus(3 - 2) + (1 - odds[0]) * softplus(3 - 1)
    second = odds[1] * softplus(1 - 4) + (1 - odds[1]) * softplus(1 - 0.5)
    assert found.tolist() == pytest.approx([first, second], abs=1e-12)


def test_a_contrast_is_the_expectation_of_the_drawn_one_gradient_too() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 7, dtype=torch.float64, requires_grad=True), torch.tensor([0, 3, 6])
    (found,) = torch.autograd.grad(token_contrast(logits, targets, k=3).sum(), logits)
    expected = torch.zeros_like(logits)
    for row, target in enumerate(targets.tolist()):
        others = sorted((j for j in range(7) if j != target), key=lambda j, r=row: -logits[r, j].item())[:3]
        odds = logits[row, others].detach().softmax(-1)
        for odd, j in zip(odds, others, strict=True):
            one = torch.nn.functional.softplus(logits[row, target] - logits[row, j])
            expected += odd * torch.autograd.grad(one, logits)[0]
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("k", [1, 4, 5, 50])
def test_a_contrast_takes_at_most_all_other_tokens(k: int) -> None:
    torch.manual_seed(1)
    logits, targets = torch.randn(6, 5), torch.arange(6) % 5
    found = token_contrast(logits, targets, k=k)
    assert found.shape == (6,) and found.isfinite().all() and (found > 0).all()
    if k >= 4:
        torch.testing.assert_close(found, token_contrast(logits, targets, k=4), atol=1e-6, rtol=0)
    assert token_contrast(logits.bfloat16(), targets, k=k).dtype == torch.float32


def test_a_mixture_is_the_normalised_product():
    own, other = (torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(2))
    product = own.softmax(-1) ** 0.7 * other.softmax(-1) ** 0.3
    found = mixed_logits(own, other, mixture=0.3).softmax(-1)
    torch.testing.assert_close(found, product / product.sum(-1, keepdim=True), atol=1e-12, rtol=0)
    assert mixed_logits(own, other, mixture=0.0).equal(own) and mixed_logits(own, other, mixture=1.0).equal(other)
    impossible = other.index_fill(-1, torch.tensor([2]), -torch.inf)
    assert mixed_logits(own, impossible, mixture=0.0).equal(own), "what has no share has no say"
    assert (mixed_logits(own, impossible, mixture=0.1).softmax(-1)[:, 2] == 0).all()
    assert mixed_logits(own.bfloat16(), other.bfloat16(), mixture=0.5).dtype == torch.float32

"""Selection among answers to a prompt: by hand, against brute force, and by what must hold."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from rlhf.algo.selection import bon_expected, bon_kl, rejection_sample, rso_accept, win_rates

SCORES = torch.tensor([0.3, -1.0, 2.0, 0.3, 1.1], dtype=torch.float64)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_best_answer_is_always_accepted():
    uniforms = torch.full((5,), 1 - 1e-9, dtype=torch.float64)
    probabilities, accepted = rso_accept(SCORES, uniforms, beta=0.5)
    assert probabilities[2] == 1 and accepted.tolist() == [False, False, True, False, False]
    _, accepted = rso_accept(SCORES, torch.zeros(5, dtype=torch.float64), beta=0.5)
    assert accepted.all()


def test_a_small_beta_takes_the_top_and_a_large_one_anything():
    for seed in range(20):
        assert set(rejection_sample(SCORES, accept=2, beta=1e-6, generator=generator(seed))) == {2, 4}
    drawn = [rejection_sample(SCORES, accept=1, beta=1e6, generator=generator(seed))[0] for seed in range(2000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=5) / 2000
    torch.testing.assert_close(shares, torch.full((5,), 0.2), atol=0.04, rtol=0)


def test_first_draws_follow_the_published_loop():
    """Against a scalar loop as the paper prints it, over many draws: shares of answers among the accepted."""

    def published(seed: int) -> list[int]:
        chance = generator(seed)
        left, accepted = dict(enumerate(SCORES.tolist())), []
        while len(accepted) < 2:
            highest = max(left.values())
            order = [list(left)[i] for i in torch.randperm(len(left), generator=chance).tolist()]
            for i in order:
                if float(torch.rand((), generator=chance)) >= math.exp((left[i] - highest) / 0.7):
                    continue
                accepted.append(i)
                del left[i]
                if len(accepted) == 2:
                    break
        return accepted

    draws = 3000
    ours, theirs = (
        torch.bincount(torch.tensor([i for seed in range(draws) for i in draw(seed)]), minlength=5) / draws
        for draw in (lambda seed: rejection_sample(SCORES, accept=2, beta=0.7, generator=generator(seed)), published)
    )
    torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0)
    assert ours[2] > ours[4] > ours[0] > ours[1]


def test_too_few_candidates_are_all_accepted_once():
    found = rejection_sample(SCORES, accept=50, beta=1e-9, generator=generator(0))
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert rejection_sample(SCORES[:0], accept=3, beta=1.0, generator=generator(0)) == []
    assert rejection_sample(SCORES, accept=3, beta=0.5, generator=generator(4)) == rejection_sample(
        SCORES, accept=3, beta=0.5, generator=generator(4)
    )


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_expected_best_is_the_mean_over_all_subsets(n):
    subsets = [max(subset) for subset in itertools.combinations(SCORES.tolist(), n)]
    assert float(bon_expected(SCORES, n=n)) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


def test_expected_best_of_many_rows_and_many_answers():
    rows = torch.randn(3, 128, dtype=torch.float64, generator=generator(0))
    found = bon_expected(rows, n=64)
    assert found.shape == (3,)
    for row, value in zip(rows, found, strict=True):
        assert float(bon_expected(row[torch.randperm(128)], n=64)) == pytest.approx(float(value), abs=1e-9)
    torch.testing.assert_close(bon_expected(rows, n=128), rows.max(-1).values, atol=1e-12, rtol=0)
    torch.testing.assert_close(bon_expected(rows, n=1), rows.mean(-1), atol=1e-12, rtol=0)


def test_the_bound_is_the_kl_of_continuous_scores():
    """Best of n has density n F^(n-1) against the uniform: integrate n u^(n-1) log(n u^(n-1))."""
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    for n in (2, 4, 16):
        density = n * u ** (n - 1)
        kl = torch.where(density > 0, density * density.log(), 0.0).mean()
        assert float(bon_kl(torch.tensor(float(n)))) == pytest.approx(float(kl), abs=1e-4)


def test_win_rates_by_hand_and_their_mean():
    rates = win_rates(torch.tensor([0.0, math.log(3.0)], dtype=torch.float64))
    torch.testing.assert_close(rates, torch.tensor([0.25, 0.75], dtype=torch.float64), atol=1e-12, rtol=0)
    rates = win_rates(SCORES)
    assert float(rates.mean()) == pytest.approx(0.5, abs=1e-12), "one wins where another loses"
    assert rates.argsort().tolist()[0] == 1 and int(rates.argmax()) == 2 and rates[0] == rates[3]


def test_unscored_answers_take_no_part_in_win_rates():
    with_gap = torch.cat([SCORES[:2], torch.tensor([torch.nan], dtype=torch.float64), SCORES[2:]])
    rates = win_rates(with_gap)
    assert rates[2].isnan()
    torch.testing.assert_close(rates[~rates.isnan()], win_rates(SCORES), atol=1e-12, rtol=0)
    assert win_rates(torch.tensor([1.0, torch.nan])).isnan().all(), "nothing to compare with"
    torch.testing.assert_close(win_rates(torch.stack([SCORES, -SCORES]))[0], win_rates(SCORES), atol=0, rtol=0)

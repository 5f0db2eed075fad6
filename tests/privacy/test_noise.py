from __future__ import annotations

import pytest
import torch
from scipy import stats

from fedflame.privacy.noise import SECRET_BYTES, Noise, simulated_secret

SECRET = bytes(range(SECRET_BYTES))


def noise(secret: bytes = SECRET, *context: str) -> Noise:
    return Noise(secret, context or ("run", "plan"))


def test_draws_are_standard_normal_and_independent_of_each_other() -> None:
    draws = noise().normal((300, 700), 0, "A")
    assert draws.shape == (300, 700) and draws.dtype == torch.float32
    flat = draws.flatten().double()
    assert stats.kstest(flat.numpy(), "norm").pvalue > 0.01
    half = len(flat) // 2
    for one, other in (
        (flat[:half], flat[half:]),
        (flat[:-1], flat[1:]),
        (flat[:half] ** 2, flat[half:] ** 2),
    ):
        assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.01


def test_an_odd_number_of_draws_has_no_draw_twice() -> None:
    draws = noise().normal((7,), 0, "A")
    assert len(set(draws.tolist())) == 7


def test_the_same_answer_has_the_same_draws_and_any_other_has_others() -> None:
    draws = noise().normal((50,), 3, "A")
    assert torch.equal(draws, noise().normal((50,), 3, "A"))
    others = [
        noise().normal((50,), 4, "A"),
        noise().normal((50,), 3, "B"),
        noise(bytes(SECRET_BYTES)).normal((50,), 3, "A"),
        noise(SECRET, "run", "other").normal((50,), 3, "A"),
        noise(SECRET, "other", "plan").normal((50,), 3, "A"),
    ]
    for other in others:
        assert not bool((draws == other).any())


@pytest.mark.parametrize("threads", [1, 3])
def test_every_value_of_a_sum_has_noise_of_its_own_whatever_threads_draw_it(threads: int) -> None:
    sums = {"A": torch.rand(3, 5), "B": torch.rand(7, 2, 4), "s": torch.rand(())}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        noised = noise().added_to(sums, 1.5, 2)
    finally:
        torch.set_num_threads(before)
    assert list(noised) == list(sums)
    for name, value in sums.items():
        assert torch.equal(noised[name], value + 1.5 * noise().normal(value.shape, 2, name)), name


def test_sampled_rows_are_drawn_each_by_itself() -> None:
    count, rate, steps = 400, 0.3, 500
    sampled = torch.zeros(steps, count)
    for step in range(steps):
        sampled[step, noise().sample(count, rate, step)] = 1
    assert stats.binomtest(int(sampled.sum()), steps * count, rate).pvalue > 0.01
    # The size of a sample varies as that of independent draws does: a shuffle would give one size.
    assert abs(float(sampled.sum(1).var()) / (count * rate * (1 - rate)) - 1) < 0.25
    by_row = sampled.sum(0)
    assert abs(float(by_row.var()) / (steps * rate * (1 - rate)) - 1) < 0.25
    assert abs(float(torch.corrcoef(sampled[:, :2].T)[0, 1])) < 0.15


def test_a_rate_of_one_takes_every_row_and_a_sample_can_be_empty() -> None:
    assert noise().sample(20, 1.0, 0) == list(range(20))
    assert any(noise().sample(3, 0.1, step) == [] for step in range(20))


def test_simulated_clients_have_secrets_of_their_own_that_follow_from_the_seed() -> None:
    secrets = {simulated_secret(seed, client) for seed in (0, 1) for client in (0, 1, 10)}
    assert len(secrets) == 6 and {len(secret) for secret in secrets} == {SECRET_BYTES}
    assert simulated_secret(1, 0) == simulated_secret(1, 0)

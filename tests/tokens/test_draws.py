"""Hash draws: uniform, reproducible, and blind to torch's random state."""

import pytest
import torch

from diffusion_tokred.tokens import draw, mix


def key(*values):
    return torch.tensor(mix(*values))


def plain_draw(key, n, high):
    """The same hash in Python's own integers, which cannot overflow."""

    def finalise(x):
        x = (x ^ (x >> 16)) * 0x21F0AAAD % 2**32
        x = (x ^ (x >> 15)) * 0x735A2D97 % 2**32
        return x ^ (x >> 15)

    return [finalise((p * 0x9E3779B9 ^ key ^ key >> 32) % 2**32) % high for p in range(n)]


@pytest.mark.parametrize("value", [0, 1, 2**31, 2**32 - 1, 2**63 - 1, -1, -(2**63), mix(3, 1, 4)])
@pytest.mark.parametrize("high", [1, 4, 9, 2**32 - 1])
def test_the_hash_never_wraps(value, high):
    assert draw(torch.tensor(value), 300, high).tolist() == plain_draw(value, 300, high)


def test_some_draws_never_change():
    """Images made with a seed must stay what they are: these numbers are part of the format."""
    assert (mix(0), mix(0, 1, 2)) == (5225608189600411232, 6375744124188398876)
    assert draw(torch.tensor(0), 12, 4).tolist() == [0, 2, 0, 0, 2, 1, 0, 1, 1, 0, 2, 1]


@pytest.mark.parametrize("high", [2, 4, 6, 9, 16])
def test_uniform(high):
    n = 20_000
    counts = torch.bincount(draw(key(1, high), n, high), minlength=high).double()
    chi2 = ((counts - n / high) ** 2 / (n / high)).sum().item()
    assert len(counts) == high and chi2 < high - 1 + 5 * (2 * (high - 1)) ** 0.5  # mean + 5 standard deviations


def test_steps_and_neighbours_are_independent():
    """Pairs of draws (same place at successive steps, successive places at one step) are uniform on 4 x 4."""
    table = torch.stack([draw(key(0, step, 0), 4096, 4) for step in range(50)])
    for a, b in [(table[:-1], table[1:]), (table[:, :-1], table[:, 1:])]:
        counts = torch.bincount((a * 4 + b).flatten(), minlength=16).double()
        expected = a.numel() / 16
        assert ((counts - expected) ** 2 / expected).sum().item() < 15 + 5 * 30**0.5


def test_close_keys_are_not_shuffles_of_each_other():
    rows = [draw(torch.tensor(k), 64, 2**32 - 1).sort().values for k in range(8)]
    for i in range(8):
        for j in range(i):
            assert not torch.isin(rows[i], rows[j]).any()


def test_prefix():
    assert torch.equal(draw(key(5), 1000, 4)[:37], draw(key(5), 37, 4))
    assert draw(key(5), 0, 4).shape == (0,)


def test_random_state_is_neither_read_nor_changed():
    torch.manual_seed(0)
    before, first = torch.get_rng_state(), draw(key(1, 2), 100, 4)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    assert torch.equal(first, draw(key(1, 2), 100, 4))
    assert first.dtype == torch.int64


def test_mix_tells_apart_values_order_and_length():
    values = [(), (0,), (0, 0), (1,), (0, 1), (1, 0), (2**64 - 2,), (-1,), (5, 3, 1), (5, 1, 3)]
    keys = [mix(*v) for v in values]
    assert len(set(keys)) == len(values)
    assert all(0 <= k < 2**63 for k in keys)
    assert len({mix(seed, step, level) for seed in range(10) for step in range(50) for level in range(5)}) == 2500


def test_mix_has_no_weak_bits():
    """Flip one input bit: about half of the output bits change."""
    flips = [(mix(7, 9) ^ mix(7 ^ 1 << i, 9)).bit_count() for i in range(64)]
    assert min(flips) >= 14 and 29 < sum(flips) / 64 < 34


@pytest.mark.parametrize(
    "bad", [(torch.tensor([1]), 4, 4), (torch.tensor(1.0), 4, 4), (torch.tensor(1), -1, 4), (torch.tensor(1), 4, 0)]
)
def test_wrong_arguments(bad):
    with pytest.raises(ValueError, match=r"0-d int64|high"):
        draw(*bad)

"""Keyed noise: Philox's published answers, equal forms, and the right distribution."""

import math

import pytest
import torch

from hf_paged.noise import _to_gumbel, gumbel, gumbel_dense, philox, seed_bits

# kat_vectors of Random123 (philox4x32 10): counter, key, answer.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return torch.tensor([int(word, 16) for word in text.split()])[:, None]


def longs(*values):
    return torch.tensor([seed_bits(value) for value in values])


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_known_answers(counter, key, answer):
    assert torch.equal(philox(words(counter), words(key)), words(answer))


def test_philox_of_many_counters():
    counter = torch.cat([words(counter) for counter, _, _ in KNOWN], dim=1)
    key = torch.cat([words(key) for _, key, _ in KNOWN], dim=1)
    assert torch.equal(philox(counter, key), torch.cat([words(answer) for _, _, answer in KNOWN], dim=1))


def test_noise_is_as_documented():
    seed, position, token = 0x0123456789ABCDEF, 77, 4 * 1000 + 2
    word = int(philox(torch.tensor([[1000], [77], [0], [0]]), torch.tensor([[0x89ABCDEF], [0x01234567]]))[2])
    expected = -math.log(-math.log((word + 0.5) * 2.0**-32))
    noise = gumbel(longs(seed), torch.tensor([position]), torch.tensor([token]))
    assert noise.dtype == torch.float64
    assert noise.item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("vocab", [1, 2, 3, 4, 5, 127, 1030])
def test_dense_equals_flat(vocab):
    seeds, positions = longs(0, -1, 2**63, 12345678901234567890), torch.tensor([0, 1, 2**31, 99])
    rows = torch.arange(4).repeat_interleave(vocab)
    tokens = torch.arange(vocab).repeat(4)
    dense = gumbel_dense(seeds, positions, vocab)
    assert dense.shape == (4, vocab)
    assert torch.equal(gumbel(seeds[rows], positions[rows], tokens).view(4, vocab), dense)


def test_nothing_asked_nothing_given():
    none = torch.empty(0, dtype=torch.int64)
    assert gumbel(none, none, none).shape == (0,)
    assert gumbel_dense(none, none, 7).shape == (0, 7)


def test_a_row_does_not_depend_on_its_batch():
    seeds, positions = torch.arange(9) * 0x9E3779B97F4A7C1, torch.arange(9)
    batch = gumbel_dense(seeds, positions, 501)
    for row in range(9):
        assert torch.equal(gumbel_dense(seeds[row : row + 1], positions[row : row + 1], 501)[0], batch[row])


def test_any_int_is_a_seed():
    assert seed_bits(2**64 + 5) == 5
    assert seed_bits(-1) == seed_bits(2**64 - 1) == -1
    assert seed_bits(2**63) == -(2**63)


def test_each_part_of_the_key_matters():
    one, two = longs(1), longs(1 + 2**32)
    at, token = torch.tensor([5]), torch.tensor([6])
    values = {
        gumbel(seed, at + moved, token + other).item() for seed in (one, two) for moved in (0, 1) for other in (0, 1, 4)
    }
    assert len(values) == 12


def test_noise_is_finite_at_both_ends():
    ends = _to_gumbel(torch.tensor([0.0, 2.0**32 - 1], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([-math.log(33 * math.log(2)), 33 * math.log(2)], rel=1e-9)


@pytest.mark.parametrize("along", ["tokens", "positions", "seeds"])
def test_noise_is_uniform_underneath(along):
    """Chi-square over 64 bins of the uniform numbers behind the noise, and no correlation from one to the next."""
    count = 1 << 16
    index, fixed = torch.arange(count), torch.full((count,), 3)
    parts = {name: index if name == along else fixed for name in ("seeds", "positions", "tokens")}
    uniform = gumbel(**parts).neg().exp().neg().exp()
    seen = torch.histc(uniform, bins=64, min=0, max=1)
    expected = count / 64
    assert ((seen - expected) ** 2 / expected).sum() < 103.4  # 0.999 quantile of chi-square, 63 degrees of freedom
    centred = uniform - 0.5
    assert abs((centred[1:] * centred[:-1]).mean() * 12) < 3.3 / math.sqrt(count)

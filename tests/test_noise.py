"""Keyed generators."""

import numpy as np
import pytest
import torch

from driftrl.checks import InputError
from driftrl.noise import generator, normal, seed_of


def test_each_part_of_the_key_matters_and_nothing_else():
    keys = [
        (0, 0, 0, 0, "a"),
        (1, 0, 0, 0, "a"),
        (0, 1, 0, 0, "a"),
        (0, 0, 1, 0, "a"),
        (0, 0, 0, 1, "a"),
        (0, 0, 0, 0, "b"),
    ]
    assert len({seed_of(*key) for key in keys}) == len(keys)
    assert seed_of(1, 23) != seed_of(12, 3)
    assert seed_of(1) != seed_of("1")
    assert seed_of("a/str:b") != seed_of("a", "b")
    assert seed_of(np.int64(3), "a") == seed_of(3, "a")
    for key in keys:
        assert torch.equal(
            torch.randn(5, generator=generator(*key)), torch.randn(5, generator=generator(*key))
        )


def test_seeds_are_the_same_on_every_machine():
    assert seed_of(0, 1, 2, 3, "latents") == 0x29F76DA2D5DBCDDF


def test_draws_are_standard_normal_and_unrelated():
    x = normal([generator(0, i, 0, 0, "latents") for i in range(400)], (50,))
    assert abs(float(x.mean())) < 4 / 20000**0.5
    assert abs(float(x.std()) - 1) < 0.02
    correlation = torch.corrcoef(x)
    assert float((correlation - torch.eye(400)).abs().max()) < 0.75


@pytest.mark.parametrize("part", [0.5, True, None, np.float32(1)])
def test_a_key_is_of_words_and_whole_numbers(part):
    with pytest.raises(InputError, match="key: expected a whole number"):
        seed_of(0, part)
    assert seed_of(np.int64(3), torch.tensor(4)) == seed_of(3, 4)


def test_no_generator_draws_no_row():
    drawn = normal([], (2,))
    assert drawn.shape == (0, 2) and drawn.dtype == torch.float32

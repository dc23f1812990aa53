import math

import torch

from bocage.shards.counter_rng import integers, permutations, uniform
from bocage.shards.sample_seed import sample_seed


def seeds(count: int, epoch: int = 0) -> torch.Tensor:
    return torch.tensor([sample_seed(3, epoch, f"D001-2020_AA-S1-1_0-{index}") for index in range(count)])


def test_numbers_are_uniform_and_independent() -> None:
    values = uniform(seeds(2000), "mask", 500).double()
    count = values.numel()
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.mean() - 0.5) < 5 / math.sqrt(12 * count)
    histogram = torch.histc(values.float(), 64, 0, 1)
    chi_square = ((histogram - count / 64) ** 2 / (count / 64)).sum()
    assert chi_square < 63 + 5 * math.sqrt(2 * 63)
    centred = values - 0.5
    for neighbour in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1]):
        assert abs(neighbour.mean() * 12) < 5 / math.sqrt(neighbour.numel())


def test_numbers_of_a_sample_do_not_depend_on_its_batch() -> None:
    together, alone = seeds(8), seeds(8)[5:6]
    assert torch.equal(uniform(together, "crop", 3)[5:6], uniform(alone, "crop", 3))


def test_epoch_and_purpose_change_the_numbers() -> None:
    first = uniform(seeds(50), "crop", 4)
    assert not torch.isclose(first, uniform(seeds(50, epoch=1), "crop", 4)).any()
    assert not torch.isclose(first, uniform(seeds(50), "flip", 4)).any()


def test_numbers_are_pinned() -> None:
    # A change here would silently change every crop and mask of a resumed run.
    values = uniform(torch.tensor([sample_seed(0, 0, "D012-2019_AF-S1-27_5-10")]), "units", 2)
    assert values.tolist() == [[0.2944514751434326, 0.9631356596946716]]


def test_integers_and_permutations_cover_their_range() -> None:
    assert integers(seeds(400), "a", 5).unique().tolist() == [0, 1, 2, 3, 4]
    shuffled = permutations(seeds(20), "b", 7)
    assert torch.equal(shuffled.sort(dim=1).values, torch.arange(7).expand(20, 7))

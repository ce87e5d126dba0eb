"""Orders that depend on names alone, and never on the version of numpy."""

import numpy as np

from ringctx.data.randomness import exponential_times, permutation


def test_a_permutation_has_every_number_once() -> None:
    order = permutation(1000, seed=1, bucket_len=256, epoch=0)
    assert sorted(order.tolist()) == list(range(1000))


def test_seed_bucket_and_epoch_each_change_the_permutation() -> None:
    names = [(0, 256, 0), (1, 256, 0), (0, 512, 0), (0, 256, 1)]
    orders = {
        tuple(permutation(50, seed=seed, bucket_len=length, epoch=epoch).tolist())
        for seed, length, epoch in names
    }
    assert len(orders) == len(names)


def test_a_permutation_is_what_it_was_when_this_test_was_written() -> None:
    order = permutation(8, seed=7, bucket_len=1024, epoch=3)
    assert order.tolist() == [6, 1, 4, 2, 7, 5, 3, 0]


def test_times_ascend_and_come_at_their_rate() -> None:
    times = exponential_times(20_000, rate=4.0, key=(0, 1, 2))
    assert (np.diff(times) > 0).all()
    assert abs(times[-1] / 5000 - 1) < 0.03

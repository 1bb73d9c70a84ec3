"""Batch samplers: what they cover, how often, on which rank, and where they resume."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import chain, islice, permutations, product

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from scipy.stats import chisquare
from torch.utils.data import DataLoader, TensorDataset

from fastreg.errors import FastregError
from fastreg.sampling import Cyclic, EpochSampler, OrderAndReverse, RepeatedBatches, Shuffled, WithReplacement

Builder = Callable[..., EpochSampler]
FIXED = {
    "cyclic": Cyclic,
    "reverse": OrderAndReverse,
    "fixed": partial(Shuffled, partition="fixed"),
}
WITHOUT = {**FIXED, "redrawn": Shuffled}
ALL = {
    **WITHOUT,
    "repeated": partial(RepeatedBatches, steps=3),
    "samples": WithReplacement,
    "batches": partial(WithReplacement, unit="batch", batches=7),
}
every = pytest.mark.parametrize("build", ALL.values(), ids=ALL)


def frozen(epoch: EpochSampler) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(batch) for batch in epoch)


def uniform(outcomes: list, cells: set) -> bool:
    """No evidence at 0.1 % that ``outcomes`` are not spread evenly over ``cells`` (chi-square)."""
    counts = Counter(outcomes)
    assert set(counts) <= cells
    return chisquare([counts[cell] for cell in cells]).pvalue > 1e-3


@pytest.mark.parametrize("build", WITHOUT.values(), ids=WITHOUT)
def test_an_epoch_without_replacement_has_every_sample_once(build: Builder) -> None:
    sampler = build(23, 5, seed=4)
    for _ in range(4):
        batches = list(sampler)
        assert [len(batch) for batch in batches if len(batch) != 5] == [3]
        assert sorted(chain(*batches)) == list(range(23))
        assert len(batches) == len(sampler) == 5


@every
def test_drop_last_leaves_full_batches(build: Builder) -> None:
    sampler = build(23, 5, drop_last=True)
    batches = list(sampler)
    assert {len(batch) for batch in batches} == {5} and len(batches) == len(sampler)
    assert len(build(20, 5, drop_last=True)) == len(build(20, 5))


@every
def test_batches_are_lists_of_ints(build: Builder) -> None:
    batch = next(iter(build(9, 4)))
    assert type(batch) is list and {type(index) for index in batch} == {int}


def test_redrawn_partitions_and_their_orders_are_uniform() -> None:
    sampler = Shuffled(4, 2, seed=1)
    drawn = [tuple(frozenset(batch) for batch in sampler) for _ in range(3000)]
    pairs = [frozenset(pair) for pair in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))]
    assert uniform(drawn, {(pair, frozenset(range(4)) - pair) for pair in pairs})


def test_fixed_partition_keeps_its_batches_and_draws_their_order_uniformly() -> None:
    partition = frozen(Cyclic(8, 3, seed=2))
    sampler = Shuffled(8, 3, partition="fixed", seed=2)
    assert uniform([frozen(sampler) for _ in range(3000)], set(permutations(partition)))


def test_fixed_partitions_of_one_seed_are_the_same_and_of_another_differ() -> None:
    partitions = [set(frozen(build(50, 8, seed=3))) for build in FIXED.values()]
    assert partitions[0] == partitions[1] == partitions[2] != set(frozen(Cyclic(50, 8, seed=4)))
    assert set(frozen(WithReplacement(50, 8, unit="batch", batches=100, seed=3))) == partitions[0]


def test_samples_with_replacement_are_independent_and_uniform() -> None:
    # All 5^3 batches are equally likely if and only if the three indices are independent and uniform.
    sampler = WithReplacement(5, 3, batches=2, seed=6)
    batches = [batch for _ in range(3000) for batch in frozen(sampler)]
    assert uniform(batches, set(product(range(5), repeat=3)))


def test_batches_with_replacement_are_independent_and_uniform() -> None:
    sampler = WithReplacement(8, 3, unit="batch", batches=2, seed=6)
    assert uniform([frozen(sampler) for _ in range(3000)], set(product(frozen(Cyclic(8, 3, seed=6)), repeat=2)))


def test_cyclic_repeats_its_epoch() -> None:
    sampler = Cyclic(23, 5)
    assert list(sampler) == list(sampler) == list(sampler)


def test_order_is_followed_by_its_reverse_and_then_redrawn() -> None:
    sampler = OrderAndReverse(60, 5)
    epochs = [list(sampler) for _ in range(4)]
    assert epochs[1] == epochs[0][::-1] and epochs[3] == epochs[2][::-1]
    assert epochs[2] not in epochs[:2]


@pytest.mark.parametrize("partition", ["redrawn", "fixed"])
def test_repeated_batches_are_those_of_shuffling_in_a_row(partition: str) -> None:
    sampler, once = RepeatedBatches(23, 5, steps=3, partition=partition), Shuffled(23, 5, partition=partition)
    for _ in range(2):
        assert list(sampler) == [batch for batch in once for _ in range(3)]
    assert len(sampler) == 15


@every
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_every_batch(build: Builder, world_size: int) -> None:
    whole = build(23, 5, seed=1)
    ranks = [build(23, 5, seed=1, rank=rank, world_size=world_size) for rank in range(world_size)]
    for _ in range(2):
        for batch, *shares in zip(whole, *ranks, strict=True):
            assert batch == list(chain(*shares))
            lengths = [len(share) for share in shares]
            assert max(lengths) - min(lengths) <= 1 <= min(lengths)


def test_micro_batches_of_ranks_are_those_of_the_batch() -> None:
    def micro_batches(batch: list[int]) -> list[list[int]]:
        return [batch[start : start + 4] for start in range(0, len(batch), 4)]

    ranks = [Shuffled(48, 24, rank=rank, world_size=3) for rank in range(3)]
    for batch, *shares in zip(Shuffled(48, 24), *ranks, strict=True):
        assert micro_batches(batch) == [micro for share in shares for micro in micro_batches(share)]


@every
def test_draws_depend_on_seed_and_epoch_alone(build: Builder) -> None:
    first = build(40, 4, seed=5)
    torch.manual_seed(0)
    expected = [list(first) for _ in range(3)]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    second = build(40, 4, seed=5)
    assert [list(second.of_epoch(epoch)) for epoch in (2, 0, 1)] == [expected[2], expected[0], expected[1]]
    second.set_epoch(1)
    assert list(second) == expected[1] and list(second) == expected[2]
    assert torch.equal(before, torch.get_rng_state())


@every
def test_neighbouring_seeds_share_no_epoch(build: Builder) -> None:
    one, other = ({frozen(build(40, 4, seed=seed).of_epoch(epoch)) for epoch in range(4)} for seed in (5, 6))
    assert not one & other


def test_a_broken_off_epoch_is_not_repeated() -> None:
    sampler = Shuffled(40, 4)
    next(iter(sampler))
    assert list(sampler) == list(Shuffled(40, 4).of_epoch(1))


def loader(sampler: EpochSampler, workers: int) -> DataLoader:
    return DataLoader(TensorDataset(torch.arange(sampler.size)), batch_sampler=sampler, num_workers=workers)


def seen(batches: DataLoader) -> list[list[int]]:
    return [indices.tolist() for (indices,) in batches]


def stored(state: dict) -> dict:
    """``state`` as a checkpoint gives it back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def check_resuming(build: Builder, workers: int, cut: int) -> None:
    """Two epochs, ``cut`` batches, a checkpoint, three batches, another: the rest is what it would have been."""
    expected = [list(build(23, 5).of_epoch(epoch)) for epoch in range(4)]
    sampler = build(23, 5)
    run = loader(sampler, workers)
    assert [seen(run), seen(run)] == expected[:2]
    for consumed, _ in enumerate(run, 1):
        if consumed == cut:
            state = stored(sampler.state_dict(consumed=consumed))
            break
    for more in (3, 0):
        sampler = build(23, 5)
        sampler.load_state_dict(state)
        run = loader(sampler, workers)
        if more:
            assert [batch.tolist() for (batch,) in islice(run, more)] == expected[2][cut : cut + more]
            state, cut = stored(sampler.state_dict(consumed=more)), cut + more
    assert [seen(run), seen(run)] == [expected[2][cut:], expected[3]]


@every
@pytest.mark.parametrize("cut", [1, 2])
def test_resuming_without_workers(build: Builder, cut: int) -> None:
    check_resuming(build, 0, cut)


def test_resuming_with_workers() -> None:
    check_resuming(partial(RepeatedBatches, steps=2), 2, 4)


def test_workers_fetch_ahead_of_the_loop() -> None:
    # What makes state_dict(consumed=...) necessary.
    sampler = Shuffled(100, 5)
    next(batches := iter(loader(sampler, 2)))
    assert sampler.state_dict()["batches"] > 1 == sampler.state_dict(consumed=1)["batches"]
    del batches


def state_after(sampler: EpochSampler, batches: int) -> dict:
    list(islice(sampler, batches))
    return sampler.state_dict()


@pytest.mark.parametrize("consumed, passes", [(5, 2), (None, 1)])
def test_state_at_the_last_batch_and_after_the_epoch(consumed: int | None, passes: int) -> None:
    # In the loop the rest of the epoch is empty, so that the loop ends; after the loop the next epoch is next.
    sampler, resumed = Shuffled(23, 5), Shuffled(23, 5)
    list(sampler)
    resumed.load_state_dict(sampler.state_dict(consumed=consumed))
    rest = [list(resumed) for _ in range(passes)]
    assert rest == [[], list(sampler)][-passes:]


def test_set_epoch_keeps_the_loaded_position_in_that_epoch_only() -> None:
    expected = [list(Shuffled(23, 5).of_epoch(epoch)) for epoch in range(3)]
    sampler = Shuffled(23, 5)
    sampler.set_epoch(1)
    state = state_after(sampler, 1)
    for epoch, rest in ((1, expected[1][1:]), (2, expected[2])):
        sampler.load_state_dict(state)
        sampler.set_epoch(epoch)
        assert list(sampler) == rest
        sampler.set_epoch(epoch)
        assert list(sampler) == expected[epoch]


def test_a_state_serves_another_number_of_ranks() -> None:
    sampler = Shuffled(40, 8)
    state = state_after(sampler, 1)
    halves = [Shuffled(40, 8, rank=rank, world_size=2) for rank in range(2)]
    for half in halves:
        half.load_state_dict(state)
    assert [left + right for left, right in zip(*halves, strict=True)] == list(sampler.of_epoch(0, 1))


def test_iterators_that_have_not_begun_move_nothing() -> None:
    # DataLoaders with workers make two iterators and use one; torchdata's StatefulDataLoader loads in between.
    sampler, state = Shuffled(23, 5), state_after(Shuffled(23, 5), 2)
    unused = iter(sampler)
    sampler.load_state_dict(state)
    assert iter(sampler) is not unused
    assert list(sampler) == list(sampler.of_epoch(0, 2))


# Quadratic losses l_i(w) = w' A_i w / 2 - c_i' w of six samples, whose A_i do not commute.
NUMBERS = np.random.default_rng(0)
ROOTS = NUMBERS.normal(size=(6, 2, 2))
CURVATURES, SLOPES, START = ROOTS @ ROOTS.transpose(0, 2, 1), NUMBERS.normal(size=(6, 2)), np.array([1.0, -2.0])


def descend(batches: tuple[tuple[int, ...], ...], rate: float) -> np.ndarray:
    weights = START
    for batch in map(list, batches):
        weights = weights - rate * (CURVATURES[batch].mean(0) @ weights - SLOPES[batch].mean(0))
    return weights


def flow(partition: tuple[tuple[int, ...], ...], time: float, penalty: float, full_batch: float) -> np.ndarray:
    """Gradient flow of ``C + (penalty / 4 m) sum_k ||grad C_k||^2 + (full_batch / 4) ||grad C||^2``, in closed form."""
    blocks = [(CURVATURES[list(k)].mean(0), SLOPES[list(k)].mean(0)) for k in partition]
    matrix, slope = (np.mean(parts, 0) for parts in zip(*blocks))
    squares = [np.mean([a @ part for a, part in zip(next(zip(*blocks)), parts)], 0) for parts in zip(*blocks)]
    whole = matrix + penalty / 2 * squares[0] + full_batch / 2 * matrix @ matrix
    optimum = np.linalg.solve(whole, slope + penalty / 2 * squares[1] + full_batch / 2 * matrix @ slope)
    return optimum + expm(-time * whole) @ (START - optimum)


DYNAMICS = {
    "shuffled": (partial(Shuffled, partition="fixed"), 6, 1, 1.0, 0.0, 3),
    "shuffled against the loss alone": (partial(Shuffled, partition="fixed"), 6, 1, 0.0, 0.0, 2),
    "repeated": (partial(RepeatedBatches, partition="fixed", steps=3), 6, 1, 1.0, 0.0, 3),
    "repeated against the whole length": (partial(RepeatedBatches, partition="fixed", steps=3), 6, 1, 3.0, 0.0, 2),
    "with replacement": (partial(WithReplacement, unit="batch"), 27, 1, 0.0, 1.0, 3),
    "with replacement against shuffled": (partial(WithReplacement, unit="batch"), 27, 1, 1.0, 0.0, 2),
    "cyclic": (Cyclic, 1, 1, 1.0, 0.0, 2),
    "order and reverse, averaged": (OrderAndReverse, 2, 1, 1.0, 0.0, 3),
    "order and reverse, in sequence": (OrderAndReverse, 1, 2, 1.0, 0.0, 3),
}


@pytest.mark.parametrize("build, paths, epochs, penalty, full_batch, slope", DYNAMICS.values(), ids=DYNAMICS)
def test_modified_loss_of_each_scheme(
    build: Builder, paths: int, epochs: int, penalty: float, full_batch: float, slope: int
) -> None:
    """The mean over all paths that a scheme can take, each as often as the others, leaves the flow at this order."""
    sampler, partition = build(6, 2, seed=8), frozen(Cyclic(6, 2, seed=8))
    passes = 2 if isinstance(sampler, OrderAndReverse) else 1000
    drawn = [frozen(sampler) for _ in range(passes)]
    distinct = set(drawn) if epochs == 1 else {drawn[0] + drawn[1]}
    assert len(distinct) == paths
    rates = 2.0 ** -np.arange(8, 13)
    errors = [
        np.linalg.norm(
            np.mean([descend(path, rate) for path in distinct], 0)
            - flow(partition, epochs * len(sampler) * rate, penalty * rate, full_batch * rate)
        )
        for rate in rates
    ]
    assert np.polyfit(np.log(rates), np.log(errors), 1)[0] == pytest.approx(slope, abs=0.15)


REFUSED = {
    "size": (lambda: Shuffled(0, 1), "Shuffled: size must be an integer >= 1, got 0"),
    "float size": (lambda: Shuffled(8.0, 1), "size must be an integer >= 1, got 8.0"),
    "batch_size": (lambda: Cyclic(8, 9), "Cyclic: batch_size must be an integer from 1 to 8, got 9"),
    "seed": (lambda: Cyclic(8, 2, seed=-1), "seed must be an integer >= 0, got -1"),
    "drop_last": (lambda: Cyclic(8, 2, drop_last=None), "drop_last must be one of"),
    "rank": (lambda: Cyclic(8, 2, rank=2, world_size=2), "rank must be an integer from 0 to 1, got 2"),
    "short last": (lambda: Shuffled(9, 4, world_size=2), "world_size must be an integer from 1 to 1, got 2"),
    "short drawn": (lambda: WithReplacement(9, 4, unit="batch", world_size=2), "world_size must be"),
    "partition": (lambda: Shuffled(8, 2, partition="new"), "partition must be one of ('redrawn', 'fixed'), got 'new'"),
    "steps": (lambda: RepeatedBatches(8, 2, steps=0), "RepeatedBatches: steps must be an integer >= 1, got 0"),
    "batches": (lambda: WithReplacement(8, 2, batches=True), "batches must be an integer >= 1, got True"),
    "unit": (lambda: WithReplacement(8, 2, unit="rows"), "unit must be one of ('sample', 'batch'), got 'rows'"),
    "set_epoch": (lambda: Shuffled(8, 2).set_epoch(-1), "epoch must be an integer >= 0, got -1"),
    "of_epoch": (lambda: Shuffled(8, 2).of_epoch(-1), "epoch must be an integer >= 0, got -1"),
    "consumed": (lambda: Shuffled(8, 2).state_dict(consumed=1), "consumed must be an integer from 0 to 0, got 1"),
    "other sampler": (
        lambda: Shuffled(8, 2).load_state_dict(Shuffled(8, 2, seed=1).state_dict()),
        "state_dict must be of Shuffled(size=8, batch_size=2, seed=0, drop_last=False, partition='redrawn'), got",
    ),
    "foreign state": (lambda: Shuffled(8, 2).load_state_dict({}), "got that of None"),
    "state beyond the epoch": (
        lambda: Shuffled(8, 2).load_state_dict({**Shuffled(8, 2).state_dict(), "batches": 5}),
        "state_dict['batches'] must be an integer from 0 to 4, got 5",
    ),
}


@pytest.mark.parametrize("call, message", REFUSED.values(), ids=REFUSED)
def test_refusals(call: Callable[[], object], message: str) -> None:
    with pytest.raises(FastregError) as error:
        call()
    assert message in str(error.value)


def test_ranks_are_served_where_no_batch_is_short() -> None:
    for sampler in (Shuffled(9, 4, drop_last=True, world_size=4), WithReplacement(9, 4, world_size=4)):
        assert {len(share) for share in sampler} == {1}

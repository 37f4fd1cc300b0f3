"""The order of the windows, the two places they are read from, and the windows of evaluation."""

import jax
import numpy as np
import pytest

from train.data.windows import (
    WindowOrder,
    check_evaluation,
    check_placement,
    evaluation_windows,
    gather_windows,
    host_batches,
)
from train.errors import UserError

RNG = np.random.default_rng(0)
DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def tokens_of(n: int) -> np.ndarray:
    return RNG.integers(0, 205, n).astype(np.uint8)


# The order

GOLDEN = {
    0: [5727, 4959, 159, 7519, 7327, 4191],
    1: [287, 1503, 3423, 1695, 3807, 2719],
    1000: [702, 574, 6334, 4926, 4094, 894],
}


def test_the_order_is_the_pinned_one():
    """Changes only if the order of every run changes: then say so in the changelog."""
    order = WindowOrder(num_tokens=10_000, context=64, batch_size=6, seed=1)
    assert order.windows_per_epoch == 155
    assert order.starts(0).tolist() == GOLDEN[0]
    assert order.starts(1).tolist() == GOLDEN[1]
    assert order.starts(1000).tolist() == GOLDEN[1000]


@pytest.mark.parametrize(
    ("num_tokens", "context", "batch_size"),
    [(10, 5, 1), (11, 5, 3), (100, 7, 4), (101, 7, 50), (1000, 10, 7), (999, 1, 8)],
)
def test_an_epoch_reads_each_window_once_and_nothing_outside(num_tokens, context, batch_size):
    order = WindowOrder(num_tokens, context, batch_size, seed=3)
    windows = order.windows_per_epoch
    assert windows == (num_tokens - context) // context
    starts = order.starts_of_steps(0, -(-3 * windows // batch_size)).ravel()
    shifts = set()
    for epoch in range(3):
        part = np.sort(starts[epoch * windows : (epoch + 1) * windows])
        assert part[0] < context
        assert (np.diff(part) == context).all()
        assert part[-1] + context + 1 <= num_tokens
        shifts.add(int(part[0]))
    assert shifts <= set(range(context))


def test_epochs_and_seeds_differ_in_shift_and_permutation():
    orders = [WindowOrder(100_000, 100, 999, seed) for seed in (0, 1)]
    epochs = [order.starts(step) for order in orders for step in (0, 1)]
    for i, one in enumerate(epochs):
        for other in epochs[:i]:
            assert (one != other).mean() > 0.9
    assert len({int(epoch[0]) % 100 for epoch in epochs}) > 1


def test_a_batch_is_a_function_of_seed_and_step():
    straight = WindowOrder(5000, 32, 24, seed=7)
    batches = [straight.starts(step) for step in range(40)]  # through seven epochs
    for step in (39, 3, 17, 0):
        fresh = WindowOrder(5000, 32, 24, seed=7)
        np.testing.assert_array_equal(fresh.starts(step), batches[step])
    np.testing.assert_array_equal(straight.starts_of_steps(5, 30), np.stack(batches[5:35]))


def test_a_stream_drops_nothing_between_epochs():
    one, many = WindowOrder(1000, 10, 1, seed=0), WindowOrder(1000, 10, 7, seed=0)
    singly = np.concatenate([one.starts(step) for step in range(280)])
    np.testing.assert_array_equal(many.starts_of_steps(0, 40).ravel(), singly)
    assert many.epoch(99) == pytest.approx(7.0)


def test_a_batch_may_be_longer_than_an_epoch():
    order = WindowOrder(100, 10, 32, seed=0)
    assert order.windows_per_epoch == 9
    assert sorted(order.starts(0)[:9] // 10) == list(range(9))


def test_offsets_take_64_bits_only_where_they_must():
    assert WindowOrder(1000, 10, 2, 0).starts(0).dtype == np.int32
    big = WindowOrder(2**31 + 2**20, 2**20, 4096, seed=0)
    starts = big.starts(0)
    assert starts.dtype == np.int64
    assert starts.min() >= 0
    assert starts.max() > 2**31 - 2**21


# The two placements


def resident_batch(tokens, order: WindowOrder, step: int) -> np.ndarray:
    gather = jax.jit(gather_windows, static_argnums=2)
    return np.asarray(gather(tokens, order.starts(step), order.context))


def test_both_placements_give_the_same_bits():
    tokens = tokens_of(20_011)
    order = WindowOrder(tokens.size, 48, 16, seed=5)
    placed = jax.device_put(tokens, DEVICE)
    batches = list(host_batches(tokens, order, start_step=20, num_steps=40))  # over an epoch's end
    assert len(batches) == 40
    assert order.epoch(20) < 1 < order.epoch(60)
    for step, batch in enumerate(batches, start=20):
        resident = resident_batch(placed, order, step)
        assert batch.dtype == resident.dtype == np.uint8
        assert batch.shape == (16, 49)
        np.testing.assert_array_equal(batch, resident)
        expected = np.stack([tokens[start : start + 49] for start in order.starts(step)])
        np.testing.assert_array_equal(batch, expected)


def test_the_last_window_reaches_the_last_byte_and_no_further():
    tokens = tokens_of(100)
    starts = np.array([0, 100 - 11], np.int32)
    batch = np.asarray(gather_windows(jax.device_put(tokens, DEVICE), starts, 10))
    np.testing.assert_array_equal(batch, [tokens[:11], tokens[-11:]])


def test_gathering_reads_the_windows_and_copies_no_corpus():
    order = WindowOrder(1_000_000, 64, 32, seed=0)
    placed = jax.device_put(tokens_of(1_000_000), DEVICE)
    gather = jax.jit(gather_windows, static_argnums=2)
    memory = gather.lower(placed, order.starts(0), 64).compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 10_000


def test_the_host_pipeline_resumes_at_a_step():
    tokens = tokens_of(5000)
    order = WindowOrder(tokens.size, 16, 8, seed=1)
    straight = list(host_batches(tokens, order, start_step=0, num_steps=50))
    again = WindowOrder(tokens.size, 16, 8, seed=1)
    resumed = list(host_batches(tokens, again, start_step=31, num_steps=19))
    np.testing.assert_array_equal(np.stack(straight[31:]), np.stack(resumed))
    assert list(host_batches(tokens, order, start_step=50, num_steps=0)) == []


def test_the_host_pipeline_reads_a_mapped_file_through_a_table(tmp_path):
    table = RNG.permutation(256).astype(np.uint8)
    raw = tokens_of(3000)
    raw.tofile(tmp_path / "split.bin")
    mapped = np.memmap(tmp_path / "split.bin", np.uint8, "r")
    order = WindowOrder(raw.size, 16, 8, seed=1)
    through = list(host_batches(mapped, order, start_step=3, num_steps=5, table=table))
    direct = list(host_batches(table[raw], order, start_step=3, num_steps=5))
    np.testing.assert_array_equal(np.stack(through), np.stack(direct))


@pytest.mark.parametrize("process_count", [1, 2, 3, 6])
def test_the_processes_shares_make_up_the_batch(process_count):
    tokens = tokens_of(4000)
    order = WindowOrder(tokens.size, 16, 12, seed=2)
    whole = list(host_batches(tokens, order, start_step=7, num_steps=3))
    shares = [
        list(
            host_batches(
                tokens,
                order,
                start_step=7,
                num_steps=3,
                process_index=index,
                process_count=process_count,
            )
        )
        for index in range(process_count)
    ]
    for step, batch in enumerate(whole):
        parts = [share[step] for share in shares]
        assert {part.shape for part in parts} == {(12 // process_count, 17)}
        np.testing.assert_array_equal(np.concatenate(parts), batch)


# Evaluation


@pytest.mark.parametrize("num_tokens", [11, 12, 19, 20, 21, 97, 100, 101, 128, 250])
@pytest.mark.parametrize("stride", [1, 3, 5, 9, 10])
@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_evaluation_scores_every_byte_but_the_first_exactly_once(num_tokens, stride, batch_size):
    context = 10
    hits = np.zeros(num_tokens, int)
    settings = {"context": context, "stride": stride, "batch_size": batch_size}
    batches = list(evaluation_windows(num_tokens, **settings))
    for batch in batches:
        assert batch.starts.shape == (batch_size,)
        assert batch.scored.shape == (batch_size, context)
        assert batch.starts.min() >= 0
        assert batch.starts.max() + context + 1 <= num_tokens
        rows, columns = np.nonzero(batch.scored)
        targets = batch.starts[rows] + 1 + columns
        np.add.at(hits, targets, 1)
        before = columns + 1  # bytes of the window that come before the target
        assert ((before > context - stride) | (batch.starts[rows] == 0)).all()
    assert hits[0] == 0
    assert (hits[1:] == 1).all()


# Refusals


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: WindowOrder(100, 51, 4, 0), "config.data.context=51"),
        (lambda: check_evaluation(10, 10), "config.data.context=10"),
        (lambda: check_placement("resident", 2**31), "config.data.placement=resident"),
    ],
)
def test_a_corpus_that_does_not_fit_is_refused_in_one_line(call, named):
    with pytest.raises(UserError) as caught:
        call()
    assert str(caught.value).startswith(named)
    assert "\n" not in str(caught.value)


def test_an_order_for_another_length_is_refused():
    order = WindowOrder(100, 10, 4, 0)
    with pytest.raises(ValueError, match="100 tokens, the data has 99"):
        host_batches(np.zeros(99, np.uint8), order, start_step=0, num_steps=1)

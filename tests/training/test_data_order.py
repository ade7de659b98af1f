"""The order of samples: a permutation without memory, and streams that stop, go on and change their world size."""

import multiprocessing
import os
import signal
import threading
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from phalanx_worker.training.data.files import DataError
from phalanx_worker.training.data.permutation import permuted
from phalanx_worker.training.data.prepared import prepared
from phalanx_worker.training.data.source import Arranged, Order
from phalanx_worker.training.data.stream import Share, Stream


class Numbers:
    """A source whose samples are their own indices."""

    fingerprint = "numbers"

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"index": index}


def open_numbers(*, size, seed=7, batch, dp_rank=0, dp_size=1, workers=0, transform=None, shuffle=True):
    arranged = Arranged(Numbers(size), Order(size=size, seed=seed, shuffle=shuffle), transform)
    return Stream(arranged, Share(batch=batch, dp_rank=dp_rank, dp_size=dp_size), workers=workers)


def flat(lists):
    return list(chain.from_iterable(lists))


def indices(stream, batches):
    return [next(stream)["index"].tolist() for _ in range(batches)]


@given(size=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
def test_every_index_of_a_permutation_comes_once(size, key):
    assert sorted(permuted(np.arange(size), size=size, key=key).tolist()) == list(range(size))


def test_a_permutation_of_a_trillion_needs_no_memory():
    size = 10**12
    places = permuted(np.arange(10_000), size=size, key=3)
    assert len(set(places.tolist())) == 10_000
    assert abs(places.mean() / size - 0.5) < 0.02


def test_an_index_outside_is_refused():
    with pytest.raises(ValueError, match="do not lie in 0 to 9"):
        permuted(np.array([10]), size=10, key=1)


def test_a_permutation_looks_like_chance():
    size = 4096
    places = permuted(np.arange(size), size=size, key=11)
    assert abs(np.corrcoef(np.arange(size), places)[0, 1]) < 0.06  # of chance: 0.016
    assert np.mean(np.abs(np.diff(places)) == 1) < 0.005  # neighbours seldom stay together
    fixed = [np.sum(permuted(np.arange(size), size=size, key=key) == np.arange(size)) for key in range(50)]
    assert 0.5 < np.mean(fixed) < 1.7  # one fixed point is expected


def test_epochs_and_seeds_have_orders_of_their_own():
    order = Order(size=100, seed=1, shuffle=True)
    first, second = order.samples(np.arange(100)), order.samples(np.arange(100, 200))
    assert sorted(first) == sorted(second) == list(range(100))
    assert first.tolist() != second.tolist()
    assert first.tolist() != Order(size=100, seed=2, shuffle=True).samples(np.arange(100)).tolist()


def test_without_shuffling_samples_come_as_they_lie():
    stream = open_numbers(size=5, batch=4, shuffle=False)
    assert indices(stream, 3) == [[0, 1, 2, 3], [4, 0, 1, 2], [3, 4, 0, 1]]


@pytest.mark.parametrize("dp_size", [1, 2, 3, 6])
def test_the_global_order_is_the_same_on_any_number_of_ranks(dp_size):
    whole = indices(open_numbers(size=20, batch=6), 7)
    shares = [indices(open_numbers(size=20, batch=6, dp_rank=rank, dp_size=dp_size), 7) for rank in range(dp_size)]
    assert [flat(parts) for parts in zip(*shares, strict=True)] == whole


@given(
    size=st.integers(1, 60),
    batch=st.sampled_from([4, 6, 12]),
    seed=st.integers(0, 100),
    attempts=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12), st.booleans()), min_size=1, max_size=5),
)
@settings(max_examples=80)
def test_no_sample_is_lost_or_seen_twice_whatever_the_stops_and_world_sizes(size, batch, seed, attempts):
    """Each attempt runs some steps on a world size that divides the batch and ends; the last save it made counts."""
    divisors = [n for n in range(1, batch + 1) if batch % n == 0]
    state, seen = None, []
    for steps, choice, saves in attempts:
        dp_size = divisors[choice % len(divisors)]
        ranks = [open_numbers(size=size, batch=batch, seed=seed, dp_rank=r, dp_size=dp_size) for r in range(dp_size)]
        for stream in ranks:
            if state is not None:
                stream.load_state_dict(state)
        trained = [flat(next(stream)["index"].tolist() for stream in ranks) for _ in range(steps)]
        states = [stream.state_dict() for stream in ranks]
        assert all(other == states[0] for other in states)
        if saves:  # else this attempt died before it could save: its steps are trained again
            state = states[0]
            seen += flat(trained)
    for begin in range(0, len(seen), size):
        epoch = seen[begin : begin + size]
        assert len(set(epoch)) == len(epoch), "no sample twice in an epoch"
        assert len(epoch) < size or set(epoch) == set(range(size)), "a full epoch has them all"
    undisturbed = open_numbers(size=size, batch=batch, seed=seed)
    assert seen == flat(indices(undisturbed, len(seen) // batch))


def test_worker_processes_do_not_change_the_order_and_what_they_read_ahead_is_not_counted():
    plain, ahead = open_numbers(size=30, batch=4), open_numbers(size=30, batch=4, workers=2)
    assert indices(ahead, 6) == indices(plain, 6)
    assert ahead.state_dict() == plain.state_dict()
    state, expected = ahead.state_dict(), indices(plain, 3)
    ahead.close()
    again = open_numbers(size=30, batch=4, workers=1)
    again.load_state_dict(state)
    assert indices(again, 3) == expected
    again.close()


def test_a_batch_of_another_size_goes_on_at_the_same_sample():
    stream = open_numbers(size=100, batch=10)
    seen = flat(indices(stream, 3))
    other = open_numbers(size=100, batch=35)
    other.load_state_dict(stream.state_dict())
    seen += flat(indices(other, 2))
    assert sorted(seen) == list(range(100))


def test_augmentation_is_the_same_on_any_layout_and_another_each_epoch():
    def noise(sample, generator):
        return {**sample, "noise": torch.rand((), generator=generator)}

    def draws(batches, **layout):
        stream = open_numbers(size=8, batch=8, transform=noise, **layout)
        return torch.cat([next(stream)["noise"] for _ in range(batches)])

    whole = draws(2)
    halves = [draws(2, dp_rank=rank, dp_size=2, workers=rank) for rank in range(2)]
    assert torch.equal(whole, torch.stack(halves).view(2, 2, 4).transpose(0, 1).flatten())
    assert len(set(whole.tolist())) == 16


def test_going_on_with_other_data_is_refused():
    stream = open_numbers(size=10, batch=2)
    next(stream)
    with pytest.raises(DataError, match="size was 10 and is 11"):
        open_numbers(size=11, batch=2).load_state_dict(stream.state_dict())


def test_an_uneven_share_is_refused():
    with pytest.raises(ValueError, match="a batch of 8 samples cannot be split evenly over 3"):
        Share(batch=8, dp_rank=0, dp_size=3)


def test_a_stream_leaves_torchs_random_state_alone_and_says_how_long_it_held_the_caller():
    before = torch.get_rng_state()
    stream = open_numbers(size=10, batch=2)
    next(stream)
    assert torch.equal(torch.get_rng_state(), before)
    assert 0 < stream.data_wait_s < 10
    assert (stream.position, stream.epoch) == (2, 0.2)


def test_worker_processes_outlive_the_signal_that_asks_a_job_to_stop():
    others = multiprocessing.active_children()
    stream = open_numbers(size=30, batch=4, workers=2)
    before = indices(stream, 1)
    workers = [child for child in multiprocessing.active_children() if child not in others]
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
    assert before + indices(stream, 9) == indices(open_numbers(size=30, batch=4), 10)
    assert all(worker.is_alive() for worker in workers)
    stream.close()
    assert not set(workers) & set(multiprocessing.active_children())


def test_what_several_ranks_need_is_prepared_by_one_of_them(tmp_path):
    made = []

    def make(stream):
        made.append(time.sleep(0.05))
        stream.write(b"content")

    def ask():
        assert prepared("name", make, cache=str(tmp_path)).read_bytes() == b"content"

    ranks = [threading.Thread(target=ask) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(made) == 1


def test_what_was_not_prepared_to_the_end_is_prepared_anew(tmp_path):
    def fail(stream):
        stream.write(b"half")
        raise OSError("the node is full")

    with pytest.raises(OSError, match="full"):
        prepared("name", fail, cache=str(tmp_path))
    assert prepared("name", lambda stream: stream.write(b"whole"), cache=str(tmp_path)).read_bytes() == b"whole"


def test_worker_processes_die_with_their_rank():
    ready, its_end = os.pipe()
    others = multiprocessing.active_children()
    rank = os.fork()
    if not rank:
        try:
            stream = open_numbers(size=30, batch=4, workers=2)
            next(stream)
            workers = [child.pid for child in multiprocessing.active_children() if child not in others]
            os.write(its_end, " ".join(map(str, workers)).encode())
            time.sleep(60)
        finally:
            os._exit(1)
    os.close(its_end)
    workers = [int(pid) for pid in os.read(ready, 100).split()]
    os.kill(rank, signal.SIGKILL)
    os.waitpid(rank, 0)
    deadline = time.monotonic() + 5
    while any(is_running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(workers) == 2 and not any(is_running(pid) for pid in workers)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False

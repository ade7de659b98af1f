"""Gradients are exchanged while backward still computes, and how that is read from a trace."""

import gzip
import json

import pytest
from exchange_gang import TRACED_STEPS, exchanged
from phalanx_worker.training.trace import Overlap, common, main, merged, overlap, read, without


def event(name, begin, end, *, cat="cpu_op", tid=1):
    return {"ph": "X", "name": name, "cat": cat, "tid": tid, "ts": 1e6 * begin, "dur": 1e6 * (end - begin)}


def test_intervals_are_merged_intersected_and_taken_out():
    assert merged([(4, 6), (0, 2), (1, 3), (3, 3.5)]) == [(0, 3.5), (4, 6)]
    assert common([(0, 3), (4, 9)], [(1, 2), (2.5, 5), (8, 12)]) == [(1, 2), (2.5, 3), (4, 5), (8, 9)]
    assert without([(0, 3), (4, 9)], [(1, 2), (8, 12)]) == [(0, 1), (2, 3), (4, 8)]
    assert common([], [(0, 1)]) == [] and without([(0, 1)], []) == [(0, 1)]


def test_on_a_gpu_the_kernels_of_nccl_communicate_and_all_others_compute():
    told = overlap(
        [
            event(
                "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 2, 6, cat="kernel", tid=20
            ),
            event("ampere_sgemm_128x64_nt", 0, 3, cat="kernel", tid=7),
            event("void at::native::vectorized_elementwise_kernel", 5, 7, cat="kernel", tid=7),
            event("nccl:all_reduce", 0, 9, cat="gpu_user_annotation", tid=20),
            event("aten::mm", 0, 9),
            event("ProfilerStep#1", 0, 9, cat="user_annotation"),
        ]
    )
    assert told == Overlap(steps=1, compute_s=5.0, communication_s=4.0, hidden_s=2.0)
    assert (told.exposed_s, told.hidden_share) == (2.0, 0.5)


def test_on_a_cpu_waiting_within_an_operator_and_the_work_of_gloos_own_threads_is_no_computing():
    told = overlap(
        [
            event("gloo:all_reduce", 0, 10, cat="user_annotation", tid=2),
            event("gloo:all_reduce", 5, 12, cat="user_annotation", tid=3),
            event("aten::div_", 8, 9, tid=2),
            event("autograd::engine::evaluate_function: MmBackward0", 0, 20),
            event("aten::mm", 1, 5),
            event("_c10d_functional::wait_tensor", 2, 4),
            event("aten::mm", 11, 14),
        ]
    )
    assert told == Overlap(steps=0, compute_s=5.0, communication_s=12.0, hidden_s=3.0)


def test_a_trace_is_read_plain_or_compressed_and_told_in_a_line(tmp_path, capsys):
    events = [
        event("gloo:all_reduce", 0, 2, tid=2),
        event("aten::mm", 0.5, 4),
        {"ph": "M", "name": "process_name"},
        {"ph": "X"},
    ]
    plain, compressed = tmp_path / "a.json", tmp_path / "a.json.gz"
    plain.write_text(json.dumps({"traceEvents": events}))
    compressed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read(plain) == read(compressed) == events[:2]
    assert main([str(compressed)]) == 0
    line = "0 steps, computing 3.5 s, communication 2 s: 1.5 s of it under computing (75%), 0.5 s exposed"
    assert capsys.readouterr().out == f"{compressed}: {line}\n"


NO_TRACES = {
    "nothing": b"",
    "text": b"not",
    "no events": b"{}",
    "a list": b"[1]",
    "a number of events": b'{"traceEvents": 3}',
    "cut short": gzip.compress(b'{"traceEvents": []}')[:-9],
    "no gzip": b"\x1f\x8bnothing of the kind",
    "damaged": b"\x1f\x8b\x08" + bytes(7) + b"damaged",
}


@pytest.mark.parametrize("content", NO_TRACES.values(), ids=NO_TRACES)
def test_what_is_no_trace_is_refused_with_what_to_give(content, tmp_path, capsys):
    path = tmp_path / "file"
    path.write_bytes(content)
    assert main([str(path)]) == 2
    assert capsys.readouterr().err == (
        f"phalanx: {path} is no trace in Chrome's format; give a file that `phalanx profile` wrote\n"
    )
    assert main([str(tmp_path / "none")]) == 2


def hidden_share(case):
    """Of the communication of both ranks."""
    ranks = exchanged()[case]
    return sum(rank["hidden_s"] for rank in ranks) / sum(rank["communication_s"] for rank in ranks)


@pytest.mark.slow
def test_all_buckets_but_the_last_are_exchanged_while_backward_still_computes():
    for rank in exchanged()["a bucket for each layer"]:
        still_to_do = rank["still_to_do"]
        assert len(still_to_do) >= 4 * TRACED_STEPS
        assert sum(left > 0 for left in still_to_do) >= len(still_to_do) - 2 * TRACED_STEPS  # operators come in pairs
    assert hidden_share("a bucket for each layer") > 0.1


@pytest.mark.slow
def test_one_bucket_for_everything_is_exchanged_when_backward_has_ended():
    for rank in exchanged()["one bucket"]:
        assert rank["still_to_do"] == [0] * len(rank["still_to_do"])
    few, none = hidden_share("a bucket for each layer"), hidden_share("one bucket")
    assert none < few / 2, "a busy machine may note the end of an exchange late, when computing goes on"

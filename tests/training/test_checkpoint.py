"""Saving and restoring in one process: complete or not there, verified, pruned, registered; and where it goes wrong."""

import hashlib
import json
import logging
import os
import threading
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from phalanx.recipes.checkpoint import CheckpointConfig
from phalanx_worker.training import checkpoint_store, checkpoint_writer, main
from phalanx_worker.training.checkpoint import Checkpointer, open_checkpointer
from phalanx_worker.training.checkpoint_store import CheckpointError, Manifest, Sum, decoded


class Numbers:
    """A piece of state: tensors and a plain number."""

    def __init__(self, value, size=1000):
        self.value = value
        self.tensor = torch.full((size,), float(value))

    def state_dict(self):
        return {"value": self.value, "tensor": self.tensor}

    def load_state_dict(self, state):
        self.value = state["value"]
        self.tensor.copy_(state["tensor"])


class Job:
    """A checkpointer on a directory, and what it registered."""

    def __init__(self, url, *, resume_from=None, **config):
        self.registered = []
        register = lambda url, **data: self.registered.append((url, data))  # noqa: E731
        config = CheckpointConfig(**config)
        self.checkpointer = Checkpointer(config, str(url), resume_from=resume_from, register=register)

    def save(self, *steps, losses=None):
        for step in steps:
            metrics = {"loss": losses[step]} if losses else None
            self.checkpointer.save(step, {"numbers": Numbers(step)}, metrics=metrics)
        self.checkpointer.finish()
        return self

    def restore(self, **options):
        numbers = Numbers(-1)
        step = self.checkpointer.restore({"numbers": numbers}, **options)
        assert step is None or (numbers.value == step and bool((numbers.tensor == step).all()))
        return step


@pytest.fixture(params=["path", "file", "memory"])
def url(request, tmp_path):
    return {
        "path": str(tmp_path / "checkpoints"),
        "file": f"file://{tmp_path}/checkpoints",
        "memory": f"memory://{tmp_path.name}-{id(request)}/checkpoints",
    }[request.param]


class Storage:
    """The local storage, failing where it is told to: the next `times` calls that `fails(path, mode)`."""

    def __init__(self, monkeypatch):
        self.fails, self.times, self.failed = (lambda path, mode: False), 0, 0
        monkeypatch.setattr(checkpoint_store, "READ_PAUSES_S", (0.0, 0.0, 0.0))
        for name in ("open", "ls"):
            monkeypatch.setattr(LocalFileSystem, name, self._around(getattr(LocalFileSystem, name)))

    def fail(self, name, mode, times=1_000_000):
        self.fails = lambda path, how: path.endswith(name) and how == mode
        self.times, self.failed = times, 0

    def heal(self):
        self.times = 0

    def _around(storage, inner):
        def call(self, path, *given, **named):
            mode = named.get("mode", given[0] if given else "rb") if inner.__name__ == "open" else "ls"
            if storage.times and storage.fails(str(path), mode):
                storage.times -= 1
                storage.failed += 1
                raise OSError(5, "Input/output error")
            return inner(self, path, *given, **named)

        return call


@pytest.fixture
def storage(monkeypatch):
    return Storage(monkeypatch)


def steps_at(path):
    return sorted(int(entry.name.removeprefix("step-")) for entry in Path(path).iterdir())


def data_file(path, step):
    return Path(path) / f"step-{step:09d}" / "__0_0.distcp"


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_newest_state_is_restored(url, asynchronous):
    assert Job(url).restore() is None
    Job(url, asynchronous=asynchronous).save(10, 20)
    assert Job(url).restore() == 20


def test_a_local_file_goes_to_the_disk_while_it_is_written(tmp_path, monkeypatch):
    """One fsync of all of it at its end would look like a hang on a slow disk."""
    sizes = []
    monkeypatch.setattr(checkpoint_writer, "SYNC_BYTES", 1000)
    monkeypatch.setattr(checkpoint_writer, "PIECE_BYTES", 500)
    monkeypatch.setattr(checkpoint_writer.os, "fdatasync", lambda fd: sizes.append(os.fstat(fd).st_size))
    Job(tmp_path).save(1)
    assert len(sizes) >= 4 and sizes == sorted(sizes) and sizes[0] < 2000
    assert Job(tmp_path).restore() == 1


def test_a_checkpoint_is_registered_when_it_is_complete_and_only_then(url):
    job = Job(url)

    def check(url, **data):
        files = fsspec.core.url_to_fs(url)
        assert files[0].exists(f"{files[1]}/manifest.json")
        job.registered.append((url, data))

    job.checkpointer._register = check
    job.save(10, losses={10: 2.5})
    [(registered, data)] = job.registered
    assert registered.endswith("/step-000000010")
    assert data["step"] == 10 and data["loss"] == 2.5 and data["bytes"] > 4000
    assert job.checkpointer.last.bytes == data["bytes"] and job.checkpointer.last.took_s > 0


def test_training_may_change_the_state_as_soon_as_save_returns(tmp_path):
    job, numbers = Job(tmp_path), Numbers(1, size=1_000_000)
    job.checkpointer.save(1, {"numbers": numbers})
    numbers.tensor.zero_()
    job.checkpointer.finish()
    fresh = Numbers(0, size=1_000_000)
    Job(tmp_path).checkpointer.restore({"numbers": fresh})
    assert bool((fresh.tensor == 1).all())


def test_a_copy_made_aside_is_of_the_state_as_it_was_if_staged_is_awaited(tmp_path):
    job, numbers = Job(tmp_path), Numbers(1, size=3_000_000)
    for step in (1, 2, 3):
        numbers.tensor.fill_(step)
        job.checkpointer.save(step, {"numbers": numbers}, wait=False)
        job.checkpointer.staged()
    numbers.tensor.zero_()
    job.checkpointer.finish()
    assert job.checkpointer.staged() < 0.01, "nothing is under way"
    for step in (3, 2, 1):
        assert Job(tmp_path).checkpointer.restore({"numbers": numbers}, before=step + 1) == step
        assert bool((numbers.tensor == step).all())


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: 4.0, 50: float("nan"), 60: 5.0}
    Job(tmp_path, keep_last=2, keep_best=2).save(*losses, losses=losses)
    assert steps_at(tmp_path) == [20, 30, 50, 60]
    Job(tmp_path / "highest", keep_last=1, keep_best=1, best="highest").save(*losses, losses=losses)
    assert steps_at(tmp_path / "highest") == [60]  # the highest is the last
    Job(tmp_path / "unrated", keep_last=1, keep_best=5).save(10, 20)
    assert steps_at(tmp_path / "unrated") == [20]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_an_evaluation_after_the_save_decides_which_one_is_the_best(url, asynchronous):
    job = Job(url, asynchronous=asynchronous, keep_last=1, keep_best=1, best_metric="accuracy", best="highest")
    for step, accuracy in ((10, 0.2), (20, 0.9), (30, 0.5), (40, 0.7)):
        job.checkpointer.save(step, {"numbers": Numbers(step)}, metrics={"loss": 1.0})
        job.checkpointer.rate(step, {"accuracy": accuracy})
    job.checkpointer.finish()
    kept = checkpoint_store.Store(str(url)).entries()
    assert [(entry.step, entry.manifest.metrics) for entry in kept] == [
        (40, {"loss": 1.0, "accuracy": 0.7}),
        (20, {"loss": 1.0, "accuracy": 0.9}),
    ]
    assert Job(url).restore() == 40


def test_an_evaluation_that_is_over_before_the_checkpoint_is_complete_is_noted_with_it(tmp_path, monkeypatch):
    rated, clear = threading.Event(), checkpoint_store.Store.clear
    monkeypatch.setattr(checkpoint_store.Store, "clear", lambda store, step: rated.wait(20) and clear(store, step))
    job = Job(tmp_path)
    job.checkpointer.save(10, {"numbers": Numbers(10)}, metrics={"loss": 1.0})
    job.checkpointer.rate(10, {"accuracy": 0.5})
    rated.set()
    job.checkpointer.finish()
    (entry,) = checkpoint_store.Store(str(tmp_path)).entries()
    assert entry.manifest.metrics == {"loss": 1.0, "accuracy": 0.5}
    assert job.registered[0][1]["accuracy"] == 0.5


def test_what_an_evaluation_found_of_a_state_that_was_given_up_is_not_noted_of_the_next_one(tmp_path):
    job = Job(tmp_path)
    for step in (5, 10):
        job.checkpointer.save(step, {"numbers": Numbers(step)})
    job.checkpointer.rate(10, {"accuracy": 0.9})
    assert job.restore(before=10) == 5
    job.save(10, losses={10: 1.0})
    newest, _ = checkpoint_store.Store(str(tmp_path)).entries()
    assert (newest.step, newest.manifest.metrics) == (10, {"loss": 1.0})


def test_an_evaluation_that_is_made_up_for_after_a_resume_is_noted_too(tmp_path, caplog, storage):
    Job(tmp_path).save(10, losses={10: 1.0})
    job = Job(tmp_path)
    assert job.restore() == 10
    job.checkpointer.rate(9, {"accuracy": 0.1})  # of some other state
    storage.fail(".manifest.json", "wb")
    job.checkpointer.rate(10, {"accuracy": 0.3})
    assert "could not be noted" in caplog.text
    storage.heal()
    job.checkpointer.rate(10, {"accuracy": 0.5})
    (entry,) = checkpoint_store.Store(str(tmp_path)).entries()
    assert entry.manifest.metrics == {"loss": 1.0, "accuracy": 0.5}


@pytest.mark.parametrize("damage", ["flip a bit", "cut short", "remove", "no metadata"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, caplog, damage):
    Job(tmp_path).save(10, 20)
    path = data_file(tmp_path, 20)
    data = bytearray(path.read_bytes())
    if damage == "flip a bit":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "cut short":
        path.write_bytes(data[:-1])
    else:
        path = path if damage == "remove" else path.with_name(".metadata")
        path.unlink()
    with caplog.at_level(logging.WARNING):
        assert Job(tmp_path).restore() == 10
    assert str(path) in caplog.text and "trying the one before" in caplog.text


@pytest.mark.parametrize("content", [None, b"", b"{", b'{"sha256": "", "manifest": {}}'])
def test_a_half_written_checkpoint_does_not_count(tmp_path, caplog, content):
    Job(tmp_path).save(10, 20)
    manifest = data_file(tmp_path, 20).with_name("manifest.json")
    manifest.unlink()
    if content is not None:
        manifest.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert Job(tmp_path).restore() == 10
    assert "manifest.json" in caplog.text
    Job(tmp_path).save(30)
    assert steps_at(tmp_path) == [10, 30]  # what is left of it goes with the next save


def test_only_damaged_checkpoints_are_for_a_person_to_decide(tmp_path):
    Job(tmp_path).save(10)
    data_file(tmp_path, 10).write_bytes(b"")
    with pytest.raises(CheckpointError, match="step-000000010 is damaged, and so is every one before it"):
        Job(tmp_path).restore()


@pytest.mark.parametrize("name", ["manifest.json", "__0_0.distcp"])
def test_a_read_that_fails_for_a_moment_is_tried_again(tmp_path, storage, name):
    Job(tmp_path).save(10, 20)
    storage.fail(f"step-000000020/{name}", "rb", times=2)
    job = Job(tmp_path)
    assert job.restore() == 20
    assert storage.failed == 2
    job.save(30)
    assert steps_at(tmp_path) == [10, 20, 30]


@pytest.mark.parametrize("name", ["manifest.json", "__0_0.distcp", ".metadata"])
def test_training_does_not_start_over_a_checkpoint_that_cannot_be_read(tmp_path, storage, name):
    Job(tmp_path).save(10, 20)
    storage.fail(f"step-000000020/{name}", "rb")
    with pytest.raises(CheckpointError, match=r"step-000000020.*cannot be read \(.*Input/output error"):
        Job(tmp_path).restore()
    storage.heal()
    assert Job(tmp_path).restore() == 20, "nothing was set aside"


def test_training_does_not_start_anew_where_the_storage_cannot_be_listed(tmp_path, storage):
    Job(tmp_path).save(10)
    storage.fail(tmp_path.name, "ls", times=2)
    assert Job(tmp_path).restore() == 10
    storage.fail(tmp_path.name, "ls")
    with pytest.raises(CheckpointError, match="cannot be listed"):
        Job(tmp_path).restore()


def test_what_cannot_be_read_is_never_pruned(tmp_path, storage):
    Job(tmp_path).save(10, 20)
    storage.fail("step-000000020/manifest.json", "rb")
    Job(tmp_path, keep_last=1).save(30)
    storage.heal()
    assert steps_at(tmp_path) == [20, 30]
    assert Job(tmp_path).restore(before=30) == 20


@pytest.mark.parametrize("keep_last", [1, 2, 3, 9])
def test_the_newest_one_from_before_a_step_is_kept_as_this_step_moves_on(tmp_path, keep_last):
    """Each is saved while it is too young to go back to, and by the time that it is not, newer ones have been made."""
    checkpointer, numbers = Job(tmp_path, keep_last=keep_last).checkpointer, {"numbers": Numbers(0)}
    for step in range(4, 61, 4):
        before = min(step - 15, 30)
        checkpointer.save(step, numbers, keep_before=before)
        checkpointer._settle()
        kept = steps_at(tmp_path)
        assert len(kept) <= keep_last + 2
        if before > 4:
            assert max(old for old in kept if old < before) >= before - 16 - 2 * 4
    assert checkpointer.restore(numbers, before=30) in range(8, 30)


def test_a_part_that_a_checkpoint_may_lack_stays_as_it_is(tmp_path):
    job, numbers, health = Job(tmp_path).save(10), Numbers(0), Numbers(5)
    assert job.checkpointer.restore({"numbers": numbers, "health": health}) == 10
    assert (numbers.value, health.value) == (10, 5)
    with pytest.raises(CheckpointError, match="does not fit"):
        job.checkpointer.restore({"numbers": numbers, "optimizer": health})


def test_what_is_damaged_is_not_pruned_before_a_restore_has_said_so(tmp_path):
    Job(tmp_path).save(10, 20)
    data_file(tmp_path, 20).with_name("manifest.json").write_bytes(b"{")
    Job(tmp_path, keep_last=1).save(30)
    assert steps_at(tmp_path) == [20, 30]


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"sha256": "", "manifest": {}}'])
def test_only_corrupt_manifests_are_for_a_person_to_decide(tmp_path, caplog, content):
    Job(tmp_path).save(10, 20)
    for step in (10, 20):
        data_file(tmp_path, step).with_name("manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="step-000000020 is damaged, and so is every one before it"):
        Job(tmp_path).restore()
    assert "step-000000020 is not used: its manifest.json is damaged" in caplog.text


def test_sizes_alone_are_compared_where_verifying_is_off(tmp_path):
    Job(tmp_path).save(10, 20)
    data_file(tmp_path, 20).write_bytes(b"")
    assert Job(tmp_path, verify=False).restore() == 10


def test_after_going_back_what_was_newer_is_never_resumed_from(tmp_path):
    Job(tmp_path).save(10, 20, 30)
    job = Job(tmp_path)
    assert job.restore(before=30) == 20
    assert Job(tmp_path).restore() == 20
    job.save(25)
    assert Job(tmp_path).restore() == 25
    assert steps_at(tmp_path) == [10, 20, 25]


def test_a_step_that_was_left_half_written_is_saved_anew(tmp_path):
    Job(tmp_path).save(10, 20)
    data_file(tmp_path, 20).with_name("manifest.json").unlink()
    data_file(tmp_path, 20).with_name("__7_0.distcp").write_bytes(b"of a rank that is no more")
    Job(tmp_path).save(20)
    assert Job(tmp_path).restore() == 20
    assert not data_file(tmp_path, 20).with_name("__7_0.distcp").exists()


def test_a_state_that_does_not_fit_is_said_and_nothing_older_is_taken_for_it(tmp_path):
    Job(tmp_path).save(10, 20)
    with pytest.raises(CheckpointError, match="is whole but does not fit what is trained now"):
        Job(tmp_path).checkpointer.restore({"numbers": Numbers(0, size=7)})


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_that_fails_is_counted_and_training_goes_on(tmp_path, caplog, storage, asynchronous):
    job = Job(tmp_path, asynchronous=asynchronous)
    storage.fail("step-000000020/__0_0.distcp", "wb")
    job.save(10, 20, 30)
    assert "step 20 could not be saved" in caplog.text and "Input/output error" in caplog.text
    assert (job.checkpointer.failures, job.checkpointer.last.step) == (1, 30)
    assert [data["step"] for _, data in job.registered] == [10, 30]
    assert job.restore() == 30


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_last_save_is_tried_once_more(tmp_path, storage, asynchronous):
    job = Job(tmp_path, asynchronous=asynchronous)
    storage.fail("step-000000020/__0_0.distcp", "wb", times=1)
    job.save(10, 20)
    assert (job.checkpointer.failures, job.checkpointer.last.step) == (1, 20)
    assert Job(tmp_path).restore() == 20


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_training_whose_last_save_fails_twice_does_not_finish(tmp_path, storage, asynchronous):
    job = Job(tmp_path, asynchronous=asynchronous)
    storage.fail("step-000000020/__0_0.distcp", "wb")
    with pytest.raises(CheckpointError, match=r"the last checkpoint, of step 20, could not be saved.*Input/output"):
        job.save(10, 20)
    assert (job.checkpointer.failures, job.checkpointer.last.step) == (2, 10)
    assert job.restore() == 10


def test_going_back_forgets_a_save_that_failed(tmp_path, storage):
    job = Job(tmp_path, asynchronous=False)
    job.checkpointer.save(10, {"numbers": Numbers(10)})
    storage.fail("step-000000020/__0_0.distcp", "wb")
    job.checkpointer.save(20, {"numbers": Numbers(20)})
    assert job.restore() == 10
    job.checkpointer.finish()


@pytest.mark.parametrize(("stops", "step"), [(False, 2), (True, 1)])
def test_a_job_is_finished_when_its_last_step_is_saved_and_only_then(tmp_path, monkeypatch, storage, stops, step):
    (tmp_path / "alphabet.txt").write_text("abcdefghijklmnopqrstuvwxyz " * 40)
    sections = {
        "data": {"paths": [str(tmp_path / "alphabet.txt")], "seq_len": 8, "cache": str(tmp_path / "cache")},
        "model": {"layers": 1, "width": 16, "heads": 2},
        "train": {"steps": 2, "global_batch": 2},
        "checkpoint": {"url": str(tmp_path / "kept")},
        "device": "cpu",
    }
    said = []
    monkeypatch.setattr("phalanx.finished", lambda: said.append("finished"))
    monkeypatch.setattr("phalanx.should_stop", lambda: stops)
    storage.fail(f"step-00000000{step}/__0_0.distcp", "wb")
    with pytest.raises(CheckpointError, match=f"of step {step}, could not be saved"):
        main.main(["lm", json.dumps(sections)])
    assert said == []
    storage.heal()
    assert main.main(["lm", json.dumps(sections)]) == 0
    assert said == ([] if stops else ["finished"])


def test_a_new_job_resumes_from_what_it_is_told_and_later_from_its_own(tmp_path):
    Job(tmp_path / "old").save(10, 20)
    told = str(tmp_path / "old" / "step-000000010")
    job = Job(tmp_path / "new", resume_from=told)
    assert job.restore() == 10
    job.save(15)
    assert Job(tmp_path / "new", resume_from=told).restore() == 15
    assert Job(tmp_path / "old").restore() == 20  # another job's is left as it is
    with pytest.raises(CheckpointError, match="nowhere cannot be resumed from"):
        Job(tmp_path / "newer", resume_from=str(tmp_path / "nowhere")).restore()


def test_the_time_that_training_is_held_is_said(tmp_path):
    job = Job(tmp_path)
    stall_s = job.checkpointer.save(10, {"numbers": Numbers(1)})
    assert 0 < stall_s < 5
    assert job.checkpointer.save(10, {"numbers": Numbers(1)}) < 0.001, "the same step again is not saved again"
    assert job.checkpointer.stall_s >= stall_s
    job.checkpointer.finish()


def test_the_jobs_own_directory_is_used_unless_another_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("PHALANX_CHECKPOINT_DIR", raising=False)
    monkeypatch.delenv("PHALANX_RESUME_FROM", raising=False)
    assert open_checkpointer(CheckpointConfig()) is None
    monkeypatch.setenv("PHALANX_CHECKPOINT_DIR", str(tmp_path / "own"))
    for config, place in ((CheckpointConfig(), "own"), (CheckpointConfig(url=str(tmp_path / "other")), "other")):
        checkpointer = open_checkpointer(config)
        assert isinstance(checkpointer, Checkpointer)
        checkpointer.save(1, {"numbers": Numbers(1)})
        checkpointer.finish()
        assert steps_at(tmp_path / place) == [1]


def test_a_manifest_with_another_byte_is_refused():
    manifest = Manifest(step=3, files={"a": Sum(1, "00")}, metrics={"loss": 1.5})
    assert decoded(manifest.encoded()) == manifest
    with pytest.raises(ValueError, match="its checksum does not fit"):
        decoded(manifest.encoded().replace(b'"step": 3', b'"step": 4'))


def test_checksums_are_those_that_sha256sum_prints(tmp_path):
    Job(tmp_path).save(10)
    document = json.loads(data_file(tmp_path, 10).with_name("manifest.json").read_bytes())
    files = document["manifest"]["files"]
    assert set(files) == {"__0_0.distcp", ".metadata"}
    for name, part in files.items():
        content = data_file(tmp_path, 10).with_name(name).read_bytes()
        assert part == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

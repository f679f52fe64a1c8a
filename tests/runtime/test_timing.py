"""Turns, intervals, and processes that stand still, answer, and are gone afterwards."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import tomexport
from tomexport.artifact import golden_images
from tomexport.errors import BackendError
from tomexport.runtime import timing
from tomexport.runtime.timing import Interval, Job, medians, take_turns, worker

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def _state(pid):
    """Return R, S, T (stopped) …; None if the process is gone, its entry in the table aside."""
    try:
        found = re.search(r"State:\s*(\w)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return None
    return None if found is None or found[1] in "ZX" else found[1]


def _wait_until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.01)
    return value


# ---- figures


def test_medians_are_of_each_round():
    assert medians([[1.0, 9.0, 2.0], [4.0], [3.0, 5.0]]).tolist() == [2, 4, 4]


def test_an_interval_of_equal_figures_is_a_point():
    assert Interval.of(np.full(6, 1.25)) == Interval(1.25, 1.25, 1.25)


def test_an_interval_of_three_figures_holds_them_all():
    # the median of three draws is the smallest with probability 7/27, well above 2.5 %
    assert Interval.of(np.array([1.0, 2.0, 3.0])) == Interval(2, 1, 3)


def test_an_interval_covers_the_true_median_as_often_as_it_says():
    random = np.random.default_rng(0)
    draws = (Interval.of(random.exponential(size=25)) for _ in range(200))
    covered = sum(each.low <= np.log(2) <= each.high for each in draws)
    assert 0.90 <= covered / 200 <= 0.99


def test_one_round_in_a_hundred_disturbed_moves_nothing():
    figures = np.ones(100)
    figures[7] = 50
    assert Interval.of(figures) == Interval(1, 1, 1)


def test_an_interval_holds_what_differs_between_launches():
    random = np.random.default_rng(0)
    launches = np.repeat([[1.0], [1.1], [1.2], [1.3], [1.4], [1.5]], 50, axis=1)
    figures = launches + random.normal(scale=0.001, size=launches.shape)
    as_one, apart = Interval.of(figures.reshape(-1)), Interval.of(figures)
    assert as_one.value == apart.value
    assert as_one.high - as_one.low < 0.15
    assert apart.high - apart.low > 0.2


# ---- turns


class Clocked:
    """Stands for a worker: writes down whose turn it was, and for how long."""

    def __init__(self, name, log, seconds=0.0):
        self.name, self.log, self.seconds = name, log, seconds

    def time(self, seconds):
        self.log.append((self.name, seconds))
        time.sleep(self.seconds)
        return [float(len(self.log))]


def test_turns_rotate_and_every_round_has_all():
    log = []
    samples = take_turns([Clocked(name, log) for name in "abc"], rounds=6, seconds=0)
    turns = "".join(name for name, _ in log)
    assert turns == "abc" + "abc" + "bca" + "cab" + "abc" + "bca" + "cab"  # warm-up, six rounds
    assert [len(each) for each in samples] == [6, 6, 6]
    assert samples[0][0] == [4.0]


def test_it_goes_on_for_the_time_that_was_asked():
    log = []
    start = time.monotonic()
    samples = take_turns([Clocked("a", log, 0.01)], rounds=6, seconds=0.3)
    assert time.monotonic() - start >= 0.3
    assert len(samples[0]) > 6


def test_turns_are_shorter_where_many_rounds_share_little_time(monkeypatch):
    monkeypatch.setattr(timing, "TURN_S", 0.02)
    log = []
    take_turns([Clocked(name, log) for name in "ab"], rounds=100, seconds=0.1)
    assert {seconds for _, seconds in log[2:]} == {0.1 / 100 / 2}
    log.clear()
    take_turns([Clocked("a", log, 0.02)], rounds=6, seconds=0.2)
    assert {seconds for _, seconds in log[1:]} == {0.02}


# ---- processes


@pytest.fixture(scope="module")
def job(files):
    return Job(str(files / "model.onnx"), "onnxruntime", threads=1, kernels="off", cpus=(0,))


@linux
def test_a_worker_stands_still_until_it_is_asked_and_is_gone_afterwards(job):
    with worker(job) as timed:
        pid = timed._process.pid
        assert (timed.precision, timed.kernels) == ("f32", False)
        assert _wait_until(lambda: _state(pid) == "T")
        assert os.sched_getaffinity(pid) == {0}
        times = timed.time(0.05)
        assert len(times) > 1
        assert all(0 < each < 1000 for each in times)
        assert len(timed.time(0)) == 1
        assert 2**24 < timed.peak_memory() < 2**34
        assert _wait_until(lambda: _state(pid) == "T")
    assert _state(pid) is None


@linux
def test_memory_of_calls_is_what_they_hold_beyond_loading(job):
    with worker(job) as timed:
        timed.time(0)
        assert 0 < timed.call_memory() < timed.peak_memory() // 4  # the libraries are the most


def test_a_worker_tells_what_it_computes(job):
    expected = tomexport.load(job.path, "onnxruntime", threads=1, kernels="off")
    with worker(job) as timed:
        found = timed.output()
    images = golden_images(expected.input_shape[1:], 1)
    np.testing.assert_array_equal(found, expected(images))
    assert found.shape == (1, 1000)


def test_a_long_call_brings_the_caches_back_itself(monkeypatch):
    class Slow:
        calls = 0

        def run(self, images):
            self.calls += 1
            time.sleep(0.01)
            return [images]

    def calls_of_a_turn():
        before = bench.session.calls
        assert len(bench.time(0)) == 1
        return bench.session.calls - before

    bench = timing._Bench()
    bench.session, bench.images = Slow(), np.zeros(1)
    assert [calls_of_a_turn(), calls_of_a_turn()] == [2, 2]
    monkeypatch.setattr(timing, "LONG_CALL_S", 0.01)
    assert calls_of_a_turn() == 1


@linux
def test_a_worker_is_gone_after_an_error_too(job):
    pids = []

    def fail():
        with worker(job) as timed:
            pids.append(timed._process.pid)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert _state(pids[0]) is None


def test_what_cannot_be_loaded_is_refused_in_the_words_of_load(job, tmp_path):
    gone = Job(str(tmp_path / "gone.onnx"), "onnxruntime")
    with pytest.raises(BackendError, match="There is no file"), worker(gone):
        pass
    elsewhere = Job(job.path, "onnxruntime", device="TPU")
    with pytest.raises(BackendError, match="no device 'TPU' here; it has"), worker(elsewhere):
        pass


def test_a_batch_that_does_not_fit_fails_in_words(job):
    with (
        worker(Job(job.path, "onnxruntime", batch=2, kernels="off")) as timed,
        pytest.raises(BackendError, match=r"onnxruntime failed while it ran .*INVALID_ARG"),
    ):
        timed.time(0)


def test_a_worker_that_dies_is_an_error_not_a_hang(job):
    with worker(job) as timed:
        timed._process.kill()
        with pytest.raises(BackendError, match=r"ended \(exit code -9\); memory may be short"):
            timed.time(0)


def test_a_system_without_sigstop(job, monkeypatch):
    monkeypatch.setattr(timing, "CAN_STOP", False)
    with worker(job) as timed:
        assert timed.time(0)


@linux
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_a_parent_that_is_ended(files, sent):
    """Even a stopped one: the signal comes while some workers wait for their turn."""
    command = [
        sys.executable, "-m", "tomexport", "profile", str(files / "model.onnx"), "--backend",
        "onnxruntime", "--kernels", "off", "--seconds", "60", "--threads", "1",
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        assert _wait_until(lambda: len(children.read_text().split()) == 3)
        pids = children.read_text().split()
        assert _wait_until(lambda: [_state(pid) for pid in pids].count("T") == 2)
        process.send_signal(sent)
        _, err = process.communicate(timeout=30)
    assert process.returncode in (128 + sent, -sent)
    assert _wait_until(lambda: not any(_state(pid) for pid in pids), 10)
    assert "Traceback" not in err

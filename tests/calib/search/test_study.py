"""Storages: shared, killed, resumed, damaged, refused. Points are made up; nothing is exported."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from optuna.storages.journal import JournalFileSymlinkLock

from tomexport.calib.search.space import Space
from tomexport.calib.search.study import Identity, Study
from tomexport.errors import ArtifactError, MissingExtraError, TomexportError

SPACE = Space(("tome",), ("none", "const"), ("f32",), tokens=64, n_calls=6)
IDENTITY = Identity("weights", "images", SPACE)
N_POINTS = 14
RESULT = {"value": 1.0}
EXCESS = {"drop": 0.1}

CHILD = """
import sys, time
from tests.calib.search.test_study import EXCESS, RESULT, SPACE, open_study
study = open_study(sys.argv[1])
while (claimed := study.claim(SPACE.schedule)) is not None:
    print(SPACE.schedule(claimed.choices), flush=True)
    time.sleep(float(sys.argv[2]))
    study.finish(claimed, RESULT, (1.0, 0.0), EXCESS)
"""


def open_study(storage, identity=IDENTITY, machine="this", first=()):
    return Study(storage, identity, {"machine": machine}, first=list(first), seed=0)


def _child(storage, seconds):
    command = [sys.executable, "-c", CHILD, str(storage), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _measure_all(study, most=100):
    found = []
    while len(found) < most and (claimed := study.claim(SPACE.schedule)):
        found.append(SPACE.schedule(claimed.choices))
        study.finish(claimed, RESULT, (1.0, 0.0), EXCESS)
    return found


@pytest.fixture
def journal(tmp_path):
    return str(tmp_path / "s.journal")


def test_every_point_is_measured_once(journal):
    found = _measure_all(open_study(journal))
    assert len(found) == len(set(found)) == N_POINTS
    assert len(open_study(journal).results()) == N_POINTS


def test_it_begins_with_what_is_given():
    first = {"family": "const", "method": "tome", "precision": "f32", "const.r": 6}
    claimed = open_study(None, first=[first]).claim(SPACE.schedule)
    assert SPACE.schedule(claimed.choices) == "const:7"


def test_what_cannot_be_is_never_given_out():
    study = open_study(None)
    taken = []
    while claimed := study.claim(lambda c: None if c["family"] == "none" else SPACE.schedule(c)):
        taken.append(claimed.choices["family"])
        study.finish(claimed, RESULT, (1.0, 0.0), EXCESS)
    assert taken == ["const"] * (N_POINTS - 1)


def test_names_of_one_point_are_one_point():
    study = open_study(None)
    claims = lambda c: str(c.get("const.r", 0) // 5)  # noqa: E731
    found = []
    while claimed := study.claim(claims):
        found.append(claims(claimed.choices))
        study.finish(claimed, RESULT, (1.0, 0.0), EXCESS)
    assert sorted(found) == ["0", "1", "2"]


def test_a_sqlite_database_does_as_well(tmp_path):
    url = f"sqlite:///{tmp_path / 's.db'}"
    assert len(_measure_all(open_study(url), 3)) == 3
    assert len(_measure_all(open_study(url))) == N_POINTS - 3


def test_two_processes_share_the_work(journal):
    children = [_child(journal, 0.05) for _ in range(2)]
    outputs = [child.communicate(timeout=60)[0].split() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert sorted(outputs[0] + outputs[1]) == sorted(map(SPACE.schedule, SPACE.all()))
    assert all(outputs)


def test_a_process_killed_in_mid_trial_loses_that_trial_alone(journal):
    child = _child(journal, 0.3)
    done = [child.stdout.readline().strip() for _ in range(3)]  # the third is being measured
    child.send_signal(signal.SIGKILL)
    child.communicate()
    study = open_study(journal)
    assert len(study.results()) == study.n_taken() == 2
    rest = _measure_all(study)
    assert sorted(done[:2] + rest) == sorted(map(SPACE.schedule, SPACE.all()))
    assert done[2] in rest


def test_a_trial_that_runs_elsewhere_is_left_alone(journal):
    child = _child(journal, 60)
    running = child.stdout.readline().strip()
    study = open_study(journal)
    assert (len(study.results()), study.n_taken()) == (0, 1)
    study._study.enqueue_trial(next(c for c in SPACE.all() if SPACE.schedule(c) == running))
    assert running not in _measure_all(study)  # though it was drawn there as well
    child.kill()
    child.communicate()
    assert _measure_all(open_study(journal)) == [running]


def test_two_may_find_the_same_trial_stale(journal, monkeypatch):
    from optuna.exceptions import UpdateFinishedTrialError

    child = _child(journal, 60)
    running = child.stdout.readline().strip()
    one, other = open_study(journal), open_study(journal)
    child.kill()
    child.communicate()

    def too_late(*arguments, **options):
        other._fail_stale()
        raise UpdateFinishedTrialError("Trial#0 has already finished and can not be updated.")

    with monkeypatch.context() as patch:
        patch.setattr(one._study, "tell", too_late)
        one._fail_stale()
    assert one.n_taken() == 0
    assert running in _measure_all(one)


def test_a_failed_trial_is_given_out_again():
    first = {"family": "none", "method": "tome", "precision": "f32"}
    study = open_study(None, first=[first])
    study.drop(study.claim(SPACE.schedule))
    assert study.n_taken() == 0


def test_what_is_refused_is_not_tried_again(journal):
    study = open_study(journal)
    refused = study.claim(SPACE.schedule)
    study.refuse(refused, "it cannot be")
    study = open_study(journal)
    rest = _measure_all(study)
    assert len(rest) == N_POINTS - 1
    assert SPACE.schedule(refused.choices) not in rest
    assert study.refusals() == ["it cannot be"]
    assert len(study.results()) == N_POINTS - 1


@pytest.mark.parametrize(
    ("other", "hint"),
    [
        (replace(IDENTITY, model="others"), "its weights have another SHA-256"),
        (replace(IDENTITY, images="others"), "others were searched on"),
        (replace(IDENTITY, space=replace(SPACE, families=("exp",))), "schedules or precisions"),
    ],
)
def test_a_storage_of_another_search_is_refused(journal, other, hint):
    _measure_all(open_study(journal), 1)
    before = Path(journal).read_text()
    with pytest.raises(ArtifactError, match=f"is of another search: .*{hint}"):
        open_study(journal, other)
    assert Path(journal).read_text() == before


def test_machines_do_not_mix_but_share_notes(journal):
    here, board = open_study(journal), open_study(journal, machine="board")
    _measure_all(here, 3)
    here.write_note("list", {"schedule": "list:1"})
    assert (len(here.results()), len(board.results())) == (3, 0)
    assert board.notes("li") == {"list": {"schedule": "list:1"}}
    assert board.notes("nothing") == {}
    assert here.own_note("ms", lambda: 1.5) == here.own_note("ms", lambda: 2.5) == 1.5
    assert board.own_note("ms", lambda: 2.5) == 2.5


def test_what_others_keep_in_a_database_is_left_alone(tmp_path):
    import optuna

    url = f"sqlite:///{tmp_path / 's.db'}"
    optuna.create_study(storage=url, study_name="theirs").set_user_attr("identity", {"model": "x"})
    assert len(_measure_all(open_study(url), 2)) == 2


def test_a_line_that_a_crash_has_cut_is_taken_off(journal):
    _measure_all(open_study(journal), 3)
    whole = Path(journal).read_bytes()
    Path(journal).write_bytes(whole + b'{"op_code": 4, "cut')
    assert len(open_study(journal).results()) == 3
    assert Path(journal).read_bytes().startswith(whole)
    assert b'"cut' not in Path(journal).read_bytes()


def test_a_line_that_another_process_is_writing_is_not_cut(journal):
    _measure_all(open_study(journal), 3)
    whole = Path(journal).read_bytes()
    line = whole.splitlines(keepends=True)[-1]
    lock = JournalFileSymlinkLock(str(journal))
    with ThreadPoolExecutor() as pool, Path(journal).open("ab", buffering=0) as file:
        lock.acquire()
        file.write(line[:20])
        opened = pool.submit(open_study, journal)
        time.sleep(0.3)
        assert not opened.done()
        file.write(line[20:])
        lock.release()
        opened.result(timeout=60)
    assert Path(journal).read_bytes().startswith(whole + line)


@pytest.mark.parametrize("content", [b"precious", b"precious\n", b"[1]\n", b'{"op_code": "x"}\n'])
def test_a_file_that_is_no_storage_is_left_as_it_is(tmp_path, content):
    path = tmp_path / "thesis.txt"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="no storage of a search"):
        open_study(str(path))
    assert path.read_bytes() == content


def test_a_damaged_line_is_named_and_nothing_changed(journal):
    _measure_all(open_study(journal), 3)
    lines = Path(journal).read_text().splitlines()
    lines[4] = lines[4][: len(lines[4]) // 2]
    Path(journal).write_text("\n".join(lines) + "\n")
    before = Path(journal).read_text()
    with pytest.raises(ArtifactError, match=r"line 5 of \d+ is not an entry.*head -n 4"):
        open_study(journal)
    assert Path(journal).read_text() == before


def test_places_where_no_storage_can_be(tmp_path):
    with pytest.raises(ArtifactError, match="cannot be a storage: it is a folder"):
        open_study(str(tmp_path))
    with pytest.raises(ArtifactError, match="cannot be a storage: there is no folder"):
        open_study(str(tmp_path / "gone" / "s.journal"))
    with pytest.raises(ArtifactError, match=r"The storage nothing://x cannot be used \("):
        open_study("nothing://x")
    (tmp_path / "s.db").write_bytes(b"no database, but long enough to be read as one" * 100)
    with pytest.raises(ArtifactError, match="cannot be used"):
        open_study(f"sqlite:///{tmp_path / 's.db'}")


def test_without_optuna(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tomexport\[calib\]'"):
        open_study(None)


def test_mutated_storages_are_read_or_refused(tmp_path):
    path = tmp_path / "s.journal"
    _measure_all(open_study(str(path)), 2)
    whole = path.read_bytes()
    drawn = random.Random(0)
    refused = 0
    for _ in range(40):
        content = bytearray(whole)
        for _ in range(drawn.choice([1, 3])):
            at = drawn.randrange(len(content))
            kind = drawn.choice(["flip", "cut", "repeat"])
            if kind == "flip":
                content[at] ^= 1 << drawn.randrange(8)
            elif kind == "cut":
                del content[at : at + drawn.randrange(200)]
            else:
                content[at:at] = content[at : at + drawn.randrange(200)]
        path.write_bytes(content)
        try:
            _measure_all(open_study(str(path)), 1)
        except TomexportError:
            refused += 1
    assert refused > 10


def test_a_result_is_kept_as_it_is(journal):
    study, result = open_study(journal), RESULT | {"deep": {"a": [1, 2]}}
    study.finish(study.claim(SPACE.schedule), result, (1.0, 0.0), EXCESS)
    assert open_study(journal).results() == [result]

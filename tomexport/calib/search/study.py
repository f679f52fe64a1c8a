"""Trials in a storage that processes, and machines, share.

A storage is of one model, one set of images and one space. In it each kind of machine, runtime and
number of threads has a study of its own, so that a latency is only ever compared with others of the
same kind; losses, and the lists that were found, serve all.

A trial is claimed before it is measured. Whoever finds that an earlier trial has the same claim
prunes its own. A trial whose process is gone, killed or not, is failed by the next that looks.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from tomexport.calib.search.space import Choices, Space
from tomexport.errors import ArtifactError, TomexportError, need, plain

PREFIX = "tomexport "
_CLAIMING = timedelta(seconds=30)  # the most between asking for a trial and claiming it
_FORGOTTEN = timedelta(hours=6)  # a trial of another host, of which nobody can ask
_BY, _CLAIM, _RESULT, _REFUSED = "by", "claim", "result", "refused"


def open_storage(name: str | None) -> Any:
    """Open a storage: a journal file, a database by its URL, or memory for None.

    Raises: ArtifactError for a storage that cannot be opened or is damaged, MissingExtraError
        without Optuna.
    """
    optuna = need("optuna", "calib")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if name is None:
        return optuna.storages.InMemoryStorage()
    with storing(name):
        if "://" in name:
            return optuna.storages.RDBStorage(name)
        path = Path(name).resolve()
        journal = optuna.storages.journal
        lock = journal.JournalFileSymlinkLock(str(path))
        _check_journal(path, lock)
        return journal.JournalStorage(journal.JournalFileBackend(str(path), lock))


def _check_journal(path: Path, lock: Any) -> None:
    """Refuse what is no journal; take off a last line that a crash has cut.

    Args:
        path: of the journal.
        lock: Optuna's, held by whoever writes: what is half a line then is nobody's.
    """
    if path.is_dir() or not path.parent.is_dir():
        what = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise ArtifactError(f"{path} cannot be a storage: {what}. Name a file, like s.journal.")
    if not path.exists():
        return
    lock.acquire()
    try:
        _mend_journal(path)
    finally:
        lock.release()


def _mend_journal(path: Path) -> None:
    *lines, rest = path.read_bytes().split(b"\n")
    sound = next((i for i, line in enumerate(lines) if not _is_entry(line)), len(lines))
    if not sound and (lines or rest):
        raise ArtifactError(f"{path} is no storage of a search; name another file.")
    if sound < len(lines):
        raise ArtifactError(
            f"{path} is damaged: line {sound + 1} of {len(lines)} is not an entry. Nothing was "
            f"changed. Cut it off there and what comes before remains (head -n {sound}), or name "
            "another file."
        )
    if rest:
        with path.open("r+b") as file:
            file.truncate(sum(len(line) + 1 for line in lines))


def _is_entry(line: bytes) -> bool:
    try:
        entry = json.loads(line)
    except ValueError:
        return False
    return isinstance(entry, dict) and isinstance(entry.get("op_code"), int)


@contextmanager
def storing(name: str | None) -> Iterator[None]:
    """Turn what a storage's library raises into an error of ours."""
    try:
        yield
    except (TomexportError, OSError):
        raise
    except Exception as err:  # databases raise what they like, and damage any error
        raise ArtifactError(
            f"The storage {name} cannot be used ({plain(err)}). Every trial that it was told of "
            "stays in it. If it is damaged, name another one."
        ) from err


@dataclass(frozen=True)
class Identity:
    """What all trials of a storage have in common.

    Attributes:
        model: SHA-256 of the weights.
        images: SHA-256 of the images, and of what is compared.
        space: what is tried.
    """

    model: str
    images: str
    space: Space

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON data."""
        return {"model": self.model, "images": self.images, "space": self.space.to_dict()}


@dataclass(frozen=True)
class Claimed:
    """A trial of this process's own.

    Attributes:
        trial: Optuna's.
        choices: what was drawn.
    """

    trial: Any
    choices: Choices

    @property
    def number(self) -> int:
        """Which trial of the study it is."""
        return int(self.trial.number)


class Study:
    """The trials of one kind of machine in a storage."""

    def __init__(
        self, storage: str | None, identity: Identity, setting: dict[str, Any], *,
        first: list[Choices], seed: int,
    ) -> None:  # fmt: skip
        """Open a study, or begin it.

        Args:
            storage: see `open_storage`.
            identity: what the storage must be of.
            setting: what latencies depend on: machine, runtime, threads.
            first: what to try before anything is drawn.
            seed: of what is drawn.

        Raises: ArtifactError if the storage is damaged, or of another model, images or space.
        """
        optuna = need("optuna", "calib")
        self.name, self._space, self._optuna = storage, identity.space, optuna
        self._seed, self._sleep_s = seed, 0.05
        opened = open_storage(storage)
        with storing(storage):
            self._check(opened, identity)
            # processes that share a storage must not draw alike
            own_seed = seed if storage is None else seed + os.getpid()
            sampler = optuna.samplers.TPESampler(seed=own_seed)
            text = json.dumps(setting, sort_keys=True)
            self._study = optuna.create_study(
                storage=opened, study_name=PREFIX + hashlib.sha256(text.encode()).hexdigest()[:16],
                directions=["minimize", "minimize"], sampler=sampler, load_if_exists=True,
            )  # fmt: skip
            if "identity" not in self._study.user_attrs:
                self._study.set_user_attr("setting", setting)
                self._study.set_user_attr("identity", identity.to_dict())
            for choices in first:
                self._study.enqueue_trial(choices, skip_if_exists=True)
            self._fail_stale()

    def _check(self, storage: Any, identity: Identity) -> None:
        ours = identity.to_dict()
        for summary in self._optuna.get_all_study_summaries(storage):
            theirs = summary.user_attrs.get("identity")
            if not summary.study_name.startswith(PREFIX) or not isinstance(theirs, dict):
                continue
            for what, hint in (
                ("model", "its weights have another SHA-256"),
                ("images", "others were searched on, or judged otherwise"),
                ("space", "its methods, schedules or precisions are others"),
            ):
                if theirs.get(what) != ours[what]:
                    raise ArtifactError(
                        f"The storage {self.name} is of another search: {hint}. Its trials say "
                        "nothing of this one; name another --storage, or search as there."
                    )

    def notes(self, start: str) -> dict[str, Any]:
        """Return what all studies of the storage have noted under keys that start so."""
        with storing(self.name):
            return {
                key: value
                for summary in self._optuna.get_all_study_summaries(self._study._storage)
                if summary.study_name.startswith(PREFIX)
                for key, value in summary.user_attrs.items()
                if key.startswith(start)
            }

    def own_note(self, key: str, make: Callable[[], Any]) -> Any:
        """Return what this study has noted; what `make` gives, noted, if it has not."""
        with storing(self.name):
            if key not in self._study.user_attrs:
                self._study.set_user_attr(key, make())
            return self._study.user_attrs[key]

    def write_note(self, key: str, value: Any) -> None:
        """Note something for all."""
        with storing(self.name):
            self._study.set_user_attr(key, value)

    def results(self) -> list[dict[str, Any]]:
        """Return the results of this study, in the order of their trials."""
        with storing(self.name):
            trials = self._study.get_trials(states=self._states("COMPLETE"))
            return [trial.user_attrs[_RESULT] for trial in trials]

    def n_taken(self) -> int:
        """Return how many points are measured, or are being measured by living processes."""
        with storing(self.name):
            trials = self._study.get_trials(deepcopy=False)
        done = [trial for trial in trials if trial.state.name == "COMPLETE"]
        claimed = [trial for trial in trials if _CLAIM in trial.user_attrs and _is_running(trial)]
        return len(done) + len(claimed)

    def claim(self, describe: Callable[[Choices], str | None]) -> Claimed | None:
        """Take the next trial that nobody has measured or is measuring.

        Args:
            describe: what points that are the same have in common; None for what cannot be, or is
                beyond a limit that is known beforehand.

        Returns:
            The trial, or None if the whole space has been tried.

        Raises: ArtifactError if the storage fails.
        """
        with storing(self.name):
            while True:
                trial = self._study.ask()
                trial.set_user_attr(_BY, _signature())
                choices = self._space.draw(trial)
                claim = describe(choices)
                trial.set_user_attr(_CLAIM, claim)
                if claim is not None and not self._is_taken(trial.number, claim):
                    return Claimed(trial, choices)
                self._study.tell(trial, state=self._states("PRUNED")[0])
                if not self._enqueue_another(trial.number, describe):
                    return None

    def finish(
        self, claimed: Claimed, result: dict[str, Any], values: tuple[float, float],
        excess: dict[str, float],
    ) -> None:  # fmt: skip
        """Keep what a trial has measured.

        Args:
            claimed: the trial.
            result: all of it.
            values: what to make small.
            excess: how far it is beyond each limit; 0 or less is within.
        """
        with storing(self.name):
            claimed.trial.set_user_attr(_RESULT, result)
            for limit, value in excess.items():
                claimed.trial.set_constraint(limit, value)
            self._study.tell(claimed.trial, list(values), skip_if_finished=True)

    def refuse(self, claimed: Claimed, why: str) -> None:
        """Keep that a trial's point cannot be, so that nobody tries it again."""
        with storing(self.name):
            claimed.trial.set_user_attr(_REFUSED, why)
            self._study.tell(claimed.trial, state=self._states("PRUNED")[0])

    def refusals(self) -> list[str]:
        """Return why points could not be."""
        with storing(self.name):
            trials = self._study.get_trials(deepcopy=False)
        return [str(t.user_attrs[_REFUSED]) for t in trials if _REFUSED in t.user_attrs]

    def drop(self, claimed: Claimed) -> None:
        """Give a trial up that failed; it can be tried again."""
        with storing(self.name):
            self._study.tell(claimed.trial, state=self._states("FAIL")[0], skip_if_finished=True)

    def _is_taken(self, number: int, claim: str) -> bool:
        """Tell whether an earlier trial has the claim, once all of them have said theirs."""
        while True:
            self._fail_stale()
            earlier = self._study.get_trials(deepcopy=False)[:number]
            running = [trial for trial in earlier if trial.state.name == "RUNNING"]
            if all(_CLAIM in trial.user_attrs for trial in running):
                done = [
                    t for t in earlier if t.state.name == "COMPLETE" or _REFUSED in t.user_attrs
                ]
                return any(trial.user_attrs.get(_CLAIM) == claim for trial in (*running, *done))
            time.sleep(self._sleep_s)

    def _enqueue_another(self, number: int, describe: Callable[[Choices], str | None]) -> bool:
        """Queue a choice that nobody has tried and that can be; False if there is none."""
        taken = {
            trial.user_attrs.get(_CLAIM)
            for trial in self._study.get_trials(deepcopy=False)
            if trial.state.name in ("RUNNING", "COMPLETE") or _REFUSED in trial.user_attrs
        }
        every = list(self._space.all())
        random.Random(f"{self._seed} {number}").shuffle(every)
        for choices in every:
            claim = describe(choices)
            if claim is not None and claim not in taken:
                self._study.enqueue_trial(choices)
                return True
        return False

    def _fail_stale(self) -> None:
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state.name == "RUNNING" and not _is_running(trial):
                state = self._states("FAIL")[0]
                # another process may have been quicker
                with suppress(self._optuna.exceptions.UpdateFinishedTrialError):
                    self._study.tell(trial.number, state=state, skip_if_finished=True)

    def _states(self, name: str) -> tuple[Any]:
        return (self._optuna.trial.TrialState[name],)


def _signature() -> list[Any]:
    return [platform.node(), os.getpid(), _started(os.getpid())]


def _started(pid: int) -> str:
    """Return when a process started, in the system's own count; "" where it does not tell."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _is_running(trial: Any) -> bool:
    """Tell whether the process of a trial is still there, as far as one can tell from here."""
    if trial.state.name != "RUNNING":
        return False
    age = datetime.now() - trial.datetime_start
    signature = trial.user_attrs.get(_BY)
    if signature is None or _CLAIM not in trial.user_attrs:
        return bool(age < _CLAIMING)
    host, pid, started = signature
    if host != platform.node():
        return bool(age < _FORGOTTEN)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return bool(_started(pid) == started)

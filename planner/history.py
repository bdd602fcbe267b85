"""Measurements and past runs in one SQLite file under `plan_home()`. What is in it is never worth failing for.

Two processes may use it at once: each write is one short transaction, and who comes second waits. A file that is
damaged, or is no history, is renamed aside and a new one begun; a folder that cannot be written is noted, and nothing
is kept. Notes gather in `History.notes`, and are passed to `say` as they come.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sqlite3
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from planner.twin import TUNED, twin_name
from presets import jsonio
from presets.errors import PlanError
from presets.home import plan_home

if TYPE_CHECKING:
    from trainer.record import RunRecord

FILE_NAME = "history.sqlite"
APPLICATION_ID = 0x504C414E  # "PLAN": tells our file from another program's
SCHEMA_VERSION = 1
TRIES = 3  # again once a damaged file is out of the way, or what passes has passed
# Another process has just removed the journal, or put another file in this one's place. Each action can be done twice.
PASSING = ("SQLITE_IOERR_DELETE_NOENT", "SQLITE_READONLY_DBMOVED")
# Times as long, or as short, did a run take beside others than its measurement by their shares of the CPU's time alone:
# its ratio says more of them than of the prediction.
OTHER_COMPANY = 1.25
OTHERS_TOOK = "others took"
BUSY_SECONDS = 10.0  # waited for another process; a transaction takes milliseconds
RUNNING = "running"
PAUSED = "stood still in between: the clock ran on"
MOST_MEASUREMENTS = 500  # the oldest go first; one takes about 100 kB

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class PastRun:
    """One run folder: what was predicted and what it took. Seconds and bytes; None is unknown.

    `raw_` figures are as measured; the others as shown, corrected by the runs before where there were enough.
    """

    folder: str  # absolute, links followed: one entry a run folder, the last one counts
    ended_at: str  # ISO, UTC; where it is not known to have ended, when it was started
    status: str  # "finished", "stopped", "failed", "killed", or "running" where it is not known to have ended
    name: str  # of the preset, or of its tuned twin: "recommended, tuned"
    model: str
    num_examples: int | None = None
    raw_seconds: float | None = None
    raw_seconds_low: float | None = None
    raw_seconds_high: float | None = None
    raw_train_seconds: float | None = None
    seconds: float | None = None
    seconds_low: float | None = None
    seconds_high: float | None = None
    train_seconds: float | None = None
    peak_memory_bytes: int | None = None
    correction_factor: float | None = None
    correction_runs: int | None = None
    actual_seconds: float | None = None
    actual_train_seconds: float | None = None
    actual_peak_memory_bytes: int | None = None
    num_resumes: int = 0
    signature_key: str | None = None
    not_counted: str | None = None  # why later estimates are not corrected by it; None: they are
    versions: str = ""  # "torch 2.13.0, peft 0.19.0"
    calibrated: bool | None = None  # False: the predicted range was no 90 % range; None: not kept, by earlier versions
    measured_as: str | None = None  # the measurement that it was predicted from; None: not kept, by earlier versions

    @classmethod
    def of(cls, record: RunRecord, folder: Path, ended_at: datetime) -> PastRun:
        """The entry of a run that ended, from its record."""
        predicted, actual = record.predicted, record.actual
        return cls(
            folder=_place(str(folder.absolute())),
            ended_at=ended_at.astimezone(UTC).isoformat(timespec="seconds"),
            status=record.status,
            name=twin_name(record.job.name) if predicted.is_tuned else record.job.name,
            model=record.job.model,
            num_examples=predicted.num_examples,
            raw_seconds=predicted.raw_seconds,
            raw_seconds_low=predicted.raw_seconds_low,
            raw_seconds_high=predicted.raw_seconds_high,
            raw_train_seconds=predicted.raw_train_seconds,
            seconds=predicted.seconds,
            seconds_low=predicted.seconds_low,
            seconds_high=predicted.seconds_high,
            train_seconds=predicted.train_seconds,
            peak_memory_bytes=predicted.peak_memory_bytes,
            correction_factor=predicted.correction_factor,
            correction_runs=predicted.correction_runs,
            actual_seconds=actual.seconds,
            actual_train_seconds=actual.train_seconds,
            actual_peak_memory_bytes=actual.peak_memory_bytes,
            num_resumes=actual.num_resumes or 0,
            signature_key=predicted.signature_key,
            not_counted=_why_not_counted(record),
            versions=", ".join(f"{name} {version}" for name, version in sorted(record.versions.items())),
            calibrated=predicted.calibrated,
            measured_as=predicted.measured_as,
        )

    @property
    def tuned_from(self) -> str | None:
        """The preset whose tuned twin was run; None where it ran as written."""
        preset, comma, kind = self.name.rpartition(", ")
        return preset if comma and kind == TUNED else None

    @property
    def is_uninterrupted(self) -> bool:
        """Whether its wall clock can be compared with a prediction."""
        return self.status == "finished" and self.num_resumes == 0 and self.not_counted != PAUSED

    @property
    def has_other_company(self) -> bool:
        """Whether others took plainly more or less of the CPU's time while it ran than while it was timed."""
        return (self.not_counted or "").startswith(OTHERS_TOOK)

    @property
    def error(self) -> float | None:
        """Actual / predicted seconds of the whole run, less 1; None where they cannot be compared."""
        if not self.is_uninterrupted or not self.seconds or not self.actual_seconds:
            return None
        if self.seconds < 0 or self.actual_seconds < 0:  # a damaged entry
            return None
        error = self.actual_seconds / self.seconds - 1
        return error if math.isfinite(error) else None

    @property
    def is_inside(self) -> bool | None:
        """Whether the predicted range held the actual time; None where they cannot be compared."""
        if self.error is None or self.seconds_low is None or self.seconds_high is None or self.actual_seconds is None:
            return None
        if self.seconds_low > self.seconds_high:  # a damaged entry
            return None
        return self.seconds_low <= self.actual_seconds <= self.seconds_high


def _place(folder: str) -> str:
    """Where a folder really is: reached by ".." or a link, it is the same run."""
    try:
        return os.path.realpath(folder)
    except (OSError, ValueError):  # a damaged entry
        return folder


def is_other_company(then: float | None, now: float | None) -> bool:
    """Whether others took plainly more or less of the CPU's time while it ran than while it was timed."""
    if then is None or now is None:
        return False
    ratio = (1 - min(then, 0.99)) / (1 - min(now, 0.99))
    return not 1 / OTHER_COMPANY <= ratio <= OTHER_COMPANY


def _why_not_counted(record: RunRecord) -> str | None:
    from trainer.planning import needs_loss

    if record.status != "finished":
        return record.status
    if record.actual.num_resumes:
        return "resumed: the clock ran in parts"
    if (record.actual.micro_batch_split or 1) > 1:
        return "memory ran out: micro-batches ran in parts"
    if record.actual.paused_seconds:
        return PAUSED
    then, now = record.predicted.others_share, record.actual.others_share
    if is_other_company(then, now):
        return f"{OTHERS_TOOK} {now:.0%} of the CPU's time, and {then:.0%} while it was timed"
    if needs_loss(record.job.preset):
        return "the model's loss chose other examples than were predicted"
    return None


COLUMNS = tuple(one.name for one in dataclasses.fields(PastRun))
_SCHEMA = f"""
CREATE TABLE measurements (key TEXT PRIMARY KEY, created REAL NOT NULL, content TEXT NOT NULL);
CREATE TABLE runs ({", ".join(f"{name} PRIMARY KEY" if name == "folder" else name for name in COLUMNS)});
CREATE INDEX runs_by_time ON runs (ended_at);
CREATE INDEX runs_by_signature ON runs (signature_key, ended_at);
"""


class _Foreign(Exception):
    """The file is a database, but not ours."""


class _TooNew(Exception):
    """The file is ours, of a later version."""


@dataclass(slots=True, eq=False)
class History:
    """The history file, opened for each use: between two of them nothing is held that another process waits for."""

    home: Path = field(default_factory=plan_home)
    say: Callable[[str], None] = lambda text: None
    notes: list[str] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return self.home / FILE_NAME

    # --- measurements -------------------------------------------------------------------------------------------------

    def measurements(self, keys: Iterable[str]) -> dict[str, str]:
        """The stored content of those keys that are known."""
        wanted = sorted(set(keys))
        marks = ", ".join("?" for _ in wanted)
        query = f"SELECT key, content FROM measurements WHERE key IN ({marks})"
        return self._guarded(lambda db: {str(k): str(c) for k, c in db.execute(query, wanted)}, {}, writes=False)

    def latest_measurements(self, prefixes: Iterable[str]) -> dict[str, str]:
        """For each prefix the content that was stored last under a key "prefix.something"."""
        query = "SELECT content FROM measurements WHERE key GLOB ? || '.*' ORDER BY created DESC, rowid DESC LIMIT 1"

        def find(db: sqlite3.Connection) -> dict[str, str]:
            found = {prefix: db.execute(query, (prefix,)).fetchone() for prefix in sorted(set(prefixes))}
            return {prefix: str(row[0]) for prefix, row in found.items() if row is not None}

        return self._guarded(find, {}, writes=False)

    def keep_measurements(self, contents: dict[str, str]) -> None:
        """Store them, all or none; each replaces what was there under its key."""
        created = time.time()

        def keep(db: sqlite3.Connection) -> None:
            db.executemany(
                "INSERT OR REPLACE INTO measurements VALUES (?, ?, ?)",
                [(key, created, content) for key, content in contents.items()],
            )
            db.execute(
                "DELETE FROM measurements WHERE key NOT IN "
                "(SELECT key FROM measurements ORDER BY created DESC, rowid DESC LIMIT ?)",
                (MOST_MEASUREMENTS,),
            )

        self._guarded(keep, None)

    # --- runs ---------------------------------------------------------------------------------------------------------

    def add_run(self, run: PastRun) -> None:
        """Store a run; an earlier entry of the same folder goes."""
        marks = ", ".join("?" for _ in COLUMNS)
        values = [getattr(run, name) for name in COLUMNS]

        def add(db: sqlite3.Connection) -> None:
            known = {name for _, name, *_ in db.execute("PRAGMA table_info(runs)")}
            for name in COLUMNS:
                if known and name not in known:  # a file of an earlier version
                    db.execute(f"ALTER TABLE runs ADD COLUMN {name}")
            stored = [folder for (folder,) in db.execute("SELECT folder FROM runs") if isinstance(folder, str)]
            others = [(folder,) for folder in stored if folder != run.folder and _place(folder) == run.folder]
            db.executemany(
                "DELETE FROM runs WHERE folder = ?", others
            )  # stored as they were named, by earlier versions
            db.execute(f"INSERT OR REPLACE INTO runs ({', '.join(COLUMNS)}) VALUES ({marks})", values)

        self._guarded(add, None)

    def runs(self, limit: int | None = None) -> list[PastRun]:
        """Runs, newest first."""
        query = "SELECT * FROM runs ORDER BY ended_at DESC, rowid DESC"
        return self._runs(query, (), limit)

    def unended_runs(self) -> list[PastRun]:
        """Runs that nobody told the end of."""
        return self._runs("SELECT * FROM runs WHERE status = ?", (RUNNING,), None)

    def counted_runs(self, signature_key: str, limit: int) -> list[PastRun]:
        """The latest runs by which estimates of this signature are corrected, newest first."""
        query = (
            "SELECT * FROM runs WHERE signature_key = ? AND not_counted IS NULL "
            "AND raw_train_seconds > 0 AND actual_train_seconds > 0 ORDER BY ended_at DESC, rowid DESC"
        )
        return self._runs(query, (signature_key,), limit)

    def _runs(self, query: str, values: tuple[object, ...], limit: int | None) -> list[PastRun]:
        """At most `limit` of the rows; of those of one folder, stored under several names before, the first."""
        found: dict[str, PastRun] = {}
        nothing: list[dict[str, object]] = []
        for row in self._guarded(lambda db: _rows(db.execute(query, values)), nothing, writes=False):
            if limit is not None and len(found) >= limit:
                break
            try:
                run = jsonio.from_plain(PastRun, row, what=str(self.path))
                found.setdefault(_place(run.folder), run)
            except PlanError as reason:  # one odd row is no reason to lose the others
                self._note(f"one entry of the history was left out ({reason})")
        return list(found.values())

    # --- the file -----------------------------------------------------------------------------------------------------

    def _guarded(self, action: Callable[[sqlite3.Connection], T], otherwise: T, *, writes: bool = True) -> T:
        """Do it in a transaction of its own; where the file cannot be used, note why and give `otherwise`."""
        if not writes and _is_absent(self.path):
            return otherwise
        for left in reversed(range(TRIES)):
            identity = _identity(self.path)
            try:
                return self._transaction(action, writes)
            except _TooNew:
                self._note(f"{self.path} is of a later version of plan: left alone, nothing is read from it or kept")
                return otherwise
            except _Foreign:
                self._set_aside(identity, "it is not a history of plan")
            except sqlite3.OperationalError as reason:
                if str(reason).startswith("no such"):  # marked as ours, without our tables
                    self._set_aside(identity, f"it is damaged ({reason})")
                    continue
                if left and getattr(reason, "sqlite_errorname", None) in PASSING:
                    continue
                # Locked, full, not writable: the file itself is sound.
                self._note_unusable(str(reason))
                return otherwise
            except sqlite3.DatabaseError as reason:
                self._set_aside(identity, f"it is damaged ({reason})")
            except UnicodeDecodeError as reason:
                self._set_aside(identity, f"it is damaged ({reason})")
            except UnicodeEncodeError:  # SQLite holds UTF-8 only, and a folder's name need be none
                self._note(f"{self.path} cannot hold a name that is not UTF-8: it is left out")
                return otherwise
            except OverflowError:  # more than 63 bits, as a damaged estimate may have it
                self._note(f"{self.path} cannot hold a number above 2^63: what it stands in is left out")
                return otherwise
            except OSError as reason:
                self._note_unusable(reason.strerror or str(reason))
                return otherwise
        return otherwise

    def _transaction(self, action: Callable[[sqlite3.Connection], T], writes: bool) -> T:
        if writes:
            self.home.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)) as db:
            # One look at all that it asks: else the tables that another process makes just then look like a stranger's.
            db.execute("BEGIN")
            is_new = _needs_tables(db)
            db.execute("COMMIT")
            if is_new:
                # Immediately: of two processes that find no tables, the second has to see those of the first.
                db.execute("BEGIN IMMEDIATE")
                if _needs_tables(db):
                    for statement in filter(str.strip, _SCHEMA.split(";")):
                        db.execute(statement)
                    db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
                db.execute("COMMIT")
            db.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
            found = action(db)
            db.execute("COMMIT")  # without it, closing takes everything back
            return found

    def _set_aside(self, identity: tuple[int, int] | None, why: str) -> None:
        """Rename the file that was found wanting, unless another process has done so and begun a new one."""
        if identity is None or _identity(self.path) != identity:
            return
        moment = datetime.now().strftime("%Y%m%d-%H%M%S")
        aside = self.path.with_name(f"{FILE_NAME}.set-aside-{moment}")
        number = 1
        while aside.exists():
            number += 1
            aside = self.path.with_name(f"{FILE_NAME}.set-aside-{moment}-{number}")
        try:
            self.path.rename(aside)
        except OSError as reason:
            self._note(f"{self.path}: {why}, and cannot be renamed ({reason.strerror or reason}): delete it yourself")
            return
        # What was left of a broken transaction belongs to the old file; the new one must not be rolled back by it.
        for ending in ("-journal", "-wal", "-shm"):
            leftover = self.path.with_name(FILE_NAME + ending)
            if leftover.exists():
                leftover.rename(aside.with_name(aside.name + ending))
        self._note(f"{self.path}: {why}. It was renamed to {aside.name} and a new one begun")

    def _note_unusable(self, why: str) -> None:
        """Once, whichever of reading and writing finds it, in its own words."""
        if not any(note.startswith(f"{self.path} cannot be used") for note in self.notes):
            self._note(f"{self.path} cannot be used ({why}): nothing is read from it or kept")

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            self.say(f"note: {text}.")


def _rows(cursor: sqlite3.Cursor) -> list[dict[str, object]]:
    """Rows by column, of the columns that a run has here; a file of another version has fewer or more."""
    names = [name for name, *_ in cursor.description]
    rows = [{name: value for name, value in zip(names, row, strict=True) if name in COLUMNS} for row in cursor]
    for row in rows:
        if row.get("calibrated") in (0, 1):  # SQLite has no truth values
            row["calibrated"] = bool(row["calibrated"])
    return rows


def _needs_tables(db: sqlite3.Connection) -> bool:
    """Whether the file is new.

    Raises:
        _Foreign, _TooNew: it is not new, and not of this version.
        sqlite3.DatabaseError: it is no database.
    """
    [(application,)], [(version,)] = db.execute("PRAGMA application_id"), db.execute("PRAGMA user_version")
    if application == APPLICATION_ID:
        if version > SCHEMA_VERSION:
            raise _TooNew
        return False
    if application or version or db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        raise _Foreign
    return True


def _is_absent(path: Path) -> bool:
    """Whether nothing is there. A folder that may not be searched, or a name that no file can have: opening tells."""
    try:
        path.lstat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino

"""Where a study lies that several machines search together: a database server or a journal file.

The user, the password and the query of a URL are secrets. They appear in no message, no file and no error: a message of
a driver is never passed on as it is.
"""

import logging
import random
import re
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, quote_plus

from predictor.errors import UsageError, unknown

if TYPE_CHECKING:
    import optuna
    from sqlalchemy import URL, Engine

STORAGE_VARIABLE = "SMARTFRZ_STORAGE"
"""The environment variable that `tune` takes the storage from, so that no process list shows it."""
STUDY_NAME = "smartfrz"
_JOURNALS = (".journal", ".log")
_DRIVERS = {
    "postgresql": {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary"},
    "mysql": {"pymysql": "pymysql", "MySQLdb": "mysqlclient"},
}
"""By kind of server, the modules that speak with it, best first, and the packages that bring them."""
_SAME = {"postgres": "postgresql", "mariadb": "mysql"}
_OPENING_ATTEMPTS = 8
_RETRY_SECONDS = 300
"""How long a server that was there may be away."""
_CONNECT_SECONDS = 10
_FIRST_TRIAL_SECONDS = 10
"""How long the worker that made a study may take to queue its first trial."""
_FORM = "postgresql://USER@HOST:PORT/DATABASE or mysql://USER@HOST:PORT/DATABASE"
_NO_DATABASE = "the server has no such database that the user may use: make one (createdb), or give another"
# What drivers say, in lower case, and what is wrong and its cure. The first that is found counts.
_REASONS = (
    (("unknown database", "' to database '"), _NO_DATABASE),
    (
        ("password", "access denied for user", "authentication", "role ", "pg_hba.conf"),
        "the server refuses the user or the password: PostgreSQL takes the password from PGPASSWORD or ~/.pgpass, and "
        f"each server from a URL in {STORAGE_VARIABLE}; the user needs access from this machine",
    ),
    (
        ("permission denied", "command denied"),
        "the user may not make tables or write to them: grant it that, or make it the database's owner",
    ),
    (
        ("does not support ssl", "ssl error", "certificate"),
        "no secure connection: check the URL's ssl settings against the server's",
    ),
    (("does not exist",), _NO_DATABASE),
    (("too many", "connection slots"), "the server takes no more connections: raise its limit, or start fewer workers"),
    (("no space left", "disk full", "is full"), "the server's disk is full: free some space, then start again"),
    (
        (
            *("refused", "resolve", "not known", "timed out", "timeout", "unreachable", "no route", "no such file"),
            *("can't connect", "starting up", "shutting down", "closed the connection", "lost connection", "gone away"),
            *("terminating connection", "connection is lost", "connection failed"),
        ),
        "the server cannot be reached: check host and port, that it runs, and that no firewall is between; then start "
        "again, and the trials that have ended are kept",
    ),
)


class SharedStudy:
    """A study on a database server or in a journal file. Raises UsageError for what can be neither.

    Args:
        storage: the server's URL, or the path of the journal file.
        name: what the study is called there.
    """

    def __init__(self, storage: str, name: str = STUDY_NAME) -> None:
        self.name = name
        self._url = _parsed(storage) if "://" in storage else None
        self._journal = _journal(storage) if self._url is None else None
        self._storage: optuna.storages.BaseStorage | None = None
        self.shown = str(self._journal) if self._url is None else _shown(self._url)
        """The storage without secrets."""

    @property
    def holds_password(self) -> bool:
        """Whether a password is in the URL."""
        return self._url is not None and ("password" in self._url.query or self._url.password is not None)

    def connect(self) -> "optuna.storages.BaseStorage":
        """Reach the storage, and make its tables or its file where there are none. Raises UsageError."""
        if self._storage is None:
            try:
                self._storage = self._connected()
            except (RuntimeError, TypeError) as error:  # tables of another version of Optuna, options of no driver
                reason = self._hide(str(error))
                raise UsageError(f"{self.shown}: {reason}: change the URL, or what it names") from None
            except Exception as error:
                raise self.fault(error) or error from None
        return self._storage

    def open(
        self, identity: str, described: dict[str, Any], defaults: dict[str, Any], pruner: "optuna.pruners.BasePruner"
    ) -> "optuna.Study":
        """The study, new or begun by any machine. Its first trial tries the default settings.

        Args:
            identity: what all workers of a study must share. It is part of the name that the storage knows, which is
                unique there, so that trials of two kinds never mix, whoever starts when.
            described: the same for people, for the error of a worker with another one.
            defaults: the settings of the first trial.
            pruner: what stops a trial early.

        Raises:
            UsageError: if the study of this name is of another identity.
        """
        import optuna

        storage, name = self.connect(), f"{self.name}-{identity}"
        found = optuna.get_all_study_summaries(storage, include_best_trial=False)
        others = [each for each in found if each.study_name.rpartition("-")[0] == self.name and each.study_name != name]
        if others and all(each.study_name != name for each in found):
            raise UsageError(
                f"{self.shown}: the study {self.name!r} is of other data or settings "
                f"({others[0].user_attrs.get('described')}): give the data, labels, folds, score and fixed settings of "
                "its other workers and run the same version of the code, or begin another study with --study NAME"
            )
        # Samplers without a seed: with the same one all workers would draw the same.
        with suppress(optuna.exceptions.DuplicatedStudyError):
            study = optuna.create_study(study_name=name, storage=storage, pruner=pruner, direction="maximize")
            study.set_user_attr("described", described)
            study.enqueue_trial(defaults)
            return study
        study = optuna.load_study(study_name=name, storage=storage, pruner=pruner)
        _ensure_first_trial(study, defaults)
        return study

    def fault(self, error: Exception) -> UsageError | None:
        """What an error of the storage means, without secrets. None for an error of anything else."""
        if self._journal is not None:
            ours = isinstance(error, JournalFault)
            return UsageError(f"{self.shown}: {error}") if ours else None
        found = database_error(error)
        if found is None:
            return None
        said = str(getattr(found, "orig", None) or found)
        lowered = said.lower()
        for phrases, meaning in _REASONS:
            if any(phrase in lowered for phrase in phrases):
                return UsageError(f"{self.shown}: {meaning}")
        reason = next(iter(self._hide(said).splitlines()), "")
        return UsageError(f"{self.shown}: the database cannot be used ({type(found).__name__}: {reason})")

    def _connected(self) -> "optuna.storages.BaseStorage":
        if self._url is None:
            assert self._journal is not None
            return _open_journal(self._journal)
        # These pass on what drivers say, and with it the user's name.
        for logger in ("optuna.storages", "sqlalchemy.pool", "psycopg"):
            logging.getLogger(logger).setLevel(logging.CRITICAL)
        storage = self._open_database()
        self._outlast(storage.engine)
        return storage

    def _open_database(self) -> "optuna.storages.RDBStorage":
        from optuna.storages import RDBStorage
        from sqlalchemy.exc import DBAPIError
        from sqlalchemy.pool import NullPool

        assert self._url is not None
        settings: dict[str, Any] = {
            # Trials take minutes. Between its few writes a worker holds no connection: none can break meanwhile, and
            # a thousand workers do not use up those of the server.
            "poolclass": NullPool,
            "connect_args": {} if "connect_timeout" in self._url.query else {"connect_timeout": _CONNECT_SECONDS},
            "hide_parameters": True,
        }
        for attempt in range(_OPENING_ATTEMPTS):
            try:
                return RDBStorage(self._url.render_as_string(hide_password=False), engine_kwargs=settings)
            except DBAPIError as error:
                if attempt == _OPENING_ATTEMPTS - 1 or not _may_be_a_race(error):
                    raise
                time.sleep(random.uniform(0, 0.5))
            except ImportError as error:
                raise UsageError(f"{self.shown}: the driver of the database does not load: reinstall it") from error
        raise AssertionError("the last attempt returns or raises")

    def _outlast(self, engine: "Engine") -> None:
        """Have each new connection wait for a server that is away for a while."""
        from sqlalchemy import event

        def connect(dialect: Any, record: Any, args: Any, kwargs: Any) -> Any:
            end, told = time.monotonic() + _RETRY_SECONDS, False
            while True:
                try:
                    return dialect.connect(*args, **kwargs)
                except dialect.loaded_dbapi.OperationalError:
                    if time.monotonic() >= end:
                        raise
                    if not told:
                        say(f"{self.shown}: the connection is lost: trying again for {_RETRY_SECONDS} seconds")
                    told = True
                    time.sleep(1)

        event.listen(engine, "do_connect", connect)

    def _hide(self, text: str) -> str:
        """A driver's message without what the URL holds beside host, port and database."""
        if self._url is None:
            return text
        values = [self._url.username, self._url.password]
        for value in self._url.query.values():
            values += [value] if isinstance(value, str) else value
        for value in sorted(filter(None, values), key=len, reverse=True):
            for form in (value, quote(value, safe=""), quote_plus(value)):
                # Hiding every letter "a" because the user is called that would leave nothing to read.
                pattern = re.escape(form) if len(form) > 3 else rf"(?<!\w){re.escape(form)}(?!\w)"
                text = re.sub(pattern, "***", text)
        return text


class JournalFault(Exception):
    """A journal file that cannot be read or written. The text says why, and the cure."""


def say(text: str) -> None:
    """Print a line beside the progress bar."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


def without_secrets(text: str) -> str:
    """Text that may hold URLs, as far as it is sure to hold no secrets."""
    return re.sub(r"://.*|\S*:\S*@.*", "://***", text, flags=re.DOTALL)


def database_error(error: BaseException | None) -> BaseException | None:
    """The database's error that led to another one. Optuna runs into errors of its own after it."""
    from sqlalchemy.exc import SQLAlchemyError

    while error is not None and not isinstance(error, SQLAlchemyError):
        error = error.__cause__ or error.__context__
    return error


def _may_be_a_race(error: BaseException) -> bool:
    """Whether an error may come from another worker that made the same tables at the same moment."""
    from sqlalchemy.exc import IntegrityError, ProgrammingError

    met = any(phrase in str(error).lower() for phrase in ("already exists", "deadlock"))
    return met or isinstance(error, IntegrityError | ProgrammingError)


def _parsed(text: str) -> "URL":
    """A URL with a driver that is installed. What cannot be parsed is not shown: it may hold a password anywhere."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    scheme, _, _ = text.partition("://")
    kind, _, driver = scheme.partition("+")
    if kind == "sqlite":
        raise UsageError("--storage sqlite://: SQLite is for one machine, and the default: give a folder with --out")
    known = [*_DRIVERS, *_SAME]
    if kind not in known:
        raise unknown("kind of storage", without_secrets(kind), known, f"a file that ends in {' or '.join(_JOURNALS)}")
    kind = _SAME.get(kind, kind)
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise UsageError(f"--storage {kind}://***: not a URL: give {_FORM}") from None
    if "@" in f"{url.host}{url.database}":
        raise UsageError(
            f"--storage {kind}://***: write @ : / ? and % in a user or password as %40 %3A %2F %3F and %25"
        )
    if not url.database:
        raise UsageError(f"--storage {kind}://***: names no database: give {_FORM}")
    return url.set(drivername=f"{kind}+{_installed(kind, driver)}")


def _installed(kind: str, driver: str) -> str:
    """The driver that was asked for, or the best that is installed, by SQLAlchemy's name."""
    drivers = _DRIVERS[kind]
    modules = {module.lower(): module for module in drivers}
    if driver and driver.lower() not in modules:
        raise unknown(f"driver of {kind}", without_secrets(driver), modules)
    wanted = [modules[driver.lower()]] if driver else list(drivers)
    found = next((module for module in wanted if find_spec(module)), None)
    if found is None:
        raise UsageError(f"--storage {kind}://***: no driver is installed: pip install '{drivers[wanted[0]]}'")
    return found.lower()


def _shown(url: "URL") -> str:
    from sqlalchemy import URL

    # Of the parts that are no secrets, one by one: `url.set(username=None)` keeps the user.
    return URL.create(url.get_backend_name(), host=url.host, port=url.port, database=url.database).render_as_string()


def _journal(text: str) -> Path:
    if text.endswith(".db"):
        raise UsageError("--storage: SQLite is for one machine, and the default: give its folder with --out")
    if not text.endswith(_JOURNALS):
        # What was typed may be a URL without its beginning, and is not shown.
        raise UsageError(f"--storage: give {_FORM}, or a journal file that ends in {' or '.join(_JOURNALS)}")
    return Path(text).absolute()


def _open_journal(path: Path) -> "optuna.storages.BaseStorage":
    from collections.abc import Iterator

    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    class Journal(JournalFileBackend):
        """A journal file whose faults are named."""

        def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
            try:
                yield from super().read_logs(log_number_from)
            except OSError as error:
                raise JournalFault(_why_unusable(error)) from error
            except ValueError as error:
                cure = "move it away and begin anew, or give another file with --storage"
                raise JournalFault(f"is no journal of Optuna, or a damaged one ({error}): {cure}") from error

        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            try:
                super().append_logs(logs)
            except OSError as error:
                raise JournalFault(_why_unusable(error)) from error

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if _cut_short(path):
            raise JournalFault("its last line is cut short, as by a full disk: delete that line, then start again")
        # The other kind of lock is a symbolic link to the file, whose path may be another on another machine.
        return JournalStorage(Journal(str(path), JournalFileOpenLock(str(path))))
    except OSError as error:
        raise JournalFault(_why_unusable(error)) from error
    except (KeyError, TypeError, AttributeError) as error:  # JSON, but not Optuna's
        raise JournalFault("is no journal of Optuna: give another file with --storage") from error


def _cut_short(path: Path) -> bool:
    """Whether a journal ends in the middle of a line. For a moment it does while another worker writes."""
    for _ in range(5):
        if not path.exists() or not (content := path.read_bytes()) or content.endswith(b"\n"):
            return False
        time.sleep(0.1)
    return True


def _why_unusable(error: OSError) -> str:
    return f"the journal cannot be used ({error.strerror or error}): give a file on a disk that all machines share"


def _ensure_first_trial(study: "optuna.Study", defaults: dict[str, Any]) -> None:
    """Queue the trial of the default settings if the worker that made the study was killed before it did."""
    end = time.monotonic() + _FIRST_TRIAL_SECONDS
    while not (trials := study.get_trials(deepcopy=False)) and time.monotonic() < end:
        time.sleep(0.1)
    if not any(is_default(trial) and trial.state.name != "FAIL" for trial in trials):
        study.enqueue_trial(defaults)


def is_default(trial: "optuna.trial.FrozenTrial") -> bool:
    """Whether a trial was queued with given settings: only that of the default settings is."""
    return "fixed_params" in trial.system_attrs

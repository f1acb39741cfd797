"""A PostgreSQL server of a test's own, behind a socket in a folder that nobody else sees."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any

from tests.processes import wait_for

USER, PASSWORD = "searcher", "hunter2hunter2"
_PLACES = ("/usr/local/bin", *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)))


def program(name: str) -> str | None:
    """The path of one of PostgreSQL's programs. Debian keeps them out of PATH."""
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(_PLACES))


class Postgres:
    """A server with one user, who has a password, and a database for each test that asks for one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # PostgreSQL refuses to run as root.
        self._as = _other_user() if os.getuid() == 0 else {}
        self._process: Popen[bytes] | None = None
        self._databases = 0

    def set_up(self) -> None:
        """Make the cluster's files. Call it once."""
        if self._as:
            os.chown(self.folder, self._as["user"], self._as["group"])
        password = self.folder / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        subprocess.run(
            [
                *(program("initdb"), "--no-sync", f"--pgdata={self.folder / 'data'}", "--encoding=UTF8", "--locale=C"),
                *(f"--username={USER}", "--auth=scram-sha-256", f"--pwfile={password}"),
            ],
            **self._as,
            cwd=self.folder,
            stdout=DEVNULL,
            check=True,
        )

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        self._process = Popen(
            [
                *(program("postgres"), "-D", self.folder / "data", "-k", self.folder),
                *("-c", "listen_addresses=", "-c", "fsync=off", "-c", "log_min_messages=panic"),
            ],
            **self._as,
            cwd=self.folder,
            stdout=DEVNULL,
            stderr=DEVNULL,
        )
        wait_for(self._answers, self._process)

    def stop(self) -> None:
        """Stop the server at once, whoever is connected."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)  # a fast shutdown: it does not wait for those who are connected
            self._process.wait(60)
            self._process = None

    def database(self) -> str:
        """The URL of a new, empty database, with the password."""
        import psycopg

        self._databases += 1
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE study{self._databases}".encode())
        return self.url(f"study{self._databases}")

    def url(self, database: str, user: str = USER, password: str = PASSWORD) -> str:
        """A URL of this server."""
        return f"postgresql://{user}:{password}@/{database}?host={self.folder}"

    def execute(self, url: str, query: str, rows: bool = True) -> list[tuple[Any, ...]]:
        """The rows of a query, where it gives some."""
        import psycopg

        with psycopg.connect(url, autocommit=True) as connection:
            done = connection.execute(query.encode())
            return done.fetchall() if rows else []

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url("postgres")).close()
        except psycopg.OperationalError:
            return False
        return True


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A running server, whose files go afterwards."""
    # Not in pytest's own folder, which no other user may enter. And a socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        os.chmod(folder, 0o755)
        server = Postgres(Path(folder))
        server.set_up()
        server.start()
        try:
            yield server
        finally:
            server.stop()


def _other_user() -> dict[str, Any]:
    names = {user.pw_name: user for user in pwd.getpwall()}
    user = names.get("postgres") or names["nobody"]
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}

"""Fixtures of the tests of a predictor's making."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from tests.postgres import Postgres, postgres, program


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """A PostgreSQL server of the tests' own."""
    if program("postgres") is None or program("initdb") is None:
        pytest.skip("there is no PostgreSQL server (Debian: apt-get install postgresql)")
    if find_spec("psycopg") is None:
        pytest.skip("there is no driver of PostgreSQL (pip install 'psycopg[binary]')")
    with postgres() as server:
        yield server

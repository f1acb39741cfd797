"""Where a shared study lies: what is given, what goes wrong, and that no secret is ever shown."""

import logging
import traceback

import optuna
import pytest

from predictor.errors import UsageError
from predictor.training import study_storage
from predictor.training.study_storage import SharedStudy, without_secrets
from tests.postgres import PASSWORD, USER

DEFAULTS = {"x": 0.5}


def opened(storage, identity="same", name="smartfrz"):
    return SharedStudy(storage, name).open(identity, {"runs": 3}, DEFAULTS, optuna.pruners.NopPruner())


def refused(storage):
    """The error of a storage that cannot be used, and all that a traceback shows of it."""
    with pytest.raises(UsageError) as caught:
        SharedStudy(storage).connect()
    return "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("storage", "cure"),
    [
        ("mongodb://bob:hunter2@host/db", "postgresql"),
        ("postgresql+asyncpg://bob:hunter2@host/db", "psycopg"),
        ("postgresql://bob:hunter2", "DATABASE"),
        ("postgresql://bob:hunter2@host", "DATABASE"),
        ("postgresql://bob:hun@ter2@host/db", "%40"),
        ("postgresql://bob/x:hunter2@host/db", "%2F"),
        ("bob:hunter2@host/db", ".journal"),
        ("host=x password=hunter2", ".journal"),
        ("sqlite:///bob/hunter2", "--out"),
        ("bob/hunter2.db", "--out"),
    ],
)
def test_what_can_be_no_storage_is_refused_and_not_shown(storage, cure):
    shown = refused(storage)
    assert cure in shown
    assert not any(secret in shown for secret in ("hunter2", "ter2", "bob"))


def test_a_server_whose_driver_is_missing_names_the_package(monkeypatch):
    monkeypatch.setattr(study_storage, "find_spec", lambda module: None)
    assert "pip install 'psycopg[binary]'" in refused("postgresql://bob:hunter2@host/db")
    assert "pip install 'pymysql'" in refused("mysql://bob:hunter2@host/db")


def test_what_is_shown_of_a_url_is_host_port_and_database(monkeypatch):
    monkeypatch.setattr(study_storage, "find_spec", lambda module: True)
    study = SharedStudy("postgres://bob:hunter2@db.example:5433/tune?password=x&sslkey=y")
    assert study.shown == "postgresql://db.example:5433/tune"
    assert study.holds_password
    assert not SharedStudy("mariadb://bob@db.example/tune").holds_password


def test_text_that_may_hold_a_url_is_cut_before_its_secrets():
    assert (
        without_secrets("no such flag: --sotrage=postgresql://bob:hun ter2@h/d")
        == "no such flag: --sotrage=postgresql://***"
    )
    assert "hunter2" not in without_secrets("unrecognized: bob:hunter2@h/d")
    assert without_secrets("--trials: invalid int value: 'x'") == "--trials: invalid int value: 'x'"


def test_an_unknown_message_of_a_driver_is_shown_without_secrets(postgres_server):
    url = "postgresql://alice:hun%2Fter2@127.0.0.1:1/db"
    for query in ("sslmode=quatsch", "connect_timeout=hun%2Fter2", "channel_binding=alice"):
        shown = refused(f"{url}?{query}")
        assert not any(secret in shown for secret in ("hun/ter2", "hun%2Fter2", "alice", "quatsch"))


def test_each_fault_of_a_server_has_its_own_cure(postgres_server):
    server = postgres_server
    faults = {
        "PGPASSWORD": server.url("postgres", password="wrong-password"),
        "user": server.url("postgres", user="somebody"),
        "createdb": server.url("missing"),
        "host and port": "postgresql://somebody:wrong-password@127.0.0.1:1/db",
    }
    for cure, url in faults.items():
        shown = refused(url)
        assert cure in shown
        assert not any(secret in shown for secret in (PASSWORD, USER, "wrong-password", "somebody", "host="))


def test_a_user_who_may_make_no_tables_is_told_the_cure(postgres_server):
    url = postgres_server.database()
    postgres_server.execute(url, "CREATE ROLE guest LOGIN PASSWORD 'guestguest'", rows=False)
    guest = url.replace(f"{USER}:{PASSWORD}", "guest:guestguest")
    assert "owner" in refused(guest)


def test_a_server_that_is_lost_is_waited_for_and_then_named(postgres_server, monkeypatch, capsys, caplog):
    url = postgres_server.database()
    study = SharedStudy(url)
    opened_study = study.open("same", {}, DEFAULTS, optuna.pruners.NopPruner())
    monkeypatch.setattr(study_storage, "_RETRY_SECONDS", 1)
    postgres_server.stop()
    try:
        with pytest.raises(optuna.exceptions.StorageInternalError) as caught:
            opened_study.ask()
        assert "cannot be reached" in str(study.fault(caught.value))
        printed = capsys.readouterr().err
        assert "trying again" in printed
        assert not any(secret in printed + caplog.text for secret in (PASSWORD, USER))
    finally:
        postgres_server.start()
    assert opened_study.ask().number == 0  # goes on


@pytest.fixture(params=["postgresql", "journal"])
def storage(request, tmp_path):
    if request.param == "journal":
        return str(tmp_path / "shared" / "study.journal")
    return request.getfixturevalue("postgres_server").database()


def test_a_study_is_made_once_and_others_join_it(storage):
    studies = [opened(storage) for _ in range(3)]
    assert [len(study.trials) for study in studies] == [1, 1, 1]
    assert {study.study_name for study in studies} == {"smartfrz-same"}


def test_a_study_of_another_task_is_refused_unless_it_has_a_name_of_its_own(storage):
    opened(storage)
    with pytest.raises(UsageError, match="--study NAME") as caught:
        opened(storage, "other")
    assert PASSWORD not in str(caught.value)
    assert "'runs': 3" in str(caught.value)
    assert opened(storage, "other", "second").trials[0].state.name == "WAITING"
    assert len(opened(storage).trials) == 1


def test_the_default_settings_are_tried_if_the_one_who_made_the_study_was_killed_before(storage, monkeypatch):
    monkeypatch.setattr(study_storage, "_FIRST_TRIAL_SECONDS", 0.1)
    optuna.create_study(study_name="smartfrz-same", storage=SharedStudy(storage).connect())
    assert opened(storage).trials[0].system_attrs["fixed_params"] == DEFAULTS


@pytest.mark.parametrize("content", ["no journal\nof Optuna\n", '{"op_code": 4}\n', "[1]\n"])
def test_a_file_that_is_no_journal_is_refused(content, tmp_path):
    path = tmp_path / "study.journal"
    path.write_text(content + "{}\n")
    assert "another file" in refused(str(path))


def test_a_journal_that_a_full_disk_cut_short_is_refused(tmp_path):
    (tmp_path / "study.journal").write_text('{"op_code": 0, "stud')
    assert "delete that line" in refused(str(tmp_path / "study.journal"))


def test_a_journal_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    assert "file on a disk" in refused(str(tmp_path / "file" / "study.journal"))


def test_loggers_that_would_show_the_user_are_silent(postgres_server):
    SharedStudy(postgres_server.database()).connect()
    for logger in ("sqlalchemy.pool.impl.NullPool", "psycopg", "optuna.storages._rdb.storage"):
        assert not logging.getLogger(logger).isEnabledFor(logging.ERROR)

"""Connects to a Ray cluster, with its token, and says what to do where that fails."""

import contextlib
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from predictor.errors import UsageError

START = "`ray get-auth-token --generate`, then `RAY_AUTH_MODE=token ray start --head`"
"""How a cluster is started."""
_JOIN = (
    "have the cluster's token in ~/.ray/auth_token or its path in RAY_AUTH_TOKEN_PATH (`ray get-auth-token --generate` "
    "makes it on the head, and every machine needs the same)"
)
_SECONDS_TO_CONNECT = 10.0
_QUIET = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_NUM_REDIS_GET_RETRIES": "5",  # a wrong token is found out in 5 seconds and not in 20
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""What Ray finds in the environment, unless the user has set it: the token is asked for, and nothing is reported."""


def import_ray() -> Any:
    """Ray, set up so that it asks for a token. Raises UsageError where it is not installed."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise UsageError(f"--engine ray needs Ray ({error}): pip install 'smartfrz[cluster]'") from error
    return ray


@contextlib.contextmanager
def connected(address: str, code: Path) -> Iterator[Any]:
    """Connect this process to a cluster. When the block ends, in whatever way, all its jobs end.

    Args:
        address: HOST:PORT, or "auto" for the cluster that this machine is part of.
        code: The folder that nodes run code from.

    Raises:
        UsageError: There is no cluster, no token or a wrong one.
    """
    ray = import_ray()
    if address != "auto":
        _check_somebody_listens(address)
    try:
        with _without_stderr():
            context = ray.init(
                address=address,
                runtime_env={"working_dir": str(code)},
                log_to_driver=False,
                configure_logging=False,
                logging_level=logging.ERROR,
            )
    except ray.exceptions.AuthenticationError as error:
        raise UsageError(f"Ray's token is missing or wrong: {_JOIN}") from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UsageError(_why_not(address, error)) from error
    _mute(ray)
    try:
        yield context
    finally:
        ray.shutdown()


def refuse_open_cluster() -> None:
    """Raise UsageError, unless the user has said that a cluster may do without a token."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "disabled":
        raise UsageError(
            f"the cluster runs jobs of anybody who reaches it: start it with {START}, or set RAY_AUTH_MODE=disabled "
            "where nobody else does"
        )


def _why_not(address: str, error: Exception) -> str:
    if address == "auto" and "Could not find" in str(error):
        return f"this machine is not part of a running Ray cluster: start one with {START}, or give --address HOST:PORT"
    return (
        f"--address {address}: the cluster does not let this machine in ({str(error).splitlines()[0]}). Either the "
        f"token is missing or wrong: {_JOIN}; or this machine is not part of it: `RAY_AUTH_MODE=token ray start "
        f"--address {address}`"
    )


def _check_somebody_listens(address: str) -> None:
    """Raise UsageError for an address at which nobody listens: Ray itself would try for two minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"--address {address}: give HOST:PORT, such as 10.0.0.1:6379, or auto")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS_TO_CONNECT).close()
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"--address {address}: nobody answers there ({error}): start a cluster with {START}"
        ) from error


def _mute(ray: Any) -> None:
    """Keep Ray from printing several lines for each node or process that died: the engine says so in one."""
    with contextlib.suppress(AttributeError):  # a private name, which another version may not have
        if callable(ray._private.worker.print_to_stdstream):
            ray._private.worker.print_to_stdstream = lambda *_, **__: None


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Keep what Ray's C++ part prints, line after line, from the terminal: the error that follows says it once."""
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)

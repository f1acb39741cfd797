"""Two real processes that train together, as a launcher such as torchrun starts them."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def run_both(module, folder):
    """Run `python -m module folder` as ranks 0 and 1, to their ends; fails with what they said where one does."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    here = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port, "PYTHONWARNINGS": "ignore"}
    environments = [{**os.environ, **here, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    command = [sys.executable, "-m", module, str(folder)]
    checkout = Path(__file__).parents[2]
    processes = [
        subprocess.Popen(command, cwd=checkout, env=env, stderr=subprocess.PIPE, text=True) for env in environments
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(error[-3000:] for error in errors)

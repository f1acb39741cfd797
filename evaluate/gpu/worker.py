"""The process behind one check. It ends with its parent, and leaves its answer in a file."""

import importlib
import json
import os
import sys
import threading
import traceback
from pathlib import Path

from evaluate.gpu.checks import CHECKS, CheckFailed, CheckSkipped
from evaluate.gpu.devices import device_named


def main(name: str, device: str, answer: Path) -> None:
    """Run a check on a device, and write its status and its line to `answer`."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    status, line = outcome(name, device)
    part = answer.with_suffix(".part")
    part.write_text(json.dumps({"status": status, "line": line}), encoding="utf-8")
    part.replace(answer)
    # A broken CUDA context or a stuck group of processes would hold up an orderly exit.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def outcome(name: str, device: str) -> tuple[str, str]:
    """The status of a check, and its figures or what is wrong."""
    try:
        module, function = CHECKS[name].target.split(":")
        check = getattr(importlib.import_module(module), function)
        with device_named(device) as where:
            return "ok", check(where)
    except CheckSkipped as reason:
        return "skipped", str(reason)
    except CheckFailed as fault:
        return "FAILED", str(fault)
    except Exception as error:  # whatever a check raises is its result
        traceback.print_exc()
        return "FAILED", f"{type(error).__name__}: {error}"


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))

"""A process per candidate, so that allocator, CPU capability and peak memory are each its own.

The parent holds a `Worker` and asks it for one thing at a time; the child answers in JSON, one line each way.
"""

import json
import os
import selectors
import subprocess
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from .candidate import Candidate, Declined, Spec, Wrong, exclusive, release_memory, spent_by
from .machine import measure_limits
from .registry import Absent

# glibc maps allocations above a threshold afresh and gives them back at once, so each large temporary is faulted in
# page by page. With maps off and nothing trimmed they are reused, which the rivals' large temporaries gain most from.
MALLOC = {"mmap_max": 0, "trim_threshold": 2**40, "top_pad": 2**26}
ALLOCATORS = {
    "no mmap": {"GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in MALLOC.items())},
    "default": {"GLIBC_TUNABLES": ""},
}


class Unmeasured(Exception):
    """A candidate that was not timed. `status` is one of absent, declined, wrong and failed."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Worker:
    """The parent's end of a candidate's process."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths, **environment},
            text=True,
        )

    def ask(self, command: str, timeout: float = 900.0, **arguments: Any) -> Any:
        """Send a command and return its answer; `Unmeasured` if the child refuses, fails, dies or takes too long."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Unmeasured("failed", "its process had ended") from None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout):
                self.close()
                raise Unmeasured("failed", f"{command} took longer than {timeout:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise Unmeasured("failed", f"its process ended with status {code} during {command} (out of memory?)")
        return answer_of(json.loads(line))

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            # What was still to be written to a process that has ended cannot be.
            with suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()


def answer_of(reply: dict[str, Any]) -> Any:
    """The answer that a child's reply holds; `Unmeasured` where it holds a reason instead."""
    if "status" in reply:
        raise Unmeasured(reply["status"], reply["reason"])
    return reply["answer"]


class Server:
    """The child's end: holds at most one candidate and carries out commands on it."""

    def __init__(self) -> None:
        self.candidate: Candidate | None = None

    def ready(self, **spec: Any) -> None:
        """Make a spec ready, in place of the last."""
        self.release()
        self.candidate = Candidate(Spec(**spec))

    def release(self) -> None:
        """Let the candidate's memory go."""
        if self.candidate is not None:
            self.candidate = None
            release_memory()

    def save_expected(self, path: str) -> None:
        """Write the results for others to be checked against."""
        self.held.save_expected(Path(path))

    def check(self, path: str) -> dict[str, Any]:
        """Compare with the expected results."""
        errors = self.held.check(Path(path))
        return {"errors": errors, "notes": self.held.notes}

    def window(self, calls: int, alone: bool) -> dict[str, float]:
        """Time some calls."""
        return self.held.window(calls, alone)

    def peak_memory(self) -> dict[str, int]:
        """Measure a call's memory."""
        return self.held.peak_memory()

    def limits(self, threads: int, alone: bool) -> dict[str, Any]:
        """Measure the machine's best rates."""
        rates: dict[str, float] = {}
        with exclusive(alone):
            spent = spent_by(
                lambda: rates.update(measure_limits(threads, self.held.spec.device, self.held.spec.torch_dtype))
            )
        return {"rates": rates, **spent}

    @property
    def held(self) -> Candidate:
        """The candidate that is ready."""
        if self.candidate is None:
            raise RuntimeError("no candidate is ready")
        return self.candidate

    def carry_out(self, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """The answer to a command, or the status and reason of a candidate that cannot give one."""
        try:
            return {"answer": getattr(self, command)(**arguments)}
        except (Absent, ImportError) as reason:
            return {"status": "absent", "reason": str(reason)}
        except Declined as reason:
            return {"status": "declined", "reason": str(reason)}
        except Wrong as reason:
            return {"status": "wrong", "reason": str(reason)}
        except Exception as error:
            traceback.print_exc()
            return {"status": "failed", "reason": f"{type(error).__name__}: {str(error)[:300]}"}


def serve(commands: TextIO, answers: TextIO) -> None:
    """Carry out commands until there are no more."""
    server = Server()
    for line in commands:
        request = json.loads(line)
        answers.write(json.dumps(server.carry_out(request.pop("command"), request)) + "\n")
        answers.flush()


def main() -> None:
    # Libraries print; what they print must not land among the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()

"""What is measured: a process that answers over serve/bench/protocol.py, and is asked one request at a time."""

import json
import subprocess
from collections.abc import Sequence
from typing import Any, Self

from .protocol import ABOUT, LOAD, PEAK, Answer


class ContenderError(ValueError):
    """A contender that could not be started, or ended before it had answered."""


class Contender:
    """One process with its model loaded; close it, or use it as a context."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        """Start the command and wait until its model is loaded. Raises ContenderError with what it said last."""
        self.name = name
        try:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        except OSError as error:
            raise ContenderError(f"{name}: {command[0]} cannot be started ({error.strerror})") from error
        ready = self._read()
        self.load_seconds: float = ready[LOAD]
        self.about: dict[str, str] = ready[ABOUT]
        self.peak_mib: float = ready[PEAK]

    def ask(self, request: dict[str, Any]) -> Answer:
        """Let it answer one request; nobody else works meanwhile. Raises ContenderError."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it said before it ended says more
        answer = self._read()
        self.peak_mib = answer[PEAK]
        return answer

    def _read(self) -> Answer:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries print other things
                message: Answer = json.loads(line)
                if "error" in message:
                    self.close()
                    raise ContenderError(message["error"])
                return message
        raise ContenderError(f"{self.name}: ended without an answer (exit code {self._process.wait()}); see above")

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

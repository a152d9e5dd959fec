"""The running process: what it puts on the terminal, and how it is stopped from outside."""

from .stopping import EXIT_STOPPED, Stopped, StopRequest
from .terminal import quiet_libraries, say

__all__ = [
    "EXIT_STOPPED",
    "StopRequest",
    "Stopped",
    "quiet_libraries",
    "say",
]

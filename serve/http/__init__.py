"""The server: OpenAI's chat completions over HTTP, closed by default, with limits and metrics."""

from .application import build_application
from .server import serve, served_models
from .settings import ServerSettings, SettingsError

__all__ = [
    "ServerSettings",
    "SettingsError",
    "build_application",
    "serve",
    "served_models",
]

"""`switchkd demo`: opens a bundle as a web page on this machine until Ctrl-C."""

import argparse
import errno
import os
import signal
import socket
import sys
import tempfile
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from switchkd.serve import BundleError, ConversationError, Engine, return_freed_blocks

from .examples import EXAMPLES, DemoError, read_examples

ERRORS = (BundleError, ConversationError, DemoError)
UPLOADS = "GRADIO_TEMP_DIR"  # Gradio's name for where uploads go


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path, help="folder made by `switchkd export`")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (default: %(default)s; 0: any free)")
    parser.add_argument("--precision", help="which of the bundle's precisions (default: its first)")
    parser.add_argument("--threads", type=int, help="threads to compute with (default: one a core)")
    parser.add_argument(
        "--examples",
        type=Path,
        metavar="FOLDER",
        help=f"folder of example pictures with an {EXAMPLES} (default: the bundle's examples/, where it has one)",
    )
    parser.add_argument(
        "--open",
        action=argparse.BooleanOptionalAction,
        default=_has_screen(),
        help="open the page in a browser (default: where there is a terminal and a screen)",
    )


def run(args: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C or SIGTERM; the errors in ERRORS are for people."""
    port = find_port(args.host, args.port)
    return_freed_blocks()
    with upload_folder() as uploads:
        engine = Engine.open(args.bundle, args.precision, args.threads)
        folder = args.examples or args.bundle / "examples"
        # What the manifest lists was checked with the bundle, links into a hub's cache included.
        listed = {Path(os.path.normpath(args.bundle / name)) for name in engine.bundle.manifest.files}
        examples = read_examples(folder, listed) if args.examples or folder.is_dir() else []
        with without_proxies():
            from .app import build_app, launch  # Gradio takes seconds to import: mistakes are told before that

            app = build_app(engine, uploads, examples)
            url = launch(app, args.host, port, [folder] if examples else [])
        try:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            # Within the try: whoever reads this line may press Ctrl-C at once.
            print(f"switchkd demo is open at {url} (Ctrl-C stops it)", flush=True)
            if args.open:
                webbrowser.open(url)
            threading.Event().wait()
        except KeyboardInterrupt:
            print("\nstopped")
        finally:
            app.close(verbose=False)
    return 0


@contextmanager
def upload_folder() -> Iterator[Path]:
    """A folder of this demo alone for what people upload, gone with it; raises DemoError where none can be made.

    Gradio's own would be shared with every other demo of this machine, and with its users.
    """
    place = os.environ.get(UPLOADS)
    try:
        if place:
            Path(place).mkdir(parents=True, exist_ok=True)
        holder = tempfile.TemporaryDirectory(prefix="switchkd-demo-", dir=place, ignore_cleanup_errors=True)
    except OSError as error:
        raise DemoError(
            f"{place or 'the folder for temporary files'}: cannot take uploads ({error.strerror}); set {UPLOADS} to a "
            "folder that can be written to"
        ) from None
    with holder as folder:
        uploads = Path(folder).resolve()
        with environment({UPLOADS: str(uploads)}):
            yield uploads


def without_proxies() -> AbstractContextManager[None]:
    """Let Gradio reach its own page, which it asks for as it starts: proxies are for what lies outside.

    The star also keeps httpx from opening those that it has no code for, such as SOCKS.
    """
    return environment({"no_proxy": "*", "NO_PROXY": "*"})


@contextmanager
def environment(changes: dict[str, str]) -> Iterator[None]:
    """Set variables of the environment for a while."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def find_port(host: str, port: int) -> int:
    """Return the port, or a free one for 0; raises DemoError with the remedy where nothing can listen there."""
    try:
        with socket.create_server((host, port)) as server:
            return int(server.getsockname()[1])
    except OverflowError:
        raise DemoError(f"port {port} does not exist; choose one from 1024 to 65535 with --port") from None
    except socket.gaierror:
        raise DemoError(
            f"host {host} is unknown; use 127.0.0.1, or 0.0.0.0 for every network of this machine"
        ) from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            reason = f"port {port} is in use; stop the program that listens there, or choose another with --port"
        elif error.errno == errno.EACCES:
            reason = f"port {port} needs more rights; choose one from 1024 to 65535 with --port"
        else:
            reason = f"cannot listen at {host}:{port} ({error.strerror}); choose another with --host or --port"
        raise DemoError(reason) from None


def _has_screen() -> bool:
    display = sys.platform in ("win32", "darwin") or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    return display and sys.stdout.isatty()

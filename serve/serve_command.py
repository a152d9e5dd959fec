"""`switchkd serve`: bundles behind OpenAI's chat completions, on this machine or with a key for others."""

import argparse
import json

from . import BundleError
from .http import ServerSettings, SettingsError, serve, served_models
from .http.settings import PREFIX, add_flags

ERRORS = (BundleError, SettingsError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundles", metavar="BUNDLE", nargs="+", help="folders made by `switchkd export`")
    add_flags(parser)
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings as JSON and end")
    parser.epilog = f"Every flag is also a variable of the environment, --max-body as {PREFIX}MAX_BODY; flags win."


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C; the errors in ERRORS are for people."""
    settings = ServerSettings.resolve(args)
    if args.print_config:
        print(json.dumps({"bundles": args.bundles, **settings.shown()}, indent=2))
        return 0
    models = served_models(args.bundles, settings)
    names = ", ".join([*models.aliases, *models.openings])
    serve(models, settings, lambda address: print(f"ready: {address}/v1 serves {names}", flush=True))
    return 0

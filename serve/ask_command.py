"""`switchkd ask`: a picture and a question to a bundle, the answer streamed to the terminal."""

import argparse
import json
import os
import sys
from dataclasses import asdict

from . import (
    MAX_NEW_TOKENS,
    Answer,
    BundleError,
    ConversationError,
    Engine,
    PictureError,
    PrefixFolderError,
    PromptError,
    Sampling,
    SamplingError,
    return_freed_blocks,
)

ERRORS = (BundleError, ConversationError, PictureError, PrefixFolderError, PromptError, SamplingError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bundle", metavar="BUNDLE", help="folder made by `switchkd export`")
    parser.add_argument("picture", metavar="PICTURE", help="picture file: JPEG, PNG, WebP, GIF, TIFF, AVIF, ...")
    parser.add_argument("question", metavar="QUESTION", help="what to ask about it")
    parser.add_argument("--precision", help="which of the bundle's precisions (default: its first)")
    parser.add_argument("--threads", type=int, help="threads to compute with (default: one a core)")
    parser.add_argument(
        "--no-prefill",
        action="store_true",
        help="do without the precision that reads pictures and prompts for this one, where the bundle has such: less "
        "memory, and a slower first token",
    )
    parser.add_argument(
        "--prefixes",
        metavar="FOLDER",
        help="keep what the model made of the picture there, and begin with it the next time",
    )
    own = "default: the bundle's generation_config.json, or"
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help=f"{own} {MAX_NEW_TOKENS}")
    parser.add_argument("--temperature", type=float, metavar="T", help=f"0 is greedy ({own} 0)")
    parser.add_argument("--top-k", type=int, metavar="K", help=f"keep the K likeliest tokens ({own} all)")
    parser.add_argument("--top-p", type=float, metavar="P", help=f"keep the likeliest tokens up to P ({own} 1: all)")
    parser.add_argument("--seed", type=int, help="repeat a random answer")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of streaming")
    parser.add_argument("--timing", action="store_true", help="say on stderr where the time went, terminal or not")


def run(args: argparse.Namespace) -> int:
    """Answer one question; the errors in ERRORS are for people."""
    return_freed_blocks()
    sampling = Sampling(args.temperature, args.top_p, args.seed, args.top_k)
    engine = Engine.open(
        args.bundle, args.precision, args.threads, prefill=not args.no_prefill, prefix_folder=args.prefixes
    )
    stream = engine.stream(
        as_text(args.question), [args.picture], max_new_tokens=args.max_new_tokens, sampling=sampling
    )
    for piece in stream:
        if not args.json:
            print(piece, end="", flush=True)
    if args.json:
        said = {**asdict(stream.answer), "precision": engine.bundle.precision}
        del said["logprobs"]  # nobody asked for them
        narrow = not (sys.stdout.encoding or "utf").lower().startswith("utf")
        print(json.dumps(said, ensure_ascii=narrow))
    else:
        print()
    if args.timing or (sys.stderr.isatty() and not args.json):
        print(timing_line(stream.answer), file=sys.stderr)
    return 0


def as_text(word: str) -> str:
    """A word of the command line, also where the system's locale says ASCII and the terminal wrote UTF-8."""
    try:
        word.encode()
    except UnicodeEncodeError:
        return os.fsencode(word).decode("utf-8", "surrogateescape")
    return word


def timing_line(answer: Answer) -> str:
    """Say in one line how long an answer took and why it ended."""
    seconds = answer.seconds
    parts = [
        f"picture {seconds.pictures * 1000:.0f} ms",
        f"prompt {seconds.prefill * 1000:.0f} ms",
    ]
    speed = answer.tokens_per_second
    parts.append(f"{len(answer.tokens)} tokens" + (f" at {speed:.0f} a second" if speed else ""))
    if answer.finish_reason == "length":
        parts.append("cut off at the limit")
    return f"({', '.join(parts)})"

"""A bundle under the bench: `python -m switchkd.serve.bench.bundle BUNDLE [--precision P] [--threads N] ...`."""

import argparse
import sys
import time

from switchkd.export.process.memory import return_freed_blocks

from .protocol import requests, write


def main() -> int:
    """Answer the bench's requests from a bundle."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle")
    parser.add_argument("--precision")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-prefill", action="store_true")
    args = parser.parse_args()
    return_freed_blocks()
    start = time.perf_counter()
    import onnxruntime

    from switchkd.export.contract.bundle import BundleError

    from ..engine.conversation import ConversationError
    from ..engine.engine import Engine

    try:
        engine = Engine.open(args.bundle, args.precision, args.threads, prefill=not args.no_prefill)
    except (BundleError, ConversationError) as error:
        write({"error": str(error)})
        return 1
    reader = None if args.no_prefill else engine.bundle.prefill()
    about = {"precision": engine.bundle.precision, "onnxruntime": onnxruntime.__version__}
    if reader is not None:
        about["read by"] = reader.precision
    for request, answered in requests(time.perf_counter() - start, about):
        start = time.perf_counter()
        answer = engine.answer(request["question"], [request["picture"]], max_new_tokens=request["tokens"])
        whole, seconds, tokens = time.perf_counter() - start, answer.seconds, len(answer.tokens)
        answered(
            {
                "preprocess": seconds.preprocess,
                "encode": seconds.encode,
                "prefill": seconds.prefill,
                "first_token": seconds.first_token,
                "token": seconds.decode / (tokens - 1) if tokens > 1 else None,
                "whole": whole,
                "tokens": tokens,
                "prompt_tokens": answer.prompt_tokens,
            }
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

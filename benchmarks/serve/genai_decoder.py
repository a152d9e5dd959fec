"""The language model alone under `switchkd bench`, as onnxruntime-genai's own builder quantises and runs it.

It takes no picture: as many tokens as the bundle's prompt has stand for it, so that only `prefill` and `token` can be
compared. In an environment with onnxruntime-genai (and torch, transformers, onnx for the builder):

    python -m benchmarks.serve.genai_decoder --build CHECKPOINT OUT
    switchkd bench BUNDLE --against "genai int4=PYTHON -m benchmarks.serve.genai_decoder OUT --prompt-tokens 837"
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROTOCOL = Path(__file__).resolve().parents[2] / "serve" / "bench" / "protocol.py"


def build(checkpoint: Path, out: Path) -> None:
    """Write the language model of a LLaVA checkpoint as a folder of its own, and let the builder make int4 of it."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2ForCausalLM

    whole: Any = AutoModelForImageTextToText.from_pretrained(checkpoint)
    model = Qwen2ForCausalLM(whole.config.text_config).to(whole.dtype)
    model.model.load_state_dict(whole.model.language_model.state_dict())
    model.lm_head.load_state_dict(whole.lm_head.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
        words = ["-i", folder, "-o", str(out), "-p", "int4", "-e", "cpu"]
        subprocess.run([sys.executable, "-m", "onnxruntime_genai.models.builder", *words], check=True)


def set_threads(model: Path, threads: int) -> None:
    """Let the folder's sessions use so many."""
    file = model / "genai_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    file.write_text(json.dumps(config, indent=1), encoding="utf-8")


def serve(model: Path, prompt_tokens: int) -> None:
    """Answer the bench's requests."""
    import importlib.util

    import numpy as np
    import onnxruntime_genai as genai

    # The builder's environment need not have switchkd: its protocol is one file without dependencies.
    spec = importlib.util.spec_from_file_location("protocol", PROTOCOL)
    assert spec is not None
    assert spec.loader is not None
    protocol = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(protocol)
    start = time.perf_counter()
    loaded = genai.Model(str(model))
    ids = np.random.default_rng(0).integers(5, 400, prompt_tokens, dtype=np.int32)
    about = {"onnxruntime-genai": genai.__version__, "takes": "no picture"}
    for request, answered in protocol.requests(time.perf_counter() - start, about):
        parameters = genai.GeneratorParams(loaded)
        parameters.set_search_options(max_length=prompt_tokens + request["tokens"], do_sample=False)
        began = time.perf_counter()
        generator = genai.Generator(loaded, parameters)
        generator.append_tokens(ids)
        generator.generate_next_token()
        first = time.perf_counter()
        count = 1
        while count < request["tokens"] and not generator.is_done():
            generator.generate_next_token()
            count += 1
        ended = time.perf_counter()
        answered(
            {
                "prefill": first - began,
                "token": (ended - first) / (count - 1) if count > 1 else None,
                "tokens": count,
                "prompt_tokens": prompt_tokens,
            }
        )


def main() -> None:
    """Build, or serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", nargs=2, type=Path, metavar=("CHECKPOINT", "OUT"))
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--prompt-tokens", type=int, default=837)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.build:
        build(*args.build)
    if args.model:
        if args.threads:
            set_threads(args.model, args.threads)
        serve(args.model, args.prompt_tokens)


if __name__ == "__main__":
    main()

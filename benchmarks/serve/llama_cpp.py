"""A checkpoint in llama.cpp under `switchkd bench`: its own command line program, run once a request.

llama.cpp comes in the source package of llama-cpp-python. Its program says what each stage took; loading is not in it.

    pip download --no-deps --no-binary llama-cpp-python llama-cpp-python
    cmake -B BUILD -DLLAMA_CURL=OFF SOURCE/vendor/llama.cpp
    cmake --build BUILD --target llama-mtmd-cli llama-quantize
    python -m benchmarks.serve.llama_cpp --make CHECKPOINT GGUF --build BUILD      # with `pip install gguf`
    switchkd bench BUNDLE --against "llama.cpp=python -m benchmarks.serve.llama_cpp GGUF --build BUILD --words 58"

The language model is q4_0 as llama-quantize makes it, the vision encoder q8_0. The checkpoint's tokenizer is not taken
over: a question is as many words of one token as it takes for a prompt as long as the bundle's.
"""

import argparse
import json
import re
import resource
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

from switchkd.serve.bench.protocol import PEAK, requests, write

LANGUAGE, VISION = "language-q4_0.gguf", "vision-q8_0.gguf"


def make(checkpoint: Path, out: Path, build: Path) -> None:
    """Write both GGUF files of a LLaVA checkpoint with a SigLIP encoder, an MLP projector and a Qwen2."""
    from safetensors.torch import load_file

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    weights = {name: tensor.float().numpy() for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    out.mkdir(parents=True)
    whole = out / "language-f16.gguf"
    _write_language_model(config["text_config"], weights, whole)
    subprocess.run([build / "bin" / "llama-quantize", whole, out / LANGUAGE, "Q4_0"], check=True)
    whole.unlink()
    _write_vision(config, weights, out / VISION)


def _write_language_model(config: dict[str, Any], weights: dict[str, Any], file: Path) -> None:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(file, "qwen2")
    layers = config["num_hidden_layers"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    # A vocabulary in which the question's word and its space are a token; `gpt2` needs every byte.
    spelled = [_byte(number) for number in range(256)]
    tokens = ["<end>", *spelled, *(f"<{number}>" for number in range(config["vocab_size"] - 257))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (len(tokens) - 1)])
    writer.add_token_merges([f"{_byte(32)} {_byte(97)}"])
    writer.add_eos_token_id(0)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, layers)
    for name, tensor in weights.items():
        if name.startswith("language_model.") and name != "language_model.lm_head.weight":
            stem, _, kind = name.removeprefix("language_model.").rpartition(".")
            found = names.get_name(stem)
            assert found is not None, name
            writer.add_tensor(f"{found}.{kind}", tensor.astype(np.float16) if tensor.ndim > 1 else tensor)
    _close(writer)


def _byte(number: int) -> str:
    """How GPT-2's vocabulary spells a byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(number) if number in plain else chr(256 + sum(other not in plain for other in range(number)))


def _write_vision(config: dict[str, Any], weights: dict[str, Any], file: Path) -> None:
    import gguf
    import numpy as np

    vision = config["vision_config"]
    writer = gguf.GGUFWriter(file, "clip")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_projection_dim(config["text_config"]["hidden_size"])
    writer.add_vision_image_size(vision["image_size"])
    writer.add_vision_patch_size(vision["patch_size"])
    writer.add_vision_embedding_length(vision["hidden_size"])
    writer.add_vision_feed_forward_length(vision["intermediate_size"])
    writer.add_vision_block_count(vision["num_hidden_layers"])  # of which it leaves out the last, as -2 asks for
    writer.add_vision_head_count(vision["num_attention_heads"])
    writer.add_vision_attention_layernorm_eps(vision["layer_norm_eps"])
    writer.add_vision_image_mean([0.5] * 3)
    writer.add_vision_image_std([0.5] * 3)
    writer.add_vision_use_gelu(True)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    for name, tensor in weights.items():
        found = _vision_name(name)
        if found is None:
            continue
        block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0][0]
        if tensor.ndim == 2 and tensor.shape[1] % block == 0 and "position" not in found:
            quantised = gguf.quants.quantize(tensor, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(found, quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(found, tensor.astype(np.float16) if tensor.ndim in (2, 4) else tensor)
    _close(writer)


_PARTS = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
}
_ENDS = {
    "vision_tower.embeddings.patch_embedding": "v.patch_embd",
    "vision_tower.embeddings.position_embedding": "v.position_embd",
    "vision_tower.post_layernorm": "v.post_ln",
    "multi_modal_projector.linear_1": "mm.0",
    "multi_modal_projector.linear_2": "mm.2",
}


def _vision_name(name: str) -> str | None:
    stem, _, kind = name.rpartition(".")
    if found := re.fullmatch(r"vision_tower\.encoder\.layers\.(\d+)\.(.+)", stem):
        return f"v.blk.{found[1]}.{_PARTS[found[2]]}.{kind}"
    return f"{_ENDS[stem]}.{kind}" if stem in _ENDS else None


def _close(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def answer(program: list[str], picture: str, words: int, most: int) -> tuple[dict[str, Any], float]:
    """Run the program on a picture and a question of so many words; returns what it tells, and its other seconds."""
    question = "a" + " a" * (words - 1)  # the template has tokens of its own; how many there are is reported
    start = time.perf_counter()
    ran = subprocess.run(
        [*program, "--image", picture, "-p", question, "-n", str(most)], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    said = ran.stdout + ran.stderr

    def found(pattern: str) -> list[float]:
        if (match := re.search(pattern, said)) is None:
            raise SystemExit(f"llama-mtmd-cli said nothing like {pattern!r}; it ended with {ran.returncode}:\n{said}")
        return [float(number) for number in match.groups()]

    (encode,) = found(r"batch encoding done in (\d+) ms")
    # From the first text on, and so with the picture's encoding.
    first_token, prompt_tokens = found(r"prompt eval time =\s+([\d.]+) ms /\s+(\d+) tokens")
    decode, runs = found(r": +eval time =\s+([\d.]+) ms /\s+(\d+) runs")
    whole = (first_token + decode) / 1e3
    taken = {
        "encode": encode / 1e3,
        "prefill": (first_token - encode) / 1e3,
        "first_token": first_token / 1e3,
        "token": decode / runs / 1e3,
        "whole": whole,
        "tokens": int(runs) + 1,
        "prompt_tokens": int(prompt_tokens),
        PEAK: resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10,
    }
    return taken, seconds - whole


def main() -> None:
    """Make the files, or answer the bench's requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the GGUF files")
    parser.add_argument("--make", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--build", type=Path, required=True, help="folder of llama.cpp's build")
    parser.add_argument("--words", type=int, default=40, help="of the question")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.make is not None:
        make(args.make, args.folder, args.build)
        return
    program = [str(args.build / "bin" / "llama-mtmd-cli"), "-m", str(args.folder / LANGUAGE)]
    program += ["--mmproj", str(args.folder / VISION), "-t", str(args.threads), "--temp", "0", "--ignore-eos"]
    program += ["-c", "2048", "--no-warmup", "--chat-template", "chatml", "--perf", "-lv", "4"]
    version = subprocess.run([program[0], "--version"], capture_output=True, text=True, check=True)
    about = {"llama.cpp": " ".join((version.stdout + version.stderr).split())[:60], "weights": "q4_0, encoder q8_0"}
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "grey.png"
        Image.new("RGB", (64, 64), "grey").save(picture)
        _, load = answer(program, str(picture), 1, 2)
    for request, _ in requests(load, about):
        write(answer(program, request["picture"], args.words, request["tokens"])[0])


if __name__ == "__main__":
    main()

"""The checkpoint in transformers under `switchkd bench`, its stages called one by one: nothing is lost in between.

switchkd bench BUNDLE --against "torch=python -m benchmarks.serve.transformers_checkpoint CHECKPOINT --dtype bfloat16"
"""

import argparse
import itertools
import time
from typing import Any

import torch
import transformers
from PIL import Image

from switchkd.serve.bench.protocol import Answer, requests
from switchkd.training import load_vlm


def main() -> None:
    """Answer the bench's requests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    start = time.perf_counter()
    vlm = load_vlm(args.checkpoint, dtype=getattr(torch, args.dtype))
    model, processor = vlm.model.eval(), vlm.processor
    about = {"dtype": args.dtype, "torch": torch.__version__, "transformers": transformers.__version__}

    @torch.inference_mode()
    def answer(picture: str, question: str, most: int) -> Answer:
        clock = [time.perf_counter()]
        content: Any = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        with Image.open(picture) as opened:
            given = processor(images=opened, text=prompt, return_tensors="pt")
        clock.append(time.perf_counter())
        features = model.get_image_features(given["pixel_values"].to(model.dtype)).pooler_output
        clock.append(time.perf_counter())
        embeds_1TD = model.get_input_embeddings()(given["input_ids"])
        place = (given["input_ids"] == model.config.image_token_id)[..., None].expand_as(embeds_1TD)
        embeds_1TD = embeds_1TD.masked_scatter(place, torch.cat(list(features)).to(embeds_1TD.dtype))
        language_model, head = model.model.language_model, model.lm_head
        said = language_model(inputs_embeds=embeds_1TD, use_cache=True)
        tokens = [int(head(said.last_hidden_state[:, -1]).argmax())]
        clock.append(time.perf_counter())
        while len(tokens) < most:
            said = language_model(torch.tensor([tokens[-1:]]), past_key_values=said.past_key_values, use_cache=True)
            tokens.append(int(head(said.last_hidden_state[:, -1]).argmax()))
        clock.append(time.perf_counter())
        preprocess, encode, prefill, decode = (after - before for before, after in itertools.pairwise(clock))
        return {
            "preprocess": preprocess,
            "encode": encode,
            "prefill": prefill,
            "first_token": clock[3] - clock[0],
            "token": decode / (most - 1) if most > 1 else None,
            "whole": clock[-1] - clock[0],
            "tokens": most,
            "prompt_tokens": int(given["input_ids"].shape[1]),
        }

    for request, answered in requests(time.perf_counter() - start, about):
        answered(answer(request["picture"], request["question"], request["tokens"]))


if __name__ == "__main__":
    main()

"""Writes the bundle's README.md: what is inside, how close it is to the model, and how to run it."""

import json
import textwrap
from collections.abc import Mapping
from string import Template
from typing import Any

from tokenizers import Tokenizer

from ..contract.bundle import DECODER, FUSED, GRAPHS, PORTABLE, Bundle, Manifest
from ..contract.generation_settings import GenerationSettings, not_obeyed
from ..contract.prompt import PromptEncoder, read_tokenizer
from ..quantisation.precisions import MIXED, dtypes_of, precision_of
from ..verification.questions import FIRST
from ..verification.speed import STAGES
from .phones import mobile_text

CARD = "README.md"

_CARD = Template("""\
---
library_name: transformers.js
pipeline_tag: image-text-to-text
${licence_keys}tags: [onnx, llava, switchkd]
---

# A vision-language model as ONNX

$vision encoder, $projector projector and $language language model: $parameters parameters. One picture of
$height x $width pixels is $tokens visual tokens. Exported by switchkd; `manifest.json` lists every file with its
SHA-256, every tensor with its name and shape, and the source.

## Sizes

$sizes

$notes

## Parity

Measured at export against PyTorch. Features and logits: on $closely prompts with up to two pictures, in one go, in
pieces with a KV cache, and in a batch with padding. Answers: greedy, $new_tokens tokens at most, to $prompts generated
pairs of pictures and a question.

$parity

## Speed

$speed

## Answers

$answers

## Licence

$licence

## Run it

From a terminal:

    switchkd ask . picture.png "What is in the picture?"

In Python with switchkd:

```python
from switchkd.serve import Engine

for piece in Engine.open(".").stream("What is in the picture?", pictures=["picture.png"]):
    print(piece, end="", flush=True)
```

In Python with nothing but `onnxruntime`, `numpy`, `pillow` and `tokenizers` (a picture is squeezed to size here;
see `preprocessor_config.json` for the exact steps, and `chat_template.jinja` for the exact prompt; the next
token is always the one with the largest logit):

```python
$script
```

In JavaScript (Node or a browser, `npm install @huggingface/transformers`), from the folder that holds the bundle's, or
without the two lines about `env` from a hub, where `bundle` is the repository's name:

```js
import { AutoProcessor, LlavaForConditionalGeneration, env, load_image } from "@huggingface/transformers";

const [bundle, picture, question] = ["bundle", "picture.png", "What is in the picture?"];
env.localModelPath = "./";
env.allowRemoteModels = false;
const model = await LlavaForConditionalGeneration.from_pretrained(bundle, { dtype: $dtype });
const processor = await AutoProcessor.from_pretrained(bundle);
const messages = [{ role: "user", content: [{ type: "image" }, { type: "text", text: question.trim() }] }];
const prompt = processor.tokenizer.apply_chat_template(messages, { tokenize: false, add_generation_prompt: true })
  .replaceAll("$image_token", "$image_token".repeat($tokens));
const image = await load_image(picture);
const ids = processor.tokenizer(prompt, { add_special_tokens: $js_adds });  // $why
const inputs = { ...ids, ...(await processor.image_processor(image)) };
const output = await model.generate({ ...inputs, max_new_tokens: 64, do_sample: false });
const answer = output.slice(null, [inputs.input_ids.dims[1], null]);
console.log(processor.batch_decode(answer, { skip_special_tokens: true })[0]);
```

### On Android and iOS

$mobile""")

# Kept whole and runnable: a test cuts it out of a bundle's card and runs it.
_SCRIPT = Template("""\
import sys
import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer

picture, question = sys.argv[1:]
vision, embed, decoder = (onnxruntime.InferenceSession(file) for file in (
    $files,
))
tokenizer = Tokenizer.from_file("tokenizer.json")
image = Image.open(picture).convert("RGB").resize(($width, $height), $resample)
pixels = (np.asarray(image, dtype=np.float32) * $rescale - $mean) / $std
features = vision.run(None, {"pixel_values": pixels.transpose(2, 0, 1)[None].astype(np.float32)})[0]
prompt = $prompt.replace("QUESTION", question.strip()).replace("$image_token", "$image_token" * $tokens)
ids = np.array([tokenizer.encode(prompt, add_special_tokens=$adds).ids])  # $why
embeds = embed.run(None, {"input_ids": ids})[0]
embeds[ids == $image_token_id] = features.reshape(-1, features.shape[-1])
past = {i.name: np.zeros((1, $kv_heads, 0, $head_dim), np.$cache_dtype)
        for i in decoder.get_inputs() if i.name.startswith("past_key_values.")}
answer, length = [], 0
while len(answer) < 64:
    new = embeds.shape[1]
    logits, *cache = decoder.run(None, {
        "inputs_embeds": embeds,
        "attention_mask": np.ones((1, length + new), np.int64),
$positions        "num_logits_to_keep": np.array(1), **past,
    })
    past, length = dict(zip(past, cache)), length + new
    token = int(logits[0, -1].argmax())
    if token in $eos:
        break
    answer.append(token)
    embeds = embed.run(None, {"input_ids": np.array([[token]])})[0]
print(tokenizer.decode(answer))""")


def write_card(bundle: Bundle, manifest: Manifest) -> None:
    """Write README.md into a bundle folder from its manifest, `verification` included."""
    model, source = manifest.model, manifest.source
    records = manifest.verification
    greedy = next(iter(records.values()))["greedy"]
    _, height, width = model.picture_shape
    tokenizer = read_tokenizer(bundle.tokenizer_path)
    encoder = PromptEncoder.of(bundle, tokenizer)
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "QUESTION"}]}
    prompt = encoder.render([question])
    adds = encoder.adds_special_tokens(prompt)
    text = _CARD.substitute(
        vision=source["vision_model"],
        projector=source["projector"],
        language=source["language_model"],
        parameters=f"{source['parameters']:,}",
        tokens=model.tokens_per_picture,
        height=height,
        width=width,
        sizes=_sizes(manifest),
        notes=_notes(manifest),
        closely=len(FIRST),
        prompts=greedy["prompts"],
        new_tokens=greedy["max_new_tokens"],
        parity=_parity(records) + _scores(records),
        script=_script(bundle, manifest, prompt, adds),
        dtype=json.dumps(dtypes_of(manifest, manifest.precisions[0])),
        image_token=model.image_token,
        speed=_speed(records),
        licence_keys="".join(f"{key}: {json.dumps(text)}\n" for key, text in source["licence"]["stated"].items()),
        licence=_licence(source["licence"]),
        mobile=mobile_text(bundle, manifest, adds_special_tokens=adds),
        answers=_answers(bundle, tokenizer),
        js_adds=json.dumps(adds),
        why=_why(bundle, adds),
    )
    (bundle.path / CARD).write_text(text, encoding="utf-8")


def _notes(manifest: Manifest) -> str:
    parts = manifest.verification.get(MIXED, {}).get("parts", {})
    notes = {MIXED: ", ".join(f"{part} {method}" for part, method in parts.items())}
    lines = [f"- `{name}`: {precision_of(name).note} {notes.get(name, '')}".rstrip() for name in manifest.precisions]
    for variant, record in manifest.verification.items():
        lines += [
            f"- In `{variant}` {kept['operators']} operators of `{graph}` ({', '.join(kept['parts'])}) stay float32: "
            f"their numbers reach {kept['largest']:,.0f}, and float16 ends at 65,504."
            for graph, kept in record.get("float32", {}).items()
        ]
    if fused := [f"`{variant}`" for variant, found in manifest.variants().items() if found.form == FUSED]:
        lines.append(
            f"- The decoder of {', '.join(fused)} is made of ONNX Runtime's fused operators: no `position_ids`, and a "
            "batch is padded on the right only."
        )
    return "\n".join(lines)


def _sizes(manifest: Manifest) -> str:
    rows = [["precision", *GRAPHS, "together"]]
    for variant, found in manifest.variants().items():
        by_graph = manifest.graph_bytes(*found)
        sizes = [by_graph[name] for name in GRAPHS]
        rows.append([variant, *(f"{size / 1e6:.2f} MB" for size in (*sizes, sum(sizes)))])
    return _table(rows)


def _parity(records: Mapping[str, Any]) -> str:
    rows = [["precision", "image features, relative RMS", "logits, relative RMS", "logits, largest", "equal answers"]]
    for precision, record in records.items():
        rows.append(
            [
                precision,
                f"{record['image_features']['relative_rms']:.1e}",
                f"{record['logits']['relative_rms']:.1e}",
                f"{record['logits']['max_abs']:.1e}",
                f"{record['greedy']['equal']} of {record['greedy']['prompts']}",
            ]
        )
    return _table(rows)


def _speed(records: Mapping[str, Any]) -> str:
    """Seconds by precision, and the machine that they were measured on."""
    first = next(iter(records.values()))["speed"]
    prompt = f"a prompt of {first['prompt_tokens']} tokens"
    rows = [["precision", "one picture", prompt, "a token", "tokens per second"]]
    for precision, record in records.items():
        speed = record["speed"]
        rows.append(
            [
                precision,
                *(f"{1e3 * speed[stage]:,.{1 if speed[stage] >= 0.01 else 2}f} ms" for stage in STAGES),
                f"{1 / speed['decode']:,.0f}",
            ]
        )
    text = (
        f"Medians, measured in turns on the machine that made this bundle: {first['processor']}, {first['processors']} "
        f"logical processors, {first['system']}, onnxruntime {first['onnxruntime']}. Another machine has other "
        "numbers, and may have another order. The prompt is one picture and a short question; the token is written "
        "after it."
    )
    return f"{textwrap.fill(text, 120)}\n\n{_table(rows)}"


def _answers(bundle: Bundle, tokenizer: Tokenizer) -> str:
    """What ends an answer, and what becomes of the settings in generation_config.json."""
    config = json.loads((bundle.path / "generation_config.json").read_text(encoding="utf-8"))
    settings, left = GenerationSettings.from_config(config), not_obeyed(config)
    ends = (tokenizer.id_to_token(token) or str(token) for token in bundle.model.eos_token_ids)
    text = f"{' or '.join(f'`{end}`' for end in ends)} ends an answer."
    draws = {"do_sample", "temperature", "top_k", "top_p"} if settings.do_sample else set()
    names = [name for name in config if name in (set(settings.rules) | draws)]
    if names:
        obeyed = ", ".join(f"`{name}` {json.dumps(config[name])}" for name in names)
        text += (
            f" `generation_config.json` asks for {obeyed}: `switchkd.serve` does that, and so do transformers.js and "
            "transformers unless they are told otherwise. The parity above and the Python script below do not: there "
            "the largest logit is the next token."
        )
    if left:
        others = ", ".join(f"`{name}` {json.dumps(value)}" for name, value in left.items())
        text += f" It also asks for {others}, which `switchkd.serve` does not do."
    return textwrap.fill(text, 120, break_on_hyphens=False, break_long_words=False)


def _licence(licence: Mapping[str, Any]) -> str:
    stated = licence["stated"]
    files = ", ".join(f"`{name}`" for name in licence["files"])
    if stated:
        name = stated.get("license_name") or stated.get("license", "")
        link = f" ({stated['license_link']})" if "license_link" in stated else ""
        return f"The checkpoint states: {name}{link}." + (f" Its text: {files}." if files else "")
    if files:
        return f"The checkpoint names no licence, but brings {files}."
    return (
        "The checkpoint states none. The licences of what it was made from (vision encoder, language model, data)\n"
        "apply to this bundle too."
    )


def _scores(records: Mapping[str, Any]) -> str:
    """What was measured on pairs of questions and answers, where there were any."""
    scores = {name: record["calibration"] for name, record in records.items() if "calibration" in record}
    if not scores:
        return ""
    rows = [["precision", "answers that match", "answers as in fp32", "first other token", "logits, relative RMS"]]
    for name, found in scores.items():
        parting = found["mean_first_divergence"]
        rows.append(
            [
                name,
                f"{found['accuracy']:.1%}",
                f"{found['agreement']:.1%}",
                "none" if parting is None else f"{parting:.1f}",
                f"{found['relative_rms']:.1e}",
            ]
        )
    first = next(iter(scores.values()))
    text = (
        f"Scored on {first['pairs']} pairs of a question and its answer ({first['source']}), on none of which anything "
        "was calibrated: exact matches with the given answer, and with the answer of the float32 graphs."
    )
    return f"\n\n{textwrap.fill(text, 120)}\n\n{_table(rows)}"


def _table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def _why(bundle: Bundle, adds: bool) -> str:
    """Why a script encodes a prompt with or without the tokenizer's special tokens."""
    return (
        "BOS, if the tokenizer has one" if adds else f"the template writes {bundle.special_tokens['bos_token']} itself"
    )


def _script(bundle: Bundle, manifest: Manifest, prompt: str, adds: bool) -> str:
    model, preprocessing = manifest.model, bundle.preprocessing
    _, height, width = model.picture_shape
    positions = '        "position_ids": np.arange(length, length + new)[None],\n'
    return _SCRIPT.substitute(
        positions=positions if bundle.graph(DECODER).form == PORTABLE else "",
        files=",\n    ".join(json.dumps(bundle.graph(name).file) for name in GRAPHS),
        width=width,
        height=height,
        resample=preprocessing.resample,
        rescale=1 if preprocessing.rescale is None else preprocessing.rescale,
        mean=preprocessing.mean or 0,
        std=preprocessing.std or 1,
        prompt=repr(prompt),
        adds=adds,
        why=_why(bundle, adds),
        image_token=model.image_token,
        image_token_id=model.image_token_id,
        tokens=model.tokens_per_picture,
        kv_heads=model.cache.kv_heads,
        head_dim=model.cache.head_dim,
        cache_dtype=bundle.cache_dtype,
        eos=model.eos_token_ids,
    )

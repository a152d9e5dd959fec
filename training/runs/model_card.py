"""The README.md of a finished stage's folder: what the model is, who taught it, on what, how, how well, how to use it.

The card is made from the folder alone, so that scores can be added later. It may be published with the folder: no file
that is written here names a place of the machine that trained.
"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import torch
import yaml
from transformers import TrainingArguments

from switchkd.export.llava.projectors import LDPV2, MLP, tokens_per_picture

from ..models.vlm import PARTS, parts
from ..recipe.model_sizes import build_without_memory
from ..recipe.recipe import Recipe, StageRecipe
from .progress import LOG_NAME, terms_of, training_rows

if TYPE_CHECKING:
    from ..models.distillation import Distillation

CARD = "README.md"
SCORES_FILE = "scores.json"
RECIPE_FILE = "recipe.yaml"
STAGE_FILE = "stage.json"
# Below this no vision-language model is of use but to show that the code runs.
TOY_PARAMETERS = 50_000_000

_CARD = Template("""\
---
$metadata---

# $title

$what

| part | what it is | parameters | trained in this stage |
|---|---|---|---|
$parts

$toy## Training

| | |
|---|---|
$training

$adapters### Loss by term

$losses

### Data

$data

### Recipe

`recipe.yaml`, here and in this folder, is the whole run as it was resolved, this stage and those around it; `{root}`
stands for the folder given as `root`, and of what was outside it only the name is kept.

<details>
<summary>recipe.yaml</summary>

```yaml
$recipe```

</details>

## Scores

$scores

## Use it

In this folder, with $packages:

```python
$script
```

To export it to ONNX and ask it without torch:

```console
switchkd export . ../bundle
switchkd ask ../bundle picture.png "What is in the picture?"
```

To train it again:

```console
switchkd train recipe.yaml root=FOLDER_OF_DATA_AND_TEACHER
```
""")

# Kept whole and runnable: tests cut it out of a card and run it.
_SCRIPT = Template("""\
from PIL import Image
$imports

$load
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(text=prompt, images=Image.open("picture.png").convert("RGB"), return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))""")
_TRANSFORMERS = {
    "imports": "from transformers import AutoProcessor, LlavaForConditionalGeneration",
    "load": 'model = LlavaForConditionalGeneration.from_pretrained(".")\n'
    'processor = AutoProcessor.from_pretrained(".", backend="pil")',
}
_SWITCHKD = {  # transformers has no class for this projector
    "imports": "from switchkd.training import load_vlm",
    "load": 'vlm = load_vlm(".")\nmodel, processor = vlm.model, vlm.processor',
}


def stage_facts(
    recipe: Recipe, stage: StageRecipe, module: Distillation, args: TrainingArguments, samples: int
) -> dict[str, Any]:
    """What the card says of a stage and no other file of its folder holds, as plain values."""
    given = recipe.model
    sources = {"checkpoint": given.checkpoint, "encoder": given.encoder, "language_model": given.language_model}
    teacher = None
    if module.teacher is not None and recipe.teacher is not None:
        teacher = _describe(module.teacher.config) | {"source": _source(recipe, recipe.teacher.checkpoint)}
    return {
        "stage": stage.name,
        "stages": [
            {"name": each.name, "objective": each.objective["name"]}
            for each in recipe.stages[: recipe.stages.index(stage) + 1]
        ],
        "train": list(stage.train),
        "objective": {"name": stage.objective["name"], **dataclasses.asdict(module.objective)},  # type: ignore[call-overload]
        "student": _describe(module.student.config)
        | {"sources": {role: _source(recipe, name) for role, name in sources.items() if name is not None}},
        "teacher": teacher,
        "adapters": sorted(module.adapters),
        "records": [Path(path).name for path in stage.data.records],
        "samples": samples,
        "batch": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "processes": args.world_size,
        "device": torch.cuda.get_device_name() if args.device.type == "cuda" else args.device.type.upper(),
        "software": {name: version(name) for name in ("switchkd", "torch", "transformers")}
        | {"python": platform.python_version()},
    }


def publishable(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values without places of this machine: below `root` as `{root}/…`, elsewhere names alone."""
    plain: dict[str, Any] = without_places(recipe.to_dict(), recipe.root)
    return plain | {"root": "." if _tells_place(recipe.root) else recipe.root}


def write_scores(folder: Path, table: Mapping[str, Mapping[str, float]], note: str) -> None:
    """Put scores, a row by name with its columns by name, and what they are, into a finished stage's card."""
    scores = {"note": note, "table": {name: dict(row) for name, row in table.items()}}
    (folder / SCORES_FILE).write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    write_card(folder)


def write_card(folder: Path) -> None:
    """Write README.md into a finished stage's folder from what lies in it, `scores.json` included if it is there."""
    stage = json.loads((folder / STAGE_FILE).read_text(encoding="utf-8"))
    facts = stage["facts"]
    plain = facts["student"]["projector"]["type"] == MLP
    size = _parameters(facts["student"])
    text = _CARD.substitute(
        metadata=yaml.safe_dump(_metadata(facts), sort_keys=False),
        title=f"A vision-language model of {_millions(size)} parameters",
        what=_what(facts),
        parts=_parts(facts),
        toy="" if size >= TOY_PARAMETERS else _TOY,
        training=_training(stage, facts, folder / LOG_NAME),
        adapters=_adapters(facts),
        losses=_losses(folder / LOG_NAME),
        data=_data(facts),
        recipe=(folder / RECIPE_FILE).read_text(encoding="utf-8"),
        scores=_scores(folder / SCORES_FILE),
        packages="transformers, torch and pillow" if plain else "switchkd[train], as transformers lacks this projector",
        script=_SCRIPT.substitute(_TRANSFORMERS if plain else _SWITCHKD),
    )
    (folder / CARD).write_text(text, encoding="utf-8")


_TOY = (
    "**This is a toy.** A model of this size shows that training, export and serving work. It is of no use, and no "
    "evidence about models that are.\n\n"
)


def _metadata(facts: dict[str, Any]) -> dict[str, Any]:
    """The front matter that hubs read; no licence: it depends on the models and the data, which do not say theirs."""
    student = facts["student"]
    bases = [source["name"] for source in student["sources"].values() if source["hub"]]
    tags = ["llava", "vision-language-model", "switchkd"] + (["knowledge-distillation"] if facts["teacher"] else [])
    return {
        "library_name": "transformers" if student["projector"]["type"] == MLP else "switchkd",
        "pipeline_tag": "image-text-to-text",
        **({"base_model": bases} if bases else {}),
        "tags": tags,
    }


def _what(facts: dict[str, Any]) -> str:
    text = (
        f"A {'LLaVA with the LDPv2 projector' if facts['student']['projector']['type'] == LDPV2 else 'LLaVA'} "
        f"(`LlavaForConditionalGeneration`), saved after the stage `{facts['stage']}` by switchkd. "
    )
    teacher = facts["teacher"]
    if teacher is None:
        return text + f"Its objective, `{facts['objective']['name']}`, has no teacher."
    return text + (
        f"It was distilled with `{facts['objective']['name']}` from a teacher of {_millions(_parameters(teacher))} "
        f"parameters, {_named(teacher['source'])}: {_encoder(teacher['encoder'])}; {_projector(teacher['projector'])}; "
        f"{_language_model(teacher['language_model'])}. The teacher is not in this folder."
    )


def _parts(facts: dict[str, Any]) -> str:
    student, sources = facts["student"], facts["student"]["sources"]
    described = {
        "encoder": _encoder(student["encoder"]),
        "projector": _projector(student["projector"]),
        "language_model": _language_model(student["language_model"]),
    }
    rows = []
    for part, text in described.items():
        source = sources.get(part) or sources.get("checkpoint")
        start = f"{text}; from {_named(source)}" if source else text
        trained = "yes" if part in facts["train"] else "no"
        rows.append(f"| {part.replace('_', ' ')} | {start} | {student[part]['parameters']:,} | {trained} |")
    return "\n".join([*rows, f"| together | | {_parameters(student):,} | |"])


def _training(stage: dict[str, Any], facts: dict[str, Any], log: Path) -> str:
    settings = ", ".join(f"{key} {json.dumps(value)}" for key, value in facts["objective"].items() if key != "name")
    several = f"{facts['processes']} processes, the first of them on {facts['device']}"
    rows = {
        "stages so far": ", then ".join(f"`{before['name']}` ({before['objective']})" for before in facts["stages"]),
        "objective": f"`{facts['objective']['name']}`" + (f": {settings}" if settings else ""),
        "steps": f"{stage['steps']:,}, of {facts['batch']} samples each",
        "time": f"{_duration(stage['seconds'])}, all attempts together",
        "hardware": several if facts["processes"] > 1 else f"1 process on {facts['device']}",
        "software": ", ".join(f"{name} {number}" for name, number in facts["software"].items()),
    }
    logged = training_rows(log)
    if logged:
        tokens, supervised = (sum(int(row[name]) for row in logged) for name in ("tokens", "supervised_tokens"))
        rows["tokens"] = f"{tokens:,} through the student, visual ones included; {supervised:,} supervised"
    return "\n".join(f"| {name} | {text} |" for name, text in rows.items())


def _adapters(facts: dict[str, Any]) -> str:
    if not facts["adapters"]:
        return ""
    if facts["adapters"] != ["encoder"]:
        text = f"Adapters were trained between student and teacher: {', '.join(facts['adapters'])}."
    else:
        widths = [model["encoder"]["width"] for model in (facts["student"], facts["teacher"])]
        text = (
            f"An encoder adapter was trained: a linear layer from the student's encoder, {widths[0]} wide, to the "
            f"teacher's projector, which takes {widths[1]}. Switch-KD's paper has none."
        )
    return f"{text} What led to the teacher was thrown away with it, and is not in this folder.\n\n"


def _losses(log: Path) -> str:
    rows = training_rows(log)
    if not rows:
        return "Nothing was logged."
    ends = rows if len(rows) == 1 else [rows[0], rows[-1]]
    values = [
        {"loss": row["loss"]} | terms_of(row) | {name: row[name] for name in ("k_teacher", "k_student") if name in row}
        for row in ends
    ]
    # A term of pictures may be missing from a log whose batches had none.
    names = list(dict.fromkeys(name for value in values for name in value))
    lines = ["| | " + " | ".join(f"step {row['step']}" for row in ends) + " |", "|---" * (1 + len(ends)) + "|"]
    for name in names:
        lines.append(f"| {name} | " + " | ".join(_number(value.get(name)) for value in values) + " |")
    meaning = "First and last log: means over the supervised tokens since the log before. `log.jsonl` has all logs."
    k = " k is how many tokens DBiLD compared." if "k_teacher" in values[-1] else ""
    return "\n".join([*lines, "", meaning + k])


def _data(facts: dict[str, Any]) -> str:
    files = Counter(facts["records"])
    named = ", ".join(
        f"`{name}`" + (f" ({count} files of that name)" if count > 1 else "") for name, count in files.items()
    )
    said = [f"{facts['samples']:,} samples of {named}, in LLaVA's format."]
    left_out = [f"{reason} {count:,}" for reason, count in facts.get("left_out", {}).items()]
    return " ".join([*said, *([f"Broken records were left out: {', '.join(left_out)}."] if left_out else [])])


def _scores(path: Path) -> str:
    if not path.is_file():
        return "None were measured where it was trained."
    scores = json.loads(path.read_text(encoding="utf-8"))
    columns = list(dict.fromkeys(column for row in scores["table"].values() for column in row))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for name, row in scores["table"].items():
        lines.append(f"| {name} | " + " | ".join(_number(row.get(column)) for column in columns) + " |")
    return "\n".join([*lines, "", scores["note"]])


def _describe(config: Any) -> dict[str, Any]:
    """The sizes of a model's parts; counted without memory, as quantised or sharded weights hide how many they are."""
    model = build_without_memory(config, torch.float32)
    vision, text = config.vision_config, config.text_config
    described: dict[str, Any] = {
        "encoder": {
            "type": vision.model_type,
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "picture": vision.image_size,
        },
        "projector": {"type": getattr(config, "projector_type", MLP), "tokens": tokens_per_picture(config)},
        "language_model": {
            "type": text.model_type,
            "layers": text.num_hidden_layers,
            "width": text.hidden_size,
            "vocabulary": text.vocab_size,
        },
    }
    for part in PARTS:
        modules = parts(model)[part]
        once = {id(parameter): parameter.numel() for module in modules for parameter in module.parameters()}
        described[part]["parameters"] = sum(once.values())  # tied ones once
    return described


def _parameters(model: dict[str, Any]) -> int:
    return sum(int(model[part]["parameters"]) for part in PARTS)


def _source(recipe: Recipe, name: str) -> dict[str, Any]:
    """A model's name, and whether it is a hub id; what was loaded and is no folder here came from the hub."""
    hub = not Path(name).exists()
    text = name if hub else str(without_places(name, recipe.root)).removeprefix("{root}/")
    return {"name": text, "hub": hub}


def without_places(value: Any, root: str) -> Any:
    """Values without places of this machine: what is below `root` as `{root}/…`, of other paths the name alone."""
    if isinstance(value, dict):
        return {key: "" if str(key).endswith("_token") else without_places(item, root) for key, item in value.items()}
    if isinstance(value, list):
        return [without_places(item, root) for item in value]
    if not isinstance(value, str):
        return value
    below = Path(value).relative_to(root) if root != "." and Path(value).is_relative_to(root) else None
    if below is not None and ".." not in below.parts:
        return str(Path("{root}") / below)
    return Path(value).name if _tells_place(value) else value


def _tells_place(text: str) -> bool:
    path = Path(text)
    return path.is_absolute() or ".." in path.parts or text.startswith("~")


def _named(source: dict[str, Any]) -> str:
    name = source["name"]
    return f"[{name}](https://huggingface.co/{name})" if source["hub"] else f"the folder `{name}`"


def _encoder(part: dict[str, Any]) -> str:
    return (
        f"{part['type']}, {part['layers']} layers, {part['width']} wide, {part['picture']} × {part['picture']} pixels"
    )


def _projector(part: dict[str, Any]) -> str:
    return f"{part['type']} projector, {part['tokens']} tokens a picture"


def _language_model(part: dict[str, Any]) -> str:
    shape = f"{part['type']}, {part['layers']} layers, {part['width']} wide"
    return f"{shape}, {part['vocabulary']:,} tokens in its vocabulary"


def _millions(count: int) -> str:
    if count < 1e6:
        return f"{count:,}"
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"

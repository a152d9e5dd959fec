"""Fixtures that tests of several rooms share: a tiny real LLaVA checkpoint, made here, with random weights."""

import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As LLaVA-1.5's own: parts alone, and no BOS, which its tokenizer puts in front.
LLAVA_1_5_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SENTENCES = [
    "How many red circles are in the picture?",
    "What colour is the square on the left?",
    "There are three digits: 4, 7 and 9.",
    "Is there a blue triangle above the green one? Yes, there is.",
    "Describe what you see, please.",
]


def pytest_configure() -> None:
    """Let Ctrl-C be tested where the tests themselves run in the background, which shells start with it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Iterator[Path]:
    """A LlavaForConditionalGeneration folder: 24x24 pictures to 16 tokens, width 32, 2 layers, random weights.

    The same bits every time. Tests must not write into it.
    """
    with tempfile.TemporaryDirectory(prefix="tiny-checkpoint-") as folder:
        path = Path(folder) / "checkpoint"
        write_tiny_checkpoint(path)
        yield path


@pytest.fixture(scope="session")
def tiny_bundle(tiny_checkpoint: Path) -> Iterator[Path]:
    """The tiny checkpoint's bundle in fp32 and int8, made once for all rooms. Tests must not write into it."""
    from switchkd.export.assembly import export_checkpoint

    with tempfile.TemporaryDirectory(prefix="tiny-bundle-") as folder:
        path = Path(folder) / "bundle"
        export_checkpoint(tiny_checkpoint, path, pairs=6)
        yield path


def write_hub_cache(bundle: Path, cache: Path) -> Path:
    """Keep a bundle as the hub's cache does: every file once in `blobs`, under its hash; returns the links' folder."""
    repository = cache / "models--somebody--tiny"
    snapshot = repository / "snapshots" / "0123456789abcdef"
    (repository / "blobs").mkdir(parents=True)
    for file in bundle.rglob("*"):
        if file.is_file():
            blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copyfile(file, blob)
            link = snapshot / file.relative_to(bundle)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.fixture(scope="session")
def to_hub_cache() -> Callable[[Path, Path], Path]:
    return write_hub_cache


@pytest.fixture(scope="session")
def hub_snapshot(tiny_bundle: Path) -> Iterator[Path]:
    """The tiny bundle in the hub's cache. Tests must not write into it."""
    with tempfile.TemporaryDirectory(prefix="hub-") as cache:
        yield write_hub_cache(tiny_bundle, Path(cache))


@pytest.fixture(scope="session")
def wide_heads_checkpoint() -> Iterator[Path]:
    """The tiny checkpoint with heads of 16 numbers in place of 8, as the fused decoder needs them."""
    with tempfile.TemporaryDirectory(prefix="wide-heads-") as folder:
        path = Path(folder) / "checkpoint"
        write_tiny_checkpoint(path, heads=2)
        yield path


@pytest.fixture(scope="session")
def ldpv2_checkpoint(tiny_checkpoint: Path) -> Iterator[Path]:
    """The tiny checkpoint's encoder and language model with another projector: 4 x 4 tokens pooled to 3 x 3.

    Its parts lie beside it, as `encoder` and `language_model`.
    """
    import torch

    from switchkd.training.models.vlm import build_vlm, load_vlm

    with tempfile.TemporaryDirectory(prefix="ldpv2-") as holder:
        folder = Path(holder)
        mlp = load_vlm(tiny_checkpoint)
        mlp.model.model.vision_tower.save_pretrained(folder / "encoder")
        mlp.processor.image_processor.save_pretrained(folder / "encoder")
        mlp.model.model.language_model.save_pretrained(folder / "language_model")
        mlp.tokenizer.save_pretrained(folder / "language_model")
        vlm = build_vlm(folder / "encoder", folder / "language_model", projector="ldpv2", projector_grid=3)
        # Wider than fresh ones: otherwise the convolution's bias is nearly all that a random language model sees.
        projector: Any = vlm.model.model.multi_modal_projector
        generator = torch.Generator().manual_seed(0)
        for layer in (projector.linear_1, projector.linear_2):
            torch.nn.init.normal_(layer.weight, std=0.3, generator=generator)
        vlm.save(folder / "checkpoint")
        yield folder / "checkpoint"


def write_tiny_checkpoint(path: Path, heads: int = 4) -> None:
    """Make the tiny model, its tokenizer and its processor, and save them as transformers does."""
    import torch
    from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.qwen2 import Qwen2Config
    from transformers.models.siglip import SiglipImageProcessorPil, SiglipVisionConfig

    tokenizer = tiny_tokenizer()
    ids = tokenizer.get_vocab()
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=24,
        patch_size=6,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
        # Wider than usual: with the default the logits of a random model are too close for a greedy comparison.
        initializer_range=0.2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids["<image>"],
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"], do_sample=False
    )
    model.save_pretrained(path)
    processor = LlavaProcessor(
        image_processor=SiglipImageProcessorPil(
            size={"height": 24, "width": 24}, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        tokenizer=tokenizer,
        patch_size=6,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(path)


def tiny_tokenizer() -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer of about 300 tokens with the ChatML tokens and `<image>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<image>"],
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.fixture(scope="session")
def avx2_only() -> Iterator[dict[str, str]]:
    """What to add to a process's environment so that it sees an x86 processor with AVX2 alone.

    Skips where that cannot be: it takes x86 Linux, a C compiler, and a processor that lets CPUID fault.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64" or shutil.which("cc") is None:
        pytest.skip("an older processor is shown by x86 Linux with a C compiler alone")
    source = Path(__file__).parent / "processors" / "avx2_only.c"
    with tempfile.TemporaryDirectory(prefix="avx2-only-") as folder:
        library = Path(folder) / "avx2_only.so"
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        environment = {"LD_PRELOAD": str(library)}
        tried = subprocess.run(["true"], env=os.environ | environment, capture_output=True, text=True, check=False)
        if tried.stderr or tried.returncode:
            pytest.skip(f"no older processor can be shown here: {tried.stderr.strip()}")
        yield environment


# --- kinds of tokenizer ---


def bos_by_tokenizer(checkpoint: Path) -> None:
    """As LLaVA-1.5 has it: Llama-2's kind of tokenizer, which puts BOS in front of what its template writes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    special = ["<unk>", "<s>", "</s>", "<image>"]  # with the ids that config.json knows already
    letters = "abcdefghilmnoprstuw?,."
    spelled = [f"<0x{byte:02X}>" for byte in range(128)]  # no more: others would make broken characters of most answers
    tokens = [*special, *spelled, "▁", *letters, *(one + other for one in letters for other in letters)]
    vocabulary = {token: number for number, token in enumerate(tokens[:300])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    edit_json(checkpoint / "tokenizer_config.json", **names, extra_special_tokens=["<image>"])
    (checkpoint / "chat_template.jinja").write_text(LLAVA_1_5_TEMPLATE)


def bos_by_template(checkpoint: Path) -> None:
    """As Llama-3 has it: the tokenizer would put BOS in front, but the template writes it."""
    from tokenizers import Tokenizer, processors

    file, template, bos = checkpoint / "tokenizer.json", checkpoint / "chat_template.jinja", "<|endoftext|>"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    tokenizer.save(str(file))
    edit_json(checkpoint / "tokenizer_config.json", bos_token=bos)
    template.write_text("{{ bos_token }}" + template.read_text())


def without_bos(checkpoint: Path) -> None:
    """As Qwen2 has it, and the tiny checkpoint."""


@pytest.fixture(scope="session", params=[bos_by_tokenizer, bos_by_template, without_bos])
def tokenizer_kind(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tiny_bundle: Path
) -> Iterator[tuple[Path, Path]]:
    """The tiny checkpoint with one kind of tokenizer, and the bundle of the same whose tokenizer.json pads and cuts.

    The bundle's graphs are the tiny bundle's, since tracing takes nearly all of an export's time; the rest is written
    anew as an export does it. Tests must not write into either.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    from switchkd.export import assembly
    from switchkd.export.card.card import write_card
    from switchkd.export.contract.bundle import MANIFEST, Bundle, read_manifest
    from switchkd.export.graphs.checkpoint import open_checkpoint

    with tempfile.TemporaryDirectory(prefix="tokenizer-kind-") as holder:
        checkpoint, cutting, bundle = (Path(holder) / name for name in ("checkpoint", "cutting", "bundle"))
        shutil.copytree(tiny_checkpoint, checkpoint)
        request.param(checkpoint)
        shutil.copytree(checkpoint, cutting)
        tokenizer = Tokenizer.from_file(str(cutting / "tokenizer.json"))
        tokenizer.enable_truncation(24)
        tokenizer.enable_padding(length=2000)
        AutoTokenizer.from_pretrained(cutting).save_pretrained(cutting)
        tokenizer.save(str(cutting / "tokenizer.json"))
        edit_json(cutting / "tokenizer_config.json", max_length=24, truncation_strategy="longest_first", stride=0)

        shutil.copytree(tiny_bundle, bundle)
        source = open_checkpoint(cutting)
        assembly._write_settings(source, source.facts(), bundle)
        manifest = replace(read_manifest(bundle), model=source.facts())
        for _ in range(2):  # as an export does: the card is written when the bundle can be opened
            manifest = replace(manifest, files=assembly._hash_files(bundle))
            (bundle / MANIFEST).write_text(manifest.to_json())
            write_card(Bundle.open(bundle), manifest)
        manifest = replace(manifest, files=assembly._hash_files(bundle))
        (bundle / MANIFEST).write_text(manifest.to_json())
        yield checkpoint, bundle


def edit_json(file: Path, **values: Any) -> None:
    """Change keys of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

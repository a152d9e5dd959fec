"""LDPv2: equal to a plain reference, put together, saved, loaded, trained; and the encoders a student may have."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoProcessor,
    CLIPConfig,
    CLIPModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Siglip2Config,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
)

from switchkd.cli.main import main
from switchkd.export.llava.projectors import Ldpv2LlavaForConditionalGeneration, Ldpv2Projector, pooling_weights
from switchkd.training.data.label_mask import model_inputs
from switchkd.training.models.pathway import visual_features, visual_tokens
from switchkd.training.models.vlm import ModelError, Vlm, build_vlm, load_vlm, parts
from switchkd.training.recipe.recipe import ModelRecipe, load_recipe
from switchkd.training.world.dry_run import shrink
from switchkd.training.world.encoder_pretraining import write_image_processor

EDGE = "paper/qwen2.5-0.5b-ldpv2-edge"
PICTURE = Image.new("RGB", (50, 30), "red")


def make_projector(side: int, grid: int, dtype: torch.dtype, layers: int | list[int] = -2) -> Ldpv2Projector:
    """A projector of features 10 wide to tokens 6 wide."""
    settings: dict[str, Any] = {"projector_type": "ldpv2", "projector_grid": grid}
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(hidden_size=10, num_attention_heads=2, image_size=2 * side, patch_size=2),
        text_config=Qwen2Config(hidden_size=6, num_attention_heads=2, num_key_value_heads=1),
        vision_feature_layer=layers,
        vision_feature_select_strategy="full",
        **settings,
    )
    torch.manual_seed(side * grid)
    return Ldpv2Projector(config).to(dtype)


def reference(weights: dict[str, Tensor], features_PLE: Tensor, grid: int) -> Tensor:
    """LDPv2 as the paper's figure draws it, in torch's own layers."""
    hidden_PLD = functional.gelu(functional.linear(features_PLE, weights["linear_1.weight"], weights["linear_1.bias"]))
    tokens_PLD = functional.linear(hidden_PLD, weights["linear_2.weight"], weights["linear_2.bias"])
    side = int(tokens_PLD.shape[1] ** 0.5)
    tokens_PDSS = tokens_PLD.transpose(1, 2).unflatten(2, (side, side))
    pooled_PDGG = functional.adaptive_avg_pool2d(tokens_PDSS, grid)
    convolved_PDGG = functional.conv2d(
        pooled_PDGG, weights["peg.weight"], weights["peg.bias"], padding=1, groups=pooled_PDGG.shape[1]
    )
    return (pooled_PDGG + convolved_PDGG).flatten(2).transpose(1, 2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("side", "grid"), [(27, 12), (5, 3), (6, 3), (7, 7), (4, 1), (1, 1)])
def test_equal_to_a_plain_reference(side: int, grid: int, dtype: torch.dtype, tolerance: float) -> None:
    projector = make_projector(side, grid, dtype)
    weights = {name: value.detach().clone().requires_grad_() for name, value in projector.named_parameters()}
    features = torch.randn(3, side * side, 10, dtype=dtype)
    ours, theirs = features.clone().requires_grad_(), features.clone().requires_grad_()
    got, expected = projector(ours), reference(weights, theirs, grid)
    assert got.shape == (3, grid * grid, 6)
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
    # Not a plain sum: tokens that changed places would give the same one.
    pull = torch.randn_like(expected)
    (got * pull).sum().backward()
    (expected * pull).sum().backward()
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=10 * tolerance)
    for name, parameter in projector.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=tolerance, atol=100 * tolerance)


def test_several_feature_layers_enter_side_by_side() -> None:
    projector = make_projector(5, 3, torch.float64, layers=[-2, -3])
    features = torch.randn(2, 25, 20, dtype=torch.float64)
    expected = reference(dict(projector.named_parameters()), features, 3)
    torch.testing.assert_close(projector(features), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("side", "grid"), [(27, 12), (24, 12), (5, 3), (9, 8)])
def test_windows_are_torchs(side: int, grid: int) -> None:
    pooled = functional.adaptive_avg_pool1d(torch.eye(side, dtype=torch.float64), grid).T
    torch.testing.assert_close(torch.tensor(pooling_weights(side, grid), dtype=torch.float64), pooled)


# --- models ---


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> ModelRecipe:
    """A tiny SigLIP of 3 x 3 patches and a tiny language model, in folders."""
    return shrink(load_recipe(EDGE), tmp_path_factory.mktemp("pieces")).model


def build(pieces: ModelRecipe, **settings: Any) -> Vlm:
    assert pieces.encoder is not None
    assert pieces.language_model is not None
    return build_vlm(pieces.encoder, pieces.language_model, **settings)


@pytest.fixture(scope="module")
def folder(pieces: ModelRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with LDPv2: 3 x 3 tokens pooled to 2 x 2."""
    folder = tmp_path_factory.mktemp("ldpv2") / "checkpoint"
    build(pieces, projector="ldpv2", projector_grid=2).save(folder)
    return folder


def test_it_comes_back_tensor_for_tensor(pieces: ModelRecipe, folder: Path) -> None:
    built, loaded = build(pieces, projector="ldpv2", projector_grid=2), load_vlm(folder)
    assert type(loaded.model) is Ldpv2LlavaForConditionalGeneration
    before, after = built.model.state_dict(), loaded.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert loaded.tokens_per_picture == built.tokens_per_picture == 4
    config = (folder / "config.json").read_text()
    assert json.loads(config)["image_seq_length"] == 4
    assert pieces.encoder is not None
    assert str(Path(pieces.encoder).parent) not in config  # a folder says nothing to another machine


def test_weights_have_llavas_names_in_the_file(pieces: ModelRecipe, folder: Path, tmp_path: Path) -> None:
    build(pieces).save(tmp_path / "mlp")
    plain, ldpv2 = (set(load_file(path / "model.safetensors")) for path in (tmp_path / "mlp", folder))
    assert ldpv2 - plain == {"multi_modal_projector.peg.weight", "multi_modal_projector.peg.bias"}
    assert plain <= ldpv2


def test_an_mlp_stays_plain_llava(pieces: ModelRecipe, tmp_path: Path) -> None:
    vlm = build(pieces)
    vlm.save(tmp_path / "mlp")
    assert type(vlm.model) is type(load_vlm(tmp_path / "mlp").model) is LlavaForConditionalGeneration
    config = json.loads((tmp_path / "mlp" / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert not [key for key in config if key.startswith("projector_") and key != "projector_hidden_act"]
    processor = json.loads((tmp_path / "mlp" / "processor_config.json").read_text())
    assert processor["num_additional_image_tokens"] == 0


@pytest.mark.parametrize("grid", [1, 2, 3])
def test_processor_and_model_agree_on_the_tokens_of_a_picture(pieces: ModelRecipe, grid: int, tmp_path: Path) -> None:
    build(pieces, projector="ldpv2", projector_grid=grid).save(tmp_path / "checkpoint")
    vlm = load_vlm(tmp_path / "checkpoint")
    processor = AutoProcessor.from_pretrained(tmp_path / "checkpoint", backend="pil")
    inputs = processor(text="<image>\nWhat is it?", images=PICTURE, return_tensors="pt")
    assert (inputs["input_ids"] == vlm.model.config.image_token_index).sum() == grid**2 == vlm.tokens_per_picture
    features = visual_features(vlm.model, inputs["pixel_values"])
    tokens = visual_tokens(vlm.model, features)
    assert features.shape[1] == 9
    assert tokens.shape[1] == grid**2
    assert torch.equal(vlm.model.get_image_features(inputs["pixel_values"]).pooler_output[0], tokens[0])
    model: Any = vlm.model
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


def test_plain_transformers_refuses_the_first_picture(folder: Path) -> None:
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder)
    inputs = AutoProcessor.from_pretrained(folder, backend="pil")(
        text="<image>\nWhat is it?", images=PICTURE, return_tensors="pt"
    )
    with pytest.raises(ValueError, match="features and image tokens do not match"):
        model(**inputs)


def test_fresh_weights_are_the_seeds_and_start_as_mobilevlms(pieces: ModelRecipe) -> None:
    def projector(seed: int) -> dict[str, Tensor]:
        vlm = build(pieces, projector="ldpv2", projector_grid=2, seed=seed)
        (module,) = parts(vlm.model)["projector"]
        return dict(module.state_dict())

    first, again, other = projector(3), projector(3), projector(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name in ("linear_1.weight", "linear_2.weight", "peg.weight", "peg.bias"):
        assert not torch.equal(first[name], other[name]), name
    assert first["linear_1.weight"].std() == pytest.approx(0.02, rel=0.1)
    assert 0.3 < first["peg.weight"].abs().max() <= 1 / 3  # torch's convolution of nine inputs
    assert first["peg.bias"].abs().max() <= 1 / 3


def test_inputs_are_what_training_and_evaluation_read(folder: Path) -> None:
    vlm = load_vlm(folder)
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    ]
    encoder, preprocessing = model_inputs(vlm)
    ids = encoder.encode_prompt(messages)
    assert ids.count(vlm.model.config.image_token_index) == 4
    assert preprocessing.output_size == (72, 72)
    answered = [*messages, {"role": "assistant", "content": "red"}]
    whole = len(encoder.encode(answered)[0])
    assert len(model_inputs(vlm, max_length=whole - 1)[0].encode(answered)[0]) == whole - 1


# --- refusals ---


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"projector": "ldpv2", "projector_grid": 4}, "projector_grid is 4, expected 1 to 3"),
        ({"projector": "ldpv2", "projector_grid": 0}, "projector_grid is 0, expected 1 to 3"),
        (
            {"projector": "ldpv2", "projector_grid": 2, "drop_first_patch": True},
            r"8 tokens are no square grid \(3 x 3 would be 9\).*drop_first_patch false, or projector mlp",
        ),
        ({"projector": "ldpv3"}, "projector_type is 'ldpv3', expected mlp or ldpv2"),
    ],
)
def test_a_projector_that_does_not_fit_is_refused(pieces: ModelRecipe, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        build(pieces, **settings)
    assert str(pieces.encoder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_asks_for_an_unknown_projector_is_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"projector_type": "resampler"}))
    with pytest.raises(ModelError, match=re.escape(str(tmp_path)) + ".*projector_type is 'resampler'"):
        load_vlm(tmp_path)


# --- encoders ---

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 72,
    "patch_size": 24,
}
TEXT: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 8,
}


def two_towers(kind: str) -> Any:
    """A whole tiny model with a text tower, as hubs hold them; SigLIP 2 of fixed resolution is of type siglip there."""
    torch.manual_seed(0)
    if kind == "siglip":
        return SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION))
    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16))


@pytest.mark.parametrize(("kind", "first"), [("siglip", 0), ("clip", 1)])
@pytest.mark.parametrize(("projector", "tokens"), [("mlp", 9), ("ldpv2", 4)])
def test_the_vision_tower_of_a_whole_model(
    pieces: ModelRecipe, tmp_path: Path, kind: str, first: int, projector: str, tokens: int
) -> None:
    whole = two_towers(kind)
    whole.save_pretrained(tmp_path / "whole")
    write_image_processor(tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["model_type"] == kind
    assert pieces.language_model is not None
    build_vlm(tmp_path / "whole", pieces.language_model, projector=projector, projector_grid=2).save(tmp_path / "vlm")
    vlm = load_vlm(tmp_path / "vlm")
    pixels = torch.randn(2, 3, 72, 72)
    with torch.no_grad():
        # The layer before last, the class token dropped where there is one.
        expected = whole.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, first:]
        got = visual_features(vlm.model, pixels)
        assert got.shape == (2, 9, 32)
        torch.testing.assert_close(got, expected)
        assert visual_tokens(vlm.model, got).shape[1] == tokens
    inputs = vlm.processor(text="<image>", images=PICTURE, return_tensors="pt")
    assert inputs["input_ids"].shape[1] == tokens == vlm.tokens_per_picture


@pytest.mark.parametrize("whole", [True, False])
def test_naflex_is_refused_with_the_way_out(pieces: ModelRecipe, tmp_path: Path, whole: bool) -> None:
    config: Any = Siglip2Config(vision_config={"hidden_size": 32, "num_attention_heads": 4})
    (config if whole else config.vision_config).save_pretrained(tmp_path)
    assert pieces.language_model is not None
    with pytest.raises(
        ModelError, match=r"'siglip2_vision_model'.*NaFlex.*fixed resolution.*siglip2-so400m-patch14-384"
    ):
        build_vlm(tmp_path, pieces.language_model)


# --- training ---


def test_a_stage_trains_it_and_ends_in_a_folder_that_loads(pieces: ModelRecipe, tmp_path: Path) -> None:
    stage = shrink(load_recipe(EDGE), tmp_path / "dry").stages[0]
    recipe = {
        "output": str(tmp_path / "out"),
        "model": {
            "encoder": pieces.encoder,
            "language_model": pieces.language_model,
            "projector": "ldpv2",
            "projector_grid": 2,
        },
        "stages": [
            {
                "name": "pt",
                "train": ["projector"],
                "objective": {"name": "sft"},
                "data": {"records": stage.data.records, "pictures": stage.data.pictures},
                "training": stage.training,
            }
        ],
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", str(tmp_path / "r.yaml")]) == 0
    before = build(pieces, projector="ldpv2", projector_grid=2).model.state_dict()
    after = load_vlm(tmp_path / "out" / "pt").model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "multi_modal_projector" in name}


def test_dry_run_honours_the_projector(tmp_path: Path) -> None:
    model = shrink(load_recipe(EDGE), tmp_path).model
    assert (model.projector, model.projector_grid) == ("ldpv2", 2)


def test_dry_run_of_the_edge_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", EDGE, "--dry-run"]) == 0
    err = capsys.readouterr().err
    assert "dft: switch_kd" in err
    assert "every stage took two steps" in err

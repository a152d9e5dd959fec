"""Objectives that look at pictures: what they are shown, and what they say of it, against plain formulas."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GemmaConfig, LlamaConfig, Qwen2Config, Qwen3Config

from switchkd.training.models.distillation import Distillation
from switchkd.training.models.pathway import embed, visual_features, visual_tokens
from switchkd.training.models.picture_views import first_attention
from switchkd.training.objectives import build_objective

Make = Callable[..., Any]
PICTURES = [1, 0, 2, 1]
IMAGE_TOKEN, TOKENS, OURS = 4, 4, 61


def pair(llava: Make, name: str, **settings: Any) -> Distillation:
    """A student, and a teacher of another width, depth, number of heads and vocabulary."""
    torch.manual_seed(0)
    teacher = llava(1, width=24, layers=3, vocabulary=67, heads=4)
    return Distillation(llava(0), teacher, build_objective(name, **settings)).train()


def outputs(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [B, T, V], visual tokens [P, L, D] and the first layer's attention [B, H, T, T], by plain transformers."""
    model.set_attn_implementation("eager")
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    result = model(**inputs, output_attentions=True)
    tokens_PLD = torch.stack(list(model.get_image_features(batch["pixel_values"]).pooler_output))
    return result.logits, tokens_PLD, result.attentions[0]


def last_states(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The language model's last hidden states [B, T, D], behind its norm, by plain transformers."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    states_BTD: Tensor = model(**inputs, output_hidden_states=True).hidden_states[-1]
    return states_BTD


def by_picture(batch: dict[str, Tensor]) -> list[tuple[int, Tensor, float]]:
    """Each picture's row, the places of its visual tokens, and the supervised positions it stands for."""
    found = []
    for row, count in enumerate(PICTURES):
        places = (batch["input_ids"][row] == IMAGE_TOKEN).nonzero().flatten().split(TOKENS)
        supervised = int((batch["labels"][row, 1:] != -100).sum())
        found += [(row, places[number], supervised / count) for number in range(count)]
    return found


def cross_entropies(module: Distillation, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Labels' log-probabilities of the student, and both models' logits [N, V] at supervised positions."""
    wanted = batch["labels"][:, 1:] != -100
    ours, theirs = (outputs(model, batch)[0][:, :-1][wanted][:, :OURS] for model in (module.student, module.teacher))
    return -ours.log_softmax(1).gather(1, batch["labels"][:, 1:][wanted][:, None]).sum(), ours, theirs.detach()


@pytest.mark.parametrize("text_config", [Qwen2Config, LlamaConfig, Qwen3Config])
def test_first_attention_is_that_of_transformers(llava: Make, batch: Make, text_config: Any) -> None:
    for settings in ({}, {"width": 24, "heads": 4}):
        model, inputs = llava(0, text_config=text_config, **settings).eval(), batch(0, PICTURES)
        for name, parameter in model.model.language_model.named_parameters():
            if "norm" in name:  # ones and zeros would hide a norm that is left out
                nn.init.uniform_(parameter, 0.5, 2)
        tokens = visual_tokens(model, visual_features(model, inputs["pixel_values"]))
        embeds = embed(model, inputs["input_ids"], tokens)
        got = first_attention(model, embeds, inputs["attention_mask"])
        expected = outputs(model, inputs)[2]
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(
            got.transpose(1, 2)[real], expected.double().transpose(1, 2)[real], atol=1e-6, rtol=0
        )


@pytest.mark.parametrize(
    ("text_config", "words"),
    [
        (GemmaConfig, "GemmaAttention; known are LlamaAttention"),
        (
            partial(Qwen2Config, use_sliding_window=True, sliding_window=5, max_window_layers=0),
            "Qwen2Attention with a sliding window of 5",
        ),
    ],
)
def test_another_kind_of_attention_is_refused(llava: Make, text_config: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Distillation(llava(0, text_config=text_config), llava(1), build_objective("align_kd"))
    off = {"lambda_attention": 0.0, "lambda_visual": 0.0}
    Distillation(llava(0, text_config=text_config), llava(1), build_objective("align_kd", **off))


@pytest.mark.parametrize("relation_of", ["language_model", "projector"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_llava_kd(llava: Make, batch: Make, direction: str, relation_of: str) -> None:
    weights = {"lambda_ce": 0.5, "lambda_kd": 2.0, "lambda_visual": 3.0, "lambda_relation": 0.7}
    module = pair(llava, "llava_kd", direction=direction, temperature=2.0, relation_of=relation_of, **weights)
    inputs = batch(0, PICTURES)
    got = module(**inputs)

    def kl(ours: Tensor, theirs: Tensor) -> Tensor:
        p, q = (theirs / 2).softmax(-1), (ours / 2).softmax(-1)
        p, q = (p, q) if direction == "forward" else (q, p)
        return (p * (p / q).log()).sum(-1)

    ce, ours, theirs = cross_entropies(module, inputs)
    (our_logits, our_tokens, _), (their_logits, their_tokens, _) = (
        outputs(model, inputs) for model in (module.student, module.teacher)
    )
    visual = relation = torch.zeros((), dtype=torch.float64)
    for number, (row, places, weight) in enumerate(by_picture(inputs)):
        visual = visual + weight * kl(our_logits[row, places][:, :OURS], their_logits[row, places][:, :OURS]).mean()
        if relation_of == "projector":
            tokens = our_tokens[number], their_tokens[number]
        else:
            ours_BTD, theirs_BTD = (last_states(model, inputs) for model in (module.student, module.teacher))
            tokens = ours_BTD[row, places], theirs_BTD[row, places]
        ours_P, theirs_P = (token / token.norm(dim=-1, keepdim=True) for token in tokens)
        r, s = (ours_P @ ours_P.mT).flatten(), (theirs_P @ theirs_P.mT).flatten()
        relation = relation + weight * (1 - (r @ s) / (r.norm() * s.norm()))
    expected = 0.5 * ce + 2 * kl(ours, theirs).sum() + 3 * visual + 0.7 * relation
    torch.testing.assert_close(got["loss"], expected / len(ours), rtol=1e-5, atol=0)
    torch.testing.assert_close(got["terms"]["visual_kd"], visual.detach() / len(ours), rtol=1e-5, atol=0)
    torch.testing.assert_close(got["terms"]["relation"], relation.detach() / len(ours), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("relation_of", "learns"), [("language_model", True), ("projector", False)])
def test_the_relation_reaches_the_language_model(llava: Make, batch: Make, relation_of: str, learns: bool) -> None:
    off = dict.fromkeys(("lambda_ce", "lambda_kd", "lambda_visual"), 0.0)
    module = pair(llava, "llava_kd", relation_of=relation_of, **off)
    module(**batch(0, PICTURES))["loss"].backward()
    layers = module.student.model.language_model.layers
    assert learns == any(p.grad is not None and bool(p.grad.any()) for p in layers.parameters())
    projector = module.student.model.multi_modal_projector
    assert all(p.grad is not None and p.grad.any() for p in projector.parameters())


def test_align_kd(llava: Make, batch: Make) -> None:
    weights = {"lambda_ce": 0.5, "lambda_logits": 2.0, "lambda_attention": 3.0, "lambda_visual": 0.7}
    module = pair(llava, "align_kd", top_tokens=2, **weights)
    heads, tokens = module.adapters["heads"], module.adapters["tokens"]
    assert isinstance(heads, nn.Conv2d)
    assert heads.bias is not None
    inputs = batch(0, PICTURES)
    got = module(**inputs)
    ce, ours, theirs = cross_entropies(module, inputs)
    soft = -(theirs.softmax(1) * ours.log_softmax(1)).sum()
    (_, our_tokens, our_attention), (_, their_tokens, their_attention) = (
        outputs(model, inputs) for model in (module.student, module.teacher)
    )
    attention = visual = torch.zeros((), dtype=torch.float64)
    for number, (row, places, weight) in enumerate(by_picture(inputs)):
        text = (inputs["attention_mask"][row].bool() & (inputs["input_ids"][row] != IMAGE_TOKEN)).nonzero().flatten()
        student_HTL, teacher_HTL = (a[row][:, text][:, :, places].double() for a in (our_attention, their_attention))
        mapped_HTL = torch.einsum("st,tql->sql", heads.weight[:, :, 0, 0], teacher_HTL) + heads.bias[:, None, None]
        attention = attention + weight * ((mapped_HTL - student_HTL) ** 2).mean()
        error_L = ((tokens(their_tokens[number]) - our_tokens[number]) ** 2).mean(-1)
        top = teacher_HTL.mean(0).sum(0).argsort(descending=True)[:2]
        visual = visual + weight * (error_L.mean() + error_L[top].mean())
    expected = 0.5 * ce + 2 * soft + 3 * attention + 0.7 * visual
    torch.testing.assert_close(got["loss"], expected / len(ours), rtol=1e-5, atol=0)
    got["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in module.adapters.parameters())
    assert module.teacher is not None
    assert all(p.grad is None for p in module.teacher.parameters())


@pytest.mark.parametrize("name", ["llava_kd", "align_kd"])
def test_accumulating_rows_and_chunks_equal_one_batch(llava: Make, batch: Make, rows: Make, name: str) -> None:
    module, inputs = pair(llava, name), batch(0, PICTURES)
    items = (inputs["labels"][:, 1:] != -100).sum()

    def gradients() -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}

    module(**inputs, num_items_in_batch=items)["loss"].backward()
    whole = gradients()
    module.zero_grad()
    module.chunk_positions = 3
    for one in rows(inputs, PICTURES):
        module(**one, num_items_in_batch=items)["loss"].backward()
    torch.testing.assert_close(gradients(), whole, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["llava_kd", "align_kd"])
def test_text_alone_and_unequal_tokens(llava: Make, batch: Make, name: str) -> None:
    output = pair(llava, name)(**batch(0, [0, 0]))
    assert {term for term, value in output["terms"].items() if value} == {
        "ce",
        "kd" if name == "llava_kd" else "logits",
    }
    with pytest.raises(ValueError, match=r"puts 4 visual tokens.*the teacher 9.*one by one"):
        Distillation(llava(0), llava(1, patch=4), build_objective(name))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "llava_kd", "lambda_visual": -1.0}, "lambda_visual is -1.0"),
        ({"name": "llava_kd", "temperature": 0.0}, "temperature is 0.0"),
        ({"name": "llava_kd", "relation_of": "encoder"}, "relation_of is 'encoder'; choose from language_model, proj"),
        ({"name": "align_kd", "top_tokens": 0}, "top_tokens is 0"),
        ({"name": "align_kd", "lambda_atention": 1.0}, "did you mean 'lambda_attention'"),
    ],
)
def test_settings_that_cannot_hold_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_objective(**settings)


def test_a_term_that_is_off_costs_nothing(llava: Make) -> None:
    assert not build_objective("llava_kd", lambda_visual=0.0).needs_visual_logits
    assert not build_objective("llava_kd", lambda_relation=0.0).needs_pictures
    off = {"lambda_attention": 0.0, "lambda_visual": 0.0}
    assert not build_objective("align_kd", **off).needs_attention
    assert not pair(llava, "align_kd", **off).adapters

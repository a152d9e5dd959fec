"""One step of Distillation: its loss, who gets gradient, chunks, accumulation, two processes."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import cross_entropy

from switchkd.training.models.distillation import Distillation
from switchkd.training.objectives import build_objective
from switchkd.training.objectives.dbild import dbild

Make = Callable[..., Any]
Gradients = dict[str, Tensor]
MIXED = [1, 0, 2, 0, 1]
PARTS = ("vision_tower", "multi_modal_projector", "language_model", "lm_head")


def distillation(
    llava: Make, name: str = "switch_kd", chunk_positions: int | None = None, **settings: Any
) -> Distillation:
    """A student, and a teacher of another width, depth and vocabulary."""
    student, teacher = llava(0), llava(1, width=24, layers=3, vocabulary=67)
    return Distillation(student, teacher, build_objective(name, **settings), chunk_positions=chunk_positions).train()


def only(on: str) -> dict[str, Any]:
    return {"lambda_ce": 0.0, "lambda_dbild": 0.0, "lambda_vsd": 0.0, on: 1.0}


def gradients(module: Distillation, loss: Tensor) -> Gradients:
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.student.named_parameters() if p.grad is not None}


def part(name: str) -> str:
    return next(part for part in PARTS if part in name)


def plain_loss(module: Distillation, batch: dict[str, Tensor]) -> Tensor:
    """Algorithm 1 with logits everywhere, the three pathways as three whole models."""
    teacher = module.teacher
    assert teacher is not None
    switch = copy.deepcopy(teacher)
    switch.model.vision_tower = module.student.model.vision_tower
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels_BT = batch["labels"][:, 1:]
    supervised_BT = labels_BT != -100
    student_NV, teacher_NV, switch_NV = (
        model(**inputs).logits[:, :-1][supervised_BT][:, :61] for model in (module.student, teacher, switch)
    )
    teacher_NV = teacher_NV.detach()
    ce = cross_entropy(student_NV, labels_BT[supervised_BT])
    return ce + dbild(teacher_NV, student_NV) + dbild(teacher_NV, switch_NV)


@pytest.mark.parametrize("pictures", [[1, 1], MIXED, [0, 1], [2, 0]], ids=str)
def test_loss_and_gradients_equal_the_plain_computation(llava: Make, batch: Make, pictures: list[int]) -> None:
    module, inputs = distillation(llava), batch(0, pictures)
    got, expected = module(**inputs)["loss"], plain_loss(module, inputs)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradients(module, got), gradients(module, expected), rtol=1e-7, atol=1e-12)


def test_terms_make_up_the_loss(llava: Make, batch: Make) -> None:
    output = distillation(llava, lambda_dbild=0.5, lambda_vsd=2.0)(**batch(0, MIXED))
    terms = output["terms"]
    torch.testing.assert_close(output["loss"], terms["ce"] + 0.5 * terms["dbild"] + 2 * terms["vsd"])
    assert not any(term.requires_grad for term in terms.values())
    assert terms["dbild"] > 0
    assert terms["vsd"] > 0
    assert 3 <= terms["k_teacher"] <= 61
    assert 3 <= terms["k_student"] <= 61


@pytest.mark.parametrize(
    ("on", "reached"),
    [
        ("lambda_ce", {"vision_tower", "multi_modal_projector", "language_model"}),
        ("lambda_dbild", {"vision_tower", "multi_modal_projector", "language_model"}),
        ("lambda_vsd", {"vision_tower"}),
    ],
)
def test_which_parts_each_term_trains(llava: Make, batch: Make, on: str, reached: set[str]) -> None:
    module = distillation(llava, **only(on))
    moved = gradients(module, module(**batch(0, MIXED))["loss"])
    assert {part(name) for name, gradient in moved.items() if gradient.any()} == reached
    if module.teacher is not None:
        assert all(p.grad is None and not p.requires_grad for p in module.teacher.parameters())


def test_the_encoder_gets_the_sum_of_all_terms_gradients(llava: Make, batch: Make) -> None:
    inputs = batch(0, MIXED)
    module = distillation(llava)
    together = gradients(module, module(**inputs)["loss"])
    apart = []
    for on in ("lambda_ce", "lambda_dbild", "lambda_vsd"):
        module = distillation(llava, **only(on))
        apart.append(gradients(module, module(**inputs)["loss"]))
    for name, gradient in together.items():
        # transformers' RMSNorm works in float32 whatever the model's dtype.
        torch.testing.assert_close(gradient, sum(each[name] for each in apart), rtol=1e-4, atol=1e-7)


def test_the_order_of_rows_does_not_matter(llava: Make, batch: Make) -> None:
    module, inputs = distillation(llava), batch(0, MIXED)
    order = [3, 2, 4, 1, 0]
    other = {name: value[order] for name, value in inputs.items() if name != "pixel_values"}
    # Row 2 holds pictures 1 and 2, row 4 picture 3, row 0 picture 0.
    other["pixel_values"] = inputs["pixel_values"][[1, 2, 3, 0]]
    torch.testing.assert_close(module(**other)["loss"], module(**inputs)["loss"])


def test_text_alone_has_no_switch_term(llava: Make, batch: Make) -> None:
    output = distillation(llava)(**batch(0, [0, 0]))
    assert output["terms"]["vsd"] == 0
    torch.testing.assert_close(output["loss"], output["terms"]["ce"] + output["terms"]["dbild"])


def test_a_frozen_encoder_skips_the_switch_in_training_and_reports_it_in_evaluation(llava: Make, batch: Make) -> None:
    module, inputs = distillation(llava), batch(0, MIXED)
    learning = module(**inputs)["terms"]
    module.student.model.vision_tower.requires_grad_(False)
    frozen = module(**inputs)
    assert frozen["terms"]["vsd"] == 0
    assert {part(name) for name in gradients(module, frozen["loss"])} == {"multi_modal_projector", "language_model"}
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(**inputs)["terms"], learning)


def test_the_teacher_stays_frozen_in_eval_mode_and_out_of_the_state(llava: Make) -> None:
    module = distillation(llava)
    assert module.training
    assert module.student.training
    assert module.teacher is not None
    assert not any(part.training for part in module.teacher.modules())
    assert {name.removeprefix("student.") for name in module.state_dict()} == set(module.student.state_dict())
    wrapped = nn.Sequential(module)
    state = wrapped.state_dict()
    assert not any("teacher" in name for name in state)
    assert wrapped.load_state_dict(state).missing_keys == []
    del state["0.student.lm_head.weight"]
    with pytest.raises(RuntimeError, match=r"student\.lm_head\.weight"):
        wrapped.load_state_dict(state)


def test_a_teacher_is_kept_only_if_it_is_needed_and_demanded_if_it_is(llava: Make, batch: Make) -> None:
    student, teacher = llava(0), llava(1, encoder_width=24)
    assert Distillation(student, teacher, build_objective("sft")).teacher is None
    with pytest.raises(ValueError, match="SwitchKd compares with a teacher"):
        Distillation(student, None, build_objective("switch_kd"))
    with pytest.raises(ValueError, match="features of width 16"):
        Distillation(student, teacher, build_objective("switch_kd"))
    loss = Distillation(student, None, build_objective("sft"))(**batch(0, MIXED))["loss"]
    torch.testing.assert_close(loss, student(**batch(0, MIXED)).loss.double(), rtol=1e-6, atol=0)


def plain_logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Logits [N, V] at the supervised positions, by plain transformers."""
    supervised_BT = inputs["labels"][:, 1:] != -100
    logits: Tensor = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    return logits[:, :-1][supervised_BT]


@pytest.mark.parametrize("pictures", [[1, 1], [2, 0, 1]], ids=str)
def test_unequal_visual_tokens_are_aligned_at_the_supervised_ones(
    llava: Make, batch: Make, pictures: list[int]
) -> None:
    """The teacher sees 9 visual tokens a picture where the student has 4; the text of both is the same."""
    student, teacher = llava(0), llava(1, patch=4)
    module = Distillation(student, teacher, build_objective("kd", lambda_ce=0.0))
    ours, theirs = batch(0, pictures, length=14), batch(0, pictures, length=24, visual_tokens=9)
    for row, count in enumerate(pictures):
        text, tail = ours["input_ids"][row, 4 * count + 1 :], 9 * count + 1
        for name in ("input_ids", "attention_mask", "labels"):
            theirs[name][row] = {"input_ids": 5, "attention_mask": 0, "labels": -100}[name]
            theirs[name][row, :tail] = ours[name][row, 0] if name != "input_ids" else theirs[name][row, :tail]
            theirs[name][row, tail : tail + len(text)] = ours[name][row, 4 * count + 1 :]
        theirs["input_ids"][row, 0] = ours["input_ids"][row, 0]
        theirs["input_ids"][row, 1:tail] = 4
    theirs["pixel_values"] = ours["pixel_values"]
    p, q = plain_logits(teacher, theirs).softmax(1), plain_logits(student, ours).softmax(1)
    torch.testing.assert_close(module(**ours)["loss"], (p * (p / q).log()).sum(1).mean(), rtol=1e-5, atol=0)


def test_an_adapter_bridges_encoders_of_other_widths_and_learns(llava: Make, batch: Make) -> None:
    student, teacher = llava(0), llava(1, encoder_width=24)
    settings = {"encoder_adapter": True, "lambda_ce": 0.0, "lambda_dbild": 0.0}
    module = Distillation(student, teacher, build_objective("switch_kd", **settings)).train()
    adapter = module.adapters["encoder"]
    inputs = batch(0, [1, 1])
    module(**inputs)["loss"].backward()
    assert {part(name) for name, p in student.named_parameters() if p.grad is not None and p.grad.any()} == {
        "vision_tower"
    }
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())
    assert set(module.state_dict()) > {"adapters.encoder.weight", "adapters.encoder.bias"}
    assert not Distillation(student, llava(1), build_objective("switch_kd", encoder_adapter=True)).adapters


def test_accumulating_rows_equals_one_batch(llava: Make, batch: Make, rows: Make) -> None:
    module, inputs = distillation(llava), batch(0, MIXED)
    items = (inputs["labels"][:, 1:] != -100).sum()
    whole = gradients(module, module(**inputs, num_items_in_batch=items)["loss"])
    module.zero_grad()
    for one in rows(inputs, MIXED):
        module(**one, num_items_in_batch=items)["loss"].backward()
    summed = {name: p.grad for name, p in module.student.named_parameters() if p.grad is not None}
    torch.testing.assert_close(summed, whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["sft", "switch_kd"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_chunks_equal_the_whole(llava: Make, batch: Make, name: str, dtype: torch.dtype) -> None:
    inputs = batch(0, MIXED)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    module = distillation(llava, name).to(dtype)
    whole = module(**inputs)
    whole_gradients = gradients(module, whole["loss"])
    count = int((inputs["labels"][:, 1:] != -100).sum())
    for chunk_positions in (1, 7, count - 1, count):
        module.chunk_positions = chunk_positions
        chunked = module(**inputs)
        close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(chunked, whole, **close)
        torch.testing.assert_close(gradients(module, chunked["loss"]), whole_gradients, **close)


def test_heads_see_supervised_positions_of_one_chunk_only(llava: Make, batch: Make) -> None:
    module, inputs = distillation(llava, chunk_positions=7), batch(0, MIXED)
    assert module.teacher is not None
    seen: list[int] = []
    for head in (module.student.lm_head, module.teacher.lm_head):
        head.register_forward_hook(lambda _head, _inputs, logits: seen.append(logits.numel() // logits.shape[-1]))
    module(**inputs)
    with_picture = (inputs["input_ids"] == 4).any(1)
    supervised_BT = inputs["labels"][:, 1:] != -100
    assert max(seen) == 7
    assert sum(seen) == 2 * supervised_BT.sum() + supervised_BT[with_picture].sum()


def test_nothing_supervised_gives_zero_with_a_graph(llava: Make, batch: Make) -> None:
    module, inputs = distillation(llava), batch(0, [1, 0])
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss = module(**inputs)["loss"]
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients(module, loss).values())


def test_image_tokens_without_pictures_are_refused(llava: Make, batch: Make) -> None:
    inputs = batch(0, [1, 0])
    del inputs["pixel_values"]
    with pytest.raises(ValueError, match="1 rows have image tokens and there are no pixel_values"):
        distillation(llava)(**inputs)


def test_two_processes_equal_one(llava: Make, batch: Make, tmp_path: Path) -> None:
    """DDP over two ranks, the second with text alone, moves the student as one process does with all rows."""
    spawn(_two_processes, args=(llava, batch, str(tmp_path)), nprocs=2)
    module, inputs = distillation(llava), batch(0, [1, 2, 0, 0])
    expected = gradients(module, module(**inputs)["loss"])
    got = torch.load(tmp_path / "gradients.pt", weights_only=True)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def _two_processes(rank: int, llava: Make, batch: Make, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    module, inputs = distillation(llava), batch(0, [1, 2, 0, 0])
    # DDP waits for every parameter; the encoder's last block is after the layer that the config selects.
    vision = module.student.model.vision_tower
    vision.encoder.layers[-1].requires_grad_(False)
    vision.post_layernorm.requires_grad_(False)
    items = (inputs["labels"][:, 1:] != -100).sum()
    mine = {name: value[2 * rank : 2 * rank + 2] for name, value in inputs.items() if name != "pixel_values"}
    if rank == 0:
        mine["pixel_values"] = inputs["pixel_values"]
    ddp = nn.parallel.DistributedDataParallel(module)
    # DDP takes the mean over ranks; num_items_in_batch counts them all.
    (2 * ddp(**mine, num_items_in_batch=items)["loss"]).backward()
    if rank == 0:
        found = {name: p.grad for name, p in module.student.named_parameters() if p.grad is not None}
        torch.save(found, f"{folder}/gradients.pt")
    del ddp  # as the last owner of the connections it may wait for them for ever (see leave_other_ranks)
    torch.distributed.destroy_process_group()


def test_ranks_of_zero_3_run_the_same_modules(llava: Make, batch: Make, tmp_path: Path) -> None:
    """It gathers weights module by module, so a rank with text alone or fewer chunks runs what others do."""
    spawn(_ranks_of_zero_3, args=(llava, batch, str(tmp_path)), nprocs=2)
    for name in ("switch_kd", "llava_kd", "align_kd"):
        first, second = (torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in range(2))
        assert first == second
        assert {part(module) for module in first if module.startswith("teacher")} == set(PARTS)


def modules_run(module: Distillation, inputs: dict[str, Tensor]) -> list[str]:
    """The modules with weights that a forward and its backward run, in order."""
    run: list[str] = []
    for path, inner in module.named_modules():
        if next(inner.parameters(recurse=False), None) is not None:
            inner.register_forward_hook(lambda *_, path=path: run.append(path))
    module(**inputs)["loss"].backward()
    return run


def _ranks_of_zero_3(rank: int, llava: Make, batch: Make, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    inputs = batch(0, [[1, 2], [0]][rank])
    for name in ("switch_kd", "llava_kd", "align_kd"):
        module = distillation(llava, name, chunk_positions=3)
        module.activation_checkpointing_enable()
        module.student.lm_head.weight.ds_id = 0  # as ZeRO-3 marks what it has shared out
        run = modules_run(module, inputs)
        torch.save(run, f"{folder}/{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_recomputed_activations_give_the_same_loss_and_gradients(llava: Make, batch: Make) -> None:
    plain, recomputing, inputs = distillation(llava), distillation(llava), batch(0, MIXED)
    recomputing.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    assert recomputing.student.is_activation_checkpointing
    expected, got = plain(**inputs)["loss"], recomputing(**inputs)["loss"]
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradients(recomputing, got), gradients(plain, expected), rtol=1e-7, atol=1e-12)


def test_the_switch_pass_keeps_its_layers_inputs_alone(llava: Make, batch: Make) -> None:
    """Through the frozen teacher too activations are computed again, as the student's are."""
    student, teacher = llava(0), llava(1, layers=8)
    module = Distillation(student, teacher, build_objective("switch_kd", lambda_ce=0.0, lambda_dbild=0.0)).train()
    inputs = batch(0, MIXED)
    student.activation_checkpointing_enable()
    whole = bytes_kept(module, inputs)
    module.activation_checkpointing_enable()
    assert bytes_kept(module, inputs) < whole / 3
    layers = [part for part in teacher.modules() if part.training]
    assert len(layers) == 8, "the layers alone, so that what they are made of goes on as in evaluation"
    assert not any(part.training for part in module.eval().modules())


def bytes_kept(module: Distillation, inputs: dict[str, Tensor]) -> int:
    """What the forward keeps for the backward, each storage once; weights, which are there anyway, do not count."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)  # else its place is given to another
        return tensor

    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(**inputs)
    return sum(kept.values())


@pytest.mark.parametrize("name", ["switch_kd", "llava_kd", "align_kd"])
def test_a_batch_of_text_alone_gives_every_parameter_a_gradient_and_none_of_sight_a_step(
    llava: Make, batch: Make, name: str
) -> None:
    """So that no rank waits for another, and one process moves as several do; the blank picture is in no loss."""
    module, inputs = distillation(llava, name), batch(0, [0, 0, 0])
    loss = module(**inputs)["loss"]
    found = gradients(module, loss)
    assert all(p.grad is not None and not p.grad.any() for p in module.adapters.parameters())
    sight = {name for name in found if part(name) in ("vision_tower", "multi_modal_projector")}
    assert sight
    assert not any(found[name].any() for name in sight)
    module.eval()  # in which nothing is added
    expected = module(**inputs)["loss"]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        {name: found[name] for name in set(found) - sight},
        {name: gradient for name, gradient in gradients(module, expected).items() if name not in sight},
        rtol=1e-7,
        atol=1e-12,
    )

"""The visual switch: student encoder → teacher projector → teacher language model, and the checks of such a pair.

Source: Switch-KD (arXiv 2604.14629), z_switch of algorithm 1.

Shapes: B rows, T tokens of a row, P pictures, L visual tokens of a picture, E width of the vision encoder, D width of
the language model.
"""

from typing import Any

from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase

from switchkd.export.llava.projectors import encoder_tokens, tokens_per_picture

from .pathway import embed, features_width, last_hidden, visual_tokens

PROBE = "The 3 red circles (left of 'a' square): déjà vu 图片 🙂\n\tWhat is 12 + 7?"


def switch_hidden(
    teacher: LlavaForConditionalGeneration, input_ids_BT: Tensor, attention_mask_BT: Tensor, features_PLE: Tensor
) -> Tensor:
    """Return hidden_BTD of the visual switch: the teacher's projector and language model on the student's features.

    The teacher takes no gradient, but it flows through it into `features_PLE`: the student's encoder alone.
    """
    features_PLE = features_PLE.to(teacher.dtype)
    embeds_BTD = embed(teacher, input_ids_BT, visual_tokens(teacher, features_PLE))
    return last_hidden(teacher, embeds_BTD, attention_mask_BT)


def check_pair(
    student: LlavaForConditionalGeneration,
    teacher: LlavaForConditionalGeneration,
    *,
    switch: bool = True,
    adapter: bool = False,
    same_tokens: bool = False,
) -> None:
    """Raise ValueError unless the two models see and say the same things.

    `switch` adds what the switch pathway needs, `adapter` says that it bridges the encoders' widths, `same_tokens` that
    visual tokens are compared one by one. Tokenizers are not in the models: compare them with `check_tokenizers`.
    """
    ours: Any = student.config
    theirs: Any = teacher.config
    if ours.image_token_index != theirs.image_token_index:
        raise ValueError(
            f"the student's image token is {ours.image_token_index}, the teacher's {theirs.image_token_index}; both "
            "read the same input ids, so build the student with the teacher's tokenizer"
        )
    if ours.vision_config.image_size != theirs.vision_config.image_size:
        raise ValueError(
            f"the student takes pictures of {ours.vision_config.image_size} pixels, the teacher of "
            f"{theirs.vision_config.image_size}; both are given the same pixels, so choose encoders of one size"
        )
    vocabularies = ours.text_config.vocab_size, theirs.text_config.vocab_size
    if ours.image_token_index >= min(vocabularies):
        raise ValueError(
            f"the vocabularies are {vocabularies[0]} (student) and {vocabularies[1]} (teacher), and the image token "
            f"{ours.image_token_index} is not in both; resize the smaller one's embeddings"
        )
    tokens = tokens_per_picture(ours), tokens_per_picture(theirs)
    if same_tokens and tokens[0] != tokens[1]:
        raise ValueError(
            f"the student puts {tokens[0]} visual tokens a picture into the sequence, the teacher {tokens[1]}, and "
            "this objective compares them one by one; choose one projector and one vision_feature_select_strategy for "
            "both, or another objective"
        )
    if switch:
        _check_switch(student, teacher, adapter)


def _check_switch(
    student: LlavaForConditionalGeneration, teacher: LlavaForConditionalGeneration, adapter: bool
) -> None:
    if encoder_tokens(student.config) != encoder_tokens(teacher.config):
        raise ValueError(
            f"the student's encoder gives {encoder_tokens(student.config)} features a picture, the teacher's projector "
            f"takes {encoder_tokens(teacher.config)}; choose encoders of one patch size and one "
            "vision_feature_select_strategy, or turn the switch off (lambda_vsd: 0)"
        )
    if features_width(student) != features_width(teacher) and not adapter:
        raise ValueError(
            f"the student's encoder gives features of width {features_width(student)}, the teacher's projector takes "
            f"{features_width(teacher)}; choose a student with the teacher's encoder width, let a trained adapter "
            "bridge them (encoder_adapter: true), or turn the switch off (lambda_vsd: 0)"
        )


def check_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless both tokenizers have the same tokens and give texts the same ids.

    The texts are a probe and what every token of the vocabulary says: two with one vocabulary and other merges, or
    another way to cut words, part there. Takes some seconds for 150,000 tokens.
    """
    _check_text(student, teacher, PROBE, "a probe text")
    special: list[dict[str, Any]] = [
        {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
        for tokenizer in (student, teacher)
    ]
    if special[0] != special[1]:
        only = [dict(sorted(a.items() - b.items())) for a, b in (special, special[::-1])]
        raise ValueError(
            f"the tokenizers' special tokens differ: {only[0]} only in the student's, {only[1]} only in the teacher's; "
            "add the same tokens in the same order to both, or save the teacher's tokenizer with the student"
        )
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if differing := sorted({token for token, _ in ours.items() ^ theirs.items()}):
        token = differing[0]
        raise ValueError(
            f"the tokenizers differ in {len(differing)} tokens: {token!r} is {ours.get(token, 'not there')} for the "
            f"student and {theirs.get(token, 'not there')} for the teacher; logits compare only over one tokenizer, so "
            "build the student from a model of the teacher's family"
        )
    texts = student.batch_decode([[number] for number in sorted(ours.values())])
    for text, one, other in zip(texts, student(texts)["input_ids"], teacher(texts)["input_ids"], strict=True):
        if one != other:
            _check_text(student, teacher, text, f"the text {text!r}")


def _check_text(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, text: str, what: str) -> None:
    ours, theirs = student(text)["input_ids"], teacher(text)["input_ids"]
    if ours != theirs:
        at = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        raise ValueError(
            f"the tokenizers differ: from token {at} on {what} is {ours[at : at + 5]} for the student and "
            f"{theirs[at : at + 5]} for the teacher; logits compare only over one tokenizer, so build the student from "
            "a model of the teacher's family"
        )

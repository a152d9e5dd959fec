"""Which tokens end an answer: the one that the chat template ends turns with, and those of the configuration files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tokenizers import Tokenizer

from ..contract.prompt import end_of_turn
from .tracing import ExportError


@dataclass(frozen=True)
class AnswerEnds:
    """Token ids that end an answer, the template's first; `note` tells where template and files name others."""

    ids: tuple[int, ...]
    note: str | None

    @classmethod
    def of(
        cls,
        path: Path,
        generation_config: Mapping[str, Any],
        text_config: Any,
        tokenizer: Tokenizer,
        template: str,
        special_tokens: Mapping[str, str],
    ) -> Self:
        """Gather them from a checkpoint's files, config.json being asked where generation_config.json is silent.

        A base model's generation_config.json ends documents; what ends a turn is for the template to say. Raises
        ExportError where the files name none, or what is no token of the model.
        """
        file, found = "generation_config.json", generation_config.get("eos_token_id")
        if found is None:
            file, found = "config.json", text_config.eos_token_id
        if found is None:
            raise ExportError(f"{path}: no eos_token_id in generation_config.json or config.json; set one")
        configured = found if isinstance(found, list) else [found]
        rows = text_config.vocab_size
        if not configured or not all(type(each) is int and 0 <= each < rows for each in configured):
            raise ExportError(
                f"{path / file}: eos_token_id is {found!r}, expected one or more token ids from 0 to {rows - 1}, or no "
                "answer would end; correct it"
            )
        added = tokenizer.get_added_tokens_decoder().items()
        special = {token.content: number for number, token in added if token.special}
        turn = end_of_turn(template, special_tokens, special)
        ends = [] if turn is None else [special[turn]]

        note = None
        if turn is not None and ends[0] not in configured:
            names = ", ".join(tokenizer.id_to_token(each) or str(each) for each in configured)
            note = f"the chat template ends a turn with {turn}, {file} names {names}: each of them ends an answer"
        return cls(tuple(dict.fromkeys([*ends, *configured])), note)

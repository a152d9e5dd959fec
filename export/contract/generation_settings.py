"""What a generation_config.json asks of whoever generates: the part that serving obeys, and the names of the rest.

The meaning of every setting is transformers'.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

# What a setting is where it asks for nothing: transformers' default, or what switches it off.
_NOT_OBEYED: Mapping[str, tuple[Any, ...]] = {
    "constraints": (),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_length": (20,),
    "max_time": (),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "sequence_bias": (),
    "stop_strings": (),
    "token_healing": (False,),
    "watermarking_config": (),
}
# Of those, what only a draw obeys.
_NOT_OBEYED_DRAWING: Mapping[str, tuple[Any, ...]] = {
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "min_p": (0,),
    "top_h": (),
    "typical_p": (1,),
}
RULES = (
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "min_length",
    "min_new_tokens",
    "suppress_tokens",
    "begin_suppress_tokens",
)
# The manifest says which tokens end an answer: more than this file may know.
OBEYED = frozenset([*RULES, "do_sample", "temperature", "top_k", "top_p", "max_new_tokens", "eos_token_id"])
# What changes no answer here: how transformers computes and what it returns, and what goes with a setting above.
NO_MATTER = frozenset(
    [
        "_from_model_config",
        "assistant_confidence_threshold",
        "assistant_early_exit",
        "assistant_ensemble_weight",
        "assistant_lookbehind",
        "bos_token_id",
        "cache_config",
        "cache_implementation",
        "compile_config",
        "continuous_batching_config",
        "decoder_start_token_id",
        "disable_compile",
        "early_stopping",
        "is_assistant",
        "length_penalty",
        "low_memory",
        "max_cache_len",
        "max_matching_ngram_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "pad_token_id",
        "prefill_chunk_size",
        "prompt_lookup_num_tokens",
        "remove_invalid_values",
        "renormalize_logits",
        "return_dict_in_generate",
        "speculation_type",
        "target_lookbehind",
        "transformers_version",
        "use_cache",
        "use_mtp",
    ]
)
NOT_OBEYED = frozenset([*_NOT_OBEYED, *_NOT_OBEYED_DRAWING])


class GenerationError(ValueError):
    """A setting of generation_config.json that is none."""


@dataclass(frozen=True)
class GenerationSettings:
    """The settings that serving obeys; as they are here, they change nothing."""

    do_sample: bool = False
    temperature: float = 1.0  # this and the next two are of use where `do_sample` is true
    top_k: int = 50
    top_p: float = 1.0
    max_new_tokens: int | None = None
    min_length: int = 0  # prompt and answer together
    min_new_tokens: int | None = None  # in place of min_length
    no_repeat_ngram_size: int = 0
    repetition_penalty: float = 1.0
    suppress_tokens: frozenset[int] = frozenset()
    begin_suppress_tokens: frozenset[int] = frozenset()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read the content of generation_config.json; raises GenerationError. A setting that is null is not set."""
        given = {key: value for key, value in config.items() if value is not None}
        do_sample = given.get("do_sample", False)
        if not isinstance(do_sample, bool):
            raise GenerationError(f"do_sample is {do_sample!r}, expected true or false; correct it")
        # Many files hold a temperature of 0 beside greedy answers, where nobody reads it.
        drawing = given if do_sample else {}
        return cls(
            do_sample=do_sample,
            temperature=_number(drawing, "temperature", 1.0, most=100.0),
            top_k=_count(drawing, "top_k", 50) or 0,
            top_p=_number(drawing, "top_p", 1.0, most=1.0),
            max_new_tokens=_count(given, "max_new_tokens", None, least=1),
            min_length=_count(given, "min_length", 0) or 0,
            min_new_tokens=_count(given, "min_new_tokens", None),
            no_repeat_ngram_size=_count(given, "no_repeat_ngram_size", 0) or 0,
            repetition_penalty=_number(given, "repetition_penalty", 1.0),
            suppress_tokens=frozenset(_ids(given, "suppress_tokens")),
            begin_suppress_tokens=frozenset(_ids(given, "begin_suppress_tokens")),
            bad_words_ids=_words(given),
        )

    @property
    def rules(self) -> dict[str, Any]:
        """What forbids tokens or makes them less likely, whether drawn or not, by name."""
        fresh = GenerationSettings()
        return {name: getattr(self, name) for name in RULES if getattr(self, name) != getattr(fresh, name)}


def not_obeyed(config: Mapping[str, Any]) -> dict[str, Any]:
    """What generation_config.json asks for and serving does not do, unknown settings among it."""
    drawing = _NOT_OBEYED_DRAWING if config.get("do_sample") else {}
    idle: Mapping[str, tuple[Any, ...]] = {**_NOT_OBEYED, **drawing}
    unknown = set(config) - OBEYED - NO_MATTER - NOT_OBEYED
    asked = {key: value for key, value in config.items() if key in unknown or key in idle}
    return {key: value for key, value in asked.items() if value not in (None, [], {}, "", *idle.get(key, ()))}


def _number(given: Mapping[str, Any], key: str, default: float, most: float | None = None) -> float:
    value = given.get(key, default)
    if not _is(value, (int, float)) or not 0 < value < float("inf") or (most is not None and value > most):
        above = "" if most is None else f" and at most {most:g}"
        raise GenerationError(f"{key} is {value!r}, expected a number above 0{above}; correct it")
    return float(value)


def _count(given: Mapping[str, Any], key: str, default: int | None, least: int = 0) -> int | None:
    value = given.get(key, default)
    if value is not None and (not _is(value, int) or value < least):
        raise GenerationError(f"{key} is {value!r}, expected a whole number of {least} or more; correct it")
    return None if value is None else int(value)


def _ids(given: Mapping[str, Any], key: str) -> list[int]:
    value = given.get(key, [])
    if not isinstance(value, list) or not all(_is(each, int) for each in value):
        raise GenerationError(f"{key} is {value!r}, expected a list of token ids; correct it")
    return value


def _words(given: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    value = given.get("bad_words_ids", [])
    whole = isinstance(value, list) and all(
        isinstance(word, list) and word and all(_is(each, int) for each in word) for word in value
    )
    if not whole:
        raise GenerationError(f"bad_words_ids is {value!r}, expected a list of lists of token ids; correct it")
    return tuple(tuple(word) for word in value)


def _is(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)

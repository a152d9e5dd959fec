"""Records and pictures on their way into a batch: read, checked, turned into tokens with the label mask, collated."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .check import check_data
    from .conversations import BrokenRecord, DataError, Reason, to_messages
    from .dataset import ConversationDataset, Sample, collator
    from .label_mask import ConversationEncoder, model_inputs
    from .records import read_records
    from .sampler import LengthGroupedSampler

__all__ = [
    "BrokenRecord",
    "ConversationDataset",
    "ConversationEncoder",
    "DataError",
    "LengthGroupedSampler",
    "Reason",
    "Sample",
    "check_data",
    "collator",
    "model_inputs",
    "read_records",
    "to_messages",
]

# Imported when they are asked for: an evaluation reads records where there is no torch.
_PLACES = {
    "BrokenRecord": ".conversations",
    "ConversationDataset": ".dataset",
    "ConversationEncoder": ".label_mask",
    "DataError": ".conversations",
    "LengthGroupedSampler": ".sampler",
    "Reason": ".conversations",
    "Sample": ".dataset",
    "check_data": ".check",
    "collator": ".dataset",
    "model_inputs": ".label_mask",
    "read_records": ".records",
    "to_messages": ".conversations",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name], __name__), name)

"""Records and pictures on their way into a batch: read, checked, turned into tokens with the label mask, collated."""

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

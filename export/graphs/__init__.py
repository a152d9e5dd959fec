"""A checkpoint folder to float32 ONNX graphs, in plain operators and with a fused decoder."""

from .checkpoint import Checkpoint, open_checkpoint
from .fused_decoder import FusedDecoder
from .onnx_graph import OnnxGraph
from .tracing import EmbedTokens, ExportError, GraphDescription, PortableDecoder, VisionEncoder

__all__ = [
    "Checkpoint",
    "EmbedTokens",
    "ExportError",
    "FusedDecoder",
    "GraphDescription",
    "OnnxGraph",
    "PortableDecoder",
    "VisionEncoder",
    "open_checkpoint",
]

"""The PyTorch model as the reference that graphs are compared with.

Shapes in names: C channels, H height, W width, P pictures, N visual tokens, D hidden size, T tokens, R some of them,
V vocabulary.
"""

from collections.abc import Iterable, Sequence

import torch
from transformers import DynamicCache, LlavaForConditionalGeneration

from ..graphs.tracing import CACHE
from .graph_runner import Array, Greedy


class TorchReference:
    """A LLaVA model through its own methods, none of the code that was traced for the graphs."""

    def __init__(self, model: LlavaForConditionalGeneration, eos_token_ids: Sequence[int]) -> None:
        self.model = model
        self.eos_token_ids = eos_token_ids

    @torch.no_grad()
    def encode(self, pixels_PCHW: Array) -> Array:
        """Pictures to features_PND."""
        features = self.model.get_image_features(torch.from_numpy(pixels_PCHW)).pooler_output
        return torch.stack(list(features)).numpy()

    def encode_ahead(self, pictures: Iterable[Array]) -> None:
        """Nothing: all parts of the model are in memory at once."""

    @torch.no_grad()
    def embed(self, ids_BT: Array) -> Array:
        """Token ids to embeds_BTD."""
        embeds_BTD: Array = self.model.get_input_embeddings()(torch.from_numpy(ids_BT)).numpy()
        return embeds_BTD

    @torch.no_grad()
    def logits(self, embeds_1TD: Array, rows_R: Array) -> Array:
        """logits_RV at some places of a whole prompt."""
        output = self.model(inputs_embeds=torch.from_numpy(embeds_1TD), logits_to_keep=torch.from_numpy(rows_R))
        logits_RV: Array = output.logits[0].numpy()
        return logits_RV

    @torch.no_grad()
    def greedy(self, ids: Sequence[int], pixels_PCHW: Array | None, max_new_tokens: int) -> Greedy:
        """The most likely answer, token by token; generation settings such as penalties stay out of it."""
        tokens: list[int] = []
        rows: list[torch.Tensor] = []
        ids_1T = torch.tensor([list(ids)])
        pixels = None if pixels_PCHW is None else torch.from_numpy(pixels_PCHW)
        cache = DynamicCache()  # grows in place
        while True:
            output = self.model(
                input_ids=ids_1T, pixel_values=pixels, use_cache=True, logits_to_keep=1, **{CACHE: cache}
            )
            rows.append(output.logits[0, -1])
            tokens.append(int(rows[-1].argmax()))
            if tokens[-1] in self.eos_token_ids or len(tokens) == max_new_tokens:
                return Greedy(tokens, torch.stack(rows).numpy())
            ids_1T, pixels = torch.tensor([tokens[-1:]]), None

"""DBiLD as it is written down: every pair of leading logits built, the whole batch at once.

Shapes: N positions, V vocabulary, K tokens compared, P = K(K−1)/2 pairs.
"""

import torch
from torch import Tensor

from switchkd.training.objectives.dbild import knee_k


def explicit_dbild(
    reference_NV: Tensor,
    candidate_NV: Tensor,
    *,
    window: int | None = None,
    min_k: int = 3,
    max_k: int | None = None,
    temperature: float = 3.0,
) -> Tensor:
    """Return the sum over the rows of DBiLD, reverse KL, both leaders (Switch-KD, algorithm 2)."""
    loss = candidate_NV.new_zeros(())
    for leader_NV in (reference_NV, candidate_NV):
        top = leader_NV.detach().topk(min(window or leader_NV.shape[1], leader_NV.shape[1]), dim=1)
        k_N = knee_k(top.values, min_k=min_k, max_k=max_k)
        ids_NK = top.indices[:, : int(k_N.max())]
        candidate_NK, reference_NK = candidate_NV.gather(1, ids_NK), reference_NV.gather(1, ids_NK)
        loss = loss + explicit_pair_kl(candidate_NK / temperature, reference_NK / temperature, k_N).sum()
    return loss


def explicit_pair_kl(p_NK: Tensor, q_NK: Tensor, k_N: Tensor) -> Tensor:
    """Return KL(p ‖ q) of the softmax over all pairs of each row's first k_N entries."""
    first_P, second_P = torch.triu_indices(p_NK.shape[1], p_NK.shape[1], offset=1, device=p_NK.device)
    absent_NP = second_P >= k_N[:, None]
    log_p_NP, log_q_NP = (
        (x_NK[:, first_P] - x_NK[:, second_P]).masked_fill(absent_NP, torch.finfo(x_NK.dtype).min).log_softmax(1)
        for x_NK in (p_NK, q_NK)
    )
    return (log_p_NP.exp() * (log_p_NP - log_q_NP).masked_fill(absent_NP, 0)).sum(1)

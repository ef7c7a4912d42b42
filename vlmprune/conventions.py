"""How papers count the FLOPs of a language model's prefill, so that their printed figures can be computed again.

All count the decoder layers alone: no vision tower, no projector, no head. What they print depends on how many text
tokens they assume, so that is always an argument, never part of the convention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Convention:
    """The cost of a decoder layer with n tokens, width d and MLP width m, as one paper counts it.

    Attributes:
        name: what `estimate_flops(convention=...)` takes.
        source: the paper and its formula.
        multiply_add: what one multiply-add counts.
        mlp_matrices: matrix products of the MLP: 2 in formulas written for a plain one, 3 for the gated one there is.
        grouped: whether grouped-query attention's narrower keys and values are counted as narrow as they are.
        softmax: what the softmax counts for each score.
    """

    name: str
    source: str
    multiply_add: int
    mlp_matrices: int
    grouped: bool = False
    softmax: int = 0

    def layer(self, text: Any, queries: float, keys: float, batch: int) -> tuple[int, int, int]:
        """(projections, attention, MLP) of one layer of a text config; counts may be means, such as 43.4 tokens.

        Raises:
            ValueError: a mixture of experts, for which no paper's formula is meant.
        """
        if getattr(text, "num_experts", 0):
            raise ValueError(f'convention="{self.name}" is meant for dense models: use convention="counter"')
        d, m, heads = text.hidden_size, text.intermediate_size, text.num_attention_heads
        narrow = d * (getattr(text, "num_key_value_heads", None) or heads) // heads if self.grouped else d
        rows = batch * queries
        return (
            round(rows * (2 * d * d + 2 * d * narrow) * self.multiply_add),
            round(rows * keys * (2 * d * self.multiply_add + self.softmax * heads)),
            round(rows * self.mlp_matrices * d * m * self.multiply_add),
        )


CONVENTIONS: dict[str, Convention] = {
    convention.name: convention
    for convention in (
        Convention("divprune", "DivPrune, arXiv 2503.02175, eq. 5: 4nd² + 2n²d + 2ndm", 1, 2),
        Convention("globalcom2", "GlobalCom2, arXiv 2501.05179: 2 (4nd² + 2n²d + 3ndm) and the softmax", 2, 3, True, 5),
        Convention("transprune", "TransPrune, arXiv 2507.20630: 4nd² + 2n²d + 3ndm", 1, 3),
    )
}
COUNTER = "counter"


def find_convention(name: str) -> Convention | None:
    """The convention of that name, None for "counter" (as torch counts); `ValueError` for an unknown one."""
    if name != COUNTER and name not in CONVENTIONS:
        raise ValueError(f"unknown FLOPs convention {name!r}: choose one of {', '.join((COUNTER, *CONVENTIONS))}.")
    return CONVENTIONS.get(name)

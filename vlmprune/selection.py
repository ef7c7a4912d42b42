"""What choosing costs, counted while it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.backends import mha
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from vlmprune.contract import OBSERVER
from vlmprune.kernels._common import BODIES

_aten = torch.ops.aten


def _attention(query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _distances(x: Any, y: Any, out_val: Any = None) -> int:
    """A product with two further columns."""
    return 2 * x.shape[:-1].numel() * y.shape[-2] * (x.shape[-1] + 2)


_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _aten.addmm_: flop_registry[_aten.addmm],
    _aten.baddbmm_: flop_registry[_aten.baddbmm],
    _aten.mv: lambda x, y, out_val=None: 2 * x.numel(),
    _aten.dot: lambda x, y, out_val=None: 2 * x.numel(),
    _aten._euclidean_dist: _distances,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
}
"""FLOPs of an operation from its arguments: torch's own, and of products and attention that it leaves out."""


class SelectionFlops(TorchDispatchMode):
    """FLOPs of the matrix products that run for the method alone; `by_operation` says which.

    A multiply-add is 2 FLOPs; sums, norms, softmax, sorting and gathering are none, as everywhere in `vlmprune.flops`,
    and neither are decompositions (SparseVLM's rank).
    The package's own operations are looked into, and do here what their torch backend does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_operation: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self.by_operation.total()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = getattr(func, "_overloadpacket", func)
        if body := BODIES.get(str(getattr(packet, "_qualified_op_name", ""))):
            with self:
                return body(*args[:-1], "torch")
        if packet not in _FORMULAS:
            with self:
                if (made := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return made
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        self.by_operation[str(packet)] += int(_FORMULAS[packet](*args, **kwargs, out_val=out))
        return out


@contextmanager
def counting_selection() -> Iterator[SelectionFlops]:
    """Count what choosing costs the sessions that run inside.

    >>> with vlmprune.prune(model, "divprune"), counting_selection() as selection:  # doctest: +SKIP
    ...     model(**inputs)
    >>> selection.total  # doctest: +SKIP
    """
    counter, fast = SelectionFlops(), mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)  # fused layers show no products
    token = OBSERVER.set(counter)
    try:
        yield counter
    finally:
        OBSERVER.reset(token)
        mha.set_fastpath_enabled(fast)

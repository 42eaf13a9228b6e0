"""What one pass over the logits says about each token."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class TokenStats:
    """Detached per-token numbers, each shaped like ``target`` (inside a gate: flat, one entry per row).

    All floating-point fields have the loss's dtype: float32, or float64 for float64 logits. Ignored tokens hold 0.

    Attributes:
        ce: cross entropy over the true vocabulary, in nats: ``logsumexp(z) - z[y]``.
        entropy: entropy of the renormalised top-K distribution, in nats. None only inside a gate that did not ask
            for it.
        weight: what the gate made of the token; None until the gate has run.
        valid: bool, False at ignored tokens.
        topk: the K in force, ``min(topk, V)``.
        sum_p_squared: ``sum_v p_v ** 2`` over the true vocabulary, for gates that list it in ``needs``; else None.
    """

    ce: Tensor
    entropy: Tensor | None
    weight: Tensor | None
    valid: Tensor
    topk: int
    sum_p_squared: Tensor | None = None

    @property
    def probability(self) -> Tensor:
        """``p_t = exp(-ce)``, the model's probability of the target; meaningless at ignored tokens."""
        return (-self.ce).exp()

    def normalized_entropy(self, entropy_norm: float | None = None) -> Tensor:
        """``h = entropy / entropy_norm``; ``None`` stands for ``ln K``, which puts h in [0, 1]."""
        if self.entropy is None:
            raise ValueError('the gate reads the entropy and does not ask for it: let its `needs` hold "entropy"')
        return self.entropy / (math.log(self.topk) if entropy_norm is None else entropy_norm)

    def reshape(self, shape) -> TokenStats:
        """The same numbers with every tensor viewed as ``shape``."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        shaped = {name: value.reshape(shape) for name, value in values.items() if isinstance(value, Tensor)}
        return TokenStats(**(values | shaped))

"""The table of methods: one row says all that flags, recipes, refusals, pages and documents need to know of a method.

A new method is a gate (:mod:`eaft_megatron.loss.gate`) and a row of :data:`METHODS` or :data:`EAFT_GATES`. Each option
of the row is then a keyword of ``LossSettings``, a flag of ``run`` and ``train``, and a key of a recipe's ``loss:``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from eaft_megatron.loss import base_model_gates, gates, probability_gates
from eaft_megatron.loss.gate import Gate


@dataclasses.dataclass(frozen=True)
class Option:
    """A number, a word or a switch that users give.

    Attributes:
        name: keyword of ``LossSettings``.
        flag: as typed, ``--talr-tau``.
        help: of the flag.
        kind: int, float, str, or bool for a flag without a value.
        metavar: stands for the value in ``--help``.
        default: where the option is not given. None, for an option of a method: the default of its gate.
        argument: of the gate, where it is called otherwise than ``name``.
        choices: the values there are.
        key: in a recipe, where it is called otherwise than ``name``; "": not a recipe's to say.
        same_loss: it changes what the loss costs, not the loss, so a resumed run may have another value.
    """

    name: str
    flag: str
    help: str
    kind: type = float
    metavar: str | None = None
    default: Any = None
    argument: str | None = None
    choices: tuple[str, ...] | None = None
    key: str | None = None
    same_loss: bool = False

    @property
    def destination(self) -> str:
        """The name under which argparse keeps the value."""
        return self.flag.removeprefix("--").replace("-", "_")

    @property
    def recipe_key(self) -> str:
        """Key in a recipe's ``loss:`` section; "" where it has none."""
        return self.name if self.key is None else self.key


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to weight tokens.

    Attributes:
        gate: the class; its arguments are the options.
        weight: of a token, for the documentation's table; Markdown.
        options: what users may choose. Methods may share one.
        source: of the method, for the same table; "" where it is EAFT's paper.
        landscape: what `eaft-megatron landscape` shows of it: name -> arguments of the gate, the percentile being
            the user's; None: nothing. A gate there may need the entropy and the percentiles of the batch, no more.
    """

    gate: type[Gate]
    weight: str
    options: tuple[Option, ...] = ()
    source: str = ""
    landscape: Mapping[str, Mapping[str, Any]] | None = None

    def build(self, values: Mapping[str, Any]) -> Gate:
        """The gate, from option name -> value; what is None or missing is left to the gate's own defaults."""
        given = {option.argument or option.name: values.get(option.name) for option in self.options}
        return self.gate(**{argument: value for argument, value in given.items() if value is not None})


_ENTROPY_NORM = Option(
    "entropy_norm",
    "--eaft-entropy-norm",
    "divisor of the entropy (default: ln K; the authors' code uses 3.0)",
    metavar="NATS",
)
_PERCENTILE = Option(
    "percentile",
    "--eaft-percentile",
    "threshold gate and conflict mask: percentile of the micro-batch (the paper's and the mask's default: 15)",
    metavar="PCT",
)

EAFT_GATES: dict[str, Method] = {
    "linear": Method(
        gates.EAFTGate,
        "`h ** alpha`, `h = H_top20 / ln 20`",
        (
            Option("alpha", "--eaft-alpha", "linear gate: h ** A; the paper also tries 2 and 3 (default: 1)",
                   metavar="A", default=1.0),
            _ENTROPY_NORM,
        ),
        landscape={"linear": {}, "alpha 2": {"alpha": 2.0}, "alpha 3": {"alpha": 3.0}},
    ),
    "sigmoid": Method(
        gates.SigmoidGate, "`sigmoid(30 (h - 0.17))`", (_ENTROPY_NORM,), landscape={"sigmoid": {}}
    ),
    "threshold": Method(
        gates.ThresholdGate,
        "1 where h is above `--eaft-threshold`, or above the `--eaft-percentile`",
        (
            _ENTROPY_NORM,
            Option("threshold", "--eaft-threshold", "threshold gate: train where h > H", metavar="H"),
            _PERCENTILE,
        ),
        landscape={"threshold": {"percentile": 15.0}},
    ),
    "conflict-mask": Method(
        gates.ConflictMaskGate,
        "0 where H and p are both below their 15th percentiles, or both below fixed limits",
        (
            _ENTROPY_NORM,
            _PERCENTILE,
            Option("conflict_entropy", "--eaft-conflict-entropy",
                   "conflict mask with fixed limits: on h (0.17 is what the conflict rate counts)", metavar="H"),
            Option("conflict_probability", "--eaft-conflict-probability",
                   "conflict mask with fixed limits: on p (0.1 is what the conflict rate counts)", metavar="P"),
        ),
        landscape={
            "conflict mask": {"percentile": 15.0},
            "fixed conflict mask": {"conflict_entropy": 0.17, "conflict_probability": 0.1},
        },
    ),
}  # fmt: skip
"""``--eaft-gate`` -> the row; the first one is the default."""

METHODS: dict[str, Method | dict[str, Method]] = {
    "sft": Method(gates.SFTGate, "1", landscape={"sft": {}}),
    "eaft": EAFT_GATES,
    "dft": Method(gates.DFTGate, "`p`", source="arXiv 2508.05629", landscape={"dft": {}}),
    "talr": Method(
        gates.TALRGate,
        "`max(p ** (1 / tau), 0.01)`, tau the median of the sequences' mean losses",
        (
            Option("talr_tau", "--talr-tau", "TALR: temperature (default: median of the sequences' mean loss)",
                   metavar="T", argument="tau"),
            Option("talr_min_weight", "--talr-min-weight", "TALR: floor of the weight (default: 0.01)",
                   metavar="W", default=0.01, argument="min_weight"),
        ),
        source="arXiv 2509.20758",
        landscape={"talr": {}},
    ),
    "flow": Method(
        gates.FLOWGate,
        "`exp(-f / median f)` per sample, f the frozen base model's loss",
        source="arXiv 2502.02797",
        landscape={"flow": {}},
    ),
    "sft-kl": Method(
        gates.SFTKLGate,
        "1, plus `0.5 * k3` to the frozen base model",
        (
            Option("sft_kl_beta", "--sft-kl-beta", "SFT-KL: weight of the KL term (default: 0.5)",
                   metavar="B", default=0.5, argument="beta"),
        ),
        landscape={"sft-kl": {}},
    ),
    "power": Method(
        probability_gates.PowerGate,
        "`p ** q`; for q < 0 at most 10",
        (
            Option("power_exponent", "--power-exponent", "power: q of p ** q; 1 is dft, 0 is sft (default: 1)",
                   metavar="Q", default=1.0, argument="exponent"),
            Option("power_max_weight", "--power-max-weight", "power: limit of the weight for q < 0 (default: 10)",
                   metavar="W", default=10.0, argument="max_weight"),
        ),
        source="arXiv 2510.00526",
        landscape={"power 8": {"exponent": 8.0}, "power 0.5": {"exponent": 0.5}, "power -0.5": {"exponent": -0.5}},
    ),
    "profit": Method(
        probability_gates.ProFitGate,
        "1 where p is at least 0.1, else 0",
        (
            Option("profit_threshold", "--profit-threshold", "ProFit: train where p >= P (default: 0.1)",
                   metavar="P", default=0.1, argument="threshold"),
        ),
        source="arXiv 2601.09195",
        landscape={"profit": {}},
    ),
    "trsft": Method(
        probability_gates.TrSFTGate,
        "`min(1, p / 0.1)`",
        (
            Option("trsft_threshold", "--trsft-threshold", "TrSFT: weight 1 from this p on (default: 0.1)",
                   metavar="P", default=0.1, argument="threshold"),
        ),
        source="arXiv 2512.17636",
        landscape={"trsft": {}},
    ),
    "deft": Method(
        probability_gates.DEFTGate,
        "`p ** sum_v p_v ** 2`",
        source="arXiv 2602.11424",
        landscape={"deft": {}},
    ),
    "asft": Method(
        base_model_gates.ASFTGate,
        "`p`, plus `0.05 * k3` to the frozen base model",
        (
            Option("asft_kl", "--asft-kl", "ASFT: weight of the KL term (default: 0.05)",
                   metavar="L", default=0.05, argument="kl"),
        ),
        source="arXiv 2509.23753",
        landscape={"asft": {}},
    ),
    "psft": Method(
        base_model_gates.PSFTGate,
        "`r` where `r = p / p_base` is below 1.28, else 0",
        (
            Option("psft_clip", "--psft-clip", "PSFT: no gradient from p / p_base = 1 + C on (default: 0.28)",
                   metavar="C", default=0.28, argument="clip"),
        ),
        source="arXiv 2508.17784, against the base",
        landscape={"psft": {}},
    ),
    "stm": Method(
        base_model_gates.STMGate,
        "0 where the frozen base model's `1 / p` is above 2.5, else 1",
        (
            Option("stm_perplexity", "--stm-perplexity", "STM: no token of more perplexity (default: 2.5)",
                   metavar="P", default=2.5, argument="perplexity"),
        ),
        source="arXiv 2501.14315",
        landscape={"stm": {}},
    ),
    "iw-sft": Method(
        base_model_gates.IWSFTGate,
        "`min(exp(mean log p / p_base), 16)` per sequence; `p / p_base` in [0.2, 1.8] per token",
        (
            Option("iw_sft_level", "--iw-sft-level", "iw-SFT: a weight for each (default: sequence)", kind=str,
                   default="sequence", argument="level", choices=("sequence", "token")),
            Option("iw_sft_temperature", "--iw-sft-temperature", "iw-SFT: factor of the mean log-ratio (default: 1)",
                   metavar="T", default=1.0, argument="temperature"),
        ),
        source="arXiv 2507.12856",
        landscape={"iw-sft": {}, "iw-sft token": {"level": "token"}},
    ),
}  # fmt: skip
"""``--loss-type`` -> the row, or the rows among which ``--eaft-gate`` chooses."""


def rows() -> list[tuple[str, str | None, Method]]:
    """(``--loss-type``, ``--eaft-gate`` or None, the method), in the order of the table."""
    listed: list[tuple[str, str | None, Method]] = []
    for loss_type, entry in METHODS.items():
        variants = {None: entry} if isinstance(entry, Method) else entry
        listed += [(loss_type, gate, method) for gate, method in variants.items()]
    return listed


def method_options() -> list[Option]:
    """Every option of every method, each once.

    Raises:
        ValueError: two different options have one name, or one flag.
    """
    options: dict[str, Option] = {}
    for loss_type, _, method in rows():
        for option in method.options:
            same = [other for other in options.values() if option.name == other.name or option.flag == other.flag]
            if any(other != option for other in same):
                raise ValueError(f"{option.flag} ({option.name}) of {loss_type} is another option's name or flag too")
            options[option.name] = option
    return list(options.values())


def markdown_table() -> str:
    """The table of the documentation."""
    lines = ["| `--loss-type` | weight of a token (always detached) | flags | needs |", "|---|---|---|---|"]
    for loss_type, gate, method in rows():
        name = f"`{loss_type}`" if gate is None else f"`{loss_type} --eaft-gate {gate}`"
        if gate == next(iter(EAFT_GATES)):
            name = f"`{loss_type}` (`--eaft-gate {gate}`)"
        source = f" ({method.source})" if method.source else ""
        flags = ", ".join(f"`{option.flag}`" for option in method.options)
        needs = ", ".join(f"side column `{column}`" for column in method.gate.needs_side)
        lines.append(f"| {name}{source} | {method.weight} | {flags} | {needs} |".replace("  ", " "))
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown_table())

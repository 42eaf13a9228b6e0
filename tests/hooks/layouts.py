"""The layouts of a job that are run against one process, and what each needs."""

from __future__ import annotations

import dataclasses

VOCAB = 259
SEQ_LENGTH = 128
EAFT = ("--loss-type", "eaft")
BASE = f"--seq-length {SEQ_LENGTH} --max-position-embeddings {SEQ_LENGTH} --vocab-size {VOCAB - 1}".split()
BASE += f"--true-vocab-size {VOCAB} --global-batch-size 8".split()
THD = ("--sft", "--no-create-attention-mask-in-dataloader")
ROWS = ("--sft-packing", "none", "--no-create-attention-mask-in-dataloader")
LOCAL = ("--transformer-impl", "local")
DISTRIBUTED_OPTIMIZER = ("--use-distributed-optimizer",)
SEQUENCE_PARALLEL = ("--sequence-parallel",)
CHUNKS = ("--eaft-linear-chunk", "20")
HYBRID_SPEC = ("--spec", "megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec")

# The extra head keeps Megatron's own loss, which counts padded columns: as many at every tensor-parallel size.
_EXTRA_HEAD = ("--untie-embeddings-and-output-weights", "--make-vocab-size-divisible-by", "33")
FAMILIES = {  # flags that make another model; a HybridModel's pattern where the weights are that model's own
    "dense": ((), None),
    "mtp": (("--mtp-num-layers", "1", *_EXTRA_HEAD), None),
    "hybrid mtp": (_EXTRA_HEAD, "*-*-*-*-/*-"),  # no GPT checkpoint has its head
    "moe": (
        ("--num-experts", "4", "--moe-router-topk", "2", "--moe-aux-loss-coeff", "0")
        + ("--moe-token-dispatcher-type", "alltoall", "--disable-bias-linear"),
        None,
    ),
}
BLOCKS = 4


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way to run a model of a family; ``packed`` against one process's attention mask, else one row a sample.

    Attributes:
        hybrid: HybridModel's pattern, with its pipeline marks; None for GPTModel.
        since: first release (minor of 0.x) that can do it.
        slow: left to .ci/run: many processes, or another layout covers most of it.
    """

    flags: tuple[str, ...] = ()
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    ranks: int = 1
    family: str = "dense"
    loss: tuple[str, ...] = EAFT
    packed: bool = True
    hybrid: str | None = None
    since: int = 18
    slow: bool = False


def _thd(flags: tuple[str, ...] = (), ranks: int = 1, **options) -> Layout:
    sizes = {name: options.pop(name) for name in ("tp", "pp", "cp", "ep") if name in options}
    if sizes.get("tp", 1) > 1:
        flags += SEQUENCE_PARALLEL
    return Layout((*THD, *flags), sizes, ranks, **options)


def _rows(flags: tuple[str, ...] = (), ranks: int = 1, since: int = 16, **options) -> Layout:
    sizes = {name: options.pop(name) for name in ("tp", "pp", "cp", "ep") if name in options}
    if sizes.get("tp", 1) > 1:
        flags += SEQUENCE_PARALLEL
    return Layout((*ROWS, *flags), sizes, ranks, packed=False, since=since, **options)


_TALR, _MASK = ("--loss-type", "talr"), ("--loss-type", "eaft", "--eaft-gate", "conflict-mask")
_KL = ("--loss-type", "sft-kl")
_INTERLEAVED = ("--num-layers-per-virtual-pipeline-stage", "1")
_RECOMPUTE = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")

LAYOUTS: dict[str, Layout] = {
    "rows": _rows(),
    "rows, CP 2": _rows(ranks=2, cp=2),
    "rows, CP 2, rotary embedding not fused": _rows(("--no-rope-fusion",), ranks=2, cp=2, slow=True),
    "rows, TP 2 x CP 2": _rows(ranks=4, tp=2, cp=2, slow=True),
    "rows, CP 2 x PP 2": _rows(ranks=4, cp=2, pp=2, slow=True),
    "rows, CP 2, percentiles": _rows(ranks=2, cp=2, loss=_MASK, slow=True),
    "rows, CP 2, linear chunks": _rows(CHUNKS, ranks=2, cp=2),
    "THD": _thd(since=17),
    "THD, TP 2": _thd(ranks=2, tp=2, since=17),
    "THD, CP 2": _thd(ranks=2, cp=2),
    "THD, TP 2 x CP 2": _thd(ranks=4, tp=2, cp=2),
    "THD, PP 2": _thd(ranks=2, pp=2),
    "THD, PP 4": _thd(ranks=4, pp=4, slow=True),
    "THD, PP 2 interleaved": _thd(_INTERLEAVED, ranks=2, pp=2),
    "THD, TP 2 x CP 2 x PP 2": _thd(ranks=8, tp=2, cp=2, pp=2, slow=True),
    "THD, DP 2, distributed optimizer": _thd(DISTRIBUTED_OPTIMIZER, ranks=2, since=17),
    "THD, two packs in a micro-batch": _thd(("--micro-batch-size", "2"), since=19),
    "THD, CP 2, two packs in a micro-batch, sft-kl": _thd(
        ("--micro-batch-size", "2"), ranks=2, cp=2, loss=_KL, since=19
    ),
    "THD, full recompute": _thd(_RECOMPUTE, since=17, slow=True),
    "THD, CP 2, linear chunks": _thd(CHUNKS, ranks=2, cp=2, slow=True),
    "THD, TP 2 x CP 2, linear chunks": _thd(CHUNKS, ranks=4, tp=2, cp=2, slow=True),
    "THD, CP 2, sft-kl": _thd(ranks=2, cp=2, loss=_KL),
    "THD, TP 2 x PP 2, sft-kl": _thd(ranks=4, tp=2, pp=2, loss=_KL, slow=True),
    "THD, CP 2, talr": _thd(ranks=2, cp=2, loss=_TALR),
    "THD, CP 2 x PP 2, talr": _thd(ranks=4, cp=2, pp=2, loss=_TALR, slow=True),
    "THD, CP 2, percentiles": _thd(ranks=2, cp=2, loss=_MASK, slow=True),
    "THD, CP 2, iw-sft": _thd(ranks=2, cp=2, loss=("--loss-type", "iw-sft")),
    "rows, CP 2, iw-sft": _rows(ranks=2, cp=2, loss=("--loss-type", "iw-sft"), slow=True),
    "THD, TP 2 x CP 2, iw-sft": _thd(ranks=4, tp=2, cp=2, loss=("--loss-type", "iw-sft"), slow=True),
    "THD, TP 2, asft": _thd(ranks=2, tp=2, loss=("--loss-type", "asft"), slow=True),
    "THD, CP 2, psft": _thd(ranks=2, cp=2, loss=("--loss-type", "psft"), slow=True),
    "THD, PP 2, stm": _thd(ranks=2, pp=2, loss=("--loss-type", "stm"), slow=True),
    "THD, TP 2, deft": _thd(ranks=2, tp=2, loss=("--loss-type", "deft"), slow=True),
    "MTP, THD": _thd(family="mtp"),
    "MTP, THD, TP 2": _thd(ranks=2, tp=2, family="mtp"),
    # The extra head's loss counts by the micro-batch and rank in Megatron itself: without it in the gradient.
    "MTP, THD, CP 2": _thd(ranks=2, cp=2, family="mtp", loss=(*EAFT, "--mtp-loss-scaling-factor", "0")),
    "MTP, THD, PP 2, linear chunks": _thd(CHUNKS, ranks=2, pp=2, family="mtp", slow=True),
    "MoE, rows": _rows(family="moe"),
    "MoE, rows, EP 2": _rows(ranks=2, ep=2, family="moe"),
    "MoE, rows, TP 2 x EP 2, whole experts": _rows(
        ("--expert-tensor-parallel-size", "1"), ranks=2, tp=2, ep=2, family="moe", slow=True
    ),
    "MoE, rows, TP 2 x EP 2": _rows(ranks=4, tp=2, ep=2, family="moe"),
    "MoE, THD, CP 2 x EP 2": _thd(ranks=2, cp=2, ep=2, family="moe"),
    "MoE, THD, TP 2 x CP 2 x EP 2": _thd(ranks=4, tp=2, cp=2, ep=2, family="moe", slow=True),
    "MoE, THD, TP 2 x CP 2 x PP 2 x EP 2": _thd(ranks=8, tp=2, cp=2, pp=2, ep=2, family="moe", slow=True),
    "MoE, rows, EP 2 x PP 2 interleaved": _rows(_INTERLEAVED, ranks=4, pp=2, ep=2, family="moe", slow=True),
    "HybridModel, THD": _thd(hybrid="*-*-*-*-", since=19),
    "HybridModel, rows": _rows(hybrid="*-*-*-*-", since=19),
    "HybridModel, THD, TP 2": _thd(ranks=2, tp=2, hybrid="*-*-*-*-", since=19),
    "HybridModel, THD, CP 2": _thd(ranks=2, cp=2, hybrid="*-*-*-*-", since=19),
    "HybridModel, THD, TP 2 x CP 2": _thd(ranks=4, tp=2, cp=2, hybrid="*-*-*-*-", since=19, slow=True),
    "HybridModel, THD, PP 2": _thd(ranks=2, pp=2, hybrid="*-*-|*-*-", since=19),
    "HybridModel, THD, PP 2 uneven": _thd(ranks=2, pp=2, hybrid="*-*|-*-*-", since=19, slow=True),
    "HybridModel, THD, PP 2 interleaved": _thd(ranks=2, pp=2, hybrid="*-|*-|*-|*-", since=19),
    "HybridModel, THD, DP 2, distributed optimizer": _thd(
        DISTRIBUTED_OPTIMIZER, ranks=2, hybrid="*-*-*-*-", since=19, slow=True
    ),
    "HybridModel, THD, TP 2, linear chunks": _thd(CHUNKS, ranks=2, tp=2, hybrid="*-*-*-*-", since=19),
    "HybridModel, THD, CP 2, talr": _thd(ranks=2, cp=2, loss=_TALR, hybrid="*-*-*-*-", since=19, slow=True),
    "HybridModel, THD, CP 2, percentiles": _thd(ranks=2, cp=2, loss=_MASK, hybrid="*-*-*-*-", since=19, slow=True),
    "HybridModel, MoE, rows, EP 2": _rows(ranks=2, ep=2, family="moe", hybrid="*E*E*E*E", since=19),
    "HybridModel, MTP, THD, TP 2": _thd(ranks=2, tp=2, family="hybrid mtp", hybrid="*-*-*-*-/*-", since=19),
    "HybridModel, MTP, THD, PP 2": _thd(ranks=2, pp=2, family="hybrid mtp", hybrid="*-*-|*-*-/*-", since=19, slow=True),
}

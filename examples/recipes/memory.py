"""Memory per GPU of the paper-sized models, by Megatron-LM's own theoretical report; a Markdown table.

    PYTHONPATH=MEGATRON_LM_CHECKOUT python examples/recipes/memory.py

Weights, gradients and optimizer state, and activations with selective recomputation, are what
``megatron/training/theoretical_memory_usage.py`` computes; that of full recomputation, for which it has no formula, is
ours. It knows no context parallelism: the sequence is given to it already divided.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

from eaft_megatron.models.megatron_config import padded_vocab_size

SEQ_LENGTH, GLOBAL_BATCH = 16384, 64
GIB = 2**30
ROOM = {
    80: 68,
    141: 122,
}  # GiB that a layout may fill: the rest is for CUDA, NCCL, fragmentation and what no formula has


@dataclass(frozen=True)
class Model:
    """Numbers of a config.json."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    tied: bool = False
    head_dim: int = 128


MODELS = {
    "Qwen2.5-7B": Model(3584, 28, 28, 4, 18944, 152064),
    "Qwen2.5-14B": Model(5120, 48, 40, 8, 13824, 152064),
    "Qwen2.5-32B": Model(5120, 64, 40, 8, 27648, 152064),
    "Qwen3-4B": Model(2560, 36, 32, 8, 9728, 151936, tied=True),
    "Qwen3-8B": Model(4096, 36, 32, 8, 12288, 151936),
    "Qwen3-14B": Model(5120, 40, 40, 8, 17408, 151936),
    "Qwen3-32B": Model(5120, 64, 64, 8, 25600, 151936),
    "GLM-4-9B-0414": Model(4096, 40, 32, 2, 13696, 151552),
    "GLM-4-32B-0414": Model(6144, 61, 48, 2, 23040, 151552),
}


def megatron_args(model: Model, gpus: int, tp: int, pp: int, cp: int) -> Namespace:
    """What the report reads of Megatron's arguments."""
    return Namespace(
        hidden_size=model.hidden,
        num_layers=model.layers,
        num_attention_heads=model.heads,
        kv_channels=model.head_dim,
        group_query_attention=True,
        num_query_groups=model.kv_heads,
        ffn_hidden_size=model.ffn,
        padded_vocab_size=padded_vocab_size(model.vocab, tp),
        untie_embeddings_and_output_weights=not model.tied,
        swiglu=True,
        normalization="RMSNorm",
        num_experts=None,
        moe_shared_expert_intermediate_size=None,
        mtp_num_layers=None,
        multi_latent_attention=False,
        seq_length=SEQ_LENGTH // cp,
        micro_batch_size=1,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=None,
        # The distributed optimizer shards over data and context parallel ranks.
        data_parallel_size=gpus // (tp * pp),
        use_distributed_optimizer=True,
    )


def full_recompute_bytes(args: Namespace) -> float:
    """Each layer's input in bf16, one layer's activations while it is computed again, and (PP 1) the logits."""
    tokens = args.seq_length * args.micro_batch_size
    total = 2 * tokens * args.hidden_size * args.num_layers
    total += tokens * args.hidden_size * (18 + 4 * args.ffn_hidden_size / args.hidden_size)
    if args.pipeline_model_parallel_size == 1:
        total += 4 * tokens * (args.hidden_size + args.padded_vocab_size)
    return total / args.tensor_model_parallel_size


def layouts(model: Model, room: float):
    """Every layout that fits, the fewest GPUs first, then the least model parallelism, then the least recomputation."""
    from eaft_megatron.megatron_map import theoretical_memory_usage as report

    for nodes in (1, 2, 4):
        fitting = []
        for tp in (1, 2, 4, 8):
            if model.heads % tp or (model.kv_heads % tp and tp % model.kv_heads):
                continue
            for pp in (1, 2, 4):
                if model.layers % pp:
                    continue
                for cp in (1, 2, 4):
                    gpus = 8 * nodes
                    if gpus % (tp * pp * cp) or GLOBAL_BATCH % (gpus // (tp * pp * cp)):
                        continue
                    args = megatron_args(model, gpus, tp, pp, cp)
                    fixed = report.compute_weight_and_optimizer_memory(args) / GIB
                    selective = report.compute_activation_memory(args, num_microbatches=GLOBAL_BATCH) / GIB
                    for recompute, activations in (
                        ("selective", selective),
                        ("full", full_recompute_bytes(args) / GIB),
                    ):
                        if fixed + activations <= room:
                            rank = (tp * pp * cp, recompute == "full", pp, cp)
                            fitting.append((rank, nodes, tp, pp, cp, recompute, fixed, activations))
        if fitting:
            yield from (layout[1:] for layout in sorted(fitting))
            return


def main() -> None:
    """Print the table."""
    print("| model | GPU | nodes | TP | PP | CP | recompute | weights, gradients, optimizer | activations | sum, GiB |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, model in MODELS.items():
        for size, room in ROOM.items():
            nodes, tp, pp, cp, recompute, fixed, activations = next(layouts(model, room))
            sizes = f"{fixed:.1f} | {activations:.1f} | {fixed + activations:.1f}"
            print(f"| {name} | {size} GB | {nodes} | {tp} | {pp} | {cp} | {recompute} | {sizes} |")


if __name__ == "__main__":
    main()

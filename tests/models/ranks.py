"""What the processes of the multi-process tests do: build, load, run forward and backward by hand, export."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from eaft_megatron.loss.vocab_parallel import vocab_parallel_eaft_loss
from eaft_megatron.models import build_model, load_hf_weights, read_hf_config, save_hf_weights, transformer_config
from eaft_megatron.models import save as save_module
from eaft_megatron.testing.cpu import cpu_standins

SEQUENCE_PARALLEL = ("tied", "qwen3_tied", "glm4_bias")  # which models are run in that way too


@contextmanager
def layout(tp: int = 1, pp: int = 1, vpp: int | None = None):
    """megatron-core on CPU with these parallel sizes."""
    with cpu_standins():
        from eaft_megatron.testing.tiny_gpt import model_parallel

        with model_parallel(tp, pp, vpp):
            yield


def built(hf_dir, tp: int, pp: int, vpp: int | None = None, **overrides) -> list:
    """This rank's chunks, weights loaded."""
    hf_config = read_hf_config(hf_dir)
    config = transformer_config(
        hf_config,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        **({"overlap_p2p_comm": True, "batch_p2p_comm": False} if vpp else {}),
        **overrides,
    )
    chunks = []
    for stage, last in _own_stages(pp, vpp):
        ends = {"pre_process": stage == 0, "post_process": last}
        chunks.append(build_model(hf_config, config, **ends, vp_stage=len(chunks) if vpp else None))
    load_hf_weights(chunks if vpp else chunks[0], hf_dir)
    return chunks


def _own_stages(pp: int, vpp: int | None) -> list[tuple[int, bool]]:
    """(place in the whole pipeline, whether it is the last) of this rank's chunks."""
    from megatron.core import parallel_state

    total = pp * (vpp or 1)
    own = range(parallel_state.get_pipeline_model_parallel_rank(), total, pp)
    return [(stage, stage == total - 1) for stage in own]


def full_logits(local: torch.Tensor, vocab: int) -> torch.Tensor:
    """[b, s, vocab] of [b, s, padded / tp], differentiable; padding rows must have given exactly zero."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    logits = gather_from_tensor_model_parallel_region(local)
    assert not logits[..., vocab:].any(), "padding rows are not zero"
    return logits[..., :vocab]


def run(chunks: list, ids: torch.Tensor, vocab: int, pp: int, losses: list | None = None, backward: bool = True):
    """Forward and backward of the EAFT loss through all stages, point to point by hand.

    The logits on the last stage, None elsewhere. losses: where to put the loss.
    """
    from megatron.core import parallel_state

    ranks = dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
    config, length = chunks[0].config, ids.shape[1]
    shape = (length // (config.tensor_model_parallel_size if config.sequence_parallel else 1), len(ids))
    positions = torch.arange(length).expand_as(ids)
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    stages = _own_stages(pp, len(chunks) if len(chunks) > 1 else None)
    held, logits = [], None
    losses = [] if losses is None else losses
    for chunk, (stage, last) in zip(chunks, stages, strict=True):
        received = None
        if stage > 0:
            received = torch.empty(*shape, config.hidden_size)
            if pp > 1:
                dist.recv(received, ranks[(stage - 1) % pp])
            chunk.set_input_tensor(received.requires_grad_())
        output = chunk(ids, positions, mask)
        if last:
            logits = full_logits(output, vocab).detach()
            output = eaft_loss(output, ids, vocab)
            losses.append(output.item())
        else:
            dist.send(output.detach().contiguous(), ranks[(stage + 1) % pp])
        held.append((stage, last, received, output))
    if backward:
        _backward(held, ranks)
    return logits


def eaft_loss(local: torch.Tensor, ids: torch.Tensor, vocab: int) -> torch.Tensor:
    """The mean over [b, s - 1] predicted tokens; local: [b, s, padded / tp]."""
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    return vocab_parallel_eaft_loss(local[:, :-1], ids[:, 1:], group=group, vocab_size=vocab).mean()


def _backward(held: list, ranks: list[int]) -> None:
    for stage, last, received, output in reversed(held):
        if last:
            _run_backward(output, torch.tensor(1.0))
        else:
            gradient = torch.empty_like(output)
            dist.recv(gradient, ranks[(stage + 1) % len(ranks)])
            _run_backward(output, gradient)
        if stage > 0:
            dist.send(received.grad, ranks[(stage - 1) % len(ranks)])


def _run_backward(output: torch.Tensor, gradient: torch.Tensor) -> None:
    """The engine called directly, as megatron's custom_backward does: Tensor.backward() is itself a function that
    torch function modes handle, so that cpu_standins() would be off while it runs."""
    engine = torch.autograd.Variable._execution_engine
    engine.run_backward((output,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True)


def finish_gradients(chunks: list) -> None:
    """As megatron's finalize_model_grads: sum both copies of a tied embedding, sequence-parallel norms, and the norms
    of query and key, which see each rank's own heads."""
    from megatron.core import parallel_state

    for chunk in chunks:
        tied_end = chunk.share_embeddings_and_output_weights and (chunk.pre_process or chunk.post_process)
        if tied_end and not (chunk.pre_process and chunk.post_process):
            dist.all_reduce(chunk.shared_embedding_or_output_weight().grad, group=parallel_state.get_embedding_group())
        for name, parameter in chunk.named_parameters():
            per_head = "q_layernorm" in name or "k_layernorm" in name
            if per_head or getattr(parameter, "sequence_parallel", False):
                dist.all_reduce(parameter.grad, group=parallel_state.get_tensor_model_parallel_group())


def hf_gradients(chunks: list, hf_config: dict) -> dict[str, torch.Tensor]:
    """Gradients under their Hugging Face names, through the same tables as the weights."""
    pairs = save_module.hf_tensors(chunks, hf_config, value=lambda parameter: parameter.grad)
    return {name: tensor.clone() for part in pairs for name, tensor in part}


def answer(hf_dir, tp: int, pp: int, vpp: int | None, ids: torch.Tensor, output=None, **overrides) -> tuple:
    """(logits or None, gradients, losses) of one model in an existing layout; exports it to output."""
    hf_config = read_hf_config(hf_dir)
    chunks = built(hf_dir, tp, pp, vpp, **overrides)
    losses: list[float] = []
    logits = run(chunks, ids, hf_config["vocab_size"], pp, losses)
    finish_gradients(chunks)
    gradients = hf_gradients(chunks, hf_config)
    if output is not None:
        save_hf_weights(chunks, hf_dir, output)
    return logits, gradients, losses


def all_answers(folders: dict, tp: int, pp: int, ids: torch.Tensor, output: Path) -> dict[str, tuple]:
    """One process's answers for every tiny model in one layout, plus extra ways of running the tied one."""
    answers = {}
    with layout(tp, pp):
        for name, folder in folders.items():
            answers[name] = answer(folder, tp, pp, None, ids, output / name)
        if tp > 1:
            even = ids[:, :16]  # the sequence is split over the ranks
            for name in SEQUENCE_PARALLEL:
                answers[f"{name} sequence_parallel"] = answer(folders[name], tp, pp, None, even, sequence_parallel=True)
            chunks = built(folders["tied"], tp, pp, params_dtype=torch.bfloat16)
            save_hf_weights(chunks, folders["tied"], output / "bfloat16")
        if pp > 1:
            with failing_writes_on_rank_1():
                answers["failed_export"] = failure_of_export(folders["tied"], tp, pp, output / "failed")
    if (tp, pp) == (1, 2):
        with layout(tp, pp, 2):
            answers["interleaved"] = answer(folders["tied"], tp, pp, 2, ids, output / "interleaved")
    return answers


@contextmanager
def failing_writes_on_rank_1():
    flush = save_module.SafetensorsWriter.flush

    def full_disk(self):
        raise OSError("no space left")

    if dist.get_rank() == 1:
        save_module.SafetensorsWriter.flush = full_disk
    try:
        yield
    finally:
        save_module.SafetensorsWriter.flush = flush


def failure_of_export(hf_dir, tp: int, pp: int, output) -> str:
    try:
        save_hf_weights(built(hf_dir, tp, pp), hf_dir, output)
    except RuntimeError as error:
        return str(error)
    return "no error"

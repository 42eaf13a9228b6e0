"""The loop: train_step, evaluate and evaluate_and_print_results found as module globals, like Megatron-LM's."""

import math

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from eaft_megatron.testing.tiny_gpt import SEQ_LENGTH, global_batch, micro_batches

from .global_vars import get_args
from .initialize import initialize_megatron


def get_tensorboard_writer():
    return None


def get_wandb_writer():
    return None


def is_last_rank():
    return torch.distributed.get_rank() == torch.distributed.get_world_size() - 1


def print_rank_last(message):
    if is_last_rank():
        print(message, flush=True)


def pretrain(train_valid_test_dataset_provider, model_provider, model_type, forward_step_func, args_defaults={}):  # noqa: B006
    initialize_megatron(args_defaults=args_defaults)
    model, optimizer, _ = setup_model_and_optimizer(model_provider, model_type)
    steps = get_args().train_iters
    dataset = train_valid_test_dataset_provider([steps * get_args().global_batch_size, 0, 0])[0]
    from_tiny_gpt = not getattr(get_args(), "sft_data", None)
    loader = None if dataset is None else iter(build_pretraining_data_loader(dataset, 0))
    for iteration in range(steps):
        batches = iter(micro_batches(global_batch(iteration))) if from_tiny_gpt else loader
        report = train_step(forward_step_func, batches, model, optimizer)
        line = " | ".join(f"{name}: {value:.6E}" for name, value in report.items())
        print_rank_last(f" iteration {iteration + 1:8d}/{get_args().train_iters:8d} | {line} |")
    for module in model:
        module.eval()
    sets = [iter(micro_batches(global_batch(100 + number))) for number in range(2)]
    if not get_args().multiple_validation_sets:
        sets = sets[0]
    evaluate_and_print_results("the end", forward_step_func, sets, model, get_args().train_iters)


def setup_model_and_optimizer(model_provider_func, model_type):
    model, optimizer = model_provider_func()
    return model, optimizer, None  # no schedule of the learning rate


def build_pretraining_data_loader(dataset, consumed_samples):
    size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    own = torch.utils.data.Subset(dataset, range(consumed_samples + rank, len(dataset), size))
    return torch.utils.data.DataLoader(own, batch_size=get_args().micro_batch_size)


def train_step(forward_step_func, data_iterator, model, optimizer):
    for module in model:
        module.train()
        module.zero_grad_buffer()
    optimizer.zero_grad()
    reports = _run(forward_step_func, data_iterator, model, forward_only=False)
    optimizer.step()
    return _mean(reports)


def evaluate(forward_step_func, data_iterator, model):
    reports = []
    with torch.no_grad():
        for _ in range(get_args().eval_iters):
            reports += _run(forward_step_func, data_iterator, model, forward_only=True)
    return _mean(reports), None, False


def evaluate_and_print_results(prefix, forward_step_func, data_iterator, model, iteration, write_to_tensorboard=True):
    several = get_args().multiple_validation_sets
    for index, iterator in enumerate(data_iterator if several else [data_iterator]):
        suffix = f"-{index}" if several else ""
        losses, _, _ = evaluate(forward_step_func, iterator, model)
        line = " | ".join(
            f"{name} value: {v:.6E} | {name} PPL: {math.exp(min(20, v)):.6E}" for name, v in losses.items()
        )
        print_rank_last(f" validation{suffix} loss at {prefix} | {line} | ")


def _run(forward_step_func, data_iterator, model, forward_only):
    return get_forward_backward_func()(
        forward_step_func=forward_step_func,
        data_iterator=data_iterator,
        model=model[0],
        num_microbatches=8 // parallel_state.get_data_parallel_world_size(),
        seq_length=SEQ_LENGTH,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def _mean(reports):
    """As 0.12 (a tuple, reduced already) and 0.13 on (a tensor of one or two numbers) average what was reported."""
    means = {}
    for name in reports[0]:
        values = [report[name] for report in reports]
        if isinstance(values[0], tuple):
            means[name] = float(sum(value[0] for value in values) / sum(value[1] for value in values))
        elif values[0].numel() == 1:
            means[name] = float(torch.cat([value.view(-1) for value in values]).mean())
        else:
            total = torch.vstack(values).sum(dim=0)
            torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
            means[name] = float(total[0] / total[1])
    return means

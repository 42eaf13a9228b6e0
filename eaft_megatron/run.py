"""Run a Megatron-LM training script, untouched, with ``--loss-type`` among its flags.

    torchrun ... -m eaft_megatron.run pretrain_gpt.py <its flags> --loss-type eaft

Nothing in the script or its checkout changes: the flags, the loss and the metrics are put into megatron-core and
megatron.training before the script starts. ``--loss-type sft``, the default, leaves Megatron's own loss alone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType

from eaft_megatron.megatron_map import training_loop_missing
from eaft_megatron.ranks import world_of_one

_USAGE = "python -m eaft_megatron.run [our options] SCRIPT [the script's flags] [--loss-type eaft ...]"


def main(argv: list[str] | None = None) -> int:
    """Run the script as ``__main__``; returns the exit code. Wrong flags come without a traceback."""
    try:
        _run(*_parse(sys.argv[1:] if argv is None else argv))
        return 0
    except (ValueError, FileNotFoundError) as error:
        if not _raised_here(error):
            raise
        print(f"[rank {os.environ.get('RANK', '0')}] {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1


def _raised_here(error: BaseException) -> bool:
    """Whether the error is ours, and its message says all there is to say."""
    frames = traceback.extract_tb(error.__traceback__)
    return Path(frames[-1].filename).is_relative_to(Path(__file__).parent)


def _parse(argv: list[str]) -> tuple[argparse.Namespace, Path, list[str]]:
    """Our own options stand before the script, its flags behind it."""
    parser = argparse.ArgumentParser(prog="eaft_megatron.run", usage=_USAGE, allow_abbrev=False)
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto", help="cpu: gloo, CUDA calls stood in for")
    parser.add_argument(
        "--transformer-engine",
        choices=["installed", "standin"],
        default="installed",
        help="standin, with --device cpu: plain torch in its place, for its layer specs, CP, THD and experts",
    )
    parser.add_argument("script", type=Path, help="a script that calls megatron.training.pretrain")
    parser.add_argument("flags", nargs=argparse.REMAINDER)
    options = parser.parse_args(argv)
    if options.transformer_engine == "standin" and options.device != "cpu":
        raise ValueError(
            "--transformer-engine standin is for --device cpu: give that too, or install Transformer Engine"
        )
    if not options.script.is_file():
        raise FileNotFoundError(f"no such script: {options.script} (usage: {_USAGE})")
    return options, options.script, options.flags


def _run(options: argparse.Namespace, script: Path, flags: list[str]) -> None:
    signal.signal(signal.SIGUSR1, _pass_to_megatron)
    sys.argv = [str(script), *flags]
    sys.path[0] = str(script.resolve().parent)  # as a direct run has it: the checkout before what is installed
    _check_megatron()
    from eaft_megatron.hooks import rebind_megatron
    from eaft_megatron.hooks.prepared_source import PreparedSource

    with contextlib.ExitStack() as stack:
        stack.enter_context(world_of_one())
        if options.transformer_engine == "standin":  # before anything imports megatron-core, which looks for it then
            from eaft_megatron.testing.te_standin import transformer_engine_standin

            stack.enter_context(transformer_engine_standin())
        if options.device == "cpu":
            from eaft_megatron.testing.cpu_script import script_standins

            stack.enter_context(script_standins())
        rebind_megatron(PreparedSource())
        try:
            runpy.run_path(str(script), run_name="__main__")
        except argparse.ArgumentError as error:  # the script's own extra flags come after ours
            _explain_taken_flag(error)
            raise


def _pass_to_megatron(number: int, frame: FrameType | None) -> None:
    """SIGUSR1 asks Megatron to save and stop, once its --exit-signal-handler listens to SIGTERM; before, nothing.

    megatron-core 0.16 on lets faulthandler have SIGTERM at import, so a SIGTERM that comes early would kill.
    """
    handler = signal.getsignal(signal.SIGTERM)
    if callable(handler):
        handler(signal.SIGTERM, frame)


def _check_megatron() -> None:
    if (name := training_loop_missing()) is not None:
        raise ValueError(
            f"no {name} beside the script or installed: the script must lie in a Megatron-LM checkout, or PYTHONPATH "
            "name one"
        )


def _explain_taken_flag(error: argparse.ArgumentError) -> None:
    from eaft_megatron.hooks import add_eaft_arguments
    from eaft_megatron.hooks.megatron_lm import taken_flag_message

    ours = add_eaft_arguments(argparse.ArgumentParser(add_help=False))
    for flag in ours._option_string_actions:
        if flag in str(error).replace(",", " ").replace(":", " ").split():
            raise ValueError(taken_flag_message(flag)) from error


if __name__ == "__main__":
    sys.exit(main())

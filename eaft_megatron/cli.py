"""``eaft-megatron VERB ...``: the command line."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import shlex
import sys

from eaft_megatron._version import __version__

_PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton", "transformers", "datasets", "safetensors")


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit code. Errors a user can mend come without a traceback."""
    parser = argparse.ArgumentParser(prog="eaft-megatron", description=__doc__)
    parser.add_argument("--version", action="version", version=f"eaft_megatron {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    verbs.add_parser("info", help="versions of this package and of what it works with, for a bug report")
    _add_convert(verbs.add_parser("convert", help="Hugging Face folder <-> Megatron-LM checkpoint, for any TP x PP"))
    gguf = verbs.add_parser("gguf-to-hf", help="a Llama GGUF file as a (dequantised) Hugging Face folder")
    gguf.add_argument("gguf_file")
    gguf.add_argument("output_dir")
    args = parser.parse_args(argv)
    try:
        if args.verb == "info":
            print("\n".join(_info()))
        elif args.verb == "convert":
            _convert(args)
        else:
            from eaft_megatron.models.gguf import gguf_to_hf

            gguf_to_hf(args.gguf_file, args.output_dir)
    except (ValueError, OSError) as error:
        print(f"eaft-megatron {args.verb}: {error}", file=sys.stderr)
        return 1
    return 0


def _add_convert(parser: argparse.ArgumentParser) -> None:
    directions = parser.add_subparsers(dest="direction", metavar="DIRECTION", required=True)
    forth = directions.add_parser("to-megatron", help="write what pretrain_gpt.py loads with --load DIR --finetune")
    forth.add_argument("hf_dir", help="a local Hugging Face folder: config.json, *.safetensors, tokenizer")
    forth.add_argument("megatron_dir", help="the folder to write")
    forth.add_argument(
        "--transformer-impl",
        choices=["transformer_engine", "local"],
        default="transformer_engine",
        help="which implementation the printed flags ask for; the weights fit both",
    )
    back = directions.add_parser("to-hf", help="write what transformers loads with from_pretrained")
    back.add_argument("megatron_dir", help="what to-megatron wrote, a training run's --save folder, or an iter_NNNNNNN")
    back.add_argument("hf_dir", help="the folder to write")
    back.add_argument("--hf-config", metavar="DIR", help="Hugging Face folder of the model (default: MEGATRON_DIR/hf)")
    for direction in (forth, back):
        direction.add_argument("--check", action="store_true", help="read all of it back and compare it bit by bit")


def _convert(args: argparse.Namespace) -> None:
    from eaft_megatron.models.convert import convert_to_hf, convert_to_megatron

    if args.direction == "to-hf":
        convert_to_hf(args.megatron_dir, args.hf_dir, hf_config_dir=args.hf_config, check=args.check, progress=True)
        print(f"{args.hf_dir} is written")
        return
    record = convert_to_megatron(
        args.hf_dir, args.megatron_dir, transformer_impl=args.transformer_impl, check=args.check, progress=True
    )
    print(f"{args.megatron_dir} is written")
    if record["pretrain_gpt_flags"] is None:
        print(f"pretrain_gpt.py cannot build this model: {record['flags_refused']}")
    else:
        print("flags for pretrain_gpt.py:")
        print(shlex.join(["--load", args.megatron_dir, "--finetune", *record["pretrain_gpt_flags"]]))
        print(f"and with eaft_megatron.run: --true-vocab-size {record['true_vocab_size']}")


def _info() -> list[str]:
    lines = [f"eaft_megatron {__version__}", f"python {sys.version.split()[0]}"]
    for name in _PACKAGES:
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} not installed")
    return [*lines, f"apex {_apex()}", *_devices()]


def _apex() -> str:
    """NVIDIA's Apex, or the unrelated package that has its name on PyPI."""
    if importlib.util.find_spec("apex") is None:
        return "not installed"
    if importlib.util.find_spec("apex.optimizers") is None:
        return "is not NVIDIA's Apex but another project of that name from PyPI: uninstall it"
    return "installed (NVIDIA's)"


def _devices() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return ["no CUDA device"]
    return [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())]


if __name__ == "__main__":
    sys.exit(main())

"""From files of conversations to a prepared folder: read, render, tokenize, mask, cut, pack.

Memory stays bounded: the parent reads the input in small batches, a few of which are in the hands of worker processes
at any time, and writes what comes back, in the order of the input. The result does not depend on the number of workers.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from eaft_megatron._version import __version__
from eaft_megatron.data.arrow import ShardWriter
from eaft_megatron.data.encoding import encode_all, load_tokenizer
from eaft_megatron.data.prepare_options import SPLITS, PrepareOptions
from eaft_megatron.data.prepared import (
    FORMAT_VERSION,
    MANIFEST,
    ROW_SCHEMA,
    PreparedData,
    read_manifest,
    template_hash,
    tokenizer_hash,
    write_manifest,
    write_packing,
)
from eaft_megatron.data.sources import Source, open_sources
from eaft_megatron.data.tally import PART_COUNTS, Tally
from eaft_megatron.files import replace_folder


def prepare(
    inputs: list[str],
    tokenizer_name: str,
    output: str | os.PathLike,
    options: PrepareOptions,
    *,
    chat_template: str | os.PathLike | None = None,
    dataset_split: str | None = None,
    dataset_config: str | None = None,
    num_workers: int = 1,
    overwrite: bool = False,
    progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """Prepare ``inputs`` into the folder ``output``.

    Idempotent: where the folder holds just this already, nothing is done. Interrupted at any moment it leaves
    ``output`` as it was, and a folder ``output.incomplete`` that the next run removes. Of two at once, one is refused.

    Args:
        inputs: files (JSONL, JSON, Parquet), folders or globs of them, or names for ``datasets.load_dataset``.
        tokenizer_name: what ``AutoTokenizer.from_pretrained`` takes.
        options: see :class:`PrepareOptions`.
        chat_template: a file with a template to take instead of the tokenizer's own.
        dataset_split, dataset_config: of a ``datasets`` source.
        num_workers: processes that render and tokenize.
        overwrite: replace a folder that holds something else.
        progress: show a bar.

    Returns:
        The manifest of each part: {"train": ...}, and "valid" and "test" where they were asked for.

    Raises:
        FileNotFoundError: no such input.
        ValueError: a bad row (file and line in the message), a tokenizer that cannot do it, nothing left to train on,
            or an output folder that holds something else.
    """
    output = _checked_output(Path(output), overwrite)
    tokenizer = load_tokenizer(tokenizer_name)
    if chat_template is not None:
        if not Path(chat_template).is_file():
            raise FileNotFoundError(f"--chat-template: no such file: {chat_template}")
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
    sources = open_sources(inputs, split=dataset_split, config=dataset_config)
    request = _request(sources, tokenizer, str(tokenizer_name), options)
    with _whole_or_not_at_all(output) as new:
        done = _already_there(output, options, request, overwrite)
        if done is not None:
            return done
        folder = new()
        parts = {name: folder if options.splits == ("train",) else folder / name for name in options.splits}
        tally = Tally(options)
        with ExitStack() as stack:
            writers = {
                name: stack.enter_context(ShardWriter(part / "rows", ROW_SCHEMA)) for name, part in parts.items()
            }
            for encoded in encode_all(sources, tokenizer, options, num_workers, progress):
                for split, batch in tally.add(encoded):
                    writers[split].write(batch)
        manifests = {}
        for name, part in parts.items():
            manifest = _manifest(name, writers[name].files, tally, request)
            if options.pack:
                lengths = np.concatenate(tally.lengths[name])
                manifest["packing"] = write_packing(part, lengths, options.seq_length, options.pad_to_multiple_of)
            write_manifest(part, manifest)
            manifests[name] = manifest
    return manifests


def prepare_in_memory(file: str | os.PathLike, tokenizer: Any, options: PrepareOptions) -> PreparedData:
    """What ``prepare`` would write for one file, in memory: for data that fits there, and is not packed or split.

    Args:
        file: JSONL, JSON or Parquet.
        tokenizer: a transformers tokenizer ("fast").
        options: with ``pack`` False and without fractions.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a bad row (file and line in the message), or no row left to train on.
    """
    assert not options.pack and options.splits == ("train",)
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such file")
    sources = open_sources([str(file)])
    tally = Tally(options)
    encoded = encode_all(sources, tokenizer, options, num_workers=1, progress=False)
    batches = [batch for rows in encoded for _, batch in tally.add(rows)]
    request = _request(sources, tokenizer, str(tokenizer.name_or_path), options)
    try:
        manifest = _manifest("train", [], tally, request)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return PreparedData.in_memory(Path(file), manifest, batches)


def _request(sources: list[Source], tokenizer: Any, tokenizer_name: str, options: PrepareOptions) -> dict[str, Any]:
    """What decides the output, for the manifest."""
    return {
        "inputs": [{"name": source.name, "fingerprint": source.fingerprint()} for source in sources],
        "tokenizer": {
            "name": tokenizer_name,
            "sha256": tokenizer_hash(tokenizer),
            "chat_template_sha256": template_hash(tokenizer.chat_template),
        },
        "options": dataclasses.asdict(options),
    }


def repack(folder: str | os.PathLike, seq_length: int, pad_to_multiple_of: int = 1) -> dict[str, Any]:
    """Pack the rows of a prepared folder anew; rows and columns stay untouched. Returns the new manifest."""
    data = PreparedData(folder)
    before = data.manifest["packing"]
    packing = write_packing(data.path, data.lengths, seq_length, pad_to_multiple_of)
    manifest = {**data.manifest, "packing": packing}
    write_manifest(data.path, manifest)
    if before is not None and before["file"] != packing["file"]:
        (data.path / before["file"]).unlink(missing_ok=True)
    return manifest


def _already_there(output: Path, options: PrepareOptions, request: dict, overwrite: bool) -> dict | None:
    """The manifests, if the folder holds what is asked for; None if it is free."""
    if overwrite or not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    parts = {name: output if options.splits == ("train",) else output / name for name in options.splits}
    try:
        manifests = {name: read_manifest(part) for name, part in parts.items()}
    except (ValueError, FileNotFoundError):
        raise ValueError(
            f"--output: {output} exists and is not what this command would make; name another folder, or --overwrite"
        ) from None
    wanted = _content(json.loads(json.dumps(request)))
    for manifest in manifests.values():
        present = _content(manifest)
        differing = [f"{key} {present[key]}, now {wanted[key]}" for key in wanted if present.get(key) != wanted[key]]
        packing = manifest["packing"]
        if not differing and packing is not None and packing["seq_length"] != options.seq_length:
            differing = [f"and packed anew since, for {packing['seq_length']}"]
        if differing:
            raise ValueError(
                f"--output: {output} was prepared otherwise ({'; '.join(differing)}): name another folder, or "
                "--overwrite"
            )
    return manifests


def _content(request: dict[str, Any]) -> dict[str, Any]:
    """What decides the output, without the names under which it was found."""
    tokenizer = {f"tokenizer {key}": value for key, value in request["tokenizer"].items() if key != "name"}
    return {"inputs": [source["fingerprint"] for source in request["inputs"]], **tokenizer, **request["options"]}


def _checked_output(output: Path, overwrite: bool) -> Path:
    """``output`` without links and dots; ``ValueError`` where no folder can be put, or more than ours would be lost."""
    output = output.resolve()
    if output.is_file() or os.path.ismount(output):
        raise ValueError(f"--output {output}: a file or a mount point cannot be replaced; name a folder inside it")
    ours = {MANIFEST, "rows", "columns", *SPLITS}
    if overwrite and output.is_dir():
        foreign = [e.name for e in output.iterdir() if e.name not in ours and not e.name.startswith(("packing-", "."))]
        if foreign:
            raise ValueError(f"--overwrite: {output} also holds {foreign[0]}, which is not ours: name another folder")
    return output


@contextmanager
def _whole_or_not_at_all(output: Path) -> Iterator[Callable[[], Path]]:
    """A function that makes a folder to write in, which takes the name ``output`` once everything has gone well."""
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = output.with_name(f"{output.name}.incomplete")
    made = False

    def new() -> Path:
        nonlocal made
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        made = True
        return folder

    lock = output.with_name(f".{output.name}.lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"--output: another `prepare` is writing {output}") from None
        try:
            yield new
            if made:
                replace_folder(folder, output)
        finally:
            if made:
                shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)


def _manifest(part: str, files: list[dict[str, Any]], tally: Tally, request: dict) -> dict[str, Any]:
    """What a part holds, not packed yet; ``ValueError`` where it holds nothing."""
    counts = dict(tally.input) | {name: tally.parts[part][name] for name in PART_COUNTS}
    if not tally.lengths[part]:
        raise ValueError(
            f"no row of the {part} part has a token to train on within {tally.options.seq_length + 1} tokens: "
            + ", ".join(f"{name} {value}" for name, value in counts.items())
            + (f"; first error: {tally.errors[0]}" if tally.errors else "")
        )
    lengths = np.concatenate(tally.lengths[part])
    return {
        "format_version": FORMAT_VERSION,
        "eaft_megatron": __version__,
        "part": part,
        **json.loads(json.dumps(request)),
        "rows": int(lengths.size),
        "max_token_id": tally.max_token_id[part],
        "longest_row": int(lengths.max()),
        "counts": counts,
        "errors": tally.errors,
        "files": files,
        "packing": None,
    }

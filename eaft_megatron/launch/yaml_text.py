"""YAML as people mean it: where a text is wanted, a number is the characters that were typed.

YAML 1.1 reads 24:00:00 in base 60 (86400), 010 in base 8 and 1.10 as 1.1. Here a colon makes a text, and every number
remembers its spelling: ``time: 24:00:00``, ``account: 0123`` and ``environment: {VERSION: 1.10}`` keep theirs.
"""

from __future__ import annotations

from typing import Any

import yaml


class _Int(int):
    text: str


class _Float(float):
    text: str


class _Loader(yaml.SafeLoader):
    """SafeLoader without numbers in base 60, and with numbers that remember their spelling."""


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int | str:
    if ":" in node.value:
        return node.value
    number = _Int(loader.construct_yaml_int(node))
    number.text = node.value
    return number


def _float(loader: _Loader, node: yaml.ScalarNode) -> float | str:
    if ":" in node.value:
        return node.value
    number = _Float(loader.construct_yaml_float(node))
    number.text = node.value
    return number


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)


def load_yaml(text: str) -> Any:
    """The document; its numbers compare and compute as numbers. Raises ``yaml.YAMLError``."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506  a SafeLoader


def as_written(value: Any) -> str:
    """A number as it was spelled in the document; anything else by ``str``."""
    return value.text if isinstance(value, (_Int, _Float)) else str(value)


def plain(value: Any) -> Any:
    """The same with builtin numbers throughout, which can be written as YAML or JSON again."""
    if isinstance(value, dict):
        return {plain(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    if isinstance(value, _Int):
        return int(value)
    return float(value) if isinstance(value, _Float) else value

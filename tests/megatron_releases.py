"""A release of Megatron-LM as its source says it, without importing anything: what a module holds, what it takes."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Definition(NamedTuple):
    """Where a name leads: ``node`` in ``module``; a module has none."""

    module: str
    node: ast.AST | None


class Parameters(NamedTuple):
    """Names in order, and whether any others are taken (``**kwargs``)."""

    names: tuple[str, ...]
    open: bool


class Source:
    """The Python files of one tag, branch or commit of a clone."""

    def __init__(self, clone: Path, revision: str) -> None:
        self._clone, self._revision = clone, revision
        self._files = set(self._git("ls-tree", "-r", "--name-only", revision, "megatron").split())

    def _git(self, *arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(self._clone), *arguments], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{self._clone}, {self._revision}: {done.stderr.strip()}")
        return done.stdout

    @functools.cached_property
    def release(self) -> tuple[int, int]:
        """(major, minor), as megatron-core's own package_info says."""
        text = self._git("show", f"{self._revision}:megatron/core/package_info.py")
        major, minor = (int(re.search(rf"^{name} = (\d+)", text, re.MULTILINE)[1]) for name in ("MAJOR", "MINOR"))
        return major, minor

    def _path(self, module: str) -> str | None:
        stem = module.replace(".", "/")
        paths = (f"{stem}.py", f"{stem}/__init__.py", f"{stem}.cpp")
        return next((path for path in paths if path in self._files), None)

    def has_module(self, module: str) -> bool:
        """Whether there is such a file or folder."""
        return self._path(module) is not None or any(
            path.startswith(module.replace(".", "/") + "/") for path in self._files
        )

    @functools.cache  # noqa: B019  a Source lives as long as its test
    def _names(self, module: str) -> dict[str, Definition | tuple[str, str]]:
        """What a module's statements bind: a definition, or (module, name) that it is imported from."""
        path = self._path(module)
        names: dict[str, Definition | tuple[str, str]] = {}
        if path is None or not path.endswith(".py"):
            return names
        for node in _statements(ast.parse(self._git("show", f"{self._revision}:{path}")).body):
            if isinstance(node, ast.ImportFrom):
                source = _imported_from(module, path, node)
                for alias in node.names:
                    names.setdefault(
                        f"* {source}" if alias.name == "*" else alias.asname or alias.name, (source, alias.name)
                    )
            else:
                for name in _bound(node):
                    names.setdefault(name, Definition(module, node))
        return names

    def _follow(self, module: str, name: str, seen: frozenset = frozenset()) -> Definition | None:
        """Where a name in a module leads, through imports."""
        if (module, name) in seen or not self.has_module(module):
            return None
        seen |= {(module, name)}
        names = self._names(module)
        held = names.get(name)
        if isinstance(held, Definition):
            return held
        if held is not None:
            # What comes from elsewhere, torch say, is bound here all the same.
            return self._follow(*held, seen) or (
                None if held[0].startswith("megatron") else Definition(module, ast.Pass())
            )
        if self.has_module(f"{module}.{name}"):
            return Definition(f"{module}.{name}", None)
        starred = (self._follow(source, name, seen) for key, (source, *_) in names.items() if key.startswith("* "))
        return next((place for place in starred if place), None)

    def find(self, module: str, dotted: str = "") -> Definition | None:
        """Where ``dotted`` of a module is defined: base classes and submodules included. None: nowhere."""
        if not self.has_module(module):
            return None
        place: Definition | None = Definition(module, None)
        for part in dotted.split(".") if dotted else ():
            if place is None:
                return None
            if place.node is None:
                place = self._follow(place.module, part)
            elif isinstance(place.node, ast.ClassDef):
                place = self._member(place, part)
            else:
                return None
        return place

    def _member(self, owner: Definition, name: str) -> Definition | None:
        if not isinstance(owner.node, ast.ClassDef):
            return None
        for node in _statements(owner.node.body):
            if name in _bound(node):
                return Definition(owner.module, node)
        return next((member for base in self._bases(owner) if (member := self._member(base, name))), None)

    def _bases(self, owner: Definition) -> Iterator[Definition]:
        for base in getattr(owner.node, "bases", ()):
            place = self.find(owner.module, ast.unparse(base)) if isinstance(base, (ast.Name, ast.Attribute)) else None
            if place is not None:
                yield place

    def parameters(self, place: Definition) -> Parameters | None:
        """What a function or a class's constructor takes. None: it is neither."""
        if isinstance(place.node, ast.FunctionDef):
            arguments = place.node.args
            names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
            return Parameters(tuple(names), arguments.kwarg is not None)
        if isinstance(place.node, ast.ClassDef):
            constructor = self._member(place, "__init__")
            return self.parameters(constructor) if constructor else Parameters(tuple(self._fields(place)), False)
        return None

    def _fields(self, owner: Definition) -> Iterator[str]:
        """Of a dataclass, its bases' first."""
        for base in self._bases(owner):
            yield from self._fields(base)
        for node in getattr(owner.node, "body", ()):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                yield node.target.id


def _imported_from(module: str, path: str, node: ast.ImportFrom) -> str:
    package = module.split(".") if path.endswith("__init__.py") else module.split(".")[:-1]
    base = package[: len(package) - node.level + 1] if node.level else []
    return ".".join([*base, *([node.module] if node.module else [])])


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those of a body, and of every if, try, with and else in it."""
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            for field in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler.body)


def _bound(node: ast.AST) -> Iterator[str]:
    """Names that a definition, an assignment or a plain import binds."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, ast.Import):
        yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))

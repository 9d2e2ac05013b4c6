"""RosSources: what the Python sources of a ROS 2 release define, found out by reading them, without an installation."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path

#: How far a name is followed through imports: more is a circle.
_IMPORTS = 8


class RosSources:
    """The sources of one release: a folder in which those of its packages lie, at any depth."""

    def __init__(self, folder: Path) -> None:
        """Find the packages; nothing is imported."""
        self.folder = folder
        self.release = folder.name

    @cached_property
    def _packages(self) -> dict[str, Path]:
        """The folder of each Python package by its name; where there are two, the one that lies higher."""
        found = sorted(self.folder.rglob("__init__.py"), key=lambda path: len(path.parts), reverse=True)
        return {path.parent.name: path.parent for path in found if not (path.parent.parent / "__init__.py").exists()}

    @cached_property
    def _interfaces(self) -> set[tuple[str, str]]:
        """Every (module, name) of a message or service: `("std_msgs.msg", "String")`."""
        return {
            (f"{path.parent.parent.name}.{kind}", path.stem)
            for kind in ("msg", "srv")
            for path in self.folder.rglob(f"{kind}/*.{kind}")
        }

    def has_package(self, package: str) -> bool:
        """Return whether the sources of a package are there: a Python one, or one of messages and services."""
        return package in self._packages or any(module.startswith(f"{package}.") for module, _ in self._interfaces)

    def has_name(self, module: str, name: str) -> bool:
        """Return whether `from module import name` works."""
        if (module, name) in self._interfaces:
            return True
        found = self._module(module)
        return found is not None and (name in found.names or self._module(f"{module}.{name}") is not None)

    def members(self, module: str, name: str) -> set[str]:
        """Return the names that a class, or its bases in these sources, give their objects; empty where it is none."""
        return {member for each in self._lineage(module, name) for member in _own_members(each)}

    def takes(self, module: str, path: str, keyword: str) -> bool:
        """Return whether a function, class or method (`Node.create_timer`) takes a keyword argument."""
        name, _, method = path.partition(".")
        found = self._find(module, name)
        if found is None:
            return False
        if isinstance(found[1], ast.FunctionDef):
            return keyword in _parameters(found[1])
        lineage = list(self._lineage(module, name))
        for each in lineage:
            functions = [part for part in each.body if isinstance(part, ast.FunctionDef)]
            for function in (
                part for part in functions if part.name in ({method} if method else {"__init__", "__new__"})
            ):
                if keyword in _parameters(function):
                    return True
        # QoSProfile takes any keyword and looks at those that are its properties.
        open_ended = any(
            isinstance(part, ast.FunctionDef) and part.name == "__init__" and part.args.kwarg
            for each in lineage[:1]
            for part in each.body
        )
        return not method and open_ended and keyword in self.members(module, name)

    def _lineage(self, module: str, name: str) -> Iterator[ast.ClassDef]:
        """Yield a class and its bases, as far as they are in these sources."""
        found = self._find(module, name)
        if found is None or not isinstance(found[1], ast.ClassDef):
            return
        where, node = found
        yield node
        for base in node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(base, ast.Name) and base.id != name:
                yield from self._lineage(where, base.id)

    def _find(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        """Return where a name is defined, and its definition, through the modules that only hand it on."""
        for _ in range(_IMPORTS):
            found = self._module(module)
            if found is None or name not in found.names:
                return None
            node, source = found.names[name]
            if source is None:
                return module, node
            module, name = source
        return None

    @cache  # noqa: B019  # lives as long as the tests
    def _module(self, module: str) -> _Module | None:
        package, *inner = module.split(".")
        if package not in self._packages:
            return None
        path = self._packages[package].joinpath(*inner)
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        return _Module(module if path.is_dir() else module.rpartition(".")[0], file) if file.is_file() else None


class _Module:
    """The top-level names of a file: each with its definition and, where it is imported, (module, name) there."""

    def __init__(self, package: str, file: Path) -> None:
        self._package = package
        self.names: dict[str, tuple[ast.AST, tuple[str, str] | None]] = {}
        for node in _top_level(ast.parse(file.read_text()).body):
            self._add(node)

    def _add(self, node: ast.AST) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            # The last overload is the one that counts.
            self.names[node.name] = (node, None)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in (each for each in targets if isinstance(each, ast.Name)):
                self.names[target.id] = (node, None)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                self.names[alias.asname or alias.name.partition(".")[0]] = (node, None)
        elif isinstance(node, ast.ImportFrom):
            parents = self._package.split(".")
            above = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [above, node.module]))
            for alias in node.names:
                self.names[alias.asname or alias.name] = (node, (module, alias.name))


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from _top_level([*node.body, *node.orelse, *getattr(node, "finalbody", [])])
        else:
            yield node


def _own_members(node: ast.ClassDef) -> set[str]:
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and part in node.body:
            found.add(part.name)
        elif isinstance(part, ast.Assign | ast.AnnAssign):
            targets = part.targets if isinstance(part, ast.Assign) else [part.target]
            found.update(each.id for each in targets if isinstance(each, ast.Name) and part in node.body)
            found.update(each.attr for each in targets if isinstance(each, ast.Attribute) and _is_self(each.value))
    return found


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _parameters(function: ast.FunctionDef) -> set[str]:
    arguments = function.args
    return {each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}

"""Every use that our source makes of TensorRT's API, read from the source.

A small type inference over the syntax tree, with the types that TensorRT itself documents: the name
`trt` is the module; annotations like `config: trt.IBuilderConfig`, constructors, methods' return
types and properties' types tell what everything else is. What it cannot type but looks like
TensorRT's is reported too, so nothing escapes unseen.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

Api = dict[str, dict[str, dict[str, Any]]]

MODULE = ""  # the owner of `trt.Builder`


class Type(NamedTuple):
    """What an expression is: an `instance`, `class`, `method` or `list` of what TensorRT class."""

    kind: str
    owner: str
    member: str = ""


@dataclass(frozen=True)
class Use:
    """One access to a member of TensorRT's.

    Attributes:
        owner: class name, or empty for the module.
        how: `read`, `write`, `call` or `override`.
        positional: how many positional arguments a call passes, or an override takes.
        keywords: the keyword arguments a call passes.
        guarded: the function asks `hasattr` for it.
        place: file and line.
    """

    owner: str
    member: str
    how: str
    positional: int
    keywords: tuple[str, ...]
    guarded: bool
    place: str

    @property
    def name(self) -> str:
        return f"{self.owner}.{self.member}".lstrip(".")


def merge(apis: Iterable[Api]) -> Api:
    """One API with every class and member of all of them, for the inference."""
    merged: Api = {}
    for api in apis:
        for owner, members in api.items():
            merged[owner] = {**members, **merged.get(owner, {})}
    return merged


def problem(use: Use, api: Api) -> str | None:
    """What is wrong with a use in one version; None if nothing."""
    if use.owner not in api:
        return None  # so there is no such object either: the use that would make one is reported itself
    member = api[use.owner].get(use.member)
    if member is None:
        return f"{use.owner or 'the module'} has no {use.member}"
    if use.how == "write" and not member.get("settable"):
        return "cannot be set"
    if use.how == "call" and not any(_accepts(overload, use) for overload in member["overloads"]):
        return f"does not take {use.positional} arguments and {list(use.keywords)}: {member['overloads']}"
    if use.how == "override" and use.positional not in {len(o["parameters"]) for o in member["overloads"]}:
        return f"is called with other arguments: {member['overloads']}"
    return None


def _accepts(overload: dict[str, Any], use: Use) -> bool:
    parameters = overload["parameters"]
    by_position, rest = parameters[: use.positional], parameters[use.positional :]
    names = {parameter["name"] for parameter in rest}
    required = {parameter["name"] for parameter in rest if parameter["required"]}
    return len(by_position) == use.positional and required <= set(use.keywords) <= names


def uses_in(path: Path, api: Api) -> tuple[list[Use], list[str]]:
    """The uses in a source file, and the accesses that look like TensorRT's but could not be typed."""
    return uses_in_source(path.read_text(encoding="utf-8"), api, path.name)


def uses_in_source(source: str, api: Api, name: str) -> tuple[list[Use], list[str]]:
    """As `uses_in`, of source text."""
    reader = _Reader(api, name)
    reader.read(ast.parse(source))
    return reader.uses, reader.untyped


class _Reader:
    def __init__(self, api: Api, file: str) -> None:
        self.api = api
        self.file = file
        self.uses: list[Use] = []
        self.untyped: list[str] = []
        self._distinctive = {
            member
            for owner, members in api.items()
            if owner != MODULE
            for member, about in members.items()
            if about["kind"] in ("method", "property") and "_" in member
        }

    def read(self, tree: ast.Module) -> None:
        functions = {
            node.name: self._annotated(node.returns)
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        scope: dict[str, Type | None] = {f"{name}()": kind for name, kind in functions.items()}
        self._block(tree, scope, guards=set())

    # Scopes: a function sees what encloses it; `self.x` is shared by a class's methods.

    def _block(self, node: ast.AST, outer: dict[str, Type | None], guards: set[tuple[str, str]]) -> None:
        scope = dict(outer)
        inner: list[ast.AST] = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            scope.update({argument.arg: self._annotated(argument.annotation) for argument in arguments})
        if isinstance(node, ast.ClassDef):
            scope.update(self._attributes(node, scope))
            self._overrides(node, scope)
        statements = list(_own_nodes(node, inner))
        for statement in statements:
            self._bind(statement, scope)
        guards = guards | {guard for statement in statements for guard in self._guards(statement, scope)}
        calls = {id(statement.func): statement for statement in statements if isinstance(statement, ast.Call)}
        for statement in statements:
            if isinstance(statement, ast.Attribute):
                self._record(statement, calls.get(id(statement)), scope, guards)
        for child in inner:
            self._block(child, scope, guards)

    def _attributes(self, node: ast.ClassDef, scope: dict[str, Type | None]) -> dict[str, Type | None]:
        """Types of `self.x`, from annotations in the class's body and methods."""
        found: dict[str, Type | None] = {}
        for part in ast.walk(node):
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Attribute | ast.Name):
                target = ast.unparse(part.target)
                found[target if target.startswith("self.") else f"self.{target}"] = self._annotated(
                    part.annotation
                )
        return found

    def _overrides(self, node: ast.ClassDef, scope: dict[str, Type | None]) -> None:
        for base in node.bases:
            kind = self._type(base, scope)
            if kind is None or kind.kind != "class":
                continue
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and not part.name.startswith("_"):
                    self._add(kind.owner, part.name, "override", len(part.args.args) - 1, (), False, part)

    def _annotated(self, annotation: ast.expr | None) -> Type | None:
        """`trt.IBuilderConfig`, also in `X | None` and `list[X]`."""
        match annotation:
            case ast.Attribute(value=ast.Name(id="trt"), attr=name) if name in self.api:
                return Type("instance", name)
            case ast.BinOp(left=left, right=right):
                return self._annotated(left) or self._annotated(right)
            case ast.Subscript(value=ast.Name(id="list" | "Sequence"), slice=element):
                kind = self._annotated(element)
                return kind and Type("list", kind.owner)
        return None

    def _bind(self, node: ast.AST, scope: dict[str, Type | None]) -> None:
        match node:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation):
                scope[name] = self._annotated(annotation)
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=value)
                | ast.NamedExpr(target=ast.Name(id=name), value=value)
            ):
                scope[name] = self._type(value, scope)
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)) if len(
                names
            ) == len(values):
                for target, value in zip(names, values, strict=True):
                    if isinstance(target, ast.Name):
                        scope[target.id] = self._type(value, scope)
            case (
                ast.For(target=ast.Name(id=name), iter=iterable)
                | ast.comprehension(target=ast.Name(id=name), iter=iterable)
            ):
                kind = self._type(iterable, scope)
                if kind is not None and kind.kind == "list":
                    scope[name] = Type("instance", kind.owner)

    def _type(self, node: ast.expr, scope: dict[str, Type | None]) -> Type | None:
        match node:
            case ast.Name(id="trt"):
                return Type("class", MODULE)
            case ast.Name(id=name):
                return scope.get(name)
            case ast.Attribute(value=_, attr="trt"):
                return Type("class", MODULE)
            case ast.Attribute(value=ast.Name(id="self"), attr=attribute) if f"self.{attribute}" in scope:
                return scope[f"self.{attribute}"]
            case ast.Attribute(value=value, attr=attribute):
                return self._member(self._type(value, scope), attribute)
            case ast.Call(func=ast.Name(id=name)) if f"{name}()" in scope:
                return scope[f"{name}()"]
            case ast.Call(func=function):
                kind = self._type(function, scope)
                if kind is None or kind.kind not in ("class", "method"):
                    return None
                if kind.kind == "class":
                    return Type("instance", kind.owner)
                overloads = self.api[kind.owner][kind.member].get("overloads") or [{}]
                return self._documented(overloads[0].get("returns"))
            case ast.IfExp(body=body, orelse=orelse):
                return self._type(body, scope) or self._type(orelse, scope)
            case ast.ListComp(elt=element, generators=generators):
                inner = dict(scope)
                for generator in generators:
                    self._bind(generator, inner)
                kind = self._type(element, inner)
                return kind and Type("list", kind.owner)
            case ast.Subscript(value=value):
                kind = self._type(value, scope)
                return Type("instance", kind.owner) if kind is not None and kind.kind == "list" else None
        return None

    def _member(self, owner: Type | None, member: str) -> Type | None:
        if owner is None or owner.kind not in ("instance", "class"):
            return None
        about = self.api.get(owner.owner, {}).get(member)
        if about is None:
            return None
        if about["kind"] == "class":
            return Type("class", f"{owner.owner}.{member}".lstrip("."))
        if about["kind"] == "method":
            return Type("method", owner.owner, member)
        return self._documented(about["type"])

    def _documented(self, name: str | None) -> Type | None:
        """The class of a documented type; some have their C++ name there (`nvonnxparser::IParserError`)."""
        for candidate in (name, (name or "").rpartition("::")[2].removeprefix("I")):
            if candidate and candidate in self.api:
                return Type("instance", candidate)
        return None

    def _guards(self, node: ast.AST, scope: dict[str, Type | None]) -> Iterator[tuple[str, str]]:
        match node:
            case ast.Call(func=ast.Name(id="hasattr"), args=[owner, ast.Constant(value=str(member))]):
                kind = self._type(owner, scope)
                if kind is not None:
                    yield kind.owner, member

    def _record(
        self,
        node: ast.Attribute,
        call: ast.Call | None,
        scope: dict[str, Type | None],
        guards: set[tuple[str, str]],
    ) -> None:
        kind = self._type(node.value, scope)
        if node.attr.startswith("__") or f"{ast.unparse(node)}" in scope:
            return
        if kind is None or kind.kind not in ("instance", "class"):
            if node.attr in self._distinctive and not _is_annotation(node):
                self.untyped.append(f"{self.file}:{node.lineno}: {ast.unparse(node)}")
            return
        guarded = (kind.owner, node.attr) in guards or any(
            member == kind.owner for owner, member in guards if owner == MODULE
        )
        how = "call" if call else "write" if isinstance(node.ctx, ast.Store) else "read"
        keywords = tuple(keyword.arg or "**" for keyword in call.keywords) if call else ()
        self._add(kind.owner, node.attr, how, len(call.args) if call else 0, keywords, guarded, node)

    def _add(
        self,
        owner: str,
        member: str,
        how: str,
        positional: int,
        keywords: tuple[str, ...],
        guarded: bool,
        node: Any,
    ) -> None:
        self.uses.append(Use(owner, member, how, positional, keywords, guarded, f"{self.file}:{node.lineno}"))


def _is_annotation(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id == "trt"


def _own_nodes(node: ast.AST, inner: list[ast.AST]) -> Iterator[ast.AST]:
    """A scope's own nodes in source order; functions and classes inside it go to `inner`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inner.append(child)
        else:
            yield child
            yield from _own_nodes(child, inner)

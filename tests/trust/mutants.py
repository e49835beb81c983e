"""Small changes to a program, each a mistake that somebody could make: what mutation testing plants.

    for mutant in mutants("llama/cache.py", text):
        mutant.apply(text)      # the text with this one change

Of the usual operators (DeMillo, Lipton, Sayward 1978), and three that found holes here: arguments that are swapped, a
keyword argument that is left out, a statement that is. Left alone: text that people read, annotations, what only types
see. Changes are made in the text itself, so that everything else of the file stays as it is.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

COMPARE = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.Is: "is not",
    ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
BINARY = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*", ast.Pow: "*",
    ast.MatMult: "*", ast.BitAnd: "|", ast.BitOr: "&", ast.BitXor: "&", ast.LShift: ">>", ast.RShift: "<<",
}  # fmt: skip
DELETED = (ast.Raise, ast.AugAssign, ast.Delete, ast.Assert)


@dataclass(frozen=True)
class Mutant:
    """One change: `old` at `start` of the file's bytes becomes `new`."""

    path: str
    line: int
    scope: str  # class and function
    start: int
    old: str
    new: str
    source: str  # the line as it stands

    def apply(self, text: str) -> str:
        raw = text.encode()
        end = self.start + len(self.old.encode())
        assert raw[self.start : end] == self.old.encode()
        return (raw[: self.start] + self.new.encode() + raw[end:]).decode()

    @property
    def name(self) -> str:
        """What it is known by when lines above it change."""
        short = [" ".join(text.split()) for text in (self.old, self.new)]
        return f"{self.path} {self.scope}: {' -> '.join(short)} in {self.source}"


def mutants(path: str, text: str) -> list[Mutant]:
    """All of a file, by their place in it."""
    return sorted(_Finder(path, text).found(), key=lambda mutant: (mutant.start, mutant.new))


class _Finder:
    def __init__(self, path: str, text: str) -> None:
        self.path, self.raw, self.lines = path, text.encode(), text.splitlines()
        self.offsets = [0]
        for line in self.raw.splitlines(keepends=True):
            self.offsets.append(self.offsets[-1] + len(line))
        self.tree = ast.parse(text)

    def found(self) -> Iterator[Mutant]:
        yield from self._in(self.tree, "")

    def _in(self, node: ast.AST, scope: str) -> Iterator[Mutant]:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            scope = f"{scope}.{node.name}".strip(".")
        for old, start, new in self._changes(node):
            if new != old:
                line = self.raw[:start].count(b"\n") + 1
                yield Mutant(self.path, line, scope or "module", start, old, new, self.lines[line - 1].strip())
        for child in self._children(node):
            yield from self._in(child, scope)

    def _children(self, node: ast.AST) -> Iterator[ast.AST]:
        """All but what people or type checkers read."""
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "bases", "type_params"):
                continue
            if isinstance(node, ast.Raise) or (name == "test" and isinstance(node, ast.Assert)):
                continue  # the text of an error; that it is raised is a change of its own
            if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
                continue
            yield from (each for each in (value if isinstance(value, list) else [value]) if isinstance(each, ast.AST))

    def _changes(self, node: ast.AST) -> Iterator[tuple[str, int, str]]:
        match node:
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                yield self._between(left, right, COMPARE[type(op)])
            case ast.BinOp(left=left, op=op, right=right) if not self._is_text(left) and not self._is_text(right):
                yield self._between(left, right, BINARY[type(op)])
            case ast.BoolOp(op=op, values=[left, right, *_]):
                yield self._between(left, right, "or" if isinstance(op, ast.And) else "and")
            case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
                yield *self._at(node), self._text(operand)
            case ast.Constant(value=bool() as value):
                yield *self._at(node), str(not value)
            case ast.Constant(value=int() as value):
                yield *self._at(node), str(value + 1)
            case ast.Constant(value=float() as value):
                yield *self._at(node), repr(value * 2 or 1.0)
            case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
                yield *self._at(test), f"(not ({self._text(test)}))"
            case ast.Call():
                yield from self._of_call(node)
            case ast.Break() | ast.Continue():
                yield *self._at(node), "continue" if isinstance(node, ast.Break) else "break"
            case ast.Return(value=value) if value is not None and not self._is_nothing(value):
                yield *self._at(node), "return None"
        if self._is_deletable(node):
            yield *self._at(node), "pass"

    def _of_call(self, call: ast.Call) -> Iterator[tuple[str, int, str]]:
        for i, (first, second) in enumerate(itertools.pairwise(call.args)):
            if not isinstance(first, ast.Starred) and not isinstance(second, ast.Starred):
                swapped = [*call.args[:i], second, first, *call.args[i + 2 :]]
                yield *self._at(call), ast.unparse(ast.Call(call.func, swapped, call.keywords))
        for keyword in call.keywords:
            if keyword.arg not in (None, "help", "desc", "unit"):
                rest = [each for each in call.keywords if each is not keyword]
                yield *self._at(call), ast.unparse(ast.Call(call.func, call.args, rest))

    def _between(self, left: ast.AST, right: ast.AST, operator: str) -> tuple[str, int, str]:
        """Another operator between two operands, whatever parentheses stand around them."""
        start, end = self._place(left)[1], self._place(right)[0]
        old = self.raw[start:end].decode()
        core = old.strip(" \n\\()")
        return (core, start + old.encode().index(core.encode()), operator)

    def _is_deletable(self, node: ast.AST) -> bool:
        match node:
            case ast.Expr(value=ast.Call()):
                return True
            case ast.Assign(targets=[ast.Attribute() | ast.Subscript(), *_]):
                return True
        return isinstance(node, DELETED)

    def _is_text(self, node: ast.AST) -> bool:
        return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))

    def _is_nothing(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Constant) and node.value is None

    def _offset(self, line: int, column: int) -> int:
        return self.offsets[line - 1] + column

    def _place(self, node: ast.AST) -> tuple[int, int]:
        return self._offset(node.lineno, node.col_offset), self._offset(node.end_lineno, node.end_col_offset)

    def _text(self, node: ast.AST) -> str:
        start, end = self._place(node)
        return self.raw[start:end].decode()

    def _at(self, node: ast.AST) -> tuple[str, int]:
        return self._text(node), self._place(node)[0]

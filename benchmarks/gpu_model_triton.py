"""Find out from a Triton kernel's source which of its tensors it reads and which it writes.

`Launches` (gpu_model_trace.py) counts each of these tensors once. A kernel that an emulated GPU launches on shapes
alone never runs, so its memory accesses cannot be observed.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from triton import language as tl

Names = frozenset[str]
NOTHING: Names = frozenset()
ATOMIC = {name for name in dir(tl) if name.startswith("atomic_")}
"""Operations that read and write."""


def touched(kernel: Callable[..., Any], arguments: dict[str, Any]) -> tuple[Names, Names]:
    """Return the names of the tensors from which a kernel loads, and of those to which it stores.

    ``arguments``: the launch's arguments by name. A branch counts unless its condition is false for the arguments.
    """
    seen = _Accesses(kernel, {name: value for name, value in arguments.items() if _is_plain(value)})
    seen.walk({name: frozenset([name]) for name, value in arguments.items() if isinstance(value, Tensor)})
    return frozenset(seen.loaded), frozenset(seen.stored)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | tl.constexpr)


class _Accesses:
    """Follows pointers through the assignments and calls of one function: variable -> parameters of the kernel."""

    def __init__(self, function: Callable[..., Any], known: dict[str, Any]) -> None:
        self.code: Any = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        self.names: dict[str, Any] = function.__globals__
        self.known = {name: value.value if isinstance(value, tl.constexpr) else value for name, value in known.items()}
        self.loaded: set[str] = set()
        self.stored: set[str] = set()
        self.returned: set[str] = set()

    def walk(self, pointers: dict[str, Names]) -> Names:
        """Collect the accesses, and return the parameters to which the function's results may point."""
        self.pointers = dict(pointers)
        self._run(self.code.body)
        return frozenset(self.returned)

    def _run(self, lines: Iterable[ast.stmt]) -> None:
        for line in lines:
            match line:
                case ast.Assign(targets=targets, value=value):
                    found = self._points(value)
                    for target in targets:
                        self._set(target, found)
                case ast.AugAssign(target=target, value=value):
                    self._set(target, self._points(target) | self._points(value))
                case ast.AnnAssign(target=target, value=ast.expr() as value):
                    self._set(target, self._points(value))
                case ast.Return(value=ast.expr() as value):
                    self.returned |= self._points(value)
                case ast.Expr(value=value):
                    self._points(value)
                case ast.If(test=test, body=body, orelse=orelse):
                    holds = self._holds(test)
                    self._run([] if holds is False else body)
                    self._run([] if holds is True else orelse)
                case ast.For(body=body):
                    self._run([*body, *body])  # twice: a pointer may move on at the end
                case ast.While(body=body):
                    self._run([*body, *body])

    def _set(self, target: ast.expr, found: Names) -> None:
        names = target.elts if isinstance(target, ast.Tuple) else [target]
        for name in names:
            if isinstance(name, ast.Name):
                self.pointers[name.id] = found
                self.known.pop(name.id, None)

    def _holds(self, test: ast.expr) -> bool | None:
        """Return whether a condition holds; None if it depends on more than the launch's plain arguments."""
        names = {node.id for node in ast.walk(test) if isinstance(node, ast.Name)}
        constants = {name: value.value for name, value in self.names.items() if isinstance(value, tl.constexpr)}
        if not names <= {*self.known, *constants}:
            return None
        return bool(eval(compile(ast.Expression(test), "", "eval"), {}, {**constants, **self.known}))

    def _points(self, value: ast.expr) -> Names:
        """Return the parameters to which an expression may point; collect the accesses in it."""
        if isinstance(value, ast.Name):
            return self.pointers.get(value.id, NOTHING)
        if isinstance(value, ast.Call):
            return self._called(value)
        return NOTHING.union(
            *(self._points(each) for each in ast.iter_child_nodes(value) if isinstance(each, ast.expr))
        )

    def _called(self, call: ast.Call) -> Names:
        given = [self._points(each) for each in call.args]
        named = {each.arg: self._points(each.value) for each in call.keywords if each.arg is not None}
        target = call.func
        of_triton = isinstance(target, ast.Attribute) and self._value(target.value) is tl
        if isinstance(target, ast.Attribute) and of_triton and target.attr in ("load", "store", *ATOMIC):
            where = given[0] if given else named["pointer"]
            self.loaded |= where if target.attr != "store" else NOTHING
            self.stored |= where if target.attr != "load" else NOTHING
            return NOTHING
        helper = None if of_triton else getattr(self._value(target), "fn", None)
        if helper is None:  # an operation on values, such as x.to(dtype) or tl.where(…)
            inside = self._points(target.value) if isinstance(target, ast.Attribute) else NOTHING
            return inside.union(*given, *named.values())
        bind = inspect.signature(helper).bind
        passed = bind(*call.args, **{str(each.arg): each.value for each in call.keywords}).arguments
        known = {name: self._plain(node) for name, node in passed.items() if self._holds_plain(node)}
        inner = _Accesses(helper, known)
        results = inner.walk(bind(*given, **named).arguments)
        self.loaded |= inner.loaded
        self.stored |= inner.stored
        return results

    def _value(self, node: ast.expr) -> Any:
        """Return the object of the function's module that a dotted name stands for; None if there is none."""
        if isinstance(node, ast.Attribute):
            return getattr(self._value(node.value), node.attr, None)
        return self.names.get(node.id) if isinstance(node, ast.Name) else None

    def _holds_plain(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Constant) or (isinstance(node, ast.Name) and node.id in self.known)

    def _plain(self, node: ast.expr) -> Any:
        return (
            node.value
            if isinstance(node, ast.Constant)
            else self.known[node.id]
            if isinstance(node, ast.Name)
            else None
        )

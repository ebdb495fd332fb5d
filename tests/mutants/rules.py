"""The rules by which a file's mutants are made: each changes a few characters of its text.

What is no behaviour of ours is left alone: docstrings, annotations, decorators, imports, assertions,
messages of errors, log lines, and the numbers that modules keep in capitals, most of which are about speed.
"""

from __future__ import annotations

import ast
import dataclasses
import re

# In the order in which a sample takes them.
RULES = (
    "removed check",
    "sign",
    "dropped term",
    "comparison",
    "off by one",
    "swapped operands",
    "negated condition",
    "dropped statement",
    "dropped condition",
    "flag",
    "and, or",
    "operator",
)
_FLIPPED: dict[type[ast.AST], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
    ast.Pow: ("**", "**"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
}
_RULE_OF: dict[type[ast.AST], str] = {
    ast.Mult: "operator",
    ast.Div: "operator",
    ast.BitAnd: "and, or",
    ast.BitOr: "and, or",
}
# Either order of the first two arguments is right, or is about a type.
_SYMMETRIC = {
    "isinstance",
    "issubclass",
    "cast",
    "min",
    "max",
    "maximum",
    "minimum",
    "hasattr",
    "getattr",
    "TypeVar",
}
_LEFT_ALONE = (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom, ast.Delete)
_LOGS = {"debug", "info", "static_print", "static_assert"}
_LARGE = (
    32  # from here on a number is a bound, a code or a size of a block: one more changes the speed at most
)


@dataclasses.dataclass(frozen=True)
class Change:
    """One mutant of a file's text."""

    rule: str
    line: int
    start: int  # in bytes
    end: int
    text: str

    def apply(self, source: str) -> str:
        """Return the mutated text."""
        data = source.encode()
        return (data[: self.start] + self.text.encode() + data[self.end :]).decode()

    def lines(self, source: str) -> tuple[str, str]:
        """Return the lines that change, before and after, on one line each."""
        data = source.encode()
        first = data.rfind(b"\n", 0, self.start) + 1
        last = data.find(b"\n", self.end)
        last = len(data) if last < 0 else last
        before, head, tail = data[first:last], data[first : self.start], data[self.end : last]
        after = head + self.text.encode() + tail
        return " ".join(before.decode().split()), " ".join(after.decode().split())

    def is_valid(self, source: str) -> bool:
        """Return whether the mutated text is Python, and another program."""
        try:
            mutated = ast.parse(self.apply(source))
        except SyntaxError:
            return False
        return ast.dump(mutated) != ast.dump(ast.parse(source))


def changes(source: str) -> list[Change]:
    """Return all mutants of a file's text."""
    finder = _Finder(source)
    finder.visit(ast.parse(source))
    return finder.found


class _Finder(ast.NodeVisitor):
    def __init__(self, source: str) -> None:
        self.data = source.encode()
        self.found: list[Change] = []
        self.depth = 0  # of functions
        self._starts = [0]
        for line in self.data.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))

    def _span(self, node: ast.AST) -> tuple[int, int]:
        assert isinstance(node, ast.expr | ast.stmt)
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = self._starts[node.lineno - 1] + node.col_offset
        return start, self._starts[node.end_lineno - 1] + node.end_col_offset

    def _add(self, rule: str, start: int, end: int, text: str) -> None:
        line = self.data.count(b"\n", 0, start) + 1
        self.found.append(Change(rule, line, start, end, text))

    def _replace(self, rule: str, node: ast.AST, text: str) -> None:
        self._add(rule, *self._span(node), text)

    def _text(self, start: int, end: int) -> str:
        return self.data[start:end].decode()

    def _operator(self, left: ast.AST, right: ast.AST, kind: ast.AST) -> tuple[int, int] | None:
        """Return where the operator between two operands is, whose parentheses belong to neither."""
        symbol = _FLIPPED[type(kind)][0]
        start, end = self._span(left)[1], self._span(right)[0]
        pattern = r"\s+".join(map(re.escape, symbol.split()))
        match = re.search(pattern, self._text(start, end))
        return (start + match.start(), start + match.end()) if match else None

    def visit(self, node: ast.AST) -> None:
        """Visit a node, unless it is one to be left alone."""
        if not isinstance(node, _LEFT_ALONE):
            super().visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Visit the body and the defaults, not the annotations and decorators."""
        self.depth += 1
        for part in (*node.args.defaults, *filter(None, node.args.kw_defaults), *node.body):
            self.visit(part)
        self.depth -= 1

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """Visit the body."""
        for part in node.body:
            self.visit(part)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        """Visit the value, not the annotation."""
        if node.value is not None and not (self.depth == 0 and _is_constant_name(node.target)):
            self.visit(node.value)

    # Statements.

    def visit_If(self, node: ast.If) -> None:
        """Remove a check; otherwise take the other branch."""
        if "TYPE_CHECKING" in ast.unparse(node.test) or "__name__" in ast.unparse(node.test):
            return
        if isinstance(node.body[-1], ast.Raise) and not node.orelse:
            self._replace("removed check", node.test, "False")
            self.visit(node.test)
            return
        self._negate(node.test)
        refuses = isinstance(node.body[-1], ast.Raise)
        for part in (node.test, *(() if refuses else node.body), *node.orelse):
            self.visit(part)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        """Take the other value."""
        self._negate(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        """Keep what was left out."""
        for test in node.ifs:
            self._negate(test)
        self.generic_visit(node)

    def _negate(self, test: ast.expr) -> None:
        if not isinstance(test, ast.Compare) or len(test.ops) > 1:  # those have a rule of their own
            start, end = self._span(test)
            self._replace("negated condition", test, f"(not ({self._text(start, end)}))")

    def visit_Expr(self, node: ast.Expr) -> None:
        """Drop a call that stands alone."""
        if not isinstance(node.value, ast.Call):
            if not isinstance(node.value, ast.Constant):
                self.generic_visit(node)
            return
        name = _name(node.value.func)
        if name in _LOGS:
            return
        is_check = re.match(r"_?(check|refuse|reject|require|ensure)", name)
        self._replace("removed check" if is_check else "dropped statement", node, "pass")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        """Drop what is written to an attribute or an element."""
        target = node.targets[0]
        if self.depth == 0 and _is_constant_name(target):
            return
        if self.depth and isinstance(target, ast.Attribute | ast.Subscript):
            self._replace("dropped statement", node, "pass")
        self.visit(node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        """Drop the term, or take it away."""
        self._replace("dropped term", node, "pass")
        if isinstance(node.op, ast.Add | ast.Sub) and (
            where := self._operator(node.target, node.value, node.op)
        ):
            self._add("sign", *where, _FLIPPED[type(node.op)][1])
        self.visit(node.value)

    # Expressions.

    def visit_BinOp(self, node: ast.BinOp) -> None:
        """Change the sign, drop a term, swap the operands."""
        where = self._operator(node.left, node.right, node.op) if type(node.op) in _FLIPPED else None
        if where and not any(map(_is_text, (node.left, node.right))) and self._is_arithmetic(node):
            start, end = self._span(node)
            left, right = self._text(start, where[0]).rstrip(), self._text(where[1], end).lstrip()
            self._replace("dropped term", node, left)
            if not isinstance(node.op, ast.Pow):
                self._replace("dropped term", node, right)
                self._add(_RULE_OF.get(type(node.op), "sign"), *where, _FLIPPED[type(node.op)][1])
            if isinstance(node.op, ast.Sub | ast.Div | ast.Pow):
                symbol = _FLIPPED[type(node.op)][0]
                self._replace("swapped operands", node, f"(({right}) {symbol} ({left}))")
        self.generic_visit(node)

    def _is_arithmetic(self, node: ast.BinOp) -> bool:
        """Return whether this is no union of types."""
        return self.depth > 0 or not isinstance(node.op, ast.BitOr)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        """Say or for and; drop the first condition, or the last."""
        first = self._operator(node.values[0], node.values[1], node.op)
        last = self._operator(node.values[-2], node.values[-1], node.op)
        if first and last:
            start, end = self._span(node)
            self._add("and, or", *first, _FLIPPED[type(node.op)][1])
            self._replace("dropped condition", node, self._text(first[1], end).lstrip())
            self._replace("dropped condition", node, self._text(start, last[0]).rstrip())
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        """Move a bound by one, or turn a comparison round."""
        for left, kind, right in zip(
            (node.left, *node.comparators), node.ops, node.comparators, strict=False
        ):
            if where := self._operator(left, right, kind):
                self._add("comparison", *where, _FLIPPED[type(kind)][1])
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        """Drop a minus, or a not."""
        start, end = self._span(node.operand)
        if isinstance(node.op, ast.USub):
            self._replace("sign", node, self._text(self._span(node)[0] + 1, self._span(node)[1]).lstrip())
        if isinstance(node.op, ast.Not):
            self._replace("negated condition", node, f"({self._text(start, end)})")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        """Count one more; turn True and False round."""
        if isinstance(node.value, bool):
            self._replace("flag", node, str(not node.value))
        elif isinstance(node.value, int | float) and abs(node.value) < _LARGE:
            self._replace("off by one", node, repr(node.value + 1))

    def visit_keyword(self, node: ast.keyword) -> None:
        """Visit an option, but for zip's: `strict` guards an invariant, as an assertion does."""
        if node.arg != "strict":
            self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        """Swap the first two arguments."""
        name = _name(node.func)
        if name in {"isinstance", "issubclass"}:
            self.visit(node.args[0])
            return
        if len(node.args) > 1 and name not in _SYMMETRIC and not any(map(_is_text, node.args[:2])):
            (start, middle), (resumed, end) = map(self._span, node.args[:2])
            first, second = self._text(start, middle), self._text(resumed, end)
            if first != second and not {"*"} & {first[0], second[0]}:
                swapped = second + self._text(middle, resumed) + first
                self._add("swapped operands", start, end, swapped)
        self.generic_visit(node)


def _name(function: ast.expr) -> str:
    names = [node for node in ast.walk(function) if isinstance(node, ast.Name | ast.Attribute)]
    if not names:
        return ""
    return names[0].attr if isinstance(names[0], ast.Attribute) else names[0].id


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _is_constant_name(target: ast.expr) -> bool:
    name = target.id if isinstance(target, ast.Name) else ""
    return name == "__all__" or (name.isupper() and len(name) > 1)

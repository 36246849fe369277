"""How much source there is and how densely it is written, compared with budget.toml.

    python .ci/size.py              (make size) ends with 1 if a number is above its budget
    python .ci/size.py --tighten    (make size TIGHTEN=1) lowers budgets to the present numbers

Tokens are names, operators, numbers and strings on code lines: no comments, docstrings or newlines.
tests/contracts/test_walks.py measures the walks.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUDGET = ROOT / "budget.toml"
SOURCES = ("src/phatgoose/**/*.py", "packages/*/src/**/*.py")
KINDS = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
COMPREHENSIONS = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
MANY = 7  # parameters, without self
# Words of grammar, which don't say what a variable holds.
GRAMMAR = {"each", "asked", "found", "said", "told", "known", "there", "some", "every"}
GRAMMAR |= {"held", "own", "made", "given", "wanted", "whole"}


def docstring_lines(tree: ast.Module) -> Iterator[int]:
    """The numbers of all lines that belong to docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | FUNCTIONS) and node.body:
            first = node.body[0]
            is_constant = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            if is_constant and isinstance(first.value.value, str):
                yield from range(first.lineno, first.end_lineno + 1)


def tokens_and_lines(text: str, tree: ast.Module) -> Counter[str]:
    """How many tokens of code there are, and on how many lines."""
    free = set(docstring_lines(tree))
    lines: set[int] = set()
    counts = Counter(tokens=0)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in KINDS and token.start[0] not in free:
            counts["tokens"] += 1
            lines.update(range(token.start[0], token.end[0] + 1))
    counts["lines"] = len(lines - free)
    return counts


def parameters_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many parameters `function` has, without self."""
    parameters = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    is_bound = bool(parameters) and parameters[0].arg in ("self", "cls")
    return len(parameters) - is_bound


def habits(node: ast.AST) -> Iterator[str]:
    """What `node` counts as, by the names of budget.toml."""
    if isinstance(node, COMPREHENSIONS):
        yield "comprehensions"
    elif isinstance(node, ast.IfExp):
        yield "conditional expressions"
    elif isinstance(node, ast.Assign):
        if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
            yield "tuple assignments"
    elif isinstance(node, FUNCTIONS) and parameters_of(node) >= MANY:
        yield "many parameters"
    elif isinstance(node, ast.AnnAssign):
        if ast.unparse(node.annotation).startswith("Annotated["):  # a field with a help text
            yield "settings"
    elif isinstance(node, ast.Name | ast.arg):
        name = node.id if isinstance(node, ast.Name) else node.arg
        if name in GRAMMAR | {"Any"}:
            yield "Any" if name == "Any" else "words of grammar"


def measured(rooms: list[str]) -> dict[str, dict[str, float]]:
    """The present numbers, by the tables and keys of budget.toml."""
    by_room = dict.fromkeys(rooms, 0)
    counts: Counter[str] = Counter()
    for path in (path for pattern in SOURCES for path in ROOT.glob(pattern)):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        place = f"/{path.relative_to(ROOT).as_posix()}"
        # A room stands before the rooms inside it.
        room = next((room for room in reversed(rooms) if f"/{room}/" in place), rooms[0])
        own = tokens_and_lines(text, tree)
        by_room[room] += own["tokens"]
        counts += own
        for node in ast.walk(tree):
            counts.update(habits(node))
    dense = {"tokens a line": round(counts["tokens"] / counts["lines"], 2)}
    names = "Any", "comprehensions", "conditional expressions", "tuple assignments"
    for name in (*names, "words of grammar"):
        dense[name] = round(1000 * counts[name] / counts["lines"], 1)
    whole = {name: counts[name] for name in ("tokens", "many parameters", "settings")}
    return {"tokens": by_room, "whole": whole, "per 1,000 code lines": dense}


def main() -> int:
    """Write every number, its budget and its aim; 1 if one is above its budget."""
    content = BUDGET.read_text(encoding="utf-8")
    budget = tomllib.loads(content)
    above = 0
    for table, numbers in measured(list(budget["tokens"])).items():
        for name, now in numbers.items():
            most, aim = budget[table][name]
            above += now > most
            mark = "   ABOVE" if now > most else ""
            sys.stdout.write(f"{name:<26}{now:>9,} of {most:,}, aim {aim:,}{mark}\n")
            if "--tighten" in sys.argv:
                old = re.compile(rf'^"{re.escape(name)}" = \[[\d._]+', re.MULTILINE)
                # "tokens" names a table too, which has no value.
                content = old.sub(f'"{name}" = [{min(now, most)}', content, count=1)
    if "--tighten" in sys.argv:
        BUDGET.write_text(content, encoding="utf-8")
    return int(above > 0)


if __name__ == "__main__":
    sys.exit(main())

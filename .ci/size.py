"""The size of the house beside budget.toml; ends with 1 where a number is above its budget.

    python .ci/size.py              (make size)
    python .ci/size.py --tighten    (make size TIGHTEN=1) lowers budgets to what is there

Lines are those without comments and docstrings. tests/contracts/test_walks.py measures the walks.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUDGET = ROOT / "budget.toml"
MANY = 7  # parameters
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def counted(text: str, tree: ast.Module) -> int:
    """Lines without comments and docstrings."""
    free: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | FUNCTIONS) and node.body:
            first = node.body[0]
            is_constant = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            if is_constant and isinstance(first.value.value, str):
                free |= set(range(first.lineno, first.end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip():
            free.add(token.start[0])
    return text.count("\n") - len(free)


def measured(rooms: list[str]) -> dict[str, dict[str, float]]:
    """What is there, by the tables and keys of budget.toml."""
    lines, raises = dict.fromkeys(rooms, 0), 0
    whole = dict.fromkeys(("files", "many parameters", "settings"), 0)
    for path in [*ROOT.glob("src/phatgoose/**/*.py"), *ROOT.glob("packages/*/src/**/*.py")]:
        text, place = path.read_text(encoding="utf-8"), f"/{path.relative_to(ROOT).as_posix()}"
        tree = ast.parse(text)
        # A room stands before the rooms inside it.
        room = next((room for room in reversed(rooms) if f"/{room}/" in place), rooms[0])
        lines[room] += counted(text, tree)
        raises += len(re.findall(r"^\s*raise\b", text, re.MULTILINE))
        whole["files"] += 1
        for node in ast.walk(tree):
            if isinstance(node, FUNCTIONS):
                whole["many parameters"] += len(node.args.args + node.args.kwonlyargs) >= MANY
            elif isinstance(node, ast.AnnAssign):  # a field with a help text
                whole["settings"] += ast.unparse(node.annotation).startswith("Annotated[")
    total = sum(lines.values())
    whole |= {"lines": total, "raises per 1,000 lines": round(1000 * raises / total, 1)}
    return {"lines": lines, "whole": whole}


def main() -> int:
    """Write every number, its budget and its aim; 1 if one is above its budget."""
    content = BUDGET.read_text(encoding="utf-8")
    budget, above = tomllib.loads(content), 0
    for table, numbers in measured(list(budget["lines"])).items():
        for name, now in numbers.items():
            most, aim = budget[table][name]
            above += now > most
            mark = "   ABOVE" if now > most else ""
            sys.stdout.write(f"{name:<24}{now:>9,} of {most:,}, aim {aim:,}{mark}\n")
            if "--tighten" in sys.argv:
                old = re.compile(rf'^"{re.escape(name)}" = \[[\d.]+', re.MULTILINE)
                content = old.sub(f'"{name}" = [{min(now, most)}', content, count=1)
    if "--tighten" in sys.argv:
        BUDGET.write_text(content, encoding="utf-8")
    return int(above > 0)


if __name__ == "__main__":
    sys.exit(main())

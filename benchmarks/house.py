"""The size of the source, as docs/design.md gives it: files, lines, headers, docstrings, tests.

    python benchmarks/house.py

A header is everything before a file's first statement: docstring, imports, `__all__`. Comments are
lines that hold nothing else. benchmarks/travellers.py counts the files on six ways through it.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTED = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module


def main() -> None:
    """Print the table."""
    source = sorted((ROOT / "src" / "phatgoose").rglob("*.py"))
    texts = [path.read_text(encoding="utf-8") for path in source]
    trees = [ast.parse(text) for text in texts]
    lines = sum(len(text.splitlines()) for text in texts)
    tests = sum(len(path.read_text("utf-8").splitlines()) for path in ROOT.glob("tests/**/*.py"))
    levels = max(len(path.relative_to(ROOT / "src" / "phatgoose").parts) - 1 for path in source)
    header = sum(header_of(tree, text) for tree, text in zip(trees, texts, strict=True))
    comments = sum(line.strip().startswith("#") for text in texts for line in text.splitlines())
    rows = {
        "files": f"{len(source)}",
        "lines": f"{lines:,}",
        "header": f"{header / lines:.1%}",
        "docstrings": f"{sum(map(docstrings_of, trees)) / lines:.1%}",
        "comments": f"{comments / lines:.1%}",
        "levels of folders": f"{levels}",
        "lines of tests": f"{tests:,}",
    }
    print("| | |\n|---|---|")
    print("\n".join(f"| {name} | {value} |" for name, value in rows.items()))


def header_of(tree: ast.Module, text: str) -> int:
    """How many lines stand before the first statement."""
    for node in tree.body:
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_all = isinstance(node, ast.Assign) and "__all__" in ast.unparse(node.targets[0])
        typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if is_text or is_all or typing or isinstance(node, ast.Import | ast.ImportFrom):
            continue
        decorated: list[ast.expr] = getattr(node, "decorator_list", [])
        return min([node.lineno, *(each.lineno for each in decorated)]) - 1
    return len(text.splitlines())


def docstrings_of(tree: ast.Module) -> int:
    """How many lines docstrings take."""
    held = (node for node in ast.walk(tree) if isinstance(node, DOCUMENTED))
    texts = [node.body[0] for node in held if ast.get_docstring(node)]
    return sum((text.end_lineno or text.lineno) - text.lineno + 1 for text in texts)


if __name__ == "__main__":
    main()

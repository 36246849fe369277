"""Errors: one tree, drawn as it is."""

from __future__ import annotations

import re

from phatgoose import errors


def drawn_tree() -> dict[str, str]:
    """Each error's parent, as errors.py draws them: by indentation."""
    parents: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in errors.__doc__.splitlines():
        found = re.match(r"( *)(?:[+x] )?([A-Z]\w*Error)\b(?:  +\S|$)", line)
        if not found:
            continue
        depth, name = len(found.group(1)), found.group(2)
        above = [(d, n) for d, n in above if d < depth]
        parents[name] = above[-1][1] if above else "Exception"
        above.append((depth, name))
    return parents


def test_the_errors_are_one_tree_and_it_is_drawn_right():
    classes = {name: thing for name, thing in vars(errors).items() if isinstance(thing, type)}
    assert set(classes) == set(errors.__all__)
    assert drawn_tree() == {name: thing.__bases__[0].__name__ for name, thing in classes.items()}
    assert all(issubclass(thing, errors.PhatgooseError) for thing in classes.values())

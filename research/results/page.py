"""Write research/results/README.md, router × suite × base, from the comparisons kept beside it.

    python research/results/page.py           prints the page
    python research/results/page.py --write   writes it
    python research/results/page.py --add KEY "TITLE" PAGE OUT/comparison.json

--add keeps what the page needs of a comparison as research/results/KEY.json and writes the page.
TITLE names the pool, PAGE is where docs report it. Commit, date and machine are those in the file;
older files need `--commit C --date D --machine M`. So pool A's are added by

    python research/results/page.py --add pool-a-cross "pool A" study.md OUT/comparison.json

Rows of routers by embeddings are left out: see WITHDRAWN.
"""

from __future__ import annotations

import argparse
import json
import posixpath
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from phatgoose.evaluation.intervals import Interval
from phatgoose.evaluation.results import ANCHOR, Summary, markdown_table
from phatgoose.evaluation.rows import METHODS

FOLDER = Path(__file__).parent
PAGE = FOLDER / "README.md"
# These chose with the answer choices in the embedded text, which no served prompt has. They come
# back when they are scored by the prompt alone (research/protocol.md).
WITHDRAWN = ("retrieval", "centroid", "glider", "joint-discriminant", "joint-discriminant-one")
SETTINGS = ("base", "dtype", "experts", "limit", "seed", "k", "code", "commit", "date", "machine")
HEAD = """# Every published comparison

<!-- Written by research/results/page.py from the JSON files beside it; edit those. -->

[docs/results.md](../../docs/results.md) is the summary. Here routers are rows, and suites and \
pools are columns, with a part for each base. Numbers are means over a suite's datasets in per \
cent, with 95 % intervals over datasets and examples. The linked pages say how the experts were \
trained. Routers have today's default settings. Intervals aren't corrected for multiple \
comparisons. Don't compare columns of different pools or wordings.

Rows of routers by embeddings (Retrieval, Centroid, GLIDER, Joint Discriminant) were withdrawn \
until they are scored by the prompt alone, under a new protocol (`research/protocol.md`).

[The first study](../first-study/README.md) and \
[an earlier comparison](../earlier/eight-experts.md) are not included: many of their experts had \
lost their question, or had hardly been trained.
"""
CHOSEN = "\n\\* chosen by the results themselves, so not zero-shot.\n"


class Column(NamedTuple):
    """One suite of one kept comparison."""

    of: Mapping[str, Any]
    suite: str

    @property
    def title(self) -> str:
        """The suite and the pool, and where more is said of them."""
        datasets = self.of["suites"][self.suite]["datasets"]
        return f"{self.suite} ({datasets}), {_link(self.of)}"

    def summary(self, row: str) -> Summary | None:
        """A row's mean and difference, None where it was not run."""
        if row not in self.of["rows"]:
            return None
        kept = self.of["rows"][row]["summary"][self.suite]
        interval, difference = (
            Interval(**kept[name]) if kept[name] else None
            for name in ("interval", "difference_interval")
        )
        assert interval is not None
        return Summary(kept["mean"], interval, kept["difference"], difference)


def page(folder: Path = FOLDER) -> str:
    """The page of all comparisons in `folder`."""
    files = sorted(folder.glob("*.json"), key=lambda path: path.stem)
    kept = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    bases: dict[str, list[Mapping[str, Any]]] = {}
    for each in kept:
        settings = each["settings"]
        bases.setdefault(f"{settings['base']['id']}, {settings['dtype']}", []).append(each)
    parts = [HEAD, *(_of_base(name, each) for name, each in sorted(bases.items())), _sources(kept)]
    return "\n".join(parts)


def _of_base(name: str, kept: Sequence[Mapping[str, Any]]) -> str:
    columns = [Column(each, suite) for each in kept for suite in each["suites"]]
    rows = {
        row: its["label"]
        for each in kept
        for row, its in each["rows"].items()
        if row not in WITHDRAWN
    }
    chosen = {row for each in kept for row in each["chosen"]}
    order = {method: place for place, method in enumerate(METHODS)}
    ordered = sorted(rows, key=lambda row: (row in chosen, order.get(row, len(order))))
    titles = [column.title for column in columns]
    means = [
        [_named(row, rows, chosen), *(s.in_per_cent if s else "" for s in _across(columns, row))]
        for row in ordered
    ]
    differences = [
        [_named(row, rows, chosen), *cells]
        for row in ordered
        if any(cells := [s.difference_in_points if s else "" for s in _across(columns, row)])
    ]
    parts = [f"## {name}\n", *markdown_table(["router", *titles], means), CHOSEN if chosen else ""]
    if differences:
        parts += [f"Difference to {rows[ANCHOR]} in points, in pairs:\n"]
        parts += [*markdown_table(["router", *titles], differences), ""]
    return "\n".join(parts)


def _link(kept: Mapping[str, Any]) -> str:
    """Its title, linked to its page, whose place the file gives from docs."""
    place = posixpath.relpath(posixpath.join("docs", kept["page"]), "research/results")
    return f"[{kept['title']}]({place})"


def _across(columns: Sequence[Column], row: str) -> list[Summary | None]:
    return [column.summary(row) for column in columns]


def _named(row: str, labels: Mapping[str, str], chosen: set[str]) -> str:
    star = " \\*" if row in chosen else ""
    return f"**{labels[row]}**" if row == ANCHOR else labels[row] + star


def _sources(kept: Sequence[Mapping[str, Any]]) -> str:
    head = ["pool", "suites", "experts", "k", "examples", "date", "commit", "phatgoose", "machine"]
    rows = []
    for each in kept:
        s, suites = each["settings"], each["suites"]
        rows.append(
            [
                _link(each),
                ", ".join(suites),
                str(s["experts"]),
                "each router's own" if s["k"] is None else str(s["k"]),
                ", ".join(str(its["examples"]) for its in suites.values()),
                s["date"][:10],
                s["commit"] or "installed",
                s["code"],
                s["machine"],
            ]
        )
    return "\n".join(["## Where they come from\n", *markdown_table(head, rows), ""])


def kept_of(
    comparison: Mapping[str, Any], title: str, place: str, told: Mapping[str, str | None]
) -> dict[str, Any]:
    """What the page needs of a comparison.json; `told` fills in what older ones don't say.

    Raises SystemExit, naming it, for what neither says.
    """
    known = {**comparison["settings"], **{name: value for name, value in told.items() if value}}
    for name in ("date", "machine", "commit"):
        if name not in known:
            raise SystemExit(f"The file doesn't say its {name}; tell it by --{name}.")
    rows = comparison["rows"]
    first = next(iter(rows.values()))["datasets"]
    return {
        "title": title,
        "page": place,
        "settings": {name: known[name] for name in SETTINGS} | {"experts": len(known["experts"])},
        "suites": {
            suite: {"datasets": len(tasks), "examples": sum(first[task]["n"] for task in tasks)}
            for suite, tasks in comparison["suites"].items()
        },
        "chosen": sorted(comparison["choices"]),
        "rows": {
            row: {
                "label": its["label"],
                "summary": {suite: its["summary"][suite] for suite in comparison["suites"]},
            }
            for row, its in rows.items()
        },
    }


def main(words: Sequence[str]) -> None:
    """Do what `words`, as typed, ask for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--add", nargs=4, metavar=("KEY", "TITLE", "PAGE", "COMPARISON"))
    for name in ("commit", "date", "machine"):
        parser.add_argument(f"--{name}")
    told = parser.parse_args(words)
    if told.add:
        key, title, place, file = told.add
        comparison = json.loads(Path(file).read_text(encoding="utf-8"))
        more = {name: getattr(told, name) for name in ("commit", "date", "machine")}
        text = json.dumps(kept_of(comparison, title, place, more), indent=1, ensure_ascii=False)
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / f"{key}.json").write_text(text + "\n", encoding="utf-8")
    if told.add or told.write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        sys.stdout.write(page())


if __name__ == "__main__":
    main(sys.argv[1:])

"""The report page: what is in it, and how its token explorer behaves in a browser."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from browser import browser, page_at
from phatgoose.analysis.analyse import Analysis, RouterAnalysis
from phatgoose.analysis.distribution import site_label
from phatgoose.analysis.findings import Finding
from phatgoose.analysis.page import inline_json
from phatgoose.analysis.report import report_page, write_report
from phatgoose.analysis.traces import Trace, TraceStream
from phatgoose.evaluation.evaluate import TaskScore
from phatgoose.evaluation.metrics import Sample
from routing_samples import make_profile, names_of, site_names

WORDS = ("The", "heron", "saw", "seven", "ducks", ",", "none", "was", "a", "goose", ".\n")
DATASETS = ("reviews", "trivia")


def make_trace(
    experts: int, tokens: int, stacks: Sequence[str], layers: int, seed: int = 0
) -> Trace:
    """A trace of two experts a token and site, that differ from layer to layer."""
    draw = np.random.default_rng(seed)
    streams = []
    for stack in stacks:
        places = tuple(site_label(site) for site in site_names([stack], layers))
        pieces = [WORDS[i % len(WORDS)] for i in range(tokens)]
        shape = (tokens, len(places))
        first = (draw.zipf(1.6, size=shape) + np.arange(len(places)) // 8) % experts
        second = (first + 1 + draw.integers(experts - 1, size=shape)) % experts
        weight = draw.integers(128, 250, size=shape)
        streams.append(
            TraceStream(
                stack or "decoder",
                tuple(piece if i == 0 else f" {piece}" for i, piece in enumerate(pieces)),
                tuple(int(i > tokens * 0.8) for i in range(tokens)),
                places,
                np.stack([first, second], axis=-1).astype(np.uint16),
                np.stack([weight, 255 - weight], axis=-1).astype(np.uint8),
            )
        )
    return Trace(names_of(experts), "phatgoose", tuple(streams))


def scored(dataset: str, score: float) -> TaskScore:
    """Fifty answers, of which that share is right."""
    sample = Sample.of(["accuracy"], [[[float(i < 50 * score)]] for i in range(50)])
    return TaskScore(dataset, "accuracy", score - 0.1, score + 0.1, sample)


def make_analysis(
    experts: int, *, layers: int, stacks: Sequence[str] = ("",), tokens: int = 40
) -> Analysis:
    names, routers = names_of(experts), {}
    for index, router in enumerate(("phatgoose", "arrow")):
        routers[router] = RouterAnalysis(
            {
                d: make_profile(experts, stacks, layers, 10 * index + i)
                for i, d in enumerate(DATASETS)
            },
            {d: scored(d, score) for d, score in zip(DATASETS, (0.5, 0.62), strict=True)},
            (Finding("never-wins", f"{names[-1]} never wins <anything>.", (names[-1],)),),
            {d: [make_trace(experts, tokens, stacks, layers, i)] for i, d in enumerate(DATASETS)},
        )
    oracle = {d: names[i % experts] for i, d in enumerate(DATASETS)}
    return Analysis(names, DATASETS, routers, oracle)


ROUTERS = make_analysis(3, layers=1).routers
MANY = {"experts": 166, "tokens": 500, "layers": 24, "stacks": ("encoder", "decoder")}


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """The report of eight experts in a model of one stack, in the place of an earlier one."""
    folder = tmp_path_factory.mktemp("few")
    (folder / "figures").mkdir()
    for name in ("layers-old.png", "datasets-old.png", "mine.png"):
        (folder / "figures" / name).touch()
    return write_report(make_analysis(8, layers=6), folder)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A page of 166 experts and texts of 500 tokens in an encoder-decoder model."""
    analysis = make_analysis(166, layers=2, stacks=MANY["stacks"], tokens=10)
    router = replace(analysis.routers["phatgoose"], traces={DATASETS[0]: [make_trace(**MANY)]})
    analysis = replace(analysis, datasets=DATASETS[:1], routers={"phatgoose": router})
    page = tmp_path_factory.mktemp("many") / "report.html"
    page.write_text(report_page(analysis), encoding="utf-8")
    return page


@pytest.fixture(scope="module")
def chromium():
    """One browser for all tests."""
    with browser() as opened:
        yield opened


def test_the_page_tells_scores_findings_and_figures(few):
    page = few.read_text(encoding="utf-8")
    assert "default-src 'none'" in page  # it stands alone: page_at fails when it asks for anything
    texts = ["62.0 [52, 72]", "PHATGOOSE", "Arrow", "wins &lt;anything&gt;", "r with the score"]
    for text in (*texts, *DATASETS):
        assert text in page
    labels = re.findall(r'<svg role="img" aria-label="([^"]+)"', page)
    assert len(labels) == 2 * 2 + 2  # layers, datasets
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    wanted = {f"{k}-{r}.png" for k in ("layers", "datasets") for r in ROUTERS}
    assert {path.name for path in (few.parent / "figures").iterdir()} == {"mine.png", *wanted}


def weights(page):
    items = page.locator(".tx-details li")
    return items.evaluate_all("items => items.map(item => Number(item.dataset.weight))")


@pytest.mark.parametrize(
    ("size", "tokens", "scheme"), [("few", 40, "light"), ("many", 500, "dark")]
)
def test_the_page_loads_without_complaint(chromium, request, size, tokens, scheme):
    with page_at(chromium, request.getfixturevalue(size), color_scheme=scheme) as page:
        assert page.locator(".tx-token").count() == tokens
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        light = sum(map(int, re.findall(r"\d+", colour)[:3])) > 380
        assert light == (scheme == "light")


def test_the_weights_are_those_of_the_trace(chromium, few):
    trace = make_analysis(8, layers=6).routers["phatgoose"].traces[DATASETS[0]][0]
    with page_at(chromium, few) as page:
        for layer, name in ((0, None), (3, "2")):
            page.locator(".tx-layer input").fill(str(layer))
            page.locator(".tx-token").nth(5).hover()
            shown = page.locator(".tx-name").all_inner_texts()
            stream = trace.streams[0]
            sites = [i for i, s in enumerate(stream.sites) if name in (None, s.layer_name)]
            part = replace(
                stream,
                sites=tuple(stream.sites[i] for i in sites),
                experts=stream.experts[:, sites],
                weights=stream.weights[:, sites],
            )
            row = part.shares(8)[5]
            got = dict(zip(shown, weights(page), strict=True))
            wanted = {trace.experts[z]: row[z] for z in range(8) if row[z] > 0}
            assert got == pytest.approx(wanted, abs=1e-3)


def test_the_keyboard_reaches_every_token(chromium, few):
    with page_at(chromium, few) as page:
        text, chosen = page.locator(".tx-text"), page.locator('.tx-token[aria-selected="true"]')
        text.focus()
        moves = {"ArrowRight": 2, "ArrowLeft": 1, "End": 40, "Home": 1, "ArrowUp": 1}
        for key, wanted in (*moves.items(), ("ArrowDown", 12), ("ArrowUp", 1)):  # of lines of 11
            page.keyboard.press(key)
            said = page.locator(".tx-details").inner_text()
            assert int(re.search(r"token (\d+) of", said)[1]) == wanted
        assert chosen.count() == 1
        assert chosen.get_attribute("id") == text.get_attribute("aria-activedescendant")
        said = chosen.get_attribute("aria-label")
        assert sum(float(x) for x in re.findall(r"\d\.\d\d", said)) == pytest.approx(1, abs=0.05)


def test_texts_cannot_break_out_of_the_page():
    hostile = "</script><img src=x onerror=alert(1)>\u2028<!--"
    packed = inline_json({"tokens": [hostile]})
    assert "<" not in packed
    assert json.loads(packed) == {"tokens": [hostile]}

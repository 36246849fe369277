"""The server's page in a browser: answers that stream, tokens in colours, two routings compared."""

import re

import pytest

import serving
from browser import browser, page_at
from discriminants import taught_in
from phatgoose.apps.server import ServedModel, create_app
from phatgoose.apps.server.app import CSS, HEADERS, PAGE, SCRIPT
from phatgoose.config import Routing, Serving
from phatgoose.experts.corrections import Correction, corrections_in
from phatgoose.experts.expert import LAYOUT
from phatgoose.experts.pool import Pool
from routed_models import TOPICS
from serving import PROMPT, until

LIMITS = Serving(max_tokens=500)


@pytest.fixture(scope="module")
def chromium():
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def app(pool):
    return serving.app_of(pool, LIMITS, endless=True)


@pytest.fixture(scope="module")
def address(app):
    with serving.running(app) as address:
        yield address


def ask(page, tokens):
    page.locator("#model option").first.wait_for(state="attached")
    page.fill("#prompt", PROMPT)
    page.fill("#length", str(tokens))
    page.click("#run")


def answer(page):
    before = int(page.locator("#panes").get_attribute("data-answers") or 0)
    ask(page, 12)
    page.locator(f"#panes[data-answers='{before + 1}']").wait_for()


def pieces(page, side="a"):
    return page.locator(f"#pane-{side} .tx-token").all_text_contents()


def status(page, side="a"):
    return page.locator(f"#pane-{side} .status").inner_text()


def looks(page):
    classes = (span.get_attribute("class") for span in page.locator("#pane-a .tx-token").all())
    return [re.sub("tx-token|tx-dim", "", each).strip() for each in classes]


def test_the_page_stands_alone_and_says_so_to_the_browser(app):
    with serving.client_of(app) as client:
        reply = client.get("/")
    assert reply.text == PAGE
    policy = reply.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert re.findall(r"""(?:src|href)=["']?(?!#|data:)[^"'#>]+""", PAGE) == []
    assert "@import" not in CSS
    assert "://" not in SCRIPT
    assert HEADERS["X-Content-Type-Options"] == "nosniff"
    ids = re.findall(r'\bid="([^"]+)"', PAGE)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'\bfor="([^"]+)"', PAGE)) <= set(ids)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_answer_has_the_colours_of_its_experts(chromium, address, scheme):
    with page_at(chromium, address, color_scheme=scheme) as page:
        answer(page)
        said = pieces(page)
        assert "".join(said).startswith(PROMPT)
        assert len(said) == len(PROMPT) + 12
        assert page.locator("#pane-a .tx-token[data-part=answer]").count() == 12  # bold
        seen = looks(page)
        assert seen[-1] == "tx-none"  # the last token never passed the model
        assert len(set(seen)) > 2
        page.locator("#pane-a .tx-layer input").fill("1")
        page.locator("#pane-a .tx-controls select").last.select_option("mlp.up_proj")
        assert looks(page) != seen
        page.locator("#pane-a .tx-token").nth(3).hover()
        assert "mean over 1 site" in page.locator("#pane-a .tx-details").inner_text()
        assert "12 tokens" in status(page)
        who = page.locator("#pane-a .who span").all_text_contents()
        shares = [int(re.search(r"(\d+) %", each)[1]) for each in who]
        assert abs(sum(shares) - 100) <= len(shares)
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", colour)[:3])) > 380) == (scheme == "light")


def test_two_routings_are_seen_side_by_side(chromium, address, pool):
    with page_at(chromium, address, viewport={"width": 1200, "height": 800}) as page:
        page.check("#compare")
        page.select_option("#router-b", "arrow")
        page.fill("#k-b", "1")
        page.fill("#experts-b", "e1, e2")
        answer(page)
        assert pieces(page)[: len(PROMPT)] == pieces(page, "b")[: len(PROMPT)]
        assert pieces(page) != pieces(page, "b")
        assert "router phatgoose" in status(page)
        assert "router arrow" in status(page, "b")
        for button in page.locator(".tx-legend button").all():  # colours by places in the pool
            name = re.search(r"e\d", button.inner_text())[0]
            look = button.locator("span").first.get_attribute("class")
            assert f"tx-c{pool.names.index(name)} " in look
        page.locator("#pane-b .tx-layer input").fill("2")  # both show what one is told to
        assert page.locator("#pane-a .tx-layer output").inner_text() == "1"
        answer(page)
        assert page.locator("#pane-a .tx-layer output").inner_text() == "1"


def test_tokens_come_one_by_one_and_can_be_stopped(chromium, address, app):
    engine = app.state.service.backend.engine
    with page_at(chromium, address) as page, serving.held(40) as released:
        ask(page, 490)
        page.locator("#pane-a .tx-token").nth(len(PROMPT) + 3).wait_for()
        (row,) = [row for batch in engine.batches for row in batch.sequences]
        page.click("#stop")
        page.locator("#panes[aria-busy=false]").wait_for()
        assert "stopped" in status(page)
        assert len(PROMPT) + 3 < len(pieces(page)) <= len(PROMPT) + 41
        until(lambda: row.is_cancelled)
        released.set()
        until(lambda: not engine.running)
        assert len(row.generated) <= 42


@pytest.mark.filterwarnings("ignore:No prompts are read:UserWarning")
def test_prompts_that_experts_bring_are_tried_and_no_others(chromium, place):
    odd = '<b>"Is it</b> & good?"'
    for name, text in (("e3", f"\n {odd} \nIs it bad?\n"), ("e1", "\n")):
        (place / name / LAYOUT.prompts).write_text(text)
    app = serving.app_of(Pool.open(place), LIMITS)
    with serving.running(app) as address, page_at(chromium, address) as page:
        button = page.locator("#examples button")
        button.wait_for()
        assert button.all_inner_texts() == [odd]
        button.click()
        assert page.locator("#prompt").input_value() == odd


def test_a_key_is_asked_for_where_there_is_one(chromium, pool):
    options = {"template": serving.CHAT_TEMPLATE, "endless": True, "api_keys": ["secret"]}
    app = serving.app_of(pool, LIMITS, **options)
    with serving.running(app) as address, page_at(chromium, address, expected="401") as page:
        page.locator("#key").wait_for()
        key, prompt = (page.locator(part).bounding_box() for part in ("#key", "#prompt"))
        assert key["y"] < prompt["y"]  # nothing works without it
        page.fill("#secret", "wrong")
        page.press("#secret", "Enter")
        page.locator("#problem").wait_for()
        page.fill("#secret", "secret")
        page.click("#unlock")
        page.locator("#key").wait_for(state="hidden")
        assert page.locator("#as").input_value() == "chat"
        answer(page)
        assert "".join(pieces(page)).startswith("[user] to be or not")


def test_whose_example_prompts_become_is_seen_once_it_is_asked_for(chromium, pool_of, tmp_path):
    place = taught_in(tmp_path / "experts", pool_of("llama"))
    moved = place / "e0" / LAYOUT.prompts
    moved.write_text("\n".join([f"{TOPICS[0]} {n}" for n in range(3)] + [f"{TOPICS[2]} <b>"] * 2))
    model = ServedModel("goose", str(place), Routing("discriminant"), dtype="float32")
    app = create_app([model, ServedModel("mean", str(place), Routing("merged"), dtype="float32")])
    service = app.state.service
    with serving.running(app) as address, page_at(chromium, address) as page:
        page.locator("#check").wait_for()
        assert service.checked == {}
        page.click("#check summary")
        page.locator("#matrix button").wait_for()
        assert "18 of 20 example prompts stay" in page.inner_text("#verdict")
        heads = page.locator("#matrix thead th").all_text_contents()
        assert heads == ["expert", "kept", "e2"]
        assert page.locator("#matrix tbody tr").all_text_contents() == ["e03 of 52"]
        assert page.locator("#warnings li").count() >= 1
        page.click("#matrix button")
        assert page.locator("#moved li").all_inner_texts() == [f"{TOPICS[2]} <b>"] * 2
        page.select_option("#model", "mean")
        page.locator("#check").wait_for(state="hidden")


@pytest.mark.filterwarnings("ignore:No prompts are read:UserWarning")
def test_long_example_prompts_leave_a_narrow_page_narrow(chromium, place):
    for name in ("e1", "e2", "e3"):
        (place / name / LAYOUT.prompts).write_text(f"{name} reads a long prompt " * 9)
    app = serving.app_of(Pool.open(place), LIMITS)
    narrow = {"width": 400, "height": 800}
    with serving.running(app) as address, page_at(chromium, address, viewport=narrow) as page:
        page.locator("#examples button").last.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 400


@pytest.mark.parametrize("learn", [True, False])
def test_another_expert_can_be_said_to_be_right(chromium, pool_of, tmp_path, learn):
    place = taught_in(tmp_path / "experts", pool_of("llama"))
    model = ServedModel("goose", str(place), Routing("discriminant"), dtype="float32")
    app = create_app([model], Serving(learn=learn))
    app.state.service.models["goose"].runner.tokenizer.chat_template = serving.CHAT_TEMPLATE
    with serving.running(app) as address, page_at(chromium, address) as page:
        assert not page.locator("#correction").is_visible()
        answer(page)
        assert page.locator("#right").is_visible()
        page.select_option("#right", "e3")
        page.locator("#pane-a .who [title='e3 100 %']").wait_for()
        if learn:
            page.get_by_text("kept: e3 is for this").wait_for()
        until(lambda: page.locator("#panes[aria-busy='false']").count() == 1)
        assert page.locator("#problem").is_hidden()
    assert corrections_in(place) == [Correction("e3", PROMPT)] * learn

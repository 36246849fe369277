"""`phatgoose compose`, `generate`, `evaluate`, `analyse` and `audit`."""

import json
import shutil

import pytest

from attackers import attacked, honest
from command_line import BASE, review, write_rows
from routed_models import SCORES


def test_generate_shows_the_experts_behind_the_tokens(here, phat):
    by = ["--router", "discriminant:fallback=off", "--k", 2]
    flags = ["--show-experts", "--max-new-tokens", 3, *by, *BASE]
    answer = ["--answer", "yes\x1b[31m"]  # it must not steer the terminal
    whole = []
    for more in ([], answer):  # chosen by the prompt alone, whatever answer stands after it
        outcome = phat("generate", "experts", "Film", *flags, *more, "--json", "why.json")
        assert outcome.code == 0, outcome.err
        assert "\x1b[31m" not in outcome.out
        told = json.loads((here / "why.json").read_text())
        assert told["trace"]["format"] == "phatgoose-trace-1"
        assert json.loads(outcome.out.splitlines()[-1]) == told["summary"]
        assert told["summary"].keys() <= {"reviews", "counting"}
        assert sum(told["summary"].values()) == pytest.approx(1, abs=1e-3)
        (first, one), (second, other) = told["trace"]["whole"]
        assert f"for the whole prompt: {first} {one:.2f}, {second} {other:.2f}" in outcome.out
        whole.append(told["trace"]["whole"])
    assert "Film yes" in outcome.out
    assert whole[0] == whole[1]


def test_adapters_of_trl_are_asked_in_the_chat_template_that_they_were_trained_in(
    here, phat, caplog
):
    """SFTTrainer leaves an adapter beside tokenizer and template, and no record of its prompts."""
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    (here / "tiny-base" / "chat_template.jinja").write_text(template)
    for name in ("reviews", "counting"):
        folder = here / "adapters" / name
        folder.mkdir(parents=True)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(here / "experts" / name / file, folder)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(here / "tiny-base" / file, folder)
        (folder / "training_args.bin").write_bytes(b"a pickle, which nobody reads")
        (folder / "prompts.txt").write_text("".join(f"{name} {i}\n" for i in range(3)))
    (here / "plain.toml").write_text("[formatting]\nchat = false\n")
    ways = {(): True, ("--no-chat",): False, ("--recipe", "plain.toml"): False}
    ways |= {("--recipe", "plain.toml", "--chat"): True}
    weights = []
    for way, is_chat in ways.items():
        words = ["--show-experts", "--max-new-tokens", 2, "--json", "-", *BASE, *way]
        shown = phat("generate", "adapters", "reviews 9", *words)
        assert shown.code == 0, shown.err
        told = json.loads(shown.out)
        tokens = "".join(told["trace"]["streams"][0]["tokens"])
        asked = "<user>reviews 9<assistant>" if is_chat else "reviews 9"
        assert tokens.startswith(asked)
        form = "a message in the base's chat template" if is_chat else "plain text"
        assert f"Router discriminant; the prompt is {form}" in caplog.messages[-1]
        weights.append(told["trace"]["whole"])
    assert weights == weights[:1] * len(ways)  # routed by the prompt as `prompts.txt` was read


def test_a_pool_is_analysed_under_several_routers_and_a_routed_model_under_its_own(
    llama_pool, phat, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        write_rows(tmp_path / f"{name}.jsonl", [review(i, input=f"{name} {i}") for i in range(4)])
    (tmp_path / "scores.json").write_text(json.dumps({"experts": SCORES}))
    analysed = llama_pool.experts[0].directory.parent
    tasks = ["--task", "first.jsonl", "--task", "second.jsonl", "--dtype", "float32", "--limit", 3]
    more = ["--against", "arrow", "--scores", "scores.json"]
    done = phat("analyse", analysed, *tasks, "--router", "phatgoose", *more, "--out", "seen")
    assert done.code == 0, done.err
    assert "report -> seen/report.html" in done.out
    assert all(text in done.out for text in ("PHATGOOSE", "Arrow", "first", "second", "e1"))
    numbers = json.loads((tmp_path / "seen" / "analysis.json").read_text())
    assert list(numbers["routers"]) == ["phatgoose", "arrow"]
    assert numbers["oracle"] == {"first": "e1", "second": "e2"}
    assert numbers["routers"]["arrow"]["scores"]["first"]["n"] == 3
    assert (tmp_path / "seen" / "figures" / "layers-phatgoose.png").is_file()
    assert phat("compose", analysed, "--router", "arrow", "--out", "routed").code == 0
    done = phat("analyse", "routed", *tasks, "--scores", "scores.json")
    assert done.code == 0, done.err
    assert "Arrow" in done.out
    assert (tmp_path / "analysis" / "report.html").is_file()
    numbers = json.loads((tmp_path / "analysis" / "analysis.json").read_text())
    assert numbers["oracle"] == {"first": "e1", "second": "e2"}


def test_templates_serve_rows_of_any_fields(here, phat):
    write_rows(here / "raw.jsonl", [{"text": f"t{i}", "label": i % 2} for i in range(6)])
    outcome = phat(
        "evaluate", "experts", "--task", "raw.jsonl", *BASE,
        "--template", "{{ text }} is ||| {{ answer_choices[label] }}", "--choices", "good ||| bad",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "rank classification" in outcome.out


@pytest.fixture
def crowd(pool_of, tmp_path, monkeypatch):
    """Eight experts in a folder of the current one, e2 with its own means for gates."""
    monkeypatch.chdir(tmp_path)
    pool = honest(pool_of("llama", (4,) * 8))
    for expert in attacked(pool, 2, "gate equal to own mean").experts:
        expert.save(tmp_path / "crowd" / expert.name)
    return tmp_path


def test_audit_and_compose_name_who_looks_unlike_the_others(crowd, phat):
    outcome = phat("audit", "crowd", "--json", "audit.json")
    assert outcome.code == 1, outcome.err
    assert "*" in outcome.out
    assert "e2: its gates have a cosine of 1.00 with its means" in outcome.out
    assert "--leave-out e2" in outcome.out
    written = json.loads((crowd / "audit.json").read_text())
    assert {name for finding in written["findings"] for name in finding["experts"]} == {"e2"}
    clean = phat("audit", *sorted((crowd / "crowd").glob("e[!2]")))
    assert (clean.code, clean.err) == (0, "")
    assert "nothing found" in clean.out
    (line,) = phat("compose", "crowd", "--out", "routed").err.splitlines()
    assert line.startswith("warning: 1 of 8 experts don't look like the others: e2.")
    assert "phatgoose audit" in line


def test_audit_reads_example_prompts(crowd, phat):
    folders = sorted((crowd / "crowd").glob("e[!2]"))
    for number, folder in enumerate(folders):
        (folder / "prompts.txt").write_text(f"{number} plums\n" * 3)
    outcome = phat("audit", *folders, "--json", "audit.json")
    signs = json.loads((crowd / "audit.json").read_text())["signs"]
    assert sum(signs["prompt_wins"]) > 0  # their statistics are random
    assert "example prompts router discriminant gives 3 to" in " ".join(outcome.out.split())


IGNORED = "Router merged doesn't use --k."


@pytest.mark.parametrize(
    ("command", "warning"),
    [
        ("compose experts --k 9", "k is 9, but the pool has 2 experts"),
        ("export experts --router merged --k 1", IGNORED),
        ("analyse experts --task unseen.jsonl --router merged --k 2", IGNORED),
        ("serve goose=experts?router=merged&k=4 --dtype float33", IGNORED),
    ],
)
def test_settings_that_a_router_ignores_are_told(here, phat, command, warning):
    name, *words = command.split()
    if name == "serve":
        pytest.importorskip("fastapi", reason="needs phatgoose[serve]")
    outcome = phat(name, *words, *([] if name == "serve" else ["--out", "new", *BASE]))
    assert outcome.err.splitlines()[0].startswith(f"warning: {warning}")

"""What is measured is what is served: a prompt gets the same experts by every way of asking."""

from collections.abc import Sequence

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs phatgoose[serve]")


from phatgoose.apps.generation import explain, generate
from phatgoose.apps.server import ServedModel, create_app
from phatgoose.config import Formatting, Routing
from phatgoose.evaluation.evaluate import evaluate
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.recording import record
from phatgoose.routing.routers.registry import OURS
from phatgoose.tasks.task import Example, Task
from routed_models import SCORES, with_embeddings
from serving import CHAT_TEMPLATE, client_of

PROMPT = "WHO? 5 + 6 = 11, or plums"
CHOICES = ("pears", "5 + 6", "zigzag jazz; zigzag")  # which no served prompt has
CLOSE = 1.5 / 255  # traces and the server give weights in 255ths
# random draws lots, oracle is told the task's name
SERVED = [name for name in OURS if name not in ("random", "oracle")]


@pytest.fixture(scope="module")
def saved(pool_of, tmp_path_factory) -> Pool:
    """e0 to e3, with all that any router needs, saved side by side."""
    root = tmp_path_factory.mktemp("experts")
    return Pool(
        tuple(each.save(root / each.name) for each in with_embeddings(pool_of("llama")).experts)
    )


@pytest.mark.parametrize(
    ("router", "chat"),
    [*((name, True) for name in SERVED), ("phatgoose", False), ("discriminant", False)],
)
def test_a_prompt_gets_the_same_experts_however_it_is_asked(
    llama, saved, toy_embedder, router, chat
):
    scores = {"scores": SCORES} if router == "best-individual" else {}
    tokenizer, formatting = llama.tokenizer, Formatting(chat=chat)
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    router = {"single": "single:expert=e2", "weights": "weights:e0=0.4,e1=0.1,e2=0.2,e3=0.3"}.get(
        router, router
    )
    model = compose(saved, llama, router=router, **scores)

    def evaluated(task: Task) -> np.ndarray:
        with record(model) as recording:
            evaluate(model, task, tokenizer=tokenizer, formatting=formatting, max_new_tokens=1)
        return recording.by_token().numpy()

    written = evaluated(Task("written", test=(Example(PROMPT, "pears"),)))
    ranked = evaluated(Task("ranked", test=(Example(PROMPT, "pears", CHOICES),)))[: len(written)]
    with record(model) as recording:
        generate(model, tokenizer, PROMPT, 2, formatting)
    generated = recording.by_token().numpy()[: len(written)]
    (stream,) = explain(model, tokenizer, PROMPT, "pears", formatting=formatting).trace.streams
    explained = stream.shares(written.shape[1])[: len(written)]
    detach(model)

    np.testing.assert_allclose(ranked, written, atol=1e-6)
    np.testing.assert_allclose(generated, written, atol=1e-6)
    np.testing.assert_allclose(explained, written, atol=CLOSE)
    if not scores:  # the server has no scores to choose the best individual by
        names = ["e2"] if router.startswith("single") else saved.names  # single has one expert
        answered = served(saved, names, Routing(router), chat=chat)
        np.testing.assert_allclose(answered, written, atol=CLOSE)


def served(pool: Pool, names: Sequence[str], routing: Routing, *, chat: bool) -> np.ndarray:
    """The weights [tokens, E] that the server reports of the prompt's tokens."""
    place = str(pool.experts[0].directory.parent)
    app = create_app([ServedModel("goose", place, routing, dtype="float32")])
    wish = {"model": "goose", "max_tokens": 2, "temperature": 0, "routing": True}
    with client_of(app) as client:
        if chat:
            app.state.service.models["goose"].runner.tokenizer.chat_template = CHAT_TEMPLATE
            wish["messages"] = [{"role": "user", "content": PROMPT}]
            answer = client.post("/v1/chat/completions", json=wish)
        else:
            answer = client.post("/v1/completions", json={**wish, "prompt": PROMPT})
    (choice,) = answer.json()["choices"]
    rows = [each["experts"] for each in choice["routing"]["tokens"] if each["part"] == "prompt"]
    return np.array([[row.get(name, 0.0) for name in names] for row in rows])

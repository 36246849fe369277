"""Tiny pools composed by every router, with all that it needs; saved models compared."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from phatgoose.base.identity import Base
from phatgoose.config import Routing
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, composition_of, save
from phatgoose.routing.routers.router import RouterAtSite, router_of
from phatgoose.tasks.embeddings import DEFAULT_EMBEDDER, PAPER_TEXT, PROMPT, paper_texts
from phatgoose.tasks.task import Example
from tiny import write_expert
from toy_embedders import toy_embed

TOPICS = ("apples, pears and plums", "1 + 2 = 3, 4 + 5 = 9", "WHAT? WHO? WHY?", "jazz quiz; zigzag")
FEW_EXAMPLES = Path(__file__).with_name("few_examples.jsonl")  # of e0's topic
SCORES = {  # of the experts e0 to e3: e1 is the best at "first", e2 at "second", e3 on the whole
    "e0": {"first": 0.1, "second": 0.4},
    "e1": {"first": 0.8, "second": 0.1},
    "e2": {"first": 0.0, "second": 0.9},
    "e3": {"first": 0.6, "second": 0.7},
}


def with_embeddings(pool: Pool, form: str = PROMPT) -> Pool:
    """The pool whose experts have trained on one of TOPICS each: e0 on one input, e1 on two.

    `form` says what is embedded: the inputs alone, or as the paper does.
    """
    experts = []
    for z, (expert, topic) in enumerate(zip(pool.experts, TOPICS, strict=False)):
        texts = [f"Tell me of {topic * (copies + 1)}" for copies in range(z + 1)]
        if form == PAPER_TEXT:
            texts = paper_texts([Example(text, "") for text in texts])
        info = replace(expert.info, embedder=DEFAULT_EMBEDDER, embedding_form=form)
        experts.append(replace(expert, info=info, embeddings=toy_embed(texts)))
    return Pool(tuple(experts))


def tailed(experts: Iterable[Expert], tails: Sequence[int | None]) -> Pool:
    """A pool of `experts` that act on these many of a prompt's last tokens, None for all."""
    pairs = zip(experts, tails, strict=True)
    infos = ((e, replace(e.info, acts_on=tail and {"tail": tail})) for e, tail in pairs)
    return Pool(tuple(replace(expert, info=info) for expert, info in infos))


def compose_by(router: str, pool: Pool, base: Base, **options: object) -> PreTrainedModel:
    """`pool`, of e0 to e3 or fewer, composed by any router with all that this one needs.

    No prompt falls back on the base, to which a tiny one's prompts are all alike.
    """
    mixture = zip(pool.names[-2:], ("=0.7", "=0.3"), strict=False)
    settings = {
        "single": f":expert={pool.names[-1]}",
        "few-shot": f":examples={FEW_EXAMPLES},by=centroid",
        "weights": ":" + ",".join(name + weight for name, weight in mixture),
    }
    router += settings.get(router, "")
    if router.partition(":")[0] == "discriminant":
        router += f"{',' if ':' in router else ':'}fallback=off"
    model = compose(with_embeddings(pool), base, router=router, scores=SCORES, **options)
    return of_task(model, "second")


def of_task(model: PreTrainedModel, task: str) -> PreTrainedModel:
    """`model`, told by hand that all inputs to come belong to `task`; router oracle must know."""
    parts = composition_of(model)
    if parts.context is not None and parts.router.name == "oracle":
        parts.context.use(parts.chooser.choose([[]], task=task))
    return model


def by_vectors(text: str, vectors: torch.Tensor, k: int = 2) -> RouterAtSite:
    """The router that `text` names, where an expert acts for each of `vectors`, its table."""
    router, E = router_of(Routing(text, k=k)), len(vectors)
    table = {"vectors": vectors} if router.sizes else {}
    return RouterAtSite(
        router, "blocks.0.linear", torch.arange(E), [f"e{z}" for z in range(E)], table
    )


def router_at(site: str, base: Base, pool: Pool, text: str, k: int | None = None) -> RouterAtSite:
    """The router that `text` names at one site, where all experts of `pool` act."""
    router = router_of(Routing(text, k)).fitted(pool, base.model, base.tokenizer)
    return RouterAtSite(router, site, torch.arange(len(pool)), pool.names, router.table(pool, site))


def uneven_pool(base: Base, folder: Path) -> Pool:
    """e0 to e3 of ranks 2, 1, 3, 1; e1 acts on queries only, e3 at no query."""
    others = ["k_proj", "v_proj", "down_proj"]
    shapes = (
        {"rank": 2, "target_modules": [*others, "q_proj"]},
        {"rank": 1, "target_modules": ["q_proj"]},
        {"rank": 3},
        {"rank": 1, "target_modules": others},
    )
    pairs = enumerate(shapes)
    return Pool(tuple(write_expert(base, folder, f"e{z}", seed=z, **each) for z, each in pairs))


def composed(router: str, pool: Pool, base: Base):
    return compose(pool, copy.deepcopy(base), router=router)


def assert_is_that_of(folder: Path, router: str, pool: Pool, base: Base) -> None:
    """What was saved and changed is byte for byte what `pool`, composed and saved, is."""
    save(composed(router, pool, base), folder.parent / "new", overwrite=True)
    for name in ("routed.json", "routed.safetensors"):
        assert (folder / name).read_bytes() == (folder.parent / "new" / name).read_bytes()

"""The audit: signs mean what they say, attackers are found, honest experts are not accused."""

from dataclasses import replace

import pytest
import torch

from attackers import ATTACKS, attacked, honest
from phatgoose.analysis.audit import SIGNS, audit, signs_of
from phatgoose.errors import ExpertError
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.reader import ReaderReference
from routed_models import TOPICS
from tiny import small_reader


@pytest.fixture
def pool(pool_of) -> Pool:
    return honest(pool_of("llama", (4,) * 8))


def test_honest_experts_are_not_accused(pool):
    whole = audit(pool)
    assert (whole.findings, whole.summary) == ((), "")
    assert whole.notes == ("No example prompts beside prompt statistics, so nothing to read.",)
    assert audit(Pool(pool.experts[:5])).findings == ()


@pytest.mark.parametrize("strength", [0, 1])
@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attacker_is_found_and_no_one_else(pool, attack, strength):
    for z in (0, 5):
        report = audit(attacked(pool, z, attack, strength))
        assert report.unusual == (pool.names[z],), report.findings
        assert pool.names[z] in report.summary
        for finding in report.findings:
            assert finding.kind in {sign.name for sign in SIGNS}
            assert f"--leave-out {pool.names[z]}" in finding.message


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_experts_are_not_compared_and_that_is_said(pool, count):
    few = Pool(pool.experts[:count])
    assert audit(few).findings == ()
    assert "too few to compare" in audit(few).notes[0]
    if count > 1:
        assert audit(attacked(few, 0, "gate equal to own mean")).unusual == ("e0",)
        assert "e0" in audit(attacked(few, 0, "copied embeddings")).unusual


def changed(pool: Pool, z: int, **parts: object) -> Pool:
    return Pool((*pool.experts[:z], replace(pool.experts[z], **parts), *pool.experts[z + 1 :]))


def test_the_size_of_an_update_is_that_of_its_product(pool):
    signs = signs_of(pool)
    norms = torch.tensor(
        [[float((m.scale * m.B @ m.A).norm()) for m in e.lora.values()] for e in pool.experts]
    )
    relative = norms / norms.quantile(0.5, dim=0)
    size = relative.quantile(0.5, dim=1)
    for name, wanted in (("update_size", size), ("update_spread", relative.amax(dim=1) / size)):
        torch.testing.assert_close(signs[name].float(), wanted, rtol=1e-4, atol=1e-4)


def test_what_rows_read_is_the_share_of_a_projection_times_wins(pool):
    wanted = []
    for site in pool.sites:
        units = [e.means[site].double() / e.means[site].double().norm() for e in pool.experts]
        rows = [expert.lora[site].A.double() for expert in pool.experts]
        spans = [torch.linalg.pinv(A) @ A for A in rows]
        inside = [[float(u @ span @ u - span.trace() / len(u)) for u in units] for span in spans]
        winners = [max(range(8), key=lambda z: inside[z][w]) for w in range(8)]
        for z, row in enumerate(inside):
            others = [w for w in range(8) if w != z]
            share = sum(row[w] for w in others) / 7
            wanted.append(share * sum(winners[w] == z for w in others) / 7)
    means = torch.tensor(wanted, dtype=torch.float64).view(len(pool.sites), 8).mean(dim=0)
    torch.testing.assert_close(signs_of(pool)["input_pull"], means)


def test_what_rows_read_needs_means_of_others_but_none_of_its_own(pool):
    bare = Pool(tuple(replace(expert, means={}) for expert in pool.experts))
    assert signs_of(bare)["input_pull"].isnan().all()
    turned = attacked(pool, 3, "rows of A at usual activation")
    assert audit(changed(turned, 3, means={})).unusual == ("e3",)


def test_copies_are_put_down_to_who_shares_with_most(pool):
    six = Pool(pool.experts[:6])
    rows = torch.cat([six.experts[z].embeddings for z in (1, 2, 3)])
    signs = signs_of(changed(six, 0, embeddings=rows))
    assert signs["embedding_copies"].tolist() == [1, 0, 0, 0, 0, 0]
    assert signs["embedding_wins"][0] == pytest.approx(3 / 5)
    assert signs["embedding_count"].tolist() == [3, 1, 1, 1, 1, 1]
    twins = signs_of(changed(six, 0, embeddings=six.experts[1].embeddings))
    assert twins["embedding_copies"].tolist() == [1, 1, 0, 0, 0, 0]  # who copied can't be said


def test_experts_have_the_signs_of_what_they_have(pool):
    signs = signs_of(changed(pool, 1, gates={}, means={}, prompt_statistics={}, embeddings=None))
    for name, values in signs.items():
        assert bool(values[1].isnan()) != name.startswith(("update", "input")), name
        assert not values[[0, *range(2, 8)]].isnan().any(), name


@pytest.fixture
def reading(pool_of, tmp_path):
    """Four experts that bring three prompts each and the statistics of others."""
    experts = []
    for expert, topic in zip(pool_of("llama").experts, TOPICS, strict=True):
        source = tmp_path / expert.name
        source.mkdir()
        (source / "prompts.txt").write_text("".join(f"{topic * n}\n" for n in (1, 2, 3)))
        experts.append(read_by(replace(expert, source=source), [topic * n for n in (4, 5, 6)]))
    return Pool(tuple(experts))


def read_by(expert: Expert, texts: list[str]) -> Expert:
    return expert.with_prompts_read(small_reader(), texts)


def test_who_takes_others_published_prompts_is_found(reading):
    pool = reading
    honest = audit(pool)
    assert honest.unusual == ()
    assert not any("example prompts" in note for note in honest.notes)
    assert honest.signs["prompt_wins"] == (0, 0, 0, 0)
    published = [text for expert in pool.experts[:3] for text in expert.prompts]
    turned = changed(
        pool, 3, prompt_statistics=read_by(pool.experts[3], published).prompt_statistics
    )
    report = audit(turned)
    assert report.unusual == ("e3",)
    assert "prompt_wins" in {finding.kind for finding in report.findings}
    assert any(note.endswith("to e3.") for note in report.notes)


def test_prompts_are_read_where_there_are_some_and_their_reader_is_known(reading):
    pool = reading
    bare = audit(changed(pool, 0, prompt_statistics={}))
    assert bare.signs["prompt_wins"][0] is not None  # as `compose` has it, from its prompts
    few = audit(Pool(tuple(replace(e, source=None) for e in pool.experts)))
    assert "prompt_wins" not in few.signs
    assert "No example prompts" in few.notes[-1]
    # What can't be compared is said, and what is known without it stays.
    of_base = replace(pool.experts[0].info, reader=None)
    strange = replace(pool.experts[0].info, reader=ReaderReference("you/reader", 1, 1))
    away = replace(pool.experts[0].info, reader=ReaderReference("gemma", 1, 1))
    for info, words in (
        (of_base, "that its base made"),
        (strange, "'you/reader:1-1'"),
        (away, "can't be loaded"),
    ):
        unread = audit(Pool(tuple(replace(e, info=info) for e in pool.experts)))
        assert "prompt_wins" not in unread.signs
        assert words in unread.notes[-1]
        assert unread.signs["reading_distance"] == few.signs["reading_distance"]


def read_by_another(pool: Pool, count: int) -> Pool:
    """The first experts' statistics are another reader's, whose states have the same sizes."""
    experts = []
    for expert in pool.experts[:count]:
        info = replace(expert.info, reader=ReaderReference("you/reader", 1, 1))
        far = {name: 1e4 * part for name, part in expert.prompt_statistics.items()}
        experts.append(replace(expert, info=info, prompt_statistics=far))
    return Pool((*experts, *pool.experts[count:]))


def test_statistics_of_another_reader_are_not_compared_and_that_is_said(pool):
    report = audit(read_by_another(pool, 3))
    rest = signs_of(Pool(pool.experts[3:]))
    for name in ("reading_distance", "reading_trace", "reading_masks"):
        assert report.signs[name] == (None, None, None, *rest[name].tolist())
    assert report.findings == ()
    assert any("another reader" in note and "e0, e1, e2" in note for note in report.notes)


def test_prompts_of_those_with_the_usual_reader_are_read(reading):
    report = audit(read_by_another(reading, 1))
    assert report.signs["prompt_wins"] == (None, 0, 0, 0)


def test_experts_of_other_sizes_are_refused_and_odd_statistics_left_out(pool):
    odd = {name: part[:, :1] for name, part in pool.experts[0].prompt_statistics.items()}
    assert signs_of(changed(pool, 0, prompt_statistics=odd))["reading_distance"][0].isnan()
    turned = dict(reversed(pool.experts[0].prompt_statistics.items()))  # as a file's author likes
    assert (
        not signs_of(changed(pool, 0, prompt_statistics=turned))["reading_distance"].isnan().any()
    )
    gates = {site: gate[:-1] for site, gate in pool.experts[0].gates.items()}
    with pytest.raises(ExpertError, match=r"layers of \d+ and \d+ features"):
        signs_of(changed(pool, 0, gates=gates))

"""Experts of strangers in use: checked, imported, composed, printed and saved, or refused.

Whatever is done to a directory whose base is at hand, each use of it works or ends in one line.
PHATGOOSE_FUZZ sets how many damaged directories are tried (docs/reliability.md has figures).
"""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from damage import content_of, damages, do_all
from damaged_experts import FILES, JSON_FILES, TENSOR_FILES, record_hashes
from mixed_experts import make_kind
from phatgoose.apps.cli import main
from phatgoose.base.loading import Base, load_base
from phatgoose.errors import PhatgooseError
from phatgoose.experts.expert import LAYOUT, Expert
from phatgoose.experts.importing.adapter import import_adapter
from phatgoose.experts.pool import Pool
from phatgoose.routing.compose import compose, detach
from phatgoose.routing.saved.load import load
from phatgoose.routing.saved.save import save
from tiny import make_ids, make_model, make_tokenizer

EXAMPLES = int(os.environ.get("PHATGOOSE_FUZZ", "20"))
KINDS = ("lora", "biased", "ia3", "bottleneck")
IDS = make_ids(rows=2)


class World:
    """A tiny base and an expert of each kind, made when first asked for."""

    def __init__(self) -> None:
        self.place = Path(tempfile.mkdtemp())
        make_model("llama").save_pretrained(self.place / "base")
        make_tokenizer(final_eos=False).save_pretrained(self.place / "base")
        self.base: Base = load_base(self.place / "base", dtype="float32")
        for kind in KINDS:
            made = make_kind(kind, self.base, self.place)
            made.directory.rename(self.place / "experts" / kind)


@pytest.fixture(scope="module")
def world():
    """The world of this file's tests."""
    made = World()
    yield made
    shutil.rmtree(made.place)


def one_line_or(action: Callable[[], object]) -> None:
    """Do `action`, which must succeed or end in one line."""
    try:
        action()
    except PhatgooseError as error:
        told = str(error)
        assert "\n" not in told
        assert len(told) < 2500


def command(*words: object) -> None:
    """The command, which must print what can't steer a terminal and end with 0 or 2."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as caught:
        main([str(word) for word in words])
    assert caught.value.code in (0, 2)
    told = out.getvalue() + err.getvalue()
    assert not set("\x1b\r\x07\x08\u202e") & set(told)
    assert "Traceback" not in told


def run(pool: Pool, base: Base, place: Path) -> None:
    """Compose `pool`, use it, save it and load what was saved."""
    model = compose(pool, base)
    try:
        with torch.no_grad():
            model(IDS)
        save(model, place)
    finally:
        detach(model)
    detach(load(place, base))


@settings(
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(damages(JSON_FILES, TENSOR_FILES, (LAYOUT.card,)), st.booleans(), st.sampled_from(KINDS))
def test_a_damaged_directory_is_used_or_refused_in_one_line(world, done, rehash, kind):
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        place = Path(name)
        folder = shutil.copytree(world.place / "experts" / kind, place / "experts" / "e")
        (place / "secret.json").write_text("{}")
        do_all(done, folder)
        if rehash:
            record_hashes(folder)
        before = {path: content_of(path) for path in (place / "secret.json",)}
        bare = place / "bare"  # the adapter alone, as it is imported
        bare.mkdir()
        for file in FILES:
            if file in JSON_FILES[1:] + TENSOR_FILES[:2] and (folder / file).is_file():
                with suppress(OSError):
                    shutil.copyfile(folder / file, bare / file, follow_symlinks=False)
        base, named = copy.deepcopy(world.base), str(world.place / "base")
        one_line_or(lambda: run(Pool.open(folder), base, place / "routed"))
        one_line_or(lambda: import_adapter(bare, place / "mine", base=named))
        one_line_or(lambda: import_adapter(bare, place / "lossy", base=named, allow_loss=0.5))
        command("check", folder)
        command("pool", place / "experts", "--out", place / "pool.json")
        if (place / "pool.json").exists():
            assert len(Pool.open(place / "pool.json")) == 1
            json.loads((place / "pool.json").read_text())
        if (place / "mine").exists():
            assert Expert.load(place / "mine").modules
        assert {path: content_of(path) for path in before} == before

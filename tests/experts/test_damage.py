"""Every kind of damage to an expert directory is refused in one line that names it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from changed_experts import DOWN, QUERY
from damage import record_hashes
from odd_files import one_line_of
from paths import GOLDENS
from phatgoose.errors import ExpertError
from phatgoose.experts.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from phatgoose.experts.expert import LAYOUT, Expert
from phatgoose.files import sha256_of

Damage = Callable[[Path], object]
INFO, VECTORS, EMBEDDINGS = LAYOUT.info, LAYOUT.vectors, LAYOUT.embeddings
LORA = f"base_model.model.{QUERY}"


def put(file: str, **changes: object) -> Damage:
    """Set keys of a JSON file; KeyError takes one away."""

    def do(folder: Path) -> None:
        content = json.loads((folder / file).read_text()) | changes
        kept = {key: value for key, value in content.items() if value is not KeyError}
        (folder / file).write_text(json.dumps(kept))

    return do


def write(file: str, text: str) -> Damage:
    return lambda folder: (folder / file).write_text(text)


def remove(file: str) -> Damage:
    return lambda folder: (folder / file).unlink()


def cut(file: str, length: int) -> Damage:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:length])


def tensor(file: str, name: str, value: torch.Tensor | None) -> Damage:
    """Another tensor of that name in a file, or none."""

    def do(folder: Path) -> None:
        tensors = {key: held for key, held in load_file(folder / file).items() if key != name}
        save_file(tensors if value is None else tensors | {name: value}, folder / file)

    return do


def odd(value: float, *shape: int) -> torch.Tensor:
    return torch.full(shape or (4,), value)


lora, ia3 = partial(tensor, ADAPTER_WEIGHTS), partial(tensor, ADAPTER_WEIGHTS)
bottleneck, dora = partial(tensor, "bottleneck.safetensors"), partial(tensor, "dora.safetensors")
vector = partial(tensor, VECTORS)
MEAN = torch.zeros(2, 3)
STATISTICS = {"mean": MEAN, "factor": torch.zeros(2, 4, 3), "rest": MEAN}


VECTORS_OF_A_SITE = {
    odd(0, 1, 4): "is (1, 4)",
    odd(0).half(): "torch.float16; wanted (4) torch.float32",
    odd(math.nan): "not finite",
    None: f"gates: {QUERY} is missing",
}


def prompt_statistics(**changes: torch.Tensor) -> Damage:
    def do(folder: Path) -> None:
        for part, value in (STATISTICS | changes).items():
            vector(f"reading.whole.{part}", value)(folder)

    return do


PEFT = partial(put, ADAPTER_CONFIG)
ABOUT = partial(put, INFO)
OURS = partial(put, "bottleneck_config.json")
UNROUTED = {"use_dora": True, "modules_to_save": ["x"], "bias": "all", "some_new_option": 3}
UNROUTED |= {"layer_replication": [[0, 1]], "target_parameters": ["x"], "use_qalora": True}

# What is done to a golden expert, and words of the refusal.
DAMAGES: dict[str, list[tuple[Damage, str]]] = {
    "expert": [
        *((remove(f), f) for f in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, VECTORS, EMBEDDINGS)),
        *((cut(f, n), "not valid") for f in (ADAPTER_WEIGHTS, VECTORS) for n in (0, 40, -4)),
        *((write(f, text), f) for f in (INFO, ADAPTER_CONFIG) for text in ("{", "[]", "\x00")),
        *((ABOUT(format_version=value), "format_version: ") for value in (2, None, "1")),
        (ABOUT(name="../../etc"), "got '../../etc'"),
        (ABOUT(base="tiny"), "base: Input should be"),
        (ABOUT(base={"id": "a", "revision": "../../up"}), "'../../up'"),
        (ABOUT(embedder="a\nb"), "embedder: "),
        (ABOUT(colour="red"), "colour"),
        (ABOUT(adapter_sha256=KeyError), "adapter_sha256"),
        (ABOUT(vectors_sha256=None), f"{VECTORS} isn't the one"),
        (ABOUT(acts_on={"tail": 0}), "tail"),
        (ABOUT(prompts_read=10**400), "prompts_read: "),
        (ABOUT(reader="minilm"), "reader: "),
        (ABOUT(reader={"id": "minilm", "first": 2}), "reader.last: "),
        (ABOUT(reader={"id": "minilm", "first": -1, "last": 5}), "reader.first: "),
        (ABOUT(reader={"id": "minilm", "first": 2, "last": 5, "place": "/etc"}), "reader.place: "),
        (ABOUT(reader={"id": "a\nb", "first": 2, "last": 5}), "reader.id: "),
        (PEFT(peft_type=None), "type None; wanted LORA or IA3"),
        (PEFT(peft_type="PREFIX_TUNING"), "'PREFIX_TUNING'; wanted LORA"),
        (PEFT(peft_type="LOHA"), "--allow-loss"),
        *((PEFT(**{key: UNROUTED[key]}), f"uses {key!r}, which can't be") for key in UNROUTED),
        (PEFT(lora_bias=True), "bias is missing; wanted (4) torch.float32 or"),
        (PEFT(lora_alpha="8"), "lora_alpha: Input should be a valid number"),
        (PEFT(alpha_pattern={"(": 2}), "no name or regular expression"),
        *((PEFT(init_lora_weights=way), "changed the base") for way in ("corda", "pissa_niter_4")),
        (lora(f"{LORA}.lora_A.weight", None), f"site {QUERY}: A is missing; wanted"),
        *(
            (lora(f"{LORA}.lora_B.weight", torch.zeros(shape)), f"site {QUERY}: B is {shape}")
            for shape in ((3, 4), (4,), (3, 2, 1))
        ),
        *(
            (lora(f"{LORA}.lora_B.weight", odd(v, 3, 2)), "not finite")
            for v in (math.nan, math.inf)
        ),
        *(
            (lora(name, odd(1)), f"{name} is (4,) torch.int64; wanted no such tensor")
            for name in ("base_model.model.lm_head.weight", f"{LORA}.lora_magnitude_vector", QUERY)
        ),
        *((vector(f"gate.{QUERY}", value), words) for value, words in VECTORS_OF_A_SITE.items()),
        (vector(f"mean.{QUERY}", odd(0, 31)), f"means: {QUERY} is (31,)"),
        (vector("gate.model.layers.9.x", odd(0)), "gates: model.layers.9.x is (4,)"),
        (prompt_statistics(mean=torch.zeros(2, 4)), "prompt_statistics: whole.mean is (2, 4)"),
        (prompt_statistics(rest=-torch.ones(2, 3)), "variances below 0"),
        (prompt_statistics(mean=MEAN.double()), "is (2, 3) torch.float64; wanted"),
        (tensor(EMBEDDINGS, "embeddings", 2 * torch.eye(3)), "another length than 1"),
        (tensor(EMBEDDINGS, "embeddings", torch.ones(1001, 1)), "more than 1000 embeddings"),
    ],
    "ia3": [
        *((ia3(f"{LORA}.ia3_l", odd(1, *size)), f"site {QUERY}: ") for size in ((3,), (2, 3))),
        (ia3("base_model.model.x.lora_A.weight", odd(1, 2, 2)), "wanted no such tensor"),
    ],
    "bottleneck": [
        (remove("bottleneck_config.json"), "bottleneck_config.json does not exist"),
        *(
            (OURS(**{key: value}), f"bottleneck_config.json is not valid: {key}: ")
            for key, value in (
                *(("bottleneck_version", 2), ("more", 1), ("activation", "tanh"), ("base", None)),
                *(("scale", True), ("scale", 1e300), ("scale", KeyError)),
            )
        ),
        (bottleneck(f"{QUERY}.up.bias", None), f"site {QUERY}: up_bias is missing"),
        (bottleneck(f"{DOWN}.up.weight", odd(0, 4, 3)), f"site {DOWN}: up is (4, 3)"),
        (bottleneck(f"{DOWN}.up.weight", odd(0, 4, 2).long()), "torch.int64"),
        (bottleneck("extra", odd(0)), "extra is (4,) torch.int64; wanted no such tensor"),
    ],
    "dora": [(dora(f"{QUERY}.output_scale", odd(1, 7)), "output_scale is (7,)")],
}
ROWS = [(kind, *row) for kind, rows in DAMAGES.items() for row in rows]


@pytest.mark.parametrize(("kind", "damage", "words"), ROWS)
def test_damage_is_refused_in_one_line_that_names_it(tmp_path, kind, damage, words):
    folder = shutil.copytree(GOLDENS / kind, tmp_path / "mine")
    described = (folder / INFO).read_bytes()
    damage(folder)
    if (folder / INFO).read_bytes() == described:
        record_hashes(folder)
    message = one_line_of(lambda: Expert.load(folder), ExpertError)
    assert words in message
    assert "golden" in message or str(folder) in message


@pytest.mark.parametrize("file", [ADAPTER_WEIGHTS, VECTORS])
def test_a_changed_file_is_found_by_its_hash(golden_copy, file):
    tensors = {name: -each for name, each in load_file(golden_copy / file).items()}
    save_file(tensors, golden_copy / file)
    message = one_line_of(lambda: Expert.load(golden_copy), ExpertError)
    for part in ("'golden'", f"{file} isn't the one", sha256_of(golden_copy / file)[:12]):
        assert part in message


def test_pickled_weights_are_never_read(golden_copy):
    (golden_copy / ADAPTER_WEIGHTS).unlink()
    (golden_copy / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert "never read" in one_line_of(lambda: Expert.load(golden_copy), ExpertError)

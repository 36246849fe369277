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

from golden_sites import DOWN, QUERY
from odd_files import one_line_of, rewrite
from paths import GOLDENS
from phatgoose.errors import ExpertError
from phatgoose.experts.expert import LAYOUT, Expert, adapter_files, check_expert
from phatgoose.experts.peft_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from phatgoose.files import sha256_of

Damage = Callable[[Path], object]
INFO, VECTORS, EMBEDDINGS = LAYOUT.info, LAYOUT.vectors, LAYOUT.embeddings
CONFIGS = {"expert": ADAPTER_CONFIG, "ia3": ADAPTER_CONFIG}
CONFIGS |= {"bottleneck": "bottleneck_config.json", "dora": "dora_config.json"}
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


def record_hashes(folder: Path) -> None:
    """Make the hashes fit, so that they are not what is noticed."""
    files = {"adapter": adapter_files(folder).weights, "vectors": VECTORS}
    for key, file in {**files, "embeddings": EMBEDDINGS}.items():
        if (folder / file).is_file():
            rewrite(folder / INFO, **{f"{key}_sha256": sha256_of(folder / file)})


def odd(value: float, *shape: int) -> torch.Tensor:
    return torch.full(shape or (4,), value)


lora, ia3 = partial(tensor, ADAPTER_WEIGHTS), partial(tensor, ADAPTER_WEIGHTS)
bottleneck, dora = partial(tensor, "bottleneck.safetensors"), partial(tensor, "dora.safetensors")
vector = partial(tensor, VECTORS)
READING = torch.zeros(2, 3)
READINGS = {"mean": READING, "factor": torch.zeros(2, 4, 3), "rest": READING}


def readings(**changes: torch.Tensor) -> Damage:
    def do(folder: Path) -> None:
        for part, value in (READINGS | changes).items():
            vector(f"reading.whole.{part}", value)(folder)

    return do


DAMAGES: list[tuple[str, Damage, str]] = [
    # Files.
    *(("expert", remove(f), f) for f in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, VECTORS, EMBEDDINGS)),
    *(("expert", cut(f, n), "not valid") for f in (ADAPTER_WEIGHTS, VECTORS) for n in (0, 40, -4)),
    *(("expert", write(ADAPTER_CONFIG, text), ADAPTER_CONFIG) for text in ("{", "[]", "null")),
    ("bottleneck", remove("bottleneck_config.json"), "bottleneck_config.json does not exist"),
    # The description.
    *(("expert", write(INFO, text), INFO) for text in ("{", "[]", "3", "null", '"x"', "\x00")),
    *(("expert", put(INFO, format_version=v), "format_version: ") for v in (2, 0, None, "1")),
    ("expert", put(INFO, name=5), "name: Input should be"),
    ("expert", put(INFO, name="../../etc"), "got '../../etc'"),
    ("expert", put(INFO, base="tiny"), "base: Input should be"),
    ("expert", put(INFO, base={"id": "a", "revision": "../../up"}), "'../../up'"),
    ("expert", put(INFO, embedder="a\nb"), "embedder: "),
    ("expert", put(INFO, colour="red"), "colour"),
    *(("expert", put(INFO, **{key: KeyError}), key) for key in ("name", "base", "adapter_sha256")),
    ("expert", put(INFO, vectors_sha256=None), f"{VECTORS} isn't the one"),
    ("expert", put(INFO, acts_on={"tail": 0}), "tail"),
    ("expert", put(INFO, acts_on={"tail": True}), "tail"),
    ("expert", put(INFO, acts_on={}), "acts_on"),
    ("expert", put(INFO, acts_on={"tail": 1, "invocation_tokens": [5]}), "invocation_tokens"),
    # PEFT's config.
    ("expert", put(ADAPTER_CONFIG, peft_type=None), "type None; wanted LORA or IA3"),
    ("expert", put(ADAPTER_CONFIG, peft_type="PREFIX_TUNING"), "'PREFIX_TUNING'; wanted LORA"),
    ("expert", put(ADAPTER_CONFIG, peft_type="LOHA"), "--allow-loss"),
    *(
        ("expert", put(ADAPTER_CONFIG, **{key: value}), f"uses {key!r}, which can't be routed")
        for key, value in {
            **{"use_dora": True, "modules_to_save": ["x"], "trainable_token_indices": [1]},
            **{"layer_replication": [[0, 1]], "target_parameters": ["x"], "bias": "all"},
            **{"megatron_config": {"a": 1}, "use_qalora": True, "some_new_option": 3},
            "alora_invocation_tokens": [3],
        }.items()
    ),
    ("expert", put(ADAPTER_CONFIG, lora_bias=True), "wanted A (r, n), B (d, r), bias (d) of"),
    ("expert", put(ADAPTER_CONFIG, lora_alpha="8"), "that PEFT can't have written"),
    ("expert", put(ADAPTER_CONFIG, alpha_pattern={"(": 2}), "no name or regular expression"),
    *(
        ("expert", put(ADAPTER_CONFIG, init_lora_weights=init), "may have changed the base")
        for init in ("sorcery", "corda", "loftq", "lora_ga", "pissa_niter_4", "OLoRA")
    ),
    # Configs of our own.
    *(
        ("bottleneck", put("bottleneck_config.json", **{key: value}), f"{key} is ")
        for key, value in (
            *(("bottleneck_version", 2), ("more", 1), ("activation", "tanh"), ("base", None)),
            *(("scale", True), ("scale", 1e300), ("scale", KeyError)),
        )
    ),
    # Weights.
    ("expert", lora(f"{LORA}.lora_A.weight", None), f"site {QUERY}: wanted A (r, n)"),
    *(
        ("expert", lora(f"{LORA}.lora_A.weight", torch.zeros(shape)), f"site {QUERY}: wanted A")
        for shape in ((3, 4), (4,), (2, 4, 1))
    ),
    *(
        ("expert", lora(f"{LORA}.lora_B.weight", odd(value, 3, 2)), "not finite")
        for value in (math.nan, math.inf, -math.inf)
    ),
    *(
        ("expert", lora(f"base_model.model.{name}", odd(1)), f"'base_model.model.{name}', which")
        for name in ("lm_head.weight", f"{QUERY}.base_layer.bias", f"{QUERY}.lora_magnitude_vector")
    ),
    ("expert", lora(f"{QUERY}.lora_A.weight", odd(1)), f"holds '{QUERY}.lora_A.weight', which"),
    *(
        ("ia3", ia3(f"{LORA}.ia3_l", torch.ones(shape)), f"site {QUERY}: ")
        for shape in ((3,), (2, 3), (3, 1, 1))
    ),
    ("ia3", ia3("base_model.model.x.lora_A.weight", odd(1, 2, 2)), "x.lora_A.weight', which"),
    ("bottleneck", bottleneck(f"{QUERY}.up.bias", None), f"site {QUERY}: wanted down (m, d)"),
    ("bottleneck", bottleneck(f"{DOWN}.up.weight", odd(0, 4, 3)), f"site {DOWN}: wanted"),
    ("bottleneck", bottleneck(f"{DOWN}.up.weight", odd(0, 4, 2).long()), "torch.int64"),
    ("bottleneck", bottleneck("extra", odd(0)), "'extra', which is no part"),
    ("dora", dora(f"{QUERY}.output_scale", odd(1, 7)), f"site {QUERY}: wanted A (r, n), B (d, r)"),
    # Gates, means, readings, embeddings.
    *(
        ("expert", vector(f"{kind}.{QUERY}", value), words)
        for kind in ("gate", "mean")
        for value, words in (
            (odd(0, 31), f"site {QUERY}: the {kind} is (31,)"),
            (odd(0, 1, 4), f"the {kind} is (1, 4)"),
            (odd(0).half(), "torch.float16; wanted (4,) torch.float32"),
            (odd(math.nan), "not finite"),
            (None, f"site {QUERY}: the {kind} is missing"),
        )
    ),
    ("expert", vector("gate.model.layers.9.x", odd(0)), "wanted (0,)"),
    ("expert", readings(mean=torch.zeros(2, 4)), "readings: wanted whole.mean (b, d)"),
    ("expert", readings(rest=-torch.ones(2, 3)), "variances below 0"),
    ("expert", readings(mean=READING.double()), "of torch.float32, got"),
    ("expert", tensor(EMBEDDINGS, "embeddings", 2 * torch.eye(3)), "each of length 1"),
]


@pytest.mark.parametrize(("kind", "damage", "words"), DAMAGES)
def test_damage_is_refused_in_one_line_that_names_it(tmp_path, kind, damage, words):
    folder = shutil.copytree(GOLDENS / kind, tmp_path / "mine")
    described = (folder / INFO).read_bytes()
    damage(folder)
    if (folder / INFO).read_bytes() == described:
        record_hashes(folder)
    message = one_line_of(lambda: Expert.load(folder), ExpertError)
    assert words in message
    assert "golden" in message or str(folder) in message
    assert check_expert(folder) == [message]


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

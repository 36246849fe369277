"""Damage done to folders of JSON and safetensors files, and what Python does meanwhile.

What is in a file by then may be anything, since another damage may have come before.
"""

import json
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from phatgoose.errors import PhatgooseError
from phatgoose.experts.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from phatgoose.experts.bottleneck import FILES
from phatgoose.experts.expert import LAYOUT

Damage = Callable[[Path], None]


def content_of(path: Path) -> bytes:
    """The bytes of a plain file; OSError for what another damage has put in its place."""
    if path.is_symlink() or not path.is_file():
        raise OSError(f"{path} is no plain file any more")
    return path.read_bytes()


def json_of(path: Path) -> Any:
    return json.loads(content_of(path).decode("utf-8", "surrogatepass"))


# What is done to a file, by a draw of its own.

TEXTS = (
    *("../climb", "a\nb", "\x1b[31mred", "", ".", "x" * 600, "ünï", "\udcff", "[/red]", "0", "a b"),
    *("\u202e", "/etc/passwd", "<script>alert(1)</script>", "a|b`c", "{{7*7}}", "$(id)", "\x00"),
)
NUMBERS = (10**400, -1, 0, 1, 3, 1.5, -0.0, 1e308, 2**31, 2**63)
VALUES = (*TEXTS, *NUMBERS, None, True, False, [], {}, [1, "x"], {"a": None}, [[1.5]], {"": {}})
RAW = (
    *("NaN", "-Infinity", "1e999", '"\\ud800"', "{}", "[]", "", "9" * 5000, "\x00", "1e-400"),
    *("[" * 100_000, json.dumps("x" * 2_000_000), "18446744073709551616"),
    *("[" * n + "]" * n for n in (99, 300, 900, 100_000)),
    *('{"a":' * n + "1" + "}" * n for n in (99, 300, 900)),
)
ODD_SIZES = (0, 1, 2, 2**31, 2**32, 2**61, 2**62, 2**63 - 1, 2**63, 2**64, -1)
LENGTHS = (0, 1, 2**31, 2**63, 2**64 - 1, 100_000_001)  # that a header claims
# What matchers, embedders and loaders of others could be made to do.
PATTERNS = (
    *("(a+)+$", ".*.*.*.*!", "(?x:(a|a) *)b", "(a|a)(?#x)*b", "(", r"(a)\1", "(?=a)", "x" * 3000),
    *(".*" * 500, "a{1000}{1000}", "all-linear", "", ".*", r".*\.q_proj", "[[:alpha:]]", "\x00"),
)
CONFIG_KEYS = (
    *("target_modules", "exclude_modules", "layers_pattern", "feedforward_modules", "embedder"),
    *("rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "peft_type"),
    *("auto_mapping", "megatron_core", "revision", "base_model_name_or_path", "init_lora_weights"),
)


def cut(path: Path, r: Random) -> None:
    """It ends early, has another byte somewhere, or more of them at its end."""
    content = content_of(path)
    at, more = r.randrange(len(content) + 1), r.randbytes(r.randrange(1, 30))
    ways = (content[:at], content[:at] + more[:1] + content[at + 1 :], content + more)
    path.write_bytes(r.choice(ways))


def replace(path: Path, r: Random) -> None:
    """A link, a folder or a pipe is in its place, or nothing."""
    path.unlink(missing_ok=True)
    beside = sorted(each.name for each in path.parent.iterdir())
    match r.choice(("../secret.json", "/dev/zero", path.name, r.choice(beside), 1, 2, 3)):
        case 1:
            path.mkdir()
        case 2:
            os.mkfifo(path)
        case str(place):
            path.symlink_to(place)


def option(path: Path, r: Random) -> None:
    """An option of an adapter's config, or the embedder and base that a description names."""
    pattern = r.choice(PATTERNS)
    changed = {
        r.choice(CONFIG_KEYS): r.choice((pattern, [pattern], {pattern: 3}, r.choice(VALUES)))
    }
    path.write_text(json.dumps(json_of(path) | changed))


def json_value(path: Path, r: Random) -> None:
    """Another value, or another text of a value, somewhere in it."""
    content: Any = json_of(path)
    inside, key = {"": content}, ""
    while isinstance(inside[key], dict | list) and inside[key] and (r.random() < 0.6 or not key):
        inside = inside[key]
        key = r.choice(sorted(inside) if isinstance(inside, dict) else range(len(inside)))
    text = r.choice((None, r.choice(RAW)))
    inside[key] = r.choice(VALUES) if text is None else "@@@"
    written = json.dumps(content).replace('"@@@"', text or '"@@@"')
    path.write_text(written, encoding="utf-8", errors="surrogatepass")


def header(path: Path, r: Random) -> None:
    """Another safetensors header: lengths that lie, all kinds of dtypes, shapes, offsets, names."""
    content = content_of(path)
    (size,) = struct.unpack("<Q", content[:8])
    table = json.loads(content[8 : 8 + size])
    key = r.choice(sorted(table))
    changes = {
        "dtype": r.choice(("I64", "F8_E4M3", "BOOL", "F16", "BF16", "F64", "X", "U8")),
        "shape": r.choices((*ODD_SIZES, r.randrange(2**40)), k=r.randrange(5)),
        "data_offsets": r.choices((r.randrange(-5, 99), r.randrange(2**62)), k=r.randrange(4)),
    }
    changed = dict(r.sample(sorted(changes.items()), r.randrange(4)))
    entry = table.pop(key)
    table[r.choice((key, key, r.choice(TEXTS)))] = entry | changed
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    length = r.choice((len(text), len(text), r.choice(LENGTHS)))
    path.write_bytes(struct.pack("<Q", length) + text + content[8 + size :])


CHANGES: tuple[Callable[[torch.Tensor, int], torch.Tensor], ...] = (
    lambda t, _: t.long(),
    lambda t, _: t.half(),
    lambda t, _: t.to(torch.float8_e4m3fn),
    lambda t, _: t.bool(),
    lambda t, _: t.new_zeros(0),
    lambda t, _: torch.cat([t, t]),
    lambda t, pick: t[..., : max(pick % max(t.shape[-1], 1), 1)],
    lambda t, pick: torch.cat([t] * (2 + pick), dim=-1),
    lambda t, _: t * float("nan"),
    lambda t, _: t / 0,
    lambda t, pick: torch.full_like(t, (-1) ** pick * 2 ** (pick % 63)),
)


def tensor(path: Path, r: Random) -> None:
    """A tensor of another dtype, shape or value, gone, renamed, or one more, in a valid file."""
    content_of(path)
    tensors = load_file(path)
    key, other = r.choice(sorted(tensors)), r.choice((*sorted(tensors), *TEXTS))
    changed = tensors.pop(key)
    match r.randrange(len(CHANGES) + 3):
        case 0:
            tensors |= {key: changed, other: changed.clone()}
        case 1:
            tensors[other] = changed
        case which if which > 2:
            tensors[key] = CHANGES[which - 3](changed, r.randrange(11)).clone().contiguous()
    save_file(tensors, path)


def damages(
    json_files: Sequence[str], tensor_files: Sequence[str], others: Sequence[str] = ()
) -> st.SearchStrategy[list[Damage]]:
    """One to three of the above, of a folder with these files."""
    ways = (
        ((cut, replace), (*json_files, *tensor_files, *others)),
        ((json_value, option), json_files),
        ((header, tensor), tensor_files),
    )
    rows = [(do, file) for functions, files in ways for do in functions for file in files]

    def damage(row: tuple[Callable[[Path, Random], None], str], r: Random) -> Damage:
        return lambda folder: row[0](folder / row[1], r)

    drawn = st.builds(damage, st.sampled_from(rows), st.randoms(use_true_random=True))
    return st.lists(drawn, min_size=1, max_size=3)


SECRET = "the secret of somebody else"
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]


def examples(usually: int) -> settings:
    """So many damaged folders are tried, unless PHATGOOSE_FUZZ says how many."""
    count = int(os.environ.get("PHATGOOSE_FUZZ", usually))
    return settings(max_examples=count, suppress_health_check=SLOW)


@contextmanager
def damaged(folder: Path, done: Sequence[Damage]) -> Iterator[Path]:
    """A copy of `folder` after these damages, with something secret beside it, which stays alone.

    A damage that can't be done any more after those before it is left out.
    """
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "all" / "golden"
        shutil.copytree(folder, copy)
        (copy.parent / "secret.json").write_text(json.dumps({"name": SECRET}))
        for damage in done:
            with suppress(Exception):
                damage(copy)
        yield copy
        assert SECRET in (copy.parent / "secret.json").read_text()


@contextmanager
def told() -> Iterator[list[str]]:
    """Whatever is refused inside is refused in one printable line of bounded length: the given."""
    lines: list[str] = []
    try:
        yield lines
    except PhatgooseError as error:
        message = str(error)
        assert message.isprintable()
        assert len(message) < 1500
        assert SECRET not in message
        lines.append(message)


@contextmanager
def only_reading(folder: Path) -> Iterator[None]:
    """All that Python does meanwhile is to open files of `folder` and its own for reading."""
    allowed = (folder.resolve(), sys.prefix, sys.base_prefix)  # packages' lists of routers
    global seen
    before = sorted(path.name for path in folder.parent.rglob("*"))
    seen = events = []
    try:
        yield
    finally:
        seen = None
    for event, arguments in events:
        path, mode = arguments[:2] if event == "open" else (None, None)
        assert isinstance(path, str), (event, arguments)
        assert any(map(Path(path).resolve().is_relative_to, allowed)), (event, arguments)
        assert mode is None or "r" in str(mode), (event, arguments)
    assert sorted(path.name for path in folder.parent.rglob("*")) == before


# The files of an expert's directory, to be damaged, and its hashes made to fit.
JSON_FILES = (LAYOUT.info, ADAPTER_CONFIG, FILES.config)
WEIGHTS, DORA_WEIGHTS = (ADAPTER_WEIGHTS, FILES.weights), "dora.safetensors"
TENSOR_FILES = (*WEIGHTS, LAYOUT.vectors, LAYOUT.embeddings)
FILES = (*JSON_FILES, *TENSOR_FILES, LAYOUT.card)


def record_hashes(folder: Path) -> None:
    """Write the files' present hashes into the description, so that deeper checks are reached."""
    weights = next(
        (file for file in (*WEIGHTS, DORA_WEIGHTS) if (folder / file).is_file()), WEIGHTS[0]
    )
    files = {"adapter": weights, "vectors": LAYOUT.vectors, "embeddings": LAYOUT.embeddings}
    with suppress(OSError, ValueError, TypeError, RecursionError):
        info = json_of(folder / LAYOUT.info)
        for key, file in files.items():
            info[f"{key}_sha256"] = sha256(content_of(folder / file)).hexdigest()
        (folder / LAYOUT.info).write_text(json.dumps(info))


# What Python does while a context is open, by its audit events.
WATCHED = {
    *("open", "exec", "compile", "import", "pickle.find_class", "os.system", "subprocess.Popen"),
    *("socket.connect", "os.remove", "os.rename", "os.mkdir", "shutil.rmtree"),
}
seen: list[tuple[str, tuple[Any, ...]]] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if seen is not None and event in WATCHED:
        seen.append((event, arguments))


sys.addaudithook(_audit)

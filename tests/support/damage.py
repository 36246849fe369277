"""Damage done to folders of JSON and safetensors files, and what Python does meanwhile.

Strategies draw functions that damage; each is given the names of the files that it may take. What
stands there by then may be anything, since another damage may have come before.
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
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from phatgoose.errors import PhatgooseError
from phatgoose.experts.bottleneck import FILES
from phatgoose.experts.expert import LAYOUT
from phatgoose.experts.kind import ADAPTER_CONFIG, ADAPTER_WEIGHTS

Damage = Callable[[Path], None]


def content_of(path: Path) -> bytes:
    """The bytes of a plain file; OSError for what another damage has put in its place."""
    if path.is_symlink() or not path.is_file():
        raise OSError(f"{path} is no plain file any more")
    return path.read_bytes()


def json_of(path: Path) -> Any:
    return json.loads(content_of(path).decode("utf-8", "surrogatepass"))


# What is done to a directory: each strategy below draws a function that does it.

names = st.one_of(
    st.sampled_from(
        [
            *("../climb", "a\nb", "\x1b[31mred", "", ".", "x" * 600, "ünï", "\udcff", "[/red]"),
            *("\u202e", "/etc/passwd", "<script>alert(1)</script>", "a|b`c", "{{7*7}}", "$(id)"),
        ]
    ),
    st.text(max_size=20),
)
numbers = st.one_of(
    st.integers(), st.floats(allow_nan=False), st.sampled_from([10**400, -1, 0, 1e308, 2**63])
)
scalars = st.one_of(st.none(), st.booleans(), numbers, names)
contents = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3)
)
raw = st.sampled_from(
    ["NaN", "-Infinity", "1e999", "[" * 100_000, '"\\ud800"', "{}", "[]", "", "9" * 5000, "\x00"]
    + ["[" * n + "]" * n for n in (99, 300, 900, 100_000)]
    + ['{"a":' * n + "1" + "}" * n for n in (99, 300, 900)]
    + [json.dumps("x" * 2_000_000), "1e308", "1e-400", "-0.0", "1.5", "18446744073709551616"]
)


ODD_SIZES = (0, 1, 2, 2**31, 2**32, 2**61, 2**62, 2**63 - 1, 2**63, 2**64, -1)
# What matchers, embedders and loaders of others could be made to do.
PATTERNS = (
    *("(a+)+$", ".*.*.*.*!", "(?x:(a|a) *)b", "(a|a)(?#x)*b", "(", r"(a)\1", "(?=a)", "x" * 3000),
    *(".*" * 500, "a{1000}{1000}", "all-linear", "", ".*", r".*\.q_proj", "[[:alpha:]]", "\x00"),
)
CONFIG_KEYS = (
    *("target_modules", "exclude_modules", "layers_pattern", "feedforward_modules"),
    *("rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "peft_type"),
    *("auto_mapping", "megatron_core", "revision", "base_model_name_or_path", "init_lora_weights"),
)


@st.composite
def option(draw: st.DrawFn, files: Sequence[str]) -> Damage:
    """An option of an adapter's config, or the embedder and base that a description names."""
    file, key = draw(st.sampled_from(files)), draw(st.sampled_from((*CONFIG_KEYS, "embedder")))
    pattern, value = draw(st.sampled_from(PATTERNS)), draw(contents)
    how = draw(st.sampled_from(["alone", "listed", "keyed", "other"]))
    made = {"alone": pattern, "listed": [pattern], "keyed": {pattern: 3}, "other": value}[how]

    def do(folder: Path) -> None:
        content = json_of(folder / file)
        if isinstance(content, dict):
            (folder / file).write_text(json.dumps(content | {key: made}))

    return do


@st.composite
def cut(draw: st.DrawFn, files: Sequence[str]) -> Damage:
    """A file that ends early, has another byte somewhere, or more of them at its end."""
    file, part = draw(st.sampled_from(files)), draw(st.floats(0, 1))
    how, value = draw(st.sampled_from(["cut", "flip", "append"])), draw(st.integers(0, 255))
    more = draw(st.binary(max_size=30))

    def do(folder: Path) -> None:
        content = bytearray(content_of(folder / file))
        if how == "cut":
            del content[int(part * len(content)) :]
        elif how == "append":
            content += more
        elif content:
            content[int(part * (len(content) - 1))] = value
        (folder / file).write_bytes(content)

    return do


@st.composite
def replace(draw: st.DrawFn, files: Sequence[str]) -> Damage:
    """Another kind of thing in a file's place: links, folders, pipes."""
    file = draw(st.sampled_from(files))
    kind = draw(
        st.sampled_from(["secret", "device", "loop", "inside", "folder", "pipe", "nothing"])
    )

    def do(folder: Path) -> None:
        path = folder / file
        path.unlink(missing_ok=True)
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind != "nothing":
            links = {"secret": "../secret.json", "device": "/dev/zero", "loop": file}
            path.symlink_to(links.get(kind, next(name for name in files if name != file)))

    return do


@st.composite
def json_value(draw: st.DrawFn, files: Sequence[str]) -> Damage:
    """Another value, or another text of a value, somewhere in a JSON file."""
    file = draw(st.sampled_from(files))
    picks = draw(st.lists(st.integers(0, 50), min_size=1, max_size=3))
    value, text = draw(contents), draw(st.none() | raw)

    def do(folder: Path) -> None:
        content = json_of(folder / file)
        place: Any = content
        for i, pick in enumerate(picks):
            if not isinstance(place, dict | list) or not place:
                break
            keys = sorted(place) if isinstance(place, dict) else range(len(place))
            key: Any = keys[pick % len(place)]
            if i == len(picks) - 1 or not isinstance(place[key], dict | list):
                place[key] = value if text is None else "@@@"
                break
            place = place[key]
        written = json.dumps(content).replace('"@@@"', text or '"@@@"')
        (folder / file).write_text(written, encoding="utf-8", errors="surrogatepass")

    return do


@st.composite
def header(draw: st.DrawFn, files: Sequence[str]) -> Damage:
    """Another safetensors header: lengths that lie, all kinds of dtypes, shapes, offsets, names."""
    file = draw(st.sampled_from(files))
    length = draw(st.none() | st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1, 100_000_001]))
    change = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "dtype": st.sampled_from(
                    ["I64", "F8_E4M3", "BOOL", "F16", "BF16", "F64", "X", "U8"]
                ),
                "shape": st.lists(st.integers(-1, 2**40), max_size=3)
                | st.lists(st.sampled_from(ODD_SIZES), max_size=4),
                "data_offsets": st.lists(st.integers(-5, 2**62), max_size=3),
                "name": names,
            },
        )
    )
    pick = draw(st.integers(0, 50))

    def do(folder: Path) -> None:
        content = content_of(folder / file)
        (size,) = struct.unpack("<Q", content[:8])
        table = json.loads(content[8 : 8 + size])
        key = sorted(table)[pick % len(table)]
        entry = table.pop(key) | {k: v for k, v in change.items() if k != "name"}
        table[change.get("name", key)] = entry
        text = json.dumps(table).encode()
        text += b" " * (-len(text) % 8)
        told = len(text) if length is None else length
        (folder / file).write_bytes(struct.pack("<Q", told) + text + content[8 + size :])

    return do


CHANGES: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "int64": lambda t, _: t.long(),
    "float16": lambda t, _: t.half(),
    "float8": lambda t, _: t.to(torch.float8_e4m3fn),
    "bool": lambda t, _: t.bool(),
    "empty": lambda t, _: t.new_zeros(0),
    "long": lambda t, _: torch.cat([t, t]),
    "narrow": lambda t, pick: t[..., : max(pick % max(t.shape[-1], 1), 1)],
    "wide": lambda t, pick: torch.cat([t] * (2 + pick), dim=-1),
    "nan": lambda t, _: t * float("nan"),
    "inf": lambda t, _: t / 0,
    "other": lambda t, pick: torch.full_like(t, (-1) ** pick * 2 ** (pick % 63)),
}


@st.composite
def tensor(draw: st.DrawFn, files: Sequence[str]) -> Damage:
    """A tensor of another dtype, shape or value, gone, renamed, or one more, in a valid file."""
    file, pick = draw(st.sampled_from(files)), draw(st.integers(0, 200))
    how = draw(st.sampled_from(["gone", "more", "moved", *CHANGES]))
    name = draw(st.text(max_size=30))
    place = draw(st.integers(0, 10))

    def do(folder: Path) -> None:
        content_of(folder / file)
        tensors = load_file(folder / file)
        names = sorted(tensors)
        key = names[pick % len(names)]
        changed = tensors.pop(key)
        if how == "more":
            tensors |= {key: changed, name: changed.clone()}
        elif how == "moved":
            tensors[names[place % len(names)]] = changed
        elif how != "gone":
            tensors[key] = CHANGES[how](changed, place).clone().contiguous()
        save_file(tensors, folder / file)

    return do


def damages(
    json_files: Sequence[str], tensor_files: Sequence[str], others: Sequence[str] = ()
) -> st.SearchStrategy[list[Damage]]:
    """One to three of the above, of a folder with these files."""
    files = (*json_files, *tensor_files, *others)
    anywhere = (cut, cut, replace)
    return st.lists(
        st.one_of(
            *(damage(files) for damage in anywhere),
            *(damage(json_files) for damage in (json_value, option)),
            *(damage(tensor_files) for damage in (header, tensor)),
        ),
        min_size=1,
        max_size=3,
    )


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
    """All that Python does meanwhile is to open files of `folder` for reading."""
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
        assert Path(path).resolve().is_relative_to(folder.resolve()), (event, arguments)
        assert mode is None or "r" in str(mode), (event, arguments)
    assert sorted(path.name for path in folder.parent.rglob("*")) == before


# The files of an expert's directory, to be damaged, and its hashes made to fit.
JSON_FILES = (LAYOUT.info, ADAPTER_CONFIG, FILES.config)
WEIGHTS = (ADAPTER_WEIGHTS, FILES.weights)
TENSOR_FILES = (*WEIGHTS, LAYOUT.vectors, LAYOUT.embeddings)
FILES = (*JSON_FILES, *TENSOR_FILES, LAYOUT.card)


def record_hashes(folder: Path) -> None:
    """Write the files' present hashes into the description, so that deeper checks are reached."""
    weights = next((file for file in WEIGHTS if (folder / file).is_file()), WEIGHTS[0])
    files = {"adapter": weights, "vectors": LAYOUT.vectors, "embeddings": LAYOUT.embeddings}
    with suppress(OSError, ValueError, TypeError, RecursionError):
        info = json_of(folder / LAYOUT.info)
        for key, file in files.items():
            info[f"{key}_sha256"] = sha256(content_of(folder / file)).hexdigest()
        (folder / LAYOUT.info).write_text(json.dumps(info))


# What Python does while a context is open, by its audit events.
WATCHED = {
    "open",
    "exec",
    "compile",
    "import",
    "pickle.find_class",
    "os.system",
    "subprocess.Popen",
    "socket.connect",
    "os.remove",
    "os.rename",
    "os.mkdir",
    "shutil.rmtree",
}
seen: list[tuple[str, tuple[Any, ...]]] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if seen is not None and event in WATCHED:
        seen.append((event, arguments))


sys.addaudithook(_audit)

"""Experts of strangers: whatever is done to a directory, what comes back is an expert or one line.

PHATGOOSE_FUZZ sets how many damaged directories are tried (docs/reliability.md has figures).
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from phatgoose.apps.cli import main
from phatgoose.errors import ExpertError, PhatgooseError, PoolError
from phatgoose.expert import LAYOUT, Expert, check_expert
from phatgoose.files import MOST_JSON_BYTES, read_json_object
from phatgoose.patterns import check_patterns
from phatgoose.pool import Pool

GOLDENS = Path(__file__).parent / "golden"
GOLDEN = GOLDENS / "expert"
KINDS = ("expert", "ia3", "bottleneck")  # one golden directory of each
EXAMPLES = int(os.environ.get("PHATGOOSE_FUZZ", "120"))
JSON_FILES = (LAYOUT.info, LAYOUT.adapter_config, LAYOUT.bottleneck_config)
WEIGHTS = (LAYOUT.adapter_weights, LAYOUT.bottleneck_weights)
TENSOR_FILES = (*WEIGHTS, LAYOUT.vectors, LAYOUT.embeddings)
FILES = (*JSON_FILES, *TENSOR_FILES, LAYOUT.card)
SECRET = "the secret of somebody else"

Damage = Callable[[Path], None]


def content_of(path: Path) -> bytes:
    """The bytes of a plain file; OSError for what another damage has put in its place."""
    if path.is_symlink() or not path.is_file():
        raise OSError(f"{path} is no plain file any more")
    return path.read_bytes()


def json_of(path: Path) -> Any:
    """The JSON in a plain file; OSError or ValueError where there is none any more."""
    try:
        return json.loads(content_of(path).decode("utf-8", "surrogatepass"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


# What is done to a directory: each strategy below draws a function that does it.

names = st.one_of(
    st.sampled_from(
        ["../climb", "a\nb", "\x1b[31mred", "", ".", "x" * 600, "ünï", "\udcff", "[/red]"]
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
)


@st.composite
def cut(draw: st.DrawFn) -> Damage:
    file, part = draw(st.sampled_from(FILES)), draw(st.floats(0, 1))

    def do(folder: Path) -> None:
        content = content_of(folder / file)
        (folder / file).write_bytes(content[: int(part * len(content))])

    return do


@st.composite
def flip(draw: st.DrawFn) -> Damage:
    file, place, value = (
        draw(st.sampled_from(FILES)),
        draw(st.floats(0, 1)),
        draw(st.integers(0, 255)),
    )

    def do(folder: Path) -> None:
        content = bytearray(content_of(folder / file))
        if content:
            content[int(place * (len(content) - 1))] = value
        (folder / file).write_bytes(content)

    return do


@st.composite
def append(draw: st.DrawFn) -> Damage:
    file, more = draw(st.sampled_from(FILES)), draw(st.binary(max_size=30))

    def do(folder: Path) -> None:
        (folder / file).write_bytes(content_of(folder / file) + more)

    return do


@st.composite
def swap(draw: st.DrawFn) -> Damage:
    one, other = draw(st.sampled_from(FILES)), draw(st.sampled_from(FILES))

    def do(folder: Path) -> None:
        if one != other and (folder / one).exists() and (folder / other).exists():
            (folder / one).rename(folder / "between")
            (folder / other).rename(folder / one)
            (folder / "between").rename(folder / other)

    return do


@st.composite
def rename(draw: st.DrawFn) -> Damage:
    file = draw(st.sampled_from(FILES))
    name = draw(st.sampled_from([b"\xff\xfe", b"a\nb", b"adapter_model.bin", b"x.py", b"[red]"]))

    def do(folder: Path) -> None:
        if (folder / file).exists():
            os.rename(folder / file, os.path.join(os.fsencode(folder), name))

    return do


@st.composite
def replace(draw: st.DrawFn) -> Damage:
    """Another kind of thing in a file's place: links, folders, pipes."""
    file = draw(st.sampled_from(FILES))
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
            path.symlink_to(links.get(kind, LAYOUT.info if file != LAYOUT.info else LAYOUT.card))

    return do


@st.composite
def json_value(draw: st.DrawFn) -> Damage:
    """Another value, or another text of a value, somewhere in a JSON file."""
    file, picks = (
        draw(st.sampled_from(JSON_FILES)),
        draw(st.lists(st.integers(0, 50), min_size=1, max_size=3)),
    )
    value, text = draw(contents), draw(st.none() | raw)

    def do(folder: Path) -> None:
        try:
            content = json_of(folder / file)
        except (ValueError, OSError):
            return
        place: Any = content
        for i, pick in enumerate(picks):
            if not isinstance(place, dict) or not place:
                break
            key = sorted(place)[pick % len(place)]
            if i == len(picks) - 1 or not isinstance(place[key], dict):
                place[key] = value if text is None else "@@@"
                break
            place = place[key]
        written = json.dumps(content).replace('"@@@"', text or '"@@@"')
        (folder / file).write_text(written, encoding="utf-8", errors="surrogatepass")

    return do


@st.composite
def json_key(draw: st.DrawFn) -> Damage:
    """A key of a JSON file once more, gone, or a new one."""
    file, pick, name, value = (
        draw(st.sampled_from(JSON_FILES)),
        draw(st.integers(0, 50)),
        draw(names),
        draw(contents),
    )
    how = draw(st.sampled_from(["twice", "gone", "new"]))

    def do(folder: Path) -> None:
        try:
            content = json_of(folder / file)
        except (ValueError, OSError):
            return
        if not isinstance(content, dict) or not content:
            return
        key = sorted(content)[pick % len(content)]
        if how == "twice":
            text = json.dumps(content)
            text = "{" + f"{json.dumps(key)}: {json.dumps(value)}, " + text[1:]
        else:
            content.pop(key) if how == "gone" else content.update({name: value})
            text = json.dumps(content)
        (folder / file).write_text(text)

    return do


@st.composite
def header(draw: st.DrawFn) -> Damage:
    """Another safetensors header: lengths that lie, all kinds of dtypes, shapes, offsets, names."""
    file = draw(st.sampled_from(TENSOR_FILES))
    length = draw(st.none() | st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1, 100_000_001]))
    change = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "dtype": st.sampled_from(
                    ["I64", "F8_E4M3", "BOOL", "F16", "BF16", "F64", "X", "U8"]
                ),
                "shape": st.lists(st.integers(-1, 2**40), max_size=3),
                "data_offsets": st.lists(st.integers(-5, 2**62), max_size=3),
                "name": names,
            },
        )
    )
    pick = draw(st.integers(0, 50))

    def do(folder: Path) -> None:
        try:
            content = content_of(folder / file)
            (size,) = struct.unpack("<Q", content[:8])
            table = json.loads(content[8 : 8 + size])
            key = sorted(table)[pick % len(table)]
            entry = table.pop(key) | {k: v for k, v in change.items() if k != "name"}
        except (ValueError, OSError, struct.error, TypeError, AttributeError, ZeroDivisionError):
            return
        table[change.get("name", key)] = entry
        text = json.dumps(table).encode()
        text += b" " * (-len(text) % 8)
        told = len(text) if length is None else length
        (folder / file).write_bytes(struct.pack("<Q", told) + text + content[8 + size :])

    return do


@st.composite
def tensor(draw: st.DrawFn) -> Damage:
    """A tensor of another dtype, shape or value, gone, or one more, in a valid file."""
    file, pick = draw(st.sampled_from(TENSOR_FILES)), draw(st.integers(0, 50))
    kinds = ["int64", "float16", "float8", "bool", "empty", "long", "nan", "inf", "gone", "more"]
    how, name = draw(st.sampled_from(kinds)), draw(st.text(max_size=30))

    def do(folder: Path) -> None:
        try:
            content_of(folder / file)
            held = load_file(folder / file)
        except Exception:  # whatever another damage made of it
            return
        if not held:
            return
        key = sorted(held)[pick % len(held)]
        changed = {
            "int64": lambda t: t.long(),
            "float16": lambda t: t.half(),
            "float8": lambda t: t.to(torch.float8_e4m3fn),
            "bool": lambda t: t.bool(),
            "empty": lambda t: t.new_zeros(0),
            "long": lambda t: torch.cat([t, t]),
            "nan": lambda t: t * float("nan"),
            "inf": lambda t: t / 0,
        }
        tensors = dict(held)
        if how == "gone":
            del tensors[key]
        elif how == "more":
            tensors[name] = held[key].clone()
        else:
            tensors[key] = changed[how](held[key]).contiguous()
        save_file(tensors, folder / file)

    return do


damages = st.lists(
    st.one_of(
        cut(),
        flip(),
        append(),
        swap(),
        rename(),
        replace(),
        json_value(),
        json_key(),
        header(),
        tensor(),
    ),
    min_size=1,
    max_size=3,
)


def record_hashes(folder: Path) -> None:
    """Write the files' present hashes into the description, so that deeper checks are reached."""
    try:
        info = json_of(folder / LAYOUT.info)
        weights = next((file for file in WEIGHTS if (folder / file).is_file()), WEIGHTS[0])
        for file, key in (
            (weights, "adapter"),
            (LAYOUT.vectors, "vectors"),
            (LAYOUT.embeddings, "embeddings"),
        ):
            info[f"{key}_sha256"] = sha256(content_of(folder / file)).hexdigest()
        (folder / LAYOUT.info).write_text(json.dumps(info))
    except (OSError, ValueError, TypeError):
        return


# What reading may do: open files of the folder for reading, and nothing else.

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


@contextmanager
def watched() -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    """The audited events of this process while the context is open."""
    global seen
    seen = found = []
    try:
        yield found
    finally:
        seen = None


def unexpected(events: list[tuple[str, tuple[Any, ...]]], folder: Path) -> list[Any]:
    """The events that are no opening of a file of `folder` for reading."""
    odd = []
    for event, arguments in events:
        path, mode = (arguments[0], arguments[1]) if event == "open" else (None, None)
        inside = isinstance(path, str) and Path(path).resolve().is_relative_to(folder.resolve())
        if not (event == "open" and inside and (mode is None or "r" in str(mode))):
            odd.append((event, arguments))
    return odd


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(damages, st.booleans(), st.sampled_from(KINDS))
def test_a_damaged_directory_is_an_expert_or_one_line(done, rehash, kind):
    Expert.load(GOLDENS / kind)  # whatever is imported late is imported now
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "experts" / "golden"
        shutil.copytree(GOLDENS / kind, folder)
        (folder.parent / "secret.json").write_text(json.dumps({"name": SECRET}))
        for damage in done:
            try:
                damage(folder)
            except (OSError, UnicodeError):  # what one damage did, another can't build upon
                continue
        if rehash:
            record_hashes(folder)
        before = sorted(path.name for path in folder.parent.rglob("*"))
        with watched() as events:
            try:
                expert: Expert | None = Expert.load(folder)
            except ExpertError as error:
                expert, message = None, str(error)
        assert unexpected(events, folder) == []
        assert sorted(path.name for path in folder.parent.rglob("*")) == before
        if expert is None:
            assert message.isprintable() or "\\" in repr(message)
            assert "\n" not in message
            assert len(message) < 1500
            assert SECRET not in message
            assert check_expert(folder)
            with pytest.raises(PhatgooseError):
                Pool.open(folder)
        else:
            assert_is_an_expert(expert, Path(place) / "again")


def assert_is_an_expert(expert: Expert, place: Path) -> None:
    """What `expert` says holds, and it survives being written and read."""
    assert check_expert(expert.directory) == []
    for site, module in expert.modules.items():
        tensors = [part for part in vars(module).values() if isinstance(part, torch.Tensor)]
        held = [vectors[site] for vectors in (expert.gates, expert.means) if vectors]
        assert all(torch.isfinite(part).all() for part in (*tensors, *held))
        assert all(part.numel() > 0 for part in tensors)
    again = expert.save(place)
    assert again.info.name == expert.info.name
    assert again.modules.keys() == expert.modules.keys()
    assert again.gates.keys() == expert.gates.keys()
    assert all(torch.equal(again.gates[site], expert.gates[site]) for site in expert.gates)


@pytest.fixture
def kind() -> str:
    """The golden directory to take."""
    return "expert"


@pytest.fixture
def directory(tmp_path, kind) -> Path:
    """An expert directory of one's own, with something secret beside it."""
    (tmp_path / "secret.json").write_text((GOLDEN / LAYOUT.info).read_text())
    return shutil.copytree(GOLDENS / kind, tmp_path / "golden")


each_file = pytest.mark.parametrize(
    ("kind", "file"),
    [
        (kind, file)
        for kind in ("expert", "bottleneck")
        for file in FILES[:-1]
        if (GOLDENS / kind / file).exists()
    ],
)


def complaint(directory: Path) -> str:
    with pytest.raises(ExpertError) as caught:
        Expert.load(directory)
    return str(caught.value)


@each_file
def test_a_link_out_of_the_directory_is_refused_unread(directory, file):
    (directory.parent / file).write_bytes((directory / file).read_bytes())
    (directory / file).unlink()
    (directory / file).symlink_to(directory.parent / file)
    assert f"{file} is a symbolic link that leads out" in complaint(directory)


def test_a_link_inside_the_directory_is_followed(directory):
    (directory / LAYOUT.info).rename(directory / "real.json")
    (directory / LAYOUT.info).symlink_to("real.json")
    assert Expert.load(directory).name == "golden"


def test_links_of_a_hub_cache_are_followed_to_its_blobs_only(tmp_path):
    repository = tmp_path / "models--me--x"
    snapshot = repository / "snapshots" / ("a" * 40)
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in GOLDEN.iterdir():
        shutil.copyfile(path, repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert Expert.load(snapshot).name == "golden"
    shutil.copyfile(GOLDEN / LAYOUT.info, tmp_path / "other.json")
    (snapshot / LAYOUT.info).unlink()
    (snapshot / LAYOUT.info).symlink_to("../../../other.json")
    assert "leads out" in complaint(snapshot)


@each_file
def test_a_pipe_or_a_folder_is_no_file(directory, file):
    (directory / file).unlink()
    os.mkfifo(directory / file)
    assert f"{file} is no regular file" in complaint(directory)
    (directory / file).unlink()
    (directory / file).mkdir()
    assert f"{file} is no regular file" in complaint(directory)


def test_a_pool_does_not_leave_its_folder(directory, tmp_path):
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "link").symlink_to(directory)
    with pytest.raises(PoolError, match="leads out of"):
        Pool.open(tmp_path / "pool")
    assert Pool.open(tmp_path / "pool" / "link").names == ("golden",)


def test_a_huge_description_is_refused_unread(directory):
    with (directory / LAYOUT.info).open("ab") as file:
        file.truncate(MOST_JSON_BYTES + 1)
    assert f"at most {MOST_JSON_BYTES}" in complaint(directory)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "wanted an object"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
def test_json_is_read_strictly(tmp_path, text, reason):
    (tmp_path / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ExpertError, match=reason):
        read_json_object(tmp_path / "a.json")


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a|a)*$",
        "(.*a){20}",
        ".*a.*a.*a.*a.*a",
        "((a?)b)*",
        "a?" * 30 + "a" * 30,
        "x" * 3000,
    ],
)
def test_patterns_that_could_take_for_ever_are_refused_unmatched(directory, pattern):
    with pytest.raises(ExpertError, match="for ever"):
        check_patterns([pattern], "it")
    config = json.loads((directory / LAYOUT.adapter_config).read_text())
    for key in ("alpha_pattern", "rank_pattern"):
        text = json.dumps(config | {key: {pattern: 1}})
        (directory / LAYOUT.adapter_config).write_text(text)
        assert "for ever" in complaint(directory)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q|k|v)_proj",
        r"^model\.layers\.(1\d|2[0-4])\..*(self_attn|mlp)\..*_proj$",
        r"(?:.*?)\.q",
        r"\(a+\)+",
        r"[+*]{1}[(|)]+",
        "model.layers.0.self_attn.q_proj",
        "",
    ],
)
def test_ordinary_patterns_are_allowed(pattern):
    check_patterns([pattern], "it")


def test_a_folder_whose_name_is_no_utf8_is_told_as_an_escape(directory, tmp_path, capsys):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/po\xffol"))
    shutil.copytree(directory, folder / "golden")
    with pytest.raises(SystemExit) as caught:
        main(["pool", str(folder)])
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert r"po\udcffol" in told
    assert "not valid UTF-8" in told
    assert told.count("\n") == 1


def test_markup_in_an_expert_is_not_obeyed(directory, capsys):
    info = json.loads((directory / LAYOUT.info).read_text())
    info["base"]["id"] = "[/red]x[bold]"
    (directory / LAYOUT.info).write_text(json.dumps(info))
    with pytest.raises(SystemExit) as caught:
        main(["pool", str(directory)])
    assert caught.value.code == 0
    assert "[/red]x[bold]" in capsys.readouterr().out

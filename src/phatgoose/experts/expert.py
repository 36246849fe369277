"""The expert directory: an adapter, untouched, with gates and statistics in files beside it.

docs/format.md specifies it. Everything is safetensors or JSON; nothing is pickled. A directory is
written under another name and renamed, so that one that exists is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from annotated_types import Interval, MinLen
from huggingface_hub import ModelCardData
from pydantic import StringConstraints
from safetensors.torch import save_file
from torch import Tensor

from ..base.identity import Base, BaseReference, Text
from ..base.smollm2 import SMOLLM2_ON_HUB
from ..config import TAIL, Formatting, from_mapping
from ..errors import ExpertError
from ..files import (
    TensorFile,
    new_directory,
    one_line,
    read_json,
    reading,
    regular_file,
    sha256_of,
)
from ..names import NAME, SMOLLM2, check_name, closest_beside, is_hub_id
from ..reader import Reader, ReaderReference
from ..sites import Tensors
from ..tasks.loading import prompts_beside
from . import kinds
from .adapter_files import (
    ADAPTER_CONFIG,
    PEFT_FILES,
    AdapterFiles,
    check_parts,
    read_tensors,
)
from .lora import Factors
from .module import Modules
from .statistics import PARTS, WHOLE, grown, prompt_statistics_of

Record = Mapping[str, Any]  # as JSON has it

# The adapter in a directory: of which kind it is, and what it does.


def formats() -> tuple[AdapterFiles, ...]:
    """The files that adapters of each kind have."""
    return tuple(dict.fromkeys(kind.site_module.files for kind in kinds().values()))


def adapter_files(directory: Path) -> AdapterFiles:
    """The files of the adapter in `directory`: those of a format of our own if there, else PEFT's.

    PEFT's own form of a DoRA may stand beside ours.
    """
    for files in formats():
        is_here = (directory / files.config).exists() or (directory / files.weights).exists()
        if is_here and files is not PEFT_FILES:
            return files
    return PEFT_FILES


def read_modules(directory: Path, tensors: Tensors | None = None) -> Modules:
    """What the adapter in `directory` does, by site.

    `tensors` are those of its file where that has been read already. Raises ExpertError when its
    files are missing or damaged or it is of no kind that can be routed.
    """
    files = adapter_files(directory)
    config = files.read_config(directory)
    if tensors is None:
        tensors = files.read_weights(directory)
    by_form = {(kind.site_module.files, kind.peft_type): kind for kind in kinds().values()}
    kind = by_form[files, config.get("peft_type")]  # a format of our own has no such key
    return kind.site_module.read(directory, config, tensors)


def base_named_in(directory: Path) -> BaseReference | None:
    """The base that an expert or plain adapter names, if any; ExpertError when it is neither."""
    if (directory / LAYOUT.info).is_file():
        return read_info(directory / LAYOUT.info).base
    files = adapter_files(directory)
    config = files.read_config(directory)
    with reading(directory / files.config):
        place = config.get(files.base_key)
        if not place:
            return None
        return BaseReference(str(place), config.get("revision") or None)


# How its training inputs were formatted, which pools' records repeat.

FORM = ("chat", "max_input_tokens", "truncation")


def recorded_formatting(hyperparameters: Record, where: str) -> Formatting:
    """The formatting recorded in hyperparameters, or the usual; `where` is for ConfigErrors."""
    names = vars(Formatting())
    recorded = {name: value for name, value in hyperparameters.items() if name in names}
    return from_mapping(Formatting, recorded, where)


def _form_in(record: Record) -> Record:
    form = record.get("formatting")
    return form if isinstance(form, Mapping) else {}


def chats_recorded(records: Iterable[Record]) -> set[bool]:
    """What a pool's records say of training inputs being in a chat template; many say nothing."""
    forms = map(_form_in, records)
    return {form["chat"] is True for form in forms if "chat" in form}


def warn_of_other_formatting(records: Iterable[Record], formatting: Formatting) -> None:
    """Warn of experts whose training inputs were formatted otherwise than `formatting`."""
    differing = []
    for record in records:
        form = _form_in(record)
        # How inputs are cut says nothing of an expert whose own were never cut.
        names = FORM[:1] if form.get("inputs_cut") == 0 else FORM
        differ = [n for n in names if n in form and form[n] != getattr(formatting, n)]
        if differ:
            differing.append((one_line(record.get("name"), 80), form, differ))
    if differing:
        expert, form, differ = differing[0]
        trained = ", ".join(f"{name} {one_line(form[name], 40)}" for name in differ)
        here = ", ".join(f"{name} {getattr(formatting, name)}" for name in differ)
        more = ""
        if len(differing) > 1:
            more = f" ({len(differing)} of the experts differ)"
        warnings.warn(
            f"Inputs are read with {here}, but {expert} was trained with {trained}{more}.",
            stacklevel=3,
        )


# Its description.

Name = Annotated[str, StringConstraints(pattern=NAME)]
Count = Annotated[int, Interval(ge=1, le=1 << 53)]  # which a float holds
ActsOn = Annotated[Mapping[Literal["tail"], Annotated[int, TAIL]], MinLen(1)]
Points = Annotated[float, Interval(ge=-1, le=1)]


@dataclass(frozen=True)
class Gain:
    """By how much an expert scored more than its base alone on solved `rows`, both from 0 to 1.

    `low` to `high` is the 80 % interval of `value`, `metric` in words how rows were scored. Whoever
    made the expert may have written anything: it is advice.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    value: Points
    low: Points
    high: Points
    rows: Count
    metric: Text

    @property
    def is_sure(self) -> bool:
        """Whether the expert is better, and hardly by chance."""
        return self.low > 0

    def __str__(self) -> str:
        value, low, high = (f"{100 * share:+.0f}" for share in (self.value, self.low, self.high))
        return f"{value} points [{low}, {high}] on {self.rows} rows"


@dataclass(frozen=True)
class ExpertInfo:
    """What `phatgoose.json` says. `task`, `hyperparameters` and `metrics` are free-form records.

    `embedding_form` says what `embedder` embedded (`tasks.embeddings.TEXTS`). `measured_in` is the
    `number_format` of the base that means were measured on. `reader` made the prompt statistics, of
    `prompts_read` prompts; None where these aren't known. `acts_on` is the `tail` of a prompt's
    last tokens that it acts on, None for experts that act on all tokens. `gain` is over the base.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    name: Name
    base: BaseReference
    adapter_sha256: Text
    vectors_sha256: Text | None = None
    embeddings_sha256: Text | None = None
    format_version: Literal[1] = 1
    task: Record = field(default_factory=dict)
    hyperparameters: Record = field(default_factory=dict)
    metrics: Record = field(default_factory=dict)
    embedder: Text | None = None
    embedding_form: Text | None = None
    measured_in: Text | None = None
    reader: ReaderReference | None = None
    prompts_read: Count | None = None
    acts_on: ActsOn | None = None
    gain: Gain | None = None

    @property
    def tail(self) -> int | None:
        """The number of a prompt's last tokens that it acts on, None for all tokens."""
        return tail_of({"acts_on": self.acts_on})


def tail_of(record: Record) -> int | None:
    """The number of a prompt's last tokens that an expert with this record acts on, None: all."""
    acts_on = record.get("acts_on") or {}
    return acts_on.get("tail")


def read_info(path: Path) -> ExpertInfo:
    """What the `phatgoose.json` at `path` says. Raises ExpertError when it isn't as specified."""
    hint = ""
    folder = path.parent
    if not folder.exists():
        hint = closest_beside(folder)
    elif (folder / ADAPTER_CONFIG).is_file():
        hint = f" Of a PEFT adapter, 'phatgoose import {folder} --out …' makes an expert."
    return read_json(path, ExpertInfo, hint=hint)


def info_json(info: ExpertInfo) -> str:
    """The content of `phatgoose.json`, with null for numbers that JSON lacks (a loss of NaN)."""
    content = json.loads(json.dumps(asdict(info)), parse_constant=lambda _: None)
    for name in ("embedding_form", "measured_in", "reader", "prompts_read", "acts_on", "gain"):
        if content[name] is None:
            del content[name]
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


# The directory.

MOST_EMBEDDINGS = 1000  # the format's limit (docs/format.md)


class _Layout(NamedTuple):
    """File names inside an expert directory, beside those of its adapter."""

    vectors: str = "phatgoose.safetensors"
    info: str = "phatgoose.json"
    embeddings: str = "embeddings.safetensors"
    prompts: str = "prompts.txt"  # examples, one a line; for people, and for statistics of few
    card: str = "README.md"
    signature: str = "model.sig"


LAYOUT = _Layout()
FEW = 3  # prompts that statistics are of
ENOUGH = 5
# Statistics, by the settings that ask for them, which hyperparameters repeat.
SHARED = {"means": "means", "readings": "prompt_statistics", "embeddings": "embeddings"}
VECTORS = {"gate": "gates", "mean": "means", "reading": "prompt_statistics"}  # in their file


def expert_files() -> tuple[str, ...]:
    """Every name that a file of an expert may have."""
    names = [*LAYOUT]
    for files in formats():
        names += (files.config, files.weights)
    return tuple(names)


def adapters_in(place: Path) -> list[Path]:
    """`place` if it is the folder of an adapter or expert, else those of its folders that are."""
    names = [LAYOUT.info, *(files.config for files in formats())]

    def is_one(folder: Path) -> bool:
        # Unlike Path.is_file, isfile passes over what may not be looked into, such as lost+found.
        return any(os.path.isfile(folder / name) for name in names)

    if is_one(place):
        return [place]
    if not place.is_dir():
        return []
    folders = filter(is_one, sorted(place.iterdir()))
    return [folder for folder in folders if not folder.name.startswith(".")]


@dataclass(frozen=True, eq=False)
class Expert:
    """One expert: what its adapter does, its gates and its statistics, by site name.

    The tensors of a loaded expert are views of its files, mapped into memory: bytes are read when
    used, and take memory until `release`. Don't write to them; `dataclasses.replace` makes an
    expert with other tensors.

    Attributes:
        info: What its `phatgoose.json` says.
        directory: The folder of the adapter's files.
        modules: What it does at each site, all of one kind.
        gates: A float32 vector of each site's input size; empty when there are none.
        means: Mean activations, likewise.
        embeddings: None or [examples, dims], rows of length 1 made by `info.embedder`.
        prompt_statistics: By `statistics.prompt_statistics_of`; empty when there are none.
        files: The mapped files.
        source: The folder of an adapter that was read as an expert; `directory` may be temporary.
        states: What a reader made of `prompts`, if it read these here and not earlier.
    """

    info: ExpertInfo
    directory: Path
    modules: Modules
    gates: Tensors
    means: Tensors
    embeddings: Tensor | None = None
    prompt_statistics: Tensors = field(default_factory=dict)
    files: Mapping[str, TensorFile] = field(default_factory=dict)
    source: Path | None = None
    states: Tensor | None = None

    def __repr__(self) -> str:
        kind = kinds()[self.kind].label if self.modules else "empty"
        parts = ", ".join([kind, *filter(self.has, ("gates", *SHARED.values()))])
        return f"<Expert {self.name!r}, {parts} (sites: {len(self.modules)})>"

    @property
    def name(self) -> str:
        """The name in `phatgoose.json`, not the directory's; unique within a pool."""
        return self.info.name

    @property
    def place(self) -> Path:
        """Where the user has it: in messages and records."""
        return self.source or self.directory

    @property
    def kind(self) -> str:
        """The name of its kind, a key of `kinds`."""
        return next(iter(self.modules.values())).kind

    @property
    def seed(self) -> int:
        """That of its training; 0 where none is recorded."""
        seed = self.info.hyperparameters.get("seed")
        # Whoever made the expert may have recorded any.
        return seed % (1 << 32) if isinstance(seed, int) else 0

    @cached_property
    def lora(self) -> Mapping[str, Factors]:
        """The LoRA factors by site, of a DoRA too; empty for an expert of another kind."""
        modules = self.modules.items()
        return {site: module for site, module in modules if isinstance(module, Factors)}

    @cached_property
    def prompts(self) -> tuple[str, ...]:
        """Example prompts that it brings, in a file beside it or an adapter's card."""
        return prompts_beside(self.place)

    def has(self, part: str) -> bool:
        """True if it has the `part`, the name of one of its attributes, such as "gates"."""
        value = getattr(self, part)
        return value is not None and len(value) > 0

    def release(self) -> None:
        """Free the memory of bytes read from its files; they are read again when used."""
        for file in self.files.values():
            file.release()

    def with_statistics(
        self, recorded: Mapping[str, object] | None = None, **statistics: Any
    ) -> Expert:
        """The expert with new `means` or `embeddings`, and fields of `ExpertInfo` about these.

        What isn't among `statistics` stays. `recorded` are added to its hyperparameters.
        """
        parts = {part: statistics.pop(part) for part in SHARED.values() if part in statistics}
        result = replace(self, **parts)
        now = {setting: result.has(part) for setting, part in SHARED.items()}
        hyperparameters = {**self.info.hyperparameters, **(recorded or {}), **now}
        info = replace(self.info, **statistics, hyperparameters=hyperparameters)
        return replace(result, info=info)

    def with_prompts_read(self, reader: Reader, prompts: Sequence[str] = ()) -> Expert:
        """The expert with the statistics of `prompts`, or else of those that it brought.

        Warns of fewer than FEW.
        """
        texts = list(prompts or self.prompts)
        if len(texts) < FEW:
            few = f"{self.name}: few prompts ({len(texts)}); give at least {FEW}, better {ENOUGH}."
            warnings.warn(few, stacklevel=3)
        states = reader.states(texts)
        read = self if prompts else replace(self, states=states)
        return read.with_statistics(
            prompt_statistics=prompt_statistics_of(states),
            reader=reader.reference,
            prompts_read=len(texts),
        )

    def with_more_prompts(self, reader: Reader, prompts: Sequence[str]) -> Expert:
        """The expert with `prompts` among those of its statistics, if their number is known."""
        count = self.info.prompts_read
        if not count:
            return self
        statistics = grown(self.prompt_statistics, count, reader.states(prompts))
        return self.with_statistics(prompt_statistics=statistics, prompts_read=count + len(prompts))

    @classmethod
    def from_peft(
        cls,
        adapter_dir: str | Path,
        gates: Tensors,
        *,
        base: Base | BaseReference | None = None,
        name: str | None = None,
        **others: Any,
    ) -> Expert:
        """An expert made of an existing adapter, of any kind, and the gates trained for it.

        `base` defaults to the one that the adapter's config names, at the revision that it names
        and without a fingerprint, `name` to the name of the adapter's folder. `others` are `means`,
        `prompt_statistics` and `embeddings`, and fields of `ExpertInfo`. Raises ExpertError when
        the adapter can't be used or names no base where none is given. Vectors that don't fit it
        are refused by `save`.
        """
        directory = Path(adapter_dir)
        base = base or base_named_in(directory)
        if base is None:
            raise ExpertError(f"The adapter in {directory} doesn't name its base; give base.")
        name = name or directory.resolve().name
        check_name(name)
        means = _plain(others.pop("means", None) or {})
        prompt_statistics = _plain(others.pop("prompt_statistics", None) or {})
        embeddings = others.pop("embeddings", None)
        info = ExpertInfo(
            name=name,
            base=base.reference if isinstance(base, Base) else base,
            adapter_sha256=sha256_of(directory / adapter_files(directory).weights),
            **others,
        )
        return cls(
            info,
            directory,
            read_modules(directory),
            _plain(gates),
            means,
            embeddings,
            prompt_statistics,
        )

    @classmethod
    def load(cls, directory: str | Path) -> Expert:
        """The expert in `directory`, fully checked: hashes, shapes, finiteness.

        Raises ExpertError with the expert, the site, what was got and what was wanted.
        """
        directory = Path(directory)
        info = read_info(directory / LAYOUT.info)
        adapter = adapter_files(directory)
        files = {}
        for file, sha256 in (
            (adapter.weights, info.adapter_sha256),
            (LAYOUT.vectors, info.vectors_sha256),
            (LAYOUT.embeddings, info.embeddings_sha256),
        ):
            if sha256 is None and not (directory / file).exists():
                continue
            hint = adapter.hint if file == adapter.weights else ""
            files[file] = read_tensors(directory / file, hint)
            got = files[file].sha256()
            if got != sha256:
                raise ExpertError(
                    f"Expert {info.name!r}: {file} isn't the one that {LAYOUT.info} describes: its "
                    f"SHA-256 is {got[:12]}…, wanted {(sha256 or 'none')[:12]}…."
                )
        vectors = files.get(LAYOUT.vectors)
        parts: dict[str, Any] = {}
        for prefix, part in VECTORS.items():
            parts[part] = vectors.under(prefix) if vectors else {}
        if LAYOUT.embeddings in files:
            parts["embeddings"] = files[LAYOUT.embeddings].get("embeddings")
        modules = read_modules(directory, files[adapter.weights])
        expert = cls(info, directory, modules, files=files, **parts)
        _check_vectors(expert)
        # Every byte was read for its hash; most aren't needed for long.
        expert.release()
        return expert

    def save(self, directory: str | Path, *, overwrite: bool = False) -> Expert:
        """Write a complete directory or none, and return the expert as loaded from it.

        Raises ExpertError when its vectors don't fit its adapter, and when `directory` exists
        (unless `overwrite`) or can't be written.
        """
        target = Path(directory)
        with new_directory(target, ExpertError, overwrite=overwrite) as work:
            self._write(work)
            saved = Expert.load(work)
        return replace(saved, directory=target)

    def _write(self, work: Path) -> None:
        files = adapter_files(self.directory)
        copied = [self.directory / files.config, self.directory / files.weights]
        brought = self.place / LAYOUT.prompts
        if brought.is_file() and self.prompts:  # which aren't huge, nor in a link elsewhere
            copied.append(brought)
        for path in copied:
            shutil.copyfile(regular_file(path), work / path.name)
        info = replace(self.info, vectors_sha256=None, embeddings_sha256=None)
        vectors = {}
        for prefix, part in VECTORS.items():
            for name, vector in getattr(self, part).items():
                # safetensors refuses tensors that share memory.
                vectors[f"{prefix}.{name}"] = vector.clone()
        if vectors:
            save_file(vectors, work / LAYOUT.vectors)
            info = replace(info, vectors_sha256=sha256_of(work / LAYOUT.vectors))
        if self.embeddings is not None:
            rows = self.embeddings.float().contiguous()
            save_file({"embeddings": rows}, work / LAYOUT.embeddings)
            info = replace(info, embeddings_sha256=sha256_of(work / LAYOUT.embeddings))
        texts = {LAYOUT.card: model_card(info, self.kind), LAYOUT.info: info_json(info)}
        for file, text in texts.items():
            # A path may hold bytes that aren't UTF-8, and JSON has no escape for them.
            (work / file).write_text(text, encoding="utf-8", errors="replace")


def _plain(vectors: Tensors) -> Tensors:
    return {site: v.detach().float().cpu().contiguous() for site, v in vectors.items()}


def _check_vectors(expert: Expert) -> None:
    who = f"Expert {expert.name!r}"
    sites = {}
    for site, module in expert.modules.items():
        # One that doesn't tell its input's size has a letter of its own: `check_fit` asks.
        sites[site] = (module.sizes.get("n", f"n of {site}"),)
    statistics = {f"{WHOLE}.{part}": form for part, form in PARTS.items()}
    forms: dict[str, Mapping[str, Sequence[str | int]]]
    forms = {"gates": sites, "means": sites, "prompt_statistics": statistics}
    for part, form in forms.items():
        tensors = getattr(expert, part)
        if tensors:
            check_parts(f"{who}, {part}", form, tensors, (torch.float32,))
    rest = expert.prompt_statistics.get(f"{WHOLE}.rest")
    if rest is not None and (rest < 0).any():
        raise ExpertError(f"{who} has prompt_statistics of variances below 0.")
    rows = expert.embeddings
    if rows is None:
        return
    check_parts(who, {"embeddings": "ed"}, {"embeddings": rows}, (torch.float32,))
    if len(rows) > MOST_EMBEDDINGS:
        raise ExpertError(f"{who} has more than {MOST_EMBEDDINGS} embeddings.")
    if ((rows.norm(dim=-1) - 1).abs() >= 1e-3).any():
        raise ExpertError(f"{who} has embeddings of another length than 1.")


# Its model card, which the Hub shows.

WARNING = " PEFT alone doesn't know where in a prompt it acts and lets it act on all tokens."


def model_card(info: ExpertInfo, kind: str) -> str:
    """The card of an expert of this `kind`, in Markdown."""
    base = info.base.id
    front = ModelCardData(library_name="phatgoose", tags=["phatgoose", "adapter"])
    alone = ""
    if kinds()[kind].peft_type is not None:
        front = ModelCardData(library_name="peft", tags=["phatgoose", kind])
        alone = f"""
As an ordinary adapter: `PeftModel.from_pretrained(base_model, "path/to/{info.name}")` of PEFT.\
{WARNING if info.acts_on else ""}
"""
    if is_hub_id(base):
        front.base_model = SMOLLM2_ON_HUB if base == SMOLLM2 else base
    # Indented, so that nothing in it is Markdown or HTML.
    record = "".join(f"    {one_line(line, 500)}\n" for line in info_json(info).splitlines())
    return f"""\
---
{front.to_yaml()}
---

# {info.name}

{kinds()[kind].label} expert for `{code(base)}`, one of a pool whose router chooses who acts: for \
every token and at
every module by PHATGOOSE gates (Muqeeth et al. 2024), or for a whole prompt by its statistics.
{alone}
```python
import phatgoose as pg
model = pg.compose(pg.Pool.open(["path/to/{info.name}", "path/to/another"]))
```

## phatgoose.json

{record}"""


def code(text: object) -> str:
    """`text` as it may stand between backticks, whoever wrote it."""
    return one_line(text).replace("`", "'")

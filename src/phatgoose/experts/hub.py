"""The Hugging Face Hub: references to experts there, their local copies, and publishing one.

A reference is `hub:owner/name[/folder][@revision]`: a repository, a folder in it if it holds
several experts, and a branch, tag or commit. Files come through huggingface_hub's cache, so what
was fetched once is available offline. Only files of an expert or an adapter are ever fetched.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download

from ..base.identity import REVISION
from ..errors import ExpertError, PhatgooseError
from ..files import new_directory, one_line, regular_file, require_free, shortened
from ..names import HUB, is_hub_id
from ..tasks.loading import PROMPT_FILES
from .expert import LAYOUT, Expert, expert_files, read_info

REFERENCE = re.compile(
    r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?P<folder>(/[A-Za-z0-9][\w.-]*)*)"
    rf"(@(?P<revision>{REVISION.pattern}))?",
    re.ASCII,
)
CACHED = re.compile(
    r"models--(?P<repo>[^/]+)/snapshots/(?P<revision>[0-9a-f]{40})(/(?P<folder>.+))?", re.DOTALL
)


@dataclass(frozen=True)
class HubReference:
    """Where an expert, or a folder of them, is on the Hub; `folder` "" is the repository's root."""

    repo: str
    folder: str = ""
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubReference:
        """The reference in `text`, with or without `hub:`. Raises ExpertError if it is none."""
        match = REFERENCE.fullmatch(text.removeprefix(HUB))
        if match is None:
            raise ExpertError(
                f"{text!r} is no reference to the Hub; wanted hub:OWNER/NAME, with /FOLDER and "
                f"@REVISION where needed."
            )
        return cls(match["repo"], match["folder"].strip("/"), match["revision"])

    @staticmethod
    def is_one(place: str | Path) -> bool:
        return str(place).startswith(HUB)

    def __str__(self) -> str:
        text = f"{HUB}{self.repo}"
        if self.folder:
            text += f"/{self.folder}"
        if self.revision:
            text += f"@{self.revision}"
        return text


def reference_of(directory: Path) -> HubReference | None:
    """The pinned reference to a folder in huggingface_hub's cache, None for other folders."""
    cache = Path(constants.HF_HUB_CACHE).resolve()
    place = directory.resolve()
    if not place.is_relative_to(cache):
        return None
    match = CACHED.fullmatch(place.relative_to(cache).as_posix())
    if match is None:
        return None
    return HubReference(match["repo"].replace("--", "/"), match["folder"] or "", match["revision"])


def fetch(reference: HubReference, *, inner: bool = True) -> Path:
    """The local copy of what `reference` names, also without a connection if it was fetched before.

    With the experts in its folders, if `inner`. Raises ExpertError when there is no repository.
    """
    inside = f"{reference.folder}/" if reference.folder else ""
    folders = (inside, f"{inside}*/") if inner else (inside,)
    files = (*expert_files(), *PROMPT_FILES)
    with reported(f"{reference} can't be fetched"):
        snapshot = snapshot_download(
            reference.repo,
            revision=reference.revision,
            allow_patterns=[f"{folder}{file}" for folder in folders for file in files],
            ignore_patterns=[f"{inside}*/*/*"],  # the Hub's * matches slashes too
        )
    return Path(snapshot) / reference.folder


def pull(reference: HubReference | str, out: str | Path) -> Expert:
    """The expert that `reference` names, checked and copied to `out`.

    Complete or not at all. Raises ExpertError when it can't be fetched, is damaged, or `out`
    exists.
    """
    target = Path(out)
    require_free(target, ExpertError)
    fetched = fetch(HubReference.parse(str(reference)), inner=False)
    read_info(fetched / LAYOUT.info)  # which says of a plain adapter what to do with it
    with new_directory(target, ExpertError) as work:
        for file in expert_files():
            if (fetched / file).is_file():
                shutil.copyfile(regular_file(fetched / file), work / file)
        pulled = Expert.load(work)
    return replace(pulled, directory=target)


def push(
    directory: str | Path,
    reference: HubReference | str,
    *,
    private: bool = False,
    message: str | None = None,
) -> HubReference:
    """The pinned reference to the expert in `directory`, published as one commit.

    The commit has adapter, gates, statistics, embeddings, example prompts and card, and deletes
    such files of an earlier version; other files of the repository stay. A missing repository is
    created, `private` or not. A revision in `reference` is the branch. Raises ExpertError when the
    expert is damaged, its base is a folder of this machine, which no one else could load, or the
    Hub refuses.
    """
    directory = Path(directory)
    reference = HubReference.parse(str(reference))
    expert = Expert.load(directory)
    if not is_hub_id(expert.info.base.id):
        raise ExpertError(
            f"{directory} names its base by a path, {shortened(expert.info.base.id)}, which others "
            f"can't load; publish the base, and put its Hub id into {LAYOUT.info} (base.id)."
        )
    files = [file for file in expert_files() if (directory / file).is_file()]
    for file in files:  # a link out of the folder would publish what it leads to
        regular_file(directory / file)
    with reported(f"{directory} can't be pushed to {reference}"):
        api = HfApi()
        api.create_repo(reference.repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=reference.repo,
            folder_path=directory,
            path_in_repo=reference.folder or None,
            revision=reference.revision,
            allow_patterns=files,
            delete_patterns=[file for file in expert_files() if file not in files],
            commit_message=message or f"Expert {expert.name}",
        )
    return replace(reference, revision=commit.oid)


@contextmanager
def reported(what: str) -> Iterator[None]:
    """What a library raises becomes an ExpertError of one line, which begins with `what`."""
    try:
        yield
    except PhatgooseError:
        raise
    except Exception as error:  # the Hub's client and PEFT may raise anything
        why = str(error)
        if error.__cause__ is not None:
            why += f" {error.__cause__}"
        text = " ".join(why.split()) or type(error).__name__
        raise ExpertError(f"{what}: {one_line(text)}") from error

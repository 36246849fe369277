"""Copies of small models, several times as fast as `copy.deepcopy` makes them."""

import copy
import io
import pickle
from typing import Any, Generic, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

Thing = TypeVar("Thing")


class Original(Generic[Thing]):
    """Something to be copied often, as it is now.

    Its modules are pickled once, which C reads back; tensors and tokenizers are copied each time.
    """

    def __init__(self, thing: Thing) -> None:
        file = io.BytesIO()
        pickler = _Pickler(file, pickle.HIGHEST_PROTOCOL)
        pickler.dump(thing)
        self._pickled, self._apart = file.getvalue(), list(pickler.apart.values())

    def copied(self) -> Thing:
        """An equal one that shares nothing with others that would be changed in place."""
        return _Unpickler(io.BytesIO(self._pickled), self._apart).load()


class _Pickler(pickle.Pickler):
    """Leaves tensors and tokenizers out, in `apart` by their ids."""

    def __init__(self, *options: Any) -> None:
        super().__init__(*options)
        self.apart: dict[int, Any] = {}

    def persistent_id(self, thing: Any) -> int | None:
        if not isinstance(thing, torch.Tensor | PreTrainedTokenizerBase):
            return None
        self.apart.setdefault(id(thing), thing)
        return list(self.apart).index(id(thing))


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, apart: list[Any]) -> None:
        super().__init__(file)
        self._apart, self._memo = apart, {}  # deepcopy's: what is tied stays tied

    def persistent_load(self, place: int) -> Any:
        return copy.deepcopy(self._apart[place], self._memo)

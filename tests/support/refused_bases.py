"""Why a base isn't loaded."""

from __future__ import annotations

import pytest

from phatgoose.base.loading import load_base
from phatgoose.errors import BaseModelError


def complaint_about(name: object, **options: object) -> str:
    with pytest.raises(BaseModelError) as caught:
        load_base(name, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message

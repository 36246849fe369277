"""What the report page embeds."""

from __future__ import annotations

import json

from phatgoose.apps.report.page import inline_json


def test_texts_cannot_break_out_of_the_page():
    hostile = "</script><img src=x onerror=alert(1)>\u2028<!--"
    packed = inline_json({"tokens": [hostile]})
    assert "<" not in packed
    assert json.loads(packed) == {"tokens": [hostile]}

"""What a base's chat template writes, compared with transformers' own rendering."""

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from phatgoose.base.loading import SMOLLM2
from phatgoose.base.text_process import answer
from phatgoose.base.untrusted_text import chat_of
from phatgoose.errors import PhatgooseError

# As models on the Hub have them.
TEMPLATES = {
    "llama 3.2": (
        "{{- bos_token }}\n{%- if not date_string is defined %}\n    {%- if strftime_now is "
        'defined %}\n        {%- set date_string = strftime_now("%d %b %Y") %}\n    {%- endif %}'
        "\n{%- endif %}\n{%- if messages[0]['role'] == 'system' %}\n    {%- set system_message = "
        "messages[0]['content']|trim %}\n    {%- set messages = messages[1:] %}\n{%- else %}\n    "
        '{%- set system_message = "" %}\n{%- endif %}\n{{- "Today Date: " + date_string + "\n\n" '
        "}}\n{{- system_message }}\n{%- for message in messages %}\n    {{- '<|' + "
        "message['role'] + '|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != "
        "(loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate "
        "user/assistant/user/assistant/...') }}{% endif %}{% if message['role'] == 'user' %}"
        "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' "
        "%}{{ message['content'] + eos_token}}{% else %}{{ raise_exception('Only user and "
        "assistant roles are supported!') }}{% endif %}{% endfor %}"
    ),
    "qwen 3": (
        "{%- if tools %}{{- tools | tojson }}{%- endif %}\n{%- set ns = "
        "namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}\n"
        "{%- for message in messages[::-1] %}\n    {%- set index = (messages|length - 1) - "
        'loop.index0 %}\n    {%- if ns.multi_step_tool and message.role == "user" and '
        "message.content is string and not(message.content.startswith('<tool_response>')) %}\n"
        "        {%- set ns.multi_step_tool = false %}\n        {%- set ns.last_query_index = "
        "index %}\n    {%- endif %}\n{%- endfor %}\n{%- for message in messages %}\n    "
        "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}\n"
        "    {%- if loop.index0 > ns.last_query_index %}{{- '(after)' }}{%- endif %}\n"
        "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\n' }}\n"
        "    {%- if enable_thinking is defined and enable_thinking is false %}\n        "
        "{{- '<think>\n\n</think>\n\n' }}\n    {%- endif %}\n{%- endif %}"
    ),
    "zephyr": (
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + "
        "message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
        "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == "
        "'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
        "{% endfor %}"
    ),
    "generation": (
        "{% set seen = 0 %}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% generation %}{% set seen = 1 %}{{ m.content }}{% endgeneration %}{% else %}"
        "{{ m.content | tojson(indent=1) }}{% continue %}{% endif %}{{ seen }}{% endfor %}"
        "{{ dict(a='ä', b='<&>') | tojson }}{{ dict(b=1, a=[2]) | tojson(sort_keys=true) }}"
        "{{ namespace(self=1).self }}{{ dict.fromkeys(['k']) }}"
    ),
    "of a TypeError": "{{ messages[0].content + 1 }}",
    "of no syntax": "{% for m in messages %}",
    "of an attribute": "{{ messages.__class__.__mro__ }}",
    "of a private name": "{{ namespace(__x=1) }}",
    "that changes what it is given": "{{ messages.append(1) }}",
}
CHATS = {
    "one": [{"role": "user", "content": " Bird or fish?\n"}],
    "three": [
        {"role": "user", "content": "é\u2028<&>'\""},
        {"role": "assistant", "content": "yes  "},
        {"role": "user", "content": "😀 {{ 1 }}", "name": "Ann"},
    ],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ""}],
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def rendered(template, variables):
    """What transformers renders, or "" where it fails."""
    messages = variables["messages"]
    others = {name: value for name, value in variables.items() if name != "messages"}
    try:
        return render_jinja_template([messages], chat_template=template, **others)[0][0]
    except Exception:
        return ""


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("begins", [True, False])
def test_a_template_writes_what_transformers_does(template, chat, begins):
    given = {"messages": chat, "add_generation_prompt": begins, "tools": None, "documents": None}
    variables = {**SPECIAL, **given}
    reply = answer({"template": template, "variables": variables, "most": 9999}, None)
    wanted = rendered(template, variables)
    assert reply.get("found", [[""]])[0][0] == wanted
    assert ("found" in reply) == bool(wanted)


@pytest.mark.real
@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
def test_smollm2_s_template_writes_what_transformers_does(chat):
    from phatgoose.base.loading import load_tokenizer

    try:
        tokenizer = load_tokenizer(SMOLLM2)
    except PhatgooseError as error:
        pytest.skip(f"needs phatgoose[smollm2]: {error}")
    template, variables = chat_of(tokenizer, chat)
    reply = answer({"template": template, "variables": variables, "most": 9999}, None)
    wanted = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert reply == {"found": [[wanted, len(wanted)]]}


def test_an_answer_is_cut_and_says_how_long_it_was():
    question = {"template": "{{ 'ab' * 50 }}", "variables": {}, "most": 3}
    assert answer(question, None) == {"found": [["aba", 100]]}


def test_the_template_s_own_refusal_differs_from_a_failure():
    refusal = {"template": "{{ raise_exception('a\nb') }}", "variables": {}, "most": 3}
    assert answer(refusal, None) == {"refused": "a b"}
    (failure,) = answer({**refusal, "template": "{{ 1 + '' }}"}, None).items()
    assert failure[0] == "failed"
    assert failure[1].startswith("TypeError: ")
    assert "no tokenizer" in answer({"texts": ["a"], "most": 1}, None)["failed"]

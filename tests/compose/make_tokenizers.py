"""Makes golden/<name>.json: four small tokenizers of the common kinds, trained on the text below.

Run it again only when a kind is added:  python tests/compose/make_tokenizers.py
"""

import json
import pathlib

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXT = """
The old lighthouse keeper counted the ships that passed before dawn, and wrote every name into a long grey book.
"Until tomorrow," he'd say, though he'll have said it a thousand times; nobody's ever counted that, and they don't ask.
In 1984 there were 365 entries, 12 storms and 7 wrecks. It cost $3.50 to visit, tea included -- or 20% less on Sundays.
Der Leuchtturm steht auf einem Felsen; im Winter gefriert das Wasser, und die Möwen bleiben trotzdem über den Dächern.
Le café est fermé jusqu'à midi, où l'on sert du thé à la menthe et des crêpes sucrées aux élèves du collège.
Старый смотритель маяка считал корабли, которые проходили до рассвета, и записывал каждое имя в серую книгу.
老守塔人数着黎明前经过的船只，把每一个名字都写进一本灰色的长书里。书里还有风暴和沉船的故事。
คนเฝ้าประภาคารนับเรือที่แล่นผ่านก่อนรุ่งสางและเขียนทุกชื่อลงในหนังสือเล่มยาวสีเทา
def count(ships):\n    total = 0\n    for ship in ships:\n        total += ship.size  # metres\n    return total\n
"""
BOS_EOS = ["<s>", "</s>"]


def train(model, trainer, **parts):
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(TEXT.splitlines(keepends=True) * 3, trainer)
    return tokenizer


def bpe_trainer(size, **arguments):
    return trainers.BpeTrainer(vocab_size=size, special_tokens=BOS_EOS, show_progress=False, **arguments)


def main():
    alphabet = dict(initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    digits = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                   r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    made = {
        "gpt2": train(models.BPE(), bpe_trainer(420, **alphabet), decoder=decoders.ByteLevel(),
                      pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False)),
        "llama3": train(models.BPE(), bpe_trainer(560, **alphabet), decoder=decoders.ByteLevel(),
                        pre_tokenizer=pre_tokenizers.Sequence([
                            pre_tokenizers.Split(digits, "isolated"),
                            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])),
        "llama2": train(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True),
                        trainers.BpeTrainer(vocab_size=700, show_progress=False, limit_alphabet=120,
                                            special_tokens=BOS_EOS + ["<unk>"] + [f"<0x{b:02X}>" for b in range(256)]),
                        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
                        decoder=decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                                   decoders.Fuse(), decoders.Strip(" ", 1, 0)])),
        "unigram": train(models.Unigram(), trainers.UnigramTrainer(vocab_size=500, show_progress=False,
                                                                   special_tokens=BOS_EOS + ["<unk>"],
                                                                   unk_token="<unk>"),
                         pre_tokenizer=pre_tokenizers.Metaspace(), decoder=decoders.Metaspace()),
    }
    # The byte tokens had to be special to get into the vocabulary; they are none.
    llama2 = json.loads(made["llama2"].to_str())
    llama2["added_tokens"] = llama2["added_tokens"][:3]
    made["llama2"] = Tokenizer.from_str(json.dumps(llama2))
    folder = pathlib.Path(__file__).parent / "golden"
    for name, tokenizer in made.items():
        (folder / f"{name}.json").write_text(tokenizer.to_str() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

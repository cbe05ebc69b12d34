"""Makes the fuzzers' seeds under corpus/: one small valid input of each kind. Run again when a format grows."""

import io
import json
import pathlib
import tempfile

import gguf
import numpy as np
import torch
from safetensors.numpy import save
from transformers.convert_slow_tokenizer import import_protobuf

CORPUS = pathlib.Path(__file__).parent / "corpus"


def write(reader, name, content):
    folder = CORPUS / reader
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


def tiny_gguf(arch, model, pre):
    path = pathlib.Path(tempfile.mkdtemp()) / "m.gguf"
    writer = gguf.GGUFWriter(path, arch)
    for key, value in dict(embedding_length=8, feed_forward_length=4, block_count=1, context_length=64).items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_tokenizer_model(model)
    writer.add_token_list(["<s>", "a", "b", "ab", "<0x0A>"])
    writer.add_token_types([3, 1, 1, 1, 4])
    writer.add_bos_token_id(0)
    if model == "gpt2":
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges(["a b"])
    else:
        writer.add_token_scores([0.0, -1.0, -2.0, -3.0, 0.0])
    writer.add_chat_template("{{ messages }}")
    block = np.arange(36, dtype=np.uint8).reshape(2, 18)
    writer.add_tensor("token_embd.weight", block, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("blk.0.attn_q.weight", np.ones((8, 8), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(8, np.float32))
    if arch == "llama":
        writer.add_tensor("rope_freqs.weight", np.ones(2, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def pieces():
    model = import_protobuf().ModelProto()
    for text, score, kind in [("<pad>", 0, 3), ("</s>", 0, 3), ("<unk>", 0, 2), ("<u>", 0, 4), ("\u2581the", -1.5, 1)]:
        model.pieces.add(piece=text, score=score, type=kind)
    model.trainer_spec.model_type, model.trainer_spec.unk_id = 1, 2
    model.normalizer_spec.precompiled_charsmap = bytes(range(8))
    return model.SerializeToString()


def tokenizers():
    added = [{"id": 0, "content": "</s>", "single_word": False, "lstrip": False, "rstrip": True, "normalized": False,
              "special": True}]
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "</s>", "type_id": 0}},
                                                         {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
                "special_tokens": {"</s>": {"id": "</s>", "ids": [0], "tokens": ["</s>"]}}}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
    split = {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}| ?\\p{L}+|\\s+(?!\\S)"}, "behavior": "Isolated",
             "invert": False}
    return {
        "bpe_bytes.json": {
            "version": "1.0", "added_tokens": added, "normalizer": {"type": "NFC"}, "post_processor": template,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}, "decoder": byte_level,
            "model": {"type": "BPE", "vocab": {"</s>": 0, "t": 1, "h": 2, "e": 3, "th": 4, "the": 5, "\u0120": 6},
                      "merges": [["t", "h"], ["th", "e"]], "ignore_merges": True}},
        "bpe_fallback.json": {
            "version": "1.0", "added_tokens": added, "post_processor": template,
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"},
                           {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]},
            "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"},
                        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "byte_fallback": True, "unk_token": "</s>", "merges": ["t h"],
                      "vocab": {"</s>": 0, "t": 1, "h": 2, "th": 3, "<0xC3>": 4, "<0xA9>": 5, "\u2581": 6}}},
        "unigram.json": {
            "version": "1.0", "added_tokens": added, "pre_tokenizer": metaspace, "decoder": metaspace,
            "model": {"type": "Unigram", "unk_id": 0, "vocab": [["</s>", 0.0], ["\u2581the", -1.5], ["c", -2.0]],
                      "byte_fallback": False}},
        "wordpiece.json": {
            "version": "1.0", "added_tokens": added, "pre_tokenizer": {"type": "BertPreTokenizer"},
            "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                           "strip_accents": None, "lowercase": True},
            "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
            "model": {"type": "WordPiece", "unk_token": "</s>", "continuing_subword_prefix": "##",
                      "max_input_chars_per_word": 100, "vocab": {"</s>": 0, "the": 1, "##dille": 2, "c": 3}}},
    }


def main():
    tensors = save({"base_model.model.q.lora_A.weight": np.ones((2, 3), np.float32),
                    "base_model.model.b": np.ones(1, np.int8)}, {"format": "pt"})
    write("safetensors", "two_tensors", tensors)
    state, stream = torch.nn.Linear(3, 2).state_dict(), io.BytesIO()
    state["tied"] = state["weight"].t()
    torch.save(state, stream)
    write("torch_file", "state_dict", stream.getvalue())
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "rank_pattern": {"^q": 3}}
    write("adapter", "lora", json.dumps(adapter).encode() + b"\0" + tensors)
    mixture = {"peft_type": "MOLORA", "r": 2, "target_modules": ".*q_proj",
               "moesaic": {"num_experts": 3, "router": {"type": "top_k", "top_k": 2}}}
    write("adapter", "molora", json.dumps(mixture).encode() + b"\0" + tensors)
    for arch, model, pre in [("llama", "gpt2", "smollm"), ("llama", "llama", ""), ("qwen3", "gpt2", "qwen2"),
                             ("gemma3", "llama", "")]:
        write("gguf", f"{arch}_{model}", tiny_gguf(arch, model, pre))
    write("sentencepiece", "t5", pieces())
    for name, tokenizer in tokenizers().items():
        write("tokenizer", name, json.dumps(tokenizer).encode())
    common = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2,
              "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    configs = {
        "llama_transformers4.json": {**common, "model_type": "llama", "rope_theta": 1e4, "rope_scaling": rope, "torch_dtype": "float16"},
        "qwen3_yarn.json": {**common, "model_type": "qwen3", "rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
        "gemma3_multimodal.json": {"model_type": "gemma3", "text_config": {**common, "model_type": "gemma3_text",
                                                           "rope_local_base_freq": 1e4, "sliding_window_pattern": 2}},
        "t5.json": {"model_type": "t5", "vocab_size": 16, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_heads": 2, "num_layers": 2,
                    "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "is_encoder_decoder": True},
        "t5gemma.json": {"model_type": "t5gemma", "is_encoder_decoder": True, "encoder": {**common, "head_dim": 4},
                         "decoder": {**common, "head_dim": 4, "rope_theta": 1e4, "layer_types": ["full_attention"] * 2}},
    }
    for name, config in configs.items():
        write("config", name, json.dumps(config).encode())


if __name__ == "__main__":
    main()

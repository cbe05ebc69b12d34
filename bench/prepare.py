"""Makes what the benchmarks run on, once, in .cache/bench: SmolLM2-135M in float32 as a Hugging Face folder and for
CTranslate2, models of random weights where only their shapes matter, and the batches of ids."""

import json
import pathlib
import random

ROOT = pathlib.Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "bench"
GGUF = ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTRUCTIONS = ROOT.parent / "shared" / "data" / "instruct" / "alpaca_en_demo.json"
VOCABULARY = 49152
T5_VOCABULARY = 32128


def huggingface_folder():
    folder = CACHE / "smollm2"
    if not (folder / "tokenizer_config.json").exists():
        import torch
        import transformers

        arguments = dict(pretrained_model_name_or_path=GGUF.parent, gguf_file=GGUF.name)
        quantized = transformers.AutoModelForCausalLM.from_pretrained(**arguments, dtype=torch.float32)
        # transformers refuses to save what came from a GGUF, so the weights move into a model made from its config.
        config = transformers.LlamaConfig(**{k: v for k, v in quantized.config.to_dict().items()
                                             if k != "quantization_config"})
        model = transformers.LlamaForCausalLM(config)
        model.load_state_dict(quantized.state_dict())
        model.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(**arguments).save_pretrained(folder)
    return folder


def lora_folders(count, rank):
    """LoRAs of all of SmolLM2's linears in PEFT's layout, random numbers."""
    shapes = {"self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576),
              "self_attn.o_proj": (576, 576), "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576),
              "mlp.down_proj": (576, 1536)}
    folders = [CACHE / f"lora-r{rank}-{i}" for i in range(count)]
    for i, folder in enumerate(folders):
        if (folder / "adapter_config.json").exists():
            continue
        import safetensors.torch
        import torch

        torch.manual_seed(i)
        tensors = {}
        for layer in range(30):
            for module, (out, width) in shapes.items():
                name = f"base_model.model.model.layers.{layer}.{module}"
                tensors[f"{name}.lora_A.weight"] = 0.02 * torch.randn(rank, width)
                tensors[f"{name}.lora_B.weight"] = 0.01 * torch.randn(out, rank)
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank,
            "base_model_name_or_path": str(huggingface_folder()),
            "target_modules": [module.split(".")[1] for module in shapes]}))
    return [str(folder) for folder in folders]


def calm_pair():
    """An anchor of SmolLM2-135M's shape and an augmenting model of 44 million, random weights, SmolLM2's tokenizer;
    ((anchor, augmenting), connected blocks)."""
    import transformers

    shapes = {"anchor": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                             num_key_value_heads=3),
              "augmenting": dict(hidden_size=384, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=6,
                                 num_key_value_heads=2)}
    folders = [CACHE / f"calm-{name}" for name in shapes]
    for folder, shape in zip(folders, shapes.values()):
        if not (folder / "tokenizer_config.json").exists():
            transformers.set_seed(1)
            transformers.LlamaForCausalLM(transformers.LlamaConfig(
                vocab_size=VOCABULARY, tie_word_embeddings=True, max_position_embeddings=2048, **shape,
            )).save_pretrained(folder)
            transformers.AutoTokenizer.from_pretrained(huggingface_folder()).save_pretrained(folder)
    return [str(folder) for folder in folders], [[7, 3], [14, 7], [22, 11], [29, 15]]


def t5_folder():
    """The shape of T5 1.1 small, random weights, a tokenizer that knows its ids as words."""
    folder = CACHE / "t5-small"
    if not (folder / "tokenizer_config.json").exists():
        import tokenizers
        import torch
        import transformers

        transformers.set_seed(1)
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(
            vocab_size=T5_VOCABULARY, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_heads=6,
            feed_forward_proj="gated-gelu", dropout_rate=0.0, decoder_start_token_id=0))
        # A head of its own behind scaled states: what CTranslate2's converter makes of every T5 of transformers 5.
        model.lm_head.weight = torch.nn.Parameter(torch.randn(T5_VOCABULARY, 512))
        model.save_pretrained(folder)
        words = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, T5_VOCABULARY)}
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>")),
            pad_token="<pad>", eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return folder


def sparse_folder(experts, top_k, width):
    """A Mixtral as wide as SmolLM2-135M, of six layers, random weights, with its tokenizer."""
    folder = CACHE / f"mixtral-{experts}x{width}-top{top_k}"
    if not (folder / "tokenizer_config.json").exists():
        import transformers

        transformers.set_seed(1)
        transformers.MixtralForCausalLM(transformers.MixtralConfig(
            vocab_size=VOCABULARY, hidden_size=576, intermediate_size=width, num_hidden_layers=6, num_attention_heads=9,
            num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True, num_local_experts=experts,
            num_experts_per_tok=top_k)).save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(huggingface_folder()).save_pretrained(folder)
    return folder


def choice_questions(count):
    """Questions as those of T0's sets are long: prompts of 30 to 150 tokens, 2 to 4 choices of 1 to 12, EOS behind each."""
    draw = random.Random(4)

    def ids(least, most):
        return [draw.randrange(2, 32000) for _ in range(draw.randint(least, most))]

    return [{"prompt": ids(30, 150), "choices": [[*ids(1, 12), 1] for _ in range(draw.randint(2, 4))]}
            for _ in range(count)]


def ct2_folder(quantization, model=huggingface_folder):
    source = model()
    folder = source.with_name(f"{source.name}-ct2-{quantization}")
    if not (folder / "model.bin").exists():
        import ctranslate2

        ctranslate2.converters.TransformersConverter(str(source)).convert(
            str(folder), quantization=None if quantization == "float32" else quantization, force=True)
    return folder


def uniform_batches():
    """One batch, 8 x 256 random tokens, every one but the first a target."""
    draw = random.Random(1)
    return [{"ids": [[draw.randrange(VOCABULARY) for _ in range(256)] for _ in range(8)], "mask": [[1] * 256] * 8}]


def source_batch(sequences, source, target):
    """One batch of random tokens for an encoder-decoder: `source` that are read, `target` that are learnt."""
    draw = random.Random(1)
    rows = [[draw.randrange(3, T5_VOCABULARY) for _ in range(source + target)] for _ in range(sequences)]
    return [{"ids": rows, "mask": [[0] * source + [1] * target] * sequences}]


def instruction_batches(count=3, size=8):
    """`count` batches of real instructions in the chat template; targets are the answers. None without the data."""
    if not INSTRUCTIONS.exists():
        return None
    path = CACHE / f"instructions-{count}x{size}.json"
    if not path.exists():
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(huggingface_folder())
        rows = json.loads(INSTRUCTIONS.read_text())
        random.Random(2).shuffle(rows)
        batches = []
        for start in range(0, count * size, size):
            batch = {"ids": [], "mask": []}
            for row in rows[start:start + size]:
                question = [{"role": "user", "content": "\n".join(filter(None, [row["instruction"], row["input"]]))}]
                answer = [*question, {"role": "assistant", "content": row["output"]}]
                prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
                whole = tokenizer.apply_chat_template(answer, tokenize=False)
                assert whole.startswith(prompt)
                ids = tokenizer(whole, add_special_tokens=False).input_ids
                known = len(tokenizer(prompt, add_special_tokens=False).input_ids)
                batch["ids"].append(ids)
                batch["mask"].append([int(i >= known) for i in range(len(ids))])
            batches.append(batch)
        path.write_text(json.dumps(batches))
    return json.loads(path.read_text())


def prompt(length):
    """The first `length` tokens of real text."""
    rows = instruction_batches()
    draw = random.Random(3)
    ids = [i for b in rows for s in b["ids"] for i in s] if rows else [draw.randrange(VOCABULARY) for _ in range(length)]
    return ids[:length]

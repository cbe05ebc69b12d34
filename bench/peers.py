"""The peers of `make bench`: transformers, PEFT, a plain PyTorch MoV/MoLoRA, the released CALM, CTranslate2 and llama.cpp,
one job per process.

First line on stdin: the job. Answer: {"base_rss"}. Every further line, an object of changes to the job ("new_tokens"),
runs it once; the answer has "seconds" (wall), "cpu_seconds" (all threads), "tokens" and "peak_rss" (bytes, the highest
during that run).
bench_jobs.cpp speaks the same protocol, so run.py can alternate between ours and theirs.
"""

import json
import os
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]


def status(key):
    """Bytes of one line of /proc/self/status."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def reset_peak():
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def load(job):
    import torch
    import transformers

    torch.set_num_threads(job["threads"])
    seq2seq = transformers.AutoConfig.from_pretrained(job["model"]).is_encoder_decoder
    auto = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(job["model"], dtype=torch.bfloat16 if job.get("bfloat16") else torch.float32)
    for parameter in model.parameters():
        parameter.sum()  # weights are mapped lazily; what is measured above the base must not include them
    return model.requires_grad_(False)


def training(job):
    """One training step per run: forward, backward, AdamW. Sequences are padded at the right to the longest one."""
    import torch

    model = load(job).train()
    seq2seq = model.config.is_encoder_decoder
    linears = (["q", "k", "v", "o", "wi_0", "wi_1", "wo"] if seq2seq else
               ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    if job["method"] in ("lora", "ia3"):
        import peft

        # transformers 5 keeps the experts of a layer in one tensor.
        experts = hasattr(model.config, "num_local_experts")
        lora = peft.LoraConfig(
            task_type="SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM", r=job["rank"], lora_alpha=16, target_modules=linears,
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if experts else None)
        model = peft.get_peft_model(model, lora if job["method"] == "lora" else peft.IA3Config(task_type="CAUSAL_LM"))
        parameters = [p for p in model.parameters() if p.requires_grad]
    elif job["method"] in ("molora", "mov"):
        sys.path.insert(0, str(ROOT / "tests" / "parity"))
        from mixtures import Mixture

        mixture = Mixture(model, job["method"], experts=job["experts"], rank=job["rank"], alpha=16)
        mixture.mixing.keeps = False
        parameters = list(mixture.parameters.values())
    else:
        parameters = []
    optimizer = torch.optim.AdamW(parameters, lr=1e-4) if parameters else None

    batches = source_batches(job) if seq2seq else padded_batches(job)

    def run(index):
        ids, labels, attention, tokens = batches[index % len(batches)]
        if parameters:
            loss = model(input_ids=ids, attention_mask=attention, labels=labels, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        else:  # frozen: the gradient travels through every layer, down to the embeddings' output
            embeddings = model.get_input_embeddings()(ids).requires_grad_(True)
            loss = model(inputs_embeds=embeddings, attention_mask=attention, labels=labels, use_cache=False).loss
            loss.backward()
        return {"tokens": tokens, "loss": loss.item()}

    return run


def calm_training(job):
    """A training step of the released CALM code, its modules as they are in the checkout job["calm"].

    It was written for transformers 4.42, whose layers return tuples; around its hooks the anchor's layers do so again.
    """
    import torch

    sys.path.insert(0, job["calm"])
    from model import calm

    torch.set_num_threads(job["threads"])
    anchor, augmenting = job["models"]
    model = calm.CALM(calm.CALMConfig(anchor_model=anchor, aug_model=augmenting, connections=job["connections"],
                                      num_heads=job["heads"])).train()
    for block, _ in job["connections"]:
        layer = model.anchor_model.model.layers[block]
        layer.register_forward_hook(lambda module, inputs, output: (output,), prepend=True)
        layer.register_forward_hook(lambda module, inputs, output: output[0])
    for parameter in model.parameters():
        parameter.detach().sum()  # weights are mapped lazily; what is measured above the base must not include them
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    batches = padded_batches(job)

    def run(index):
        ids, labels, attention, tokens = batches[index % len(batches)]
        attention = torch.ones_like(ids) if attention is None else attention  # the code requires one
        loss = model(input_ids=ids, attention_mask=attention, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.release_memory()
        return {"tokens": tokens, "loss": loss.item()}

    return run


def padded_batches(job):
    """(ids, labels, attention mask or None, tokens) of each batch, sequences padded at the right."""
    import torch

    batches = []
    for batch in job["batches"]:
        width = max(len(ids) for ids in batch["ids"])
        ids = torch.zeros(len(batch["ids"]), width, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        attention = torch.zeros_like(ids)
        for row, (tokens, mask) in enumerate(zip(batch["ids"], batch["mask"])):
            ids[row, :len(tokens)] = torch.tensor(tokens)
            labels[row, :len(tokens)] = torch.where(torch.tensor(mask) > 0, torch.tensor(tokens), -100)
            attention[row, :len(tokens)] = 1
        # A batch without padding is run without a mask, which spares transformers the masked attention.
        batches.append((ids, labels, None if attention.all() else attention, sum(map(len, batch["ids"]))))
    return batches


def source_batches(job):
    """The same for an encoder-decoder, whose batches have sources of one length and targets of one length."""
    import torch

    batches = []
    for batch in job["batches"]:
        source = batch["mask"][0].index(1)
        ids = torch.tensor(batch["ids"])
        batches.append((ids[:, :source].contiguous(), ids[:, source:].contiguous(), None, ids.numel()))
    return batches


def hf_generate(job):
    import torch

    model = load(job).eval()
    prompt = torch.tensor([job["prompt"]])
    begin = 1 if model.config.is_encoder_decoder else prompt.shape[1]

    def run(_):
        with torch.no_grad():
            ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0,
                                 num_beams=job.get("num_beams", 1), max_new_tokens=job["new_tokens"],
                                 min_new_tokens=job["new_tokens"])[0, begin:]
        return {"tokens": len(ids), "ids": ids.tolist()}

    return run


def score(job):
    """Log-probabilities of answer choices by an encoder-decoder: every choice in a pass of its own, or, `batched`, the
    choices of a question side by side on one reading of it."""
    import torch
    import transformers

    torch.set_num_threads(job["threads"])
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.detach().sum()

    def sums(labels, **inputs):
        logits = model(labels=labels, **inputs).logits.log_softmax(-1)
        kept = labels != -100
        return (logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * kept).sum(-1).tolist()

    def run(_):
        scores = []
        with torch.no_grad():
            for question in job["questions"]:
                prompt, choices = torch.tensor([question["prompt"]]), question["choices"]
                if job.get("batched"):
                    width = max(map(len, choices))
                    labels = torch.tensor([choice + [-100] * (width - len(choice)) for choice in choices])
                    states = model.get_encoder()(input_ids=prompt).last_hidden_state.expand(len(choices), -1, -1)
                    scores += sums(labels, encoder_outputs=(states,))
                else:
                    for choice in choices:
                        scores += sums(torch.tensor([choice]), input_ids=prompt)
        return {"tokens": sum(len(c) for q in job["questions"] for c in q["choices"]), "scores": scores}

    return run


def ct2_generate(job):
    import ctranslate2

    generator = ctranslate2.Generator(job["ct2_model"], device="cpu", compute_type=job["compute_type"], inter_threads=1,
                                      intra_threads=job["threads"])
    tokens = json.loads((pathlib.Path(job["ct2_model"]) / "vocabulary.json").read_text())
    prompt = [tokens[i] for i in job["prompt"]]

    def run(_):
        result = generator.generate_batch([prompt], beam_size=1, sampling_topk=1, max_length=job["new_tokens"],
                                          min_length=job["new_tokens"], include_prompt_in_result=False)[0]
        return {"tokens": len(result.sequences_ids[0]), "ids": result.sequences_ids[0]}

    return run


def ct2_translate(job):
    import ctranslate2

    translator = ctranslate2.Translator(job["ct2_model"], device="cpu", compute_type=job["compute_type"], inter_threads=1,
                                        intra_threads=job["threads"])
    tokens = json.loads((pathlib.Path(job["ct2_model"]) / "shared_vocabulary.json").read_text())
    ids = {token: i for i, token in enumerate(tokens)}
    prompt = [tokens[i] for i in job["prompt"]]

    def run(_):
        result = translator.translate_batch([prompt], beam_size=job.get("num_beams", 1),
                                            max_decoding_length=job["new_tokens"],
                                            min_decoding_length=job["new_tokens"])[0].hypotheses[0]
        return {"tokens": len(result), "ids": [ids[token] for token in result]}

    return run


def llama_generate(job):
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = job["gguf"]
    parameters.n_ctx = 1024
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = job["threads"]
    server = xllamacpp.Server(parameters)

    def run(_):
        answer = server.handle_completions({"prompt": job["prompt"], "max_tokens": job["new_tokens"], "temperature": 0,
                                            "cache_prompt": False, "ignore_eos": True})
        return {"tokens": answer["usage"]["completion_tokens"], "ids": []}

    return run


def peft_mixed(job):
    """Prompts side by side, each with the adapter that `names` has for it, as PEFT's adapter_names does."""
    import peft
    import torch

    model = None
    for name, folder in job["adapters"].items():
        if model is None:
            model = peft.PeftModel.from_pretrained(load(job), folder, adapter_name=name)
        else:
            model.load_adapter(folder, adapter_name=name)
    model.eval()
    prompts = torch.tensor(job["prompts"])

    def run(_):
        with torch.no_grad():
            ids = model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), adapter_names=job["names"],
                                 do_sample=False, pad_token_id=0, max_new_tokens=job["new_tokens"],
                                 min_new_tokens=job["new_tokens"])[:, prompts.shape[1]:]
        return {"tokens": ids.numel(), "ids": ids.tolist()}

    return run


KINDS = {"peft_mixed": peft_mixed, "training": training, "calm": calm_training, "generate": hf_generate, "score": score, "ct2": ct2_generate,
         "ct2_translate": ct2_translate, "llama": llama_generate}


def main():
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the libraries print must not mix with the answers
    job = json.loads(sys.stdin.readline())
    run = KINDS[job["kind"]](job)
    answers.write(json.dumps({"base_rss": status("VmRSS")}) + "\n")
    for index, changes in enumerate(sys.stdin):
        job.update(json.loads(changes))
        reset_peak()
        wall, cpu = time.perf_counter(), time.process_time()
        result = run(index)
        answers.write(json.dumps({"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu,
                                  "peak_rss": status("VmHWM"), **result}) + "\n")


if __name__ == "__main__":
    main()

"""A peer's whole life: start, load the model, print the first token. Arguments: hf|ct2, folder, prompt ids, threads."""

import json
import pathlib
import sys

kind, folder, prompt, threads = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
if kind == "hf":
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        print(model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=1, pad_token_id=0)[0, -1].item())
else:
    import ctranslate2

    model = ctranslate2.Generator(folder, device="cpu", compute_type="float32", intra_threads=threads)
    tokens = json.loads((pathlib.Path(folder) / "vocabulary.json").read_text())
    result = model.generate_batch([[tokens[i] for i in prompt]], max_length=1, min_length=1, sampling_topk=1,
                                  include_prompt_in_result=False)
    print(result[0].sequences_ids[0][0])

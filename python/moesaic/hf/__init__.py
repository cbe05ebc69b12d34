"""MoV and MoLoRA on transformers' models, in PyTorch alone: the readable form, and what moesaic's own is tested against.

    import transformers
    from moesaic import hf

    model = transformers.AutoModelForCausalLM.from_pretrained("SmolLM2-135M-Instruct")
    hf.load(model, "out")               # an adapter that moesaic trained; or hf.attach(model, "mov", num_experts=4)
    model.generate(...)                 # everything else is transformers'
    hf.save(model, "again")             # the folder that moesaic reads

Needs torch, transformers and safetensors. LoRA and (IA)^3 of one expert are PEFT's.
"""

from moesaic.hf.mixture import Mixture, attach, load, losses, routes, save, sentences

__all__ = ["Mixture", "attach", "load", "losses", "routes", "save", "sentences"]

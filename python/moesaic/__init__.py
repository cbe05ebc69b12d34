"""Mixtures of experts grown out of pretrained language models: load, attach, train, generate, evaluate.

    import moesaic as ms

    model = ms.load("SmolLM2-135M-Instruct.Q4_1.gguf")
    run = ms.train({"model_name_or_path": model.path, "finetuning_type": "molora", "dataset": "data.jsonl",
                    "output_dir": "out"})
    model.attach(run.output_dir)
    print(model.generate("Reverse: a b c"))

The same program as `moesaic` on the command line. `moesaic.hf` needs no part of it: the same adapters on
transformers' models, in PyTorch alone.
"""

import importlib

_PLACES = {
    "load": "model", "Model": "model", "Routes": "model", "Answer": "model", "Table": "model",
    "train": "run", "plan": "run", "compose": "run", "Run": "run",
    "Error": "errors", "UsageError": "errors", "DataError": "errors", "FormatError": "errors", "ConfigError": "errors",
    "ShapeError": "errors", "Stopped": "errors",
}
__all__ = [*_PLACES, "set_log_level"]


def __getattr__(name):  # torch is not imported before something needs it
    if name in _PLACES:
        return getattr(importlib.import_module(f"moesaic.{_PLACES[name]}"), name)
    if name == "__version__":
        from importlib.metadata import version
        return version("moesaic")
    if name == "set_log_level":
        return importlib.import_module("moesaic._native").set_log_level
    raise AttributeError(f"module 'moesaic' has no attribute {name!r}")


def __dir__():
    return sorted([*__all__, "__version__"])

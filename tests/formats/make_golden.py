"""Makes golden/dequantize.safetensors: random blocks of each GGUF type and what the gguf package makes of them.

Run it again only when a type is added:  python tests/formats/make_golden.py
"""

import importlib.metadata
import pathlib

import gguf
import numpy as np
from safetensors.numpy import save_file

# Byte offsets of the float16 numbers in a block; all other bytes may be anything.
HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
          "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0]}


def main():
    random = np.random.default_rng(20261122)
    tensors = {}
    for name, halves in HALVES.items():
        kind = gguf.GGMLQuantizationType[name]
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = random.integers(0, 256, (64 // elements or 1, size), dtype=np.uint8)
        for offset in halves:
            numbers = random.normal(0, 0.3, len(blocks)).astype(np.float16)
            blocks[:, offset:offset + 2] = numbers.view(np.uint8).reshape(-1, 2)
        tensors[f"{name}.blocks"] = blocks
        tensors[f"{name}.values"] = gguf.quants.dequantize(blocks, kind).astype(np.float32).reshape(-1)
    for name in ["F16", "BF16"]:
        # Every kind of number: normal, subnormal, zeros; no NaN, whose payload may change.
        bits = np.array([0x0000, 0x8000, 0x0001, 0x83ff, 0x3c00, 0xc248, 0x7b01, 0x0400], dtype=np.uint16)
        tensors[f"{name}.blocks"] = bits.view(np.uint8)
        if name == "F16":
            tensors[f"{name}.values"] = bits.view(np.float16).astype(np.float32)
        else:
            tensors[f"{name}.values"] = gguf.quants.dequantize(bits.view(np.uint8), gguf.GGMLQuantizationType.BF16)
    path = pathlib.Path(__file__).parent / "golden" / "dequantize.safetensors"
    save_file(tensors, path, {"gguf": importlib.metadata.version("gguf"), "made_by": "tests/formats/make_golden.py"})


if __name__ == "__main__":
    main()

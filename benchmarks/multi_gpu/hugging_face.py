"""A random model of transformers', converted, with the logits that it has there.

python -m benchmarks.multi_gpu.hugging_face FOLDER CACHE_DIR [settings of the small model]

Writes FOLDER/checkpoint, tokens.pt, fp32.pt and bf16.pt, transformers' logits in either format, and
tells in a file how it ended, as jobs do.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from benchmarks.multi_gpu.jobs import DONE, FAILED
from megatron_kanana.data.builtin import builtin_data
from megatron_kanana.data.export_tokenizer import save_hugging_face_tokenizer
from tests.conversion.test_transformers import random_model
from tests.model.beside_transformers import small_settings
from tools.convert_checkpoint import main as convert

SHAPE = (2, 64)


def main(folder: Path, cache_dir: Path, overrides: list[str]) -> int:
    """Make the model, convert it, and compute; returns the converter's exit code."""
    model = small_settings(overrides).model
    theirs = random_model(model, 0)
    source = folder / "transformers"
    theirs.save_pretrained(source)
    save_hugging_face_tokenizer(builtin_data(cache_dir, model.vocab_size).tokenizer, source)
    tokens = torch.randint(model.vocab_size, SHAPE, generator=torch.Generator().manual_seed(1))
    torch.save(tokens, folder / "tokens.pt")
    with torch.no_grad():
        torch.save(theirs(tokens).logits, folder / "fp32.pt")
        torch.save(theirs.to(torch.bfloat16)(tokens).logits.float(), folder / "bf16.pt")
    return convert(["to-megatron", "--hf", str(source), "--out", str(folder / "checkpoint")])


if __name__ == "__main__":
    where = Path(sys.argv[1])
    code = 1
    try:
        code = main(where, Path(sys.argv[2]), sys.argv[3:])
    finally:
        (where / (FAILED if code else DONE)).touch()
    sys.exit(code)

"""What the model of an exported folder answers, by transformers alone.

    python examples/kanana_2_155b_a17b/answer.py FOLDER question.json tools.json

On GPUs the layers are dealt over all of them, for which transformers needs accelerate.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import transformers


def main() -> None:
    """Print the answer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="what convert_checkpoint.py to-hf wrote")
    parser.add_argument("messages", type=Path, help="JSON list of messages")
    parser.add_argument("tools", type=Path, help="JSON list of schemas of functions")
    options = parser.parse_args()
    device = "auto" if torch.cuda.is_available() else None
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.folder, dtype="auto", device_map=device
    )
    prompt = tokenizer.apply_chat_template(
        json.loads(options.messages.read_text("utf-8")),
        tools=json.loads(options.tools.read_text("utf-8")),
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    ).to(model.device)
    reply = model.generate(**prompt, max_new_tokens=128, do_sample=False)
    text = tokenizer.decode(reply[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    print(text)


if __name__ == "__main__":
    main()

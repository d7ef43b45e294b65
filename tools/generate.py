"""Continue a text, or answer a conversation, with the model of a checkpoint.

    python tools/generate.py runs/kanana_2_tiny/checkpoints/step_00000120 --prompt "import "
    python tools/generate.py CHECKPOINT --chat messages.json --tools tools.json --no-thinking

Any layout will do, whatever the checkpoint was made with:

    torchrun --nproc-per-node 2 tools/generate.py CHECKPOINT parallel.tensor_parallel_size=2

The context, which the prompt and what follows share, is data.sequence_length.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_kanana import device
from megatron_kanana.config import (
    ConfigurationError,
    Environment,
    Settings,
    detect_environment,
    tell,
)
from megatron_kanana.config.saved_model import settings_of_saved_model
from megatron_kanana.data.chat import Message, read_messages, read_tools, render_chat
from megatron_kanana.data.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from megatron_kanana.training.generation import Continuation


def main() -> int:
    """Check everything, load, generate, print."""
    options = parse_arguments()
    environment = detect_environment()
    try:
        settings = settings_of_saved_model(options.checkpoint, options.overrides, environment)
        assert settings.data.tokenizer is not None
        tokenizer = load_tokenizer(settings.data.tokenizer)
        prompt = prompt_tokens(options, tokenizer)
        if len(prompt) >= settings.data.sequence_length:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, which leaves no room in the context;"
                f" data.sequence_length is {settings.data.sequence_length}"
            )
    except (ConfigurationError, ValueError) as error:
        return tell(error, environment.rank)
    return run(settings, environment, options, prompt)


def run(
    settings: Settings, environment: Environment, options: argparse.Namespace, prompt: list[int]
) -> int:
    """Generate on this process; the first one prints."""
    where = device.prepare_device(settings, environment)
    device.initialize_process_groups(settings, where)

    from megatron_kanana.checkpoint.state import load_model
    from megatron_kanana.checkpoint.verification import CheckpointError, ensure_whole
    from megatron_kanana.device.safe_unpickling import UnsafeFileError
    from megatron_kanana.training.generation import generate
    from megatron_kanana.training.run import build_bare_model
    from megatron_kanana.training.sampling import Sampling

    model = build_bare_model(settings, where)
    try:
        ensure_whole(options.checkpoint, contents=settings.checkpoint.verify)
        load_model(model.chunks, options.checkpoint)
    except (CheckpointError, UnsafeFileError) as error:
        return tell(error, environment.rank)
    sampling = Sampling(options.temperature, options.top_p, options.seed)
    start = time.monotonic()
    continuation = generate(model, prompt, options.max_tokens, sampling)
    seconds = time.monotonic() - start
    if environment.rank == 0:
        shown = continuation.tokens if options.chat else [*prompt, *continuation.tokens]
        print(model.tokenizer.decode(shown), flush=True)
        print(summary(continuation, len(prompt), seconds), file=sys.stderr)
    device.destroy_process_groups()
    return 0


def prompt_tokens(options: argparse.Namespace, tokenizer: Tokenizer) -> list[int]:
    """What the model is to continue: a text, or a conversation up to the assistant's turn.

    Raises:
        ValueError: a file cannot be read, or the chat template refuses it.
    """
    if options.chat is None:
        return tokenizer.encode_prompt(options.prompt) or [tokenizer.eod]
    messages: list[Message] = read_messages(options.chat)
    tools = read_tools(options.tools) if options.tools is not None else None
    return tokenizer.encode_chat(render_chat(tokenizer, messages, tools, options.thinking))


def summary(continuation: Continuation, prompt_length: int, seconds: float) -> str:
    """One line about what was generated, and why it ended."""
    count = len(continuation.tokens)
    return (
        f"[{prompt_length} tokens of prompt, {count} new, {(count + 1) / seconds:.1f} tokens/s;"
        f" ended by: {continuation.ended_by}]"
    )


def parse_arguments() -> argparse.Namespace:
    """Options of the command line; wrong ones end with exit code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a step_… folder")
    parser.add_argument("overrides", nargs="*", help="setting=value, for another layout or device")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", default="def __init__(self", help="text to continue")
    what.add_argument(
        "--chat", type=Path, metavar="FILE", help="JSON list of messages, with role and content"
    )
    parser.add_argument(
        "--tools", type=Path, metavar="FILE", help="JSON list of schemas of functions, for --chat"
    )
    parser.add_argument(
        "--thinking",
        action=argparse.BooleanOptionalAction,
        help="with --chat: reason before the answer, or not; what the chat template does if unset",
    )
    parser.add_argument(
        "--max-tokens",
        type=_number(int, lambda value: value >= 1, "1 or more"),
        default=128,
        help="tokens to generate at most",
    )
    parser.add_argument(
        "--temperature",
        type=_number(float, lambda value: 0 <= value < float("inf"), "0 or more"),
        default=0.7,
        help="divides the logits; 0 always takes the most probable token",
    )
    parser.add_argument(
        "--top-p",
        type=_number(float, lambda value: 0 < value <= 1, "above 0, at most 1"),
        default=1.0,
        help="choose among the most probable tokens that together have this probability",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    options = parser.parse_intermixed_args()
    if options.chat is None and (options.tools is not None or options.thinking is not None):
        parser.error("--tools and --thinking belong to --chat")
    return options


def _number(
    kind: Callable[[str], float], allowed: Callable[[float], bool], limits: str
) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"{text} is not a number that is {limits}")
        return value

    return parse


if __name__ == "__main__":
    sys.exit(main())

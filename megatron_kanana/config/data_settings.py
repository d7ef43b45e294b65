"""Settings of the group `data`: the text, how it is mixed, and what is held out."""

from __future__ import annotations

from dataclasses import dataclass

from .chat_settings import ChatSettings
from .fields import setting


@dataclass(kw_only=True)
class BlendEntry:
    """One source of the blend: one indexed dataset, or several of one kind."""

    path: str | None = setting(
        None,
        help="path of an indexed dataset without .bin or .idx; without any, source names one of"
        " the built-in text",
    )
    paths: list[str] = setting(
        [], help="further datasets of this source, each with a share by its size"
    )
    source: str | None = setting(
        None, help="name of the source in ledger and logs; null is the last part of the path"
    )
    weight: float = setting(
        1.0, help="share of the samples, relative to the other sources", minimum=0.0
    )


@dataclass(kw_only=True)
class BlendChange:
    """Other shares of the sources from some point of the run on."""

    tokens: float = setting(help="tokens trained on, from which on the weights hold", above=0.0)
    weights: dict[str, float] = setting(
        help="share of each source, relative to the others; one not named is not used",
        minimum=0.0,
    )


@dataclass(kw_only=True)
class EvaluationSet:
    """Held-out text that is evaluated on its own."""

    name: str = setting(help="name in metrics, TensorBoard and report")
    path: str = setting(
        help=".jsonl, .txt or .parquet file, or indexed dataset without .bin or .idx"
    )


@dataclass(kw_only=True)
class DataSettings:
    """Text, tokenizer and batches."""

    sequence_length: int = setting(help="tokens of one training sample", minimum=2)
    blend: list[BlendEntry] = setting(
        [], help="sources at the beginning of the run; an empty list uses the built-in text"
    )
    blend_changes: list[BlendChange] = setting(
        [], help="later shares, [{tokens: …, weights: {source: …}}, …] by growing tokens"
    )
    document_mask: bool = setting(
        False, help="tokens attend to their own document only, not to others in the sample"
    )
    conversations: list[str] = setting(
        [],
        help="chat files (.jsonl, .parquet) for supervised fine-tuning, in place of text; several"
        " conversations share a sample without seeing one another",
    )
    held_out_conversations: list[str] = setting(
        [],
        help="chat files to evaluate on; without any, the last held_out_percent of the"
        " conversations are",
    )
    chat: ChatSettings = setting(ChatSettings, help="how conversations become samples")
    evaluation_sets: list[EvaluationSet] = setting(
        [],
        help="held-out texts whose perplexity every evaluation tells by name; an empty list with"
        " the built-in text uses its six languages",
    )
    tokenizer: str | None = setting(
        None,
        help="SentencePiece model, or folder with Hugging Face's tokenizer.json; null trains one on"
        " the built-in text at first use",
    )
    cache_dir: str = setting(
        "data", help="where the trained tokenizer, built-in datasets and index caches are kept"
    )
    held_out_percent: float = setting(
        2.0, help="share of each dataset's documents kept for evaluation", minimum=0.0, maximum=50.0
    )
    num_workers: int = setting(0, help="data-loader processes of each rank", minimum=0)

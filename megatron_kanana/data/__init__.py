"""Text, tokenizer, indexed datasets and batches."""

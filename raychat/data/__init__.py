"""From text to token rows: corpora, tokenizer, packing, shards, order, reader."""

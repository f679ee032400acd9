"""Prompts: tokenizer, embeddings as files, the cache of embeddings."""

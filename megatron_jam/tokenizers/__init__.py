"""Vocabulary, text and image tokenizers, document layouts."""

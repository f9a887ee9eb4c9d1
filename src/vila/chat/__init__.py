"""Conversation templates, rendering, tokenization with labels, and parsing of messages with content parts."""

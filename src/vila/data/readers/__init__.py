"""Readers of the containers that training data come in: JSON, tar, parquet, and byte-offset indexes."""

"""Preparation of public data sets: download, check and convert them to shards (`vila data prepare`)."""

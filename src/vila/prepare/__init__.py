"""Data preparation: from what was published to shards that the formats of `vila.data` read. Nothing here trains."""

"""Text generation and scoring: `generate`, `stream`, `generate_batch`, `complete`, `score`."""

"""A server of the OpenAI chat protocol, and a demo that is its client."""

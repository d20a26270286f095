"""The OpenAI-compatible door of a client node: HTTP in, jobs on the marketplace out."""

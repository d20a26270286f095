"""The demo model: how its corpus is gathered, how it is trained, and the weights themselves."""

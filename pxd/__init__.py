"""pxd: decentralised LLM inference. Every node runs the same daemon; any node answers."""

__version__ = "0.1.0"

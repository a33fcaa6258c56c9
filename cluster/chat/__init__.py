"""The client's side of a chat: turns, and tools that run beside it."""

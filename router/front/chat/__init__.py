"""V3.2's chat format: messages into prompt text, reply text into events. It has no Jinja template."""

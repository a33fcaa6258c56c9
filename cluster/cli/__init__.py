"""The `moray` command line: one module a command."""

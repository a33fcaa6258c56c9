"""The public API of Moray: gRPC server, HTTP side endpoints, tokenizer."""

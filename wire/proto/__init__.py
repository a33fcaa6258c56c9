"""Protobuf package moray.v1; the generated code is committed and made by `make proto`."""

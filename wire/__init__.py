"""What crosses a process: protos, tensor frames, handshake, error tree, metric names."""

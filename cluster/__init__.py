"""The control plane: config, Ray actors, controller, topology, placement, lifecycle, command line."""

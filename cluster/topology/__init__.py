"""Where Ray nodes stand: zone, rack and accelerator, from Kubernetes or from Ray's own node labels."""

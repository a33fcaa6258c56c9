"""DeepSeek-V3.2 as arithmetic: tensors in, tensors out; the MoE step is a callable passed in."""

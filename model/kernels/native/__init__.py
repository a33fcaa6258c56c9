"""The kernels in C++, for processors: built at install, one library for each kind of processor."""

// Where threads run.
#pragma once

// Keeps the calling thread on the n-th of the processors that moray_bind_threads was given, if it was given any.
void bind_thread(int n);

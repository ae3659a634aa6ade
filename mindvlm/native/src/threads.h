// A pool of threads that share the work of one product at a time.
#pragma once
#include <cstdint>
#include <functional>

// Sets the number of threads of later calls, the caller included. At least 1.
void set_num_threads(int count);
int num_threads();

// Runs task(i) for every i in [0, count) on the pool and the calling thread. Returns after the last one. Calls from several
// threads run one after another. A task must not call it.
void run_parallel(int64_t count, const std::function<void(int64_t)>& task);

// The kernels that the libraries hold: a line for each operator.
#pragma once

#include "../merge/kernel.h"
#include "../rank/kernel.h"
#include "../reduce/kernel.h"

namespace tomexport {

template <class... T> struct List {};
using Operators = List<Merge, Reduce, Rank>;

}  // namespace tomexport

// What every processor of the architecture has; the compiler maps 16-byte vectors to SSE2 or NEON.
#define FASTSCORE_TIER baseline
#define FASTSCORE_TIER_NAME "baseline"
#define FASTSCORE_VECTOR_BYTES 16
#include "dispatch_table.h"

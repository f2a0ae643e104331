//! What a device is: registers, context, lines, timers, state, test bench.

//! Reads backtraces of virtual machine monitors and says what happened.

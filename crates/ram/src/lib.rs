//! Guest memory: mapping, volatile access, dirty tracking.

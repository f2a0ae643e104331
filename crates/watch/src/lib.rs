//! Access records, flight recorder, filters and sinks.

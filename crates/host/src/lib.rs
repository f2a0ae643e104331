//! The host's side: terminal, sockets, files, event loop.
